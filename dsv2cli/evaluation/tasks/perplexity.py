"""Perplexity: how well a text is foreseen, window by window. Its questions are made where the tokens are."""

from __future__ import annotations

from collections.abc import Iterator

from dsv2cli.evaluation.data import Data, Home, Row
from dsv2cli.evaluation.question import Question, Task
from dsv2cli.evaluation.tasks.parts import read


def line(row: Row) -> str:
    """Raises ValueError, KeyError."""
    if not isinstance(row["text"], str):
        raise ValueError("its text is none")
    return row["text"]


def questions(data: Data, shots: int) -> Iterator[Question]:
    """One question for each text: all of it. WikiText's lines are one text."""
    for subset, rows in data.rows("test").items():
        text = "".join(read(row, line, data) for row in rows)
        yield Question(data.task, subset, "0", text, "")


TASK = Task(
    "perplexity",
    "how well a text is foreseen: WikiText-2, or a file of yours with --text",
    "text",
    questions,
    names=("wikitext", "wikitext-2-raw-v1"),
    home=Home("Salesforce/wikitext", ("wikitext-2-raw-v1/test-*",)),
)
