"""`dsv2 bench`: how fast a model runs here, with spread, memory and cache size; and against what was measured before."""

from __future__ import annotations

import csv
import io
import itertools
import json as json_format
import re
import statistics
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsv2cli.cli import options as opt
from dsv2cli.cli import ui
from dsv2cli.errors import Dsv2Error, UsageError
from dsv2cli.model.size import expanded_kv_bytes_per_token

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from dsv2cli.engine.benchmark import Timing
    from dsv2cli.model.transformer import DeepseekV2

FORMAT = "dsv2 bench 1"
BAR = 40  # characters of the longest bar
COLUMNS = {  # of the table, with the number a run has there
    "engine": "engine",
    "batch": "batch",
    "depth": "depth",
    "prompt": "prompt_tokens",
    "new": "generated_tokens",
    "prefill tok/s": "prefill_tokens_per_second",
    "decode tok/s": "decode_tokens_per_second",
    "first token s": "ttft_seconds",
}


class Against(str, Enum):
    transformers = "transformers"


class Output(str, Enum):
    table, json, csv, markdown = "table", "json", "csv", "markdown"


RangeHelp = "a number, a list (64,512), or a range (512-2048+512, 64-4096*2)"


def bench(
    model: opt.ModelOption = None,
    prompt: Annotated[str, typer.Option(help=f"Tokens of the prompt: {RangeHelp}.")] = "512",
    generate: Annotated[
        str,
        typer.Option(
            help="Tokens to generate after each prompt, at least 2; lists and ranges as with --prompt."
        ),
    ] = "32",
    depth: Annotated[
        str,
        typer.Option(help="Tokens in the cache before the prompt, which are not timed; lists and ranges."),
    ] = "0",
    batch: Annotated[str, typer.Option(help="Sequences at once; lists and ranges.")] = "1",
    repetitions: Annotated[
        int, typer.Option("--repetitions", "-r", min=1, help="Counted runs after one warm-up.")
    ] = 3,
    against: Annotated[
        Against | None, typer.Option(help="Alternate with this library over the same weights.")
    ] = None,
    random_weights: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|FILE|REPO", help="Measure a model made of random weights from a config alone."
        ),
    ] = None,
    profile: Annotated[
        bool,
        typer.Option("--profile", help="Also the time of each part: attention, experts, head, sampling."),
    ] = False,
    output: Annotated[Output, typer.Option("--format", help="How the result is printed.")] = Output.table,
    json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
    plot: Annotated[bool, typer.Option("--plot", help="Draw the rates as bars below the table.")] = False,
    svg: Annotated[Path | None, typer.Option(metavar="FILE.svg", help="Save the bars as a picture.")] = None,
    save: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Save the result, to compare with later.")
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json", help="Say what became faster or slower since that result was saved."
        ),
    ] = None,
    device: opt.DeviceOption = "auto",
    dtype: opt.DtypeOption = opt.Dtype.auto,
    attention: opt.AttentionOption = opt.AttentionPath.auto,
    kernels: opt.KernelsOption = opt.KernelsChoice.auto,
    quantize: opt.QuantizeOption = opt.Quantize.none,
    gpus: opt.GpusOption = None,
    split_attention: opt.SplitAttentionOption = opt.SplitAttention.heads,
    placement: opt.PlacementOption = None,
    max_memory: opt.MaxMemoryOption = None,
    offload_folder: opt.OffloadFolderOption = None,
    experts: opt.ExpertsOption = opt.Experts.auto,
    threads: opt.ThreadsOption = None,
) -> None:
    """Measure prefill, decode, time to the first token and between tokens, load time, memory and cache size.

    Every combination of --prompt, --generate, --depth and --batch is measured.
    """
    output = Output.json if json else output
    sweep = itertools.product(
        numbers("--batch", batch, 1),
        numbers("--depth", depth, 0),
        numbers("--prompt", prompt, 1),
        numbers("--generate", generate, 2),
    )
    then = None if compare is None else read_saved(compare)
    if random_weights is not None and model is not None:
        raise UsageError("Both --model and --random-weights are given", fix="leave one of them out")
    if plot and output is not Output.table:
        raise UsageError("--plot goes with the table", fix="--svg FILE.svg, or leave --format out")
    opened = opt.open_model(
        model,
        opt.Compute(
            device,
            dtype,
            threads,
            attention,
            kernels,
            quantize,
            gpus,
            placement,
            max_memory,
            offload_folder,
            experts,
            split_attention,
        ),
        random_weights,
    )

    from dsv2cli.checkpoint.weights import weights_bytes
    from dsv2cli.device import device_name, peak_memory_bytes
    from dsv2cli.engine import benchmark

    if against is not None and opened.plan.format.startswith("int"):
        raise UsageError(
            "--against compares the same weights",
            why="transformers has no such codes",
            fix="the checkpoint unpacked",
        )
    loaded_peak = peak_memory_bytes(opened.model.device)
    twin = benchmark.transformers_twin(opened.model, opened.folder) if against is not None else None
    works = [benchmark.Work(length, new, before, count) for count, before, length, new in sweep]
    timings: list[Timing] = []
    with ui.counting("measuring", len(works) * (repetitions + 1) * (2 if twin is not None else 1)) as tick:
        for work in works:
            timings += benchmark.run(opened.model, work, repetitions, twin, tick, opened.plan.kernels)
    config, cache = opened.model.config, opened.model.new_cache()
    dtype_name = str(opened.model.dtype).removeprefix("torch.")
    facts: dict[str, Any] = {
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
    facts["runs"] = [timing.as_json() | shares(opened.model, timing) for timing in timings]
    if profile:
        facts["profile"] = [work.as_json() | benchmark.profile(opened.model, work) for work in works]
    if then is not None:
        facts["compared"] = benchmark.compare(facts["runs"], then["runs"])
    if save is not None:
        write_saved(save, facts)
    show(facts, timings, output, plot, svg, then)


def numbers(option: str, text: str, least: int) -> list[int]:
    """`64,512`, `512-2048+512` or `64-4096*2`. Raises UsageError for anything else, or below `least`."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+)(?:([+*])(\d+))?)?\s*", part)
        if (
            match is None
            or int(match[1]) < least
            or (match[3] == "*" and (int(match[4]) < 2 or int(match[1]) == 0))
            or (match[3] == "+" and int(match[4]) < 1)
        ):
            raise UsageError(
                f"{option} {text} can not be used",
                why=f"it is {RangeHelp}, from {least} on",
                fix=f"{option} 64,512",
            )
        value, last = int(match[1]), int(match[2] or match[1])
        while value <= last:
            found.append(value)
            value = value * int(match[4]) if match[3] == "*" else value + int(match[4] or 1)
    return list(dict.fromkeys(found))


def read_saved(path: Path) -> dict[str, Any]:
    try:
        content = json_format.loads(path.read_bytes())
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}")
        return dict(content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} is not a saved result", why=str(error), fix="dsv2 bench --save FILE.json makes one"
        ) from None


def write_saved(path: Path, facts: dict[str, Any]) -> None:
    try:
        path.write_text(json_format.dumps({"format": FORMAT} | facts, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise Dsv2Error(
            f"{path} could not be written", why=error.strerror or str(error), fix="another --save"
        ) from None


def shares(model: DeepseekV2, timing: Timing) -> dict[str, float]:
    """How near to the ceilings of the same minute, as medians over the repetitions. Decode: one sequence only."""
    from dsv2cli.engine import benchmark

    work = timing.work
    context = work.depth + work.prompt + work.generate / 2
    read, flops = (
        benchmark.read_bytes_per_token(model, int(context)),
        benchmark.prefill_flops_per_token(model),
    )

    def share(rates: list[float], each: float, ceilings: list[float]) -> float:
        return statistics.median(rate * each / ceiling for rate, ceiling in zip(rates, ceilings, strict=True))

    out = {
        "prefill_share_of_gemm": share(timing.prefill_tokens_per_second, flops, timing.gemm_flops_per_second)
    }
    if work.batch == 1:
        out["read_bytes_per_token"] = read
        out["decode_share_of_bandwidth"] = share(
            timing.decode_tokens_per_second, read, timing.read_bytes_per_second
        )
    return out


def show(
    facts: dict[str, Any],
    timings: list[Timing],
    output: Output,
    plot: bool,
    svg: Path | None,
    then: dict[str, Any] | None,
) -> None:
    """The result on stdout in the form asked for."""
    runs = facts["runs"]
    if svg is not None:
        save_picture(svg, facts)
    if output is Output.json:
        ui.write_json(facts)
    elif output is Output.csv:
        ui.write(as_csv(facts))
    elif output is Output.markdown:
        ui.write(as_markdown(runs))
    else:
        console = ui.stdout()
        console.print(
            ui.harmless(f"{facts['model']} · {facts['weights']} · {facts['device']} · {facts['kernels']}")
        )
        console.print(as_table(runs))
        if plot:
            draw(console, runs)
        remarks(console, facts, timings)
        if then is not None:
            show_comparison(console, facts, then)


def cells(run: dict[str, Any]) -> list[str]:
    """One row: medians, with the range of the repetitions beside them, and the time between tokens as p50/p90/p99."""
    values = [run[key] for key in COLUMNS.values()]
    row = [ranged(value) if isinstance(value, dict) else str(value) for value in values]
    return [*row, "/".join(digits(1000 * run["itl_seconds"][key]) for key in ("p50", "p90", "p99"))]


def as_table(runs: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in (*COLUMNS, "ms a token"):
        table.add_column(column, justify="left" if column == "engine" else "right", no_wrap=True)
    for run in runs:
        table.add_row(*cells(run))
    return table


def as_markdown(runs: list[dict[str, Any]]) -> str:
    rows = [[*COLUMNS, "ms a token"], ["---"] * (len(COLUMNS) + 1), *(cells(run) for run in runs)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def as_csv(facts: dict[str, Any]) -> str:
    """A line a run, with median, least and most of every rate."""
    text = io.StringIO()
    about = ("model", "device", "weights", "kernels", "attention")
    flat = []
    for run in facts["runs"]:
        row = {key: facts[key] for key in about}
        for key, value in run.items():
            inner = (
                {f"{key}_{name}": number for name, number in value.items() if name != "all"}
                if isinstance(value, dict)
                else {key: value}
            )
            row |= inner
        flat.append(row)
    writer = csv.DictWriter(
        text, list(dict.fromkeys(key for row in flat for key in row)), lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def draw(console: Console, runs: list[dict[str, Any]]) -> None:
    """Bars of the medians, each list to its own scale; the thin end of a bar is the range."""
    for name, title in (
        ("decode_tokens_per_second", "decode tok/s"),
        ("prefill_tokens_per_second", "prefill tok/s"),
    ):
        most = max(run[name]["max"] for run in runs)
        console.print(f"\n{title}", style="bold")
        for run in runs:
            rate = run[name]
            full, reach = (round(BAR * rate[key] / most) for key in ("median", "max"))
            console.print(f"{run['engine'] + ', ' + label(run):<44}", end="")
            console.print("█" * full + "─" * (reach - full), style="cyan", end=" ")
            console.print(ranged(rate))
    console.print()


def save_picture(path: Path, facts: dict[str, Any]) -> None:
    """The bars as rich draws a terminal."""
    from rich.console import Console

    console = Console(record=True, file=io.StringIO(), width=130, markup=False, highlight=False)
    console.print(
        ui.harmless(f"{facts['model']} · {facts['weights']} · {facts['device']} · {facts['kernels']}")
    )
    draw(console, facts["runs"])
    try:
        # Without the fonts that a viewer would fetch from the network.
        picture = re.sub(
            r"@font-face \{.*?\}\s*", "", console.export_svg(title="dsv2 bench"), flags=re.DOTALL
        )
        path.write_text(picture, encoding="utf-8")
    except OSError as error:
        raise Dsv2Error(
            f"{path} could not be written", why=error.strerror or str(error), fix="another --svg"
        ) from None


def remarks(console: Console, facts: dict[str, Any], timings: list[Timing]) -> None:
    """Ratios to the other engine, shares of the ceilings, parts, memory and cache."""
    for ours, theirs in zip(timings[::2], timings[1::2], strict=False):
        if theirs.engine != ours.engine:
            console.print(f"{label(ours.as_json())}: {ratios(ours, theirs)}")
    for run in facts["runs"]:
        if run["engine"] == "dsv2":
            decode = (
                f"decode {run['decode_share_of_bandwidth']:.0%} of reading at {run['read_bytes_per_second']['median'] / 1e9:.1f} GB/s, "
                if run["batch"] == 1
                else ""
            )
            console.print(
                f"{label(run)}: {decode}prefill {run['prefill_share_of_gemm']:.0%} of "
                f"torch's matrix product at {run['gemm_flops_per_second']['median'] / 1e9:,.0f} GFLOP/s"
            )
    for parts in facts.get("profile", []):
        for phase in ("prefill", "decode"):
            total = sum(parts[phase].values())
            listed = ", ".join(
                f"{name} {1000 * seconds:.3g} ms ({seconds / total:.0%})"
                for name, seconds in parts[phase].items()
            )
            console.print(f"{label(parts)}, {phase if phase == 'prefill' else 'a decode step'}: {listed}")
    gib = 2**30
    console.print(
        f"load {facts['load_seconds']:.2f} s · weights {facts['weights_bytes'] / gib:.2f} GiB · peak memory "
        f"{facts['peak_memory_after_load_bytes'] / gib:.2f} GiB after load, {facts['peak_memory_bytes'] / gib:.2f} GiB in all\n"
        f"cache {facts['kv_bytes_per_token']:,} bytes a token (expanded keys and values: "
        f"{facts['kv_bytes_per_token_expanded']:,})"
    )


def show_comparison(console: Console, facts: dict[str, Any], then: dict[str, Any]) -> None:
    """A line a run: how it compares with the saved one, and whether the ranges tell them apart."""
    for key in ("model", "device", "weights", "kernels"):
        if facts[key] != then.get(key):
            console.print(ui.harmless(f"not the same {key}: {facts[key]}, then {then.get(key)}"))
    if not facts["compared"]:
        console.print("the saved result has no run of the same lengths")
    words = {"same": "within the spread", "unknown": "one repetition tells nothing about the spread"}
    for run in facts["compared"]:
        rates = [
            f"{label} {run[name]['ratio']:.2f}x ({words.get(run[name]['verdict'], run[name]['verdict'])})"
            for name, label in (
                ("decode_tokens_per_second", "decode"),
                ("prefill_tokens_per_second", "prefill"),
            )
        ]
        console.print(
            f"{run['engine']}, {label(run)}, against the saved result: {', '.join(rates)}; "
            f"reading memory {run['memory_ratio']:.2f}x"
        )


def label(run: dict[str, Any]) -> str:
    """What was measured, with what is not plain."""
    depth, batch = (
        f", depth {run['depth']}" if run["depth"] else "",
        f", batch {run['batch']}" if run["batch"] > 1 else "",
    )
    return f"prompt {run['prompt_tokens']}{depth}{batch}"


def digits(value: float) -> str:
    """Three digits that count."""
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3}f}"


def ranged(rate: dict[str, Any]) -> str:
    """Median and range, to the same place."""
    places = len(digits(rate["median"]).partition(".")[2])
    return f"{rate['median']:.{places}f} ({rate['min']:.{places}f}-{rate['max']:.{places}f})"


def ratios(ours: Timing, theirs: Timing) -> str:
    """Medians of the ratios pair by pair, each pair measured side by side."""
    parts = []
    for name, label in (("prefill_tokens_per_second", "prefill"), ("decode_tokens_per_second", "decode")):
        pairs = [a / b for a, b in zip(getattr(ours, name), getattr(theirs, name), strict=True)]
        parts.append(f"{label} {statistics.median(pairs):.2f}x ({min(pairs):.2f}-{max(pairs):.2f})")
    return f"{ours.engine} / {theirs.engine}: " + ", ".join(parts)
