"""Weights in 8 or 4 bits: a code stands for a value times a scale, which a group of numbers of a row shares.

An int8 code c means c - 128. An int4 code means an entry of CODEBOOK: 16 values that lie closer together near
zero, where most weights are. Against evenly spaced codes with a minimum of their own they lose less at fewer
bits. Sixteen rows lie interleaved, four numbers of each in turn, which is the order in which a CPU multiplies
them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsv2cli.formats import LANES

# Lloyd's algorithm on groups of 64 normal numbers, each divided by its largest with that one's sign.
CODEBOOK = (
    -110.0,
    -87.0,
    -69.0,
    -54.0,
    -40.0,
    -27.0,
    -15.0,
    -3.0,
    9.0,
    21.0,
    34.0,
    47.0,
    62.0,
    79.0,
    99.0,
    127.0,
)
# What a group's largest number may become: the search takes the scale that leaves the least squared error.
SHRINKS = tuple(sign * factor for factor in (127.0, 118.0, 137.0, 110.0, 148.0) for sign in (1.0, -1.0))


class Quantized(nn.Module):
    """A matrix [rows, cols], or a stack of them, in `bits` bits.

    `parts` equal parts of the rows (gate and up) are padded to whole blocks each. codes [..., blocks, bytes]
    uint8, scales [..., blocks, groups, 16] bf16.
    """

    codes: Tensor
    scales: Tensor

    def __init__(
        self, shape: tuple[int, ...], bits: int, group: int, parts: int, device: torch.device
    ) -> None:
        super().__init__()
        *stack, rows, cols = shape
        self.shape, self.bits, self.group, self.parts = tuple(shape), bits, group, parts
        self.blocks_per_part, self.groups = -(-rows // parts // LANES), -(-cols // group)
        blocks = parts * self.blocks_per_part
        size = self.groups * group * LANES * bits // 8
        self.register_buffer("codes", torch.empty(*stack, blocks, size, dtype=torch.uint8, device=device))
        self.register_buffer(
            "scales", torch.empty(*stack, blocks, self.groups, LANES, dtype=torch.bfloat16, device=device)
        )

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def part(self, expert: int | None, part: int) -> tuple[Tensor, Tensor]:
        """Codes [blocks, bytes] and scales [blocks, groups, 16] of one part of one matrix, to be filled."""
        blocks = slice(part * self.blocks_per_part, (part + 1) * self.blocks_per_part)
        codes, scales = (
            (self.codes, self.scales) if expert is None else (self.codes[expert], self.scales[expert])
        )
        return codes[blocks], scales[blocks]

    def unbind(self, dim: int = 0) -> list[Quantized]:
        """The matrices of a stack, sharing its memory."""
        assert dim == 0 and len(self.shape) == 3
        out = []
        for codes, scales in zip(self.codes, self.scales, strict=True):
            one = Quantized(self.shape[1:], self.bits, self.group, self.parts, torch.device("meta"))
            one.codes, one.scales = codes, scales
            out.append(one)
        return out

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weights that the codes stand for, rounded to `dtype`. -> `shape`"""
        *stack, rows, cols = self.shape
        if 0 in self.shape:  # a rank of a team may hold nothing of a matrix
            return torch.empty(self.shape, dtype=dtype, device=self.codes.device)
        codes = self.codes.unflatten(-1, (-1, LANES, 4))  # [..., blocks, cols / 4 or 8, 16, 4]
        if self.bits == 8:
            values = codes.float() - 128
        else:
            index = torch.stack([codes & 15, codes >> 4], dim=-3).flatten(-4, -3)
            values = torch.tensor(CODEBOOK, device=codes.device)[
                index.long()
            ]  # [..., blocks, cols / 4, 16, 4]
        values = values.transpose(-3, -2).flatten(-2).unflatten(-1, (self.groups, self.group))
        values = values * self.scales.float().transpose(-2, -1)[..., None]
        values = values.flatten(-2)  # [..., blocks, 16, cols]
        values = values.reshape(*stack, self.parts, -1, values.shape[-1])
        return values[..., : rows // self.parts, :cols].reshape(self.shape).to(dtype)


def pack_reference(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """weight [rows, cols] -> codes [blocks, bytes] and scales [blocks, groups, 16] of one part.

    Zeros fill it up to whole blocks and groups.
    """
    rows, cols = weight.shape
    padded = weight.new_zeros(-(-rows // LANES) * LANES, -(-cols // group) * group, dtype=torch.float32)
    padded[:rows, :cols] = weight
    x = padded.unflatten(-1, (-1, group))  # [rows, groups, group]
    largest = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    if bits == 8:
        scale = (largest.abs() / 127).bfloat16()
        index = (x / scale.float().where(scale != 0, 1.0)).round().clamp(-127, 127) + 128
    else:
        scale, index = search(x, largest)
    scales = scale[..., 0].unflatten(0, (-1, LANES)).transpose(-2, -1).contiguous()  # [blocks, groups, 16]
    codes = index.to(torch.uint8).flatten(-2).unflatten(0, (-1, LANES)).unflatten(-1, (-1, 4)).transpose(1, 2)
    if bits == 4:
        low, high = codes.unflatten(1, (-1, 2)).unbind(2)
        codes = low | (high << 4)
    return codes.flatten(1), scales


def search(x: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """For each group the scale and codes with the least squared error among SHRINKS, each scale refitted.

    x [..., groups, group] and each group's largest number [..., groups, 1] -> scale in bf16 and codes, so
    too.
    """
    values = torch.tensor(CODEBOOK, device=x.device)
    middles = (values[1:] + values[:-1]) / 2

    def encode(scaled: Tensor) -> Tensor:
        return torch.bucketize(scaled, middles)

    best, chosen = torch.full_like(largest, -1.0), torch.zeros_like(largest)
    for shrink in SHRINKS:
        q = values[encode(x * (shrink / largest.where(largest != 0, 1.0)))]
        qx, qq = (q * x).sum(-1, keepdim=True), (q * q).sum(-1, keepdim=True)
        better = (qx * qx / qq > best) & (largest != 0)
        best, chosen = best.where(~better, qx * qx / qq), chosen.where(~better, qx / qq)
    scale = chosen.bfloat16()
    wide = scale.float()
    return scale, encode(x * torch.where(wide != 0, 1 / wide.where(wide != 0, 1.0), 0.0))


def round_activations(x: Tensor, group: int) -> Tensor:
    """What the CPU kernels make of rows that meet 8- and 4-bit weights: int8 with a scale a group.

    x [..., cols] -> the numbers that stands for, in fp32.
    """
    cols = x.shape[-1]
    wide = torch.nn.functional.pad(x.float(), (0, -cols % group)).unflatten(-1, (-1, group))
    scale = wide.abs().amax(-1, keepdim=True) / 127
    return ((wide / scale.where(scale > 0, 1.0)).round() * scale).flatten(-2)[..., :cols]
