"""How a model does when many ask at once: requests that arrive, wait, are answered side by side and leave."""

from __future__ import annotations

import functools
import itertools
import random
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from dsv2cli.engine.benchmark import GREEDY, Machine, percentiles, random_prompts, refuse_longer, spread
from dsv2cli.engine.request import Request
from dsv2cli.engine.scheduler import Job, Scheduler
from dsv2cli.kernels.native import Kernels
from dsv2cli.run.runner import Runner


@dataclass(frozen=True)
class Traffic:
    """What is asked of a model. At most `concurrency` requests run at once, the others wait.

    They arrive at random moments, `rate` a second on average, or without it each when another has ended.
    The first `shared` (0 to 1) of every prompt is the same.
    """

    concurrency: int
    prompt: int
    generate: int
    requests: int
    rate: float | None = None
    shared: float = 0.0

    def as_json(self) -> dict[str, Any]:
        return {
            "concurrency": self.concurrency,
            "prompt_tokens": self.prompt,
            "generated_tokens": self.generate,
            "requests": self.requests,
            "rate": self.rate,
            "shared_prefix": self.shared,
        }

    def prompts(self, runner: Runner, seed: int) -> list[list[int]]:
        """One a request, of random tokens."""
        common = round(self.shared * self.prompt)
        (beginning,) = random_prompts(runner, 1, common, seed)
        rests = random_prompts(runner, self.requests, self.prompt - common, seed + 1_000_003)
        return [beginning + rest for rest in rests]

    def arrivals(self, seed: int) -> list[float]:
        """When each request comes, in seconds from the first."""
        if self.rate is None:
            return [0.0] * self.requests
        numbers = random.Random(seed)
        gaps = [numbers.expovariate(self.rate) for _ in range(self.requests - 1)]
        return list(itertools.accumulate(gaps, initial=0.0))


@dataclass
class Served:
    """A request: when it arrived, and when each of its tokens came."""

    arrived: float
    times: list[float] = field(default_factory=list)

    @property
    def first(self) -> float:
        """Seconds to the first token, waiting included."""
        return self.times[0] - self.arrived

    @property
    def gaps(self) -> list[float]:
        return [b - a for a, b in itertools.pairwise(self.times)]


@dataclass
class Run:
    """All requests of one repetition."""

    served: list[Served]
    seconds: float  # from the first arrival to the last token
    generated_tokens: int
    prompt_tokens: int
    reused_tokens: int | None  # of them, that were found in the pool
    # None where only the server knows: pages held at the same time, at most; pages that the pool has; times
    # that a request had to leave its pages to others
    pages: int | None = None
    all_pages: int | None = None
    preempted: int | None = None


def drive(runner: Runner, traffic: Traffic, seed: int) -> Run:
    """Answer all requests, in a pool that is empty at first. EOS is ignored.

    Raises Dsv2Error where one can not be answered.
    """
    scheduler = Scheduler(runner, None, traffic.concurrency)
    request = Request(GREEDY.sampling, traffic.generate)
    jobs = [Job(ids, request) for ids in traffic.prompts(runner, seed)]
    coming, pages = deque(zip(jobs, traffic.arrivals(seed), strict=True)), 0
    began = time.perf_counter()
    served = {id(job): Served(began + at) for job, at in coming}
    running = list[Job]()
    while coming or running:
        now = time.perf_counter()
        while coming and len(running) < traffic.concurrency and began + coming[0][1] <= now:
            job, _ = coming.popleft()
            if traffic.rate is None:
                served[id(job)].arrived = now
            running.append(job)
            scheduler.submit(job)
        if not running:
            time.sleep(max(0.0, began + coming[0][1] - time.perf_counter()))
            continue
        news = scheduler.step()
        now = time.perf_counter()
        for each in news:
            if each.token is not None:
                served[id(each.job)].times.append(now)
        pages = max(pages, sum(book.held for book in scheduler.books))
        for job in running:
            if job.failure is not None:
                raise job.failure
        running = [job for job in running if not job.ended]
    return Run(
        list(served.values()),
        time.perf_counter() - began,
        sum(len(job.result.tokens) for job in jobs),
        sum(len(job.prompt_ids) for job in jobs),
        sum(job.result.reused_tokens for job in jobs),
        pages,
        sum(book.count for book in scheduler.books),
        scheduler.preempted,
    )


def measure(
    runner: Runner,
    traffic: Traffic,
    repetitions: int,
    tick: Callable[[], None] = lambda: None,
    kernels: Kernels | None = None,
) -> dict[str, Any]:
    """Warm up with a few tokens, then measure; every repetition has other prompts, and a pool of its own.

    Raises Dsv2Error where a request does not fit into the context, or can not be answered.
    """
    refuse_longer(runner, traffic.prompt, traffic.generate, "a smaller --prompt or --generate")
    machine = Machine(runner.device, runner.dtype, kernels)
    driving = functools.partial(drive, runner)
    return measure_driven(driving, traffic, repetitions, tick, machine.read_bytes_per_second)


def measure_driven(
    drive: Callable[[Traffic, int], Run],
    traffic: Traffic,
    repetitions: int,
    tick: Callable[[], None] = lambda: None,
    reading: Callable[[], float] | None = None,
) -> dict[str, Any]:
    """The same of whatever answers when it is driven, with a seed; `reading` measures how fast this machine
    reads memory.
    """
    width = min(traffic.concurrency, traffic.requests)
    drive(Traffic(width, min(traffic.prompt, 64), 2, width), repetitions)
    tick()
    runs, read = list[Run](), list[float]()
    for repetition in range(repetitions):
        if reading is not None:
            read.append(reading())
        runs.append(drive(traffic, repetition))
        tick()
    rates = {
        "output_tokens_per_second": [run.generated_tokens / run.seconds for run in runs],
        "total_tokens_per_second": [(run.generated_tokens + run.prompt_tokens) / run.seconds for run in runs],
        "requests_per_second": [len(run.served) / run.seconds for run in runs],
    } | ({"read_bytes_per_second": read} if read else {})
    served = [each for run in runs for each in run.served]
    reused = [run.reused_tokens for run in runs]
    known = [each for each in reused if each is not None]
    prompts = sum(run.prompt_tokens for run in runs)
    return (
        {"engine": "dsv2"}
        | traffic.as_json()
        | {name: spread(values) | {"all": values} for name, values in rates.items()}
        | {
            "ttft_seconds": percentiles([each.first for each in served]),
            "itl_seconds": percentiles([gap for each in served for gap in each.gaps]),
            "hit_rate": sum(known) / prompts if prompts and len(known) == len(runs) else None,
            "pages_used": most(run.pages for run in runs),
            "pages": runs[0].all_pages,
            "preempted": most(run.preempted for run in runs),
        }
    )


def most(counts: Iterable[int | None]) -> int | None:
    """The largest, where they are known."""
    return max((each for each in counts if each is not None), default=None)
