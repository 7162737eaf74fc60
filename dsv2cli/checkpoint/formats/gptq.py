"""Checkpoints of AutoGPTQ and GPTQModel: 4 or 8 bits, a scale and a zero for a group of columns.

Of a layer [out, in]: qweight int32 [in * bits / 32, out], the codes of a column's words lowest bits first;
qzeros int32 [groups, out * bits / 32]; scales [groups, out]; g_idx [in], the group of each column. A weight
is (code - zero) * scale. The first version of the format stores zeros less 1, taken from whole words, so that
adding it to the words gives back what was there; the second stores them as they are.
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
    OTHER,
    WHOLE,
    Weights,
    gather,
    group_index,
    group_of,
    in_order,
    kernel_group,
    length_of,
    numbers_of,
    object_of,
    one_of,
    partner,
    reordered,
    sizes_of,
    spread,
    unpack,
    unpack_across,
    unsupported,
    wrong,
)
from dsv2cli.checkpoint.safetensors import Stored
from dsv2cli.formats import Coding
from dsv2cli.kernels.quantized import SCALES, Codes

CONSUMED = ("qzeros", "scales", "g_idx")
ONES = {4: 0x11111111, 8: 0x01010101}  # 1 in every code of a word


@dataclass(frozen=True)
class Settings:
    """What the configuration says; several groups and bits where it says it module by module."""

    bits: tuple[int, ...]
    widths: tuple[int, ...]  # columns that share a scale; 0 for all
    symmetric: bool  # every zero is in the middle
    ordered: bool  # columns may be grouped by g_idx
    less_one: bool  # zeros are stored less 1


def read(stored: dict[str, Stored], quantization: dict[str, Any], source: str) -> Weights:
    """All weights of a checkpoint by the names of an unquantised one; what is not quantised stays as it is.

    Where desc_act is true every g_idx is read: a matrix whose groups do not lie together has no coding here,
    and is read as numbers. Raises Dsv2Error for other bits and layouts, for tensors that do not fit, and as
    read_bytes.
    """
    return gather(stored, partial(coded, stored, settings_of(quantization, source)), CONSUMED)


def settings_of(quantization: dict[str, Any], source: str) -> Settings:
    """The settings, and those that `dynamic` gives some modules: which module has which is seen by its
    tensors' shapes.

    Raises Dsv2Error.
    """
    for key in ("checkpoint_format", "format"):
        one_of(quantization, key, ("gptq", "gptq_v2", None), source)
    one_of(quantization, "is_marlin_format", (False, None), source)
    one_of(quantization, "pack_dtype", ("int32", None), source)
    every = [quantization]
    for pattern, settings in object_of(quantization, "dynamic", source).items():
        if pattern.startswith("-:"):  # these modules are not quantised
            continue
        if not isinstance(settings, dict):
            raise unsupported(source, f"dynamic.{pattern}", settings, "it must be an object")
        every.append(quantization | settings)
    version = quantization.get("checkpoint_format") or quantization.get("format")
    return Settings(
        tuple({one_of(each, "bits", (4, 8), source) for each in every}),
        tuple({group_of(each, "group_size", source) for each in every}),
        all([one_of(each, "sym", (True, False, None), source) is not False for each in every]),
        any([one_of(each, "desc_act", (True, False, None), source) is True for each in every]),
        version != "gptq_v2",
    )


def coded(
    stored: dict[str, Stored], settings: Settings, module: str, part: str, tensor: Stored
) -> Coded | None:
    """The matrix of a module whose qweight this is; none for other tensors. Raises Dsv2Error."""
    if part != "qweight":
        return None
    words, rows = sizes_of(tensor, ("I32",))
    zeros = partner(stored, tensor, f"{module}.qzeros", ("I32",))
    groups, zero_words = sizes_of(zeros, ("I32",))
    bits = next((bits for bits in settings.bits if rows * bits == zero_words * 32), 0)
    if not bits:
        named = " or ".join(map(str, sorted(settings.bits)))
        raise wrong(zeros, f"its shape is {list(zeros.shape)}, which does not hold {named} bits a row")
    cols = words * 32 // bits
    scales = partner(stored, tensor, f"{module}.scales", FLOATS, (groups, rows))
    width = width_of(tensor, settings, cols, groups)
    index = None
    if settings.ordered or f"{module}.g_idx" in stored:
        index = partner(stored, tensor, f"{module}.g_idx", WHOLE, (cols,))
    anew = settings.ordered and index is not None and not in_order(group_index(index, groups), width)
    group = 0 if anew else kernel_group(tensor, width, cols)
    matrix = Matrix(tensor, zeros, scales, index, bits, width, group, settings.symmetric, settings.less_one)
    return Coded(
        tensor.file,
        f"{module}.weight",
        (rows, cols),
        None if anew else matrix.coding,
        "gptq act-order" if anew else f"gptq {bits}-bit",
        length_of(tensor, zeros, scales, index),
        matrix.read_reordered if anew else matrix.read,
        whole=True,
        anew=anew,
    )


def width_of(tensor: Stored, settings: Settings, cols: int, groups: int) -> int:
    """How many columns share a scale, by the number of groups; 0 for all. Raises Dsv2Error."""
    fitting = {width for width in settings.widths if -(-cols // (width or cols)) == groups}
    if groups == 1 and fitting:
        return 0
    if len(fitting) != 1:
        how = "in more than one way" if fitting else "by no group_size of the configuration"
        raise wrong(tensor, f"its {cols} columns are in {groups} groups {how}")
    return fitting.pop()


@dataclass(frozen=True)
class Matrix:
    """The tensors of a layer; `width` columns share a scale, 0 for all, and `group` in our kernels."""

    qweight: Stored
    qzeros: Stored
    scales: Stored
    g_idx: Stored | None
    bits: int
    width: int
    group: int
    symmetric: bool
    less_one: bool

    @property
    def middle(self) -> int:
        return 1 << self.bits - 1

    @property
    def coding(self) -> Coding:
        if self.symmetric:
            return Coding(self.bits, self.group, "signed", self.scales.dtype)
        table = "plain" if self.bits == 4 else "signed"
        return Coding(self.bits, self.group, table, self.scales.dtype, "zero")

    def read(self, begin: int, end: int) -> Codes:
        """Raises as read_bytes, and Dsv2Error where zeros or the order of columns are not what the
        configuration says.
        """
        values = self.values(begin, end)
        groups, cols = self.scales.shape[0], values.shape[1]
        if self.g_idx is not None and not in_order(group_index(self.g_idx, groups), self.width):
            raise wrong(self.g_idx, "it orders the columns anew, and desc_act is false", OTHER)

        def by_row(numbers: Tensor) -> Tensor:  # [groups, rows] -> [rows, groups of our kernels]
            return spread(numbers.t(), self.width, cols, self.group)

        scales, zeros = numbers_of(self.scales)[:, begin:end], self.zeros(begin, end)
        if self.symmetric:
            return Codes(values, by_row(scales))
        if self.bits == 8:  # the codes mean themselves less 128, and so do zeros
            zeros = zeros.short() - self.middle
        return Codes(values, by_row(scales), by_row(zeros.to(SCALES[self.scales.dtype])))

    def read_reordered(self, begin: int, end: int) -> Tensor:
        """Weights [rows, cols] in fp32 whose groups do not lie together. Raises as `read`."""
        assert self.g_idx is not None
        index = group_index(self.g_idx, self.scales.shape[0])
        scales = numbers_of(self.scales)[:, begin:end].t()
        return reordered(self.values(begin, end), self.zeros(begin, end).t(), scales, index)

    def values(self, begin: int, end: int) -> Tensor:
        """[rows, cols] uint8, a code a byte"""
        return unpack_across(numbers_of(self.qweight)[:, begin:end], self.bits)

    def zeros(self, begin: int, end: int) -> Tensor:
        """[groups, rows] uint8. Raises Dsv2Error where they must be in the middle and are not."""
        words = numbers_of(self.qzeros) + (ONES[self.bits] if self.less_one else 0)
        zeros = unpack(words.view(torch.uint8), self.bits)
        if self.symmetric and bool((zeros != self.middle).any()):
            raise wrong(self.qzeros, f"sym is true, and not every zero is {self.middle}", OTHER)
        return zeros[:, begin:end]
