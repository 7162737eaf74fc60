"""Compile every Triton kernel that a function launches, for a GPU that need not be there, instead of
launching it.

Run as a program it compiles what a model's config needs, or what all tests and models do, and prints a table
of what each kernel takes: `python tests/compile_for_gpu.py --help`.

Instructions a weight are counted in the machine code: those of the loop that loads most, by the weights that
a thread multiplies in one turn of it: ROWS x CHUNK (twice that for gate and up) by the threads, times how
often ptxas unrolled the loop, which the loads in PTX and in machine code tell. Waves are programs by what 132
multiprocessors hold at once. Torch's own kernels are counted as operators: a sort is one, and takes several.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import torch
from machine_code import MULTIPROCESSORS, Resources, resident, resources
from shapes import (
    ATTENTIONS,
    DATA,
    EXPERTS,
    GPU_CODINGS,
    PRODUCTS,
    ROUTINGS,
    WIDE_ATTENTIONS,
    WIDE_PRODUCTS,
    smallest_config,
)
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from dsv2cli.checkpoint.blueprint import blueprint, make_places, weights_to_pack
from dsv2cli.formats import PAGE, Coding, own_coding
from dsv2cli.kernels.quantized import Quantized
from dsv2cli.kernels.triton import attention, experts, linear
from dsv2cli.kernels.triton.linear import table
from dsv2cli.model.config import DeepseekV2Config
from dsv2cli.model.pool import LatentPool
from dsv2cli.model.step import Span
from dsv2cli.run.gpu import TritonRunner

CPU = torch.device("cpu")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
GOLDEN = [DATA / "golden", DATA.parents[2] / "shared" / "golden"]
MATVECS = {"few_rows_kernel": 1, "few_up_kernel": 2, "few_down_kernel": 1}  # matrices
PREFILL = 256  # tokens
ONE_WIDE = (ROUTINGS[0], 32, 1, 1)


class NoDriver:
    """Answers what the compiler asks of a driver."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return CPU


@dataclass(frozen=True)
class Launch:
    """Of a kernel, or of one that does not compile, with why."""

    name: str
    constants: dict[str, int]
    programs: int
    kernel: object = None
    error: str = ""


LAUNCHED: list[Launch] = []


def compile_only(target: GPUTarget) -> None:
    """From now on launching a kernel compiles it; outputs stay as they were."""
    driver.set_active(NoDriver(target))
    attention.processors = lambda device: MULTIPROCESSORS
    launch, refused = JITFunction.run, {}

    def run(self, *arguments, grid, **options):
        name, programs, kernel, error = self.fn.__name__, math.prod(grid), None, ""
        key = (name, *map(specialised, arguments), *options.items())
        try:
            if key in refused:  # it takes as long each time
                raise refused[key]
            kernel = launch(self, *arguments, grid=grid, **options | {"warmup": True})
        except Exception as refusal:
            refused[key] = refusal
            # The last of the causes names the place in the kernel.
            chain = [refusal]
            while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
                chain.append(cause)
            error = " ".join(str(chain[-1]).split())[-200:] or repr(chain[-1])
        constants = {key: value for key, value in options.items() if isinstance(value, int)}
        LAUNCHED.append(Launch(name, constants, programs, kernel, error))
        return kernel

    JITFunction.run = run


def specialised(argument) -> object:
    """What of an argument the compiler sees."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0
    return type(argument)


class Counted(TorchDispatchMode):
    """Counts torch's own kernels, and leaves products undone, whose numbers nobody needs."""

    UNDONE = ("mm", "bmm", "addmm", "linear", "matmul", "scaled_dot_product_attention")
    FREE = ("empty", "empty_strided", "new_empty", "empty_like", "detach", "lift_fresh", "alias")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.count += not (func.is_view or name in self.FREE)
        if name not in self.UNDONE:
            return func(*args, **kwargs or {})
        if "out" in (kwargs or {}):
            return kwargs["out"]
        like = func(*(each.to("meta") if isinstance(each, torch.Tensor) else each for each in args))
        return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)


