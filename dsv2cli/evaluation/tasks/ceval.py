"""C-Eval: 52 subjects in Chinese, four choices (Huang et al., arXiv 2305.08322).

The answers of its test split are not published: the questions are those of val.
"""

from __future__ import annotations

from collections.abc import Iterator

from dsv2cli.evaluation.data import Data, Home
from dsv2cli.evaluation.question import Question, Task
from dsv2cli.evaluation.tasks import subjects
from dsv2cli.evaluation.tasks.parts import Choice, lettered, spelled


def head(subset: str) -> str:
    name = subjects.CEVAL.get(subset, spelled(subset))
    return f"以下是中国关于{name}考试的单项选择题，请选出其中的正确答案。\n\n"


def ask(choice: Choice) -> str:
    return f"{choice.listed()}\n答案："


def questions(data: Data, shots: int) -> Iterator[Question]:
    return lettered(data, ("val",), shots, head, ask)


TASK = Task(
    "ceval",
    "52 subjects in Chinese, by the likeliest letter, 5-shot",
    "choices",
    questions,
    shots=5,
    names=("c-eval", "ceval-exam"),
    home=Home("ceval/ceval-exam", ("*/dev-*", "*/val-*")),
    by_subset=True,
)
