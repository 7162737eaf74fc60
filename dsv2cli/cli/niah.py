"""`dsv2 niah`: how far into a long text a model still finds what was hidden there, as a heat map."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dsv2cli.cli import options as opt
from dsv2cli.cli import ui
from dsv2cli.cli.bench import numbers
from dsv2cli.errors import UsageError

# From nothing found to all found: dark red to green, told apart by the number in the cell, too.
HEAT = ("#b2182b", "#d6604d", "#f4a582", "#d9d9a0", "#a6d96a", "#1a9850")


def niah(
    model: opt.ModelOption = None,
    lengths: Annotated[
        str, typer.Option(help="Prompt lengths in tokens: a list or a range such as 512-4096*2.")
    ] = "256-2048*2",
    depths: Annotated[
        str, typer.Option(help="Where the needle lies, in percent of the text: a list or a range.")
    ] = "0-100+25",
    tries: Annotated[int, typer.Option(min=1, help="Questions for each cell, each with another key.")] = 1,
    haystack: Annotated[
        Path | None,
        typer.Option(help="Text file to hide the needle in. Default: a few sentences over and over."),
    ] = None,
    needle: Annotated[
        str | None, typer.Option(help="What is hidden; {key} stands for a five-digit number.")
    ] = None,
    question: Annotated[str | None, typer.Option(help="What is asked.")] = None,
    expect: Annotated[str | None, typer.Option(help="What a right answer holds; {key} by default.")] = None,
    seed: opt.SeedOption = 0,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object with every answer.")] = False,
    device: opt.DeviceOption = "auto",
    dtype: opt.DtypeOption = opt.Dtype.auto,
    attention: opt.AttentionOption = opt.AttentionPath.auto,
    kernels: opt.KernelsOption = opt.KernelsChoice.auto,
    quantize: opt.QuantizeOption = opt.Quantize.none,
    gpus: opt.GpusOption = None,
    placement: opt.PlacementOption = None,
    max_memory: opt.MaxMemoryOption = None,
    offload_folder: opt.OffloadFolderOption = None,
    experts: opt.ExpertsOption = opt.Experts.auto,
    threads: opt.ThreadsOption = None,
) -> None:
    """Hide a sentence in a long text and ask for it: needle in a haystack, over length and depth. Wants a chat checkpoint."""
    sizes, percents = numbers("--lengths", lengths, 1), numbers("--depths", depths, 0)
    if max(percents) > 100:
        raise UsageError(
            f"--depths {depths} goes past the end of the text", why="100 is the end", fix="--depths 0-100+25"
        )
    text = None if haystack is None else read_text(haystack)
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
        ),
    )

    from dsv2cli.engine import needle as hidden

    if max(sizes) + hidden.SPARE > opened.config.max_position_embeddings:
        raise UsageError(
            f"--lengths {max(sizes)} is too long",
            why=f"this model's context holds {opened.config.max_position_embeddings}, and {hidden.SPARE} are for the answer",
        )
    chosen = {"filler": text, "needle": needle, "question": question, "expect": expect}
    hay = hidden.Haystack(**{name: value for name, value in chosen.items() if value is not None})
    tokenizer, request = opened.tokenizer(), opened.request(None, seed, None, temperature=0.0)
    least = len(hidden.make_prompt(tokenizer, hay, "00000", 0, 0.0))
    if min(sizes) < least:
        raise UsageError(
            f"--lengths {min(sizes)} is too short", why=f"needle and question alone take {least} tokens"
        )
    trials = []
    with ui.counting("searching", len(sizes) * len(percents) * tries) as tick:
        for trial in hidden.search(
            opened.model, tokenizer, hay, sizes, [p / 100 for p in percents], tries, request
        ):
            trials.append(trial)
            tick()
    found = [
        [sum(t.found for t in cell) / tries for cell in row] for row in cells(trials, len(percents), tries)
    ]
    if json:
        listed = [vars(trial) | {"found": trial.found} for trial in trials]
        ui.write_json(
            {
                "model": opened.name,
                "lengths": sizes,
                "depths_percent": percents,
                "tries": tries,
                "found": found,
                "trials": listed,
            }
        )
        return
    heat_map(opened.name, sizes, percents, found)


def read_text(path: Path) -> str:
    from dsv2cli.cli.asking import read

    if not (text := read(path)).strip(" .\n"):
        raise UsageError(f"{path} holds no text")
    return text


def cells(trials: list[Any], columns: int, tries: int) -> list[list[list[Any]]]:
    """The trials by length and then depth."""
    grouped = [trials[i : i + tries] for i in range(0, len(trials), tries)]
    return [grouped[i : i + columns] for i in range(0, len(grouped), columns)]


def heat_map(name: str, sizes: list[int], percents: list[int], found: list[list[float]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    table.add_column("tokens", justify="right", no_wrap=True)
    for percent in percents:
        table.add_column(f"{percent}%", justify="right", no_wrap=True)
    for size, row in zip(sizes, found, strict=True):
        shown = [
            Text(f" {share:4.0%} ", style=f"black on {HEAT[round(share * (len(HEAT) - 1))]}") for share in row
        ]
        table.add_row(f"{size:,}", *shown)
    console = ui.stdout()
    console.print(
        ui.harmless(f"{name}: found, by length of the prompt (down) and depth of the needle (across)")
    )
    console.print(table)
    console.print(f"{sum(map(sum, found)) / sum(map(len, found)):.0%} in all")
