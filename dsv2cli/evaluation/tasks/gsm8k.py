"""GSM8K: sums in words (Cobbe et al., arXiv 2110.14168), with the eight examples of Wei et al.
(arXiv 2201.11903).
"""

from __future__ import annotations

from collections.abc import Iterator

from dsv2cli.evaluation.answers import number_of, same_number
from dsv2cli.evaluation.data import Data, Home, Row
from dsv2cli.evaluation.question import Judged, Question, Task
from dsv2cli.evaluation.tasks.parts import read, shots_of, text_in


def pair(row: Row) -> tuple[str, str]:
    """A question and its number. Raises ValueError, KeyError."""
    number = number_of(text_in(row, "answer"))
    if number is None:
        raise ValueError("its answer holds no number")
    return text_in(row, "question"), number


def questions(data: Data, shots: int) -> Iterator[Question]:
    before = shots_of("gsm8k", shots)
    for number, row in enumerate(data.only_rows("test")):
        question, expected = read(row, pair, data)
        yield Question(data.task, "", str(number), f"Q: {question}\nA:", expected, "", before)


def judge(question: Question, answer: str) -> Judged:
    found = number_of(answer)
    return Judged(found, found is not None and same_number(question.expected, found))


TASK = Task(
    "gsm8k",
    "sums in words, worked out step by step, 8-shot",
    "answer",
    questions,
    shots=8,
    judge=judge,
    home=Home("openai/gsm8k", ("main/test-*",)),
    stop=("\nQ:", "\n\nQ"),
)
