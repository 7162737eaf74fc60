"""Measure a model on a GPU over batch sizes, contexts and formats, and write one JSON and one Markdown file.

    python tests/gpu_table.py OUT CONFIG [--formats bfloat16,int8,int4] [--batch 1,8,32,128]
                              [--context 64,4096,32768]
                              [--prefill 4096] [--generate 64] [-r 3] [--against transformers] [--device cuda]

Weights are random, made on the device from CONFIG alone, and so is what lies in the cache before a prompt.
Every row's ceilings (reading memory, torch's matrix product) are measured just before it. What does not fit
into the memory is a row that says so. For instance:

    python tests/gpu_table.py v2-lite tests/data/configs/DeepSeek-V2-Lite --against transformers
    python tests/gpu_table.py v2 tests/data/configs/DeepSeek-V2-Chat --formats int4
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dsv2cli.cli import options as opt
from dsv2cli.cli.bench import shares
from dsv2cli.cli.figures import numbers, ranged
from dsv2cli.device import device_name, gpu_memories, peak_memory_bytes
from dsv2cli.engine import benchmark
from dsv2cli.errors import Dsv2Error
from dsv2cli.formats import PACKED_BITS
from dsv2cli.model import size
from dsv2cli.model.config import DeepseekV2Config
from dsv2cli.run.open import Opened, kernels_of
from dsv2cli.run.wish import Wish

TRIED = 0.97  # of the memory: what weights and cache may take, so that a row is tried
Row = dict[str, Any]


def works(options: argparse.Namespace) -> Iterator[benchmark.Work]:
    for context in numbers("--context", options.context, 1):
        for batch in numbers("--batch", options.batch, 1):
            prompt = min(64, context)
            yield benchmark.Work(prompt, options.generate, context - prompt, batch)
    for length in numbers("--prefill", options.prefill, 1):
        yield benchmark.Work(length, 2)


def measure(options: argparse.Namespace, format: str) -> Iterator[Row]:
    """Rows for each piece of work, or one that says why there are none."""
    facts: Row = {"format": format, "kernels": options.kernels}
    models: list[Opened] = []
    if why := attempt(lambda: models.append(open_model(options, format))):
        yield from (facts | work.as_json() | {"left_out": why} for work in works(options))
        return
    (opened,) = models
    facts["kernels"], device = opened.plan.kernels_name, opened.runner.device
    memory = gpu_memories()[device.index or 0] if device.type == "cuda" else None
    twin = None
    if options.against and format not in PACKED_BITS:
        twin = benchmark.transformers_twin(opened.runner, opened.folder)
    for work in works(options):
        rows: list[Row] = []
        timings = measured(options, opened, twin, work)
        why = too_large(opened.config, format, work, memory) or attempt(partial(rows.extend, timings))
        for row in [*rows, *([{"left_out": why}] if why else [])]:
            yield facts | work.as_json() | row


def open_model(options: argparse.Namespace, format: str) -> Opened:
    packed = format in PACKED_BITS
    dtype, quantize = ("bfloat16", format) if packed else (format, "none")
    return opt.open_model(
        None, Wish(options.device, dtype, quantize, kernels=options.kernels), options.config
    )


def too_large(config: DeepseekV2Config, format: str, work: benchmark.Work, memory: int | None) -> str:
    """Why a piece of work need not be tried with so many bytes of memory; nothing where it may fit."""
    tokens = work.batch * (work.depth + work.prompt + work.generate)
    needed = size.weights_bytes(config, format, "bfloat16")
    needed += tokens * size.kv_bytes_per_token(config, "bfloat16")
    if memory is None or needed <= TRIED * memory:
        return ""
    return f"left out: weights and cache take {needed / 1e9:.0f} GB"


def attempt(work: Callable[[], object]) -> str:
    """Why it could not be done, or nothing. What was left of the memory is free again before it begins."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        work()
    except Dsv2Error as error:
        return error.sentence
    except RuntimeError as error:  # torch's own, Triton's and the driver's differ in class
        if "out of memory" in str(error) or "can't allocate memory" in str(error):
            return "out of memory"
        raise
    return ""


def measured(options: argparse.Namespace, opened: Opened, twin: Any, work: benchmark.Work) -> Iterator[Row]:
    """A row an engine, and where it is asked for one of where the time went."""
    runner, kernels = opened.runner, kernels_of(opened.plan)
    beside = twin if work.batch == 1 and work.depth + work.prompt <= 4096 else None
    for timing in benchmark.measure_in_turn(
        runner, work, options.repetitions, beside, kernels=kernels, at_random=True
    ):
        peak = {"peak_memory_bytes": peak_memory_bytes(runner.device)}
        yield timing.as_json() | shares(runner, timing) | peak
    if options.profile and work.batch == 1:
        yield {"profile": benchmark.profile(runner, work)}


def markdown(facts: dict) -> str:
    columns = [
        "format",
        "engine",
        "batch",
        "context",
        "decode tok/s",
        "of reading",
        "prefill tok/s",
        "of GEMM",
        "GB/s",
        "TFLOP/s",
    ]
    lines = [f"{facts['model']} on {facts['device']}, torch {facts['torch']}: `{facts['command']}`", ""]
    lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for run in facts["runs"]:
        if "profile" in run:
            continue
        start = [run["format"], run.get("engine", "dsv2"), run["batch"], run["depth"] + run["prompt_tokens"]]
        if "left_out" in run:
            lines.append(f"| {' | '.join(map(str, start))} | {run['left_out']} |")
            continue
        decode = ranged(run["decode_tokens_per_second"]) if run["generated_tokens"] > 2 else ""
        share = (
            f"{run['decode_share_of_bandwidth']:.0%}" if "decode_share_of_bandwidth" in run and decode else ""
        )
        ceilings = [
            f"{run['read_bytes_per_second']['median'] / 1e9:.0f}",
            f"{run['gemm_flops_per_second']['median'] / 1e12:.3g}",
        ]
        row = [
            *start,
            decode,
            share,
            ranged(run["prefill_tokens_per_second"]),
            f"{run['prefill_share_of_gemm']:.0%}",
            *ceilings,
        ]
        lines.append(f"| {' | '.join(map(str, row))} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", help="OUT.json and OUT.md are written, anew after every row")
    parser.add_argument("config")
    parser.add_argument("--formats", default="bfloat16,int8,int4")
    parser.add_argument("--batch", default="1,8,32,128")
    parser.add_argument("--context", default="64,4096,32768")
    parser.add_argument("--prefill", default="4096")
    parser.add_argument("--generate", type=int, default=64)
    parser.add_argument("-r", "--repetitions", type=int, default=3)
    parser.add_argument("--against", choices=["transformers"])
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    facts = {
        "model": Path(options.config).name,
        "device": "",
        "torch": torch.__version__,
        "command": f"python {' '.join(sys.argv)}",
        "runs": [],
    }
    for format in options.formats.split(","):
        for run in measure(options, format):
            facts["device"] = device_name(torch.device(options.device))
            facts["runs"].append(run)
            Path(f"{options.out}.json").write_text(json.dumps(facts, indent=1) + "\n")
            Path(f"{options.out}.md").write_text(markdown(facts))
    print(Path(f"{options.out}.md").read_text())


if __name__ == "__main__":
    main()
