"""How fast the model runs here: prefill, decode, first token, memory; and the same work
through transformers.
"""

from __future__ import annotations

import inspect
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv2cli.checkpoint.blueprint import state_of
from dsv2cli.checkpoint.names import destinations
from dsv2cli.device import synchronize
from dsv2cli.engine.pages import Sequence
from dsv2cli.engine.request import Request, SamplingParams
from dsv2cli.engine.scheduler import Job, Scheduler
from dsv2cli.errors import Dsv2Error
from dsv2cli.formats import PAGE
from dsv2cli.kernels.linear import linear
from dsv2cli.kernels.native import Kernels
from dsv2cli.model import size
from dsv2cli.model.step import Watch, unwatched
from dsv2cli.run.runner import Runner

READ_BYTES = {"cpu": 2**28, "cuda": 2**31}  # far more than a cache holds, and long enough to be measured
GEMM_SIZE = {"cpu": 1024, "cuda": 8192}
GREEDY = Request(SamplingParams(temperature=0.0))


@dataclass(frozen=True)
class Work:
    """What is measured: `batch` prompts of `prompt` tokens after `depth` tokens that are in the cache
    already.
    """

    prompt: int
    generate: int
    depth: int = 0
    batch: int = 1
    separate: bool = False  # whether decode, too, begins after `depth` tokens, not after the prompt

    @property
    def context(self) -> int:
        """Tokens in the cache halfway through the decode."""
        return int(self.depth + (0 if self.separate else self.prompt) + self.generate / 2)

    def as_json(self) -> dict[str, Any]:
        lengths = {
            "prompt_tokens": self.prompt,
            "generated_tokens": self.generate,
            "depth": self.depth,
            "batch": self.batch,
        }
        return lengths | ({"separate": True} if self.separate else {})


@dataclass
class Timing:
    """One configuration, measured over several repetitions; every list has one entry a repetition."""

    engine: str
    work: Work
    prefill_tokens_per_second: list[float] = field(default_factory=list)
    decode_tokens_per_second: list[float] = field(default_factory=list)
    ttft_seconds: list[float] = field(default_factory=list)
    gaps: list[list[float]] = field(default_factory=list)  # seconds between one token and the next
    # What the machine gave just before each repetition: a shared one changes by the minute.
    read_bytes_per_second: list[float] = field(default_factory=list)
    gemm_flops_per_second: list[float] = field(default_factory=list)

    def add(self, first: float, gaps: list[float]) -> None:
        self.ttft_seconds.append(first)
        self.prefill_tokens_per_second.append(self.work.batch * self.work.prompt / first)
        self.decode_tokens_per_second.append(self.work.batch * len(gaps) / sum(gaps))
        self.gaps.append(gaps)

    def add_rates(self, prefill: float, decode: float) -> None:
        """The same of a program that tells tokens a second, and no time between two of them."""
        self.ttft_seconds.append(self.work.prompt / prefill)
        self.prefill_tokens_per_second.append(prefill)
        self.decode_tokens_per_second.append(decode)

    def itl_seconds(self) -> dict[str, float | None]:
        """Percentiles of the time between tokens, over all repetitions; None where nobody told it."""
        if not self.gaps:
            return {"p50": None, "p90": None, "p99": None}
        return {**percentiles([gap for gaps in self.gaps for gap in gaps])}

    def as_json(self) -> dict[str, Any]:
        lists = (
            "prefill_tokens_per_second",
            "decode_tokens_per_second",
            "ttft_seconds",
            "read_bytes_per_second",
            "gemm_flops_per_second",
        )
        spreads = {name: spread(getattr(self, name)) | {"all": getattr(self, name)} for name in lists}
        return {"engine": self.engine} | self.work.as_json() | spreads | {"itl_seconds": self.itl_seconds()}


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def percentiles(values: list[float]) -> dict[str, float]:
    """The 50th, 90th and 99th of some values."""
    ordered = sorted(values)
    return {
        f"p{percent}": ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]
        for percent in (50, 90, 99)
    }


