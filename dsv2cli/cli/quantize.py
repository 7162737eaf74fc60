"""`dsv2 quantize`: a checkpoint packed into 8 or 4 bits, ready to be mapped into memory."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from dsv2cli.cli import offer, ui
from dsv2cli.cli import options as opt
from dsv2cli.errors import Dsv2Error, UsageError
from dsv2cli.run.wish import TRITON, KernelsOption


@dataclass(frozen=True)
class Packing:
    """What is packed, and where to."""

    heading = opt.TO_RUN

    model: Annotated[
        str,
        typer.Argument(
            metavar="DIR|FILE|NAME",
            autocompletion=opt.models,
            help="Folder with a checkpoint, a GGUF file, a short name or a repository's.",
        ),
    ]
    out: Annotated[
        Path | None,
        typer.Argument(
            metavar="[OUT]",
            help="New folder for the packed checkpoint. Default, for a repository: a place of our own, where "
            "--model NAME:int4 finds it.",
        ),
    ] = None
    yes: opt.YesOption = False
    to: Annotated[
        Literal["int8", "int4", "int4-all", "as-is"] | None,
        typer.Option(
            show_default=False,
            help="Bits of experts, dense layers and attention; head and latents have 8, but 4 in int4-all. "
            "as-is keeps the codes of another program, and loses nothing. Default: int4, or as-is where "
            "there are such codes.",
        ),
    ] = None
    group: Annotated[Literal["32", "64"], typer.Option(help="Numbers that share a scale.")] = "64"


@dataclass(frozen=True)
class Kernels:
    """What packs it."""

    heading = "Where and how it runs"

    kernels: KernelsOption = "auto"


@opt.unfolded
def quantize(packing: Packing, wish: Kernels) -> None:
    """Pack a checkpoint into 8 or 4 bits.

    It then loads at once, and by several processes into the same memory. Also GGUF files, and checkpoints
    that another program has packed.
    """
    from dsv2cli.checkpoint.pack import quantize_checkpoint
    from dsv2cli.kernels import native

    found = offer.find(packing.model, packing.yes)
    folder, foreign = found.folder, found.config.foreign
    to = packing.to or ("int4" if foreign is None else "as-is")
    if to == "as-is" and foreign is None:
        why = "it holds no codes of another program"
        raise UsageError(f"{packing.model} can not be packed as it is", why=why, fix="--to int4, or int8")
    out = packing.out or own_place(packing.model, to)
    if wish.kernels in TRITON:
        raise UsageError("The Triton kernels do not pack", fix="--kernels auto, or off")
    library, why = None, ""
    if wish.kernels != "off":
        library, why = native.load("native" if wish.kernels == "auto" else wish.kernels)
    if why and wish.kernels != "auto":
        raise Dsv2Error(f"The {wish.kernels} kernels are not there", why=why, fix="--kernels off")
    opt.collect_garbage_from_here()
    began = time.perf_counter()
    with ui.loading(packing.model) as progress:
        format = None if to == "as-is" else to
        size = quantize_checkpoint(folder, out, format, int(packing.group), library, progress)
    ui.note(f"{out}: {size / 1e9:.2f} GB in {time.perf_counter() - began:.0f} s")


def own_place(name: str, format: str) -> Path:
    """Where a packed copy of a repository belongs. Raises UsageError for a folder's."""
    from dsv2cli.hubs.reference import parse
    from dsv2cli.hubs.shelf import packed_folder
    from dsv2cli.outside import path_of

    reference = parse(name)
    if reference is None or path_of(name).exists() or format == "as-is" or reference.source == "ollama":
        raise UsageError("Where is the packed checkpoint to go?", fix=f"dsv2 quantize {name} OUT")
    return packed_folder(replace(reference, format=format))
