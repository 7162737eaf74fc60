"""Checkpoints that mlx-lm has quantised, in its mode `affine`: 2 to 8 bits, a scale and a bias for a group.

Of a layer [out, in]: weight uint32 [out, in * bits / 32], codes along a row, lowest bits first; scales and
biases [out, groups]; a weight is code * scale + bias. mlp.switch_mlp stacks experts, quantised or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from dsv2cli.checkpoint.formats.coded import Coded
from dsv2cli.checkpoint.formats.parts import (
    FLOATS,
    OTHER,
    Weights,
    add,
    length_of,
    one_of,
    partner,
    rows_of,
    sizes_of,
    unpack,
    unsupported,
    wrong,
)
from dsv2cli.checkpoint.safetensors import Stored
from dsv2cli.formats import Coding
from dsv2cli.kernels.quantized import Codes
from dsv2cli.model.config import COUNT

BITS, GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)
STACK, EXPERT = ".mlp.switch_mlp.", ".mlp.experts.{}."
BY_HEADS = (".embed_q.", ".unembed_out.")


def read(stored: dict[str, Stored], quantization: dict[str, Any], source: str) -> Weights:
    """All weights of a checkpoint by the names of an unquantised one: experts each by itself, and what is not
    quantised as it is.

    `quantization` is config.json's entry of this name, which may name modules that differ. Raises Dsv2Error
    for other modes, bits and groups, and for tensors that do not fit.
    """
    layout_of(quantization, source)
    weights: Weights = {}
    for name, tensor in stored.items():
        module, _, part = name.rpartition(".")
        if any(each in name for each in BY_HEADS):
            raise wrong(tensor, "attention whose kv_b_proj was split by heads is not read", OTHER)
        if part in ("scales", "biases"):
            continue
        matrices: Sequence[Stored | Coded] = [tensor]
        if part == "weight" and (tensor.dtype == "U32" or f"{module}.scales" in stored):
            layout = layout_of(settings_of(quantization, module, source), f"{source}: {module}")
            matrices = coded(stored, tensor, module, *layout)
        elif part == "weight" and STACK in name:
            sizes_of(tensor, FLOATS, 3)
            matrices = each_of(tensor)
        for expert, matrix in enumerate(matrices):
            add(weights, name.replace(STACK, EXPERT.format(expert)), matrix)
    return weights


def layout_of(settings: dict[str, Any], source: str) -> tuple[int, int]:
    """Bits, and columns that share a scale. Raises Dsv2Error."""
    one_of(settings, "mode", ("affine", None), source)
    return one_of(settings, "bits", BITS, source), one_of(settings, "group_size", GROUPS, source)


def settings_of(quantization: dict[str, Any], module: str, source: str) -> dict[str, Any]:
    """Those of a module: its own where it has some, else those of all. Raises Dsv2Error."""
    own = quantization.get(module, True)
    if own is True:
        return quantization
    if not isinstance(own, dict):
        raise unsupported(source, f"quantization.{module}", own, "its weights are quantised")
    return own


def each_of(tensor: Stored) -> list[Stored]:
    """The matrices of a stack of experts; a matrix that is none, by itself. Raises Dsv2Error for too many."""
    if len(tensor.shape) != 3:
        return [tensor]
    if tensor.shape[0] not in COUNT:
        raise wrong(tensor, f"it stacks {tensor.shape[0]:,} experts, and {COUNT.most:,} are the most")
    each = [tensor.slice_of(0, range(expert, expert + 1)) for expert in range(tensor.shape[0])]
    return [replace(one, shape=one.shape[1:]) for one in each]


def coded(stored: dict[str, Stored], tensor: Stored, module: str, bits: int, group: int) -> list[Coded]:
    """The matrix of a quantised weight, or all of a stack. Raises Dsv2Error."""
    *above, words = sizes_of(tensor, ("U32",), 3 if STACK in tensor.name else 2)
    cols = words * 32 // bits
    if cols % group or cols * bits != words * 32:
        why = f"{words} words a row are no whole groups of {group} codes of {bits} bits"
        raise wrong(tensor, why)
    shape = (*above, cols // group)
    scales = partner(stored, tensor, f"{module}.scales", FLOATS, shape)
    biases = partner(stored, tensor, f"{module}.biases", (scales.dtype,), shape)
    parts = zip(each_of(tensor), each_of(scales), each_of(biases), strict=True)
    return [Matrix(*three, bits, group).coded(f"mlx {bits}-bit") for three in parts]


@dataclass(frozen=True)
class Matrix:
    """The tensors of a layer, or of one expert's."""

    weight: Stored
    scales: Stored
    biases: Stored
    bits: int
    group: int

    def coded(self, kind: str) -> Coded:
        """Codes of 2 and 3 bits in 4, and of 5 and 6 in 8."""
        coding = Coding(4 if self.bits <= 4 else 8, self.group, "plain", self.scales.dtype, "added")
        rows, words = self.weight.shape
        length = length_of(self.weight, self.scales, self.biases)
        shape = rows, words * 32 // self.bits
        return Coded(self.weight.file, self.weight.name, shape, coding, kind, length, self.read)

    def read(self, begin: int, end: int) -> Codes:
        """Raises as read_bytes."""
        values = unpack(rows_of(self.weight, begin, end).view(torch.uint8), self.bits)
        return Codes(values, rows_of(self.scales, begin, end), rows_of(self.biases, begin, end))
