"""HellaSwag: how a scene goes on (Zellers et al., arXiv 1905.07830)."""

from __future__ import annotations

import re
from collections.abc import Iterator

from dsv2cli.evaluation.data import Data, Home, Row
from dsv2cli.evaluation.question import Question, Task
from dsv2cli.evaluation.tasks.parts import read, text_in, texts_in, too_few


def clean(text: str) -> str:
    """Without the marks that WikiHow's headings have left."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def scene(row: Row) -> tuple[str, tuple[str, ...], int]:
    """What comes first, how it may go on, and how it does. Raises ValueError, KeyError."""
    context = text_in(row, "ctx" if "ctx" in row and not row.get("ctx_a") else "ctx_a")
    if row.get("ctx_a"):
        context = f"{context} {str(row['ctx_b'] or '').capitalize()}"
    endings, label = texts_in(row, "endings"), int(row["label"])
    if not 0 <= label < len(endings):
        raise ValueError(f"label {label} is none of its {len(endings)} endings")
    return clean(f"{row['activity_label']}: {context}"), tuple(f" {clean(each)}" for each in endings), label


def questions(data: Data, shots: int) -> Iterator[Question]:
    """The test split's answers are not published: the questions are those of val."""
    rows = data.only_rows("train")[:shots] if shots else []
    if len(rows) < shots:
        raise too_few(data, "", len(rows), shots)
    examples = [read(row, scene, data) for row in rows]
    before = tuple(f"{context}{endings[label]}\n\n" for context, endings, label in examples)
    for number, row in enumerate(data.only_rows("val")):
        context, endings, label = read(row, scene, data)
        yield Question(data.task, "", str(number), context, str(label), "", before, endings)


TASK = Task(
    "hellaswag",
    "how a scene goes on, by the text that is likeliest a token, 10-shot",
    "choices",
    questions,
    shots=10,
    home=Home("Rowan/hellaswag", ("data/train-*", "data/validation-*")),
    rule="mean",
)
