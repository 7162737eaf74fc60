"""Packing a checkpoint: 8- or 4-bit codes in files that are mapped into memory as they lie.

One layer is held at a time, so a model far larger than the memory can be packed. The files are ordinary
safetensors; config.json says in `quantization_config` what the codes are and, by SHA-256, which files they
were made from.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dsv2cli.checkpoint.blueprint import Codings, bits_by_part, blueprint, pieces, state_of, weights_bytes
from dsv2cli.checkpoint.formats.coded import Coded
from dsv2cli.checkpoint.load import Progress, of_total, read_piece
from dsv2cli.checkpoint.names import kept_codings, match, tensors_of
from dsv2cli.checkpoint.safetensors import INDEX, Stored, write_safetensors
from dsv2cli.errors import Dsv2Error, UsageError
from dsv2cli.formats import KEPT_FORMAT, PACKED_BITS, PACKED_BY, PACKED_FORMAT, PACKED_SIZES
from dsv2cli.hubs.hashes import sha256, write_sums
from dsv2cli.hubs.remote import WANTED
from dsv2cli.kernels.native import Kernels
from dsv2cli.model.config import DeepseekV2Config
from dsv2cli.model.transformer import DeepseekV2
from dsv2cli.outside import json_text, read_json
from dsv2cli.places import unfinished


@torch.inference_mode(False)
def quantize_checkpoint(
    folder: Path,
    out: Path,
    format: str | None,
    group: int,
    kernels: Kernels | None = None,
    progress: Progress | None = None,
) -> int:
    """Pack the checkpoint in `folder` into the new folder `out`; gives the bytes written. With `format` None
    the codes of another program are kept as they are.

    `out` appears when all of it is there. Raises UsageError where it exists or the source is packed already,
    Dsv2Error as load_model and for a full disk.
    """
    config = DeepseekV2Config.load(folder)
    if config.packed is not None:
        why, fix = "codes are made from full weights", "give the original"
        if config.packed.codings is not None:
            why, fix = "it holds the codes of another program already", "run it as it is"
        raise UsageError(f"{folder} is packed already", why=why, fix=fix)
    if out.exists():
        raise UsageError(f"{out} exists already", fix="another name, or remove it first")
    stored = tensors_of(folder, config)
    if format is not None:
        sizes, model = sizes_of(format, group), blueprint(config, format=format, group=group)
    else:
        assert config.foreign is not None
        codings = kept_codings(config, stored, torch.device("cpu"))
        sizes, model = kept_sizes(config, codings), blueprint(config, codings=codings)
    total = sum(tensor.length for tensor, _ in match(model, stored, folder))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        refuse_full_disk(out, weights_bytes(model))
        with unfinished(out, folder=True) as folder_of_it:
            new = folder_of_it / out.name
            new.mkdir()
            weight_map = write_pieces(model, stored, new, sizes, kernels, of_total(progress, total))
            files = sorted({tensor.file for tensor in stored.values()})
            complete(folder, new, weight_map, sizes, {file.name: sha256(file) for file in files})
            new.rename(out)
    except OSError as error:
        why, fix = error.strerror or str(error), "make room, or choose another disk"
        raise Dsv2Error(f"Writing {out} failed", why=why, fix=fix) from error
    return sum(file.stat().st_size for file in out.iterdir())


def sizes_of(format: str, group: int) -> dict[str, Any]:
    """What config.json says of a format."""
    bits = zip(PACKED_SIZES, PACKED_BITS[format], strict=True)
    return {"format": PACKED_FORMAT, **dict(bits), "group": group}


def kept_sizes(config: DeepseekV2Config, codings: Codings) -> dict[str, Any]:
    """The same of the codes of another program."""
    assert config.foreign is not None
    on_gpu = {name: coding.multiplied_out for name, coding in codings.items()}
    bits, more = bits_by_part(config, codings), bits_by_part(config, on_gpu)
    said = {name: str(coding) for name, coding in codings.items()}
    label = config.foreign.label
    return {"format": KEPT_FORMAT, "label": label, "bits_held": bits, "bits_on_gpu": more, "codings": said}


def complete(
    folder: Path, new: Path, weight_map: dict[str, str], sizes: dict[str, Any], sources: dict[str, str]
) -> None:
    """Write all that a packed checkpoint has besides its weights: settings from `folder`, the index, and what
    the codes are and were made from. Raises OSError.
    """
    copy_settings(folder, new)
    write_json(new / INDEX, {"metadata": {}, "weight_map": dict(sorted(weight_map.items()))})
    packing = {"quant_method": PACKED_BY, **sizes, "source_sha256": sources}
    raw = read_json(folder / "config.json")
    raw.pop("quantization", None)  # of MLX
    write_json(new / "config.json", raw | {"quantization_config": packing})
    write_sums(new)


def write_pieces(
    model: DeepseekV2,
    stored: dict[str, Stored | Coded],
    new: Path,
    sizes: dict[str, Any],
    kernels: Kernels | None,
    counted: Callable[[int], None] | None,
) -> dict[str, str]:
    """Read, pack and write one piece after the other; gives the file of each tensor. Raises OSError.

    `counted` is told the bytes read so far.
    """
    weight_map: dict[str, str] = {}
    names = packed_pieces(model)
    done = 0
    for number, piece in enumerate(names, 1):
        progress = None if counted is None else partial(count_on, counted, done)
        done += read_piece(model, piece, stored, torch.device("cpu"), progress, kernels)
        file = file_of(number, len(names))
        weight_map |= dict.fromkeys(write_piece(model, piece, new / file, sizes), file)
    return weight_map


def packed_pieces(model: DeepseekV2) -> list[str]:
    """The pieces that get a file each; a tied head has none."""
    tied = model.config.tie_word_embeddings
    return [name for name in pieces(model.config) if name != "lm_head" or not tied]


def file_of(number: int, count: int) -> str:
    """The name of the file of a piece, counted from 1."""
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def write_piece(model: DeepseekV2, piece: str, path: Path, sizes: dict[str, Any]) -> list[str]:
    """Write a piece that has been packed, and forget its weights; gives the names of its tensors.

    Raises OSError.
    """
    said = {key: str(value) for key, value in sizes.items() if not isinstance(value, dict)}
    metadata = said | {"format": f"{PACKED_BY} {sizes['format']}"}
    module = model.get_submodule(piece)
    tensors = {f"{piece}.{name}": tensor for name, tensor in state_of(module).items()}
    write_safetensors(path, tensors, metadata)
    module.to(torch.device("meta"))
    return list(tensors)


def count_on(counted: Callable[[int], None], before: int, done: int, _: int) -> None:
    """The Progress of one piece, after others of `before` bytes."""
    counted(before + done)


def refuse_full_disk(out: Path, needed: int) -> None:
    """Raises Dsv2Error where the disk of `out` has not so many bytes free."""
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        why, fix = (
            f"it takes {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free",
            "make room, or choose another disk",
        )
        raise Dsv2Error(f"There is no room for {out}", why=why, fix=fix)


def copy_settings(folder: Path, out: Path) -> None:
    """Tokenizer, template and sampling defaults."""
    for pattern in WANTED:
        for file in folder.glob(pattern):
            if file.name not in ("config.json", INDEX) and file.suffix != ".safetensors" and file.is_file():
                shutil.copyfile(file, out / file.name)


def write_json(path: Path, content: object) -> None:
    """Raises OSError."""
    path.write_text(json_text(content, indent=1) + "\n", encoding="utf-8")
