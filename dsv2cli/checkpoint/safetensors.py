"""Safetensors files as they lie: their headers, checked, and writing them. Format: huggingface/safetensors.

Pickle files are refused.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from dataclasses import dataclass, replace
from io import RawIOBase
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from dsv2cli.errors import Dsv2Error
from dsv2cli.hubs.shelf import INDEX, SINGLE
from dsv2cli.outside import AGAIN, parse_json, read_json, reason, require_file

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
MAPPED = DTYPES | {"U8": torch.uint8, "I8": torch.int8}
ITEM_BYTES = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "BF16": 2,
    "F16": 2,
    "I16": 2,
    "U16": 2,
}
ITEM_BYTES |= {"I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
LARGEST_NUMBER = 2**62
LARGEST_HEADER = 100_000_000  # bytes, as in the safetensors library
NAMES = {dtype: name for name, dtype in MAPPED.items()}
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
    if not os.path.lexists(index_path):
        single = folder / SINGLE
        if not os.path.lexists(single):
            raise no_safetensors(folder)
        return read_header(single)
    wanted = read_index(index_path)
    stored: dict[str, Stored] = {}
    placed: dict[str, set[str]] = {}
    for tensor, name in wanted.items():
        placed.setdefault(name, set()).add(tensor)
    for name, listed in sorted(placed.items()):
        file = folder / name
        if not os.path.lexists(file):
            raise Dsv2Error(f"{file} is missing", why=f"{INDEX} names it", fix=AGAIN)
        header = read_header(file)
        for tensor in sorted(listed - header.keys()):
            raise Dsv2Error(f"{file} lacks the tensor {tensor}", why=f"{INDEX} places it there")
        for tensor in sorted(header.keys() - listed):
            raise Dsv2Error(f"{file} holds the extra tensor {tensor}", why=f"{INDEX} does not place it there")
        stored |= header
    return stored


def read_index(path: Path) -> dict[str, str]:
    """Tensor -> file name. Raises Dsv2Error for what is no index, or names files elsewhere."""
    wanted = read_json(path).get("weight_map")
    if not isinstance(wanted, dict) or not all(isinstance(file, str) for file in wanted.values()):
        why = "its weight_map does not name a file for each tensor"
        raise Dsv2Error(f"{path} cannot be read", why=why, fix=AGAIN)
    for file in sorted(set(wanted.values())):
        if Path(file).name != file or "\0" in file:
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
    return Dsv2Error(f"{folder} holds no safetensors", why=f"neither {INDEX} nor {SINGLE} is there")


def read_header(file: Path) -> dict[str, Stored]:
    """The header of one safetensors file, whose tensors must tile the file without overlap or hole.

    Raises Dsv2Error.
    """
    refuse_foreign_link(file)
    try:
        size = require_file(file).st_size
        with file.open("rb") as stream:
            (header_size,) = struct.unpack("<Q", stream.read(8))
            if header_size > size - 8:
                raise truncated(file, size, header_size + 8)
            if header_size > LARGEST_HEADER:
                raise ValueError(f"{header_size:,} bytes are too many")
            header = parse_json(stream.read(header_size))
        if not isinstance(header, dict):
            raise ValueError("it is no JSON object")
        header.pop("__metadata__", None)
        body = 8 + header_size
        tensors = {name: stored(file, name, entry, body) for name, entry in header.items()}
    except (OSError, ValueError, struct.error) as error:
        why = f"its header is unreadable ({reason(error)})"
        raise Dsv2Error(f"{file} is not a safetensors file", why=why, fix=AGAIN) from None
    refuse_gaps(file, tensors, body, size)
    return tensors


def refuse_foreign_link(file: Path) -> None:
    """Raises Dsv2Error for a link that leads out of its folder, but for one into the blobs of the hub's
    cache, which lie beside its snapshots.
    """
    if file.is_symlink():
        folder, target = file.parent.resolve(), Path(os.path.realpath(file))
        homes = (folder, folder.parents[1] / "blobs") if len(folder.parents) > 1 else (folder,)
        if not any(home in target.parents for home in homes):
            why, fix = f"it is a link to {target}", "put the file itself there"
            raise Dsv2Error(f"{file} leads out of its folder", why=why, fix=fix)


def refuse_gaps(file: Path, tensors: dict[str, Stored], body: int, size: int) -> None:
    """Raises Dsv2Error unless the tensors lie one behind the other from byte `body` to the end, `size`."""
    end, before = body, "the header"
    for tensor in sorted(tensors.values(), key=lambda each: (each.offset, each.length)):
        if tensor.offset != end:
            what = "overlaps" if tensor.offset < end else "leaves a hole behind"
            why = f"it begins at byte {tensor.offset:,}, and {before} ends at {end:,}"
            raise Dsv2Error(f"{file}: tensor {tensor.name} {what} {before}", why=why, fix=AGAIN)
        end, before = tensor.offset + tensor.length, f"tensor {tensor.name}"
    if end > size:
        raise truncated(file, size, end, before.removeprefix("tensor "))
    if end < size:
        why = f"{before} ends at byte {end:,}, the file has {size:,}"
        raise Dsv2Error(f"{file} has bytes that belong to no tensor", why=why, fix=AGAIN)


def stored(file: Path, name: str, entry: Any, body: int) -> Stored:
    """An entry of a header whose file's body begins at byte `body`. Raises ValueError for a wrong one."""
    fields = entry if isinstance(entry, dict) else {}
    dtype = fields.get("dtype")
    shape: Any = fields.get("shape")
    offsets: Any = fields.get("data_offsets")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or [
            n for n in numbers if type(n) is not int or not 0 <= n < LARGEST_NUMBER
        ]:
            raise ValueError(f"tensor {name} has no proper shape or offsets")
    if len(offsets) != 2 or offsets[1] < offsets[0] or not isinstance(dtype, str):
        raise ValueError(f"tensor {name} has no proper type or offsets")
    length = offsets[1] - offsets[0]
    if dtype in ITEM_BYTES and length != math.prod(shape) * ITEM_BYTES[dtype]:
        raise ValueError(
            f"tensor {name} has {length:,} bytes, its type {dtype} and shape {shape} another number"
        )
    return Stored(file, name, dtype, tuple(shape), body + offsets[0], length)


