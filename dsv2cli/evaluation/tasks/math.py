"""MATH: problems of competitions (Hendrycks et al., arXiv 2103.03874), with the four examples of Minerva
(Lewkowycz et al., arXiv 2206.14858).
"""

from __future__ import annotations

from collections.abc import Iterator

from dsv2cli.evaluation.answers import math_of, same_math
from dsv2cli.evaluation.data import Data, Home, Row
from dsv2cli.evaluation.question import Judged, Question, Task
from dsv2cli.evaluation.tasks.parts import read, shots_of, text_in


def problem(row: Row) -> tuple[str, str]:
    """A problem and its answer. Raises ValueError, KeyError."""
    answer = text_in(row, "answer") if row.get("answer") else math_of(text_in(row, "solution"))
    if answer is None:
        raise ValueError("its solution holds no \\boxed answer")
    return text_in(row, "problem"), answer


def questions(data: Data, shots: int) -> Iterator[Question]:
    before = shots_of("math", shots)
    for subset, rows in data.rows("test").items():
        for number, row in enumerate(rows):
            text, expected = read(row, problem, data)
            ask = f"Problem:\n{text}\n\nSolution:"
            yield Question(data.task, subset, str(number), ask, expected, "", before)


def judge(question: Question, answer: str) -> Judged:
    found = math_of(answer)
    return Judged(found, found is not None and same_math(question.expected, found))


TASK = Task(
    "math",
    "problems of competitions, with Minerva's prompt, 4-shot",
    "answer",
    questions,
    shots=4,
    judge=judge,
    names=("hendrycks_math", "competition_math", "minerva_math", "math-500"),
    home=Home("EleutherAI/hendrycks_math", ("*/test-*",)),
    max_new_tokens=1024,
    stop=("\nProblem:",),
)
