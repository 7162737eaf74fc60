"""Where a decode step's time goes: python tests/gpu_kernels.py OUT CONFIG FORMAT [BATCH [CONTEXT [apart]]]

Writes OUT.txt: a step's time, what it reads, and on a GPU each kernel's launches, mean and share by torch's
profiler. FORMAT is bfloat16, int8, int4 or int4-all. Weights are random, and so is what lies in the cache.
With `apart` all routed experts lie in RAM, which --experts cpu does only where a GPU has no room for them.
Without a GPU it is the CPU's time, and nothing is said of kernels; TRITON_INTERPRET=1 takes the GPU's road
there.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from dsv2cli.checkpoint.load import random_model
from dsv2cli.device import device_name, peak_memory_bytes, synchronize
from dsv2cli.engine.benchmark import Ours, read_bytes_per_token
from dsv2cli.formats import PACKED_BITS
from dsv2cli.kernels import native
from dsv2cli.model import size
from dsv2cli.model.config import DeepseekV2Config
from dsv2cli.model.step import Span
from dsv2cli.model.transformer import DeepseekV2
from dsv2cli.run.cpu import CppRunner
from dsv2cli.run.runner import PlainRunner

# Steps before it counts, rounds of which the median is taken, and steps of each.
TIMES = {"cuda": (3, 5, 20), "cpu": (1, 2, 1)}


def runner_of(model: DeepseekV2, device: torch.device, apart: bool) -> PlainRunner:
    """As the product chooses it, but that `apart` may be so on a GPU with room for all."""
    kernels = native.load()[0] if apart or device.type == "cpu" else None
    if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        from dsv2cli.run.gpu import TritonRunner  # needs triton

        return TritonRunner(model, graphs=not apart, apart=apart, kernels=kernels if apart else None)
    return PlainRunner(model) if kernels is None else CppRunner(model, kernels, apart=apart)


class Kernel(NamedTuple):
    """What the profiler saw of one, over some steps."""

    name: str
    launches: int
    microseconds: float  # of all


class Steps:
    """Sequences in a pool that holds numbers at random, and decode steps that go on from them."""

    def __init__(self, runner: PlainRunner, batch: int, context: int, room: int) -> None:
        self.runner, engine = runner, Ours(runner)
        engine.fill_at_random([[0] * context] * batch, room)
        self.pool, self.sequences = engine.scheduler.pool, engine.sequences
        self.ids = torch.zeros(batch, 1, dtype=torch.long, device=runner.device)

    def __call__(self, count: int) -> float:
        """Seconds a step, over so many."""
        synchronize(self.runner.device)
        began = time.perf_counter()
        for _ in range(count):
            spans = []
            for sequence in self.sequences:
                sequence.make_room(sequence.length + 1, lambda source, target: None)
                spans.append(Span(sequence.pages, sequence.length, 1))
                sequence.length += 1
            self.runner.decode(self.ids, spans, self.pool)
        synchronize(self.runner.device)
        return (time.perf_counter() - began) / count


def kernels_of(steps: Steps, count: int) -> list[Kernel]:
    """Those of so many steps."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        steps(count)
    return [Kernel(row.key, row.count, row.self_device_time_total) for row in seen.key_averages()]


def listed(kernels: list[Kernel], count: int) -> list[str]:
    """The same as lines, the longest first, by one of `count` steps."""
    total = sum(kernel.microseconds for kernel in kernels)
    if not total:
        return ["the profiler saw no kernels: may this user read the GPU's counters?"]
    out = [f"in kernels {total / count / 1000:.3f} ms a step"]
    for name, launches, microseconds in sorted(kernels, key=lambda kernel: -kernel.microseconds)[:40]:
        mean = f"{launches / count:7.1f} x {microseconds / launches:8.2f} us"
        out.append(f"{mean} {microseconds / total:6.1%}  {name[:90]}")
    return out


def read_lines(runner: PlainRunner, format: str, context: int, seconds: float) -> list[str]:
    """What a step of one sequence reads, and how fast that is."""
    read = read_bytes_per_token(runner, context)
    parts = size.parts(runner.config, format, "bfloat16")
    experts = sum(part.read_bytes for part in parts if part.name in ("routed experts", "shared experts"))
    return [
        f"reads {read / 1e9:.3f} GB a step, {read / seconds / 1e9:,.0f} GB/s",
        f"of these experts {experts / 1e9:.3f} GB: two thirds in few_up_kernel, one in few_down_kernel",
    ]


@torch.inference_mode()
def main() -> None:
    out, path, format, *more = sys.argv[1:]
    batch, context = int(more[0]) if more else 1, int(more[1]) if len(more) > 1 else 64
    apart = more[2:] == ["apart"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu", 0)
    packed = format if format in PACKED_BITS else None
    config = DeepseekV2Config.load(Path(path))
    model = random_model(config, device, torch.bfloat16, packed, experts_on_gpu=0 if apart else None)
    runner, (before, count, each) = runner_of(model, device, apart), TIMES[device.type]
    steps = Steps(runner, batch, context, before + (count + 1) * each)
    steps(before)
    rounds = [steps(each) for _ in range(count)]
    seconds = statistics.median(rounds)
    spread = f"{1000 * min(rounds):.3f} to {1000 * max(rounds):.3f}"
    what = f"{path} {format} batch {batch} context {context}{' apart' if apart else ''}"
    lines = [
        f"{device_name(device)}, torch {torch.__version__}, {type(runner).__name__}",
        f"{what}: {1000 * seconds:.3f} ms a step ({spread}), {batch / seconds:,.0f} tokens a second",
        f"peak memory {peak_memory_bytes(device) / 1e9:.1f} GB",
    ]
    if batch == 1 and not apart:
        lines += read_lines(runner, format, context, seconds)
    file = Path(f"{out}.txt")
    file.write_text("\n".join(lines) + "\n")
    if device.type == "cuda" and not apart:
        lines += listed(kernels_of(steps, each), each)
        file.write_text("\n".join(lines) + "\n")
    print("\n".join(lines[:25]))


if __name__ == "__main__":
    main()
