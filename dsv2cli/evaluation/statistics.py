"""Means with their standard errors, and whether two runs over the same questions differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Mean:
    """A mean of `count` values, and its standard error; None where one value tells nothing of it. `parts` are
    the values that the error was taken from.
    """

    value: float
    error: float | None
    count: int
    parts: int = 0

    @property
    def reach(self) -> float | None:
        """Half of the interval that holds the true mean in 95% of cases, by Student's t; None where there are
        too few parts to tell.
        """
        freedom = self.parts - 1
        if self.error is None or freedom < 4:
            return None
        return (1.96 + 2.4 / freedom + 3 / freedom**2) * self.error  # t, to within 1%

    def __str__(self) -> str:
        """In percent."""
        return f"{self.value:.1%}" + ("" if self.error is None else f" \u00b1 {self.error:.1%}")


def mean(values: Sequence[float]) -> Mean:
    """Of values that were drawn independently."""
    count = len(values)
    value = math.fsum(values) / count
    if count < 2:
        return Mean(value, None, count)
    variance = math.fsum((each - value) ** 2 for each in values) / (count - 1)
    return Mean(value, math.sqrt(variance / count), count, count)


def mean_of_means(means: Sequence[Mean]) -> Mean:
    """Of the means of subsets, each as weighty as the others."""
    value = math.fsum(each.value for each in means) / len(means)
    count = sum(each.count for each in means)
    if any(each.error is None for each in means):
        return Mean(value, None, count)
    total = math.fsum(each.error**2 for each in means if each.error is not None)
    return Mean(value, math.sqrt(total) / len(means), count)


def mean_of_blocks(values: Sequence[float], size: int = 128) -> Mean:
    """Of values that hang together with their neighbours, as those of a text's tokens do: the standard error
    is that between the means of blocks.
    """
    blocks = [values[i : i + size] for i in range(0, len(values), size)]
    if len(blocks) > 1 and len(blocks[-1]) < size // 2:
        blocks[-2:] = [[*blocks[-2], *blocks[-1]]]
    error = mean([math.fsum(block) / len(block) for block in blocks]).error
    return Mean(math.fsum(values) / len(values), error, len(values), len(blocks))


@dataclass(frozen=True)
class Flips:
    """Questions that two runs answered differently: right now and wrong before (`won`), and the other way
    round (`lost`), of `count`.
    """

    won: int
    lost: int
    count: int

    @property
    def p(self) -> float:
        """McNemar's exact test: how likely it is that as many or more of the flips go one way, if each goes
        either way with the same probability.
        """
        total, fewer = self.won + self.lost, min(self.won, self.lost)
        if total == 0:
            return 1.0
        # Two tails of a binomial distribution; in logarithms, since 2**-total may be no float.
        logs = [
            math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) - total * math.log(2)
            for k in range(fewer + 1)
        ]
        return min(1.0, 2 * math.fsum(map(math.exp, logs)))
