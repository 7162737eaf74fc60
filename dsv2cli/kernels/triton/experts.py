"""Triton: the router, and experts for few tokens and for many, as kernels/experts.py says in plain torch.

For few tokens every token's experts are read by matrix-vector kernels, with the shared experts in further
slots: one kernel for router and choice, one for gate, up and SiLU, one for down, the weights and the sum. For
many, tokens are sorted by expert, and tiles of them go through tensor cores. Nothing here waits for the GPU:
how many tokens an expert has is known to the GPU alone.
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
    RUN,
    STAGES,
    Table,
    add_int8_products,
    add_products,
    alike,
    begin,
    in_int8,
    inverse_rms,
    launching,
    nothing,
    rms_norm,
    row_sums,
    table,
    tile_columns,
    tile_products,
    tile_rows,
    weight_tile,
)

MATVEC_TOKENS = 8  # up to so many tokens each one's experts are read by itself
UNPACK_TOKENS = 256  # choices an expert, from which packed experts are made numbers of before they are read
UNPACK_BYTES = 2 * 2**30  # that these may take
TILE_COLUMNS = 64  # of what a tensor core's tile gives


@triton.jit
def router_kernel(
    x,
    norm,
    weight,
    normed,
    codes,
    scales,
    logits,
    tickets,
    index,
    chosen_weight,
    cols,
    experts,
    factor_of_all,
    eps,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    SIZE: tl.constexpr,
    INT8: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    CHOICES: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    NORMALISE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Programs (token, some experts): router logits [tokens, experts] of norm(x), in fp32.

    The first program of a token also writes norm(x), with INT8 as codes and scales, too. The last that is
    done chooses the token's experts, and leaves its ticket at 0.
    """
    begin(PDL)
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
            if INT8:  # cols are whole runs
                each, scale = in_int8(values.to(tl.float32), CHUNK)
                tl.store(codes + token.to(tl.int64) * cols + at, each, mask=at < cols)
                run = start // RUN + tl.arange(0, CHUNK // RUN)
                tl.store(scales + token * (cols // RUN) + run, scale, mask=run < cols // RUN)
        inside = (expert < experts)[:, None] & (at < cols)[None, :]
        products += (
            tl.load(weight + expert[:, None] * cols + at[None, :], mask=inside, other=0.0)
            * values.to(tl.float32)[None, :]
        )
    tl.store(logits + token * experts + expert, tl.sum(products, axis=1), mask=expert < experts)
    if is_last(tickets + token, tl.num_programs(1)):
        choose(
            logits + token * experts,
            index + token * TOP_K,
            chosen_weight + token * TOP_K,
            experts,
            factor_of_all,
            EXPERTS,
            TOP_K,
            CHOICES,
            GROUPS,
            TOP_GROUPS,
            NORMALISE,
        )


@triton.jit
def is_last(ticket, count):
    """Whether all but this of `count` programs have come here, and what they stored can be loaded, past the
    nearest cache. The last leaves the ticket at 0.
    """
    tl.debug_barrier()  # all threads have stored
    mine = tl.atomic_add(ticket, 1, sem="acq_rel")
    tl.debug_barrier()
    if mine == count - 1:
        tl.store(ticket, 0)
    return mine == count - 1


@triton.jit
def choose(
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
    """A token's experts, best first, and their weights, both [k], as kernels/experts.py's `route`."""
    expert, choice = tl.arange(0, EXPERTS), tl.arange(0, CHOICES)
    scores = tl.load(logits + expert, mask=expert < experts, other=float("-inf"), cache_modifier=".cg")
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
    tl.store(index + choice, chosen, mask=choice < TOP_K)
    tl.store(weight + choice, weights, mask=choice < TOP_K)


@triton.jit
def gated(
    codes,
    scales,
    x,
    x_scales,
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
    INT8: tl.constexpr,
):
    """Sums of one block of the gate and of the same block of up, `half_blocks` further on."""
    gate, up = nothing(KIND, GROUP, ROWS, CHUNK), nothing(KIND, GROUP, ROWS, CHUNK)
    for start in tl.range(0, cols, CHUNK, num_stages=STAGES):
        if INT8:
            gate = add_int8_products(
                gate, codes, scales, block, cols, x, x_scales, start, KIND, GROUP, ROWS, CHUNK
            )
            up = add_int8_products(
                up, codes, scales, block + half_blocks, cols, x, x_scales, start, KIND, GROUP, ROWS, CHUNK
            )
        else:
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
        elif not INT8:
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
    x_scales,
    norm,
    index,
    codes,
    scales,
    shared_codes,
    shared_scales,
    out,
    out_scales,
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
    INT8: tl.constexpr,
    OUT8: tl.constexpr,
    PDL: tl.constexpr,
):
    """Programs (block, slot, token): silu(gate) * up of the token's slot-th expert.

    Slots from TOP_K on are the shared MLP's. out [tokens, routed and shared width], with OUT8 in codes and
    out_scales; where an expert is not here nothing is written. INT8: x is so, four columns a word.
    """
    begin(PDL)
    block, slot, token = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if INT8:
        x += token.to(tl.int64) * (cols // 4)
        x_scales += token * (cols // RUN)
    else:
        x += token.to(tl.int64) * cols
    to = token.to(tl.int64) * (TOP_K * width + shared_rows // 2)
    rows = tl.where(slot < TOP_K, 2 * width, shared_rows)  # an argument that is 1 can not change
    half_blocks = tl.where(slot < TOP_K, half_blocks, shared_half_blocks)
    if slot < TOP_K:
        expert = tl.load(index + token * TOP_K + slot) - first
        if (expert < 0) | (expert >= here):
            return
        codes += expert.to(tl.int64) * codes_stride
        scales += expert.to(tl.int64) * scales_stride
        to += slot * width
    else:
        codes, scales = shared_codes, shared_scales
        block += (slot - TOP_K) * shared_blocks
        to += TOP_K * width
    at = block * ROWS + tl.arange(0, ROWS)
    if block * ROWS < rows // 2:
        gate, up = gated(
            codes,
            scales,
            x,
            x_scales,
            norm,
            block,
            half_blocks,
            rows,
            cols,
            KIND,
            GROUP,
            ROWS,
            CHUNK,
            NORM,
            INT8,
        )
        if NORM:
            rms = inverse_rms(x, cols, eps, SIZE)
            gate, up = gate * rms, up * rms
        values = gate * tl.sigmoid(gate) * up
        if OUT8:  # widths are whole runs, and a block is one
            each, scale = in_int8(values, ROWS)
            tl.store(out + to + at, each, mask=at < rows // 2)
            run = tl.arange(0, ROWS // RUN)
            tl.store(out_scales + (to + block * ROWS) // RUN + run, scale)
        else:
            tl.store(out + to + at, values.to(out.dtype.element_ty), mask=at < rows // 2)


@triton.jit
def few_down_kernel(
    hidden,
    hidden_scales,
    codes,
    scales,
    shared_codes,
    shared_scales,
    index,
    weight,
    terms,
    tickets,
    out,
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
    INT8: tl.constexpr,
    PDL: tl.constexpr,
):
    """Programs (block, slot, token): out [tokens, rows] += the down projections of the slots, times weights.

    Slots from TOP_K on are the shared MLP's, each for `piece` of its columns. Each writes into terms [tokens,
    slots, rows] in fp32; the last of a block adds them up, always in one order. INT8: hidden is so.
    """
    begin(PDL)
    block, slot, token = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    to = token.to(tl.int64) * (TOP_K * width + shared_width)
    start = 0
    end = width
    factor = 1.0
    if slot < TOP_K:
        expert = tl.load(index + token * TOP_K + slot) - first
        factor = tl.load(weight + token * TOP_K + slot).to(tl.float32)
        codes += tl.maximum(expert, 0).to(tl.int64) * codes_stride
        scales += tl.maximum(expert, 0).to(tl.int64) * scales_stride
        to += slot * width
        if (expert < 0) | (expert >= here):
            end = 0  # another rank's
    else:
        to += TOP_K * width
        codes, scales = shared_codes, shared_scales
        start = (slot - TOP_K) * piece
        end = tl.minimum(start + piece, shared_width)
    width = tl.where(slot < TOP_K, width, shared_width)
    products = nothing(KIND, GROUP, ROWS, CHUNK)
    if INT8:
        x, x_scales = hidden + to // 4, hidden_scales + to // RUN
        for at in tl.range(start, end, CHUNK, num_stages=STAGES):
            products = add_int8_products(
                products, codes, scales, block, width, x, x_scales, at, KIND, GROUP, ROWS, CHUNK
            )
    else:
        x = hidden + to
        for at in tl.range(start, end, CHUNK, num_stages=STAGES):
            products = add_products(
                products, codes, scales, block, rows, width, x, x, at, KIND, GROUP, ROWS, CHUNK, False
            )
    sums = tl.where(end > start, row_sums(products, KIND) * factor, 0.0)
    row = block * ROWS + tl.arange(0, ROWS)
    terms += token.to(tl.int64) * tl.num_programs(1) * rows + row
    tl.store(terms + slot * rows, sums, mask=row < rows)
    if is_last(tickets + token * tl.num_programs(0) + block, tl.num_programs(1)):
        to_out = out + token.to(tl.int64) * rows + row
        total = tl.load(to_out, mask=row < rows, other=0.0).to(tl.float32)
        for k in range(tl.num_programs(1)):
            total += tl.load(terms + k * rows, mask=row < rows, other=0.0, cache_modifier=".cg")
        tl.store(to_out, total.to(out.dtype.element_ty), mask=row < rows)


@triton.jit
def sort_kernel(
    index, order, ends, count, first, here, EXPERTS: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr
):
    """One expert a program: where its choices end among those sorted by expert, and which they are, in order.

    index [count] of experts counted from -first on; ends [EXPERTS], filled up with the last; order [count],
    where nothing is written for choices of experts that are not `here`.
    """
    begin(PDL)
    expert = tl.program_id(0)
    at = tl.arange(0, CHUNK)
    before, mine = tl.zeros([CHUNK], tl.int32), tl.zeros([CHUNK], tl.int32)
    for start in range(0, count, CHUNK):
        each = tl.load(index + start + at, mask=start + at < count, other=-1) - first
        each = tl.where((start + at < count) & (each >= 0) & (each < here), each, EXPERTS)
        before += (each < expert).to(tl.int32)
        mine += (each == expert).to(tl.int32)
    place = tl.sum(before)
    tl.store(ends + expert, place + tl.sum(mine))
    for start in range(0, count, CHUNK):
        each = tl.load(index + start + at, mask=start + at < count, other=-1) - first
        is_mine = (start + at < count) & (each == expert) & (each < here)
        rank = tl.cumsum(is_mine.to(tl.int32), 0)
        tl.store(order + place + rank - 1, start + at, mask=is_mine)
        place += tl.sum(is_mine.to(tl.int32))


@triton.jit
def expert_of_tile(ends, tile, count, EXPERTS: tl.constexpr, BM: tl.constexpr):
    """Which expert's tokens a tile holds, from where among the sorted ones to where; past the last tile none.

    ends [EXPERTS]: where each expert's tokens end among the sorted ones, filled up with the last. A dense
    MLP is one expert, and has all `count`.
    """
    if EXPERTS == 1:
        return tile * 0, tile * BM, tile * 0 + count
    else:
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
    count,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    EXPERTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Programs (tile of sorted tokens, columns): out [sorted, width] = silu(gate) * up.

    Sorted place i is token order[i] // repeats.
    """
    begin(PDL)
    expert, first, end = expert_of_tile(ends, tl.program_id(0), count, EXPERTS, BM)
    if first >= end:
        return
    place = first + tl.arange(0, BM)
    row = place
    if EXPERTS > 1:
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
    count,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    EXPERTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    WEIGHTED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Programs (tile of sorted tokens, rows): down projections times weights, place i at out[order[i]]."""
    begin(PDL)
    expert, first, end = expert_of_tile(ends, tl.program_id(0), count, EXPERTS, BM)
    if first >= end:
        return
    place = first + tl.arange(0, BM)
    to = place
    if EXPERTS > 1:
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
def unpack_kernel(
    codes,
    scales,
    out,
    first_block,
    first_row,
    rows,
    all_rows,
    cols,
    codes_stride,
    scales_stride,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    BN: tl.constexpr,
    PDL: tl.constexpr,
):
    """Programs (rows, columns, expert): `rows` of packed weights, from their block `first_block` on, as
    numbers, in out [experts, all_rows, cols] from `first_row` on.
    """
    begin(PDL)
    some, chunk, expert = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    block = first_block + some * (BN // LANES_OF_A_BLOCK)
    end = first_block * LANES_OF_A_BLOCK + rows
    codes += expert * codes_stride
    scales += expert * scales_stride
    dtype = out.dtype.element_ty
    tile = weight_tile(codes, scales, block, end, cols, chunk, dtype, KIND, GROUP, BN, GROUP)  # [GROUP, BN]
    row, k = some * BN + tl.arange(0, BN), chunk * GROUP + tl.arange(0, GROUP)
    to = out + (expert * all_rows + first_row + row[None, :]) * cols + k[:, None]
    tl.store(to, tile, mask=(k < cols)[:, None] & (row < rows)[None, :])


@triton.jit
def gather_kernel(
    terms,
    shared,
    out,
    cols,
    TERMS: tl.constexpr,
    SHARED: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Programs (token, columns): out [tokens, cols] += the token's TERMS rows of terms and row of shared."""
    begin(PDL)
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
    rounds: bool = True  # activations to 8 bits, before packed weights of experts, for few tokens

    @property
    def up_int8(self) -> bool:
        """Whether what goes into gate and up of few tokens is in 8 bits; only a router makes it so."""
        there = [each for each in (self.gate_up, self.shared_gate_up) if each is not None]
        return self.rounds and self.router is not None and all(each.takes_int8 for each in there)

    @property
    def down_int8(self) -> bool:
        """The same of what goes into the down projections: whole runs of each expert's width, which only the
        programs for packed gate and up give.
        """
        there = [each for each in (self.down, self.shared_down) if each is not None]
        before = [each for each in (self.gate_up, self.shared_gate_up) if each is not None]
        packed = all(each.kind != DENSE for each in before)
        return self.rounds and packed and all(each.takes_int8 for each in there)

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


TICKETS: dict[torch.device, list[Tensor]] = {}


def tickets(device: torch.device, count: int) -> Tensor:
    """So many zeros [count] int32, which kernels leave as they were. Those that a graph knows stay."""
    known = TICKETS.setdefault(device, [])
    if not known or len(known[-1]) < count:
        known.append(torch.zeros(triton.next_power_of_2(count), dtype=torch.int32, device=device))
    return known[-1]


@dataclass(frozen=True)
class Routed:
    """Tokens as the experts take them: normed [tokens, hidden], the same in 8 bits with its scales (or normed
    again, where nobody asks for it), and each token's experts and their weights, both [tokens, top_k].
    """

    normed: Tensor
    codes: Tensor
    scales: Tensor
    index: Tensor
    weight: Tensor


def route(x: Tensor, feed: Feed, int8: bool = False) -> Routed:
    """norm(x), router logits in fp32, and the choice, in one kernel. x [tokens, hidden]"""
    assert feed.router is not None
    (count, cols), routing = x.shape, feed.routing
    normed, logits = torch.empty_like(x), x.new_empty(count, routing.experts, dtype=torch.float32)
    index = logits.new_empty(count, routing.top_k, dtype=torch.int32)
    weight = logits.new_empty(count, routing.top_k)
    codes, scales = byte_room(x, cols) if int8 else (normed, normed)
    size, rows = triton.next_power_of_2(cols), 2 if count <= MATVEC_TOKENS else 16
    router_kernel[(count, -(-routing.experts // rows))](
        x,
        feed.norm,
        feed.router,
        normed,
        codes,
        scales,
        logits,
        tickets(x.device, count),
        index,
        weight,
        cols,
        routing.experts,
        routing.scaling_factor,
        feed.eps,
        ROWS=rows,
        CHUNK=max(RUN.value, min(512, size)),
        SIZE=size,
        INT8=int8,
        EXPERTS=triton.next_power_of_2(routing.experts),
        TOP_K=routing.top_k,
        CHOICES=triton.next_power_of_2(routing.top_k),
        GROUPS=routing.n_group,
        TOP_GROUPS=routing.topk_group,
        NORMALISE=routing.norm_topk_prob,
        **launching(),
    )
    return Routed(normed, codes, scales, index, weight)


def byte_room(x: Tensor, cols: int) -> tuple[Tensor, Tensor]:
    """For numbers [tokens of x, cols] in 8 bits, and their scales."""
    count = x.shape[0]
    codes = x.new_empty(count, cols, dtype=torch.int8)
    return codes, x.new_empty(count, cols // RUN.value, dtype=torch.float32)


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
    nobody = Chosen(x, x, 0, first, 0)
    if feed.gate_up is None:
        return few_down(few_up(x, x, feed, nobody), feed, nobody, out)
    routed = route(x, feed, feed.up_int8)
    here = feed.gate_up.codes.shape[0]
    chosen = Chosen(routed.index, routed.weight, feed.routing.top_k, first, here)
    inner = routed.codes.view(torch.int32) if feed.up_int8 else routed.normed
    return few_down(few_up(inner, routed.scales, feed, chosen), feed, chosen, out)


def few_up(x: Tensor, x_scales: Tensor, feed: Feed, chosen: Chosen) -> tuple[Tensor, Tensor]:
    """silu(gate) * up of each token's experts and of the shared ones. x [tokens, hidden] -> [tokens, widths]
    and, where the down projection takes it in 8 bits, its scales.

    x is normed already where there is a router, and may be in 8 bits; else it is normed here.
    """
    up = feed.gate_up or feed.shared_gate_up
    assert up is not None
    shared_up = feed.shared_gate_up or up
    count, cols, width, shared_width = x.shape[0], up.cols, feed.width, feed.shared_width
    blocks = -(-(width or shared_width) // up.block_rows)  # of one half
    # The shared experts are one MLP: as many more slots as it is wider than a routed expert.
    slots = chosen.top_k + (-(-shared_width // (blocks * up.block_rows)) if shared_width else 0)
    widths, int8 = chosen.top_k * width + shared_width, feed.gate_up is not None and feed.up_int8
    if feed.down_int8:
        hidden, scales = byte_room(x, widths)
    else:
        hidden = scales = feed.norm.new_empty(count, widths)
    few_up_kernel[(blocks, slots, count)](
        x,
        x_scales,
        feed.norm,
        chosen.index,
        up.codes,
        up.scales,
        shared_up.codes,
        shared_up.scales,
        hidden,
        scales,
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
        CHUNK=up.chunk(8, int8),
        SIZE=triton.next_power_of_2(cols),
        NORM=feed.gate_up is None,
        TOP_K=chosen.top_k,
        INT8=int8,
        OUT8=feed.down_int8,
        num_warps=8,
        **launching(),
    )
    return hidden, scales


def few_down(hidden: tuple[Tensor, Tensor], feed: Feed, chosen: Chosen, out: Tensor) -> Tensor:
    """out [tokens, hidden size] += the weighted outputs of hidden [tokens, widths], as few_up gives it."""
    down = feed.down or feed.shared_down
    assert down is not None
    shared_down = feed.shared_down or down
    values, scales = hidden
    count, cols, width, shared_width = out.shape[0], down.rows, feed.width, feed.shared_width
    warps = 8
    chunk = down.chunk(warps, feed.down_int8)
    piece = -(-min(shared_width, width or 2048) // chunk) * chunk if shared_width else chunk
    slots = chosen.top_k + -(-shared_width // piece)
    terms = out.new_empty(count, slots, cols, dtype=torch.float32)
    few_down_kernel[(down.blocks(), slots, count)](
        values.view(torch.int32) if feed.down_int8 else values,
        scales,
        down.codes,
        down.scales,
        shared_down.codes,
        shared_down.scales,
        chosen.index,
        chosen.weight,
        terms,
        tickets(out.device, count * down.blocks()),
        out,
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
        INT8=feed.down_int8,
        num_warps=warps,
        **launching(),
    )
    return out


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
        **launching(),
    )
    return out


def many(x: Tensor, feed: Feed, out: Tensor, first: int) -> Tensor:
    """`run` for many tokens: sorted by expert, through tensor cores. x and out [tokens, hidden]"""
    count = x.shape[0]
    terms, shared = x.new_empty(count, 0, x.shape[1]), None
    if feed.gate_up is not None and feed.down is not None:
        routed = route(x, feed)
        inner = routed.normed
        gate_up, down = feed.gate_up, feed.down
        if pays_to_unpack(count * feed.routing.top_k, gate_up, down):
            gate_up, down = unpacked(gate_up, 2, x.dtype), unpacked(down, 1, x.dtype)
        terms = grouped(inner, routed.index, routed.weight, gate_up, down, first)
        terms = terms.unflatten(0, (count, -1))
    else:
        inner = rms_norm(x, feed.norm, feed.eps)
    if feed.shared_gate_up is not None and feed.shared_down is not None:
        shared = dense(inner, feed.shared_gate_up, feed.shared_down)
    return gather(terms, shared, out)


def dense(x: Tensor, gate_up: Table, down: Table) -> Tensor:
    """One MLP for all tokens. x [n, hidden] -> the same shape."""
    count, rows = x.shape[0], tile_rows(x.shape[0])
    everything = Sorted(x, x, 1, 1, rows, -(-count // rows), count)
    return many_down(many_up(x, everything, gate_up), everything, None, down)


@dataclass(frozen=True)
class Sorted:
    """Choices (token i's j-th is number i * k + j) sorted by expert, and the tiles that they are cut into. A
    dense MLP is one expert, chosen by all, and has no order.
    """

    order: Tensor  # [n * k] int32: the choice at each place
    ends: Tensor  # [experts] int32: where each expert's choices end, filled up with the last
    experts: int  # a power of two
    repeats: int  # choices a token
    rows: int  # of a tile
    tiles: int  # at most: every expert may have one that is not full
    count: int  # of choices

    @property
    def warps(self) -> int:
        return 4 if self.rows < 128 else 8


def sort_by_expert(index: Tensor, here: int, first: int = 0) -> Sorted:
    """index [n, k] of experts, of which those from `first` on are `here`; others have no place."""
    size, count = max(2, triton.next_power_of_2(here)), index.numel()
    order, ends = index.new_empty(count, dtype=torch.int32), index.new_empty(size, dtype=torch.int32)
    sort_kernel[(size,)](
        index, order, ends, count, first, here, EXPERTS=size, CHUNK=1024, num_warps=4, **launching()
    )
    rows = tile_rows(count / here)
    return Sorted(order, ends, size, index.shape[1], rows, count // rows + here, count)


def grouped(x: Tensor, index: Tensor, weight: Tensor, gate_up: Table, down: Table, first: int = 0) -> Tensor:
    """Every token's chosen experts, each output times its weight. x [n, hidden] -> [n * k, hidden]

    index and weight [n, k]. An expert that is not here (before `first`, or too high) gives zeros.
    """
    by_expert = sort_by_expert(index, gate_up.codes.shape[0], first)
    return many_down(many_up(x, by_expert, gate_up), by_expert, weight, down)


def pays_to_unpack(choices: int, *weights: Table) -> bool:
    """Whether so many choices read packed experts so often that these are better made numbers of once, and
    there may be room for that.
    """
    experts = weights[0].codes.shape[0]
    size = sum(2 * experts * each.rows * each.cols for each in weights)
    packed = all(each.kind != DENSE for each in weights)
    return packed and choices >= UNPACK_TOKENS * experts and size <= UNPACK_BYTES


def unpacked(weight: Table, parts: int, dtype: torch.dtype) -> Table:
    """A stack of packed weights as numbers; `parts` of equally many rows were packed by themselves."""
    experts, rows = weight.codes.shape[0], weight.rows // parts
    out = torch.empty(experts, weight.rows, weight.cols, dtype=dtype, device=weight.codes.device)
    for part in range(parts):
        unpack_kernel[(-(-rows // 64), -(-weight.cols // weight.group), experts)](
            weight.codes,
            weight.scales,
            out,
            part * weight.half_blocks,
            part * rows,
            rows,
            weight.rows,
            weight.cols,
            weight.codes.stride(0),
            weight.scales.stride(0),
            KIND=weight.kind,
            GROUP=weight.group,
            BN=64,
            num_warps=4,
            **launching(),
        )
    return table(out)


def columns_of(weight: Table, by_expert: Sorted, rows: int) -> int:
    """Columns of a tile of `rows` columns in all: most where numbers are dense and rows are many."""
    wide = weight.kind == DENSE and by_expert.rows == 128 and weight.codes.element_size() == 2
    return tile_columns(by_expert.tiles, rows, 128 if wide else TILE_COLUMNS, 32)


def many_up(x: Tensor, by_expert: Sorted, gate_up: Table) -> Tensor:
    """silu(gate) * up of every choice, in sorted order. x [n, hidden] -> [n * k, width]"""
    cols, width = x.shape[1], gate_up.rows // 2
    hidden, columns = x.new_empty(by_expert.count, width), columns_of(gate_up, by_expert, width)
    many_up_kernel[(by_expert.tiles, -(-width // columns))](
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
        by_expert.count,
        KIND=gate_up.kind,
        GROUP=gate_up.group,
        EXPERTS=by_expert.experts,
        BM=by_expert.rows,
        BN=columns,
        BK=depth(gate_up),
        num_warps=by_expert.warps,
        num_stages=3,
        **launching(),
    )
    return hidden


def many_down(hidden: Tensor, by_expert: Sorted, weight: Tensor | None, down: Table) -> Tensor:
    """hidden [n * k, width] in sorted order -> each choice's output, times its weight if any [n * k, rows]"""
    cols, columns = down.rows, columns_of(down, by_expert, down.rows)
    out = hidden.new_zeros(by_expert.count, cols)
    many_down_kernel[(by_expert.tiles, -(-cols // columns))](
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
        by_expert.count,
        KIND=down.kind,
        GROUP=down.group,
        EXPERTS=by_expert.experts,
        BM=by_expert.rows,
        BN=columns,
        BK=depth(down),
        WEIGHTED=weight is not None,
        num_warps=by_expert.warps,
        num_stages=3,
        **launching(),
    )
    return out


def depth(weight: Table) -> int:
    """Columns of the weights that a tile takes at a time: of packed ones a group."""
    return 64 if weight.kind == DENSE else weight.group
