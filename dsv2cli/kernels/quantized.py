"""Weights in 8 or 4 bits: a code stands for a value times a scale, which a group of numbers of a row shares,
and perhaps plus an offset: formats.Coding says which.

Of what we pack ourselves an int8 code c means c - 128, and an int4 code an entry of CODEBOOK: 16 values that
lie closer together near zero, where most weights are. Against evenly spaced codes with a minimum of their own
they lose less at fewer bits. Codes of other programs are kept as they are, so that nothing is lost. Sixteen
rows lie interleaved, four numbers of each in turn, which is the order in which a CPU multiplies them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dsv2cli.formats import LANES, SUPER, Coding, own_coding

# Of numbers that 6 bits hold, for which AVX2 has a shorter product (vector.h's dot_six), those that leave the
# least squared error on the embedded model's weights: 0.2% more than with 7 bits, 0.6% less than IQ4_NL.
CODEBOOK = tuple(map(float, (-27, -21, -17, -13, -10, -7, -4, -1, 2, 5, 8, 11, 15, 19, 25, 33)))
IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # of llama.cpp
TABLES: dict[str, tuple[float, ...]] = {
    "codebook": CODEBOOK,
    "iq4_nl": tuple(map(float, IQ4_NL)),
    "signed": tuple(float(code - 8) for code in range(16)),
    "plain": tuple(map(float, range(16))),
}  # of 4 bits
SCALES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "I8": torch.int8}
# What a group's largest number may become: the search takes the scale that leaves the least squared error.
SHRINKS = tuple(sign * factor for factor in (31.0, 28.8, 33.4, 26.9, 36.1) for sign in (1.0, -1.0))


@dataclass(frozen=True)
class Codes:
    """A matrix [rows, cols], or some rows of it, as codes that are not interleaved yet.

    values [rows, cols] uint8, a code a byte; scales [rows, groups] in the type that the Coding names, and
    where it names offsets these likewise. Where scales are I8: supers and super_offsets [rows, cols / SUPER]
    in fp16.
    """

    values: Tensor
    scales: Tensor
    offsets: Tensor | None = None
    supers: Tensor | None = None
    super_offsets: Tensor | None = None

    def both(self, offset: str) -> tuple[Tensor, Tensor | None]:
        """Scales and offsets side by side [rows, groups, 1 or 2], and what they are multiplied by."""
        scales, supers = [self.scales], [self.supers]
        if offset:
            scales, supers = [*scales, self.offsets], [*supers, self.super_offsets]  # type: ignore[list-item]
        pairs = [each for each in supers if each is not None]
        return torch.stack(scales, -1), torch.stack(pairs, -1) if pairs else None


@functools.cache
def table_on(name: str, device: torch.device) -> Tensor:
    """The numbers of a table of 4-bit codes [16], of which there is one on each device: a CUDA graph can not
    bring it there.
    """
    with torch.inference_mode(False):
        return torch.tensor(TABLES[name], device=device)


def values_of(codes: Tensor, coding: Coding) -> Tensor:
    """What codes of any shape mean, one a byte, in fp32."""
    if coding.table == "e4m3":
        return codes.view(torch.float8_e4m3fn).float()
    if coding.bits == 8:
        return codes.float() - (128 if coding.table == "signed" else 0)
    return table_on(coding.table, codes.device)[codes.long()]


def multiplied(scales: Tensor, supers: Tensor | None, coding: Coding) -> Tensor:
    """scales [..., groups, any] in fp32, times supers [..., SUPERs, the same] where there are any."""
    if supers is None:
        return scales.float()
    each = supers.float().repeat_interleave(SUPER // coding.group, -2)
    return scales.float() * each[..., : scales.shape[-2], :]


def weights_of(values: Tensor, scales: Tensor, supers: Tensor | None, coding: Coding) -> Tensor:
    """values [..., cols] in fp32, scales [..., groups, 1 or 2], supers [..., SUPERs, 1 or 2] -> weights."""
    scales = multiplied(scales, supers, coding)
    values = values.unflatten(-1, (-1, coding.group))  # [..., groups, group]
    if coding.offset == "zero":
        assert supers is None
        values = values - scales[..., 1:]
    weights = values * scales[..., :1]
    return (weights + scales[..., 1:] if coding.offset == "added" else weights).flatten(-2)


def decode(codes: Codes, coding: Coding) -> Tensor:
    """The weights [rows, cols] that codes stand for, in fp32."""
    values = values_of(codes.values, coding)
    cols = values.shape[-1]
    padded = torch.nn.functional.pad(values, (0, -cols % coding.group))
    return weights_of(padded, *codes.both(coding.offset), coding)[..., :cols]


class Quantized(nn.Module):
    """A matrix [rows, cols], or a stack of them, as codes of one Coding.

    `parts` equal parts of the rows (gate and up) are padded to whole blocks each. codes [..., blocks, bytes]
    uint8; scales [..., blocks, groups, 16], or with offsets [..., blocks, groups, 32], first the scales of 16
    rows, then their offsets; supers [..., blocks, SUPERs, 16 or 32] fp16 where scales are in 8 bits, else
    none.
    """

    codes: Tensor
    scales: Tensor
    supers: Tensor | None

    def __init__(self, shape: tuple[int, ...], coding: Coding, parts: int, device: torch.device) -> None:
        super().__init__()
        *stack, rows, cols = shape
        self.shape, self.coding, self.parts = tuple(shape), coding, parts
        self.blocks_per_part, self.groups = -(-rows // parts // LANES), -(-cols // coding.group)
        blocks, numbers = parts * self.blocks_per_part, LANES * (2 if coding.offset else 1)
        size = self.groups * coding.group * LANES * coding.bits // 8

        def empty(*size: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(*stack, blocks, *size, dtype=dtype, device=device)

        self.register_buffer("codes", empty(size, dtype=torch.uint8))
        self.register_buffer("scales", empty(self.groups, numbers, dtype=SCALES[coding.scale]))
        many = -(-cols // SUPER)
        supers = empty(many, numbers, dtype=torch.float16) if coding.scale == "I8" else None
        self.register_buffer("supers", supers)

    @property
    def bits(self) -> int:
        return self.coding.bits

    @property
    def group(self) -> int:
        return self.coding.group

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def part(self, expert: int | None, part: int) -> tuple[Tensor, Tensor]:
        """Codes [blocks, bytes] and scales [blocks, groups, 16 or 32] of one part of one matrix."""
        codes, scales, _ = self.part_with_supers(expert, part)
        return codes, scales

    def part_with_supers(self, expert: int | None, part: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """The same, and what the scales are multiplied by."""
        blocks = slice(part * self.blocks_per_part, (part + 1) * self.blocks_per_part)
        at = blocks if expert is None else (expert, blocks)
        return self.codes[at], self.scales[at], None if self.supers is None else self.supers[at]

    def multiplied_out(self) -> Quantized:
        """The same without scales of scales, sharing the codes."""
        coding = self.coding.multiplied_out
        if self.supers is None:
            return self
        out = Quantized(self.shape, coding, self.parts, torch.device("meta"))
        scales = multiplied(self.scales, self.supers, coding)
        out.codes, out.scales = self.codes, scales.to(SCALES[coding.scale])
        return out

    def widened(self) -> Quantized:
        """The same with codes of 8 bits in place of 4, which loses nothing."""
        out = Quantized(self.shape, self.coding.widened, self.parts, torch.device("meta"))
        both = self.codes.unflatten(-1, (-1, LANES * 4))
        both = torch.stack([both & 15, both >> 4], dim=-2).flatten(-3)
        out.codes = (values_of(both, self.coding) + 128).to(torch.uint8)
        out.scales, out.supers = self.scales, self.supers
        return out

    def unbind(self, dim: int = 0) -> list[Quantized]:
        """The matrices of a stack, sharing its memory."""
        assert dim == 0 and len(self.shape) == 3
        out = []
        for i in range(self.shape[0]):
            one = Quantized(self.shape[1:], self.coding, self.parts, torch.device("meta"))
            one.codes, one.scales = self.codes[i], self.scales[i]
            one.supers = None if self.supers is None else self.supers[i]
            out.append(one)
        return out

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weights that the codes stand for, rounded to `dtype`. -> `shape`"""
        *stack, rows, cols = self.shape
        if 0 in self.shape:  # a rank of a team may hold nothing of a matrix
            return torch.empty(self.shape, dtype=dtype, device=self.codes.device)
        weights = self.weights(self.codes, self.scales, self.supers)  # [..., blocks, 16, cols]
        weights = weights.reshape(*stack, self.parts, -1, weights.shape[-1])
        return weights[..., : rows // self.parts, :cols].reshape(self.shape).to(dtype)

    def rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Some rows of one matrix of one part, as an embedding. index [...] -> [..., cols]"""
        flat = index.flatten()
        block = flat // LANES
        supers = None if self.supers is None else self.supers[block]
        weights = self.weights(self.codes[block], self.scales[block], supers)  # [n, 16, cols]
        lane = (flat % LANES)[:, None, None].expand(-1, 1, self.shape[-1])
        return weights[..., : self.shape[-1]].gather(1, lane).view(*index.shape, -1).to(dtype)

    def weights(self, codes: Tensor, scales: Tensor, supers: Tensor | None) -> Tensor:
        """codes [..., bytes], scales [..., groups, 16 or 32] and supers of some blocks -> the weights in fp32
        [..., 16, cols]
        """

        def by_row(numbers: Tensor) -> Tensor:  # [..., 16, groups, 1 or 2]
            return numbers.unflatten(-1, (-1, LANES)).movedim(-1, -3)

        codes = codes.unflatten(-1, (-1, LANES, 4))  # [..., cols / 4 or 8, 16, 4]
        if self.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], dim=-3).flatten(-4, -3)
        values = values_of(codes, self.coding).transpose(-3, -2).flatten(-2)  # [..., 16, cols]
        return weights_of(values, by_row(scales), None if supers is None else by_row(supers), self.coding)


def interleave(codes: Codes, coding: Coding) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes of some rows as Quantized holds them: codes [blocks, bytes], scales [blocks, groups, 16 or 32],
    supers likewise. Codes that mean nothing fill them up to whole blocks and groups; their scales are 0.
    """
    rows, cols = codes.values.shape
    more = -rows % LANES
    values = torch.nn.functional.pad(codes.values, (0, -cols % coding.group, 0, more))
    values = values.unflatten(0, (-1, LANES)).unflatten(-1, (-1, 4)).transpose(1, 2)
    if coding.bits == 4:
        low, high = values.unflatten(1, (-1, 2)).unbind(2)
        values = low | (high << 4)
    return values.flatten(1).contiguous(), *interleaved_scales(codes, coding)


def interleaved_scales(codes: Codes, coding: Coding) -> tuple[Tensor, Tensor | None]:
    """The scales and supers that `interleave` gives."""
    more = -codes.values.shape[0] % LANES

    def blocks(numbers: Tensor) -> Tensor:  # [rows, groups, 1 or 2] -> [blocks, groups, 16 or 32]
        padded = torch.nn.functional.pad(numbers, (0, 0, 0, 0, 0, more))
        return padded.unflatten(0, (-1, LANES)).permute(0, 2, 3, 1).flatten(2).contiguous()

    scales, supers = codes.both(coding.offset)
    return blocks(scales), None if supers is None else blocks(supers)


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
    own = own_coding(bits, group)
    codes, scales, _ = interleave(Codes(index.to(torch.uint8).flatten(-2), scale[..., 0]), own)
    return codes, scales


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
