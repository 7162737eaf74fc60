"""The Triton kernels against the plain torch that says what they compute: interpreted on a CPU, or as they
are on a GPU.
"""

import copy
import dataclasses
import itertools
import json
import re
import sys

import pytest
import torch
from conftest import DATA, golden_folders
from rows import Rows, answered, scores_of
from running import run_dsv2
from safetensors.torch import load_file
from shapes import (
    ATTENTIONS,
    CODINGS,
    EXPERTS,
    GPU_CODINGS,
    PRODUCTS,
    ROUTINGS,
    WIDE_ATTENTIONS,
    WIDE_PRODUCTS,
    smallest_config,
)
from test_native import close, quantize, random_codes

pytest.importorskip("triton")

import gpu_table
import triton
import triton.language as tl

from dsv2cli.checkpoint.blueprint import weights_to_pack
from dsv2cli.checkpoint.load import load_model, random_model
from dsv2cli.checkpoint.names import Packing, stored_as
from dsv2cli.engine.pages import Sequence
from dsv2cli.engine.request import Request, SamplingParams
from dsv2cli.engine.sampling import distribution, sample_rows
from dsv2cli.engine.scheduler import Job, Scheduler
from dsv2cli.formats import PAGE, own_coding
from dsv2cli.kernels import attention, experts
from dsv2cli.kernels.experts import Routing
from dsv2cli.kernels.latents import rotated
from dsv2cli.kernels.linear import gated_mlp, in_int8, linear, rms_norm
from dsv2cli.kernels.quantized import CODEBOOK, IQ4_NL, Quantized
from dsv2cli.kernels.triton import attention as gpu_attention
from dsv2cli.kernels.triton import experts as gpu_experts
from dsv2cli.kernels.triton import linear as gpu_linear
from dsv2cli.kernels.triton.linear import table
from dsv2cli.model.config import DeepseekV2Config
from dsv2cli.model.layers import hold_codes
from dsv2cli.model.pool import LatentPool
from dsv2cli.model.rope import rotate
from dsv2cli.run.gpu import TritonRunner
from dsv2cli.run.runner import PlainRunner

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [
    torch.float32,
    torch.float16,
    *([torch.bfloat16] if DEVICE.type == "cuda" else []),
]  # interpreted tl.dot is wrong in bf16
ROUNDING = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
WIDE = DEVICE.type == "cuda"  # interpreted they take too long
GREEDY = SamplingParams(temperature=0.0)
OPTIONS = ("--prompt-ids", "5,6,7", "--ignore-eos", "-n", "2", "--temperature", "0", "--json")


def weights(values, kind, dtype, parts=1, group=64):
    """`values` [rows, cols] or [experts, rows, cols] as the kernels may find them: dense or packed."""
    if kind == 16:
        return values.to(DEVICE, dtype)
    if values.dim() == 2:
        return quantize(values, kind, parts, group).to(DEVICE)
    out = Quantized(tuple(values.shape), own_coding(kind, group), parts, torch.device("cpu"))
    for e, matrix in enumerate(values):
        one = quantize(matrix, kind, parts, group)
        out.codes[e], out.scales[e] = one.codes, one.scales
    return out.to(DEVICE)


def random(*shape, dtype=torch.float32):
    return torch.randn(shape).to(DEVICE, dtype)


def by_turns(*lists):
    """All combinations, each with every dtype; interpreted, which takes its time, each with one of them."""
    every = itertools.product(*map(enumerate, lists), enumerate(DTYPES))
    return [
        tuple(value for _, value in combination)
        for combination in every
        if DEVICE.type == "cuda" or sum(i for i, _ in combination) % len(DTYPES) == 0
    ]


@pytest.mark.parametrize(("shape", "dtype"), by_turns(PRODUCTS + WIDE_PRODUCTS * WIDE))
def test_a_product_equals_the_plain_one(shape, dtype):
    torch.manual_seed(0)
    for kind, group in ((16, 0), (8, 64), (4, 32)):
        weight, other = (weights(torch.randn(shape) * 0.1, kind, dtype, group=group) for _ in range(2))
        norm = (torch.rand(shape[1]) + 0.5).to(DEVICE, dtype)
        for count in (2, gpu_linear.MATVEC_ROWS + 1):
            x, residual = random(count, shape[1], dtype=dtype), random(count, shape[0], dtype=dtype)
            normed = rms_norm(x, norm, 1e-6)
            both = gpu_linear.linear(x, table(weight), table(other), norm=norm, eps=1e-6)
            close(both, torch.cat([linear(normed, weight), linear(normed, other)], dim=1), ROUNDING[dtype])
            close(
                gpu_linear.linear(x, table(weight), residual=residual.clone()),
                residual + linear(x, weight),
                ROUNDING[dtype],
            )


