"""Checkpoints of compressed-tensors, as llm-compressor writes them: packed integers, int8, and 8-bit floats.

pack-quantized: weight_packed int32 [out, ceil(in * bits / 32)], codes along a row, lowest bits first, each
the integer plus 2^(bits - 1); weight_shape [2]; weight_scale; perhaps weight_zero_point, packed likewise down
the columns, or int8; perhaps weight_g_idx [in], the group of each column. int-, float- and naive-quantized:
weight I8 or F8_E4M3, weight_scale, perhaps weight_zero_point. A weight is (integer - zero) * scale. A scale
is of the whole matrix, of a row, of a group of columns, or of a block.

Only weights are read: how activations and the cache were to be rounded is left out, which is more exact.
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
    WHOLE,
    Bytes,
    Tiles,
    Weights,
    block_of,
    find_tiles,
    gather,
    group_index,
    group_of,
    in_order,
    length_of,
    numbers_of,
    object_of,
    one_of,
    partner,
    reordered,
    rows_of,
    sizes_of,
    unpack,
    unpack_across,
    unsupported,
    wrong,
)
from dsv2cli.checkpoint.safetensors import Stored
from dsv2cli.formats import Coding
from dsv2cli.kernels.quantized import Codes
from dsv2cli.model.config import SIZE

FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
STRATEGIES = ("tensor", "channel", "group", "block")
ORDERS = ("weight", "static", "group", "dynamic", False, None)
CONSUMED = (
    "weight_scale",
    "weight_zero_point",
    "weight_shape",
    "weight_g_idx",
    "input_scale",
    "input_zero_point",
    "k_scale",
    "v_scale",
    "q_scale",
)


@dataclass(frozen=True)
class Scheme:
    """How some of the weights are quantised; which, is seen by their types and shapes."""

    bits: int
    float: bool
    tile: tuple[int, int]  # rows and columns that share a scale, 0 for all
    symmetric: bool


def read(stored: dict[str, Stored], quantization: dict[str, Any], source: str) -> Weights:
    """All weights of a checkpoint by the names of an unquantised one; what is not quantised stays as it is.

    The small weight_shape and weight_g_idx are read. Raises Dsv2Error for formats and settings that are not
    read here, for tensors that do not fit them, and as read_bytes.
    """
    schemes = schemes_of(quantization, source)
    return gather(stored, partial(coded, stored, schemes), CONSUMED)


def schemes_of(quantization: dict[str, Any], source: str) -> list[Scheme]:
    """Raises Dsv2Error."""
    one_of(quantization, "format", (*FORMATS, "mixed-precision", None), source)
    for key in ("sparsity_config", "transform_config"):
        value = object_of(quantization, key, source)
        if value and value.get("format") != "dense":
            raise unsupported(source, key, value, "it changes what the weights mean")
    groups = object_of(quantization, "config_groups", source)
    if not groups:
        raise unsupported(source, "config_groups", None, "it must say how the weights are quantised")
    return [scheme_of(group, f"config_groups.{name}", source) for name, group in groups.items()]


def scheme_of(group: Any, name: str, source: str) -> Scheme:
    """An entry of config_groups. Raises Dsv2Error."""
    if not isinstance(group, dict):
        raise unsupported(source, name, group, "it must be an object")
    one_of(group, "format", (*FORMATS, None), f"{source}: {name}")
    if group.get("output_activations") is not None:
        raise unsupported(
            source, f"{name}.output_activations", group["output_activations"], "only null is read"
        )
    weights = object_of(group, "weights", f"{source}: {name}")
    if not weights:
        raise unsupported(source, f"{name}.weights", None, "it must say how the weights are quantised")
    where = f"{source}: {name}.weights"
    floats = one_of(weights, "type", ("int", "float", None), where) == "float"
    bits = one_of(weights, "num_bits", (8,) if floats else (4, 8), where)
    one_of(weights, "dynamic", (False, None), where)
    one_of(weights, "actorder", ORDERS, where)
    symmetric = one_of(weights, "symmetric", (True, False, None), where) is not False
    return Scheme(bits, floats, tile_of(weights, where), symmetric)


def tile_of(weights: dict[str, Any], source: str) -> tuple[int, int]:
    """Rows and columns that share a scale, 0 for all. Raises Dsv2Error."""
    strategy = one_of(weights, "strategy", (*STRATEGIES, None), source)
    group = 0 if weights.get("group_size") is None else group_of(weights, "group_size", source)
    block = block_of(weights, "block_structure", source)
    if strategy == "group" or (strategy is None and group):
        if not group:
            raise unsupported(source, "group_size", weights.get("group_size"), f"it must be {SIZE}")
        return 1, group
    if strategy == "block":
        if block is None:
            raise unsupported(source, "block_structure", None, "strategy block needs it")
        return block
    channel = strategy == "channel" or (strategy is None and weights.get("group_size") == -1)
    return (1, 0) if channel else (0, 0)


def coded(
    stored: dict[str, Stored], schemes: list[Scheme], module: str, part: str, tensor: Stored
) -> Coded | None:
    """The matrix of a module whose quantised weight this is; none for other tensors. Raises Dsv2Error."""
    scale = f"{module}.weight_scale"
    if part == "weight_packed":
        return packed(stored, schemes, module, tensor)
    if part != "weight" or (
        scale not in stored and tensor.dtype != "I8" and not tensor.dtype.startswith("F8")
    ):
        return None
    shape = sizes_of(tensor, ("I8", "F8_E4M3"))
    floats = tensor.dtype != "I8"
    fitting = [scheme for scheme in schemes if scheme.float == floats]
    tiles = find_tiles(
        tensor, shape, partner(stored, tensor, scale, FLOATS), [scheme.tile for scheme in fitting]
    )
    zero = zero_of(stored, module, tensor, fitting, [stored[scale].shape])
    if floats and zero is not None:
        raise wrong(zero, "floats of 8 bits have no zero point")
    kind = "compressed-tensors fp8" if floats else "compressed-tensors int8"
    return Bytes(tensor, stored[scale], zero, tiles, kind).coded()


def zero_of(
    stored: dict[str, Stored],
    module: str,
    tensor: Stored,
    schemes: list[Scheme],
    int8: list[tuple[int, ...]],
    int32: tuple[tuple[int, ...], ...] = (),
) -> Stored | None:
    """A matrix's zeros, of one of these shapes by type, where there are any or must be. Raises Dsv2Error."""
    name = f"{module}.weight_zero_point"
    if name not in stored and any(scheme.symmetric for scheme in schemes):
        return None
    if int32 and name in stored and stored[name].dtype == "I32":
        return partner(stored, tensor, name, ("I32",), *int32)
    return partner(stored, tensor, name, ("I8", "I32") if int32 else ("I8",), *int8)