def read_bytes_per_token(runner: Runner, context: int) -> float:
    """Bytes of weights and cache that one token at batch 1 needs, each read once; the embedding gives one
    row.
    """
    config = runner.config
    total = float(runner.new_pool(1).bytes_per_token() * context)
    for name, tensor in state_of(runner.model).items():
        used = 1.0
        if ".mlp.experts." in name:
            used = (config.num_experts_per_tok or 0) / (config.n_routed_experts or 1)
        if name.startswith("model.embed_tokens.") and not config.tie_word_embeddings:
            used = 1 / config.vocab_size
        total += used * tensor.numel() * tensor.element_size()
    return total - runner.saved_bytes


def prefill_flops_per_token(runner: Runner) -> int:
    """Multiplications and additions with weights; the head runs for the last token only, attention scores are
    left out.
    """
    return 2 * sum(part.read for part in size.parts(runner.config) if part.name not in ("embedding", "head"))


class Machine:
    """Two ceilings, measured beside the model: reading memory with all threads, and
    torch's matrix product.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, kernels: Kernels | None) -> None:
        self.device, self.kernels = device, kernels
        self.data = torch.ones(READ_BYTES[device.type] // 4, dtype=torch.float32, device=device)
        # A GPU draws less power, and so runs faster, where all numbers are alike.
        size = (GEMM_SIZE[device.type],) * 2
        self.square = torch.randn(size, device=device).to(dtype)

    def seconds(self, work: Callable[[], object]) -> float:
        """On a GPU by its own clock, the median of ten: a launch alone takes a good part of the rest."""
        if self.device.type == "cuda":
            return statistics.median(self.on_the_gpu(work) for _ in range(10))
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    def on_the_gpu(self, work: Callable[[], object]) -> float:
        """Seconds between two events around it."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(self.device):
            begin.record()
            work()
            end.record()
            end.synchronize()
        return begin.elapsed_time(end) / 1000

    def read_bytes_per_second(self) -> float:
        """The C++ kernels read RAM alone, though they may be there for experts that lie in it."""
        kernels = self.kernels if self.device.type == "cpu" else None
        return self.data.nbytes / self.seconds(
            lambda: self.data.sum() if kernels is None else kernels.read(self.data)
        )

    def gemm_flops_per_second(self) -> float:
        return 2 * self.square.shape[0] ** 3 / self.seconds(lambda: linear(self.square, self.square))


