"""Packing a checkpoint: 8- or 4-bit codes in files that are mapped into memory as they lie.

One layer is held at a time, so a model far larger than the memory can be packed. The files are ordinary safetensors;
config.json says in `quantization_config` what the codes are and, by SHA-256, which files they were made from.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import struct
import tempfile
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from dsv2cli.checkpoint.hub import WANTED_FILES
from dsv2cli.checkpoint.weights import (
    INDEX,
    MAPPED,
    Progress,
    blueprint,
    list_tensors,
    match,
    pieces,
    read_piece,
    state_of,
    weights_bytes,
)
from dsv2cli.errors import Dsv2Error, UsageError
from dsv2cli.formats import PACKED_BITS, PACKED_BY, PACKED_FORMAT
from dsv2cli.kernels.native import Kernels
from dsv2cli.model.config import DeepseekV2Config

ALIGNMENT = 64  # bytes: a cache line, and the widest load of a CPU
NAMES = {dtype: name for name, dtype in MAPPED.items()}


@torch.inference_mode(False)
def quantize_checkpoint(
    folder: Path,
    out: Path,
    format: str,
    group: int,
    kernels: Kernels | None = None,
    progress: Progress | None = None,
) -> int:
    """Pack the checkpoint in `folder` into the new folder `out`; gives the bytes written.

    `out` appears when all of it is there. Raises UsageError where it exists or the source is packed already,
    Dsv2Error as load_model and for a full disk.
    """
    config = DeepseekV2Config.load(folder)
    if config.packed is not None:
        raise UsageError(
            f"{folder} is packed already", why="codes are made from full weights", fix="give the original"
        )
    if out.exists():
        raise UsageError(f"{out} exists already", fix="another name, or remove it first")
    mlp, attention = PACKED_BITS[format]
    sizes = {"bits": mlp, "attention_bits": attention, "group": group}
    model = blueprint(config, format=format, group=group)
    stored = list_tensors(folder)
    total = sum(tensor.length for tensor, _ in match(model, stored, folder))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        refuse_full_disk(out, weights_bytes(model))
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as unfinished:
            new = Path(unfinished) / out.name
            new.mkdir()
            weight_map: dict[str, str] = {}
            done = 0
            names = [name for name in pieces(config) if name != "lm_head" or not config.tie_word_embeddings]
            for number, piece in enumerate(names, 1):
                before = done
                counted = None if progress is None else lambda count, _: progress(before + count, total)  # noqa: B023
                done += read_piece(model, piece, stored, torch.device("cpu"), counted, kernels)
                module = model.get_submodule(piece)
                file = f"model-{number:05d}-of-{len(names):05d}.safetensors"
                tensors = {f"{piece}.{name}": tensor for name, tensor in state_of(module).items()}
                write_safetensors(
                    new / file,
                    tensors,
                    {"format": f"{PACKED_BY} {PACKED_FORMAT}"}
                    | {key: str(value) for key, value in sizes.items()},
                )
                weight_map |= dict.fromkeys(tensors, file)
                module.to(torch.device("meta"))
            copy_settings(folder, new)
            write_json(new / INDEX, {"metadata": {}, "weight_map": weight_map})
            sources = {
                file.name: sha256(file) for file in sorted({tensor.file for tensor in stored.values()})
            }
            packing = {"quant_method": PACKED_BY, "format": PACKED_FORMAT, **sizes, "source_sha256": sources}
            raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            write_json(new / "config.json", raw | {"quantization_config": packing})
            new.rename(out)
    except OSError as error:
        raise Dsv2Error(
            f"Writing {out} failed", why=error.strerror or str(error), fix="make room, or choose another disk"
        ) from error
    return sum(file.stat().st_size for file in out.iterdir())


def refuse_full_disk(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        raise Dsv2Error(
            f"There is no room for {out}",
            why=f"it takes {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free",
            fix="make room, or choose another disk",
        )


def copy_settings(folder: Path, out: Path) -> None:
    """Tokenizer, template and sampling defaults."""
    for pattern in WANTED_FILES:
        for file in folder.glob(pattern):
            if file.name not in ("config.json", INDEX) and file.suffix != ".safetensors":
                shutil.copyfile(file, out / file.name)


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """The format of huggingface/safetensors, with what their writer does not promise: codes begin on a cache line."""
    ordered = sorted(
        tensors.items(), key=lambda item: (item[1].dtype != torch.uint8, -item[1].element_size())
    )
    header: dict[str, object] = {"__metadata__": metadata}
    offset = 0
    for name, tensor in ordered:
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text = text.ljust(math.ceil((8 + len(text)) / ALIGNMENT) * ALIGNMENT - 8)  # trailing spaces are allowed
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, tensor in ordered:
            write_tensor(file, tensor)


def write_tensor(file: BinaryIO, tensor: Tensor) -> None:
    file.write(memoryview(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]


def sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(2**22):
            digest.update(block)
    return digest.hexdigest()
