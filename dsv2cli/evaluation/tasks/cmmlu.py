"""CMMLU: 67 subjects in Chinese, four choices (Li et al., arXiv 2306.09212)."""

from __future__ import annotations

from collections.abc import Iterator

from dsv2cli.evaluation.data import Data, Home
from dsv2cli.evaluation.question import Question, Task
from dsv2cli.evaluation.tasks import subjects
from dsv2cli.evaluation.tasks.parts import Choice, lettered, spelled


def head(subset: str) -> str:
    name = subjects.CMMLU.get(subset, spelled(subset))
    return f"以下是关于{name}的单项选择题，请直接给出正确答案的选项。\n\n"


def ask(choice: Choice) -> str:
    return f"题目：{choice.listed()}\n答案是："


def questions(data: Data, shots: int) -> Iterator[Question]:
    return lettered(data, ("test",), shots, head, ask)


TASK = Task(
    "cmmlu",
    "67 subjects in Chinese, by the likeliest letter, 5-shot",
    "choices",
    questions,
    shots=5,
    home=Home("haonan-li/cmmlu", ("*/dev/*", "*/test/*"), "refs/convert/parquet"),
    by_subset=True,
)
