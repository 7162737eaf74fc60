"""Checkpoints in 8-bit floats (quant_method fp8): F8_E4M3, scales of whole matrices, of rows, or of blocks.

weight_scale: [], [1], [out] or [out, 1]; weight_scale_inv [ceil(out / high), ceil(in / wide)] with
weight_block_size [high, wide]. A weight is the float times the scale, under both names. How activations were
to be rounded is left out: they stay as they are, which is more exact.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from dsv2cli.checkpoint.formats.coded import Coded
from dsv2cli.checkpoint.formats.parts import (
    FLOATS,
    Bytes,
    Weights,
    block_of,
    find_tiles,
    gather,
    one_of,
    partner,
    sizes_of,
    wrong,
)
from dsv2cli.checkpoint.safetensors import Stored

CONSUMED = (
    "weight_scale",
    "weight_scale_inv",
    "input_scale",
    "act_scale",
    "k_scale",
    "v_scale",
    "kv_scale",
    "q_scale",
)


def read(stored: dict[str, Stored], quantization: dict[str, Any], source: str) -> Weights:
    """All weights of a checkpoint by name; those that are no floats of 8 bits stay as they are.

    Raises Dsv2Error for other floats than e4m3, and for scales that are missing or do not fit.
    """
    one_of(quantization, "fmt", ("e4m3", "float8_e4m3fn", None), source)
    one_of(quantization, "activation_scheme", ("dynamic", "static", None), source)
    tiles = [(0, 0), (1, 0)]  # whole matrices, and rows
    if (block := block_of(quantization, "weight_block_size", source)) is not None:
        tiles.append(block)
    return gather(stored, partial(coded, stored, tiles), CONSUMED)


def coded(
    stored: dict[str, Stored], tiles: list[tuple[int, int]], module: str, part: str, tensor: Stored
) -> Coded | None:
    """The matrix of a module whose weight this is; none for other tensors. Raises Dsv2Error."""
    if part != "weight":
        return None
    name = f"{module}.weight_scale_inv"
    if name not in stored:
        name = f"{module}.weight_scale"
    if name not in stored and not tensor.dtype.startswith("F8"):
        return None
    shape = sizes_of(tensor, ("F8_E4M3",))
    scale = partner(stored, tensor, name, FLOATS)
    if name.endswith("_inv") and name.removesuffix("_inv") in stored:
        raise wrong(scale, "the matrix has a weight_scale, too")
    if name.endswith("_inv"):  # of blocks, where there are any: of two less one it could be a matrix's own
        tiles = tiles[2:] or tiles
    return Bytes(tensor, scale, None, find_tiles(tensor, shape, scale, tiles), "fp8 e4m3").coded()
