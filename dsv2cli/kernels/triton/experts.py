"""Triton: the router, and experts for few tokens and for many, as kernels/experts.py says in plain torch.

For few tokens every token's experts are read by matrix-vector kernels, with the shared experts in further
slots: one kernel for gate, up and SiLU, one for down and the weights, one for the sum. For many, tokens are
sorted by expert, and tiles of them go through tensor cores. Nothing here waits for the GPU: how many tokens
an expert has is known to the GPU alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv2cli.kernels.triton.linear import (
    DENSE,
    LANES_OF_A_BLOCK,
    Table,
    add_products,
    alike,
    inverse_rms,
    nothing,
    rms_norm,
    row_sums,
    tile_products,
    tile_rows,
    weight_tile,
)

MATVEC_TOKENS = 8  # up to so many tokens each one's experts are read by itself
TILE_COLUMNS = 64  # of what a tensor core's tile gives


@triton.jit
def router_kernel(
    x,
    norm,
    weight,
    normed,
    logits,
    cols,
    experts,
    eps,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Programs (token, some experts): router logits [tokens, experts] of norm(x), in fp32.

    The first program of a token also writes norm(x).
    """
    token, tile = tl.program_id(0), tl.program_id(1)
    x += token.to(tl.int64) * cols
    factor = inverse_rms(x, cols, eps, SIZE)
    expert = tile * ROWS + tl.arange(0, ROWS)
    products = tl.zeros([ROWS, CHUNK], tl.float32)
    for start in range(0, cols, CHUNK):
        at = start + tl.arange(0, CHUNK)
        values = (tl.load(x + at, mask=at < cols, other=0.0).to(tl.float32) * factor).to(x.dtype.element_ty)
        values = (values * tl.load(norm + at, mask=at < cols, other=0.0)).to(x.dtype.element_ty)
        if tile == 0:
            tl.store(normed + token.to(tl.int64) * cols + at, values, mask=at < cols)
        inside = (expert < experts)[:, None] & (at < cols)[None, :]
        products += (
            tl.load(weight + expert[:, None] * cols + at[None, :], mask=inside, other=0.0)
            * values.to(tl.float32)[None, :]
        )
    tl.store(logits + token * experts + expert, tl.sum(products, axis=1), mask=expert < experts)


@triton.jit
def choose_kernel(
    logits,
    index,
    weight,
    experts,
    factor,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    CHOICES: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    NORMALISE: tl.constexpr,
):
    """One token a program of one warp: its experts, best first, and their weights, both [tokens, k]."""
    token = tl.program_id(0)
    expert, choice = tl.arange(0, EXPERTS), tl.arange(0, CHOICES)
    scores = tl.load(logits + token * experts + expert, mask=expert < experts, other=float("-inf"))
    scores = tl.exp(scores - tl.max(scores, axis=0))
    scores /= tl.sum(scores, axis=0)
    scores = tl.where(scores == scores, scores, 0.0)  # of NaN any choice is as good, but it must be one
    if GROUPS > 1:
        group = expert // (experts // GROUPS)
        rest, kept = scores, tl.zeros([EXPERTS], tl.int1)
        for _ in tl.static_range(TOP_GROUPS):  # a group's score is its best expert's
            best = group == tl.argmax(rest, axis=0) // (experts // GROUPS)
            rest, kept = tl.where(best, -1.0, rest), kept | best
        scores = tl.where(kept, scores, 0.0)
    scores = tl.where(expert < experts, scores, -1.0)
    chosen, weights = tl.zeros([CHOICES], tl.int32), tl.zeros([CHOICES], tl.float32)
    for k in tl.static_range(TOP_K):
        highest, best = tl.max(scores, axis=0, return_indices=True)
        chosen, weights = tl.where(choice == k, best, chosen), tl.where(choice == k, highest, weights)
        scores = tl.where(expert == best, -1.0, scores)
    weights = weights / (tl.sum(weights, axis=0) + 1e-20) if NORMALISE else weights * factor
    tl.store(index + token * TOP_K + choice, chosen, mask=choice < TOP_K)
    tl.store(weight + token * TOP_K + choice, weights, mask=choice < TOP_K)


