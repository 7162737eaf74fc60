"""`dsv2 niah`: how far into a long text a model still finds what was hidden there, as a heat map."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsv2cli.cli import offer, ui
from dsv2cli.cli import options as opt
from dsv2cli.cli.figures import numbers
from dsv2cli.errors import UsageError
from dsv2cli.run.wish import Wish

if TYPE_CHECKING:
    from dsv2cli.checkpoint.tokenizer import Tokenizer
    from dsv2cli.engine.needle import Haystack

# From nothing found to all found: dark red to green, told apart by the number in the cell, too.
HEAT = ("#b2182b", "#d6604d", "#f4a582", "#d9d9a0", "#a6d96a", "#1a9850")


@dataclass(frozen=True)
class Search:
    """Which model has to find it."""

    heading = opt.TO_RUN

    model: opt.ModelOption = None
    yes: opt.YesOption = False


@dataclass(frozen=True)
class Hiding:
    """What is hidden, and where."""

    heading = "Needle in a haystack"

    lengths: Annotated[
        str, typer.Option(help="Prompt lengths in tokens: a list or a range such as 512-4096*2.")
    ] = "256-2048*2"
    depths: Annotated[
        str, typer.Option(help="Where the needle lies, in percent of the text: a list or a range.")
    ] = "0-100+25"
    tries: Annotated[int, typer.Option(min=1, help="Questions for each cell, each with another key.")] = 1
    haystack: Annotated[
        Path | None,
        typer.Option(help="Text file to hide the needle in. Default: a few sentences over and over."),
    ] = None
    needle: Annotated[
        str | None, typer.Option(help="What is hidden; {key} stands for a five-digit number.")
    ] = None
    question: Annotated[str | None, typer.Option(help="What is asked.")] = None
    expect: Annotated[str | None, typer.Option(help="What a right answer holds; {key} by default.")] = None

    def percents(self) -> list[int]:
        """Of --depths. Raises UsageError for one past the end."""
        percents = numbers("--depths", self.depths, 0)
        if max(percents) > 100:
            fix = "--depths 0-100+25"
            raise UsageError(
                f"--depths {self.depths} goes past the end of the text", why="100 is the end", fix=fix
            )
        return percents

    def texts(self) -> Haystack:
        """What is hidden in what. Raises UsageError for a file without a text."""
        from dsv2cli.engine.needle import Haystack

        filler = None if self.haystack is None else read_text(self.haystack)
        chosen = {"filler": filler, "needle": self.needle, "question": self.question, "expect": self.expect}
        return Haystack(**{name: value for name, value in chosen.items() if value is not None})


@dataclass(frozen=True)
class Seed:
    """Which keys are hidden."""

    heading = opt.SAMPLING

    seed: opt.SeedOption = 0


@dataclass(frozen=True)
class Output:
    """How the result is shown."""

    heading = opt.OUTPUT

    json: Annotated[bool, typer.Option("--json", help="Print one JSON object with every answer.")] = False


@opt.unfolded
def niah(search: Search, hiding: Hiding, sampling: Seed, output: Output, wish: Wish) -> None:
    """Hide a sentence in a long text and ask for it.

    Needle in a haystack, over length and depth. Wants a chat checkpoint.
    """
    sizes, percents = numbers("--lengths", hiding.lengths, 1), hiding.percents()
    texts = hiding.texts()
    opened = opt.open_model(search.model, wish, found=offer.find(search.model, search.yes))

    from dsv2cli.engine import needle
    from dsv2cli.engine.scheduler import Scheduler

    tokenizer = opened.tokenizer()
    refuse_lengths(sizes, opened.config.max_position_embeddings, tokenizer, texts)
    request = opt.Sampling(temperature=0.0, seed=sampling.seed).request(opened)
    trials, depths = [], [percent / 100 for percent in percents]
    asked = needle.hidden(tokenizer, texts, sizes, depths, hiding.tries, request.seed)
    with ui.counting("searching", len(sizes) * len(percents) * hiding.tries) as tick:
        for trial in needle.search(Scheduler(opened.runner, tokenizer), asked, request):
            trials.append(trial)
            tick()
    rows = cells(trials, len(percents), hiding.tries)
    found = [[sum(trial.found for trial in cell) / hiding.tries for cell in row] for row in rows]
    if not output.json:
        heat_map(opened.name, sizes, percents, found)
        return
    about = {"model": opened.name, "lengths": sizes, "depths_percent": percents, "tries": hiding.tries}
    listed = [vars(trial) | {"found": trial.found} for trial in trials]
    ui.write_json(about | {"found": found, "trials": listed})


def refuse_lengths(sizes: list[int], context: int, tokenizer: Tokenizer, texts: Haystack) -> None:
    """Raises UsageError for lengths that the model's context, or needle and question, do not fit into."""
    from dsv2cli.engine.needle import SPARE, make_prompt

    if max(sizes) + SPARE > context:
        why = f"this model's context holds {context}, and {SPARE} are for the answer"
        raise UsageError(f"--lengths {max(sizes)} is too long", why=why)
    least = len(make_prompt(tokenizer, texts, "00000", 0, 0.0))
    if min(sizes) < least:
        why = f"needle and question alone take {least} tokens"
        raise UsageError(f"--lengths {min(sizes)} is too short", why=why)


def read_text(path: Path) -> str:
    """Of a file with words in it. Raises UsageError."""
    from dsv2cli.cli.asking import read_file

    if not (text := read_file(path)).strip(" .\n"):
        raise UsageError(f"{path} holds no text")
    return text


def cells(trials: list[Any], columns: int, tries: int) -> list[list[list[Any]]]:
    """The trials by length and then depth."""
    grouped = [trials[i : i + tries] for i in range(0, len(trials), tries)]
    return [grouped[i : i + columns] for i in range(0, len(grouped), columns)]


def heat_map(name: str, sizes: list[int], percents: list[int], found: list[list[float]]) -> None:
    """The share of what was `found` for each size and percent, on stdout."""
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
