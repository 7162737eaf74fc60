"""Triton: absorbed latent attention for few new tokens, as kernels/attention.py says in plain torch.

Three kernels: one turns positions, absorbs queries and writes the cache; one reads the cache, cut into splits
so that all of the GPU is busy; one puts the splits together and leads out of the latent. Every token has a
position and a row of a table that names its sequence's pages in order; one at a negative position is not
there: it writes nothing and its output means nothing.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv2cli.formats import KEY_BITS, PAGE
from dsv2cli.kernels.linear import int8_of
from dsv2cli.kernels.triton.linear import begin, launching, store_normed

TOKENS_AT_A_TIME = 32  # of the cache
HEADS_AT_A_TIME = 16  # a tensor core takes no fewer
MOST_SPLITS = 128
ABSORB_TOKENS = 8  # up to so many tokens each reads kv_b_proj by itself
UP_RUN = tl.constexpr(64)  # columns of kv_b_proj in 8 bits that have a scale
LATENT_EPS = 1e-6  # of kv_a_layernorm, fixed in the official code


@triton.jit
def store_turned(x, out, cos, sin, pair, turns):
    """Neighbouring pairs of x turned by their angles, as model/rope.py's `rotate`."""
    even = tl.load(x + 2 * pair, mask=turns, other=0.0).to(tl.float32)
    odd = tl.load(x + 2 * pair + 1, mask=turns, other=0.0).to(tl.float32)
    tl.store(out + 2 * pair, (even * cos - odd * sin).to(out.dtype.element_ty), mask=turns)
    tl.store(out + 2 * pair + 1, (even * sin + odd * cos).to(out.dtype.element_ty), mask=turns)