@pytest.mark.parametrize("coding", GPU_CODINGS, ids=str)
def test_codes_of_other_programs_are_multiplied_as_they_are(coding):
    """A few rows, many, two matrices side by side of one kind and of two."""
    torch.manual_seed(0)
    dtype = DTYPES[0]
    shape = (19, 300)
    weight, other = (random_codes(shape, coding)[1].to(DEVICE) for _ in range(2))
    plain = weights(torch.randn(shape) * 0.02, 8, dtype)
    for count in (2, gpu_linear.MATVEC_ROWS + 1):
        x = random(count, shape[1], dtype=dtype)
        for more in (other, plain):
            both = gpu_linear.linear(x, table(weight), table(more))
            close(both, torch.cat([linear(x, weight), linear(x, more)], dim=1), ROUNDING[dtype])


@pytest.mark.parametrize("coding", [each for each in CODINGS if each.scale == "I8"][:2], ids=str)
def test_scales_of_scales_are_multiplied_out(coding):
    weight, x = random_codes((19, 512), coding)[1].to(DEVICE), random(2, 512)
    assert weight.multiplied_out().codes is weight.codes
    close(gpu_linear.linear(x, table(weight)), linear(x, weight.multiplied_out()), ROUNDING[torch.float32])
    close(weight.multiplied_out().dequantize(torch.float32), weight.dequantize(torch.float32), 1e-3)


def run_ptx(text, word):
    """What the few instructions of gpu_linear.UNPACK do, by the PTX manual: and, or, shr, prmt.

    Gives $0 and $1.
    """
    registers = {"$2": word}

    def value(name):
        return registers[name] if name in registers else int(name, 0)

    for name, to, arguments in re.findall(r"(\w+)\.b32 ([$\w]+), ([^;]+);", text):
        a, b, *more = (value(argument.strip()) for argument in arguments.split(","))
        if name == "prmt":
            found = a.to_bytes(4, "little") + b.to_bytes(4, "little")
            picks = [more[0] >> (4 * i) & 15 for i in range(4)]
            assert all(pick < 8 for pick in picks), "8 and more would spread a sign"
            registers[to] = int.from_bytes(bytes(found[pick] for pick in picks), "little")
        else:
            registers[to] = {"and": a & b, "or": a | b, "shr": a >> b}[name]
    return registers["$0"], registers["$1"]


def test_the_gpus_own_instructions_unpack_every_code():
    """The interpreter takes another road there, so these are read here."""
    for word in [int.from_bytes(bytes([code | (15 - code) << 4] * 4), "little") for code in range(16)] + [
        0x76543210,
        0xFEDCBA98,
        0x1E2D3C4B,
    ]:
        for text, values in ((gpu_linear.UNPACK, CODEBOOK), (gpu_linear.NL_UNPACK, IQ4_NL)):
            low, high = run_ptx(text.value, word)
            for j in range(4):
                byte = word >> (8 * j) & 255
                for got, code in ((low, byte & 15), (high, byte >> 4)):
                    assert (got >> (8 * j) & 255) == int(values[code]) & 255


def added(x, feed, first=0):
    out = x.clone()
    return gpu_experts.run(out, feed, out, first)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_the_router_chooses_as_the_plain_one(routing):
    torch.manual_seed(1)
    logits = random(40, routing[0])
    # Normed rows of ones and minus ones stay as they are, and the router's weights make of them what we want.
    x = torch.where(random(40, 64) < 0, -1.0, 1.0)
    router = torch.linalg.lstsq(x, logits).solution.T.contiguous()
    feed = gpu_experts.Feed(
        torch.ones(64, device=DEVICE), 0.0, router, gpu_experts.Routing(*routing, 2.5), None, None, None, None
    )
    for rows in (x[:3], x):
        routed = gpu_experts.route(rows, feed, int8=True)
        wanted = experts.route(linear(rows, router), Routing(*routing[1:], 2.5))
        assert torch.equal(routed.index.long(), wanted[0])
        torch.testing.assert_close(routed.weight, wanted[1])
        assert not gpu_experts.tickets(rows.device, 1).any()  # as the next launch wants them
        twin = in_int8(rows)
        torch.testing.assert_close(routed.codes.float() * routed.scales.repeat_interleave(16, 1), twin)


