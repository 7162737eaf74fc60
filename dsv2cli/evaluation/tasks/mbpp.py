"""MBPP: small programs from a sentence and three tests (Austin et al., arXiv 2108.07732)."""

from __future__ import annotations

from collections.abc import Iterator

from dsv2cli.evaluation.answers import code_of, mbpp_of
from dsv2cli.evaluation.data import Data, Home, Row
from dsv2cli.evaluation.question import Question, Task
from dsv2cli.evaluation.tasks.parts import read, text_in, texts_in, too_few

PROMPTS, TESTS = range(2, 5), range(11, 511)  # task ids, where one file holds all splits


def described(row: Row) -> tuple[int, str, str, str]:
    """Number, what is asked, the program, what has to hold. Raises ValueError, KeyError."""
    tests = texts_in(row, "test_list")
    setup = str(row.get("test_setup_code") or "")
    code = text_in(row, "code").replace("\r\n", "\n")
    text = text_in(row, "text" if row.get("text") else "prompt")
    ask = (
        f"You are an expert Python programmer, and here is your task: {text} "
        "Your code should pass these tests:\n\n" + "\n".join(tests) + "\n[BEGIN]\n"
    )
    return int(row["task_id"]), ask, code, "\n".join([setup, *tests]).strip()


def questions(data: Data, shots: int) -> Iterator[Question]:
    """The examples are tasks 2, 3 and 4, as in the paper of MBPP."""
    rows = [row for split in ("prompt", "test") for row in data.only_rows(split)]
    tasks = {number: rest for number, *rest in (read(row, described, data) for row in rows)}
    wanted = [number for number in PROMPTS if number in tasks][:shots]
    if len(wanted) < shots:
        raise too_few(data, "", len(wanted), shots)
    before = tuple(f"{tasks[number][0]}{tasks[number][1]}\n[DONE]\n\n" for number in wanted)
    for number, (ask, _, tests) in tasks.items():
        if number in TESTS:
            yield Question(data.task, "", str(number), ask, "", "", before, about={"test": tests})


def program(question: Question, answer: str) -> str:
    return f"{code_of(mbpp_of(answer))}\n\n{question.about['test']}\n"


TASK = Task(
    "mbpp",
    "small programs from a sentence and three tests, run, 3-shot",
    "program",
    questions,
    shots=3,
    program=program,
    home=Home("google-research-datasets/mbpp", ("full/prompt-*", "full/test-*")),
    stop=("[DONE]",),
)
