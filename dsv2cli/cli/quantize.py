"""`dsv2 quantize`: a checkpoint packed into 8 or 4 bits, ready to be mapped into memory."""

from __future__ import annotations

import time
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from dsv2cli.cli import options as opt
from dsv2cli.cli import ui
from dsv2cli.errors import UsageError


class Packed(str, Enum):
    int8, int4, int4_all = "int8", "int4", "int4-all"


class Group(str, Enum):
    g32, g64 = "32", "64"


def quantize(
    model: Annotated[
        str,
        typer.Argument(
            metavar="DIR|REPO",
            autocompletion=opt.models,
            help="Folder with a checkpoint, or a Hugging Face repository name.",
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder for the packed checkpoint.")],
    to: Annotated[
        Packed,
        typer.Option(
            help="Bits of experts and dense layers; attention gets 8, or with int4-all 4, the head always 8."
        ),
    ] = Packed.int4,
    group: Annotated[Group, typer.Option(help="Numbers that share a scale.")] = Group.g64,
    kernels: opt.KernelsOption = opt.KernelsChoice.auto,
) -> None:
    """Pack a checkpoint into 8 or 4 bits. It then loads at once, and by several processes into the same memory."""
    from dsv2cli.checkpoint.hub import find_model
    from dsv2cli.checkpoint.quantize import quantize_checkpoint

    folder = find_model(model)
    if kernels in opt.TRITON:
        raise UsageError("The Triton kernels do not pack", fix="--kernels auto, or off")
    library, _ = opt.pick_kernels(kernels, "cpu", small=False)
    began = time.perf_counter()
    with ui.loading(model) as progress:
        size = quantize_checkpoint(folder, out, to.value, int(group.value), library, progress)
    ui.note(f"{out}: {size / 1e9:.2f} GB in {time.perf_counter() - began:.0f} s")
