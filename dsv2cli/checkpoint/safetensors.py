"""Safetensors files as they lie: their headers, checked, and writing them. Format: huggingface/safetensors.

Pickle files are refused.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from dsv2cli.errors import Dsv2Error

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
MAPPED = DTYPES | {"U8": torch.uint8}
NAMES = {dtype: name for name, dtype in MAPPED.items()}
INDEX = "model.safetensors.index.json"
ALIGNMENT = 64  # bytes: a cache line, and the widest load of a CPU


@dataclass(frozen=True)
class Stored:
    """One tensor as a safetensors header describes it; `offset` counts from the start of the file."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int
    columns: range | None = None  # the part of each row that is wanted; `shape` and `length` are of that part
    width: int = 0  # of a whole row, then

    def slice_of(self, dim: int, wanted: range) -> Stored:
        """Some of its rows (dim 0) or columns (dim 1), of two dimensions or, for rows, any number."""
        shape = list(self.shape)
        shape[dim] = len(wanted)
        length = self.length // self.shape[dim] * len(wanted)
        if dim == 0:
            return replace(
                self,
                shape=tuple(shape),
                offset=self.offset + self.length // self.shape[0] * wanted.start,
                length=length,
            )
        return replace(self, shape=tuple(shape), length=length, columns=wanted, width=self.shape[1])


def list_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of the checkpoint by name, from the index if there is one, else from the one file.

    Raises Dsv2Error where files are missing or damaged, or are not those that the index names.
    """
    index_path = folder / INDEX
    if not index_path.exists():
        single = folder / "model.safetensors"
        if not single.exists():
            raise no_safetensors(folder)
        return read_header(single)
    wanted = read_index(index_path)
    stored: dict[str, Stored] = {}
    for name in sorted(set(wanted.values())):
        file = folder / name
        if not file.exists():
            raise Dsv2Error(f"{file} is missing", why=f"{INDEX} names it", fix="download the file again")
        header = read_header(file)
        listed = {tensor for tensor, where in wanted.items() if where == name}
        for tensor in sorted(listed - header.keys()):
            raise Dsv2Error(f"{file} lacks the tensor {tensor}", why=f"{INDEX} places it there")
        for tensor in sorted(header.keys() - listed):
            raise Dsv2Error(f"{file} holds the extra tensor {tensor}", why=f"{INDEX} does not place it there")
        stored |= header
    return stored


def read_index(path: Path) -> dict[str, str]:
    """Tensor -> file name. Raises Dsv2Error for what is no index, or names files elsewhere."""
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        wanted = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise Dsv2Error(f"{path} cannot be read", why=repr(error), fix="download the file again") from None
    for file in sorted(set(wanted.values())):
        if Path(file).name != file:
            raise Dsv2Error(f"{path} points outside its folder", why=f"it names the file {file!r}")
    return wanted


def no_safetensors(folder: Path) -> Dsv2Error:
    """What to say of a folder without any."""
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        return Dsv2Error(
            f"{folder} holds pickle files ({pickles[0]}), which can run code when opened, and no safetensors",
            why="only safetensors are loaded",
            fix="convert it where you trust it: "
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT)",
        )
    return Dsv2Error(f"{folder} holds no safetensors", why=f"neither {INDEX} nor model.safetensors is there")


def read_header(file: Path) -> dict[str, Stored]:
    """The header of one safetensors file, checked against the file's length. Raises Dsv2Error."""
    again = "download the file again"
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            (header_size,) = struct.unpack("<Q", stream.read(8))
            if header_size > size - 8:
                raise truncated(file, size, header_size + 8)
            header = json.loads(stream.read(header_size))
        header.pop("__metadata__", None)
        body = 8 + header_size
        tensors = {name: stored(file, name, entry, body) for name, entry in header.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, struct.error) as error:
        why = f"its header is unreadable ({error})"
        raise Dsv2Error(f"{file} is not a safetensors file", why=why, fix=again) from None
    for tensor in tensors.values():
        if tensor.offset < body or tensor.length < 0:
            raise Dsv2Error(f"{file}: tensor {tensor.name} lies outside the file", fix=again)
        if tensor.offset + tensor.length > size:
            raise truncated(file, size, tensor.offset + tensor.length, tensor.name)
    return tensors


def stored(file: Path, name: str, entry: dict[str, Any], body: int) -> Stored:
    """An entry of a header whose file's body begins at byte `body`. Raises what a wrong entry raises."""
    begin, end = int(entry["data_offsets"][0]), int(entry["data_offsets"][1])
    shape = tuple(int(n) for n in entry["shape"])
    return Stored(file, name, str(entry["dtype"]), shape, body + begin, end - begin)


def truncated(file: Path, size: int, needed: int, name: str = "") -> Dsv2Error:
    """What to say of a file of `size` bytes that must have `needed`, for the tensor `name` or its header."""
    where = f"tensor {name} ends" if name else "its header ends"
    return Dsv2Error(
        f"{file} is truncated",
        why=f"{where} at byte {needed:,}, the file has {size:,}",
        fix="download the file again",
    )


def map_file(file: Path) -> Tensor:
    """The bytes of a file without reading them; what is written to them stays in this
    process. [size] uint8
    """
    with file.open("rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
    return torch.frombuffer(mapped, dtype=torch.uint8)


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """The format of huggingface/safetensors, with what their writer does not promise: codes begin on a cache
    line.

    Raises OSError.
    """
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
    """Its bytes in order. Raises OSError."""
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    file.write(memoryview(flat.numpy()))  # type: ignore[arg-type]
