"""Rotary positions: plain, linear and YaRN (official modeling_deepseek.py, DeepseekV2YarnRotaryEmbedding)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsv2cli.model.config import DeepseekV2Config, RopeScaling


def mscale(factor: float, weight: float) -> float:
    """YaRN's attention temperature: 1 + 0.1 * weight * ln(factor)."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def softmax_scale(config: DeepseekV2Config) -> float:
    """1/sqrt(head) times YaRN's temperature squared, at every length and not only past the original one."""
    scale = config.qk_head_dim**-0.5
    scaling = config.rope_scaling
    if scaling.type == "yarn" and scaling.mscale_all_dim:
        scale *= mscale(scaling.factor, scaling.mscale_all_dim) ** 2
    return scale


def frequencies(dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """Radians per position of each rotated pair, fp32. [dim / 2]"""
    plain = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)
    if scaling.type == "linear":
        return plain / scaling.factor
    if scaling.type != "yarn":
        return plain

    def pair_turning(turns: float) -> float:
        """Which pair makes this many full turns within the original context."""
        return (
            dim
            * math.log(scaling.original_max_position_embeddings / (turns * 2 * math.pi))
            / (2 * math.log(theta))
        )

    low = max(math.floor(pair_turning(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_turning(scaling.beta_slow)), dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / max(high - low, 0.001)
    # Fast pairs keep their speed; slow pairs are stretched; those between are mixed.
    keep = 1.0 - ramp.clamp(0, 1)
    return plain / scaling.factor * (1 - keep) + plain * keep


class RotaryTable:
    """cos and sin by position, made as far as asked for and kept on the device."""

    def __init__(self, config: DeepseekV2Config) -> None:
        scaling = config.rope_scaling
        self.inv_freq = frequencies(config.qk_rope_head_dim, config.rope_theta, scaling)
        self.amplitude = 1.0
        if scaling.type == "yarn":  # 1 for every released model
            self.amplitude = mscale(scaling.factor, scaling.mscale) / mscale(
                scaling.factor, scaling.mscale_all_dim
            )
        self.table = torch.empty(0, 2, 0)  # [positions, cos and sin, dim / 2]

    def __call__(self, positions: Tensor, length: int) -> Tensor:
        """Rows for positions [tokens], all below `length`. -> [tokens, 2, dim / 2] in fp32"""
        if self.table.shape[0] < length or self.table.device != positions.device:
            rows = torch.arange(max(length, 2 * self.table.shape[0]), dtype=torch.float32)
            angles = torch.outer(rows, self.inv_freq)
            self.table = (
                torch.stack([angles.cos(), angles.sin()], dim=1).mul(self.amplitude).to(positions.device)
            )
        return self.table[positions]


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn neighbouring pairs (0,1), (2,3), ... x [tokens, heads, dim], table [tokens, 2, dim / 2]."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = table[:, None].unbind(-2)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(x)
