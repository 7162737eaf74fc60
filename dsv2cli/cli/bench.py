"""`dsv2 bench`: how fast a model runs here, with spread, memory and cache size; and against what was measured
before.
"""

from __future__ import annotations

import csv
import io
import itertools
import re
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer

from dsv2cli.cli import offer, traffic, ui
from dsv2cli.cli import options as opt
from dsv2cli.cli.against import Against, line, refuse_beside_a_program
from dsv2cli.cli.figures import RANGE_HELP, digits, numbers, ranged
from dsv2cli.errors import Dsv2Error, UsageError
from dsv2cli.outside import json_text, parse_json, read_bytes, reason
from dsv2cli.run.wish import BatchWish, Cache

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from dsv2cli.engine.benchmark import Timing, Work
    from dsv2cli.engine.peer import Peer
    from dsv2cli.engine.traffic import Traffic
    from dsv2cli.run.open import Opened
    from dsv2cli.run.runner import Runner

FORMAT = "dsv2 bench 1"
FACTS = (  # that are told of a run
    "model",
    "device",
    "dtype",
    "attention",
    "kernels",
    "weights",
    "weights_bytes",
    "load_seconds",
    "peak_memory_after_load_bytes",
    "peak_memory_bytes",
    "kv_bytes_per_token_expanded",
)
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


@dataclass(frozen=True)
class Measure:
    """What is measured, of which model."""

    heading = opt.TO_RUN

    model: opt.ModelOption = None
    yes: opt.YesOption = False
    api: opt.ApiOption = None
    random_weights: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|FILE|REPO", help="Measure a model made of random weights from a config alone."
        ),
    ] = None
    prompt: Annotated[str, typer.Option(help=f"Tokens of the prompt: {RANGE_HELP}.")] = "512"
    generate: Annotated[
        str,
        typer.Option(
            help="Tokens to generate after each prompt, at least 2; lists and ranges as with --prompt."
        ),
    ] = "32"
    depth: Annotated[
        str,
        typer.Option(help="Tokens in the cache before the prompt, which are not timed; lists and ranges."),
    ] = "0"
    batch: Annotated[str, typer.Option(help="Sequences at once; lists and ranges.")] = "1"
    repetitions: Annotated[
        int, typer.Option("--repetitions", "-r", min=1, help="Counted runs after one warm-up.")
    ] = 3
    profile: Annotated[
        bool,
        typer.Option("--profile", help="Also the time of each part: attention, experts, head, sampling."),
    ] = False

    def works(self) -> list[Work]:
        """Every combination of the lists and ranges. Raises UsageError for one that can not be read."""
        sweep = itertools.product(
            numbers("--batch", self.batch, 1),
            numbers("--depth", self.depth, 0),
            numbers("--prompt", self.prompt, 1),
            numbers("--generate", self.generate, 2),
        )

        from dsv2cli.engine.benchmark import Work

        return [Work(length, new, before, count) for count, before, length, new in sweep]


@dataclass(frozen=True)
class BenchWish(BatchWish):
    """The same, with the format of the cache as one more thing to compare."""

    cache: Annotated[
        str, typer.Option(help="Number formats of the latent cache, one after the other, as auto,int8,int6.")
    ] = "auto"  # type: ignore[assignment]

    def wishes(self) -> list[BatchWish]:
        """One for each format. Raises UsageError for what is none."""
        names = list(dict.fromkeys(name.strip() for name in self.cache.split(",")))
        for name in names:
            if name not in get_args(Cache):
                why = f"formats are {', '.join(get_args(Cache))}"
                raise UsageError(f"--cache {name[:80]} is unknown", why=why, fix="--cache auto,int6")
        return [replace(self, cache=name) for name in names]


@dataclass(frozen=True)
class Output:
    """How the result is shown and kept."""

    heading = opt.OUTPUT

    output: Annotated[
        Literal["table", "json", "csv", "markdown"],
        typer.Option("--format", help="How the result is printed."),
    ] = "table"
    json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False
    plot: Annotated[bool, typer.Option("--plot", help="Draw the rates as bars below the table.")] = False
    svg: Annotated[Path | None, typer.Option(metavar="FILE.svg", help="Save the bars as a picture.")] = None
    save: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Save the result, to compare with later.")
    ] = None
    compare: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json", help="Say what became faster or slower since that result was saved."
        ),
    ] = None

    @property
    def format(self) -> str:
        return "json" if self.json else self.output


