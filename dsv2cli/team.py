"""Processes that hold one model together: who is who, and the sums they make of their parts."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

SHARED_BYTES = 2**20  # what is larger is summed faster by rings than by each GPU reading all others


class SharedMemory:
    """Memory that every GPU of a team sees, through which small sums take one step: each reads what all
    others wrote.
    """

    def __init__(self, device: torch.device) -> None:
        """Raises RuntimeError where the GPUs can not see each other's memory."""
        import torch.distributed._symmetric_memory as symmetric

        self.buffer = symmetric.empty(SHARED_BYTES, dtype=torch.uint8, device=device)
        self.group = dist.group.WORLD.group_name  # type: ignore[union-attr]
        symmetric.rendezvous(self.buffer, self.group)

    def fits(self, x: Tensor) -> bool:
        """Whether x, of any shape, is small and aligned enough."""
        return (
            x.device == self.buffer.device
            and x.dtype in (torch.bfloat16, torch.float32)
            and x.nbytes <= SHARED_BYTES
            and x.nbytes % 16 == 0
        )

    def sum(self, x: Tensor) -> Tensor:
        """x, of any shape, summed over all GPUs"""
        here = self.buffer[: x.nbytes].view(x.dtype).view(x.shape)
        here.copy_(x)
        return torch.ops.symm_mem.one_shot_all_reduce(here, "sum", self.group)


def shared_memory(rank: int, device: torch.device) -> SharedMemory | None:
    """The team's SharedMemory if every rank could allocate it and a test sum agrees with NCCL; else None."""

    def all_say(yes: bool) -> bool:
        vote = torch.full((1,), float(yes), device=device)
        dist.all_reduce(vote, dist.ReduceOp.MIN)
        return vote.item() == 1

    shared = None
    with contextlib.suppress(RuntimeError, ImportError, AttributeError, NotImplementedError):
        shared = SharedMemory(device)
    if not all_say(shared is not None) or shared is None:
        return None
    mine = torch.arange(4096, device=device, dtype=torch.float32) * (rank + 1)
    wanted = mine.clone()
    dist.all_reduce(wanted)
    return shared if all_say(torch.equal(shared.sum(mine), wanted)) else None


@dataclass(frozen=True)
class Team:
    """This process among `size` alike; alone it costs nothing."""

    rank: int = 0
    size: int = 1
    shared: SharedMemory | None = None
    # Whether each attends for sequences of its own, with all heads, instead of for all with some heads.
    sequences: bool = False
    bound: bool = False  # whether this process runs near some of the machine's memories alone

    def sum(self, x: Tensor) -> Tensor:
        """The sum of every rank's x, in all of them. May reuse x. x has any shape, and all ranks the same."""
        if self.shared is not None and self.shared.fits(x):
            return self.shared.sum(x)
        if self.size > 1:
            x = x.contiguous()
            dist.all_reduce(x)
        return x

    def join(self, x: Tensor, sizes: list[int], dim: int) -> Tensor:
        """Every rank's part side by side along `dim` (0 or 1), in all of them; rank i has sizes[i] there.

        x [rows, columns]
        """
        if self.size == 1:
            return x
        padded = x.new_zeros((max(sizes), x.shape[1]) if dim == 0 else (x.shape[0], max(sizes)))
        padded.narrow(dim, 0, x.shape[dim]).copy_(x)
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part.narrow(dim, 0, size) for part, size in zip(parts, sizes, strict=True)], dim)


ALONE = Team()
