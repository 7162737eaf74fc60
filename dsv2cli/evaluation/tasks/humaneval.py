"""HumanEval: functions from their docstrings (Chen et al., arXiv 2107.03374)."""

from __future__ import annotations

from collections.abc import Iterator

from dsv2cli.evaluation.answers import code_of, completion_of
from dsv2cli.evaluation.data import Data, Home, Row
from dsv2cli.evaluation.question import Question, Task
from dsv2cli.evaluation.tasks.parts import read, text_in

MESSAGE = "Complete this function. Answer with the whole function in one block of Python.\n\n```python\n{}```"


def function(row: Row) -> tuple[str, str, str, str]:
    """Raises KeyError."""
    if not isinstance(row["prompt"], str):
        raise ValueError("its prompt is no text")
    return text_in(row, "task_id"), row["prompt"], text_in(row, "test"), text_in(row, "entry_point")


def questions(data: Data, shots: int) -> Iterator[Question]:
    for row in data.only_rows("test"):
        name, prompt, test, entry = read(row, function, data)
        about = {"test": test, "entry_point": entry}
        yield Question(data.task, "", name, prompt, "", message=MESSAGE.format(prompt), about=about)


def program(question: Question, answer: str) -> str:
    """The function with its test behind it. One that was written whole takes the place of the prompt's."""
    entry = question.about["entry_point"]
    begin = f"def {entry}("
    code = code_of(answer, begin)
    if begin in code:
        body = question.ask[: max(0, question.ask.find(begin))] + "\n\n" + code
    else:
        body = question.ask + completion_of(code)
    return f"{body}\n\n{question.about['test']}\n\ncheck({entry})\n"


TASK = Task(
    "humaneval",
    "functions from their docstrings, run against tests, 0-shot",
    "program",
    questions,
    program=program,
    names=("human-eval", "human_eval", "openai_humaneval"),
    home=Home("openai/openai_humaneval", ("openai_humaneval/test-*",)),
    stop=("\nclass", "\ndef", "\n#", "\nif", "\nprint"),
)
