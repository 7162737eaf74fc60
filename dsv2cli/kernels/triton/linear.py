"""Triton: products of rows with dense, 8-bit and 4-bit weights, as kernels/linear.py says in plain torch.

A few rows go through a matrix-vector kernel, which reads the weights at the memory's pace; more go through
tensor cores. Packed weights are read as they lie (kernels/quantized.py): sixteen rows interleaved, so that a
tile of one block is one run of memory. Needs triton, which comes with torch's CUDA builds; with
TRITON_INTERPRET=1 everything here runs on a CPU.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.runtime import driver

from dsv2cli.formats import LANES, Coding
from dsv2cli.kernels.quantized import CODEBOOK, IQ4_NL, Quantized

# The kind of weights: DENSE, or bits + 32 times what codes mean (MEANINGS) + 1024 times what an offset is
# (OFFSETS).
DENSE = 16
SIGNED, PLAIN, NL, E4M3 = (tl.constexpr(i) for i in range(1, 5))
MEANINGS = {"codebook": 0, "signed": 1, "plain": 2, "iq4_nl": 3, "e4m3": 4}
OFFSETS = {"": 0, "added": 1, "zero": 2}
MATVEC_ROWS = 4  # up to so many rows each reads the weights by itself, all but the first from the L2 cache
BYTES_A_WARP = 1024  # of weights, that it reads at a time
PROCESSORS = 132  # multiprocessors of an H100 or H200
FULL = 256  # programs from which all multiprocessors have several; fewer programs are made larger

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LANES_OF_A_BLOCK = tl.constexpr(LANES)
# Tables as bytes, entry i in byte i: two numbers of 64 bits for shifting, four of 32 for `prmt`.
BYTES, NL_BYTES = (bytes(int(value) & 255 for value in each) for each in (CODEBOOK, IQ4_NL))
LOW_HALF = tl.constexpr(int.from_bytes(BYTES[:8], "little", signed=True))
HIGH_HALF = tl.constexpr(int.from_bytes(BYTES[8:], "little", signed=True))
NL_LOW_HALF = tl.constexpr(int.from_bytes(NL_BYTES[:8], "little", signed=True))
NL_HIGH_HALF = tl.constexpr(int.from_bytes(NL_BYTES[8:], "little", signed=True))
SIGNS = tl.constexpr(-0x7F7F7F80)  # 0x80808080: turns bytes c into c - 128
NIBBLES, EIGHT_LESS = tl.constexpr(0x0F0F0F0F), tl.constexpr(0x78787878)
FLOAT_BITS = tl.constexpr(-0x78100000)  # 0x87f00000: where the bits of an 8-bit float go in one of 32


# Eight 4-bit codes to eight numbers: `prmt` picks bytes by the low three bits of a nibble, from either half
# of the codebook; a second one takes for each the half that its fourth bit names; two more sort low nibbles
# from high ones.
def unpacking(table: bytes) -> str:
    """PTX for the codes of one table."""
    words = [int.from_bytes(table[i : i + 4], "little") for i in range(0, 16, 4)]
    return f"""{{
.reg .b32 pick, half, a, b, p, q;
and.b32 pick, $2, 0x77777777;
shr.b32 half, $2, 1;
and.b32 half, half, 0x44444444;
or.b32 half, half, 0x32103210;
prmt.b32 a, {words[0]}, {words[1]}, pick;
prmt.b32 b, {words[2]}, {words[3]}, pick;
prmt.b32 p, a, b, half;
shr.b32 pick, pick, 16;
shr.b32 half, half, 16;
prmt.b32 a, {words[0]}, {words[1]}, pick;
prmt.b32 b, {words[2]}, {words[3]}, pick;
prmt.b32 q, a, b, half;
prmt.b32 $0, p, q, 0x6420;
prmt.b32 $1, p, q, 0x7531;
}}"""


UNPACK, NL_UNPACK = tl.constexpr(unpacking(BYTES)), tl.constexpr(unpacking(NL_BYTES))


RUN = tl.constexpr(16)  # columns of activations in 8 bits that have a scale
STAGES = tl.constexpr(3)  # chunks of weights that are on their way at the same time


@triton.jit
def begin(PDL: tl.constexpr):
    """Let the next kernel be brought up, and wait until those before have written what they write.

    The first thing that every kernel does, in every program: one that ended before would let the next begin.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@dataclass