@triton.jit
def gated(
    codes,
    scales,
    x,
    norm,
    block,
    half_blocks,
    rows,
    cols,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    NORM: tl.constexpr,
):
    """Sums of one block of the gate and of the same block of up, `half_blocks` further on."""
    gate, up = nothing(KIND, GROUP, ROWS, CHUNK), nothing(KIND, GROUP, ROWS, CHUNK)
    for start in range(0, cols, CHUNK):
        gate = add_products(
            gate, codes, scales, block, rows, cols, x, norm, start, KIND, GROUP, ROWS, CHUNK, NORM
        )
        if KIND == 16:  # rows // 2 further on, which need not be whole blocks
            up = add_products(
                up,
                codes + rows.to(tl.int64) // 2 * cols,
                scales,
                block,
                rows // 2,
                cols,
                x,
                norm,
                start,
                KIND,
                GROUP,
                ROWS,
                CHUNK,
                NORM,
            )
        else:
            up = add_products(
                up,
                codes,
                scales,
                block + half_blocks,
                rows,
                cols,
                x,
                norm,
                start,
                KIND,
                GROUP,
                ROWS,
                CHUNK,
                NORM,
            )
    return row_sums(gate, KIND), row_sums(up, KIND)


@triton.jit
def few_up_kernel(
    x,
    norm,
    index,
    codes,
    scales,
    shared_codes,
    shared_scales,
    out,
    cols,
    width,
    shared_rows,
    codes_stride,
    scales_stride,
    half_blocks,
    shared_half_blocks,
    shared_blocks,
    first,
    here,
    eps,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    SIZE: tl.constexpr,
    NORM: tl.constexpr,
    TOP_K: tl.constexpr,
):
    """Programs (block, slot, token): silu(gate) * up of the token's slot-th expert.

    Slots from TOP_K on are the shared MLP's. out [tokens, routed and shared width]; where an expert is not
    here nothing is written.
    """
    block, slot, token = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    x += token.to(tl.int64) * cols
    out += token.to(tl.int64) * (TOP_K * width + shared_rows // 2)
    rows = 2 * width
    if slot < TOP_K:
        expert = tl.load(index + token * TOP_K + slot) - first
        if (expert < 0) | (expert >= here):
            return
        codes += expert.to(tl.int64) * codes_stride
        scales += expert.to(tl.int64) * scales_stride
        out += slot * width
    else:
        codes, scales, half_blocks, rows = shared_codes, shared_scales, shared_half_blocks, shared_rows
        block += (slot - TOP_K) * shared_blocks
        out += TOP_K * width
    at = block * ROWS + tl.arange(0, ROWS)
    if block * ROWS < rows // 2:
        gate, up = gated(
            codes, scales, x, norm, block, half_blocks, rows, cols, KIND, GROUP, ROWS, CHUNK, NORM
        )
        if NORM:
            rms = inverse_rms(x, cols, eps, SIZE)
            gate, up = gate * rms, up * rms
        tl.store(out + at, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=at < rows // 2)


@triton.jit
def few_down_kernel(
    hidden,
    codes,
    scales,
    shared_codes,
    shared_scales,
    index,
    weight,
    terms,
    rows,
    width,
    shared_width,
    piece,
    codes_stride,
    scales_stride,
    first,
    here,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    TOP_K: tl.constexpr,
):
    """Programs (block, slot, token): terms [tokens, slots, rows] in fp32, down projections times weights.

    Slots from TOP_K on are the shared MLP's, each for `piece` of its columns. `gather_kernel` adds them up,
    always in one order.
    """
    block, slot, token = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    hidden += token.to(tl.int64) * (TOP_K * width + shared_width)
    start = 0
    end = width
    factor = 1.0
    if slot < TOP_K:
        expert = tl.load(index + token * TOP_K + slot) - first
        factor = tl.load(weight + token * TOP_K + slot).to(tl.float32)
        codes += tl.maximum(expert, 0).to(tl.int64) * codes_stride
        scales += tl.maximum(expert, 0).to(tl.int64) * scales_stride
        hidden += slot * width
        if (expert < 0) | (expert >= here):
            end = 0  # another rank's
    else:
        hidden += TOP_K * width
        codes, scales, width = shared_codes, shared_scales, shared_width
        start = (slot - TOP_K) * piece
        end = tl.minimum(start + piece, shared_width)
    products = nothing(KIND, GROUP, ROWS, CHUNK)
    for at in range(start, end, CHUNK):
        products = add_products(
            products, codes, scales, block, rows, width, hidden, hidden, at, KIND, GROUP, ROWS, CHUNK, False
        )
    sums = tl.where(end > start, row_sums(products, KIND) * factor, 0.0)
    row = block * ROWS + tl.arange(0, ROWS)
    tl.store(terms + (token * tl.num_programs(1) + slot).to(tl.int64) * rows + row, sums, mask=row < rows)


@triton.jit
def expert_of_tile(ends, tile, EXPERTS: tl.constexpr, BM: tl.constexpr):
    """Which expert's tokens a tile holds, from where among the sorted ones to where; past the last tile none.

    ends [EXPERTS]: where each expert's tokens end among the sorted ones, filled up with the last.
    """
    expert = tl.arange(0, EXPERTS)
    end = tl.load(ends + expert)
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    tiles = tl.cdiv(end - start, BM)
    tile_end = tl.cumsum(tiles, 0)
    chosen = (tile_end - tiles <= tile) & (tile < tile_end)
    number = tl.sum(tl.where(chosen, expert, 0))
    first = tl.sum(tl.where(chosen, start + (tile - (tile_end - tiles)) * BM, 0))
    return number, first, tl.sum(tl.where(chosen, end, 0))


@triton.jit
def many_up_kernel(
    x,
    order,
    ends,
    codes,
    scales,
    out,
    cols,
    width,
    codes_stride,
    scales_stride,
    half_blocks,
    repeats,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    EXPERTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Programs (tile of sorted tokens, columns): out [sorted, width] = silu(gate) * up.

    Sorted place i is token order[i] // repeats.
    """
    expert, first, end = expert_of_tile(ends, tl.program_id(0), EXPERTS, BM)
    if first >= end:
        return
    place = first + tl.arange(0, BM)
    row = tl.load(order + place, mask=place < end, other=0) // repeats
    block = tl.program_id(1) * (BN // LANES_OF_A_BLOCK)
    codes += expert.to(tl.int64) * codes_stride
    scales += expert.to(tl.int64) * scales_stride
    up_codes, up_block = codes, block + half_blocks
    if KIND == 16:
        up_codes, up_block = codes + width.to(tl.int64) * cols, block
    gate, up = tl.zeros([BM, BN], tl.float32), tl.zeros([BM, BN], tl.float32)
    for chunk in range(0, tl.cdiv(cols, BK)):
        k = chunk * BK + tl.arange(0, BK)
        a = tl.load(
            x + row[:, None].to(tl.int64) * cols + k[None, :],
            mask=(place < end)[:, None] & (k < cols)[None, :],
            other=0.0,
        )
        b = weight_tile(codes, scales, block, width, cols, chunk, x.dtype.element_ty, KIND, GROUP, BN, BK)
        gate = tl.dot(a, b, gate, input_precision="ieee")
        b = weight_tile(
            up_codes,
            scales,
            up_block,
            width if KIND == 16 else half_blocks * LANES_OF_A_BLOCK + width,
            cols,
            chunk,
            x.dtype.element_ty,
            KIND,
            GROUP,
            BN,
            BK,
        )
        up = tl.dot(a, b, up, input_precision="ieee")
    column = block * LANES_OF_A_BLOCK + tl.arange(0, BN)
    inside = (place < end)[:, None] & (column < width)[None, :]
    tl.store(
        out + place[:, None].to(tl.int64) * width + column[None, :],
        (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty),
        mask=inside,
    )


@triton.jit
def many_down_kernel(
    hidden,
    order,
    ends,
    weight,
    codes,
    scales,
    out,
    rows,
    width,
    codes_stride,
    scales_stride,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    EXPERTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """Programs (tile of sorted tokens, rows): down projections times weights, place i at out[order[i]]."""
    expert, first, end = expert_of_tile(ends, tl.program_id(0), EXPERTS, BM)
    if first >= end:
        return
    place = first + tl.arange(0, BM)
    to = tl.load(order + place, mask=place < end, other=0)
    block = tl.program_id(1) * (BN // LANES_OF_A_BLOCK)
    codes += expert.to(tl.int64) * codes_stride
    scales += expert.to(tl.int64) * scales_stride
    sums = tile_products(
        hidden, place, place < end, codes, scales, block, rows, width, KIND, GROUP, BM, BN, BK
    )
    if WEIGHTED:
        sums *= tl.load(weight + to, mask=place < end, other=0.0)[:, None]
    column = block * LANES_OF_A_BLOCK + tl.arange(0, BN)
    inside = (place < end)[:, None] & (column < rows)[None, :]
    tl.store(
        out + to[:, None].to(tl.int64) * rows + column[None, :], sums.to(out.dtype.element_ty), mask=inside
    )


@triton.jit
def gather_kernel(terms, shared, out, cols, TERMS: tl.constexpr, SHARED: tl.constexpr, CHUNK: tl.constexpr):
    """Programs (token, columns): out [tokens, cols] += the token's TERMS rows of terms and row of shared."""
    token, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    total = tl.load(out + token * cols + at, mask=at < cols, other=0.0).to(tl.float32)
    for k in range(TERMS):
        total += tl.load(terms + (token * TERMS + k) * cols + at, mask=at < cols, other=0.0).to(tl.float32)
    if SHARED:
        total += tl.load(shared + token * cols + at, mask=at < cols, other=0.0).to(tl.float32)
    tl.store(out + token * cols + at, total.to(out.dtype.element_ty), mask=at < cols)


@dataclass(frozen=True)
class Routing:
    """How a model's router chooses among so many experts: kernels/experts.py's Routing says the rest."""

    experts: int
    top_k: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    scaling_factor: float


NO_ROUTING = Routing(1, 0, 1, 1, False, 1.0)


@dataclass(frozen=True)
class Feed:
    """One layer's MLP: routed experts, shared ones, or (`router` None) a dense MLP in place of the shared."""

    norm: Tensor
    eps: float
    router: Tensor | None
    routing: Routing
    gate_up: Table | None
    down: Table | None
    shared_gate_up: Table | None
    shared_down: Table | None

    @property
    def width(self) -> int:
        """Of a routed expert."""
        return 0 if self.gate_up is None else self.gate_up.rows // 2

    @property
    def shared_width(self) -> int:
        """Of all shared experts together."""
        return 0 if self.shared_gate_up is None else self.shared_gate_up.rows // 2


@dataclass(frozen=True)
class Chosen:
    """Each token's experts and weights, both [tokens, top_k]. `here` experts lie here, from `first` on."""

    index: Tensor
    weight: Tensor
    top_k: int
    first: int
    here: int


def router_logits(x: Tensor, feed: Feed) -> tuple[Tensor, Tensor]:
    """norm(x), and its router logits in fp32. x [tokens, hidden] -> [tokens, hidden], [tokens, experts]"""
    assert feed.router is not None
    count, cols = x.shape
    experts = feed.routing.experts
    normed, logits = torch.empty_like(x), x.new_empty(count, experts, dtype=torch.float32)
    size, rows = triton.next_power_of_2(cols), 2 if count <= MATVEC_TOKENS else 16
    router_kernel[(count, -(-experts // rows))](
        x,
        feed.norm,
        feed.router,
        normed,
        logits,
        cols,
        experts,
        feed.eps,
        ROWS=rows,
        CHUNK=min(512, size),
        SIZE=size,
    )
    return normed, logits


def choose(logits: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    """kernels/experts.py's `route`: logits [tokens, experts] -> index (int32), weight, both [tokens, k]."""
    index = logits.new_empty(logits.shape[0], routing.top_k, dtype=torch.int32)
    weight = logits.new_empty(logits.shape[0], routing.top_k)
    choose_kernel[(logits.shape[0],)](
        logits,
        index,
        weight,
        routing.experts,
        routing.scaling_factor,
        EXPERTS=triton.next_power_of_2(routing.experts),
        TOP_K=routing.top_k,
        CHOICES=triton.next_power_of_2(routing.top_k),
        GROUPS=routing.n_group,
        TOP_GROUPS=routing.topk_group,
        NORMALISE=routing.norm_topk_prob,
        num_warps=1,
    )
    return index, weight


def run(x: Tensor, feed: Feed, out: Tensor, first: int = 0) -> Tensor:
    """out += the layer's MLP of norm(x), in place, and may be x itself. Both [tokens, hidden]

    The experts here are `first` and those after it; of what a rank has nothing, nothing is added.
    """
    assert x.is_contiguous() and out.is_contiguous()
    if feed.gate_up is None and feed.shared_gate_up is None:
        return out
    if not (alike(feed.gate_up, feed.shared_gate_up) and alike(feed.down, feed.shared_down)):
        given = x.clone() if x.data_ptr() == out.data_ptr() else x
        shared = replace(feed, router=None, routing=NO_ROUTING, gate_up=None, down=None)
        run(given, replace(feed, shared_gate_up=None, shared_down=None), out, first)
        return run(given, shared, out)
    return few(x, feed, out, first) if x.shape[0] <= MATVEC_TOKENS else many(x, feed, out, first)


def few(x: Tensor, feed: Feed, out: Tensor, first: int) -> Tensor:
    """`run` for few tokens: every token's experts are read by themselves. x and out [tokens, hidden]"""
    inner, chosen = x, Chosen(x, x, 0, first, 0)
    if feed.gate_up is not None:
        inner, logits = router_logits(x, feed)
        here = feed.gate_up.codes.shape[0]
        chosen = Chosen(*choose(logits, feed.routing), feed.routing.top_k, first, here)
    hidden = few_up(inner, feed, chosen)
    return gather(few_down(hidden, feed, chosen), None, out)


def few_up(x: Tensor, feed: Feed, chosen: Chosen) -> Tensor:
    """silu(gate) * up of each token's experts and of the shared ones. x [tokens, hidden] -> [tokens, widths]

    x is normed already where there is a router; else it is normed here.
    """
    up = feed.gate_up or feed.shared_gate_up
    assert up is not None
    shared_up = feed.shared_gate_up or up
    (count, cols), width, shared_width = x.shape, feed.width, feed.shared_width
    blocks = -(-(width or shared_width) // up.block_rows)  # of one half
    # The shared experts are one MLP: as many more slots as it is wider than a routed expert.
    slots = chosen.top_k + (-(-shared_width // (blocks * up.block_rows)) if shared_width else 0)
    hidden = x.new_empty(count, chosen.top_k * width + shared_width)
    few_up_kernel[(blocks, slots, count)](
        x,
        feed.norm,
        chosen.index,
        up.codes,
        up.scales,
        shared_up.codes,
        shared_up.scales,
        hidden,
        cols,
        width,
        2 * shared_width,
        up.codes.stride(0),
        up.scales.stride(0),
        up.half_blocks,
        shared_up.half_blocks,
        blocks,
        chosen.first,
        chosen.here,
        feed.eps,
        KIND=up.kind,
        GROUP=up.group,
        ROWS=up.block_rows,
        CHUNK=up.chunk(8),
        SIZE=triton.next_power_of_2(cols),
        NORM=feed.gate_up is None,
        TOP_K=chosen.top_k,
        num_warps=8,
    )
    return hidden


def few_down(hidden: Tensor, feed: Feed, chosen: Chosen) -> Tensor:
    """hidden [tokens, widths] -> weighted outputs, to be summed [tokens, slots, hidden size] in fp32."""
    down = feed.down or feed.shared_down
    assert down is not None
    shared_down = feed.shared_down or down
    count, cols, width, shared_width = hidden.shape[0], down.rows, feed.width, feed.shared_width
    warps = 8
    chunk = down.chunk(warps)
    piece = -(-min(shared_width, width or 2048) // chunk) * chunk if shared_width else chunk
    slots = chosen.top_k + -(-shared_width // piece)
    terms = hidden.new_empty(count, slots, cols, dtype=torch.float32)
    few_down_kernel[(down.blocks(), slots, count)](
        hidden,
        down.codes,
        down.scales,
        shared_down.codes,
        shared_down.scales,
        chosen.index,
        chosen.weight,
        terms,
        cols,
        width,
        shared_width,
        piece,
        down.codes.stride(0),
        down.scales.stride(0),
        chosen.first,
        chosen.here,
        KIND=down.kind,
        GROUP=down.group,
        ROWS=down.block_rows,
        CHUNK=chunk,
        TOP_K=chosen.top_k,
        num_warps=warps,
    )
    return terms


def gather(terms: Tensor, shared: Tensor | None, out: Tensor) -> Tensor:
    """out [tokens, cols] += the sum of terms [tokens, any, cols] and of shared [tokens, cols], in place."""
    count, cols = out.shape
    chunk = min(1024, triton.next_power_of_2(cols))
    gather_kernel[(count, -(-cols // chunk))](
        terms,
        out if shared is None else shared,
        out,
        cols,
        TERMS=terms.shape[1],
        SHARED=shared is not None,
        CHUNK=chunk,
    )
    return out


def many(x: Tensor, feed: Feed, out: Tensor, first: int) -> Tensor:
    """`run` for many tokens: sorted by expert, through tensor cores. x and out [tokens, hidden]"""
    count = x.shape[0]
    terms, shared = x.new_empty(count, 0, x.shape[1]), None
    if feed.gate_up is not None and feed.down is not None:
        inner, logits = router_logits(x, feed)
        index, weight = choose(logits, feed.routing)
        terms = grouped(inner, index - first, weight, feed.gate_up, feed.down).unflatten(0, (count, -1))
    else:
        inner = rms_norm(x, feed.norm, feed.eps)
    if feed.shared_gate_up is not None and feed.shared_down is not None:
        shared = dense(inner, feed.shared_gate_up, feed.shared_down)
    return gather(terms, shared, out)


def dense(x: Tensor, gate_up: Table, down: Table) -> Tensor:
    """One MLP for all tokens. x [n, hidden] -> the same shape."""
    return grouped(x, x.new_zeros(x.shape[0], 1, dtype=torch.int32), None, gate_up, down)


@dataclass(frozen=True)
class Sorted:
    """Choices (token i's j-th is number i * k + j) sorted by expert, and the tiles that they are cut into."""

    order: Tensor  # [n * k] int32: the choice at each place
    ends: Tensor  # [size] int32: where each expert's choices end, filled up with the last
    repeats: int  # choices a token
    rows: int  # of a tile
    tiles: int  # at most: every expert may have one that is not full

    @property
    def warps(self) -> int:
        return 4 if self.rows < 128 else 8


def sort_by_expert(index: Tensor, here: int) -> Sorted:
    """index [n, k] of experts below `here`. Others (below 0 or too high) come last, past every end."""
    flat = index.flatten()
    flat = torch.where((flat >= 0) & (flat < here), flat, here)
    sorted_experts, order = flat.sort(stable=True)
    size = triton.next_power_of_2(here)
    experts = torch.arange(size, device=index.device, dtype=flat.dtype).clamp(max=here - 1)
    ends = torch.searchsorted(sorted_experts, experts, right=True, out_int32=True)
    rows = tile_rows(len(flat) / here)
    return Sorted(order.int(), ends, index.shape[1], rows, len(flat) // rows + here)


def grouped(x: Tensor, index: Tensor, weight: Tensor | None, gate_up: Table, down: Table) -> Tensor:
    """Every token's chosen experts, each output times its weight. x [n, hidden] -> [n * k, hidden]

    index and weight [n, k]. An expert that is not here (below 0 or too high) gives zeros. A dense MLP is one
    expert, chosen by all.
    """
    by_expert = sort_by_expert(index, gate_up.codes.shape[0] if weight is not None else 1)
    return many_down(many_up(x, by_expert, gate_up), by_expert, weight, down)


def many_up(x: Tensor, by_expert: Sorted, gate_up: Table) -> Tensor:
    """silu(gate) * up of every choice, in sorted order. x [n, hidden] -> [n * k, width]"""
    cols, width = x.shape[1], gate_up.rows // 2
    hidden = x.new_empty(len(by_expert.order), width)
    many_up_kernel[(by_expert.tiles, -(-width // TILE_COLUMNS))](
        x,
        by_expert.order,
        by_expert.ends,
        gate_up.codes,
        gate_up.scales,
        hidden,
        cols,
        width,
        gate_up.codes.stride(0),
        gate_up.scales.stride(0),
        gate_up.half_blocks,
        by_expert.repeats,
        KIND=gate_up.kind,
        GROUP=gate_up.group,
        EXPERTS=len(by_expert.ends),
        BM=by_expert.rows,
        BN=TILE_COLUMNS,
        BK=depth(gate_up),
        num_warps=by_expert.warps,
        num_stages=3,
    )
    return hidden


def many_down(hidden: Tensor, by_expert: Sorted, weight: Tensor | None, down: Table) -> Tensor:
    """hidden [n * k, width] in sorted order -> each choice's output, times its weight if any [n * k, rows]"""
    cols = down.rows
    out = hidden.new_zeros(len(by_expert.order), cols)
    many_down_kernel[(by_expert.tiles, -(-cols // TILE_COLUMNS))](
        hidden,
        by_expert.order,
        by_expert.ends,
        weight if weight is not None else hidden,
        down.codes,
        down.scales,
        out,
        cols,
        hidden.shape[1],
        down.codes.stride(0),
        down.scales.stride(0),
        KIND=down.kind,
        GROUP=down.group,
        EXPERTS=len(by_expert.ends),
        BM=by_expert.rows,
        BN=TILE_COLUMNS,
        BK=depth(down),
        WEIGHTED=weight is not None,
        num_warps=by_expert.warps,
        num_stages=3,
    )
    return out


def depth(weight: Table) -> int:
    """Columns of the weights that a tile takes at a time: of packed ones a group."""
    return 64 if weight.kind == DENSE else weight.group
