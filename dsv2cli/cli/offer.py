"""A model that is not on this machine: offered to the person, fetched where they say so."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dsv2cli.cli import ui
from dsv2cli.outside import STALL, in_units

if TYPE_CHECKING:
    from dsv2cli.checkpoint.found import Checkpoint
    from dsv2cli.hubs.find import NotHere
    from dsv2cli.hubs.remote import Listing

Progress = Callable[[int, int], None]


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
        pack(listing, reference.format)
    else:
        from dsv2cli.hubs.pull import fetch

        fetch(listing, bar, tell)


def pack(listing: Listing, format: str, out: Path | None = None, stall: float = STALL) -> Path:
    """Fetch a repository and pack it meanwhile; gives the folder. Raises Dsv2Error."""
    from dsv2cli.checkpoint.streamed import pull_packed
    from dsv2cli.formats import GROUP
    from dsv2cli.kernels import native

    folder = packed_to(listing, format, out)
    library, _ = native.load("native")
    pull_packed(listing, folder, format, GROUP, library, bar, tell, stall)
    return folder


def packed_to(listing: Listing, format: str, out: Path | None) -> Path:
    """The folder that a packed copy is to be, as named or of our own. Raises UsageError."""
    from dsv2cli.hubs.pull import own_folder
    from dsv2cli.hubs.shelf import packed_folder

    return packed_folder(replace(listing.reference, format=format)) if out is None else own_folder(out)


def agreed(question: str) -> bool:
    """Whether a person at the terminal says yes."""
    sys.stderr.write(f"{ui.harmless(question)} [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def tell(text: str) -> None:
    """One line on what happens to a download."""
    ui.stderr().print(ui.harmless(text), style="dim", markup=False, soft_wrap=True)


def bar(name: str) -> AbstractContextManager[Progress | None]:
    """Progress with GB, speed and time left."""
    return ui.loading(name, "fetching")


def quiet(name: str) -> AbstractContextManager[Progress | None]:
    """No progress."""
    return nullcontext()
