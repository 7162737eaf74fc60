"""What all layers share in one forward pass: whose tokens it has, where they stand, their rotation, what each
may see, and the pool.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dsv2cli.formats import PAGE
from dsv2cli.model.pool import LatentPool, pages_for
from dsv2cli.model.rope import RotaryTable
from dsv2cli.team import ALONE, Team

Watch = Callable[[str, Callable[[], Tensor]], Tensor]  # does the work, whose name it is told


def unwatched(name: str, work: Callable[[], Tensor]) -> Tensor:
    return work()


@dataclass(frozen=True)
class Span:
    """Neighbouring tokens of one sequence in a step: a piece of a prompt, a token to go on from, a draft.

    `pages` are the sequence's from its beginning, with room for these tokens. `whole` are pieces of a prompt
    to which attention may expand keys and values; all others, and what is alone, look at the latents. `rank`
    is where the sequence's latents lie, in a team that shares out sequences.
    """

    pages: list[int]
    start: int  # position of the first token
    count: int
    whole: bool = False
    rank: int = 0

    @property
    def end(self) -> int:
        return self.start + self.count

    def slots(self) -> list[int]:
        """Where the tokens lie in the pool. [count]"""
        return [self.pages[at // PAGE] * PAGE + at % PAGE for at in range(self.start, self.end)]


@dataclass
class Step:
    """One forward pass by the tokens of `spans`, one after the other.

    Without a pool nothing is kept, and every span is a sequence from its beginning. `path` is the attention
    path; `alike` says that what a token gets must not depend on the others that are in the step; `watch` does
    each part of a layer. `counts` are the new tokens of each rank where ranks attend to sequences of their
    own: then the spans are this rank's.
    """

    spans: list[Span]
    positions: Tensor  # [tokens]
    rotary: Tensor  # [tokens, 2, rope / 2]
    pool: LatentPool | None = None
    path: str = "auto"
    alike: bool = False
    counts: list[int] | None = None
    team: Team = ALONE
    watch: Watch = unwatched
    elsewhere: dict[torch.device, Step] = field(default_factory=dict)  # the same step on other devices
    pages: list[Tensor] = field(default_factory=list)  # of each span, once they were asked for

    @classmethod
    def of(
        cls,
        spans: list[Span],
        pool: LatentPool | None,
        rotary: RotaryTable,
        device: torch.device,
        path: str = "auto",
        alike: bool = False,
        team: Team = ALONE,
        watch: Watch = unwatched,
    ) -> Step:
        """The step of these spans; in a team that shares out sequences, this rank's part of it. There they
        are in the order of their ranks.
        """
        counts = None
        if team.sequences and pool is not None:
            counts = [sum(span.count for span in spans if span.rank == rank) for rank in range(team.size)]
            spans = [span for span in spans if span.rank == team.rank]
        places = [at for span in spans for at in range(span.start, span.end)]
        positions = torch.tensor(places, dtype=torch.long, device=device)
        table = rotary(positions, max(places, default=0) + 1)
        return cls(spans, positions, table, pool, path, alike, counts, team, watch)

    @classmethod
    def apart(
        cls, rows: int, seq: int, rotary: RotaryTable, device: torch.device, path: str = "auto"
    ) -> Step:
        """`rows` sequences of `seq` tokens each, of which nothing is kept."""
        return cls.of([Span([], 0, seq)] * rows, None, rotary, device, path)

    @functools.cached_property
    def slots(self) -> Tensor:
        """Where the tokens' latents lie in the pool. [tokens]"""
        slots = [slot for span in self.spans for slot in span.slots()]
        return torch.tensor(slots, dtype=torch.long, device=self.positions.device)

    def part(self, chosen: list[int]) -> tuple[Step, Tensor]:
        """The step of some of the spans only, and which tokens they are. -> itself, [tokens]"""
        firsts = self.firsts()
        index = torch.tensor(
            [at for i in chosen for at in range(firsts[i], firsts[i] + self.spans[i].count)],
            dtype=torch.long,
            device=self.positions.device,
        )
        spans = [self.spans[i] for i in chosen]
        step = replace(self, spans=spans, positions=self.positions[index], rotary=self.rotary[index])
        step.elsewhere, step.pages = {}, []
        return step, index

    def firsts(self) -> list[int]:
        """The first token of each span."""
        out, at = [], 0
        for span in self.spans:
            out.append(at)
            at += span.count
        return out

    def to(self, device: torch.device | int, **_: object) -> Step:
        """The same for layers on another device, copied there once.

        accelerate calls it before each such layer.
        """
        device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        if device == self.positions.device:
            return self
        if device not in self.elsewhere:
            positions, rotary = self.positions.to(device), self.rotary.to(device)
            self.elsewhere[device] = replace(self, positions=positions, rotary=rotary, elsewhere={}, pages=[])
        return self.elsewhere[device]

    def remember(self, layer: int, latents: Tensor) -> None:
        """Put latents [tokens, latent + rope] into the pool."""
        if self.pool is not None:
            self.pool.write(layer, self.slots, latents)

    def sequences(self, layer: int, latents: Tensor) -> Iterator[tuple[slice, int, Span, Tensor]]:
        """For each span, or for all at once where they are alike and nothing is kept: its tokens, how many
        spans it is, the (first) span, and all its latents up to now [spans, past + new, latent + rope].

        `latents` [tokens, latent + rope] are the new ones.
        """
        if self.pool is None:
            counts = {span.count for span in self.spans}
            if len(counts) == 1:
                span, rows = self.spans[0], len(self.spans)
                yield slice(None), rows, span, latents.unflatten(0, (rows, span.count))
                return
        elif not self.pages:
            device = self.positions.device
            self.pages = [
                torch.tensor(span.pages[: pages_for(span.end)], device=device) for span in self.spans
            ]
        for i, (first, span) in enumerate(zip(self.firsts(), self.spans, strict=True)):
            tokens = slice(first, first + span.count)
            if self.pool is None:
                yield tokens, 1, span, latents[None, tokens]
            else:
                yield tokens, 1, span, self.pool.read(layer, self.pages[i], span.end)[None]

    def own_tokens(self, x: Tensor) -> Tensor:
        """Those of x [tokens of all ranks, hidden] to which this rank attends."""
        if self.counts is None:
            return x
        first = sum(self.counts[: self.team.rank])
        return x[first : first + self.counts[self.team.rank]]

    def every_token(self, x: Tensor) -> Tensor:
        """The other way round: x [own tokens, hidden] of every rank -> [tokens, hidden]"""
        return x if self.counts is None else self.team.join(x, self.counts, dim=0)

    def for_all_tokens(self, mlp: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """mlp of x [own tokens, hidden].

        All ranks' tokens pass through each rank's experts, and come back summed.
        """
        return self.own_tokens(mlp(self.every_token(x)))
