"""MMLU: 57 subjects in English, four choices (Hendrycks et al., arXiv 2009.03300)."""

from __future__ import annotations

from collections.abc import Iterator

from dsv2cli.evaluation.data import Data, Home
from dsv2cli.evaluation.question import Question, Task
from dsv2cli.evaluation.tasks.parts import Choice, lettered, spelled


def head(subset: str) -> str:
    return f"The following are multiple choice questions (with answers) about {spelled(subset)}.\n\n"


def ask(choice: Choice) -> str:
    return f"{choice.listed()}\nAnswer:"


def questions(data: Data, shots: int) -> Iterator[Question]:
    return lettered(data, ("test", "val"), shots, head, ask, " ")


TASK = Task(
    "mmlu",
    "57 subjects in English, by the likeliest letter, 5-shot",
    "choices",
    questions,
    shots=5,
    home=Home("cais/mmlu", ("all/dev-*", "all/test-*")),
)