@triton.jit
def unpacked(codes, i, inside, SIZE: tl.constexpr, BITS: tl.constexpr):
    """What number i of `codes` stands for, in scales: kernels/latents.py's `apart` and `meant`."""
    HALF: tl.constexpr = SIZE // 2
    QUARTER: tl.constexpr = SIZE // 4
    if BITS == 8:
        code = tl.load(codes + i, mask=inside, other=0).to(tl.int32)
    else:
        fours = codes + SIZE if BITS == 12 else codes
        code = tl.load(fours + i % HALF, mask=inside, other=0).to(tl.int32) >> i // HALF * 4 & 15
        if BITS == 12:
            code = code << 8 | tl.load(codes + i, mask=inside, other=0).to(tl.int32)
        if BITS == 6:
            twos = tl.load(codes + HALF + i % QUARTER, mask=inside, other=0).to(tl.int32)
            code = code | (twos >> i // QUARTER * 2 & 3) << 4
    return code.to(tl.float32) - (2**BITS - 1) / 2


@triton.jit
def bf16_at(at, inside):
    """The bf16 number in two bytes."""
    low = tl.load(at, mask=inside, other=0).to(tl.uint32)
    high = tl.load(at + 1, mask=inside, other=0).to(tl.uint32)
    return (high << 24 | low << 16).to(tl.float32, bitcast=True)


@triton.jit
def store_bf16(at, x, inside):
    """A number as two bytes, rounded to bf16."""
    bits = x.to(tl.uint32, bitcast=True)
    bits = bits + 0x7FFF + (bits >> 16 & 1)
    tl.store(at, (bits >> 16 & 255).to(tl.uint8), mask=inside)
    tl.store(at + 1, (bits >> 24).to(tl.uint8), mask=inside)


@triton.jit
def code_of(room, i, inside, scale, BITS: tl.constexpr):
    """The code of number i."""
    x = tl.load(room + i, mask=inside, other=0.0) / scale + (2**BITS - 1) / 2
    return tl.minimum(tl.maximum(tl.floor(x + 0.5), 0.0), 2.0**BITS - 1).to(tl.int32)


@triton.jit
def store_codes(room, to, scale_at, SIZE: tl.constexpr, BITS: tl.constexpr, PADDED: tl.constexpr):
    """Numbers room [SIZE] as codes and a scale: kernels/latents.py's `even_codes` and `together`."""
    i = tl.arange(0, PADDED)
    HALF: tl.constexpr = SIZE // 2
    QUARTER: tl.constexpr = SIZE // 4
    most = tl.max(tl.abs(tl.load(room + i, mask=i < SIZE, other=0.0)))
    exact = tl.maximum(most / ((2**BITS - 1) / 2), 1e-30)
    store_bf16(scale_at, exact, True)
    bits = exact.to(tl.uint32, bitcast=True)
    scale = (bits + 0x7FFF + (bits >> 16 & 1) & 0xFFFF0000).to(tl.float32, bitcast=True)
    if BITS == 8:
        tl.store(to + i, code_of(room, i, i < SIZE, scale, BITS).to(tl.uint8), mask=i < SIZE)
    else:
        low = code_of(room, i, i < HALF, scale, BITS)
        high = code_of(room, HALF + i, i < HALF, scale, BITS)
        if BITS == 12:
            tl.store(to + i, (low & 255).to(tl.uint8), mask=i < HALF)
            tl.store(to + HALF + i, (high & 255).to(tl.uint8), mask=i < HALF)
            tl.store(to + SIZE + i, (low >> 8 | high >> 8 << 4).to(tl.uint8), mask=i < HALF)
        else:
            tl.store(to + i, (low & 15 | (high & 15) << 4).to(tl.uint8), mask=i < HALF)
        if BITS == 6:
            upper = tl.zeros([PADDED], tl.int32)
            for q in tl.static_range(4):
                upper |= code_of(room, q * QUARTER + i, i < QUARTER, scale, BITS) >> 4 << 2 * q
            tl.store(to + HALF + i, upper.to(tl.uint8), mask=i < QUARTER)


@triton.jit
def store_packed(
    kv,
    norm,
    room,
    page,
    place,
    cos,
    sin,
    pair,
    eps,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    RANK_SIZE: tl.constexpr,
    BITS: tl.constexpr,
    KEY_BITS: tl.constexpr,
    STAGES: tl.constexpr,
    PAGE: tl.constexpr,
):
    """The new latent, normed, and below 8 bits turned, and the new key, as codes in a page.

    room [RANK + ROPE] in fp32. The largest power of two that divides RANK is 2^STAGES.
    """
    BLOCK: tl.constexpr = 2**STAGES
    c = tl.arange(0, RANK_SIZE)
    x = tl.load(kv + c, mask=c < RANK, other=0.0).to(tl.float32)
    rms = tl.rsqrt(tl.sum(x * x) / RANK + eps)
    weight = tl.load(norm + c, mask=c < RANK, other=0.0)
    x = ((x * rms).to(kv.dtype.element_ty) * weight).to(tl.float32)
    if BITS < 8:
        x = tl.reshape(x, [RANK_SIZE // BLOCK, BLOCK])
        for _ in tl.static_range(STAGES):
            even, odd = tl.split(tl.reshape(x, [RANK_SIZE // BLOCK, BLOCK // 2, 2]))
            both = tl.permute(tl.join(even + odd, even - odd), (0, 2, 1))
            x = tl.reshape(both, [RANK_SIZE // BLOCK, BLOCK])
        x = (tl.reshape(x, [RANK_SIZE]) / tl.sqrt(BLOCK * 1.0)).to(kv.dtype.element_ty).to(tl.float32)
    tl.store(room + c, x, mask=c < RANK)
    turns = pair < ROPE // 2
    even = tl.load(kv + RANK + 2 * pair, mask=turns, other=0.0).to(tl.float32)
    odd = tl.load(kv + RANK + 2 * pair + 1, mask=turns, other=0.0).to(tl.float32)
    first = (even * cos - odd * sin).to(kv.dtype.element_ty).to(tl.float32)
    second = (even * sin + odd * cos).to(kv.dtype.element_ty).to(tl.float32)
    tl.store(room + RANK + 2 * pair, first, mask=turns)
    tl.store(room + RANK + 2 * pair + 1, second, mask=turns)
    tl.debug_barrier()  # what one thread stored others load
    CODES: tl.constexpr = RANK * BITS // 8
    KEYS: tl.constexpr = ROPE * KEY_BITS // 8
    SCALES: tl.constexpr = 2 if KEY_BITS == 16 else 4
    scales = page + PAGE * (CODES + KEYS) + place * SCALES
    store_codes(room, page + place * CODES, scales, RANK, BITS, RANK_SIZE)
    keys = page + PAGE * CODES + place * KEYS
    if KEY_BITS == 16:
        store_bf16(keys + 4 * pair, first, turns)
        store_bf16(keys + 4 * pair + 2, second, turns)
    else:
        store_codes(room + RANK, keys, scales + 2, ROPE, KEY_BITS, 2 * pair.shape[0])


@triton.jit
def up_weights(kv_b, scales, row, c, inside, RANK: tl.constexpr, KV8: tl.constexpr):
    """Rows of kv_b_proj at columns c in fp32, as both broadcast; with KV8 codes, and UP_RUN have a scale."""
    weights = tl.load(kv_b + row * RANK + c, mask=inside, other=0).to(tl.float32)
    if KV8:
        runs: tl.constexpr = (RANK + UP_RUN - 1) // UP_RUN
        weights *= tl.load(scales + row * runs + c // UP_RUN, mask=inside, other=0.0).to(tl.float32)
    return weights


@triton.jit
def prepare_kernel(
    q,
    kv,
    kv_norm,
    kv_b,
    kv_b_scales,
    rotary,
    positions,
    rows,
    tables,
    cache,
    room,
    q_latent,
    q_rope,
    table_stride,
    page_stride,
    q_stride,
    kv_stride,
    eps,
    HEADS: tl.constexpr,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    VALUE: tl.constexpr,
    RANK: tl.constexpr,
    NOPE_SIZE: tl.constexpr,
    PAIRS: tl.constexpr,
    RANK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    ABSORB: tl.constexpr,
    PAGE: tl.constexpr,
    BITS: tl.constexpr,
    KEY_BITS: tl.constexpr,
    STAGES: tl.constexpr,
    KV8: tl.constexpr,
    PDL: tl.constexpr,
):
    """Programs (token, head, tile): the query of a head, turned and, tile by tile, absorbed: q_nope W_uk.

    Program (token, HEADS, 0) norms the new latent, turns the new key, and writes both into the cache.
    """
    begin(PDL)
    token, head, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    position = tl.load(positions + token)
    pair = tl.arange(0, PAIRS)
    turns = pair < ROPE // 2
    cos = tl.load(rotary + token * ROPE + pair, mask=turns, other=0.0)
    sin = tl.load(rotary + token * ROPE + ROPE // 2 + pair, mask=turns, other=0.0)
    if head < HEADS:
        q += token.to(tl.int64) * q_stride + head * (NOPE + ROPE)
        if tile == 0:
            store_turned(q + NOPE, q_rope + (token * HEADS + head) * ROPE, cos, sin, pair, turns)
        if ABSORB:
            d, c = tl.arange(0, NOPE_SIZE), tile * TILE + tl.arange(0, TILE)
            inside = (d < NOPE)[:, None] & (c < RANK)[None, :]
            row = head * (NOPE + VALUE) + d[:, None]
            w_uk = up_weights(kv_b, kv_b_scales, row, c[None, :], inside, RANK, KV8)
            q_nope = tl.load(q + d, mask=d < NOPE, other=0.0).to(tl.float32)
            absorbed = tl.sum(w_uk * q_nope[:, None], axis=0)
            tl.store(
                q_latent + (token * HEADS + head) * RANK + c,
                absorbed.to(q_latent.dtype.element_ty),
                mask=c < RANK,
            )
    elif (tile == 0) & (position >= 0):
        kv += token.to(tl.int64) * kv_stride
        page = tl.load(tables + tl.load(rows + token).to(tl.int64) * table_stride + position // PAGE)
        cache += page.to(tl.int64) * page_stride
        if BITS == 16:
            cache += position % PAGE * (RANK + ROPE)
            store_normed(kv, kv_norm, cache, RANK, eps, RANK_SIZE)
            store_turned(kv + RANK, cache + RANK, cos, sin, pair, turns)
        else:
            room += token * (RANK + ROPE)
            place = position % PAGE
            store_packed(
                kv,
                kv_norm,
                room,
                cache,
                place,
                cos,
                sin,
                pair,
                eps,
                RANK,
                ROPE,
                RANK_SIZE,
                BITS,
                KEY_BITS,
                STAGES,
                PAGE,
            )


@triton.jit
def split_size(length, SPLITS: tl.constexpr, BT: tl.constexpr):
    """Tokens of the cache in each split but the last: whole tiles, as few as make do, but at least two: what
    a split comes to is as much to read as 56 tokens.
    """
    return tl.maximum(tl.cdiv(tl.cdiv(length, SPLITS), BT), 2) * BT


@triton.jit
def attend_kernel(
    q_latent,
    q_rope,
    cache,
    positions,
    rows,
    tables,
    mixed,
    log_sums,
    table_stride,
    page_stride,
    scale,
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    SPLITS: tl.constexpr,
    BH: tl.constexpr,
    BT: tl.constexpr,
    RANK_SIZE: tl.constexpr,
    ROPE_SIZE: tl.constexpr,
    PAGE: tl.constexpr,
    BITS: tl.constexpr,
    KEY_BITS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Programs (heads, token, split): softmax over a split of the cache; a latent read once is key and value.

    mixed [tokens, splits, heads, rank] and log_sums [tokens, splits, heads], both fp32; nothing is written
    for an empty split.
    """
    begin(PDL)
    token, split = tl.program_id(1), tl.program_id(2)
    # Heads change fastest: programs that read the same of the cache run at the same time.
    head = tl.program_id(0) * BH + tl.arange(0, BH)
    length = tl.load(positions + token) + 1
    each = split_size(length, SPLITS, BT)
    start = split * each
    end = tl.minimum(start + each, length)
    to = (token * SPLITS + split) * HEADS + head
    if start >= end:
        return
    c, r = tl.arange(0, RANK_SIZE), tl.arange(0, ROPE_SIZE)
    row = token * HEADS + head[:, None]
    latent_query = tl.load(
        q_latent + row * RANK + c[None, :], mask=(head < HEADS)[:, None] & (c < RANK)[None, :], other=0.0
    )
    rope_query = tl.load(
        q_rope + row * ROPE + r[None, :], mask=(head < HEADS)[:, None] & (r < ROPE)[None, :], other=0.0
    )
    tables += tl.load(rows + token).to(tl.int64) * table_stride
    most = tl.full([BH], float("-inf"), tl.float32)
    total = tl.zeros([BH], tl.float32)
    sums = tl.zeros([BH, RANK_SIZE], tl.float32)
    for first in range(start, end, BT):
        t = first + tl.arange(0, BT)  # all of one page
        page = tl.load(tables + first // PAGE).to(tl.int64)
        here = cache + page * page_stride
        place = t % PAGE
        some_latent = (t < end)[:, None] & (c < RANK)[None, :]
        some_key = (t < end)[:, None] & (r < ROPE)[None, :]
        if BITS == 16:
            at = here + place[:, None] * (RANK + ROPE)
            latent = tl.load(at + c[None, :], mask=some_latent, other=0.0).to(latent_query.dtype)
            key = tl.load(at + RANK + r[None, :], mask=some_key, other=0.0).to(latent_query.dtype)
        else:
            CODES: tl.constexpr = RANK * BITS // 8
            KEYS: tl.constexpr = ROPE * KEY_BITS // 8
            SCALES: tl.constexpr = 2 if KEY_BITS == 16 else 4
            scales = here + PAGE * (CODES + KEYS) + place * SCALES
            codes = here + place[:, None] * CODES
            numbers = unpacked(codes, c[None, :], some_latent, RANK, BITS)
            sizes = bf16_at(scales, t < end)[:, None]
            latent = tl.where(some_latent, numbers * sizes, 0.0).to(latent_query.dtype)
            keys = here + PAGE * CODES + place[:, None] * KEYS
            if KEY_BITS == 16:
                key = bf16_at(keys + 2 * r[None, :], some_key).to(latent_query.dtype)
            else:
                numbers = unpacked(keys, r[None, :], some_key, ROPE, KEY_BITS)
                sizes = bf16_at(scales + 2, t < end)[:, None]
                key = tl.where(some_key, numbers * sizes, 0.0).to(latent_query.dtype)
        scores = tl.dot(latent_query, tl.trans(latent), input_precision="ieee")
        scores = tl.dot(rope_query, tl.trans(key), scores, input_precision="ieee") * scale
        scores = tl.where((t < end)[None, :], scores, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, axis=1))
        weights = tl.exp(scores - higher[:, None])
        fade = tl.exp(most - higher)
        total = total * fade + tl.sum(weights, axis=1)
        sums = tl.dot(weights.to(latent.dtype), latent, sums * fade[:, None], input_precision="ieee")
        most = higher
    tl.store(log_sums + to, most + tl.log(total), mask=head < HEADS)
    tl.store(
        mixed + to[:, None] * RANK + c[None, :],
        sums / total[:, None],
        mask=(head < HEADS)[:, None] & (c < RANK)[None, :],
    )


@triton.jit
def merge_kernel(
    mixed,
    log_sums,
    positions,
    kv_b,
    kv_b_scales,
    out,
    HEADS: tl.constexpr,
    NOPE: tl.constexpr,
    VALUE: tl.constexpr,
    RANK: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_SIZE: tl.constexpr,
    BT: tl.constexpr,
    RANK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    LEAD_OUT: tl.constexpr,
    KV8: tl.constexpr,
    PDL: tl.constexpr,
):
    """Programs (token, head, tile): the splits' means, weighted by their sums, and with LEAD_OUT times W_uv.

    out [tokens, heads, value], or [tokens, heads, rank] without LEAD_OUT.
    """
    begin(PDL)
    token, head, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(positions + token) + 1
    used = tl.cdiv(length, split_size(length, SPLITS, BT))
    split, c = tl.arange(0, SPLITS_SIZE), tl.arange(0, RANK_SIZE)
    logs = tl.load(log_sums + (token * SPLITS + split) * HEADS + head, mask=split < used, other=float("-inf"))
    most = tl.maximum(tl.max(logs), -1e30)  # a token that is not there has only empty splits, and gets zeros
    total = tl.maximum(tl.sum(tl.exp(logs - most)), 1e-30)
    latent = tl.zeros([RANK_SIZE], tl.float32)
    for first in range(0, used, 8):
        some = first + tl.arange(0, 8)
        at = (token * SPLITS + some) * HEADS + head
        shares = tl.exp(tl.load(log_sums + at, mask=some < used, other=float("-inf")) - most) / total
        values = tl.load(
            mixed + at[:, None].to(tl.int64) * RANK + c[None, :],
            mask=(some < used)[:, None] & (c < RANK)[None, :],
            other=0.0,
        )
        latent += tl.sum(values * shares[:, None], axis=0)
    if LEAD_OUT:
        v = tile * TILE + tl.arange(0, TILE)
        inside = (v < VALUE)[:, None] & (c < RANK)[None, :]
        row = head * (NOPE + VALUE) + NOPE + v[:, None]
        w_uv = up_weights(kv_b, kv_b_scales, row, c[None, :], inside, RANK, KV8)
        latent = latent.to(out.dtype.element_ty).to(tl.float32)
        sums = tl.sum(w_uv * latent[None, :], axis=1)
        tl.store(
            out + (token * HEADS + head).to(tl.int64) * VALUE + v,
            sums.to(out.dtype.element_ty),
            mask=v < VALUE,
        )
    else:
        tl.store(
            out + (token * HEADS + head).to(tl.int64) * RANK + c,
            latent.to(out.dtype.element_ty),
            mask=c < RANK,
        )


@dataclass(frozen=True)
class Shape:
    """The sizes of a model's attention."""

    heads: int
    nope: int
    rope: int
    value: int
    rank: int
    scale: float


def up_in_int8(kv_b: Tensor) -> tuple[Tensor, Tensor]:
    """kv_b_proj [rows, rank] as kernels/linear.py's `int8_of` makes it: codes [rows, rank], and scales [rows,
    runs] in bf16.
    """
    rank = kv_b.shape[1]
    padded = torch.nn.functional.pad(kv_b.float(), (0, -rank % UP_RUN.value))
    codes, scales = int8_of(padded, UP_RUN.value)
    return codes[:, :rank].contiguous(), scales.bfloat16()


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; where kernels are interpreted, some."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def count_splits(programs: int, capacity: int, device: torch.device) -> int:
    """Splits of each token's cache: two programs a multiprocessor, none with less than a tile.

    A power of two: for each number the kernels are compiled anew, in the middle of an answer.
    """
    most = max(1, min(2 * processors(device) // programs, capacity // TOKENS_AT_A_TIME, MOST_SPLITS))
    return 1 << most.bit_length() - 1


@dataclass(frozen=True)
class NewTokens:
    """What `attend` is given."""

    q: Tensor
    kv: Tensor
    kv_norm: Tensor
    kv_b: Tensor
    kv_b_int8: tuple[Tensor, Tensor] | None
    rotary: Tensor
    positions: Tensor
    rows: Tensor
    tables: Tensor
    cache: Tensor
    shape: Shape
    bits: int

    @property
    def key_bits(self) -> int:
        """Of a key beside codes."""
        return KEY_BITS.get(self.bits, 16)

    @property
    def absorb_each(self) -> bool:
        """Whether each token reads kv_b_proj by itself."""
        return self.q.shape[0] <= ABSORB_TOKENS

    @property
    def up(self) -> tuple[Tensor, Tensor]:
        """kv_b_proj as a single token reads it: numbers, or codes and their scales."""
        return self.kv_b_int8 or (self.kv_b, self.kv_b)

    @property
    def rank_size(self) -> int:
        return max(16, triton.next_power_of_2(self.shape.rank))


def attend(
    q: Tensor,
    kv: Tensor,
    kv_norm: Tensor,
    kv_b: Tensor,
    rotary: Tensor,
    positions: Tensor,
    rows: Tensor,
    tables: Tensor,
    cache: Tensor,
    shape: Shape,
    bits: int = 16,
    kv_b_int8: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attention of few new tokens, which enter the pool first. -> [tokens, heads * value]

    q [tokens, heads * (nope + rope)], kv [tokens, rank + rope] and kv_b [heads * (nope + value), rank] are
    projections, rotary [tokens, 2, rope / 2] in fp32, positions and rows [tokens] and tables [rows, pages]
    int32, cache [pages, PAGE, rank + rope], a layer of the pool, or below 16 `bits` [pages, bytes]; below 8
    kv_b is that of turned latents. `kv_b_int8` is the same as `in_int8` gives it, for up to ABSORB_TOKENS
    tokens. Rows of q and kv may lie in one tensor. All
    tokens at once: those of one row must be neighbours in position.
    """
    assert all(tensor.is_contiguous() for tensor in (rotary, positions, rows, tables, cache[0]))
    new = NewTokens(q, kv, kv_norm, kv_b, kv_b_int8, rotary, positions, rows, tables, cache, shape, bits)
    return merge(new, *read_cache(new, *prepare(new)))


def prepare(new: NewTokens) -> tuple[Tensor, Tensor]:
    """Queries, absorbed [tokens, heads, rank] and rotated [tokens, heads, rope]; new rows enter the cache."""
    shape, count, rank_size = new.shape, new.q.shape[0], new.rank_size
    q_latent = new.q.new_empty(count, shape.heads, shape.rank)
    q_rope = new.q.new_empty(count, shape.heads, shape.rope)
    room = new.q.new_empty(count, shape.rank + shape.rope if new.bits < 16 else 0, dtype=torch.float32)
    tile = min(64, rank_size)
    tiles = -(-shape.rank // tile) if new.absorb_each else 1
    prepare_kernel[(count, shape.heads + 1, tiles)](
        new.q,
        new.kv,
        new.kv_norm,
        *new.up,
        new.rotary,
        new.positions,
        new.rows,
        new.tables,
        new.cache,
        room,
        q_latent,
        q_rope,
        new.tables.stride(0),
        new.cache.stride(0),
        new.q.stride(0),
        new.kv.stride(0),
        LATENT_EPS,
        HEADS=shape.heads,
        NOPE=shape.nope,
        ROPE=shape.rope,
        VALUE=shape.value,
        RANK=shape.rank,
        NOPE_SIZE=triton.next_power_of_2(shape.nope),
        PAIRS=triton.next_power_of_2(shape.rope // 2),
        RANK_SIZE=rank_size,
        TILE=tile,
        ABSORB=new.absorb_each,
        PAGE=PAGE,
        BITS=new.bits,
        KEY_BITS=new.key_bits,
        STAGES=(shape.rank & -shape.rank).bit_length() - 1,
        KV8=new.kv_b_int8 is not None,
        **launching(),
    )
    if not new.absorb_each:  # the weights would be read once a token: a matrix product a head is better
        w_uk = new.kv_b.view(shape.heads, -1, shape.rank)[:, : shape.nope]
        q_nope = new.q.unflatten(1, (shape.heads, -1))[..., : shape.nope]
        torch.bmm(q_nope.transpose(0, 1), w_uk, out=q_latent.transpose(0, 1))
    return q_latent, q_rope


def read_cache(new: NewTokens, q_latent: Tensor, q_rope: Tensor) -> tuple[Tensor, Tensor]:
    """Each split's mean latent [tokens, splits, heads, rank] and log sum [tokens, splits, heads], in fp32."""
    shape, count = new.shape, new.q.shape[0]
    head_tiles = -(-shape.heads // HEADS_AT_A_TIME)
    splits = count_splits(count * head_tiles, new.tables.shape[1] * PAGE, new.q.device)
    mixed = new.q.new_empty(count, splits, shape.heads, shape.rank, dtype=torch.float32)
    log_sums = new.q.new_empty(count, splits, shape.heads, dtype=torch.float32)
    # In fp32 fewer warps, or with codes two stages, spill their registers.
    warps, stages = (4, 2) if q_latent.element_size() == 2 else (8, 2) if new.bits == 16 else (16, 1)
    attend_kernel[(head_tiles, count, splits)](
        q_latent,
        q_rope,
        new.cache,
        new.positions,
        new.rows,
        new.tables,
        mixed,
        log_sums,
        new.tables.stride(0),
        new.cache.stride(0),
        shape.scale,
        HEADS=shape.heads,
        RANK=shape.rank,
        ROPE=shape.rope,
        SPLITS=splits,
        BH=HEADS_AT_A_TIME,
        BT=TOKENS_AT_A_TIME,
        RANK_SIZE=new.rank_size,
        ROPE_SIZE=max(16, triton.next_power_of_2(shape.rope)),
        PAGE=PAGE,
        BITS=new.bits,
        KEY_BITS=new.key_bits,
        num_warps=warps,
        num_stages=stages,
        **launching(),
    )
    return mixed, log_sums


def merge(new: NewTokens, mixed: Tensor, log_sums: Tensor) -> Tensor:
    """The splits together, led out of the latent. -> [tokens, heads * value]"""
    shape, (count, splits) = new.shape, log_sums.shape[:2]
    out = new.q.new_empty(count, shape.heads, shape.value if new.absorb_each else shape.rank)
    tile = min(32, triton.next_power_of_2(shape.value))
    tiles = -(-shape.value // tile) if new.absorb_each else 1
    merge_kernel[(count, shape.heads, tiles)](
        mixed,
        log_sums,
        new.positions,
        *new.up,
        out,
        HEADS=shape.heads,
        NOPE=shape.nope,
        VALUE=shape.value,
        RANK=shape.rank,
        SPLITS=splits,
        SPLITS_SIZE=triton.next_power_of_2(splits),
        BT=TOKENS_AT_A_TIME,
        RANK_SIZE=new.rank_size,
        TILE=tile,
        LEAD_OUT=new.absorb_each,
        KV8=new.kv_b_int8 is not None,
        **launching(),
    )
    if not new.absorb_each:
        w_uv = new.kv_b.view(shape.heads, -1, shape.rank)[:, shape.nope :]
        out = torch.bmm(out.transpose(0, 1), w_uv.transpose(1, 2)).transpose(0, 1)
    return out.reshape(count, -1)
