"""Latents in 8, 6 or 4 bits: how a page of the pool holds them, and what the codes stand for.

The latent is cut evenly between its largest numbers, with one scale a token; below 8 bits it is rotated
first (Hadamard), so that no number stands out. The rope key stays in bf16, or, below 8 bits, has 12 bits and
a scale of its own, and a third of bf16's error. A page holds, one after the other, its tokens' codes, keys
and scales.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv2cli.formats import KEY_BITS, PAGE, latent_widths

Planes = tuple[Tensor, Tensor, Tensor]  # codes and keys in bytes, and scales: each [..., PAGE, its own size]


@functools.cache
def hadamard(size: int) -> Tensor:
    """The orthonormal one, which is its own inverse. `size` is a power of two. [size, size] in fp32"""
    out = torch.ones(1, 1)
    while len(out) < size:
        out = torch.cat([torch.cat([out, out], 1), torch.cat([out, -out], 1)])
    return out / math.sqrt(size)


def rotated(x: Tensor) -> Tensor:
    """x [..., rank] in blocks of the largest power of two that divides rank, each times hadamard(block) in
    sums and differences; twice is x again.
    """
    rank = x.shape[-1]
    block = rank & -rank
    turned = x.float().unflatten(-1, (-1, block))
    for _ in range(block.bit_length() - 1):
        even, odd = turned[..., 0::2], turned[..., 1::2]
        turned = torch.cat([even + odd, even - odd], dim=-1)
    return (turned / math.sqrt(block)).flatten(-2).type_as(x)


@dataclass(frozen=True)
class Packing:
    """How a token of `rank` + `rope` numbers is held in `bits`. See formats.py for the sizes."""

    bits: int
    rank: int
    rope: int

    @property
    def rotates(self) -> bool:
        return self.bits < 8

    @property
    def key_bits(self) -> int:
        return KEY_BITS[self.bits]

    @property
    def widths(self) -> tuple[int, int, int]:
        """Bytes of a token's codes, key and scales."""
        return latent_widths(self.bits, self.rank, self.rope)

    @property
    def page_bytes(self) -> int:
        return PAGE * sum(self.widths)

    def planes(self, layer: Tensor) -> Planes:
        """Pages [..., page_bytes] by their parts."""
        codes, keys, scales = layer.split([PAGE * width for width in self.widths], dim=-1)
        widths = self.widths
        return (
            codes.unflatten(-1, (PAGE, widths[0])),
            keys.unflatten(-1, (PAGE, widths[1])),
            scales.view(torch.bfloat16).unflatten(-1, (PAGE, widths[2] // 2)),
        )

    def encode(self, latents: Tensor) -> Planes:
        """Latents [tokens, rank + rope] -> codes and keys [tokens, bytes], scales [tokens, 1 or 2]"""
        latent, key = latents.split([self.rank, self.rope], dim=-1)
        codes, scale = even_codes(rotated(latent) if self.rotates else latent, self.bits)
        codes = codes.to(torch.uint8) if self.bits == 8 else together(codes, self.bits)
        if self.key_bits == 16:
            return codes, key.bfloat16().contiguous().view(torch.uint8), scale
        keys, key_scale = even_codes(key, self.key_bits)
        return codes, together(keys, self.key_bits), torch.cat([scale, key_scale], dim=-1)

    def decode(self, planes: Planes, dtype: torch.dtype, turned: bool = False) -> Tensor:
        """The other way round, as near as the codes are: [tokens, rank + rope] in `dtype`. `turned`: latents
        as they are held, without turning them back.
        """
        codes, keys, scales = planes
        scales = scales.float()
        numbers = codes.int() if self.bits == 8 else apart(codes, self.bits, self.rank)
        latent = meant(numbers, self.bits) * scales[..., :1]
        if self.rotates and not turned:
            latent = rotated(latent)
        if self.key_bits == 16:
            key = keys.contiguous().view(torch.bfloat16).float()
        else:
            key = meant(apart(keys, self.key_bits, self.rope), self.key_bits) * scales[..., 1:]
        return torch.cat([latent, key], dim=-1).to(dtype)


def meant(codes: Tensor, bits: int) -> Tensor:
    """What codes of any shape stand for, in scales: they lie evenly around 0, which is none of them."""
    return codes.float() - (2**bits - 1) / 2


def even_codes(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """x [tokens, size] -> its codes [tokens, size] in int32 and its scale [tokens, 1] in bf16"""
    wide, top = x.float(), (2**bits - 1) / 2
    scale = (wide.abs().amax(-1, keepdim=True) / top).clamp(min=1e-30).bfloat16()
    return (wide / scale.float() + top).round().clamp(0, 2**bits - 1).int(), scale


def together(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., size] of 4, 6 or 12 bits as bytes, plane by plane: of 12 bits the lower 8; then the next 4,
    those of the second half of the numbers above those of the first; of 6 bits the upper 2, by quarters.
    """
    planes, done = [], 0
    if bits == 12:
        planes.append(codes & 255)
        done = 8
    half = codes.shape[-1] // 2
    four = codes >> done & 15
    planes.append(four[..., :half] | four[..., half:] << 4)
    if bits == 6:
        quarters = (codes >> 4 & 3).unflatten(-1, (4, -1))
        planes.append(sum(quarters[..., i, :] << 2 * i for i in range(4)))  # type: ignore[arg-type]
    return torch.cat(planes, dim=-1).to(torch.uint8)


def apart(data: Tensor, bits: int, size: int) -> Tensor:
    """The other way round. data [..., bytes] -> codes [..., size] in int32"""
    data = data.int()
    low = data.new_zeros(())
    if bits == 12:
        low, data = data.split([size, size // 2], dim=-1)
    four, data = data.split([size // 2, data.shape[-1] - size // 2], dim=-1)
    out = torch.cat([four & 15, four >> 4], dim=-1)
    if bits == 12:
        return low | out << 8
    if bits == 6:
        out = out | torch.cat([data >> 2 * i & 3 for i in range(4)], dim=-1) << 4
    return out