@opt.unfolded
def bench(measure: Measure, other: Against, many: traffic.Many, output: Output, wish: BenchWish) -> None:
    """Measure speed, load time, memory and cache size.

    Every combination of --prompt, --generate, --depth, --batch and --cache is measured: prefill, decode, time
    to the first token and between tokens; or with --concurrency what each of many gets who ask at once.
    """
    works, wishes = measure.works(), wish.wishes()
    traffics = many.traffics(
        numbers("--prompt", measure.prompt, 1), numbers("--generate", measure.generate, 2)
    )
    if traffics:
        refuse_beside_traffic(measure, other, output)
        most = max(each.concurrency for each in traffics)
        opt.refuse_too_many("--concurrency", many.concurrency, most)
    widest = max(work.batch for work in works)
    opt.refuse_too_many("--batch", measure.batch, widest)
    then = None if output.compare is None else read_saved(output.compare)
    if measure.random_weights is not None and measure.model is not None:
        raise UsageError("Both --model and --random-weights are given", fix="leave one of them out")
    refuse_what_has_no_place(measure, output)
    if (program := other.program()) is not None:
        refuse_beside_a_program(wish, widest)
    if measure.api is not None:
        facts = of_a_server(measure.api, measure.model, traffics, measure, wish)
        finish(facts, [], output, then)
        return
    if len(wishes) > 1 and (wish.gpus or 1) > 1:
        why = "the processes that share a model have one format"
        raise UsageError("Several --cache formats go without --gpus", why=why, fix="one after the other")
    found = offer.find(measure.model, measure.yes, measure.random_weights)
    peer = None if program is None else other.peer(program, found)
    opened = opt.open_model(measure.model, wishes[0], measure.random_weights, found)
    if other.library and opened.plan.format.startswith("int"):
        why, fix = "transformers has no such codes", "the checkpoint unpacked"
        raise UsageError("--against compares the same weights", why=why, fix=fix)
    if peer is not None:
        refuse_beside_a_program(wish, widest, opened.plan)
    facts, timings = measured(opened, wishes, works, traffics, measure, other.library, peer)
    finish(facts, timings, output, then)


def finish(facts: dict[str, Any], timings: list[Timing], output: Output, then: dict[str, Any] | None) -> None:
    """Compare, save and show what was measured."""
    if then is not None:
        from dsv2cli.engine.benchmark import compare

        facts["compared"] = compare(facts["runs"], then["runs"])
    if output.save is not None:
        write_saved(output.save, facts)
    show(facts, timings, output, then)


def of_a_server(
    api: str, model: str | None, traffics: list[Traffic], measure: Measure, wish: BenchWish
) -> dict[str, Any]:
    """What its clients see, with null for what only the server knows. Raises Dsv2Error."""
    from dsv2cli.cli import far
    from dsv2cli.engine.traffic import measure_driven
    from dsv2cli.remote.traffic import Client

    far.refuse_what_is_here(wish, given={"--random-weights": measure.random_weights is not None})
    if not traffics:
        why = "what a server does at one moment for one client tells little"
        raise UsageError("--api needs --concurrency", why=why, fix="--concurrency 1,4,16")
    server = far.connect(api, model)
    server.choose()
    client, runs = Client(server), list[dict[str, Any]]()
    with ui.counting("measuring", len(traffics) * (measure.repetitions + 1)) as tick:
        for many in traffics:
            run = measure_driven(client.drive, many, measure.repetitions, tick)
            runs.append(run | {"engine": "server", "cache": "auto", "kv_bytes_per_token": None})
    if not client.ignore_eos:
        ui.note("the server knows no ignore_eos: answers may be shorter than asked for")
    return dict.fromkeys(FACTS) | {"model": server.name, "device": server.address.url, "runs": runs}


def refuse_what_has_no_place(measure: Measure, output: Output) -> None:
    """Raises UsageError for what was asked for and stands nowhere in the form asked for."""
    if output.plot and output.format != "table":
        raise UsageError("--plot goes with the table", fix="--svg FILE.svg, or leave --format out")
    for option, given in (("--profile", measure.profile), ("--compare", output.compare is not None)):
        if given and output.format in ("csv", "markdown"):
            why = f"a row of --format {output.format} has no place for it"
            raise UsageError(f"{option} goes with the table or JSON", why=why, fix="--format json")


def refuse_beside_traffic(measure: Measure, other: Against, output: Output) -> None:
    """Raises UsageError for what --concurrency does not go with."""
    for option, given in (
        ("--batch", measure.batch != "1"),
        ("--depth", measure.depth != "0"),
        ("--against", other.against is not None),
        ("--profile", measure.profile),
        ("--plot", output.plot),
        ("--svg", output.svg is not None),
    ):
        if given:
            raise UsageError(f"{option} goes without --concurrency", fix="leave one of them out")


