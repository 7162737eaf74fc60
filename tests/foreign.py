"""Checkpoints as other programs quantise them, written by the formats' published rules in plain torch.

Every write_* makes of a checkpoint's folder another one, quantised, and gives by name what each weight then
stands for, in fp32, computed from the numbers that were packed and not from the packed ones.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsv2cli.checkpoint.safetensors import INDEX, SINGLE, list_tensors

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight columns lies in each place of a word
Tensors = dict[str, Tensor]
Writer = Callable[
    [Tensor], tuple[Tensors, Tensor]
]  # weight -> its tensors by their last part, what they mean


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes of a row one behind the other, bit by bit, lowest first. [rows, n] -> int32 [rows, words]"""
    stream = (codes.long()[..., None] >> torch.arange(bits) & 1).flatten(1)  # [rows, bits of a row]
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[1] % 32)).unflatten(1, (-1, 32))
    return (stream << torch.arange(32)).sum(-1).to(torch.int32)


def each_column(numbers: Tensor, index: Tensor) -> Tensor:
    """A group's number for each of its columns: [rows, groups], index [cols] -> [rows, cols] fp32"""
    return numbers.float()[:, index]


def index_of(cols: int, group: int, act_order: bool = False) -> Tensor:
    """The group of every column."""
    index = torch.arange(cols) // (group if group > 0 else cols)
    return index[torch.randperm(cols, generator=torch.Generator().manual_seed(cols))] if act_order else index


