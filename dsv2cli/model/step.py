"""What all layers share in one forward pass: where the new tokens stand, their rotation, what each may see,
and the cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dsv2cli.kernels import attention
from dsv2cli.model.cache import LatentCache
from dsv2cli.model.rope import RotaryTable
from dsv2cli.team import ALONE, Team

Watch = Callable[[str, Callable[[], Tensor]], Tensor]  # does the work, whose name it is told


def unwatched(name: str, work: Callable[[], Tensor]) -> Tensor:
    return work()


@dataclass
class Step:
    """One forward pass by `seq` new tokens in each row. Every position is below `length`.

    `start` is where the new tokens begin, if that is one place for all rows; `slots` [batch] are their rows
    in the cache, if those are not its rows in order; `path` is the attention path; `watch` does each part of
    a layer. `counts` are the new tokens of each rank where ranks attend to sequences of their own: all else
    is this rank's.
    """

    positions: Tensor  # [batch, seq]
    rotary: Tensor  # [batch, seq, 2, rope / 2]
    cache: LatentCache | None
    length: int
    start: int | None = None
    path: str = "auto"
    slots: Tensor | None = None
    counts: list[int] | None = None
    team: Team = ALONE
    watch: Watch = unwatched
    elsewhere: dict[torch.device, Step] = field(default_factory=dict)  # the same step on other devices

    @classmethod
    def after(
        cls,
        cache: LatentCache | None,
        ids: Tensor,
        rotary: RotaryTable,
        path: str = "auto",
        team: Team = ALONE,
        watch: Watch = unwatched,
    ) -> Step:
        """The step that appends ids [batch, seq] to the rows of the cache, which makes room for them."""
        batch, seq = ids.shape
        starts, counts = [0] * batch, None
        if cache is not None:
            cache.reserve(max(cache.lengths) + seq)
            starts = [cache.lengths[row] for row in cache.own]
            counts = [len(part) * seq for part in cache.parts] if team.sequences else None
        first = torch.tensor(starts, dtype=torch.long, device=ids.device)[:, None]
        positions = first + torch.arange(seq, device=ids.device)
        start, length = starts[0] if len(set(starts)) == 1 else None, max(starts, default=0) + seq
        table = rotary(positions, length)
        return cls(positions, table, cache, length, start, path, counts=counts, team=team, watch=watch)

    @functools.cached_property
    def mask(self) -> Tensor:
        """Which cached tokens each new one may read. [batch, 1, seq, length]"""
        return attention.visible(self.positions, self.length)

    @functools.cached_property
    def tokens(self) -> tuple[Tensor, Tensor]:
        """Position and row of the cache for each new token, in int32. Both [batch * seq]"""
        batch, seq = self.positions.shape
        rows = torch.arange(batch, device=self.positions.device, dtype=torch.int32)
        return self.positions.flatten().int(), (rows if self.slots is None else self.slots).repeat_interleave(
            seq
        )

    def to(self, device: torch.device | int, **_: object) -> Step:
        """The same for layers on another device, copied there once.

        accelerate calls it before each such layer.
        """
        device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        if device == self.positions.device:
            return self
        if device not in self.elsewhere:
            slots = None if self.slots is None else self.slots.to(device)
            positions, rotary = self.positions.to(device), self.rotary.to(device)
            self.elsewhere[device] = replace(self, positions=positions, rotary=rotary, slots=slots)
        return self.elsewhere[device]

    def remember(self, layer: int, latents: Tensor) -> Tensor:
        """Put latents [batch, seq, latent + rope] into the cache; gives all up to now [batch, past + seq,
        latent + rope]
        """
        if self.cache is None:
            return latents
        return self.cache.append(layer, self.positions, latents, self.start)[:, : self.length]

    def own_rows(self, x: Tensor) -> Tensor:
        """Those of x [batch, seq, hidden] to which this rank attends."""
        if self.counts is None or self.cache is None:
            return x
        return x[self.cache.own.start : self.cache.own.stop]

    def every_row(self, x: Tensor, batch: int) -> Tensor:
        """The other way round: x [own rows, seq, hidden] of every rank -> [batch, seq, hidden]"""
        if self.counts is None:
            return x
        return self.team.join(x.flatten(0, 1), self.counts, dim=0).view(batch, *x.shape[1:])

    def for_all_tokens(self, mlp: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """mlp of x [batch, seq, hidden].

        All ranks' tokens pass through each rank's experts, and come back summed.
        """
        if self.counts is None:
            return mlp(x.flatten(0, 1)).view_as(x)
        every = self.team.join(x.flatten(0, 1), self.counts, dim=0)
        first = sum(self.counts[: self.team.rank])
        return mlp(every)[first : first + x.shape[0] * x.shape[1]].view_as(x)
