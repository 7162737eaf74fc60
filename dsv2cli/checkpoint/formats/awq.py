"""Checkpoints of AutoAWQ in its layout `gemm`: 4 bits, a scale and a zero for a group of columns.

Of a layer [out, in]: qweight int32 [in, out / 8], qzeros int32 [groups, out / 8], scales [groups, out]; a
weight is (code - zero) * scale. Eight codes of a word lie in the order ORDER.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsv2cli.checkpoint.formats.coded import Coded
from dsv2cli.checkpoint.formats.parts import (
    FLOATS,
    Weights,
    gather,
    group_of,
    kernel_group,
    length_of,
    numbers_of,
    one_of,
    partner,
    sizes_of,
    spread,
)
from dsv2cli.checkpoint.safetensors import Stored
from dsv2cli.formats import Coding
from dsv2cli.kernels.quantized import SCALES, Codes

ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where in a word the code of each of eight rows lies
CONSUMED = ("qzeros", "scales", "g_idx")


def read(stored: dict[str, Stored], quantization: dict[str, Any], source: str) -> Weights:
    """All weights of a checkpoint by the names of an unquantised one; what is not quantised stays as it is.

    Whether there are zeros is seen by the tensors: without them, and with zero_point false, codes are less 8.
    Raises Dsv2Error for other settings than 4 bits in the layout gemm, and for tensors that do not fit.
    """
    one_of(quantization, "bits" if "bits" in quantization else "w_bit", (4,), source)
    width = group_of(quantization, "group_size" if "group_size" in quantization else "q_group_size", source)
    one_of(quantization, "version", ("gemm", "GEMM", None), source)
    one_of(quantization, "checkpoint_format", ("gemm", None), source)
    zeros = one_of(quantization, "zero_point", (True, False, None), source) is not False
    return gather(stored, partial(coded, stored, width, zeros), CONSUMED)


def coded(
    stored: dict[str, Stored], width: int, zeros: bool, module: str, part: str, tensor: Stored
) -> Coded | None:
    """The matrix of a module whose qweight this is; none for other tensors. Raises Dsv2Error."""
    if part != "qweight":
        return None
    cols, words = sizes_of(tensor, ("I32",))
    rows = words * 8
    groups = -(-cols // (width or cols))
    scales = partner(stored, tensor, f"{module}.scales", FLOATS, (groups, rows))
    qzeros = None
    if zeros or f"{module}.qzeros" in stored:
        qzeros = partner(stored, tensor, f"{module}.qzeros", ("I32",), (groups, words))
    group = kernel_group(tensor, width, cols)
    matrix = Matrix(tensor, qzeros, scales, width, group)
    return Coded(
        tensor.file,
        f"{module}.weight",
        (rows, cols),
        matrix.coding,
        "awq 4-bit",
        length_of(tensor, qzeros, scales),
        matrix.read,
        whole=True,
    )


@dataclass(frozen=True)
class Matrix:
    """The tensors of a layer; `width` columns share a scale, 0 for all."""

    qweight: Stored
    qzeros: Stored | None
    scales: Stored
    width: int
    group: int

    @property
    def coding(self) -> Coding:
        if self.qzeros is None:
            return Coding(4, self.group, "signed", self.scales.dtype)
        return Coding(4, self.group, "plain", self.scales.dtype, "zero")

    def read(self, begin: int, end: int) -> Codes:
        """Raises as read_bytes."""
        cols = self.qweight.shape[0]

        def by_row(numbers: Tensor) -> Tensor:  # [rows, groups] -> [rows, groups of our kernels]
            return spread(numbers, self.width, cols, self.group)

        values = unpack_ordered(numbers_of(self.qweight), begin, end)
        scales = by_row(numbers_of(self.scales)[:, begin:end].t())
        if self.qzeros is None:
            return Codes(values, scales)
        zeros = unpack_ordered(numbers_of(self.qzeros), begin, end).to(SCALES[self.scales.dtype])
        return Codes(values, scales, by_row(zeros))


def unpack_ordered(words: Tensor, begin: int, end: int) -> Tensor:
    """The codes of some rows, eight in a word. words [n, rows / 8] int32 -> [end - begin, n] uint8"""
    first = begin // 8
    some = words[:, first : -(-end // 8)].clone(memory_format=torch.contiguous_format).view(torch.uint8)
    across = some.t().contiguous().unflatten(0, (-1, 4))  # [words, 4, n]
    codes = torch.empty(len(across), 8, len(words), dtype=torch.uint8)
    for column, place in enumerate(ORDER):
        both = across[:, place // 2]
        codes[:, column] = both >> 4 if place % 2 else both & 15
    return codes.flatten(0, 1)[begin - first * 8 : end - first * 8]
