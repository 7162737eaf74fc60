"""Matrix times rows, the SiLU-gated MLP, and RMSNorm."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv2cli.kernels.quantized import Quantized

WIDENED_ROWS = 32  # rows from which a copy of the weights in fp32 is worth its time


@functools.cache
def one_row_by_mv() -> bool:
    """Whether this CPU has AMX. The question is private in torch, so an answer is not taken for granted."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())


@functools.cache
def multiplies_bf16() -> bool:
    """Whether torch has a matrix product in bf16 for this CPU (AVX-512 or more), and not just a loop.

    Private in torch, as above.
    """
    return bool(getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)())


def linear(x: Tensor, weight: Tensor | Quantized, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times weight [out, in], plus bias [out] -> [..., out].

    A single row on a CPU with AMX goes through matrix-vector: there it reads the weights 1.2-1.4x faster than
    torch's matrix product with one row, and reading the weights is all the work there is. On a Zen 5, which
    has AVX-512 but no AMX, the matrix product is the faster one, by 1.2-2x. Where a CPU has no product in
    bf16, many rows take one in fp32, rounded once: a Zen 3 is 2-6x as fast with that, copies of the weights
    counted.
    """
    if isinstance(weight, Quantized):
        weight = weight.dequantize(x.dtype)  # slow, and right: the fast road is native.py
    on_cpu, size = x.device.type == "cpu", x.shape[-1]
    if one_row_by_mv() and on_cpu and x.numel() == size > 0 and not torch.is_grad_enabled():
        out = torch.mv(weight, x.reshape(-1)).view(*x.shape[:-1], -1)
        return out if bias is None else out + bias
    many = x.numel() >= WIDENED_ROWS * size
    if x.dtype is torch.bfloat16 and on_cpu and many and not multiplies_bf16():
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).bfloat16()
    return F.linear(x, weight, bias)


def gated_mlp(x: Tensor, gate_up_proj: Tensor | Quantized, down_proj: Tensor | Quantized) -> Tensor:
    """down(silu(gate(x)) * up(x)). x [tokens, hidden] -> the same shape.

    gate_up_proj [2*width, hidden], down_proj [hidden, width].
    """
    gate, up = linear(x, gate_up_proj).chunk(2, dim=-1)
    return linear(F.silu(gate) * up, down_proj)


def int8_of(x: Tensor, run: int) -> tuple[Tensor, Tensor]:
    """x [..., size] as whole multiples of scales: for each `run` of its numbers the largest over 127.

    -> codes [..., size] in int8, scales [..., size / run] in fp32
    """
    runs = x.float().unflatten(-1, (-1, run))
    scale = (runs.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30)
    return (runs / scale + 0.5).floor().to(torch.int8).flatten(-2), scale.squeeze(-1)


def in_int8(x: Tensor, run: int = 16) -> Tensor:
    """x [..., size] rounded as the GPU's kernels take activations in 8 bits. -> x's shape, in fp32"""
    codes, scales = int8_of(x, run)
    return codes.float() * scales.repeat_interleave(run, -1)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., size] / rms(x) * weight [size], computed in fp32 and rounded once. -> x's shape"""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.type_as(x)