class Launches:
    """How this process launches kernels. `early`: each may be brought up while the one before still runs."""

    early: bool = True


LAUNCHES = Launches()


@functools.cache
def knows_early_launches() -> bool:
    """Whether the driver takes them into graphs: CUDA 12.3 does. The number is private in torch."""
    if not torch.cuda.is_available():  # kernels are compiled for a GPU that is not here
        return True
    return getattr(torch._C, "_cuda_getDriverVersion", lambda: 0)() >= 12030


def launching() -> dict[str, Any]:
    """What every launch is told: whether to come up early, where the GPU can."""
    if INTERPRETED.value or not LAUNCHES.early:
        return {"PDL": False}
    target = driver.active.get_current_target()
    if target.backend == "cuda" and target.arch >= 90 and knows_early_launches():
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


@triton.jit
def entry(code, MEANING: tl.constexpr):
    """The table's entry for codes 0 to 15, as its byte."""
    if MEANING == NL:
        half = tl.where(code < 8, NL_LOW_HALF, NL_HIGH_HALF)
    else:
        half = tl.where(code < 8, LOW_HALF, HIGH_HALF)
    return ((half >> ((code & 7).to(tl.int64) * 8)) & 255).to(tl.int32)


@triton.jit
def look_up(words, MEANING: tl.constexpr):
    """`unpack` for codes that stand for the numbers of a table."""
    if INTERPRETED:
        low, high = tl.zeros_like(words), tl.zeros_like(words)
        for j in tl.static_range(4):
            low |= entry((words >> (8 * j)) & 15, MEANING) << (8 * j)
            high |= entry((words >> (8 * j + 4)) & 15, MEANING) << (8 * j)
        return low, high
    elif MEANING == NL:  # no `if` that returns is the last: triton compiles what follows it, too
        return tl.inline_asm_elementwise(
            NL_UNPACK, "=r,=r,r", [words], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
        )
    else:
        return tl.inline_asm_elementwise(
            UNPACK, "=r,=r,r", [words], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
        )


@triton.jit
def unpack(words, MEANING: tl.constexpr):
    """Words of eight 4-bit codes -> words of the four numbers of their low, and of their high halves."""
    if MEANING == SIGNED:
        return (((words & NIBBLES) + EIGHT_LESS) ^ SIGNS, (((words >> 4) & NIBBLES) + EIGHT_LESS) ^ SIGNS)
    elif MEANING == PLAIN:
        return words & NIBBLES, (words >> 4) & NIBBLES
    else:
        return look_up(words, MEANING)


@triton.jit
def as_bytes(words, MEANING: tl.constexpr):
    """Words of four 8-bit codes as `number` reads them: floats as they are, others 128 less."""
    if MEANING == E4M3:
        return words
    else:
        return words ^ SIGNS


@triton.jit
def number(word, j: tl.constexpr, MEANING: tl.constexpr):
    """Byte j of a word, as the signed number it is, or the float."""
    if MEANING == E4M3:
        bits = ((word << (24 - 8 * j)) >> 4) & FLOAT_BITS  # its exponent counts from another zero
        return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2 ** 120
    else:
        return ((word << (24 - 8 * j)) >> 24).to(tl.float32)


@triton.jit
def offset_of(offset, scale, KIND: tl.constexpr):
    """What is added to each weight of a group: KIND says what its offset is, and whether codes are plain
    bytes.
    """
    if KIND // 1024 == 0:
        total = tl.zeros_like(scale)
    elif KIND // 1024 == 2:
        total = -offset * scale
    else:
        total = offset
    if KIND % 1024 == 8 + 32 * PLAIN:
        total += 128.0 * scale
    return total


@triton.jit
def inverse_rms(x, cols, eps, SIZE: tl.constexpr):
    """1 / rms of the row x [cols]."""
    at = tl.arange(0, SIZE)
    values = tl.load(x + at, mask=at < cols, other=0.0).to(tl.float32)
    return tl.rsqrt(tl.sum(values * values) / cols + eps)


@triton.jit
def scaled(x, norm, at, cols, NORM: tl.constexpr):
    """x at some columns in fp32, zero outside, times the norm's weights; its 1 / rms comes at the end."""
    values = tl.load(x + at, mask=at < cols, other=0.0).to(tl.float32)
    if NORM:
        values *= tl.load(norm + at, mask=at < cols, other=0.0).to(tl.float32)
    return values


