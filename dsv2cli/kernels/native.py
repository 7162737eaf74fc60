"""The C++ kernels as Python calls them: through ctypes, on tensors."""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from dsv2cli.formats import Coding
from dsv2cli.kernels import build
from dsv2cli.kernels.quantized import CODEBOOK, SHRINKS, TABLES, Quantized


class Kind(enum.IntEnum):
    """How a Matrix holds its weights: cpu/matrix.h's Kind."""

    NONE = 0
    INT4 = 4
    INT8 = 8
    FLOAT8 = 9
    BF16 = 16


class Matrix(ctypes.Structure):
    """cpu/matrix.h's Matrix."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "supers")),
        *((name, ctypes.c_int64) for name in ("codes_stride", "scales_stride", "supers_stride")),
        *((name, ctypes.c_int32) for name in ("kind", "rows", "cols", "group", "number", "offset", "bias")),
        ("table", ctypes.c_int8 * 16),
        *((name, ctypes.c_int32) for name in ("least", "span")),
    ]


Parts = tuple[Tensor, Tensor, Tensor | None]  # codes, scales and supers of some blocks of rows
NUMBERS = ("BF16", "F16", "F32", "I8")  # cpu/matrix.h's Number
OFFSETS = ("", "added", "zero")  # and Offset


class AttentionPart(ctypes.Structure):
    """cpu/attention.h's Attention."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("norm", "q_a_norm", "kv_a_norm")),
        *((name, Matrix) for name in ("q_a", "q", "kv_a", "k_up", "v_up", "o")),
        *((name, ctypes.c_int32) for name in ("hidden", "heads", "nope", "rope", "value", "rank", "q_rank")),
        *((name, ctypes.c_float) for name in ("eps", "scale")),
    ]


class MlpPart(ctypes.Structure):
    """cpu/mlp.h's Mlp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("norm", "gate")),
        *((name, Matrix) for name in ("gate_up", "down", "shared_gate_up", "shared_down")),
        *((name, ctypes.c_int32) for name in ("hidden", "width", "shared_width", "experts", "top_k")),
        *((name, ctypes.c_int32) for name in ("groups", "top_groups", "normalise")),
        *((name, ctypes.c_float) for name in ("eps", "factor")),
        ("ahead", ctypes.c_int32),
    ]


class LayerParts(ctypes.Structure):
    """cpu/api.cpp's Layer."""

    _fields_ = [("attention", AttentionPart), ("mlp", MlpPart)]


class Pages(ctypes.Structure):
    """cpu/latents.h's Pages."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("layers", "rows")),
        ("page", ctypes.c_int64),
        ("bits", ctypes.c_int32),
    ]


class PageTables:
    """Where the latents of some tokens' sequences lie."""

    def __init__(self, layers: list[Tensor], bits: int, spans: list[tuple[list[int], int]]) -> None:
        """`layers` are those of a pool, of so many bits [pages, ...]; spans are pages and a number of tokens,
        for each of which they count.
        """
        tables = [(ctypes.c_int32 * len(pages))(*pages) for pages, _ in spans]
        self.layers = (ctypes.c_void_p * len(layers))(*(layer.data_ptr() for layer in layers))
        self.rows = (ctypes.c_void_p * sum(count for _, count in spans))(
            *(
                ctypes.addressof(table)
                for table, (_, count) in zip(tables, spans, strict=True)
                for _ in range(count)
            )
        )
        page = layers[0].stride(0) * layers[0].element_size()
        self.as_c = Pages(ctypes.addressof(self.layers), ctypes.addressof(self.rows), page, bits)
        self.held = tables  # as long as their addresses are


