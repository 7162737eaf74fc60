"""`dsv2 pull`: a model from its hub to this machine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dsv2cli.cli import offer, ui
from dsv2cli.cli import options as opt
from dsv2cli.errors import Dsv2Error, UsageError
from dsv2cli.outside import STALL, Number, in_units, reason

if TYPE_CHECKING:
    from dsv2cli.hubs.remote import Listing

PATIENCE = Number(0, 3600, above=True)


@dataclass(frozen=True)
class Wanted:
    """What is fetched, and from where."""

    heading = opt.TO_RUN

    name: Annotated[
        str,
        typer.Argument(
            autocompletion=opt.models,
            help="A short name (v2-lite-chat), or a repository: OWNER/NAME, hf:OWNER/NAME, ms:OWNER/NAME.",
        ),
    ]
    source: Annotated[
        Literal["hf", "ms", "modelscope"] | None,
        typer.Option(help="Hugging Face (hf), or ModelScope (ms). Default: as the name says, else hf."),
    ] = None
    revision: Annotated[
        str | None, typer.Option(help="A branch, a tag or a commit. Default: the hub's own choice.")
    ] = None
    gguf: Annotated[
        str | None,
        typer.Option(
            metavar="PART",
            help="The GGUF files that have this in their names, such as Q4_K_M, and no others.",
        ),
    ] = None
    send_token: Annotated[
        bool,
        typer.Option(
            "--send-token", help="Send the saved token to the host that HF_ENDPOINT or the like names, too."
        ),
    ] = False
    check: Annotated[
        bool,
        typer.Option("--check", help="Read what is here already too, and fetch it again where it is wrong."),
    ] = False
    stall: Annotated[
        float, typer.Option(metavar="SECONDS", help="So long without a byte, and another way is tried.")
    ] = STALL

    def __post_init__(self) -> None:
        """Raises UsageError."""
        if self.stall not in PATIENCE:
            raise UsageError(f"--stall {self.stall} makes no sense", why=f"it must be {PATIENCE}")


@dataclass(frozen=True)
class Kept:
    """What becomes of it."""

    heading = "What becomes of it"

    to: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A new folder for it. Default: the hub's own cache.")
    ] = None
    quantize: Annotated[
        Literal["none", "int8", "int4", "int4-all"],
        typer.Option(help="Pack it while it comes: of the full weights three files at most are on the disk."),
    ] = "none"


@dataclass(frozen=True)
class Output:
    """What is shown."""

    heading = opt.OUTPUT

    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be fetched.")] = False
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False


@opt.unfolded
def pull(wanted: Wanted, kept: Kept, output: Output) -> None:
    """Download a model, or go on with it. Prints where it is.

    Only weights, configs and tokenizer are fetched, never code. A folder appears when all of it is there and
    has the hashes that were published.
    """
    from dsv2cli.hubs import pull as hub
    from dsv2cli.hubs.reference import parse
    from dsv2cli.hubs.remote import SETTINGS, WANTED, list_files

    reference = parse(wanted.name)
    if reference is None:
        from dsv2cli.hubs.find import no_model

        error = no_model(wanted.name)
        what = f"{wanted.name} is no repository's name"
        raise UsageError(
            what, why="it must be a short name or OWNER/NAME", fix=error.fix.partition(" Without")[0]
        )
    format = kept.quantize if kept.quantize != "none" else reference.format
    source = {"modelscope": "ms"}.get(wanted.source or "", wanted.source or reference.source)
    revision = wanted.revision or reference.revision
    for named, option, given in (
        (reference.source, "--source", source),
        (reference.revision, "--revision", revision),
    ):
        if named not in ("", given):
            raise UsageError(f"{wanted.name} goes without {option} {given}", fix="one of the two")
    if reference.format not in ("", format):
        raise UsageError(f"{wanted.name} is not {format}", fix="leave --quantize out, or another name")
    reference = replace(reference, source=source, revision=revision, format="")
    if ".." in revision or not revision.isprintable() or revision.startswith("/"):
        raise UsageError(f"--revision {revision!r} is none")
    if wanted.check and format:
        fix = f"dsv2 models verify {wanted.name}"
        raise UsageError("--check goes without --quantize", why="the hub has no packed files", fix=fix)
    if wanted.gguf is not None and format:
        raise UsageError("Both --gguf and --quantize are given", why="a GGUF file is packed already")
    patterns = WANTED if wanted.gguf is None else (f"*{wanted.gguf}*.gguf", *SETTINGS)
    listing = list_files(reference, patterns, offer.tell, wanted.send_token)
    if wanted.gguf is not None and not any(file.name.endswith(".gguf") for file in listing.files):
        names = list_files(reference, ("*.gguf",), offer.tell, wanted.send_token).files
        why = "it has " + ", ".join(sorted(file.name for file in names)[:8])
        raise UsageError(f"No GGUF file of {reference} has {wanted.gguf!r} in its name", why=why)
    if output.dry_run:
        tell_plan(listing, kept.to, format, output.json)
        return
    if format:
        folder = offer.pack(listing, format, kept.to, wanted.stall)
    else:
        folder = hub.fetch(listing, offer.bar, offer.tell, kept.to, wanted.stall, wanted.check)
    if output.json:
        ui.write_json({"folder": str(folder), "revision": listing.revision, "bytes": held(folder)})
    else:
        ui.note(f"{in_units(held(folder))} in")
        ui.emit(f"{folder}\n")


def held(folder: Path) -> int:
    """Bytes of a folder's files."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def tell_plan(listing: Listing, to: Path | None, format: str, as_json: bool) -> None:
    """Say what would come and what is there already."""
    from dsv2cli.formats import GROUP
    from dsv2cli.hubs import pull as hub

    if format:
        folder = offer.packed_to(listing, format, to)
        destination: hub.Destination = hub.packed_place(listing, folder, format, GROUP)
        whole = (folder / "config.json").exists()
        missing = set() if whole else {file.name for file in listing.files}
    else:
        try:
            destination = hub.destination_of(listing, to)
            missing = {file.name for file in destination.missing()}
        except OSError as error:
            raise Dsv2Error(f"{to or 'the cache'} can not be looked at", why=reason(error)) from None
    files = [
        {"name": file.name, "bytes": file.size, "here": file.name not in missing} for file in listing.files
    ]
    folder = destination.folder
    needed = destination.needed() if missing else 0
    if as_json:
        plan = {"folder": str(folder), "revision": listing.revision, "bytes": needed, "files": files}
        ui.write_json(plan)
        return
    lines = [
        f"{in_units(file.size):>12}  {file.name}{'' if file.name in missing else '  (here)'}"
        for file in listing.files
    ]
    packed = f", packed into {format}," if format else ""
    total = f"{in_units(needed):>12}  to come from {listing.host}{packed} into {folder}"
    ui.write("\n".join([*lines, total]) + "\n")
