"""`dsv2 sessions`: what conversations are saved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from dsv2cli.cli import options as opt
from dsv2cli.cli import ui


@dataclass(frozen=True)
class Chosen:
    """Which of them."""

    heading = opt.TO_RUN

    find: Annotated[
        str | None, typer.Option(metavar="WORD", help="Show the messages that have a word in them.")
    ] = None


@dataclass(frozen=True)
class Output:
    """How they are shown."""

    heading = opt.OUTPUT

    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False


@opt.unfolded
def sessions(chosen: Chosen, output: Output) -> None:
    """List saved conversations, the latest first.

    dsv2 chat --resume NAME goes on with one, dsv2 chat --continue with the latest.
    """
    from dsv2cli import places
    from dsv2cli.cli import commands

    if chosen.find is not None:
        hits = [dict(zip(("name", "role", "text"), hit, strict=True)) for hit in commands.search(chosen.find)]
        if output.json:
            ui.write_json({"messages": hits})
        else:
            ui.write("".join(f"{hit['name']}  {hit['role']}: {hit['text']}\n" for hit in hits))
        return
    talks = [commands.describe(name) for name in places.session_names()]
    if output.json:
        ui.write_json({"sessions": talks, "folder": str(places.sessions())})
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("name", "when", "turns", "model", "kB", "first words"):
        table.add_column(column, justify="right" if column in ("turns", "kB") else "left", no_wrap=True)
    for talk in talks:
        size = f"{talk['bytes'] / 1000:.0f}"
        row = [talk["name"], talk["when"], str(talk["turns"]), talk["model"], size, talk["first"]]
        table.add_row(*map(ui.harmless, row))
    if talks:
        ui.stdout().print(table)
    else:
        ui.note(f"there is no saved session yet; they will be in {places.sessions()}")
