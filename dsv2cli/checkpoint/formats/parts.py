"""What readers of foreign formats share: settings and partners checked, codes unpacked, scales laid out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dsv2cli.checkpoint.formats.coded import Coded, read_stored
from dsv2cli.checkpoint.safetensors import MAPPED, Stored
from dsv2cli.errors import Dsv2Error
from dsv2cli.formats import Coding
from dsv2cli.kernels.quantized import SCALES, Codes
from dsv2cli.model.config import SIZE, not_implemented
from dsv2cli.outside import AGAIN

GROUPS = (128, 64, 32, 16)  # columns that may share a scale in our kernels
FLOATS = ("BF16", "F16", "F32")
WHOLE = ("I32", "I64")
NUMBERS = MAPPED | {"I32": torch.int32, "U32": torch.int32, "I64": torch.int64, "F8_E4M3": torch.uint8}
OTHER = "take the model unquantised, or quantised in another way"

Weights = dict[str, Stored | Coded]


def unsupported(source: str, key: str, value: Any, why: str) -> Dsv2Error:
    """What to say of a setting of config.json that is not read here."""
    error = not_implemented(source, key, value, why)
    return Dsv2Error(error.what, why=error.why, fix=OTHER)


def wrong(tensor: Stored, why: str, fix: str = AGAIN) -> Dsv2Error:
    """What to say of a tensor that is not what its format makes it."""
    return Dsv2Error(f"{tensor.file}: tensor {tensor.name} cannot be read", why=why, fix=fix)


def one_of(settings: dict[str, Any], key: str, allowed: tuple[Any, ...], source: str) -> Any:
    """settings[key], where None stands for nothing, which must be one of `allowed`. Raises Dsv2Error."""
    value = settings.get(key)
    if not any(type(value) is type(each) and value == each for each in allowed):
        names = ", ".join(str(each) for each in allowed if each is not None) or "null"
        raise unsupported(source, key, value, f"only {names} is read")
    return value


def group_of(settings: dict[str, Any], key: str, source: str) -> int:
    """How many columns share a scale; 0, which files write as -1, for whole rows. Raises Dsv2Error."""
    value = settings.get(key)
    if type(value) is int and (value in SIZE or value == -1):
        return max(value, 0)
    raise unsupported(source, key, value, f"it must be -1, or {SIZE}")


def block_of(settings: dict[str, Any], key: str, source: str) -> tuple[int, int] | None:
    """Rows and columns of a block that shares a scale; None where none is named. Raises Dsv2Error."""
    value = settings.get(key)
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2 or not all(size in SIZE for size in value):
        raise unsupported(source, key, value, f"it must be two sizes, each {SIZE}")
    return value[0], value[1]


def object_of(settings: dict[str, Any], key: str, source: str) -> dict[str, Any]:
    """An object within the settings; empty where there is none. Raises Dsv2Error for anything else."""
    value = settings.get(key)
    if value is not None and not isinstance(value, dict):
        raise unsupported(source, key, value, "it must be an object")
    return value or {}


def add(weights: Weights, name: str, weight: Stored | Coded) -> None:
    """Raises Dsv2Error where there is one of this name already."""
    if name in weights:
        raise Dsv2Error(f"{weight.file} holds {name} twice", why="once plain and once quantised", fix=AGAIN)
    weights[name] = weight


def gather(
    stored: dict[str, Stored], coded: Callable[[str, str, Stored], Coded | None], consumed: tuple[str, ...]
) -> Weights:
    """Every matrix that `coded` makes of a module, the last part of a tensor's name, and the tensor; and the
    tensors that are neither one nor `consumed` by their last part.
    """
    weights: Weights = {}
    for name, tensor in stored.items():
        module, _, part = name.rpartition(".")
        if (matrix := coded(module, part, tensor)) is not None:
            add(weights, matrix.name, matrix)
        elif part not in consumed:
            add(weights, name, tensor)
    return weights


def sizes_of(tensor: Stored, dtypes: tuple[str, ...], dims: int = 2) -> tuple[int, ...]:
    """Its shape. Raises Dsv2Error for another type, number of dimensions, or sizes that no model has."""
    if tensor.dtype not in dtypes:
        raise wrong(tensor, f"its type is {tensor.dtype}, and must be {' or '.join(dtypes)}")
    if len(tensor.shape) != dims or not all(size in SIZE for size in tensor.shape):
        raise wrong(tensor, f"its shape is {list(tensor.shape)}, and must be {dims} sizes, each {SIZE}")
    return tensor.shape


def partner(
    stored: dict[str, Stored], of: Stored, name: str, dtypes: tuple[str, ...], *shapes: tuple[int, ...]
) -> Stored:
    """The tensor of this name, which `of` cannot be read without; of any shape where none is named.

    Raises Dsv2Error where it is missing, or has another type or shape.
    """
    tensor = stored.get(name)
    if tensor is None:
        raise Dsv2Error(
            f"{of.file} lacks the tensor {name}", why=f"{of.name} cannot be read without it", fix=AGAIN
        )
    if tensor.dtype not in dtypes:
        raise wrong(tensor, f"its type is {tensor.dtype}, and must be {' or '.join(dtypes)}")
    if shapes and tensor.shape not in shapes:
        allowed = " or ".join(str(list(shape)) for shape in shapes)
        raise wrong(tensor, f"its shape is {list(tensor.shape)}, and must be {allowed}")
    return tensor


def length_of(*tensors: Stored | None) -> int:
    """Bytes in files."""
    return sum(tensor.length for tensor in tensors if tensor is not None)


def numbers_of(tensor: Stored) -> Tensor:
    """A whole tensor. Raises as read_bytes."""
    return read_stored(tensor, NUMBERS)


def rows_of(tensor: Stored, begin: int, end: int) -> Tensor:
    """Some rows of a tensor [end - begin, ...]. Raises as read_bytes."""
    return numbers_of(tensor.slice_of(0, range(begin, end)))


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Codes of `bits` that lie one behind the other, lowest bits first. packed [..., bytes] uint8, a multiple
    of `bits` where they are not 4 or 8 -> [..., codes] uint8, a code a byte
    """
    if bits == 8:
        return packed
    if bits == 4:
        pairs = packed.to(
            torch.int16
        )  # whose two bytes become the two codes: faster than bytes by themselves
        return ((pairs & 15) | ((pairs & 240) << 4)).view(torch.uint8)
    runs = packed.unflatten(-1, (-1, bits))  # of eight codes each

    def code(first: int) -> Tensor:  # the one whose lowest bit is bit `first` of each run
        byte, shift = divmod(first, 8)
        low = runs[..., byte] >> shift
        both = low | runs[..., byte + 1] << 8 - shift if shift + bits > 8 else low
        return both & (1 << bits) - 1

    return torch.stack([code(each * bits) for each in range(8)], -1).flatten(-2)