def random_prompts(runner: Runner, batch: int, length: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(runner.config.vocab_size, (batch, length), generator=generator)
    return ids.tolist()  # type: ignore[no-any-return]


class Ours:
    """This program's own prefill and decode. Greedy, EOS ignored."""

    name = "dsv2"

    def __init__(self, runner: Runner, watch: Watch = unwatched) -> None:
        self.runner, self.watch = runner, watch
        self.before: list[list[int]] = []  # what comes before the prompts
        self.sequences: list[Sequence] = []

    def fill(self, prompts: list[list[int]], room: int) -> None:
        """Put what comes before the prompts into a new pool with room for so many tokens a row."""
        tokens = len(prompts) * (room + PAGE)
        self.scheduler = Scheduler(self.runner, None, len(prompts), tokens, self.watch)
        self.before = prompts
        ranks = [i * self.runner.ranks // len(prompts) for i in range(len(prompts))]
        self.sequences = [Sequence(self.scheduler.books[rank], rank) for rank in ranks]
        if prompts[0]:
            self.run(prompts, 1)

    def fill_at_random(self, prompts: list[list[int]], room: int) -> None:
        """The same without reading them: the pool holds numbers at random in their place."""
        self.fill([[] for _ in prompts], len(prompts[0]) + room)
        self.before, pool = prompts, self.scheduler.pool
        for block in pool.blocks:
            if block.is_floating_point():
                block.normal_()
            else:
                block.random_(0, 64)  # no scale among its bytes is large, or no number
        for ids, sequence in zip(prompts, self.sequences, strict=True):
            sequence.make_room(len(ids), lambda source, target: None)
            sequence.length = len(ids)

    def run(self, prompts: list[list[int]], count: int) -> tuple[list[list[int]], list[float]]:
        """`count` tokens after each prompt, which goes on from what is in the pool; and when each came."""
        request = Request(GREEDY.sampling, count)
        jobs = [Job(ids, request, after=each) for ids, each in zip(prompts, self.sequences, strict=True)]
        for job in jobs:
            self.scheduler.submit(job)
        times = list[float]()
        while self.scheduler.busy:
            if self.scheduler.step():
                times.append(time.perf_counter())
        return [job.result.token_ids for job in jobs], times

    def measure(self, prompts: list[list[int]], generate: int) -> tuple[float, list[float]]:
        """Seconds to the first token of all, and between the tokens from there on; the pool is then as it
        was.
        """
        prompts = [before + ids for before, ids in zip(self.before, prompts, strict=True)]
        synchronize(self.runner.device)
        began = time.perf_counter()
        first, times = self.run(prompts, 1)
        prompts = [ids + one for ids, one in zip(prompts, first, strict=True)]
        later = self.run(prompts, generate - 1)[1] if generate > 1 else []
        for before, sequence in zip(self.before, self.sequences, strict=True):
            sequence.truncate(len(before))
        return times[-1] - began, [b - a for a, b in itertools.pairwise([times[-1], *later])]


class Theirs:
    """The same work through transformers' own forward and cache, in one prefill and greedy steps."""

    name = "transformers"

    def __init__(self, twin: Any) -> None:
        self.twin, self.cache = twin, None
        # transformers 5.2x renamed its argument and warns about the old name.
        self.argument = (
            "cache" if "cache" in inspect.signature(type(twin).forward).parameters else "past_key_values"
        )

    @torch.inference_mode()
    def fill(self, prompts: list[list[int]], room: int) -> None:
        self.cache = None
        if prompts[0]:
            _, self.cache = self.step(self.tensor(prompts), None)

    def step(self, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """ids [batch, seq] -> the likeliest next ones [batch, 1], and the cache"""
        out = self.twin(input_ids=ids, use_cache=True, logits_to_keep=1, **{self.argument: cache})
        return out.logits[:, -1].argmax(-1, keepdim=True), getattr(out, self.argument)

    def tensor(self, ids: list[list[int]]) -> Tensor:
        """ids -> [batch, seq], where the twin is"""
        return torch.tensor(ids, device=self.twin.device)

    @torch.inference_mode()
    def measure(self, prompts: list[list[int]], generate: int) -> tuple[float, list[float]]:
        cache, new = self.cache, self.tensor(prompts)
        synchronize(self.twin.device)
        times = [time.perf_counter()]
        for _ in range(generate):
            new, cache = self.step(new, cache)
            new.tolist()  # as a program that shows them would
            times.append(time.perf_counter())
        if self.cache is not None:
            self.cache.crop(-(len(prompts[0]) + generate - 1))
        return times[1] - times[0], [b - a for a, b in itertools.pairwise(times[1:])]


def transformers_twin(runner: Runner, folder: Path) -> Any:
    """transformers' DeepseekV2 over the very same tensors, so that both fit into memory and read the same
    bytes.

    Raises Dsv2Error where it builds another model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        twin = AutoModelForCausalLM.from_config(config, dtype=runner.dtype)
    ours: dict[str, Tensor] = dict(runner.model.named_parameters()) | destinations(runner.model)
    ours["lm_head.weight"] = runner.model.lm_head.weight
    state = {}
    for name, parameter in twin.named_parameters(remove_duplicate=False):
        if name not in ours or ours[name].shape != parameter.shape:
            raise Dsv2Error(
                "transformers builds another model from this config", why=f"its {name} has no match here"
            )
        state[name] = ours[name].detach().to(parameter.dtype)
    twin.load_state_dict(state, assign=True, strict=True)
    twin.model.rotary_emb = type(twin.model.rotary_emb)(config).to(runner.device)  # its buffers were on meta
    return twin.eval()


def refuse_longer(runner: Runner, prompt: int, generate: int, fix: str) -> None:
    """Raises Dsv2Error for a prompt and tokens after it that do not fit into the context."""
    context = runner.config.max_position_embeddings
    if prompt + generate > context:
        why = f"this model's context holds {context}"
        raise Dsv2Error(f"{prompt} + {generate} tokens do not fit", why=why, fix=fix)


def refuse_long_work(runner: Runner, work: Work) -> None:
    """The same for what is measured."""
    fix = "dsv2 bench --prompt N --generate M --depth D with a smaller sum"
    refuse_longer(runner, work.depth + work.prompt, work.generate, fix)


def measure_in_turn(
    runner: Runner,
    work: Work,
    repetitions: int,
    twin: Any = None,
    tick: Callable[[], None] = lambda: None,
    kernels: Kernels | None = None,
    at_random: bool = False,
) -> list[Timing]:
    """Warm up once, then measure; with a twin the two alternate A B A B, so that both see
    the same machine. `at_random`: what lies in the cache before the prompts is not read, but drawn.

    Raises Dsv2Error where the work does not fit into the context.
    """
    refuse_long_work(runner, work)
    engines: list[Ours | Theirs] = [Ours(runner), *([Theirs(twin)] if twin is not None else [])]
    timings = [Timing(engine.name, work) for engine in engines]
    for engine in engines:
        fill = engine.fill_at_random if at_random and isinstance(engine, Ours) else engine.fill
        fill(
            random_prompts(runner, work.batch, work.depth, seed=repetitions + 1),
            work.depth + work.prompt + work.generate,
        )
    machine = Machine(runner.device, runner.dtype, kernels)
    for repetition in range(-1, repetitions):
        reading, multiplying = machine.read_bytes_per_second(), machine.gemm_flops_per_second()
        prompts = random_prompts(runner, work.batch, work.prompt, seed=repetition + 1)
        for engine, timing in zip(engines, timings, strict=True):
            seconds = engine.measure(prompts, work.generate if repetition >= 0 else 2)
            if repetition >= 0:
                timing.add(*seconds)
                timing.read_bytes_per_second.append(reading)
                timing.gemm_flops_per_second.append(multiplying)
            tick()
    return timings


class Stopwatch:
    """Seconds by name."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    def time(self, name: str, work: Callable[[], Tensor]) -> Tensor:
        synchronize(self.device)
        began = time.perf_counter()
        out = work()
        synchronize(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
        return out


@torch.inference_mode()
def profile(runner: Runner, work: Work) -> dict[str, dict[str, float]]:
    """Seconds by part, for the prefill and for one decode step on average.

    Waiting for the device after each part costs some.
    """
    watch = Stopwatch(runner.device)
    engine, out = Ours(runner, watch.time), {}
    engine.fill(
        random_prompts(runner, work.batch, work.depth, seed=1), work.depth + work.prompt + work.generate
    )
    prompts = random_prompts(runner, work.batch, work.prompt, seed=2)
    prompts = [before + ids for before, ids in zip(engine.before, prompts, strict=True)]
    for phase, count in (("prefill", 1), ("decode", work.generate)):
        watch.seconds = {}
        synchronize(runner.device)
        began = time.perf_counter()
        new, _ = engine.run(prompts, count)
        synchronize(runner.device)
        prompts = [ids + more for ids, more in zip(prompts, new, strict=True)]
        watch.seconds["the rest"] = time.perf_counter() - began - sum(watch.seconds.values())
        out[phase] = {name: seconds / count for name, seconds in watch.seconds.items()}
    return out


LISTS = ("prefill_tokens_per_second", "decode_tokens_per_second", "output_tokens_per_second")
WORK = ("engine", "prompt_tokens", "generated_tokens", "cache", "depth", "batch", "separate")
TRAFFIC = ("concurrency", "requests", "rate", "shared_prefix")  # of a run under load besides


def work_of(run: dict[str, Any]) -> dict[str, Any]:
    """What was done in a run, by which it is known again."""
    return {"cache": "auto"} | {key: run[key] for key in (*WORK, *TRAFFIC) if key in run}


def compare(now: list[dict[str, Any]], then: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each run of today beside the same work of a saved one.

    A rate differs where it does so by more than both ranges together.
    """
    out = []
    for run in now:
        before = next((old for old in then if work_of(old) == work_of(run)), None)
        if before is None:
            continue
        found = work_of(run)
        for name in (name for name in LISTS if name in run):
            a, b = run[name], before[name]
            known = min(len(a["all"]), len(b["all"])) > 1
            ratio, noise = (
                a["median"] / b["median"],
                sum((rate["max"] - rate["min"]) / rate["median"] for rate in (a, b)),
            )
            verdict = "same" if abs(ratio - 1) <= noise else "faster" if ratio > 1 else "slower"
            found[name] = {"ratio": ratio, "spread": noise, "verdict": verdict if known else "unknown"}
        found["memory_ratio"] = (
            run["read_bytes_per_second"]["median"] / before["read_bytes_per_second"]["median"]
        )
        out.append(found)
    return out