@triton.jit
def nothing(KIND: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """Where `add_products` begins."""
    if KIND == 16:
        return tl.zeros([ROWS, CHUNK], tl.float32)
    else:
        return tl.zeros([CHUNK // GROUP, GROUP * (KIND % 32) // 32, ROWS], tl.float32)


@triton.jit
def row_sums(products, KIND: tl.constexpr):
    """What `add_products` has added up -> a sum for each of its rows. [ROWS]"""
    if KIND == 16:
        return tl.sum(products, axis=1)
    else:
        return tl.sum(tl.sum(products, axis=1), axis=0)


@triton.jit
def four_products(word, x, norm, at, cols, NORM: tl.constexpr, MEANING: tl.constexpr):
    """Each word's numbers [groups, words, rows] times x at columns `at` [groups, words] and three more."""
    sums = number(word, 0, MEANING) * scaled(x, norm, at, cols, NORM)[:, :, None]
    for j in tl.static_range(1, 4):
        sums += number(word, j, MEANING) * scaled(x, norm, at + j, cols, NORM)[:, :, None]
    return sums


@triton.jit
def sum_of(x, norm, at, cols, NORM: tl.constexpr, COUNT: tl.constexpr):
    """x at columns `at` [groups, words] and those after it, added up."""
    total = scaled(x, norm, at, cols, NORM)
    for j in tl.static_range(1, COUNT):
        total += scaled(x, norm, at + j, cols, NORM)
    return total


@triton.jit
def add_products(
    products,
    codes,
    scales,
    block,
    rows,
    cols,
    x,
    norm,
    start,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    NORM: tl.constexpr,
):
    """Columns start..start+CHUNK of the block's ROWS rows times x, added up as they lie; `row_sums` ends it.

    Loads of x and of scales are smaller than the program has threads: the compiler then lays them out as the
    codes lie, and nothing is exchanged between threads before the end.
    """
    if KIND == 16:
        row, at = block * ROWS + tl.arange(0, ROWS), start + tl.arange(0, CHUNK)
        inside = (row < rows)[:, None] & (at < cols)[None, :]
        weights = tl.load(codes + row[:, None].to(tl.int64) * cols + at[None, :], mask=inside, other=0.0)
        # x once for each row: that is how the weights are laid out, a row a warp.
        every = at[None, :] + tl.zeros([ROWS, 1], tl.int32)
        return products + weights.to(tl.float32) * scaled(x, norm, every, cols, NORM)
    else:
        bits: tl.constexpr = KIND % 32
        meaning: tl.constexpr = KIND // 32 % 32
        has_offset: tl.constexpr = KIND // 1024 != 0
        numbers: tl.constexpr = ROWS * (2 if has_offset else 1)  # of one group: scales, and then offsets
        words: tl.constexpr = GROUP * bits // 32  # of one row and group
        groups = tl.cdiv(cols, GROUP)
        group, word, lane = (
            start // GROUP + tl.arange(0, CHUNK // GROUP),
            tl.arange(0, words),
            tl.arange(0, ROWS),
        )
        at = group[:, None] * GROUP + word[None, :] * (32 // bits)
        inside = (group < groups)[:, None, None]
        place = group[:, None] * words + word[None, :]  # counted in words of a block's rows
        data = tl.load(
            codes
            + block.to(tl.int64) * groups * (words * ROWS)
            + (place[:, :, None] * ROWS + lane[None, None, :]),
            mask=inside,
            other=0,
        )
        first = (block * groups + group)[:, None, None] * numbers + lane[None, None, :]
        scale = tl.load(scales + first, mask=inside, other=0.0).to(tl.float32)
        if bits == 8:
            data = as_bytes(data, meaning)
            products += four_products(data, x, norm, at, cols, NORM, meaning) * scale
        else:
            low, high = unpack(data, meaning)
            sums = four_products(low, x, norm, at, cols, NORM, meaning)
            products += (sums + four_products(high, x, norm, at + 4, cols, NORM, meaning)) * scale
        if has_offset:
            offset = tl.load(scales + first + ROWS, mask=inside, other=0.0).to(tl.float32)
            total = sum_of(x, norm, at, cols, NORM, 32 // bits)
            products += offset_of(offset, scale, KIND) * total[:, :, None]
        return products


@triton.jit
def four_by_four(a, b, total):
    """Words of four signed bytes each: their products added to `total`, as `dp4a` does."""
    if INTERPRETED:
        for j in tl.static_range(4):
            total += ((a << (24 - 8 * j)) >> 24) * ((b << (24 - 8 * j)) >> 24)
        return total
    else:
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, total], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def add_int8_products(
    products,
    codes,
    scales,
    block,
    cols,
    x,
    x_scales,
    start,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """`add_products` of packed weights with x in 8 bits: four columns are a word, and RUN have a scale."""
    bits: tl.constexpr = KIND % 32
    meaning: tl.constexpr = KIND // 32 % 32
    has_offset: tl.constexpr = KIND // 1024 != 0
    numbers: tl.constexpr = ROWS * (2 if has_offset else 1)
    words: tl.constexpr = GROUP * bits // 32
    groups = tl.cdiv(cols, GROUP)
    group, word, lane = start // GROUP + tl.arange(0, CHUNK // GROUP), tl.arange(0, words), tl.arange(0, ROWS)
    there = (group < groups)[:, None]
    place = group[:, None] * words + word[None, :]
    data = tl.load(
        codes
        + block.to(tl.int64) * groups * (words * ROWS)
        + (place[:, :, None] * ROWS + lane[None, None, :]),
        mask=there[:, :, None],
        other=0,
    )
    first = (block * groups + group)[:, None, None] * numbers + lane[None, None, :]
    scale = tl.load(scales + first, mask=there[:, :, None], other=0.0).to(tl.float32)
    column = place * (32 // bits)
    known = column < cols  # a group's last columns may be none of x
    each = tl.load(x_scales + column // RUN, mask=known, other=0.0)
    zero = tl.zeros_like(data)
    ones = zero + 0x01010101
    if bits == 8:
        some = tl.load(x + place, mask=known, other=0)[:, :, None] + zero
        sums = four_by_four(data ^ SIGNS, some, zero)
        total = four_by_four(ones, some, zero) if has_offset else zero
    else:
        low, high = unpack(data, meaning)
        some = tl.load(x + 2 * place, mask=known, other=0)[:, :, None] + zero
        more = tl.load(x + 2 * place + 1, mask=known, other=0)[:, :, None] + zero
        sums = four_by_four(high, more, four_by_four(low, some, zero))
        total = four_by_four(ones, more, four_by_four(ones, some, zero)) if has_offset else zero
    products += sums.to(tl.float32) * (scale * each[:, :, None])
    if has_offset:
        offset = tl.load(scales + first + ROWS, mask=there[:, :, None], other=0.0).to(tl.float32)
        products += offset_of(offset, scale, KIND) * (total.to(tl.float32) * each[:, :, None])
    return products


@triton.jit
def in_int8(values, COUNT: tl.constexpr):
    """Numbers [COUNT] as signed bytes [COUNT], and for each RUN of them a scale [COUNT / RUN]."""
    runs = tl.reshape(values, [COUNT // RUN, RUN])
    scale = tl.maximum(tl.max(tl.abs(runs), axis=1) / 127, 1e-30)
    scale += tl.sum(runs * 0.0, axis=1)  # NaN where one of them is no number
    codes = tl.floor(runs / scale[:, None] + 0.5)
    return tl.reshape(codes, [COUNT]).to(tl.int8), scale


@triton.jit
def few_rows_kernel(
    x,
    norm,
    codes,
    scales,
    more_codes,
    more_scales,
    residual,
    out,
    cols,
    rows,
    more_rows,
    blocks,
    eps,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    SIZE: tl.constexpr,
    NORM: tl.constexpr,
    TWO: tl.constexpr,
    ADD: tl.constexpr,
    PDL: tl.constexpr,
):
    """out [tokens, rows + more_rows] = (residual +) norm(x) [tokens, cols] times one matrix or two of a kind.

    One program a token and block; tokens are neighbours, so that all but the first find the weights in the
    cache.
    """
    begin(PDL)
    token, block = tl.program_id(0), tl.program_id(1)
    x += token.to(tl.int64) * cols
    wide = rows
    offset = 0
    if TWO:
        wide = rows + more_rows
        second = block >= blocks
        offset = tl.where(second, rows, 0)  # an argument that is 1 is a constant, and can not change
        rows = tl.where(second, more_rows, rows)
        if second:
            codes, scales, block = more_codes, more_scales, block - blocks
    products = nothing(KIND, GROUP, ROWS, CHUNK)
    for start in tl.range(0, cols, CHUNK, num_stages=STAGES):
        products = add_products(
            products, codes, scales, block, rows, cols, x, norm, start, KIND, GROUP, ROWS, CHUNK, NORM
        )
    sums = row_sums(products, KIND)
    if NORM:
        sums *= inverse_rms(x, cols, eps, SIZE)
    row = block * ROWS + tl.arange(0, ROWS)
    at = token.to(tl.int64) * wide + offset + row
    if ADD:
        sums += tl.load(residual + at, mask=row < rows, other=0.0).to(tl.float32)
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=row < rows)


@triton.jit
def four_numbers(word, MEANING: tl.constexpr):
    """Words -> their bytes as numbers, along two new last dimensions: byte 2 * b + a at [..., a, b]."""
    return tl.join(
        tl.join(number(word, 0, MEANING), number(word, 1, MEANING)),
        tl.join(number(word, 2, MEANING), number(word, 3, MEANING)),
    )


@triton.jit
def weight_tile(
    codes,
    scales,
    first_block,
    rows,
    cols,
    chunk,
    dtype,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Columns chunk * BK and on of the BN rows from row 16 * first_block on, transposed, as `dtype`. [BK, BN]

    Of packed weights BK is a group.
    """
    if KIND == 16:
        row, k = first_block * LANES_OF_A_BLOCK + tl.arange(0, BN), chunk * BK + tl.arange(0, BK)
        inside = (k < cols)[:, None] & (row < rows)[None, :]
        return tl.load(codes + row[None, :].to(tl.int64) * cols + k[:, None], mask=inside, other=0.0)
    else:
        bits: tl.constexpr = KIND % 32
        meaning: tl.constexpr = KIND // 32 % 32
        has_offset: tl.constexpr = KIND // 1024 != 0
        numbers: tl.constexpr = LANES_OF_A_BLOCK * (2 if has_offset else 1)
        words: tl.constexpr = GROUP * bits // 32
        block, lane = first_block + tl.arange(0, BN // LANES_OF_A_BLOCK), tl.arange(0, LANES_OF_A_BLOCK)
        there = (block * LANES_OF_A_BLOCK < rows)[:, None]
        place = (block * tl.cdiv(cols, GROUP) + chunk)[:, None]  # counted in groups of a block's rows
        word = tl.arange(0, words * LANES_OF_A_BLOCK)
        data = tl.load(
            codes + place.to(tl.int64) * (words * LANES_OF_A_BLOCK) + word[None, :], mask=there, other=0
        )
        data = data.reshape(BN // LANES_OF_A_BLOCK, words, LANES_OF_A_BLOCK)
        first = place * numbers + lane[None, :]
        scale = tl.load(scales + first, mask=there, other=0.0).to(tl.float32)
        offset = tl.zeros_like(scale)
        if has_offset:
            offset = tl.load(scales + first + LANES_OF_A_BLOCK, mask=there, other=0.0).to(tl.float32)
        offset = offset_of(offset, scale, KIND)
        if bits == 8:
            values = four_numbers(as_bytes(data, meaning), meaning) * scale[:, None, :, None, None]
            values += offset[:, None, :, None, None]
            return values.permute(1, 4, 3, 0, 2).reshape(BK, BN).to(dtype)
        else:
            low, high = unpack(data, meaning)
            values = tl.join(four_numbers(low, meaning), four_numbers(high, meaning))
            values = values * scale[:, None, :, None, None, None] + offset[:, None, :, None, None, None]
            return values.permute(1, 5, 4, 3, 0, 2).reshape(BK, BN).to(dtype)


@triton.jit
def tile_products(
    x,
    row,
    there,
    codes,
    scales,
    first_block,
    rows,
    cols,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Rows `row` [BM] of x [any, cols], those that are `there`, times BN rows of a matrix. [BM, BN] fp32"""
    sums = tl.zeros([BM, BN], tl.float32)
    for chunk in range(0, tl.cdiv(cols, BK)):
        k = chunk * BK + tl.arange(0, BK)
        a = tl.load(
            x + row[:, None].to(tl.int64) * cols + k[None, :],
            mask=there[:, None] & (k < cols)[None, :],
            other=0.0,
        )
        dtype = x.dtype.element_ty
        b = weight_tile(codes, scales, first_block, rows, cols, chunk, dtype, KIND, GROUP, BN, BK)
        sums = tl.dot(a, b, sums, input_precision="ieee")
    return sums


@triton.jit
def many_rows_kernel(
    x,
    codes,
    scales,
    residual,
    out,
    count,
    rows,
    cols,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ADD: tl.constexpr,
    PDL: tl.constexpr,
):
    """out [count, rows] = (residual +) x [count, cols] times a matrix, by tensor cores."""
    begin(PDL)
    row, block = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * (BN // LANES_OF_A_BLOCK)
    sums = tile_products(x, row, row < count, codes, scales, block, rows, cols, KIND, GROUP, BM, BN, BK)
    column = block * LANES_OF_A_BLOCK + tl.arange(0, BN)
    at = row[:, None].to(tl.int64) * rows + column[None, :]
    inside = (row < count)[:, None] & (column < rows)[None, :]
    if ADD:
        sums += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=inside)


@triton.jit
def store_normed(x, weight, out, cols, eps, SIZE: tl.constexpr):
    """out = x / rms(x) * weight for rows [cols], rounded as in kernels/linear.py. SIZE is a power of two."""
    at = tl.arange(0, SIZE)
    values = tl.load(x + at, mask=at < cols, other=0.0).to(tl.float32)
    values *= tl.rsqrt(tl.sum(values * values) / cols + eps)
    values = values.to(out.dtype.element_ty) * tl.load(weight + at, mask=at < cols, other=0.0)
    tl.store(out + at, values.to(out.dtype.element_ty), mask=at < cols)


@triton.jit
def rms_norm_kernel(x, weight, out, cols, eps, SIZE: tl.constexpr, PDL: tl.constexpr):
    """One row a program. x and out [rows, cols]"""
    begin(PDL)
    start = tl.program_id(0).to(tl.int64) * cols
    store_normed(x + start, weight, out + start, cols, eps, SIZE)


@dataclass(frozen=True)
class Table:
    """A weight [rows, cols], or a stack of them, as the kernels take it."""

    codes: Tensor
    scales: Tensor
    kind: int
    group: int
    rows: int
    cols: int

    @property
    def takes_int8(self) -> bool:
        """Whether its codes are whole numbers, which are multiplied as such."""
        return self.kind != DENSE and self.kind // 32 % 32 != MEANINGS["e4m3"] and self.cols % RUN.value == 0

    @property
    def half_blocks(self) -> int:
        """Blocks of the gate where gate and up are one packed matrix: each half is padded to whole blocks."""
        return -(-self.rows // 2 // LANES)

    @property
    def block_rows(self) -> int:
        """Rows that one program of a matrix-vector kernel takes."""
        return 8 if self.kind == DENSE else LANES

    def blocks(self) -> int:
        """Programs of a matrix-vector kernel."""
        return -(-self.rows // self.block_rows)

    def chunk(self, warps: int, int8: bool = False) -> int:
        """Columns it takes at a time, so that each thread of so many warps has a few loads under way; with
        activations in `int8`, which take fewer registers, twice as many.
        """
        # 4-bit codes in chunks half as large: see add_products.
        item = self.codes.element_size() if self.kind == DENSE else 1
        wanted = BYTES_A_WARP * warps * (2 if int8 else 1) // item // self.block_rows
        return max(self.group, min(wanted, triton.next_power_of_2(self.cols)))


def table(weight: Tensor | Quantized) -> Table:
    """A weight [rows, cols], or a stack of them, as the kernels take it; the memory is shared."""
    rows, cols = weight.shape[-2:]
    if isinstance(weight, Quantized):
        weight = weight.multiplied_out()
        codes, kind = weight.codes.view(torch.int32), kind_of(weight.coding)
        return Table(codes, weight.scales, kind, weight.group, rows, cols)
    return Table(weight, weight, DENSE, 16, rows, cols)


def kind_of(coding: Coding) -> int:
    """How the kernels are told of a Coding, which has no scales of scales."""
    assert coding.scale != "I8", "scales of scales are multiplied out"
    return coding.bits + 32 * MEANINGS[coding.table] + 1024 * OFFSETS[coding.offset]


def alike(one: Table | None, other: Table | None) -> bool:
    """Whether one kernel can read both in one launch, or one is not there."""
    if one is None or other is None:
        return True
    return (one.kind, one.group, one.scales.dtype) == (other.kind, other.group, other.scales.dtype)


def linear(
    x: Tensor,
    weight: Table,
    more: Table | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    """(residual +) rms_norm(x) times weight, and `more` beside it. x [tokens, cols] -> [tokens, rows of both]

    `residual` may be overwritten by the result.
    """
    count, cols = x.shape
    assert x.is_contiguous() and cols == weight.cols and (more is None or more.cols == cols)
    if not alike(weight, more):
        assert residual is None
        return torch.cat([linear(x, each, None, norm, eps) for each in (weight, more) if each], dim=1)
    if count <= MATVEC_ROWS:
        return few_rows(x, weight, more, norm, eps, residual)
    x = x if norm is None else rms_norm(x, norm, eps)
    out = many_rows(x, weight, residual)
    return out if more is None else torch.cat([out, many_rows(x, more, None)], dim=1)


def few_rows(
    x: Tensor, weight: Table, more: Table | None, norm: Tensor | None, eps: float, residual: Tensor | None
) -> Tensor:
    """`linear` for few rows x [tokens, cols], as matrix-vector products. -> [tokens, rows of both]"""
    count, cols = x.shape
    other = more or weight
    blocks = weight.blocks()
    every = blocks + (more.blocks() if more else 0)
    warps = 8 if every >= FULL else 16
    out = x.new_empty(count, weight.rows + (more.rows if more else 0)) if residual is None else residual
    few_rows_kernel[(count, every)](
        x,
        x if norm is None else norm,
        weight.codes,
        weight.scales,
        other.codes,
        other.scales,
        out,
        out,
        cols,
        weight.rows,
        other.rows,
        blocks,
        eps,
        KIND=weight.kind,
        GROUP=weight.group,
        ROWS=weight.block_rows,
        CHUNK=weight.chunk(warps),
        SIZE=triton.next_power_of_2(cols),
        NORM=norm is not None,
        TWO=more is not None,
        ADD=residual is not None,
        num_warps=warps,
        **launching(),
    )
    return out


def many_rows(x: Tensor, weight: Table, residual: Tensor | None) -> Tensor:
    """(residual +) x [tokens, cols] times weight -> [tokens, rows]. Dense weights go to torch's product."""
    if weight.kind == DENSE:
        return (
            x @ weight.codes.T if residual is None else torch.addmm(residual, x, weight.codes.T, out=residual)
        )
    count = x.shape[0]
    out = x.new_empty(count, weight.rows) if residual is None else residual
    bm = tile_rows(count)
    bn = tile_columns(-(-count // bm), weight.rows)
    many_rows_kernel[(-(-count // bm), -(-weight.rows // bn))](
        x,
        weight.codes,
        weight.scales,
        out,
        out,
        count,
        weight.rows,
        weight.cols,
        KIND=weight.kind,
        GROUP=weight.group,
        BM=bm,
        BN=bn,
        BK=weight.group,
        ADD=residual is not None,
        num_warps=4 if bm < 128 else 8,
        **launching(),
    )
    return out


def tile_rows(count: float) -> int:
    """Rows of a tile for a product of so many: at least what a tensor core takes, at most what there are."""
    return max(16, min(128, triton.next_power_of_2(int(count))))


def tile_columns(tiles: int, rows: int, most: int = 64, least: int = LANES) -> int:
    """Rows of a matrix that a tile takes: fewer where a GPU's multiprocessors would have nothing to do."""
    while most > least and tiles * -(-rows // most) < PROCESSORS:
        most //= 2
    return most


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same as kernels/linear.py's. x [tokens, size]"""
    out = torch.empty_like(x)
    rms_norm_kernel[(x.shape[0],)](
        x, weight, out, x.shape[1], eps, SIZE=triton.next_power_of_2(x.shape[1]), **launching()
    )
    return out
