"""A model that is not on this machine: offered to the person, fetched where they say so."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dsv2cli.cli import ui
from dsv2cli.outside import in_units

if TYPE_CHECKING:
    from dsv2cli.checkpoint.found import Checkpoint
    from dsv2cli.hubs.find import NotHere
    from dsv2cli.hubs.reference import Reference


def find(name: str | None, yes: bool = False, random_weights: str | None = None) -> Checkpoint:
    """What a name means; where it is not here it is offered, or with `yes` fetched. Raises Dsv2Error."""
    from dsv2cli.checkpoint import found
    from dsv2cli.hubs.find import NotHere

    if random_weights is not None:
        config_of(random_weights)
        return found.find(None, random_weights)
    try:
        return found.find(name)
    except NotHere as error:
        offer(error, yes)
        return found.find(name)


def folder_of(name: str, yes: bool) -> Path:
    """As find, but only the folder."""
    return find(name, yes).folder


def config_of(name: str | None) -> Path:
    """The folder or file of a config, which is fetched unasked: it is a page long. Raises Dsv2Error."""
    from dsv2cli.hubs.find import NotHere, find_config
    from dsv2cli.hubs.pull import pull

    try:
        return find_config(name)
    except NotHere as error:
        if error.reference.source == "ollama" or error.reference.format:
            raise
        return pull(error.reference, quiet, tell, wanted=("config.json",))


def offer(error: NotHere, yes: bool) -> None:
    """Fetch what is not here if the person wants it. Raises the error otherwise, and Dsv2Error."""
    from dsv2cli.hubs.remote import WANTED, list_files

    reference = error.reference
    asks = sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()
    if not yes and not asks:
        raise error
    listing = list_files(reference, WANTED, tell)
    if not yes:
        packed = f" and pack it into {reference.format}" if reference.format else ""
        size = in_units(listing.bytes)
        question = f"{reference.name} is not here. Fetch {size} from {listing.host}{packed}?"
        if not agreed(question):
            raise error
    if reference.format:
        pack(reference, listing.reference.format)
    else:
        from dsv2cli.hubs.pull import fetch

        fetch(listing, bar, tell)


def pack(
    reference: Reference,
    format: str,
    out: Path | None = None,
    send_token: bool = False,
    stall: float | None = None,
) -> Path:
    """Fetch a repository and pack it meanwhile; gives the folder. Raises Dsv2Error."""
    from dataclasses import replace

    from dsv2cli.checkpoint.streamed import pull_packed
    from dsv2cli.formats import GROUP
    from dsv2cli.hubs import shelf
    from dsv2cli.hubs.download import STALL
    from dsv2cli.hubs.pull import own_folder
    from dsv2cli.hubs.remote import WANTED, list_files
    from dsv2cli.kernels import native

    listing = list_files(reference, WANTED, tell, send_token)
    folder = own_folder(out) if out is not None else shelf.packed_folder(replace(reference, format=format))
    library, _ = native.load("native")
    pull_packed(listing, folder, format, GROUP, library, bar, tell, STALL if stall is None else stall)
    return folder


def agreed(question: str) -> bool:
    """Whether a person at the terminal says yes."""
    sys.stderr.write(f"{ui.harmless(question)} [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def tell(text: str) -> None:
    """One line on what happens to a download."""
    ui.stderr().print(ui.harmless(text), style="dim", markup=False, soft_wrap=True)


@contextmanager
def bar(name: str) -> Iterator[Callable[[int, int], None] | None]:
    """Progress with GB, speed and time left."""
    with ui.loading(name, "fetching") as progress:
        yield progress


@contextmanager
def quiet(name: str) -> Iterator[None]:
    yield None
