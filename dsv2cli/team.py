"""Processes that hold one model together: who is who, and the sums they make of their parts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Team:
    """This process among `size` alike; alone it costs nothing."""

    rank: int = 0
    size: int = 1

    def sum(self, x: Tensor) -> Tensor:
        """The sum of every rank's x, in all of them. May reuse x."""
        if self.size > 1:
            x = x.contiguous()
            dist.all_reduce(x)
        return x

    def join(self, x: Tensor, widths: list[int]) -> Tensor:
        """Every rank's columns side by side, in all of them; rank i has widths[i]. x [rows, own] -> [rows, sum of widths]"""
        if self.size == 1:
            return x
        padded = x.new_zeros(x.shape[0], max(widths))
        padded[:, : x.shape[1]] = x
        parts = [torch.empty_like(padded) for _ in widths]
        dist.all_gather(parts, padded)
        return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], dim=1)


ALONE = Team()
