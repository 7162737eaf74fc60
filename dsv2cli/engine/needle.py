"""Needle in a haystack: a sentence hidden in a long text, and whether the model finds it again.

The filler and the pass key are those of Mohtashami and Jaggi, Landmark Attention (arXiv 2305.16300).
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from dsv2cli.checkpoint.tokenizer import Tokenizer
from dsv2cli.engine.request import Request
from dsv2cli.engine.scheduler import Job, Scheduler

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key?"
SPARE = 64  # tokens for the answer


@dataclass(frozen=True)
class Haystack:
    """A text to hide things in, and what is hidden; `{key}` stands for a number that
    changes from try to try.
    """

    filler: str = FILLER
    needle: str = NEEDLE
    question: str = QUESTION
    expect: str = "{key}"


@dataclass(frozen=True)
class Trial:
    """One question: `length` is the prompt's in tokens, `depth` where the needle lies, from 0 (start) to 1
    (end).
    """

    length: int
    depth: float
    expected: str
    answer: str

    @property
    def found(self) -> bool:
        return self.expected.casefold() in self.answer.casefold()


def sentences(text: str) -> list[str]:
    return [part + "." for part in text.replace("\n", " ").split(".") if part.strip()]


def make_prompt(tokenizer: Tokenizer, haystack: Haystack, key: str, length: int, depth: float) -> list[int]:
    """A message of at most `length` tokens, as near to it as whole sentences of filler come."""
    needle, filler = " " + haystack.needle.replace("{key}", key), sentences(haystack.filler)

    def prompt(count: int) -> list[int]:
        around = [filler[i % len(filler)] for i in range(count)]
        around.insert(round(depth * count), needle)
        return tokenizer.encode_chat(
            [{"role": "user", "content": "".join(around).strip() + "\n\n" + haystack.question}]
        )

    least, most = 0, 1
    while len(prompt(most)) <= length:
        least, most = most, 2 * most
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if len(prompt(middle)) <= length else (least, middle)
    return prompt(least)


def hidden(
    tokenizer: Tokenizer, haystack: Haystack, lengths: list[int], depths: list[float], tries: int, seed: int
) -> Iterator[tuple[list[int], Trial]]:
    """Every length at every depth, `tries` times each with another key: the prompt, and the trial without its
    answer.
    """
    numbers = random.Random(seed)
    for length in lengths:
        for depth in depths:
            for _ in range(tries):
                key = str(numbers.randrange(10_000, 100_000))
                ids = make_prompt(tokenizer, haystack, key, length, depth)
                yield ids, Trial(len(ids), depth, haystack.expect.replace("{key}", key), "")


def search(
    scheduler: Scheduler, asked: Iterable[tuple[list[int], Trial]], request: Request
) -> Iterator[Trial]:
    """The trials with their answers, some at once and in their order. Raises Dsv2Error."""
    waiting = deque[Trial]()

    def jobs() -> Iterator[Job]:
        for ids, trial in asked:
            waiting.append(trial)
            yield Job(ids, replace(request, max_new_tokens=SPARE))

    for job in scheduler.in_order(jobs()):
        if job.failure is not None:
            raise job.failure
        yield replace(waiting.popleft(), answer=job.result.text)