def unpack_across(words: Tensor, bits: int) -> Tensor:
    """Codes that lie in words down the columns. words [n, cols] int32 -> [cols, n * 32 / bits] uint8"""
    return unpack(bytes_across(words), bits)


def bytes_across(words: Tensor) -> Tensor:
    """words [n, cols] int32 -> the bytes of each column's [cols, n * 4] uint8"""
    return words.t().clone(memory_format=torch.contiguous_format).view(torch.uint8)


def kernel_group(tensor: Stored, width: int, cols: int) -> int:
    """The largest group of our kernels of which the `width` columns of a scale, 0 for all, hold whole ones.

    Raises Dsv2Error where there is none.
    """
    if not width or cols <= width:
        return min((group for group in GROUPS if group >= cols), default=GROUPS[0])
    fitting = [group for group in GROUPS if width % group == 0]
    if not fitting:
        raise wrong(tensor, f"{width} columns share a scale, which must be a multiple of {GROUPS[-1]}", OTHER)
    return fitting[0]


def spread(scales: Tensor, width: int, cols: int, group: int) -> Tensor:
    """Scales of `width` columns each, or of whole rows for 0, as scales of `group` columns.

    scales [rows, ceil(cols / width)] -> [rows, ceil(cols / group)]
    """
    at = torch.arange(-(-cols // group)) * group // (width or cols)
    return scales[:, at]


@dataclass(frozen=True)
class Tiles:
    """Where the scales of a matrix apply: each to `height` rows and `width` columns, 0 for all of them."""

    height: int
    width: int
    cols: int
    group: int  # columns that share a scale in our kernels

    def rows(self, tensor: Stored, begin: int, end: int) -> Tensor:
        """The scales of some rows of the matrix, from those of all tiles. -> [end - begin, tiles of a row]"""
        table = replace(tensor, shape=(*tensor.shape, 1, 1)[:2])
        if not self.height:
            return numbers_of(table).expand(end - begin, -1)
        first = begin // self.height
        scales = rows_of(table, first, -(-end // self.height))
        return scales[torch.arange(begin, end) // self.height - first]

    def spread(self, scales: Tensor) -> Tensor:
        """What `rows` gives, for groups of our kernels. -> [rows, groups]"""
        return spread(scales, self.width, self.cols, self.group)


def find_tiles(
    weight: Stored, shape: tuple[int, ...], scale: Stored, candidates: Iterable[tuple[int, int]]
) -> Tiles:
    """The one among heights and widths of tiles, 0 for all, that the shape of a matrix's scales agrees with.

    Raises Dsv2Error where there is none, or several that differ.
    """
    rows, cols = shape
    found: dict[tuple[int, int], tuple[int, int]] = {}
    for height, width in candidates:
        tile = min(height or rows, rows), min(width or cols, cols)
        grid = -(-rows // tile[0]), -(-cols // tile[1])
        fitting = [grid, grid[:1] if grid[1] == 1 else grid, () if grid == (1, 1) else grid]
        if scale.shape in fitting:
            found.setdefault(tile, (height, width))
    if len(found) != 1:
        how = "in more than one way" if found else "in no way that the configuration names"
        raise wrong(scale, f"its shape {list(scale.shape)} fits {weight.name} of {rows} x {cols} {how}")
    ((height, width),) = found.values()
    return Tiles(height, width, cols, kernel_group(weight, width, cols))


@dataclass(frozen=True)
class Bytes:
    """A matrix of one code a byte, e4m3 or int8, and its tiles' scales and perhaps zeros."""

    weight: Stored
    scale: Stored
    zero: Stored | None
    tiles: Tiles
    kind: str

    @property
    def coding(self) -> Coding:
        if self.weight.dtype == "F8_E4M3":
            return Coding(8, self.tiles.group, "e4m3", "F32")
        return Coding(8, self.tiles.group, "signed", self.scale.dtype, "zero" if self.zero else "")

    def read(self, begin: int, end: int) -> Codes:
        """Raises Dsv2Error for a float that is no number."""
        values = rows_of(self.weight, begin, end).view(torch.uint8)
        if self.weight.dtype != "F8_E4M3":
            values = values ^ 128
        elif bool((values & 127 == 127).any()):
            raise wrong(self.weight, "it holds a float that is no number (NaN)")
        dtype = SCALES[self.coding.scale]

        def shared(tensor: Stored) -> Tensor:
            return self.tiles.spread(self.tiles.rows(tensor, begin, end)).to(dtype)

        return Codes(values, shared(self.scale), None if self.zero is None else shared(self.zero))

    def coded(self) -> Coded:
        rows, cols = self.weight.shape
        length = length_of(self.weight, self.scale, self.zero)
        weight = self.weight
        return Coded(weight.file, weight.name, (rows, cols), self.coding, self.kind, length, self.read)


def group_index(tensor: Stored, groups: int) -> Tensor:
    """The group of every column [cols], where columns were ordered anew. Raises Dsv2Error, also for groups
    that are not there, and as read_bytes.
    """
    index = numbers_of(tensor).long()
    if bool((index < 0).any()) or bool((index >= groups).any()):
        raise wrong(tensor, f"it names groups of columns that are not among the {groups} there are")
    return index


def in_order(index: Tensor, width: int) -> bool:
    """Whether every `width` columns are a group, one behind the other; 0 for one group."""
    cols = len(index)
    return torch.equal(index, torch.arange(cols) // (width or cols))


def reordered(values: Tensor, zeros: Tensor | float, scales: Tensor, index: Tensor) -> Tensor:
    """Weights whose columns are in groups by an index. values [rows, cols]; zeros and scales [rows, groups];
    index [cols] -> [rows, cols] in fp32
    """
    if isinstance(zeros, Tensor):
        zeros = zeros.float()[:, index]
    return (values.float() - zeros) * scales.float()[:, index]
