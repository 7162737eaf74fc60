"""A weight as another program has packed it: its name here, its shape, its codes, and how to read them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dsv2cli.checkpoint.safetensors import MAPPED, Stored, read_into
from dsv2cli.formats import SUPER, Coding
from dsv2cli.kernels.quantized import Codes, decode

AT_ONCE = 2**19  # weights that a thread reads and unpacks at a time


@dataclass(frozen=True)
class Coded:
    """A matrix of a checkpoint. `read(begin, end)` gives some of its rows: codes of `coding`, or where that
    is None the numbers themselves [rows, cols], in any type.

    `kind` is what the format calls it, such as Q4_K. `whole`: it is read in one go, whatever its size.
    `raw`: the same rows as bytes of a ggml type, for kernels that unpack them. `anew`: numbers that are worth
    packing again, because no kernel reads their codes, whose columns are in another order.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    coding: Coding | None
    kind: str
    length: int  # bytes in files
    read: Callable[[int, int], Codes | Tensor]
    whole: bool = False
    offset: int = 0  # where it begins in the file, for reading in order
    raw: Callable[[int, int], Tensor] | None = None
    type: int = 0  # of ggml, of what `raw` gives
    anew: bool = False

    def pieces(self) -> list[tuple[int, int]]:
        """The runs of rows to read one after the other; all but the last are of whole blocks of 16. A vector
        is one row.
        """
        rows, cols = self.shape if len(self.shape) == 2 else (1, *self.shape)
        step = rows if self.whole else max(16, AT_ONCE // cols // 16 * 16)
        return [(begin, min(rows, begin + step)) for begin in range(0, rows, step)]

    def slice_of(self, dim: int, wanted: range) -> Coded:
        """Some of its rows (dim 0), or columns (dim 1), which begin where coding.columns do."""
        shape = list(self.shape)
        shape[dim] = len(wanted)
        length = self.length // self.shape[dim] * len(wanted)
        if dim == 0:

            def rows(begin: int, end: int) -> Codes | Tensor:
                return self.read(wanted.start + begin, wanted.start + end)

            def lying(begin: int, end: int) -> Tensor:
                assert self.raw is not None
                return self.raw(wanted.start + begin, wanted.start + end)

            raw = None if self.raw is None else lying
            return replace(self, shape=tuple(shape), length=length, read=rows, raw=raw)

        def some(begin: int, end: int) -> Codes | Tensor:
            read = self.read(begin, end)
            if isinstance(read, Tensor):
                return read[:, wanted.start : wanted.stop]
            assert self.coding is not None
            return columns(read, self.coding, wanted)

        return replace(self, shape=tuple(shape), length=length, read=some, raw=None)

    def weights(self, begin: int, end: int) -> Tensor:
        """Some rows as numbers, in fp32 where they were codes: what the format's own decoding gives."""
        return self.numbers(self.read(begin, end))

    def numbers(self, read: Codes | Tensor) -> Tensor:
        """What was read as numbers."""
        if isinstance(read, Tensor):
            return read
        assert self.coding is not None
        return decode(read, self.coding)


def columns(codes: Codes, coding: Coding, wanted: range) -> Codes:
    """Some columns of codes, which begin where coding.columns do."""
    assert wanted.start % coding.columns == 0

    def some(numbers: Tensor | None, each: int) -> Tensor | None:
        return None if numbers is None else numbers[:, wanted.start // each : -(-wanted.stop // each)]

    values, scales = some(codes.values, 1), some(codes.scales, coding.group)
    assert values is not None and scales is not None
    supers, super_offsets = some(codes.supers, SUPER), some(codes.super_offsets, SUPER)
    return Codes(values, scales, some(codes.offsets, coding.group), supers, super_offsets)


def read_bytes(file: Path, offset: int, length: int, name: str) -> Tensor:
    """Bytes of a file [length] uint8. Raises OSError, and Dsv2Error for a file that ends too soon."""
    out = torch.empty(length, dtype=torch.uint8)
    with file.open("rb", buffering=0) as stream:
        stream.seek(offset)
        read_into(stream, out, file, offset + length, name)
    return out


def read_stored(tensor: Stored, dtypes: dict[str, torch.dtype] = MAPPED) -> Tensor:
    """A whole tensor of a safetensors file in its own type and shape. Raises as read_bytes."""
    return (
        read_bytes(tensor.file, tensor.offset, tensor.length, tensor.name)
        .view(dtypes[tensor.dtype])
        .view(tensor.shape)
    )
