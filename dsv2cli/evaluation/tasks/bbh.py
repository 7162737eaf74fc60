"""BIG-Bench Hard: 27 tasks (Suzgun et al., arXiv 2210.09261).

Its authors' examples with reasoning are beside its data, as cot-prompts/NAME.txt. Where they are not, the
first examples of a task stand before the others, with their answers alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from dsv2cli.evaluation.answers import bbh_of, direct_of, same_bbh
from dsv2cli.evaluation.data import Data, Home, Row
from dsv2cli.evaluation.question import Judged, Question, Task
from dsv2cli.evaluation.tasks.parts import read, spelled, text_in, too_few

STEPS = "Let's think step by step."
BARE = "the examples have no reasoning, since cot-prompts of BIG-Bench Hard's authors are not among the data"


def example(row: Row) -> tuple[str, str]:
    """Raises KeyError."""
    return text_in(row, "input"), text_in(row, "target")


def reasoned(text: str) -> tuple[str, list[str]]:
    """The instruction of a file of cot-prompts, and its examples."""
    text = text.split("-----\n", 1)[-1].strip()
    head, *examples = re.split(r"(?:^|\n\n)(?=Q: )", text)
    return head.strip(), [each.strip() for each in examples]


def questions(data: Data, shots: int) -> Iterator[Question]:
    for subset, rows in data.rows("test").items():
        head, before, steps = f"{spelled(subset).capitalize()}.", list[str](), ""
        texts = [reasoned(text) for text in data.texts(subset)]
        first = 0
        if texts:
            head, before, steps = texts[0][0], texts[0][1][:shots], f" {STEPS}"
            if len(before) < shots:
                raise too_few(data, subset, len(before), shots)
        else:
            if len(rows) <= shots:
                raise too_few(data, subset, len(rows), shots)
            first = shots
            for row in rows[:first]:
                text, target = read(row, example, data)
                before.append(f"Q: {text}\nA: {target}")
        for number, row in enumerate(rows[first:], first):
            text, target = read(row, example, data)
            ask = f"Q: {text}\nA:{steps}"
            given = tuple(f"{each}\n\n" for each in before)
            about, remark = {"steps": bool(steps)}, "" if steps or not shots else BARE
            yield Question(
                data.task, subset, str(number), ask, target, f"{head}\n\n", given, remark=remark, about=about
            )


def judge(question: Question, answer: str) -> Judged:
    found = bbh_of(answer) if question.about["steps"] else bbh_of(answer) or direct_of(answer)
    return Judged(found, found is not None and same_bbh(question.expected, found))


TASK = Task(
    "bbh",
    "BIG-Bench Hard, 27 tasks, with reasoning where its cot-prompts are there, 3-shot",
    "answer",
    questions,
    shots=3,
    judge=judge,
    names=("cot-prompts", "big-bench-hard", "bigbenchhard", "big_bench_hard"),
    home=Home("lukaemon/bbh", ("*/test-*",)),
    by_subset=True,
    stop=("\nQ:", "\n\nQ"),
)
