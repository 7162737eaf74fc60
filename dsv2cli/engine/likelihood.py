"""How likely texts are after others, and what else might have come: asked of the scheduler, so that what
texts have in common is read once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dsv2cli.engine.request import Request, SamplingParams
from dsv2cli.engine.scheduler import Job

ONE = Request(SamplingParams(temperature=0.0), max_new_tokens=1)
TAIL = 1e-3  # of the probability that a kept distribution may leave out
MOST_KEPT = 1024  # tokens of one


@dataclass(frozen=True)
class Likely:
    """Tokens after others: the log-probability of each in nats, and whether each was the likeliest."""

    logprobs: tuple[float, ...]
    greedy: bool

    @property
    def total(self) -> float:
        return sum(self.logprobs)


@dataclass(frozen=True)
class Distribution:
    """The likeliest tokens with their log-probabilities, the first the likeliest of all."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]

    @classmethod
    def of(cls, logprobs: Tensor) -> Distribution:
        """All but a tail of TAIL, at most MOST_KEPT, from logprobs [vocab]."""
        values, ids = logprobs.topk(min(MOST_KEPT, logprobs.numel()))
        count = int((values.exp().cumsum(0) < 1 - TAIL).sum()) + 1
        return cls(tuple(ids[:count].tolist()), tuple(values[:count].tolist()))


@dataclass
class Reading:
    """A prompt, and which of its places are looked at: for each place the tokens that may follow it."""

    prompt_ids: list[int]
    asked: dict[int, list[int]]
    keeps: Callable[[int], bool] = lambda place: False  # whether the distribution after a place is kept
    likely: dict[tuple[int, int], float] = field(default_factory=dict)  # log-probabilities by place and token
    best: dict[int, int] = field(default_factory=dict)  # place to the likeliest token after it
    kept: dict[int, Distribution] = field(default_factory=dict)

    def hear(self, scores: Tensor, first: int) -> None:
        """Note what is asked for from scores [tokens, vocab], those after the prompt's token `first` on."""
        logprobs = scores.float().log_softmax(dim=-1)
        best = logprobs.argmax(dim=-1).tolist()
        places = [first + row for row in range(len(scores)) if first + row in self.asked]
        pairs = [(place, token) for place in places for token in self.asked[place]]
        rows = torch.tensor([place - first for place, _ in pairs], dtype=torch.long, device=scores.device)
        tokens = torch.tensor([token for _, token in pairs], dtype=torch.long, device=scores.device)
        self.likely.update(zip(pairs, logprobs[rows, tokens].tolist(), strict=True))
        for place in places:
            self.best[place] = best[place - first]
            if self.keeps(place):
                self.kept[place] = Distribution.of(logprobs[place - first])

    def job(self) -> Job:
        return Job(self.prompt_ids, ONE, listener=self.hear, from_place=min(self.asked))


def readings(context: list[int], continuations: Iterable[list[int]]) -> list[Reading]:
    """What has to be read to know the continuations of a context: one prompt for all that differ in their
    last token alone, such as A, B, C and D.
    """
    found = dict[tuple[int, ...], Reading]()
    for tokens in continuations:
        reading = found.setdefault(tuple(tokens[:-1]), Reading(context + tokens[:-1], {}))
        for i, token in enumerate(tokens):
            asked = reading.asked.setdefault(len(context) - 1 + i, [])
            if token not in asked:
                asked.append(token)
    return list(found.values())


def likely(context: list[int], tokens: list[int], read: Iterable[Reading]) -> Likely:
    """A continuation from the readings of its context, which have been run."""
    prompt = context + tokens[:-1]
    reading = next(each for each in read if each.prompt_ids == prompt)
    places = range(len(context) - 1, len(prompt))
    return Likely(
        tuple(reading.likely[pair] for pair in zip(places, tokens, strict=True)),
        all(reading.best[place] == token for place, token in zip(places, tokens, strict=True)),
    )