def test_choices_are_sorted_by_expert_with_none_of_those_that_are_elsewhere():
    for count, here, first in ((5, 3, 0), (700, 8, 4), (1500, 5, 0)):
        index = torch.randint(0, 12, (count, 2), device=DEVICE, dtype=torch.int32)
        found = gpu_experts.sort_by_expert(index, here, first)
        start = 0
        for expert in range(here):
            wanted = (index.flatten() == first + expert).nonzero().flatten()
            assert torch.equal(found.order[start : found.ends[expert]].long(), wanted)
            start = int(found.ends[expert])
        assert (found.ends[here:] == start).all()


def in_int8_of_each(x, gate_up, down):
    """One MLP whose activations are rounded as the kernels' for few tokens are."""
    gate, up = linear(in_int8(x), gate_up).chunk(2, dim=-1)
    return linear(in_int8(torch.nn.functional.silu(gate) * up), down)


@pytest.mark.parametrize("kind", [8, 4])
def test_a_few_tokens_go_through_packed_experts_in_8_bits(kind):
    torch.manual_seed(2)
    hidden, width, group = 64, 32, 32
    norm, router = torch.rand(hidden) + 0.5, random(8, hidden)
    given = [
        weights(torch.randn(*shape) * 0.2, kind, torch.float32, parts, group)
        for shape, parts in (
            ((8, 2 * width, hidden), 2),
            ((8, hidden, width), 1),
            ((4 * width, hidden), 2),
            ((hidden, 2 * width), 1),
        )
    ]
    feed = gpu_experts.Feed(
        norm.to(DEVICE), 1e-6, router, gpu_experts.Routing(8, 2, 1, 1, False, 2.5), *map(table, given)
    )
    assert feed.up_int8 and feed.down_int8
    x = random(2, hidden)
    inner = rms_norm(x, feed.norm, 1e-6)
    index, weight = experts.route(linear(inner, router), Routing(2, 1, 1, False, 2.5))
    wanted = x + in_int8_of_each(inner, given[2], given[3])
    gate_up, down = (each.dequantize(torch.float32) for each in given[:2])
    for token in range(2):
        for expert, share in zip(index[token].tolist(), weight[token], strict=True):
            wanted[token] += share * in_int8_of_each(inner[token], gate_up[expert], down[expert])
    got, exact = added(x, feed), added(x, dataclasses.replace(feed, rounds=False))
    close(got, wanted, 2e-3)  # a number between two codes may go to either
    assert 1e-4 < (got - exact).abs().mean() / exact.abs().mean() < 0.02


@pytest.mark.parametrize("kind", [8, 4])
def test_experts_are_unpacked_before_many_tokens_read_them(kind, monkeypatch):
    """Also where a half of gate and up, or the last group of columns, is not whole."""
    torch.manual_seed(2)
    gate_up, down = (
        weights(torch.randn(3, rows, cols) * 0.2, kind, torch.float32, parts, 32)
        for rows, cols, parts in ((2 * 24, 50, 2), (50, 24, 1))
    )
    for weight, parts in ((gate_up, 2), (down, 1)):
        found = gpu_experts.unpacked(table(weight), parts, torch.float32)
        assert found.kind == gpu_linear.DENSE and (found.rows, found.cols) == tuple(weight.shape[1:])
        torch.testing.assert_close(found.codes, weight.dequantize(torch.float32))
    feed = gpu_experts.Feed(
        torch.ones(50, device=DEVICE), 1e-6, random(3, 50), gpu_experts.Routing(3, 1, 1, 1, False, 1.0),
        table(gate_up), table(down), None, None,
    )  # fmt: skip
    x = random(12, 50)
    assert not gpu_experts.pays_to_unpack(12, feed.gate_up, feed.down)
    as_they_lie = added(x, feed)
    monkeypatch.setattr(gpu_experts, "UNPACK_TOKENS", 4)
    assert gpu_experts.pays_to_unpack(12, feed.gate_up, feed.down)
    close(added(x, feed), as_they_lie, 1e-5)


def test_a_gate_of_numbers_beside_a_packed_down_projection_is_not_rounded():
    torch.manual_seed(2)
    given = [
        weights(torch.randn(*shape) * 0.2, kind, torch.float32, 1, 32)
        for shape, kind in (((4, 64, 32), 16), ((4, 32, 32), 4), ((64, 32), 16), ((32, 32), 4))
    ]
    norm, router = torch.ones(32, device=DEVICE), random(4, 32)
    feed = gpu_experts.Feed(
        norm, 1e-6, router, gpu_experts.Routing(4, 2, 1, 1, False, 1.0), *map(table, given)
    )
    assert not feed.up_int8 and not feed.down_int8
    x = random(1, 32)
    inner = rms_norm(x, norm, 1e-6)
    index, weight = experts.route(linear(inner, router), Routing(2, 1, 1, False, 1.0))
    wanted = x + experts.run_experts(inner, index, weight, *given[:2]) + gated_mlp(inner, *given[2:])
    close(added(x, feed), wanted, 2e-5)


