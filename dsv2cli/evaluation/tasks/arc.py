"""ARC-Challenge: science questions of schools (Clark et al., arXiv 1803.05457)."""

from __future__ import annotations

from collections.abc import Iterator

from dsv2cli.evaluation.data import Data, Home
from dsv2cli.evaluation.question import Question, Task
from dsv2cli.evaluation.tasks.parts import choice, too_few

BARE = "Answer:"


def questions(data: Data, shots: int) -> Iterator[Question]:
    """The text of the answer follows; there are examples of split train."""
    data = data.narrowed("challenge")
    examples = [choice(row, data) for row in data.only_rows("train")[:shots]] if shots else []
    if len(examples) < shots:
        raise too_few(data, "", len(examples), shots)
    before = tuple(f"{ask(each.question)} {each.choices[each.answer]}\n\n" for each in examples)
    for number, row in enumerate(data.only_rows("test", "val")):
        each = choice(row, data)
        yield Question(
            data.task,
            "",
            str(number),
            ask(each.question),
            str(each.answer),
            shots=before,
            choices=tuple(f" {text}" for text in each.choices),
            bare=BARE,
        )


def ask(question: str) -> str:
    return f"Question: {question}\n{BARE}"


TASK = Task(
    "arc",
    "ARC-Challenge, by the likeliest text given the question over the text alone, 25-shot",
    "choices",
    questions,
    shots=25,
    names=("arc-challenge", "arc_challenge", "arc-c", "ai2_arc"),
    home=Home("allenai/ai2_arc", ("ARC-Challenge/train-*", "ARC-Challenge/test-*")),
    rule="unconditional",
)