def extremes(weight: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """The least and largest of each group, of which one is not above and one not below 0: [rows, groups]"""
    groups = [weight[:, index == group] for group in range(int(index.max()) + 1)]
    least = torch.stack([each.amin(1) for each in groups], 1).clamp(max=0)
    return least, torch.stack([each.amax(1) for each in groups], 1).clamp(min=0)


def quantise(weight: Tensor, index: Tensor, bits: int, sym: bool, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """To nearest by the extremes of groups. Codes [rows, cols], scales and zeros [rows, groups], and the
    weights that they mean, (code - zero) * scale.
    """
    weight = weight.float()
    least, largest = extremes(weight, index)
    top, middle = 2**bits - 1, 2 ** (bits - 1)
    reach = torch.maximum(-least, largest) / (middle - 1) if sym else (largest - least) / top
    scales = reach.clamp(min=1e-4).to(dtype)
    zeros = torch.full_like(least, middle) if sym else (-least / scales.float()).round().clamp(0, top)
    step, zero = each_column(scales, index), each_column(zeros, index)
    codes = ((weight / step).round() + zero).clamp(0, top)
    return codes.int(), scales, zeros.int(), (codes - zero) * step


def awq(weight: Tensor, group: int, dtype: torch.dtype = torch.float16) -> tuple[Tensors, Tensor]:
    """AutoAWQ, layout gemm."""
    index = index_of(weight.shape[1], group)
    codes, scales, zeros, means = quantise(weight, index, 4, False, dtype)

    def words(numbers: Tensor) -> Tensor:  # [rows, n] -> [n, rows / 8]
        placed = numbers.t().unflatten(1, (-1, 8))[..., AWQ_ORDER]
        return pack(placed.flatten(1), 4)

    return {"qweight": words(codes), "qzeros": words(zeros), "scales": scales.t()}, means


def gptq(
    weight: Tensor,
    bits: int,
    group: int,
    sym: bool,
    act_order: bool = False,
    version: int = 1,
    dtype: torch.dtype = torch.float16,
) -> tuple[Tensors, Tensor]:
    """AutoGPTQ, and GPTQModel's second version."""
    cols = weight.shape[1]
    index = index_of(cols, group, act_order)
    codes, scales, zeros, means = quantise(weight, index, bits, sym, dtype)
    packed = pack(zeros.t(), bits)
    if version == 1:  # 1 is taken from whole words
        packed = (packed.long() - sum(1 << at for at in range(0, 32, bits))).to(torch.int32)
    tensors = {"qweight": pack(codes, bits).t(), "qzeros": packed, "scales": scales.t(), "g_idx": index.int()}
    return tensors, means


def fp8(weight: Tensor, how: str, block: tuple[int, int] = (128, 128)) -> tuple[Tensors, Tensor]:
    """AutoFP8 and DeepSeek's blocks: `how` is tensor, channel or block."""
    rows, cols = weight.shape
    high, wide = {"tensor": (rows, cols), "channel": (1, cols), "block": block}[how]
    across, down = torch.arange(cols) // wide, torch.arange(rows) // high
    _, by_row = extremes(weight.float().abs(), across)
    scales = extremes(by_row.t(), down)[1].t().clamp(min=1e-4) / 448  # [tiles down, tiles across]
    steps = scales[down][:, across]
    floats = (weight.float() / steps).to(torch.float8_e4m3fn)
    name = "weight_scale_inv" if how == "block" else "weight_scale"
    return {"weight": floats, name: scales.view(1) if how == "tensor" else scales}, floats.float() * steps


def packed_int(
    weight: Tensor,
    bits: int,
    group: int,
    sym: bool,
    act_order: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensors, Tensor]:
    """compressed-tensors, pack-quantized; a group of -1 is a row."""
    cols = weight.shape[1]
    index = index_of(cols, group, act_order)
    codes, scales, zeros, means = quantise(weight, index, bits, sym, dtype)
    tensors = {
        "weight_packed": pack(codes, bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor(weight.shape),
    }
    if not sym:
        tensors["weight_zero_point"] = pack(zeros.t(), bits).t()
    if act_order:
        tensors["weight_g_idx"] = index.int()
    return tensors, means


def plain_int8(
    weight: Tensor, group: int, sym: bool = True, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensors, Tensor]:
    """compressed-tensors, int-quantized."""
    codes, scales, zeros, means = quantise(weight, index_of(weight.shape[1], group), 8, sym, dtype)
    tensors = {"weight": (codes - 128).to(torch.int8), "weight_scale": scales}
    if not sym:
        tensors["weight_zero_point"] = (zeros - 128).to(torch.int8)
    return tensors, means


def mlx(weight: Tensor, bits: int, group: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensors, Tensor]:
    """mlx's affine mode: code * scale + bias."""
    weight = weight.float()
    index = index_of(weight.shape[1], group)
    least, largest = extremes(weight, index)
    scales, biases = ((largest - least) / (2**bits - 1)).clamp(min=1e-4).to(dtype), least.to(dtype)
    step, bias = each_column(scales, index), each_column(biases, index)
    codes = ((weight - bias) / step).round().clamp(0, 2**bits - 1)
    tensors = {"weight": pack(codes, bits).view(torch.uint32), "scales": scales, "biases": biases}
    return tensors, codes * step + bias


def linear(name: str, weight: Tensor) -> bool:
    """Whether AWQ and GPTQ quantise it: all linear layers but lm_head, and not the router."""
    return name.endswith("_proj.weight") or name.endswith("_with_mqa.weight")


def load(folder: Path) -> Tensors:
    """All tensors of a checkpoint."""
    files = {tensor.file for tensor in list_tensors(folder).values()}
    return {name: tensor for file in sorted(files) for name, tensor in load_file(file).items()}


def convert(
    tensors: Tensors, writer: Writer, wanted: Callable[[str, Tensor], bool]
) -> tuple[Tensors, Tensors, list[str]]:
    """Tensors as stored, what every weight then means in fp32, and the modules that stay as they are."""
    stored, means, left = {}, {}, []
    for name, weight in tensors.items():
        module = name.removesuffix(".weight")
        if not wanted(name, weight):
            stored[name], means[name] = weight, weight.float()
            left += [module] if weight.dim() == 2 else []
            continue
        parts, means[name] = writer(weight)
        stored |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
    return stored, means, left


def save(folder: Path, out: Path, tensors: Tensors, entries: dict[str, Any]) -> None:
    """The folder's other files, the tensors in one file, and config.json with these entries."""
    replaced = {tensor.file.name for tensor in list_tensors(folder).values()} | {INDEX, "config.json"}
    shutil.copytree(folder, out, ignore=lambda _, names: [name for name in names if name in replaced])
    config = json.loads((folder / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | entries, indent=2))
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, out / SINGLE, metadata={"format": "pt"})


def write_awq(folder: Path, out: Path, group: int = 32) -> Tensors:
    stored, means, _ = convert(load(folder), lambda weight: awq(weight, group), linear)
    entry = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": None,
    }
    save(folder, out, stored, {"quantization_config": entry})
    return means


def write_gptq(
    folder: Path,
    out: Path,
    bits: int = 4,
    group: int = 32,
    sym: bool = True,
    act_order: bool = False,
    version: int = 1,
) -> Tensors:
    def writer(weight: Tensor) -> tuple[Tensors, Tensor]:
        return gptq(weight, bits, group, sym, act_order, version)

    stored, means, _ = convert(load(folder), writer, linear)
    entry = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "sym": sym,
        "desc_act": act_order,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
        "lm_head": False,
    }
    save(folder, out, stored, {"quantization_config": entry})
    return means


