"""Measure a model on a GPU over batch sizes, contexts and formats, and write one JSON and one Markdown file.

    python tests/gpu_table.py OUT CONFIG [--formats bfloat16,int8,int4] [--batch 1,8,32,128]
                              [--context 64,4096,32768]
                              [--prefill 4096] [--generate 64] [-r 3] [--against transformers] [--device cuda]

Weights are random, made on the device from CONFIG alone. Every row's ceilings (reading memory, torch's matrix
product) are measured just before it. What does not fit into the memory is left out, and said. For instance:

    python tests/gpu_table.py v2-lite tests/data/configs/DeepSeek-V2-Lite --against transformers
    python tests/gpu_table.py v2 tests/data/configs/DeepSeek-V2-Chat --formats int4
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from dsv2cli.cli import options as opt
from dsv2cli.cli.bench import shares
from dsv2cli.cli.figures import numbers, ranged
from dsv2cli.device import device_name, gpu_memories, peak_memory_bytes
from dsv2cli.engine import benchmark
from dsv2cli.formats import PACKED_BITS
from dsv2cli.model import size
from dsv2cli.run.open import kernels_of
from dsv2cli.run.wish import Wish

SPARE = 0.9  # of the memory: activations, and what else runs there


def works(options: argparse.Namespace) -> Iterator[benchmark.Work]:
    for context in numbers("--context", options.context, 1):
        for batch in numbers("--batch", options.batch, 1):
            prompt = min(64, context)
            yield benchmark.Work(prompt, options.generate, context - prompt, batch)
    for length in numbers("--prefill", options.prefill, 1):
        yield benchmark.Work(length, 2)


def measure(options: argparse.Namespace, format: str) -> Iterator[dict]:
    """One row a piece of work."""
    packed = format in PACKED_BITS
    dtype, quantize = ("bfloat16", format) if packed else (format, "none")
    wish = Wish(options.device, dtype, quantize, kernels=options.kernels)
    opened = opt.open_model(None, wish, options.config)
    runner, kernels = opened.runner, kernels_of(opened.plan)
    memory = gpu_memories()[runner.device.index or 0] if runner.device.type == "cuda" else None
    twin = None
    if options.against and not packed:
        twin = benchmark.transformers_twin(runner, opened.folder)
    for work in works(options):
        tokens = work.batch * (work.depth + work.prompt + work.generate)
        needed = size.weights_bytes(runner.config, format, "bfloat16")
        needed += tokens * size.kv_bytes_per_token(runner.config, "bfloat16")
        facts = {"format": format, "kernels": opened.plan.kernels_name} | work.as_json()
        if memory is not None and needed > SPARE * memory:
            yield facts | {"left_out": f"weights and cache take {needed / 1e9:.0f} GB"}
            continue
        beside = twin if work.batch == 1 and work.depth + work.prompt <= 4096 else None
        for timing in benchmark.measure_in_turn(runner, work, options.repetitions, beside, kernels=kernels):
            peak = {"peak_memory_bytes": peak_memory_bytes(runner.device)}
            yield facts | timing.as_json() | shares(runner, timing) | peak
        if options.profile and work.batch == 1:
            yield facts | {"profile": benchmark.profile(runner, work)}


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
            lines.append(f"| {' | '.join(map(str, start))} | left out: {run['left_out']} |")
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
        gc.collect()
        torch.cuda.empty_cache()
    print(Path(f"{options.out}.md").read_text())


if __name__ == "__main__":
    main()
