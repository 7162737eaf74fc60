"""HumanEval: functions from their docstrings (Chen et al., arXiv 2107.03374)."""

from __future__ import annotations

from collections.abc import Iterator

from dsv2cli.evaluation.answers import code_of, completion_of
from dsv2cli.evaluation.data import Data, Home, Row
from dsv2cli.evaluation.question import Question, Task
from dsv2cli.evaluation.tasks.parts import read

MESSAGE = "Complete this function. Answer with the whole function in one block of Python.\n\n```python\n{}```"


def function(row: Row) -> tuple[str, str, str, str]:
    """Raises KeyError."""
    return str(row["task_id"]), str(row["prompt"]), str(row["test"]), str(row["entry_point"])


def questions(data: Data, shots: int) -> Iterator[Question]:
    for rows in data.rows("test").values():
        for row in rows:
            name, prompt, test, entry = read(row, function, data)
            about = {"test": test, "entry_point": entry}
            message = MESSAGE.format(prompt)
            yield Question(data.task, "", name, prompt, "", message=message, about=about)


def program(question: Question, answer: str) -> str:
    """The function with its test behind it. What a chat model wrote whole stands after the imports."""
    entry = question.about["entry_point"]
    if f"def {entry}(" in (code := code_of(answer)):
        body = question.ask.split("\ndef ", 1)[0] + "\n\n" + code
    else:
        body = question.ask + completion_of(answer)
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