class Kernels:
    """The loaded library. Weights are bf16 or Quantized; activations are bf16, on the CPU, contiguous."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        library.dsv2_read.restype = ctypes.c_uint64
        self.path = build.name_of(library)

    def linear(self, weight: Tensor | Quantized) -> Callable[[Tensor], Tensor]:
        """x [..., cols] -> x times weight [rows, cols], both bf16."""
        table, rows = matrix(weight), weight.shape[-2]

        def product(x: Tensor) -> Tensor:
            x = x.contiguous()
            out = torch.empty(*x.shape[:-1], rows, dtype=torch.bfloat16)
            count, threads = x.numel() // x.shape[-1], torch.get_num_threads()
            self.library.dsv2_linear(ctypes.byref(table), pointer(x), count, pointer(out), threads)
            return out

        return product

    def layers(
        self, parts: ctypes.Array[LayerParts], x: Tensor, rotary: Tensor, lengths: Tensor, tables: PageTables
    ) -> None:
        """x [tokens, hidden] through all the layers of `parts`; it changes in place.

        rotary [tokens, 2, rope / 2]; lengths [tokens] in int32: token i is the last of the first lengths[i]
        in its pages.
        """
        assert len(tables.layers) == len(parts) and len(tables.rows) == len(x)
        given = (pointer(rotary), pointer(lengths), ctypes.byref(tables.as_c))
        self.library.dsv2_layers(parts, len(parts), 1, pointer(x), len(x), *given, torch.get_num_threads())

    def attention(
        self, part: AttentionPart, x: Tensor, to: Tensor, rotary: Tensor, lengths: Tensor, tables: PageTables
    ) -> None:
        """to [tokens, hidden] += attention of x, which it may be. The rest as for `layers`, of one layer."""
        assert len(tables.layers) == 1 and len(tables.rows) == len(x) == len(to)
        given = (pointer(rotary), pointer(lengths), ctypes.byref(tables.as_c))
        both = (pointer(x), pointer(to))
        self.library.dsv2_attention(ctypes.byref(part), *both, len(x), *given, torch.get_num_threads())

    def mlp(self, parts: ctypes.Array[LayerParts], x: Tensor) -> None:
        """x [tokens, hidden] += MLP or MoE, for each of `parts`, in place."""
        self.library.dsv2_layers(
            parts, len(parts), 0, pointer(x), len(x), None, None, None, torch.get_num_threads()
        )

    def feed(
        self, part: MlpPart, x: Tensor, index: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        """The MLP of x [tokens, hidden], or with index and weight [tokens, k] its experts' weighted sum.

        An expert below 0 is left out; no token names another one twice. -> [tokens, hidden]
        """
        x, out = x.contiguous(), torch.zeros_like(x)
        index = None if index is None else index.int().contiguous()
        weight = None if weight is None else weight.float().contiguous()
        chosen = (None, None) if index is None or weight is None else (pointer(index), pointer(weight))
        threads = torch.get_num_threads()
        self.library.dsv2_mlp(ctypes.byref(part), pointer(x), *chosen, pointer(out), len(x), threads)
        return out

    def pack(
        self, weight: Tensor, bits: int, group: int, codes: Tensor, scales: Tensor, threads: int = 1
    ) -> None:
        """The same as quantized.pack_reference, into codes and scales of its shapes. weight [rows, cols]"""
        wide = weight.float().contiguous()
        given = ((ctypes.c_float * len(SHRINKS))(*SHRINKS), len(SHRINKS), table_of(CODEBOOK))
        to = (pointer(codes), pointer(scales))
        self.library.dsv2_pack(pointer(wide), *wide.shape, bits, group, *given, *to, threads)

    def unpack(self, type: int, raw: Tensor, rows: int, weight: Quantized, parts: Parts) -> None:
        """Rows of GGUF blocks of a ggml type, raw [bytes], into codes, scales and supers of a weight."""
        codes, scales, supers = parts
        to = (pointer(codes), pointer(scales), None if supers is None else pointer(supers))
        given = (pointer(raw), rows, ctypes.byref(matrix(weight)))
        known = self.library.dsv2_unpack(type, *given, *to)
        assert known, f"ggml type {type}"

    def interleave(self, values: Tensor, coding: Coding, codes: Tensor) -> None:
        """As quantized.interleave, for codes alone. values [rows, cols] uint8 -> codes [blocks, bytes]"""
        values = values.contiguous()
        shape = (*values.shape, coding.bits, coding.group)
        self.library.dsv2_interleave(pointer(values), *shape, pointer(codes))

    def guesses(self) -> tuple[int, int]:
        """How many experts of a next layer were guessed since the library was loaded, and of these chosen."""
        counts = (ctypes.c_int64 * 2)()
        self.library.dsv2_guesses(counts)
        return counts[0], counts[1]

    def read(self, data: Tensor) -> None:
        """Read every byte of a tensor of any shape once, with all threads: what the memory can give."""
        count = ctypes.c_int64(data.numel() * data.element_size())
        self.library.dsv2_read(pointer(data), count, torch.get_num_threads())


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    """The address of a contiguous tensor of any shape."""
    return ctypes.c_void_p(tensor.data_ptr())


def matrix(weight: Tensor | Quantized | None) -> Matrix:
    """How C++ sees a weight [rows, cols] or a stack of them, or None. The weight must outlive it."""
    if weight is None:
        return Matrix(kind=Kind.NONE)
    rows, cols = weight.shape[-2:]
    stacked = len(weight.shape) == 3
    if isinstance(weight, Quantized):
        coding = weight.coding
        parts = (weight.codes, weight.scales, weight.supers)
        addresses = [None if part is None else part.data_ptr() for part in parts]
        strides = [
            part.stride(0) * part.element_size() if stacked and part is not None else 0 for part in parts
        ]
        kind = Kind.FLOAT8 if coding.table == "e4m3" else Kind(coding.bits)
        numbers = (NUMBERS.index(coding.scale), OFFSETS.index(coding.offset))
        bias = 128 if (coding.bits, coding.table) == (8, "plain") else 0
        values = tuple(map(int, TABLES[coding.table])) if coding.bits == 4 else ()
        sizes = (rows, cols, coding.group)
        return Matrix(*addresses, *strides, kind, *sizes, *numbers, bias, table_of(values), *span_of(values))
    lies_as_read = weight.dtype == torch.bfloat16 and weight.stride()[-2:] == (cols, 1)
    assert lies_as_read, "kernels read bf16 as it lies"
    stride = weight.stride(0) * weight.element_size() if stacked else 0
    return Matrix(weight.data_ptr(), None, None, stride, 0, 0, Kind.BF16, rows, cols)


def span_of(values: tuple[int, ...]) -> tuple[int, int]:
    """The smallest, and how far the largest is from it."""
    least = min(values, default=0)
    return least, max(values, default=0) - least


def table_of(values: Iterable[float]) -> ctypes.Array[ctypes.c_int8]:
    """Sixteen whole numbers, or none."""
    return (ctypes.c_int8 * 16)(*map(int, values))


def load(target: str = "native") -> tuple[Kernels | None, str]:
    """The kernels for a target, or None and the reason, as words to follow 'because'."""
    library, why = build.library(target)
    return (None if library is None else Kernels(library)), why