def test_what_is_no_number_stays_so_in_8_bits():
    routing = gpu_experts.Routing(4, 2, 1, 1, False, 1.0)
    feed = gpu_experts.Feed(
        torch.ones(32, device=DEVICE), 0.0, random(4, 32), routing, None, None, None, None
    )
    x = random(2, 32)
    x[0] = float("nan")
    scales = gpu_experts.route(x, feed, int8=True).scales
    assert scales[0].isnan().all() and scales[1].isfinite().all()


def run_dp4a(a, b):
    """What dp4a.s32.s32 adds, by the PTX manual: the four signed bytes of each word, multiplied."""
    parts = [[(word >> 8 * j & 255) - (word >> 8 * j & 128) * 2 for j in range(4)] for word in (a, b)]
    return sum(x * y for x, y in zip(*parts, strict=True))


@triton.jit
def words_kernel(a, b, out, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    one, two = tl.load(a + at), tl.load(b + at)
    tl.store(out + at, gpu_linear.four_by_four(one, two, tl.zeros_like(one)))


def test_four_products_are_those_of_dp4a():
    a, b = (torch.randint(-(2**31), 2**31, (64,), device=DEVICE).int() for _ in range(2))
    out = torch.empty_like(a)
    words_kernel[(1,)](a, b, out, COUNT=64)
    assert out.tolist() == [
        run_dp4a(x & 2**32 - 1, y & 2**32 - 1) for x, y in zip(a.tolist(), b.tolist(), strict=True)
    ]


@pytest.mark.parametrize(("sizes", "kind", "dtype"), by_turns(EXPERTS, [16, 8, 4]))
def test_experts_equal_the_plain_ones(sizes, kind, dtype):
    routing, hidden, width, shared = sizes
    torch.manual_seed(2)
    group = 32 if kind == 4 else 64
    e = routing[0]
    norm, router = (torch.rand(hidden) + 0.5).to(DEVICE, dtype), random(e, hidden)
    gate_up, down = (
        weights(torch.randn(e, 2 * width, hidden) * 0.2, kind, dtype, 2, group),
        weights(torch.randn(e, hidden, width) * 0.2, kind, dtype, 1, group),
    )
    shared_gate_up = (
        weights(torch.randn(2 * width * shared, hidden) * 0.2, kind, dtype, 2, group) if shared else None
    )
    shared_down = (
        weights(torch.randn(hidden, width * shared) * 0.2, kind, dtype, 1, group) if shared else None
    )
    extra = (table(shared_gate_up), table(shared_down)) if shared else (None, None)
    feed = gpu_experts.Feed(
        norm,
        1e-6,
        router,
        gpu_experts.Routing(*routing, 2.5),
        table(gate_up),
        table(down),
        *extra,
        rounds=False,
    )
    dense = gpu_experts.Feed(norm, 1e-6, None, gpu_experts.NO_ROUTING, None, None, *extra, rounds=False)
    for count in (2, gpu_experts.MATVEC_TOKENS + 1):
        x = random(count, hidden, dtype=dtype)
        inner = rms_norm(x, norm, 1e-6)
        index, weight = experts.route(linear(inner.float(), router), Routing(*routing[1:], 2.5))
        routed, mlp = (
            experts.run_experts(inner, index, weight, gate_up, down),
            gated_mlp(inner, shared_gate_up, shared_down) if shared else 0,
        )
        close(added(x, feed), x + routed + mlp, 2 * ROUNDING[dtype])
        if shared:
            close(added(x, dense), x + mlp, 2 * ROUNDING[dtype])
        if kind == 16:  # as one of several ranks, with experts 2 to 4
            some = gpu_experts.Feed(
                norm,
                1e-6,
                router,
                gpu_experts.Routing(*routing, 2.5),
                table(gate_up[2:5]),
                table(down[2:5]),
                None,
                None,
            )
            wanted = x + experts.run_experts(inner, index, weight, gate_up[2:5], down[2:5], first=2)
            close(added(x, some, 2), wanted, 2 * ROUNDING[dtype])


def test_scores_that_are_no_numbers_harm_nobody_else():
    torch.manual_seed(3)
    norm, router, gate_up, down = (
        torch.ones(32, device=DEVICE),
        random(8, 32),
        random(8, 32, 32),
        random(8, 32, 16),
    )
    feed = gpu_experts.Feed(
        norm,
        1e-6,
        router,
        gpu_experts.Routing(8, 2, 1, 1, False, 1.0),
        table(gate_up),
        table(down),
        None,
        None,
    )
    for count in (3, gpu_experts.MATVEC_TOKENS + 1):
        x = random(count, 32)
        alone = added(x, feed)
        x[1] = float("nan")
        assert torch.equal(added(x, feed)[2:], alone[2:])


def held_in(sizes, dtype, cache, latents):
    """A pool of one layer that holds latents [pages * PAGE, rank + rope]."""
    _, _, rope, _, rank = sizes
    config = dataclasses.replace(
        DeepseekV2Config.from_dict(smallest_config()), kv_lora_rank=rank, qk_rope_head_dim=rope
    )
    pool = LatentPool(config, len(latents) // PAGE, [DEVICE], dtype, cache)
    pool.write(0, torch.arange(len(latents), device=DEVICE), latents)
    return pool


@pytest.mark.parametrize("cache", ["auto", "int8", "int6", "int4"])
@pytest.mark.parametrize(("sizes", "dtype"), by_turns(ATTENTIONS + WIDE_ATTENTIONS * WIDE))
def test_attention_over_the_pool_equals_the_plain_one(sizes, dtype, cache):
    """Sequences of different lengths in other rows, whose pages lie anywhere, one that is not there, two new
    tokens of one row; few tokens and more.
    """
    heads, nope, rope, value, rank = sizes
    torch.manual_seed(4)
    shape = gpu_attention.Shape(heads, nope, rope, value, rank, (nope + rope) ** -0.5)
    kv_b, kv_norm = (
        random(heads * (nope + value), rank, dtype=dtype) * rank**-0.5,
        (torch.rand(rank) + 0.5).to(DEVICE, dtype),
    )
    tables = torch.tensor([[4, 8, 1], [7, 0, 2], [3, 6, 5]], device=DEVICE)  # of three rows
    for positions, slots in [
        ([0], [0]),
        ([130, 3, -1, 70, 71], [2, 0, 0, 1, 1]),
        ([*range(40, 49)], [0] * 9),
    ]:
        count = len(positions)
        pool = held_in(sizes, dtype, cache, random(9 * PAGE, rank + rope, dtype=dtype))
        both = random(count, heads * (nope + rope) + rank + rope, dtype=dtype)
        q, kv = both.split([heads * (nope + rope), rank + rope], dim=1)
        angles = random(count, rope // 2)
        rotary = torch.stack([angles.cos(), angles.sin()], dim=1)
        plain = copy.deepcopy(pool)
        k_rope = rotate(kv[:, None, rank:], rotary)[:, 0]
        rows = torch.cat([rms_norm(kv[:, :rank], kv_norm, 1e-6), k_rope], dim=1)
        for i, (position, slot) in enumerate(zip(positions, slots, strict=True)):
            if position >= 0:
                place = tables[slot, position // PAGE] * PAGE + position % PAGE
                plain.write(0, place[None], rows[i : i + 1])
        got = gpu_attention.attend(
            q,
            kv,
            kv_norm,
            rotated(kv_b) if pool.bits < 8 else kv_b,
            rotary,
            torch.tensor(positions, device=DEVICE).int(),
            torch.tensor(slots, device=DEVICE).int(),
            tables.int(),
            pool.layers[0],
            shape,
            pool.bits,
        )
        everything = torch.arange(9, device=DEVICE)
        found, wanted = (each.read(0, everything, 9 * PAGE).float() for each in (pool, plain))
        # Where a number lies between two codes either will do, which changes a whole block of a token.
        others = ((found - wanted).abs() > ROUNDING[dtype]).any(dim=1)
        assert others.sum() <= (0 if pool.bits == 16 else 2) and (found - wanted).abs().max() < 0.3
        for i, (position, slot) in enumerate(zip(positions, slots, strict=True)):
            if position < 0:
                continue
            q_nope, q_rope = q[i].view(1, 1, heads, -1).split([nope, rope], dim=-1)
            seen = pool.read(0, tables[slot], position + 1)[None]
            q_rope = rotate(q_rope[0], rotary[i, None])[None]
            w = kv_b.view(heads, -1, rank)
            wanted = attention.attend(q_nope, q_rope, seen, w, shape.scale, "reference")
            close(got[i], wanted.flatten(), 4 * ROUNDING[dtype])


@pytest.mark.parametrize("sizes", ATTENTIONS[:3])
def test_a_few_tokens_read_kv_b_proj_in_8_bits(sizes):
    heads, nope, rope, value, rank = sizes
    torch.manual_seed(4)
    kv_b = random(heads * (nope + value), rank) * rank**-0.5
    codes, scales = gpu_attention.up_in_int8(kv_b)
    rounded = codes.float() * scales.float().repeat_interleave(64, 1)[:, :rank]
    assert 0 < (rounded - kv_b).abs().max() < 0.01 * kv_b.abs().max()
    q, kv = random(2, heads * (nope + rope)), random(2, rank + rope)
    where = [torch.tensor(each, device=DEVICE).int() for each in ([70, 3], [0, 1], [[0, 1], [2, 3]])]
    rotary = torch.ones(2, 2, rope // 2, device=DEVICE)
    cache = random(4 * PAGE, rank + rope)
    found = []
    for given in ({"kv_b": rounded}, {"kv_b": kv_b, "kv_b_int8": (codes, scales)}):
        pool = held_in(sizes, torch.float32, "auto", cache)
        kv_b_given, more = given.pop("kv_b"), given
        found.append(
            gpu_attention.attend(
                q, kv, torch.ones(rank, device=DEVICE), kv_b_given, rotary, where[0], where[1], where[2],
                pool.layers[0], gpu_attention.Shape(*sizes, 0.2), **more,
            )
        )  # fmt: skip
    close(found[1], found[0], 1e-5)


def both_ways(work, model, cache="auto"):
    """What `work` makes of a model on the plain path, and through the kernels."""
    plain = work(PlainRunner(model, cache=cache))
    return plain, work(TritonRunner(model, graphs=True, cache=cache, rounds=False))


def random_smallest(format=None):
    """With random weights."""
    torch.manual_seed(6)
    return random_model(DeepseekV2Config.from_dict(smallest_config()), DEVICE, torch.float32, format)


def random_mixed():
    """With random codes of other programs, another kind for each weight, as GGUF files mix them."""
    model = random_smallest().cpu()
    kinds = itertools.cycle(GPU_CODINGS)
    for name, box in weights_to_pack(model, embedding=True):
        leaf = name.rpartition(".")[2]
        hold_codes(box, leaf, next(kinds))
        weight = getattr(box, leaf)
        for _, expert, part in stored_as(name, weight):
            place = Packing(weight, expert, part)
            place.keep(random_codes(place.shape, weight.coding)[0], weight.coding, None)
    return model.to(DEVICE)


@pytest.mark.parametrize(
    "make",
    [
        lambda: load_model(DATA / "golden" / "v2", DEVICE, torch.float32),
        random_smallest,
        random_mixed,
        lambda: random_smallest("int4-all"),
    ],
)
@torch.inference_mode()
def test_a_whole_model_gives_the_plain_paths_logits(make):
    def logits(model):
        rows = Rows(model, 2, 128)
        first = rows.last([1, 2, 3], [*range(20)], whole=True)
        mixed = rows.last([4], [*range(5, 17)])  # a token, and more than the kernels take
        return torch.stack([first, mixed, *(rows.decode([9 + i], [9 + i])[:, 0] for i in range(2))])

    model = make()
    plain, fast = both_ways(logits, model)
    close(fast, plain, 1e-5)
    if model.config.hidden_size == 32:  # the kernels know one attention path, and leave the others alone
        runner = TritonRunner(model, "expanded", graphs=True, rounds=False)
        assert not runner.decodes_ahead
        close(logits(runner), plain, 1e-5)


@torch.inference_mode()
def test_activations_in_8_bits_change_little_and_can_be_switched_off():
    def logits(runner):
        rows = Rows(runner, 1, 128)
        return torch.stack([rows.last([token]) for token in (5, 9)])

    torch.manual_seed(6)
    config = dataclasses.replace(DeepseekV2Config.from_dict(smallest_config()), moe_intermediate_size=32)
    model = random_model(config, DEVICE, torch.float32, "int4")
    for name, module in model.named_modules():
        if isinstance(module, Quantized) and ".mlp." in name:
            module.scales *= 30  # so that experts have a say
    plain = logits(PlainRunner(model))
    with_8, without = (logits(TritonRunner(model, rounds=rounds)) for rounds in (True, False))
    close(without, plain, 1e-5)
    assert 1e-5 < (with_8 - plain).abs().mean() / plain.abs().mean() < 0.02


@pytest.mark.parametrize("cache", ["int8", "int6"])
@torch.inference_mode()
def test_a_whole_model_over_latents_in_codes_gives_the_plain_paths_logits(cache):
    def logits(model):
        rows = Rows(model, 2, 128)
        first = rows.last([1, 2, 3], [*range(20)], whole=True)
        return torch.stack([first, *(rows.decode([9 + i], [9 + i])[:, 0] for i in range(2))])

    plain, fast = both_ways(logits, random_smallest(), cache)
    close(fast, plain, 1e-3)


@torch.inference_mode()
def test_queries_in_4_bits_and_latents_in_8_are_read_in_one_launch():
    model = random_smallest("int4")
    plain = scores_of(PlainRunner(model), [1, 2, 3])
    assert {each.self_attn.o_proj.weight.bits for each in model.layers} == {4}
    runner = TritonRunner(model)
    assert all(gpu_linear.alike(layer.first_q, layer.kv_a) for layer in runner.layers)
    close(scores_of(runner, [1, 2, 3]), plain, 0.02)


@torch.inference_mode()
def test_layers_run_product_by_product_where_ranks_have_sequences_of_their_own():
    model = random_smallest("int4")
    plain = scores_of(PlainRunner(model), [1, 2, 3])
    model.team = dataclasses.replace(model.team, sequences=True)
    runner = TritonRunner(model, graphs=True)
    assert not runner.decodes_ahead and not runner.layers
    assert model.layers[1].mlp.experts.product is not None
    close(scores_of(runner, [1, 2, 3]), plain, 1e-5)


class SlowDevice:
    """A GPU with a clock of its own: what is asked of it is done one after the other, and takes its time."""

    def __init__(self):
        self.host = self.free = 0.0  # seconds on the CPU, and when the device has done all
        self.log = []

    def asks(self, what, seconds):
        self.free = max(self.free, self.host) + seconds
        self.log.append(what)
        return self.free

    def to_ram(self, **given):
        done = self.asks("copy", 1)

        def wait():
            self.host = max(self.host, done)
            self.log.append("wait")
            return given

        return wait

    def to_gpu(self, x):
        self.asks("back", 1)
        return x


@torch.inference_mode()
def test_experts_in_ram_are_computed_while_the_device_computes_the_shared_ones(monkeypatch):
    """The same numbers, and of 1 + 10 + 10 + 1 seconds only 1 + 10 + 1."""
    model = random_smallest("int4")
    plain = scores_of(PlainRunner(model), [1, 2, 3])
    runner = TritonRunner(model, graphs=True, apart=True, rounds=False)
    assert runner.layers and not runner.decodes_ahead
    close(scores_of(runner, [1, 2, 3]), plain, 1e-5)
    layer, device = runner.layers[1], SlowDevice()
    compute, shared = type(layer.experts).forward, gpu_experts.run

    def in_ram(self, *given):
        device.host += 10
        device.log.append("experts")
        return compute(self, *given)

    monkeypatch.setattr(type(layer.experts), "forward", in_ram)
    monkeypatch.setattr(gpu_experts, "run", lambda *given: (device.asks("shared", 10), shared(*given))[1])
    layer.copies = device
    layer.feed(random(2, model.config.hidden_size))
    assert device.log == ["copy", "shared", "wait", "experts", "back"]
    assert device.free == 12


@pytest.mark.skipif(DEVICE.type == "cpu", reason="interpreted, these would take an hour")
@pytest.mark.parametrize("folder", golden_folders(), ids=lambda folder: folder.name)
@torch.inference_mode()
def test_graphs_give_the_logits_and_the_text_of_the_official_code(folder):
    golden, model = load_file(folder / "golden.safetensors"), load_model(folder, DEVICE, torch.float32)
    if model.config.attention_bias:
        pytest.skip("the kernels know no attention_bias")
    model = TritonRunner(model, graphs=True)
    for prompt in "ABC":
        ids, row = golden[f"{prompt}.input_ids"].flatten().tolist(), Rows(model)
        one_by_one = torch.cat([row.decode([token])[0] for token in ids])
        torch.testing.assert_close(one_by_one.cpu(), golden[f"{prompt}.decode_logits"], rtol=0, atol=5e-4)
        assert answered(model, ids, Request(GREEDY, 32)).token_ids == golden[f"{prompt}.greedy_ids"].tolist()


@torch.inference_mode()
def test_generating_ahead_of_the_reader_gives_the_same_tokens_and_ends_where_it_should():
    def tokens(model):
        eos = frozenset([int(scores_of(model, [7, 8])[-1].argmax())])
        out = []
        for prompts, request in (
            ([[5, 6, 7]], Request(GREEDY, 4)),
            ([[7, 8], [9]], Request(GREEDY, 3, eos)),
            ([[7, 8]], Request(SamplingParams(temperature=0.7, top_k=5), 3, seed=3, logprobs=2)),
        ):
            scheduler = Scheduler(model, None, tokens=256)
            sequences = [Sequence(scheduler.books[0]) for _ in prompts]
            jobs = [Job(ids, request, after=each) for ids, each in zip(prompts, sequences, strict=True)]
            assert list(scheduler.in_order(jobs)) == jobs
            out.append([(job.result.token_ids, job.result.finish_reason) for job in jobs])
            # What is said to be in the pool is there: going on from it is going on from the text.
            again = prompts[0] + jobs[0].result.token_ids
            assert sequences[0].length == len(again) - 1
            if request.logprobs is None:
                after = Job(again, Request(GREEDY, 2), after=sequences[0])
                list(scheduler.stream(after))
                assert after.result.token_ids == answered(model, again, Request(GREEDY, 2)).token_ids
        return out

    plain, fast = both_ways(tokens, random_smallest())
    assert plain == fast
    assert fast[1][0] == (fast[1][0][0][:1], "stop") and len(fast[1][1][0]) == 3


@torch.inference_mode()
def test_a_batch_whose_rows_end_at_different_times_and_drafts_give_the_same_tokens():
    def tokens(model):
        jobs = [
            Job([5, 6, 7], Request(GREEDY, 3)),
            Job([9], Request(GREEDY, 1)),
            Job([3, 4], Request(GREEDY, 2)),
        ]
        batch = [job.result.token_ids for job in Scheduler(model, None, 2, 512).in_order(jobs)]
        return batch, answered(model, [1, 2, 3, 1, 2], Request(GREEDY, 3, speculate=True)).token_ids

    plain, fast = both_ways(tokens, random_smallest())
    assert plain == fast


def test_rows_are_sampled_from_the_distribution():
    """A chi-squared test at one in a thousand, and each row by its own seed."""
    torch.manual_seed(5)
    params, logits = SamplingParams(temperature=0.8, top_k=6), random(1, 12).expand(4000, 12)
    generators = [torch.Generator(DEVICE).manual_seed(seed) for seed in range(4000)]
    chosen = sample_rows(logits, params, generators)
    wanted = 4000 * distribution(logits[0], params)
    counts = chosen.bincount(minlength=12).float()
    possible = wanted > 0
    assert counts[~possible].sum() == 0
    assert ((counts - wanted)[possible].pow(2) / wanted[possible]).sum() < 20.5  # 5 degrees of freedom
    assert torch.equal(
        chosen[:3],
        sample_rows(logits[:3], params, [torch.Generator(DEVICE).manual_seed(seed) for seed in range(3)]),
    )


def test_the_command_line_runs_them_and_says_so(smallest):
    command = ("complete", "-m", str(smallest), *OPTIONS)
    fast, plain = (run_dsv2(*command, "--kernels", kernels) for kernels in ("triton", "off"))
    assert fast.returncode == 0, fast.stderr
    assert json.loads(fast.stdout)["token_ids"] == json.loads(plain.stdout)["token_ids"]
    shown = run_dsv2(*command, "--kernels", "triton-eager", "--dry-run")
    assert '"kernels": "triton"' in shown.stdout


def test_the_script_for_the_table_of_a_gpu_runs(monkeypatch, tmp_path):
    """On the CPU, with a tiny model and the plain path: what it writes, not how fast that is."""
    asked = "--device cpu --kernels off --formats bfloat16,int4 --batch 1,2 --context 16 --prefill 20"
    asked += " --generate 3 -r 1"
    words = [str(tmp_path / "table"), str(DATA / "golden" / "v2"), *asked.split()]
    monkeypatch.setattr(sys, "argv", ["gpu_table.py", *words, "--against", "transformers", "--profile"])
    gpu_table.main()
    runs = json.loads((tmp_path / "table.json").read_text())["runs"]
    measured = [
        (run["format"], run["engine"], run["batch"], run["prompt_tokens"]) for run in runs if "engine" in run
    ]
    ours = [
        (format, "dsv2", batch, tokens)
        for format in ("bfloat16", "int4")
        for batch, tokens in ((1, 16), (2, 16), (1, 20))
    ]
    assert sorted(measured) == sorted(
        [*ours, ("bfloat16", "transformers", 1, 16), ("bfloat16", "transformers", 1, 20)]
    )
    assert [run["profile"].keys() for run in runs if "profile" in run] == [{"prefill", "decode"}] * 4
    assert len((tmp_path / "table.md").read_text().splitlines()) == 4 + len(measured)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="there is a GPU")
def test_without_a_gpu_they_are_refused():
    model = str(DATA / "golden" / "v2")
    done = run_dsv2("complete", "-m", model, *OPTIONS, "--kernels", "triton", TRITON_INTERPRET="0")
    assert (done.returncode, "the model is on cpu" in done.stderr) == (2, True)
    assert (
        run_dsv2(
            "quantize", str(DATA / "golden" / "v2"), "out", "--to", "int8", "--kernels", "triton"
        ).returncode
        == 2
    )
