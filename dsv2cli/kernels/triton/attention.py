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

from dsv2cli.formats import PAGE
from dsv2cli.kernels.triton.linear import store_normed

TOKENS_AT_A_TIME = 32  # of the cache
HEADS_AT_A_TIME = 16  # a tensor core takes no fewer
MOST_SPLITS = 128
ABSORB_TOKENS = 8  # up to so many tokens each reads kv_b_proj by itself
LATENT_EPS = 1e-6  # of kv_a_layernorm, fixed in the official code


@triton.jit
def store_turned(x, out, cos, sin, pair, turns):
    """Neighbouring pairs of x turned by their angles, as model/rope.py's `rotate`."""
    even = tl.load(x + 2 * pair, mask=turns, other=0.0).to(tl.float32)
    odd = tl.load(x + 2 * pair + 1, mask=turns, other=0.0).to(tl.float32)
    tl.store(out + 2 * pair, (even * cos - odd * sin).to(out.dtype.element_ty), mask=turns)
    tl.store(out + 2 * pair + 1, (even * sin + odd * cos).to(out.dtype.element_ty), mask=turns)


@triton.jit
def prepare_kernel(
    q,
    kv,
    kv_norm,
    kv_b,
    rotary,
    positions,
    rows,
    tables,
    cache,
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
):
    """Programs (token, head, tile): the query of a head, turned and, tile by tile, absorbed: q_nope W_uk.

    Program (token, HEADS, 0) norms the new latent, turns the new key, and writes both into the cache.
    """
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
            w_uk = tl.load(
                kv_b + (head * (NOPE + VALUE) + d[:, None]) * RANK + c[None, :], mask=inside, other=0.0
            )
            q_nope = tl.load(q + d, mask=d < NOPE, other=0.0).to(tl.float32)
            absorbed = tl.sum(w_uk.to(tl.float32) * q_nope[:, None], axis=0)
            tl.store(
                q_latent + (token * HEADS + head) * RANK + c,
                absorbed.to(q_latent.dtype.element_ty),
                mask=c < RANK,
            )
    elif (tile == 0) & (position >= 0):
        kv += token.to(tl.int64) * kv_stride
        page = tl.load(tables + tl.load(rows + token).to(tl.int64) * table_stride + position // PAGE)
        cache += page.to(tl.int64) * page_stride + position % PAGE * (RANK + ROPE)
        store_normed(kv, kv_norm, cache, RANK, eps, RANK_SIZE)
        store_turned(kv + RANK, cache + RANK, cos, sin, pair, turns)


@triton.jit
def split_size(length, SPLITS: tl.constexpr, BT: tl.constexpr):
    """Tokens of the cache in each split but the last: whole tiles, and as few as make do."""
    return tl.maximum(tl.cdiv(tl.cdiv(length, SPLITS), BT), 1) * BT


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
):
    """Programs (token, heads, split): softmax over a split of the cache; a latent read once is key and value.

    mixed [tokens, splits, heads, rank] and log_sums [tokens, splits, heads], both fp32; nothing is written
    for an empty split.
    """
    token, split = tl.program_id(0), tl.program_id(2)
    head = tl.program_id(1) * BH + tl.arange(0, BH)
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
        at = cache + page * page_stride + (t % PAGE)[:, None] * (RANK + ROPE)
        latent = tl.load(at + c[None, :], mask=(t < end)[:, None] & (c < RANK)[None, :], other=0.0)
        key = tl.load(at + RANK + r[None, :], mask=(t < end)[:, None] & (r < ROPE)[None, :], other=0.0)
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
):
    """Programs (token, head, tile): the splits' means, weighted by their sums, and with LEAD_OUT times W_uv.

    out [tokens, heads, value], or [tokens, heads, rank] without LEAD_OUT.
    """
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
        w_uv = tl.load(
            kv_b + (head * (NOPE + VALUE) + NOPE + v[:, None]) * RANK + c[None, :], mask=inside, other=0.0
        )
        latent = latent.to(out.dtype.element_ty).to(tl.float32)
        sums = tl.sum(w_uv.to(tl.float32) * latent[None, :], axis=1)
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


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; where kernels are interpreted, some."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def count_splits(programs: int, capacity: int, device: torch.device) -> int:
    """Splits of each token's cache: two programs a multiprocessor, none with less than a tile."""
    return max(1, min(2 * processors(device) // programs, capacity // TOKENS_AT_A_TIME, MOST_SPLITS))


@dataclass(frozen=True)
class NewTokens:
    """What `attend` is given."""

    q: Tensor
    kv: Tensor
    kv_norm: Tensor
    kv_b: Tensor
    rotary: Tensor
    positions: Tensor
    rows: Tensor
    tables: Tensor
    cache: Tensor
    shape: Shape

    @property
    def absorb_each(self) -> bool:
        """Whether each token reads kv_b_proj by itself."""
        return self.q.shape[0] <= ABSORB_TOKENS

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
) -> Tensor:
    """Attention of few new tokens, which enter the pool first. -> [tokens, heads * value]

    q [tokens, heads * (nope + rope)], kv [tokens, rank + rope] and kv_b [heads * (nope + value), rank] are
    projections, rotary [tokens, 2, rope / 2] in fp32, positions and rows [tokens] and tables [rows, pages]
    int32, cache [pages, PAGE, rank + rope], a layer of the pool. Rows of q and kv may lie in one tensor. All
    tokens at once: those of one row must be neighbours in position.
    """
    assert all(tensor.is_contiguous() for tensor in (rotary, positions, rows, tables, cache[0]))
    new = NewTokens(q, kv, kv_norm, kv_b, rotary, positions, rows, tables, cache, shape)
    return merge(new, *read_cache(new, *prepare(new)))


def prepare(new: NewTokens) -> tuple[Tensor, Tensor]:
    """Queries, absorbed [tokens, heads, rank] and rotated [tokens, heads, rope]; new rows enter the cache."""
    shape, count, rank_size = new.shape, new.q.shape[0], new.rank_size
    q_latent = new.q.new_empty(count, shape.heads, shape.rank)
    q_rope = new.q.new_empty(count, shape.heads, shape.rope)
    tile = min(64, rank_size)
    tiles = -(-shape.rank // tile) if new.absorb_each else 1
    prepare_kernel[(count, shape.heads + 1, tiles)](
        new.q,
        new.kv,
        new.kv_norm,
        new.kv_b,
        new.rotary,
        new.positions,
        new.rows,
        new.tables,
        new.cache,
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
    attend_kernel[(count, head_tiles, splits)](
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
        num_warps=4,
        num_stages=2,
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
        new.kv_b,
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
    )
    if not new.absorb_each:
        w_uv = new.kv_b.view(shape.heads, -1, shape.rank)[:, shape.nope :]
        out = torch.bmm(out.transpose(0, 1), w_uv.transpose(1, 2)).transpose(0, 1)
    return out.reshape(count, -1)