def shortened(config: DeepseekV2Config) -> DeepseekV2Config:
    """The config with two layers: one of each kind where it has both."""
    kinds = config.num_hidden_layers > config.first_k_dense_replace
    return dataclasses.replace(
        config,
        num_hidden_layers=2,
        first_k_dense_replace=min(1, config.first_k_dense_replace) if kinds else 2,
        moe_layer_freq=1,
    )


def model_of(config: DeepseekV2Config, kind: str, dtype: torch.dtype):
    """Without numbers: with weights in `dtype` for 16, in int8 or int4 for 8 or 4 (8-all or 4-all), in codes
    of a Coding, or of all codings in turn for `mixed`.
    """
    own = kind.partition("-")[0] in ("8", "4")
    model = blueprint(config, dtype, format=f"int{kind}" if own else None)
    if kind == "mixed":
        names = [name for name, _ in weights_to_pack(model, embedding=True)]
        make_places(model, dict(zip(names, itertools.cycle(GPU_CODINGS))))
    elif (coding := Coding.parse(kind)) is not None:
        make_places(model, {name: coding for name, _ in weights_to_pack(model)})
    return model.to_empty(device="cpu").requires_grad_(False)


@dataclass(frozen=True)
class Case:
    """What is compiled together: a model's steps of so many rows and a prefill, or what a test launches."""

    source: str  # a folder with a config, "smallest", or the name of one of UNITS
    kind: str = "16"
    dtype: str = "bf16"
    rows: tuple[int, ...] = ()
    prefill: bool = True
    cache: str = "auto"
    apart: bool = False
    tokens: int = 4096  # of the pool

    def __str__(self) -> str:
        more = [self.cache] * (self.cache != "auto") + ["apart"] * self.apart
        return " ".join([Path(self.source).name, self.kind, self.dtype, *more])


@dataclass(frozen=True)
class Row:
    """Of the table."""

    target: str
    name: str
    case: str
    rows: str
    warps: int
    programs: int
    taken: Resources | None
    a_weight: float  # instructions
    waves: float
    a_step: int  # launches
    error: str
    constants: dict[str, int]


@dataclass(frozen=True)
class Step:
    """How many launches a step of two layers takes, in all and by layers: of Triton, and of torch."""

    target: str
    case: str
    rows: str
    total: tuple[int, int]
    layers: list[tuple[int, int]]
    whole: tuple[int, int]  # of all the model's layers


def compile_case(case: Case, target: GPUTarget) -> tuple[list[Row], list[Step]]:
    """All that a case launches."""
    rows, steps = [], []
    for label, step in UNITS[case.source](case) if case.source in UNITS else compile_steps(case, target):
        if step is not None:
            steps.append(step)
        rows += rows_of(case, label, target)
        LAUNCHED.clear()
    return rows, steps


def rows_of(case: Case, label: str, target: GPUTarget) -> list[Row]:
    """What has been launched, each kernel and grid once."""
    alike = collections.defaultdict(list)
    for each in LAUNCHED:
        alike[each.kernel.hash if each.kernel else (each.name, each.error), each.programs].append(each)
    out = []
    for launches in alike.values():
        one = launches[0]
        taken = None if one.kernel is None else taken_by(one.kernel)
        warps = 0 if one.kernel is None else one.kernel.metadata.num_warps
        a_weight = waves = 0.0
        if taken is not None and target.backend == "cuda":
            waves = one.programs / MULTIPROCESSORS / resident(taken, warps, target.arch)
            if one.name in MATVECS:
                weights = one.constants["ROWS"] * one.constants["CHUNK"] * MATVECS[one.name]
                a_weight = taken.loop / (weights * taken.unrolled / (32 * warps))
        out.append(
            Row(
                name_of(target),
                one.name,
                str(case),
                label,
                warps,
                one.programs,
                taken,
                a_weight,
                waves,
                len(launches),
                one.error,
                one.constants,
            )
        )
    return out