def measured(
    opened: Opened,
    wishes: list[BatchWish],
    works: list[Work],
    traffics: list[Traffic],
    measure: Measure,
    library: bool = False,
    peer: Peer | None = None,
) -> tuple[dict[str, Any], list[Timing]]:
    """All works, or all traffic, one after the other in each format of the cache, and what else is to be told
    of the run; in turn with transformers, where `library` says so, or another program.
    """
    from dsv2cli.checkpoint.blueprint import weights_bytes
    from dsv2cli.device import device_name, peak_memory_bytes
    from dsv2cli.engine import benchmark
    from dsv2cli.engine import traffic as under_load
    from dsv2cli.engine.peer import measure_beside
    from dsv2cli.kernels.build import about_processor
    from dsv2cli.model.size import expanded_kv_bytes_per_token
    from dsv2cli.run.open import kernels_of, with_wish

    runner, plan = opened.runner, opened.plan
    loaded_peak, twin = peak_memory_bytes(runner.device), None
    if library:
        twin = benchmark.transformers_twin(runner, opened.folder)
    timings: list[Timing] = []
    runs, profiles = list[dict[str, Any]](), list[dict[str, Any]]()
    told: dict[str, Any] = {}
    each = len(traffics) or len(works) * (1 if twin is None and peer is None else 2)
    kernels = kernels_of(plan)
    with ui.counting("measuring", each * len(wishes) * (measure.repetitions + 1)) as tick:
        for wish in wishes:
            if wish is not wishes[0]:
                runner = with_wish(opened, wish)
            about = {"cache": wish.cache, "kv_bytes_per_token": runner.new_pool(1).bytes_per_token()}
            for many in traffics:
                run = under_load.measure(runner, many, measure.repetitions, tick, kernels)
                runs.append(run | about)
            for work in [] if traffics else works:
                if peer is None:
                    found = benchmark.measure_in_turn(runner, work, measure.repetitions, twin, tick, kernels)
                else:
                    found, told = measure_beside(runner, work, measure.repetitions, peer, tick, kernels)
                timings += found
                rows = [timing.as_json() | about for timing in found]
                for row, timing in zip(rows, found if peer is None else found[:1], strict=False):
                    row |= shares(runner, timing)  # another program's file has other bytes
                if len(found) > 1:
                    rows[0] |= pair_ratios(*found)
                runs += rows
                if measure.profile:
                    profiles.append(work.as_json() | benchmark.profile(runner, work) | about)
    facts: dict[str, Any] = {
        "model": opened.name,
        "device": device_name(runner.device),
        "dtype": plan.dtype,
        "attention": plan.attention,
        "kernels": plan.kernels_name,
        "weights": plan.format,
        "weights_bytes": weights_bytes(runner.model),
        "load_seconds": opened.load_seconds,
        "peak_memory_after_load_bytes": loaded_peak,
        "peak_memory_bytes": peak_memory_bytes(runner.device),
        "kv_bytes_per_token_expanded": expanded_kv_bytes_per_token(runner.config, plan.dtype),
        "runs": runs,
    }
    if measure.profile:
        facts["profile"] = profiles
    if peer is not None:
        facts["machine"] = about_processor()
        facts["against"] = {"program": peer.program, "file": str(peer.file), "flags": [*peer.flags]} | told
    return facts, timings


