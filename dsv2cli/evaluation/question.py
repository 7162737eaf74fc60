"""What a task asks: questions, what stands before them, and when an answer is right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from dsv2cli.evaluation.data import Data, Home

Kind = Literal["choices", "answer", "program", "text"]
# How the likeliest of several choices is found: the sum of its log-probabilities, their mean a token, or the
# sum less that of the same choice after a bare context.
Rule = Literal["sum", "mean", "unconditional"]


@dataclass(frozen=True)
class Question:
    """One question; `id` tells it from the others of its subset."""

    task: str
    subset: str
    id: str
    ask: str  # the question itself, up to where the answer begins
    expected: str  # the right answer; of choices its number
    head: str = ""  # stands before all
    shots: tuple[str, ...] = ()  # examples with their answers, between head and question
    choices: tuple[str, ...] = ()  # what may follow, as it follows
    bare: str = ""  # the context of rule "unconditional"
    remark: str = ""  # what a reader of the score should know
    message: str = ""  # what a chat model is told in the place of `ask`, where that is something else
    about: dict[str, Any] = field(default_factory=dict)  # what the task's own functions need

    @property
    def key(self) -> str:
        return f"{self.task}/{self.subset}/{self.id}"

    def prompt(self, shots: int | None = None, chat: bool = False) -> str:
        """The text that is continued, with the last `shots` examples, or all."""
        examples = self.shots if shots is None else self.shots[len(self.shots) - shots :]
        return self.head + "".join(examples) + (self.message or self.ask if chat else self.ask)


@dataclass(frozen=True)
class Judged:
    """What was found in an answer, and whether it is right; None where nobody has looked."""

    found: str | None
    right: bool | None
    why: str = ""


@dataclass(frozen=True)
class Task:
    """A benchmark in the paper's setting."""

    name: str
    about: str
    kind: Kind
    questions: Callable[[Data, int], Iterator[Question]]  # of the data, with so many shots
    shots: int = 0
    judge: Callable[[Question, str], Judged] | None = None  # what an answer comes to
    program: Callable[[Question, str], str] | None = None  # what is to be run, of an answer
    names: tuple[str, ...] = ()  # how its files and folders are called besides
    home: Home | None = None
    rule: Rule = "sum"
    by_subset: bool = False  # whether its score is the mean of those of its subsets
    max_new_tokens: int = 512
    stop: tuple[str, ...] = ()


def taken_in_turn(questions: Iterator[Question], limit: int | None) -> list[Question]:
    """At most `limit` questions, as many of each subset as can be, those of a subset together."""
    subsets = dict[str, list[Question]]()
    for question in questions:
        subsets.setdefault(question.subset, []).append(question)
    counts, total = dict.fromkeys(subsets, 0), sum(map(len, subsets.values()))
    left = total if limit is None else min(limit, total)
    while left:
        for name, each in subsets.items():
            if left and counts[name] < len(each):
                counts[name] += 1
                left -= 1
    return [question for name, each in subsets.items() for question in each[: counts[name]]]