def packed(stored: dict[str, Stored], schemes: list[Scheme], module: str, tensor: Stored) -> Coded:
    """The matrix of a weight_packed. Raises Dsv2Error, and as read_bytes."""
    rows, words = sizes_of(tensor, ("I32",))
    cols = columns_of(partner(stored, tensor, f"{module}.weight_shape", WHOLE, (2,)), rows)
    fitting = [scheme for scheme in schemes if not scheme.float and -(-cols * scheme.bits // 32) == words]
    if len({scheme.bits for scheme in fitting}) != 1:
        raise wrong(tensor, f"its {words} words a row do not hold {cols} codes of bits that are configured")
    bits = fitting[0].bits
    scale = partner(stored, tensor, f"{module}.weight_scale", FLOATS)
    tiles = find_tiles(tensor, (rows, cols), scale, [scheme.tile for scheme in fitting])
    groups = -(-cols // (tiles.width or cols))
    zero = zero_of(stored, module, tensor, fitting, [scale.shape], ((-(-rows * bits // 32), groups),))
    if zero is not None and zero.dtype == "I32" and tiles.height != 1:
        raise wrong(zero, "packed zeros must be of rows or of groups")
    index = None
    if f"{module}.weight_g_idx" in stored:
        index = partner(stored, tensor, f"{module}.weight_g_idx", WHOLE, (cols,))
    anew = index is not None and orders_anew(index, groups, tiles.width)
    matrix = Packed(tensor, scale, zero, index if anew else None, bits, tiles)
    return Coded(
        tensor.file,
        f"{module}.weight",
        (rows, cols),
        None if anew else matrix.coding,
        f"compressed-tensors int{bits}" + (" act-order" if anew else ""),
        length_of(tensor, scale, zero, index),
        matrix.read_reordered if anew else matrix.read,
        anew=anew,
    )


def columns_of(shape: Stored, rows: int) -> int:
    """The columns that a weight_shape names. Raises as read_bytes, and Dsv2Error for other rows."""
    named = numbers_of(shape).tolist()
    if named[0] != rows or named[1] not in SIZE:
        raise wrong(shape, f"it says {named[0]:,} x {named[1]:,}, and there are {rows:,} rows")
    return int(named[1])


def orders_anew(index: Stored, groups: int, width: int) -> bool:
    """Whether the groups of columns do not lie together. A -1 says that they do. Raises as group_index."""
    found = numbers_of(index)
    return not bool((found == -1).all()) and not in_order(group_index(index, groups), width)


@dataclass(frozen=True)
class Packed:
    """The tensors of a matrix of packed integers; `g_idx` where its groups do not lie together."""

    weight: Stored
    scale: Stored
    zero: Stored | None
    g_idx: Stored | None
    bits: int
    tiles: Tiles

    @property
    def middle(self) -> int:
        return 1 << self.bits - 1

    @property
    def coding(self) -> Coding:
        """Codes of 4 bits with a zero mean themselves, and so do zeros; else they are less the middle."""
        table = "plain" if self.bits == 4 and self.zero is not None else "signed"
        offset = "zero" if self.zero is not None else ""
        return Coding(self.bits, self.tiles.group, table, self.scale.dtype, offset)

    def read(self, begin: int, end: int) -> Codes:
        """Raises as read_bytes."""
        values = self.values(begin, end)
        scales = self.tiles.spread(self.tiles.rows(self.scale, begin, end))
        if self.zero is None:
            return Codes(values, scales)
        zeros = self.zeros(self.zero, begin, end) + (self.middle if self.coding.table == "plain" else 0)
        return Codes(values, scales, self.tiles.spread(zeros).to(scales.dtype))

    def read_reordered(self, begin: int, end: int) -> Tensor:
        """Weights [rows, cols] in fp32. Raises as read_bytes, and Dsv2Error for groups that are not there."""
        assert self.g_idx is not None
        scales = self.tiles.rows(self.scale, begin, end)
        zeros = 0.0 if self.zero is None else self.zeros(self.zero, begin, end)
        values = self.values(begin, end).short() - self.middle
        return reordered(values, zeros, scales, group_index(self.g_idx, scales.shape[1]))

    def values(self, begin: int, end: int) -> Tensor:
        """[rows, cols] uint8, a code a byte"""
        packed = rows_of(self.weight, begin, end).view(torch.uint8)
        return unpack(packed, self.bits)[:, : self.tiles.cols].contiguous()

    def zeros(self, zero: Stored, begin: int, end: int) -> Tensor:
        """The integers that stand for 0 [rows, tiles of a row] int16"""
        if zero.dtype == "I8":
            return self.tiles.rows(zero, begin, end).short()
        return unpack_across(numbers_of(zero), self.bits)[:, begin:end].t().short() - self.middle