def read_saved(path: Path) -> dict[str, Any]:
    """What --save has written. Raises UsageError for anything else."""
    from dsv2cli.engine.benchmark import compare

    try:
        content = parse_json(read_bytes(path))
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}")
        compare(content["runs"], content["runs"])  # has all that a comparison needs
        return dict(content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        fix = "dsv2 bench --save FILE.json makes one"
        raise UsageError(f"{path} is not a saved result", why=reason(error), fix=fix) from None


def write_saved(path: Path, facts: dict[str, Any]) -> None:
    """Raises Dsv2Error where the file can not be written."""
    try:
        path.write_text(json_text({"format": FORMAT} | facts, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        why = error.strerror or str(error)
        raise Dsv2Error(f"{path} could not be written", why=why, fix="another --save") from None


def shares(runner: Runner, timing: Timing) -> dict[str, float]:
    """How near to the ceilings of the same minute, as medians over the repetitions.

    Decode: one sequence only.
    """
    from dsv2cli.engine import benchmark

    def share(rates: list[float], each: float, ceilings: list[float]) -> float:
        return statistics.median(rate * each / ceiling for rate, ceiling in zip(rates, ceilings, strict=True))

    work, flops = timing.work, benchmark.prefill_flops_per_token(runner)
    prefill = share(timing.prefill_tokens_per_second, flops, timing.gemm_flops_per_second)
    out = {"prefill_share_of_gemm": prefill}
    if work.batch == 1:
        read = benchmark.read_bytes_per_token(runner, work.context)
        decode = share(timing.decode_tokens_per_second, read, timing.read_bytes_per_second)
        out |= {"read_bytes_per_token": read, "decode_share_of_bandwidth": decode}
    return out


def show(facts: dict[str, Any], timings: list[Timing], output: Output, then: dict[str, Any] | None) -> None:
    """The result on stdout in the form asked for, beside a saved one where there is one."""
    if output.svg is not None:
        save_picture(output.svg, facts)
    if output.format == "json":
        ui.write_json(facts)
    elif output.format == "csv":
        ui.write(as_csv(facts))
    elif output.format == "markdown":
        ui.write(as_markdown(facts["runs"]))
    else:
        console = ui.stdout()
        console.print(ui.harmless(title(facts)))
        console.print(as_table(facts["runs"]))
        if output.plot:
            draw(console, facts["runs"])
        remarks(console, facts, timings)
        if then is not None:
            show_comparison(console, facts, then)


def title(facts: dict[str, Any]) -> str:
    """What was measured, in one line."""
    told = [facts[key] for key in ("model", "weights", "device", "kernels")]
    return " · ".join(each for each in told if each is not None)


def rows(runs: list[dict[str, Any]]) -> list[list[str]]:
    """The heads of the table, and a row a run; the cache's format stands there where there are several."""
    under_load = "concurrency" in runs[0]
    several = len({run["cache"] for run in runs}) > 1
    heads = traffic.COLUMNS if under_load else (*COLUMNS, "ms a token")
    out = [["cache"] * several + list(heads)]
    for run in runs:
        row = traffic.cells(run) if under_load else cells(run)
        out.append([run["cache"]] * several + row)
    return out


def cells(run: dict[str, Any]) -> list[str]:
    """One row: medians, with the range of the repetitions beside them, and the time between tokens as
    p50/p90/p99.
    """
    values = [run[key] for key in COLUMNS.values()]
    row = [ranged(value) if isinstance(value, dict) else str(value) for value in values]
    gaps = [run["itl_seconds"][key] for key in ("p50", "p90", "p99")]
    return [*row, "" if None in gaps else "/".join(digits(1000 * gap) for gap in gaps)]


def as_table(runs: list[dict[str, Any]]) -> Table:
    """A row a run."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    heads, *cells_of_runs = rows(runs)
    for column in heads:
        table.add_column(column, justify="left" if column in ("engine", "cache") else "right", no_wrap=True)
    for row in cells_of_runs:
        table.add_row(*row)
    return table


def as_markdown(runs: list[dict[str, Any]]) -> str:
    """The same rows as a Markdown table."""
    heads, *cells_of_runs = rows(runs)
    lines = [heads, ["---"] * len(heads), *cells_of_runs]
    return "".join(f"| {' | '.join(row)} |\n" for row in lines)


def as_csv(facts: dict[str, Any]) -> str:
    """A line a run, with median, least and most of every rate."""
    text = io.StringIO()
    about = ("model", "device", "weights", "kernels", "attention")
    flat = []
    for run in facts["runs"]:
        row = {key: facts[key] for key in about}
        for key, value in run.items():
            row |= (
                {f"{key}_{name}": n for name, n in value.items() if name != "all"}
                if isinstance(value, dict)
                else {key: value}
            )
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
        width = max(len(run["engine"] + label(run)) for run in runs) + len(",  ")
        console.print(f"\n{title}", style="bold")
        for run in runs:
            rate = run[name]
            full, reach = (round(BAR * rate[key] / most) for key in ("median", "max"))
            console.print(f"{run['engine'] + ', ' + label(run):<{width}}", end="")
            console.print("█" * full + "─" * (reach - full), style="cyan", end=" ")
            console.print(ranged(rate))
    console.print()


def save_picture(path: Path, facts: dict[str, Any]) -> None:
    """The bars as rich draws a terminal. Raises Dsv2Error where the file can not be written."""
    from rich.console import Console

    console = Console(record=True, file=io.StringIO(), width=130, markup=False, highlight=False)
    console.print(ui.harmless(title(facts)))
    draw(console, facts["runs"])
    try:
        # Without the fonts that a viewer would fetch from the network.
        drawn = console.export_svg(title="dsv2 bench")
        picture = re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL)
        path.write_text(picture, encoding="utf-8")
    except OSError as error:
        why = error.strerror or str(error)
        raise Dsv2Error(f"{path} could not be written", why=why, fix="another --svg") from None


def remarks(console: Console, facts: dict[str, Any], timings: list[Timing]) -> None:
    """Ratios to the other engine, shares of the ceilings, parts, memory and cache."""
    for ours, theirs in zip(timings[::2], timings[1::2], strict=False):
        if theirs.engine != ours.engine:
            console.print(f"{label(ours.as_json())}: {ratios(ours, theirs)}")
    if "against" in facts:
        console.print(line(facts["machine"], facts["against"]))
    if "concurrency" in facts["runs"][0]:
        traffic.remarks(console, facts["runs"])
    for run in facts["runs"]:
        if run["engine"] == "dsv2" and "gemm_flops_per_second" in run:
            console.print(f"{label(run)}: {ceilings(run)}")
    if facts["weights"] is None:
        return  # a server's
    for times in facts.get("profile", []):
        for phase, name in (("prefill", "prefill"), ("decode", "a decode step")):
            total = sum(times[phase].values())
            listed = [f"{each} {1000 * s:.3g} ms ({s / total:.0%})" for each, s in times[phase].items()]
            console.print(f"{label(times)}, {name}: {', '.join(listed)}")
    weights, loaded, peak = (
        facts[key] / 2**30 for key in ("weights_bytes", "peak_memory_after_load_bytes", "peak_memory_bytes")
    )
    memory = f"peak memory {loaded:.2f} GiB after load, {peak:.2f} GiB in all"
    console.print(f"load {facts['load_seconds']:.2f} s · weights {weights:.2f} GiB · {memory}")
    expanded = f"(expanded keys and values: {facts['kv_bytes_per_token_expanded']:,})"
    for cache, size in dict.fromkeys((run["cache"], run["kv_bytes_per_token"]) for run in facts["runs"]):
        name = "" if cache == "auto" else f" in {cache}"
        console.print(f"cache{name} {size:,} bytes a token {expanded}")


def ceilings(run: dict[str, Any]) -> str:
    """How near a run came to what the machine could give."""
    reading, multiplying = (
        run[key]["median"] / 1e9 for key in ("read_bytes_per_second", "gemm_flops_per_second")
    )
    decode = ""
    if run["batch"] == 1:
        decode = f"decode {run['decode_share_of_bandwidth']:.0%} of reading at {reading:.1f} GB/s, "
    product = f"torch's matrix product at {multiplying:,.0f} GFLOP/s"
    return f"{decode}prefill {run['prefill_share_of_gemm']:.0%} of {product}"


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
                ("output_tokens_per_second", "output"),
            )
            if name in run
        ]
        console.print(
            f"{run['engine']}, {label(run)}, against the saved result: {', '.join(rates)}; "
            f"reading memory {run['memory_ratio']:.2f}x"
        )


def label(run: dict[str, Any]) -> str:
    """What was measured, with what is not plain."""
    if "concurrency" in run:
        return traffic.label(run)
    cache = "" if run.get("cache", "auto") == "auto" else f", {run['cache']} cache"
    depth = f", depth {run['depth']}" if run["depth"] else ""
    batch = f", batch {run['batch']}" if run["batch"] > 1 else ""
    new = f"{run['generated_tokens']} new{' without it' if run.get('separate') else ''}"
    return f"prompt {run['prompt_tokens']}, {new}{depth}{batch}{cache}"


def pair_ratios(ours: Timing, theirs: Timing) -> dict[str, dict[str, Any]]:
    """Of rates, pair by pair, each pair measured side by side."""
    from dsv2cli.engine.benchmark import spread

    out = {}
    for phase in ("prefill", "decode"):
        rates = (getattr(each, f"{phase}_tokens_per_second") for each in (ours, theirs))
        pairs = [a / b for a, b in zip(*rates, strict=True)]
        out[f"{phase}_ratio"] = spread(pairs) | {"all": pairs}
    return out


def ratios(ours: Timing, theirs: Timing) -> str:
    """The same in words."""
    parts = [
        f"{name.removesuffix('_ratio')} {each['median']:.2f}x ({each['min']:.2f}-{each['max']:.2f})"
        for name, each in pair_ratios(ours, theirs).items()
    ]
    return f"{ours.engine} / {theirs.engine}: " + ", ".join(parts)