def write_fp8(folder: Path, out: Path, how: str = "tensor") -> Tensors:
    """`how`: tensor, channel or block."""
    stored, means, left = convert(load(folder), lambda weight: fp8(weight, how, (32, 32)), linear)
    entry: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic", "ignored_layers": left}
    if how == "block":
        entry |= {"fmt": "e4m3", "weight_block_size": [32, 32]}
    if how == "tensor":
        entry["activation_scheme"] = "static"
        scales = [name for name in stored if name.endswith(".weight_scale")]
        stored |= {name.replace(".weight_", ".input_"): torch.ones(1) for name in scales}
    save(folder, out, stored, {"quantization_config": entry})
    return means


def weights_entry(**settings: Any) -> dict[str, Any]:
    """What config_groups says of weights."""
    common = {"type": "int", "symmetric": True, "dynamic": False, "group_size": None, "actorder": None}
    return common | {"observer": "minmax", "observer_kwargs": {}, "block_structure": None} | settings


COMPRESSED: dict[str, tuple[str, dict[str, Any], Writer]] = {
    "int4": (
        "pack-quantized",
        weights_entry(num_bits=4, strategy="group", group_size=16),
        lambda weight: packed_int(weight, 4, 16, True),
    ),
    "int4-asymmetric": (
        "pack-quantized",
        weights_entry(num_bits=4, strategy="group", group_size=16, symmetric=False),
        lambda weight: packed_int(weight, 4, 16, False),
    ),
    "int4-act-order": (
        "pack-quantized",
        weights_entry(num_bits=4, strategy="group", group_size=16, actorder="group"),
        lambda weight: packed_int(weight, 4, 16, True, act_order=True),
    ),
    "int8-packed": (
        "pack-quantized",
        weights_entry(num_bits=8, strategy="channel"),
        lambda weight: packed_int(weight, 8, -1, True),
    ),
    "int8": (
        "int-quantized",
        weights_entry(num_bits=8, strategy="channel"),
        lambda weight: plain_int8(weight, -1),
    ),
    "fp8": (
        "float-quantized",
        weights_entry(num_bits=8, type="float", strategy="channel"),
        lambda weight: fp8(weight, "channel"),
    ),
    "fp8-tensor": (
        "naive-quantized",
        weights_entry(num_bits=8, type="float", strategy="tensor"),
        lambda weight: fp8(weight, "tensor"),
    ),
}


def write_compressed(folder: Path, out: Path, kind: str = "int4") -> Tensors:
    """`kind` is a key of COMPRESSED. Layers that a group does not divide stay as they are."""
    format, weights, writer = COMPRESSED[kind]
    group = weights["group_size"] or 1

    def wanted(name: str, weight: Tensor) -> bool:
        return linear(name, weight) and weight.shape[1] % group == 0

    stored, means, left = convert(load(folder), writer, wanted)
    activations = None
    if format != "pack-quantized":
        activations = {"num_bits": 8, "type": weights["type"], "strategy": "token", "dynamic": True}
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    entry = {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme | {"output_activations": None}},
        "kv_cache_scheme": None,
        "ignore": left,
    }
    save(folder, out, stored, {"quantization_config": entry})
    return means


def write_mlx(folder: Path, out: Path, bits: int = 4, group: int = 32) -> Tensors:
    """Embeddings and lm_head too, but not the router, nor layers that the group does not divide."""

    def wanted(name: str, weight: Tensor) -> bool:
        named = linear(name, weight) or name in ("model.embed_tokens.weight", "lm_head.weight")
        return named and weight.shape[1] % group == 0

    stored, means, _ = convert(load(folder), lambda weight: mlx(weight, bits, group), wanted)
    entry = {"group_size": group, "bits": bits, "mode": "affine"}
    save(folder, out, stacked(stored), {"quantization": entry, "quantization_config": entry})
    return means


def stacked(tensors: Tensors) -> Tensors:
    """The tensors of experts in one for each layer, as mlx-lm keeps them."""
    out, stacks = {}, {}
    for name, tensor in tensors.items():
        above, found, below = name.partition(".mlp.experts.")
        if not found:
            out[name] = tensor
            continue
        expert, _, part = below.partition(".")
        stacks.setdefault(f"{above}.mlp.switch_mlp.{part}", {})[int(expert)] = tensor
    for name, experts in stacks.items():
        whole = torch.stack([experts[each].contiguous().view(torch.uint8) for each in sorted(experts)])
        out[name] = whole.view(experts[0].dtype)
    return out
