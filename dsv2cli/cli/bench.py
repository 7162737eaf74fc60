"""`dsv2 bench`: how fast a model runs here, with spread, memory and cache size."""

from __future__ import annotations

import statistics
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsv2cli.cli import options as opt
from dsv2cli.cli import ui
from dsv2cli.errors import UsageError
from dsv2cli.model.size import expanded_kv_bytes_per_token

if TYPE_CHECKING:
    from dsv2cli.engine.benchmark import Timing
    from dsv2cli.model.transformer import DeepseekV2


class Against(str, Enum):
    transformers = "transformers"


def bench(
    model: opt.ModelOption = None,
    prompt: Annotated[str, typer.Option(help="Prompt lengths in tokens, such as 64,4096.")] = "512",
    generate: Annotated[int, typer.Option(min=2, help="Tokens to generate after each prompt.")] = 32,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 1,
    repetitions: Annotated[int, typer.Option("--repetitions", "-r", min=1, help="Counted runs after one warm-up.")] = 3,
    against: Annotated[Against | None, typer.Option(help="Alternate with this library over the same weights.")] = None,
    random_weights: Annotated[
        str | None, typer.Option(metavar="DIR|FILE|REPO", help="Measure a model made of random weights from a config alone.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
    device: opt.DeviceOption = "auto",
    dtype: opt.DtypeOption = opt.Dtype.auto,
    attention: opt.AttentionOption = opt.AttentionPath.auto,
    kernels: opt.KernelsOption = opt.KernelsChoice.auto,
    quantize: opt.QuantizeOption = opt.Quantize.none,
    threads: opt.ThreadsOption = None,
) -> None:
    """Measure prefill, decode, time to the first token, load time, memory and cache size."""
    lengths = parse_lengths(prompt)
    if random_weights is not None and model is not None:
        raise UsageError("Both --model and --random-weights are given", fix="leave one of them out")
    opened = opt.open_model(model, opt.Compute(device, dtype, threads, attention, kernels, quantize), random_weights)

    from dsv2cli.checkpoint.weights import weights_bytes
    from dsv2cli.device import device_name, peak_memory_bytes
    from dsv2cli.engine import benchmark

    if against is not None and opened.plan.format.startswith("int"):
        raise UsageError("--against compares the same weights", why="transformers has no such codes", fix="the checkpoint unpacked")
    loaded_peak = peak_memory_bytes(opened.model.device)
    twin = benchmark.transformers_twin(opened.model, opened.folder) if against is not None else None
    timings: list[Timing] = []
    with ui.counting("measuring", len(lengths) * (repetitions + 1) * (2 if twin is not None else 1)) as tick:
        for length in lengths:
            timings += benchmark.run(opened.model, length, generate, batch, repetitions, twin, tick, opened.plan.kernels)
    config, cache = opened.model.config, opened.model.new_cache()
    dtype_name = str(opened.model.dtype).removeprefix("torch.")
    facts = {
        "model": opened.name,
        "device": device_name(opened.model.device),
        "dtype": dtype_name,
        "attention": attention.value,
        "kernels": opened.plan.path,
        "weights": opened.plan.format,
        "weights_bytes": weights_bytes(opened.model),
        "load_seconds": opened.load_seconds,
        "peak_memory_after_load_bytes": loaded_peak,
        "peak_memory_bytes": peak_memory_bytes(opened.model.device),
        "kv_bytes_per_token": cache.bytes_per_token(),
        "kv_bytes_per_token_expanded": expanded_kv_bytes_per_token(config, dtype_name),
    }
    runs = [timing.as_json() | shares(opened.model, timing) for timing in timings]
    if json:
        ui.write_json(facts | {"runs": runs})
    else:
        show(facts, timings, runs)


def shares(model: DeepseekV2, timing: Timing) -> dict[str, float]:
    """How near to the ceilings of the same minute, as medians over the repetitions. Decode: one sequence only."""
    from dsv2cli.engine import benchmark

    context = timing.prompt_tokens + timing.generated_tokens / 2
    read, flops = benchmark.read_bytes_per_token(model, int(context)), benchmark.prefill_flops_per_token(model)

    def share(rates: list[float], each: float, ceilings: list[float]) -> float:
        return statistics.median(rate * each / ceiling for rate, ceiling in zip(rates, ceilings, strict=True))

    out = {"prefill_share_of_gemm": share(timing.prefill_tokens_per_second, flops, timing.gemm_flops_per_second)}
    if timing.batch == 1:
        out["read_bytes_per_token"] = read
        out["decode_share_of_bandwidth"] = share(timing.decode_tokens_per_second, read, timing.read_bytes_per_second)
    return out


def parse_lengths(text: str) -> list[int]:
    try:
        lengths = [int(part) for part in text.split(",")]
    except ValueError:
        lengths = []
    if not lengths or min(lengths) < 1:
        raise UsageError(f"--prompt {text} is not a list of lengths", fix="--prompt 64,4096")
    return lengths


def show(facts: dict[str, Any], timings: list[Timing], runs: list[dict[str, Any]]) -> None:
    """The result as a table on stdout: medians, with the range of the repetitions beside them."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("engine", "batch", "prompt", "new", "prefill tok/s", "decode tok/s", "first token s"):
        table.add_column(column, justify="left" if column == "engine" else "right", no_wrap=True)
    for timing in timings:
        table.add_row(
            timing.engine, str(timing.batch), str(timing.prompt_tokens), str(timing.generated_tokens),
            ranged(timing.prefill_tokens_per_second), ranged(timing.decode_tokens_per_second), ranged(timing.ttft_seconds),
        )  # fmt: skip
    console = ui.stdout()
    console.print(ui.harmless(f"{facts['model']} · {facts['weights']} · {facts['device']} · {facts['kernels']}"))
    console.print(table)
    for ours, theirs in zip(timings[::2], timings[1::2], strict=False):
        if theirs.engine != ours.engine:
            console.print(f"prompt {ours.prompt_tokens}: {ratios(ours, theirs)}")
    for run in runs:
        if run["engine"] == "dsv2":
            decode = f"decode {run['decode_share_of_bandwidth']:.0%} of reading at {run['read_bytes_per_second']['median'] / 1e9:.1f} GB/s, " if run["batch"] == 1 else ""
            console.print(
                f"prompt {run['prompt_tokens']}: {decode}prefill {run['prefill_share_of_gemm']:.0%} of "
                f"torch's matrix product at {run['gemm_flops_per_second']['median'] / 1e9:,.0f} GFLOP/s"
            )
    gib = 2**30
    console.print(
        f"load {facts['load_seconds']:.2f} s · weights {facts['weights_bytes'] / gib:.2f} GiB · peak memory "
        f"{facts['peak_memory_after_load_bytes'] / gib:.2f} GiB after load, {facts['peak_memory_bytes'] / gib:.2f} GiB in all\n"
        f"cache {facts['kv_bytes_per_token']:,} bytes a token (expanded keys and values: "
        f"{facts['kv_bytes_per_token_expanded']:,})"
    )


def ranged(values: list[float]) -> str:
    """Median and range, with three digits that count."""
    middle = statistics.median(values)
    digits = 0 if middle >= 100 else 1 if middle >= 10 else 2 if middle >= 1 else 3
    return f"{middle:.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def ratios(ours: Timing, theirs: Timing) -> str:
    """Medians of the ratios pair by pair, each pair measured side by side."""
    parts = []
    for name, label in (("prefill_tokens_per_second", "prefill"), ("decode_tokens_per_second", "decode")):
        pairs = [a / b for a, b in zip(getattr(ours, name), getattr(theirs, name), strict=True)]
        parts.append(f"{label} {statistics.median(pairs):.2f}x ({min(pairs):.2f}-{max(pairs):.2f})")
    return f"{ours.engine} / {theirs.engine}: " + ", ".join(parts)