TAKEN: dict[str, Resources] = {}


def taken_by(kernel) -> Resources:
    """As `resources`, each kernel once."""
    if kernel.hash not in TAKEN:
        TAKEN[kernel.hash] = resources(kernel)
    return TAKEN[kernel.hash]


def name_of(target: GPUTarget) -> str:
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


def compile_steps(case: Case, target: GPUTarget) -> Iterator[tuple[str, Step | None]]:
    """After each decode step, and after a prefill, its label: what was launched for it is in LAUNCHED."""
    smallest = case.source == "smallest"
    whole = DeepseekV2Config.from_dict(smallest_config()) if smallest else loaded(case.source)
    config = shortened(whole)
    model = model_of(config, case.kind, DTYPES[case.dtype])
    runner = TritonRunner(model, apart=case.apart, cache=case.cache)
    layers: list[tuple[int, int]] = []
    with torch.inference_mode(), Counted() as torchs:
        for layer in runner.layers:
            watch(layer, torchs, layers)
        pool = runner.new_pool(case.tokens)
        for rows in case.rows:
            ids, pages = torch.zeros(rows, 1, dtype=torch.long), case.tokens // PAGE
            step = runner.decode  # making it costs torch's kernels that no step does
            step(ids, [Span([i % pages], 0, 1) for i in range(rows)], pool)
            LAUNCHED.clear()
            layers.clear()
            torchs.count = 0
            step(ids, [Span([i % pages], 0, 1) for i in range(rows)], pool)
            total = (len(LAUNCHED), torchs.count)
            kinds = dict(zip(map(config.is_moe, range(2)), layers, strict=False))
            every = [kinds.get(whole.is_moe(i), (0, 0)) for i in range(whole.num_hidden_layers)]
            rest = [every, [total], [(-a, -b) for a, b in layers]]
            sums = tuple(sum(each) for each in zip(*itertools.chain(*rest), strict=True))
            yield str(rows), Step(name_of(target), str(case), str(rows), total, list(layers), sums)
        if case.prefill:
            count = min(PREFILL, case.tokens)
            pages = list(range(-(-count // PAGE)))
            runner(torch.zeros(count, dtype=torch.long), [Span(pages, 0, count, True)], pool)
            yield f"prefill {count}", None


def watch(layer, torchs: Counted, layers: list[tuple[int, int]]) -> None:
    """Write down how many launches each run of the layer takes."""
    attend, feed, start = layer.attend, layer.feed, [0, 0]

    def attends(*arguments):
        start[:] = len(LAUNCHED), torchs.count
        return attend(*arguments)

    def feeds(*arguments):
        out = feed(*arguments)
        layers.append((len(LAUNCHED) - start[0], torchs.count - start[1]))
        return out

    layer.attend, layer.feed = attends, feeds


def loaded(folder: str) -> DeepseekV2Config:
    return DeepseekV2Config.load(Path(folder))


def matrix(shape: tuple[int, ...], kind: str, dtype: torch.dtype, parts: int = 1):
    """As the tests' weights, without numbers."""
    if kind == "16":
        return torch.empty(shape, dtype=dtype)
    coding = own_coding(int(kind), 32 if kind == "4" else 64) if kind in ("8", "4") else Coding.parse(kind)
    return Quantized(shape, coding, parts, CPU)


def products(case: Case) -> Iterator[tuple[str, None]]:
    """test_a_product_equals_the_plain_one, and the same with codes of other programs."""
    own = case.kind in ("16", "8", "4")
    for shape, count in itertools.product(PRODUCTS + WIDE_PRODUCTS if own else [(19, 300)], case.rows):
        yield product(case, shape, count)


def product(case: Case, shape: tuple[int, int], count: int) -> tuple[str, None]:
    dtype = DTYPES[case.dtype]
    one, other = (table(matrix(shape, case.kind, dtype)) for _ in range(2))
    x, residual = torch.empty(count, shape[1], dtype=dtype), torch.empty(count, shape[0], dtype=dtype)
    linear.linear(x, one, other, norm=x[0].clone(), eps=1e-6)
    linear.linear(x, one, other)
    linear.linear(x, one, residual=residual)
    linear.linear(x, one)
    return f"{count} x {shape}", None


def routers(case: Case) -> Iterator[tuple[str, None]]:
    """test_the_router_chooses_as_the_plain_one"""
    for routing in ROUTINGS:
        router, norm = torch.empty(routing[0], 64), torch.empty(64)
        feed = experts.Feed(norm, 0.0, router, experts.Routing(*routing, 2.5), None, None, None, None)
        experts.route(torch.empty(40, 64), feed, int8=True)
        yield f"40 of {routing}", None


def mlps(case: Case) -> Iterator[tuple[str, None]]:
    """test_experts_equal_the_plain_ones, and one expert of a rank of a team."""
    for sizes, count in itertools.product([*EXPERTS, ONE_WIDE, (ROUTINGS[0], 32, 32, 0)], case.rows):
        yield mlp(case, sizes, count)


def mlp(case: Case, sizes: tuple, count: int) -> tuple[str, None]:
    (routing, hidden, width, shared), dtype = sizes, DTYPES[case.dtype]
    x, norm = torch.empty(count, hidden, dtype=dtype), torch.empty(hidden, dtype=dtype)
    router, own = torch.empty(routing[0], hidden), experts.Routing(*routing, 2.5)
    routed, extra = mlp_tables((routing[0],), hidden, width, case.kind, dtype), (None, None)
    if shared:
        extra = mlp_tables((), hidden, width * shared, case.kind, dtype)
        dense = experts.Feed(norm, 1e-6, None, experts.NO_ROUTING, None, None, *extra)
        experts.run(x, dense, x.clone())
    experts.run(x, experts.Feed(norm, 1e-6, router, own, *routed, *extra), x.clone())
    if case.kind != "16":
        for weight, parts in zip(routed, (2, 1), strict=True):
            experts.unpacked(weight, parts, dtype)
    for first, here in ((1, 1), (2, 3)):
        some = mlp_tables((here,), hidden, width, case.kind, dtype)
        experts.run(x, experts.Feed(norm, 1e-6, router, own, *some, None, None), x.clone(), first)
    return f"{count} x {hidden}, {routing[0]} x {width}, {shared} shared", None


def ones(case: Case) -> Iterator[tuple[str, None]]:
    """Where an argument is 1, which triton makes a constant: rows, a width, blocks, the first expert here."""
    yield product(case, (1, 7), 1)
    yield mlp(case, ONE_WIDE, 1)


def mlp_tables(stack: tuple[int, ...], hidden: int, width: int, kind: str, dtype: torch.dtype):
    """Of gate and up, and of down."""
    return (
        table(matrix((*stack, 2 * width, hidden), kind, dtype, 2)),
        table(matrix((*stack, hidden, width), kind, dtype)),
    )


def attentions(case: Case) -> Iterator[tuple[str, None]]:
    """test_attention_over_the_pool_equals_the_plain_one"""
    dtype = DTYPES[case.dtype]
    for sizes, count, pages in itertools.product(ATTENTIONS + WIDE_ATTENTIONS, case.rows, (1, 3)):
        heads, nope, rope, value, rank = sizes
        small = smallest_config() | {"kv_lora_rank": rank, "qk_rope_head_dim": rope}
        pool = LatentPool(DeepseekV2Config.from_dict(small), 9, [CPU], dtype, case.cache)
        both = torch.empty(count, heads * (nope + rope) + rank + rope, dtype=dtype)
        attention.attend(
            *both.split([heads * (nope + rope), rank + rope], dim=1),
            torch.empty(rank, dtype=dtype),
            torch.empty(heads * (nope + value), rank, dtype=dtype),
            torch.empty(count, 2, rope // 2),
            *torch.zeros(2, count, dtype=torch.int32).unbind(),
            torch.zeros(3, pages, dtype=torch.int32),
            pool.layers[0],
            attention.Shape(*sizes, 0.1),
            pool.bits,
        )
        yield f"{count} of {sizes}, {pages} pages", None


UNITS = {"products": products, "ones": ones, "routers": routers, "mlps": mlps, "attentions": attentions}


def every_case() -> Iterator[Case]:
    """What tests/test_gpu.py, the golden checkpoints and both families need."""
    codings = [*map(str, GPU_CODINGS)]
    yield Case("routers")
    for dtype in DTYPES:
        for kind in ("16", "8", "4", *(codings if dtype != "fp16" else [])):
            yield Case("products", kind, dtype, (1, 2, 5))
            if kind in ("16", "8", "4"):
                yield Case("mlps", kind, dtype, (1, 2, 9))
        for held in ("auto", "int8", "int6", "int4"):
            yield Case("attentions", "16", dtype, (1, 5, 9), cache=held)
        for kind in ("16", "8", "4", "4-all", "mixed"):
            yield Case("smallest", kind, dtype, (1, 2, 4, 8, 16))
        yield Case("smallest", "4", dtype, (1, 2, 9), apart=True)
        yield Case("smallest", "16", dtype, (1, 8), prefill=False, tokens=PAGE)
        for folder in golden_folders():
            yield Case(str(folder), "16", dtype, (1, 8, 64))
        for name in ("DeepSeek-V2-Lite", "DeepSeek-V2-Chat"):
            folder = str(DATA / "configs" / name)
            for kind in ("16", "8", "4", "4-all", *(codings if dtype == "bf16" else [])):
                many = (1, 2, 8, 64, 128) if kind in ("16", "8", "4") else (1, 64)
                yield Case(folder, kind, dtype, many)
            for held in ("int8", "int6", "int4"):
                yield Case(folder, "16", dtype, (1, 8, 64), prefill=False, cache=held)
            yield Case(folder, "4", dtype, (1, 9), apart=True)


def a_sample() -> Iterator[Case]:
    """Of `every_case`, what takes a minute: what tests/test_compile.py holds to."""
    lite, chat = (str(DATA / "configs" / name) for name in ("DeepSeek-V2-Lite", "DeepSeek-V2-Chat"))
    for kind, rows in (("16", (1,)), ("8", (1,)), ("4", (1, 64))):
        yield Case(lite, kind, "bf16", rows, prefill=False)
    yield Case(lite, "4", "fp16", (1,), prefill=False)
    yield Case(chat, "8", "bf16", (1,), prefill=False)
    yield Case("smallest", "4", "bf16", (1,), prefill=False)
    for kind in ("16", "4"):
        yield Case("ones", kind)


def golden_folders() -> list[Path]:
    """But those whose attention has a bias, which the kernels do not know."""
    found = {path.parent.name: path.parent for folder in GOLDEN for path in folder.glob("*/config.json")}
    return [path for path in found.values() if not DeepseekV2Config.load(path).attention_bias]


def work(job: tuple[Case, GPUTarget]) -> tuple[list[Row], list[Step]]:
    """One job of a process of its own."""
    case, target = job
    begin(target)
    started = time.monotonic()
    try:
        found = compile_case(case, target)
    except Exception:
        why = traceback.format_exc()
        found = [Row(name_of(target), "?", str(case), "", 0, 0, None, 0, 0, 0, why, {})], []
    print(f"{name_of(target)} {case}: {time.monotonic() - started:.1f} s", file=sys.stderr)
    return found


@cache
def begin(target: GPUTarget) -> None:
    """Once for a process, which has one target."""
    compile_only(target)


def distinct(rows: list[Row]) -> list[Row]:
    """Each kernel's machine code and grid once, with how many more cases have it."""
    alike = collections.defaultdict(list)
    for row in rows:
        alike[row.target, row.name, row.error, row.programs, row.taken, *row.constants.items()].append(row)
    more = {key: len(found) - 1 for key, found in alike.items()}
    return [
        dataclasses.replace(found[0], case=found[0].case + f" (+{more[key]})" * (more[key] > 0))
        for key, found in alike.items()
    ]


def markdown(rows: list[Row], steps: list[Step]) -> str:
    """The table, what does not compile, and launches."""
    lines = [
        "| target | kernel | from | rows | warps | registers | stack | shared | instructions a weight "
        "| loads, LDGSTS in the loop | programs | waves | launches a step |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in distinct(rows):
        if (taken := row.taken) is not None:
            loop = (f"{row.a_weight:.1f}", f"{taken.loads}, {taken.copies}") if row.a_weight else ("", "")
            waves = f"{row.waves:.2f}" if row.waves else ""
            cells = [row.target, row.name.removesuffix("_kernel"), row.case, row.rows, row.warps]
            cells += [taken.registers, taken.stack, taken.shared, *loop, row.programs, waves, row.a_step]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    if steps:
        lines += ["", "| target | from | rows | launches of Triton (and torch) a layer | a whole step |"]
        lines.append("|---|---|---|---|---|")
    for step in steps:
        layers = ", ".join(f"{triton} ({torchs})" for triton, torchs in step.layers)
        whole = f"{step.whole[0]} ({step.whole[1]})"
        lines.append(f"| {step.target} | {step.case} | {step.rows} | {layers} | {whole} |")
    if broken := [row for row in distinct(rows) if row.error]:
        lines += ["", "Does not compile:", ""]
        lines += [f"- {row.target} {row.name}, {row.case}, {row.rows}: {row.error}" for row in broken]
    return "\n".join(lines)


def targets_of(words: argparse.Namespace) -> list[GPUTarget]:
    out = [GPUTarget("cuda", int(each), 32) for each in words.capability.split(",") if each]
    return out + [GPUTarget("hip", "gfx942", 64)] * words.gfx942


def main() -> int:
    """Returns 1 where something does not compile for NVIDIA, or spills in 16 bits."""
    parser = argparse.ArgumentParser(description="What each Triton kernel takes, compiled with no GPU.")
    parser.add_argument("config", nargs="?", help="a folder with a config.json")
    parser.add_argument("kind", nargs="?", default="16", help='16, 8, 4 or a Coding: "4 32 plain F16 added"')
    parser.add_argument("capability_", nargs="?", metavar="capability", help="as --capability")
    parser.add_argument("--all", action="store_true", help="every shape of tests and models: takes an hour")
    parser.add_argument("--sample", action="store_true", help="of --all what takes a minute")
    parser.add_argument("--capability", default="90", help="of NVIDIA: 80,90,100 (default 90)")
    parser.add_argument("--gfx942", action="store_true", help="for AMD's, too: untested")
    parser.add_argument("--only", default="", help="of --all those cases whose name has this in it")
    parser.add_argument("--json", action="store_true", help="instead of Markdown")
    parser.add_argument("-j", type=int, default=1, help="processes")
    words = parser.parse_args()
    words.capability = words.capability_ or words.capability
    if words.config:
        cases = [Case(words.config, words.kind, "bf16", (1, 64))]
    else:
        cases = [case for case in (every_case() if words.all else a_sample()) if words.only in str(case)]
    rows, steps = [], []
    spawn = multiprocessing.get_context("spawn")
    for target in targets_of(words):
        jobs = [(case, target) for case in cases]
        if words.j == 1 and len(targets_of(words)) == 1:
            found = map(work, jobs)
        else:
            with spawn.Pool(words.j) as pool:
                found = pool.map(work, jobs, chunksize=1)
        for some_rows, some_steps in found:
            rows += some_rows
            steps += some_steps
    if words.json:
        found = {"rows": rows, "steps": steps}
        print(json.dumps({name: [*map(dataclasses.asdict, each)] for name, each in found.items()}))
    else:
        print(markdown(rows, steps))
    bad = [row for row in rows if row.target.startswith("sm_")]
    bad = [row for row in bad if row.error or (row.taken and row.taken.stack and "fp32" not in row.case)]
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