def truncated(file: Path, size: int, needed: int, name: str = "") -> Dsv2Error:
    """What to say of a file of `size` bytes that must have `needed`, for the tensor `name` or its header."""
    where = f"tensor {name} ends" if name else "its header ends"
    return Dsv2Error(
        f"{file} is truncated", why=f"{where} at byte {needed:,}, the file has {size:,}", fix=AGAIN
    )


def read_into(stream: RawIOBase, target: Tensor, file: Path, end: int, name: str) -> None:
    """Fill a contiguous tensor on the CPU with a file's next bytes, which for the tensor `name` go on to byte
    `end`. Raises OSError, and Dsv2Error for a file that ends too soon.
    """
    view = memoryview(target.view(torch.uint8).numpy()).cast("B")  # type: ignore[arg-type]
    filled = 0
    while filled < len(view):
        count = stream.readinto(view[filled:])
        if not count:
            raise truncated(file, os.fstat(stream.fileno()).st_size, end, name)
        filled += count


def typed(data: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes [size] uint8 as numbers of another type; copied where the file does not align them."""
    return (data.clone() if data.data_ptr() % dtype.itemsize else data).view(dtype)


def map_file(file: Path) -> Tensor:
    """The bytes of a file without reading them; what is written to them stays in this
    process. [size] uint8
    """
    with file.open("rb") as opened:
        # Not reserved, or Linux refuses files that are larger than memory.
        flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
        mapped = mmap.mmap(opened.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
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
