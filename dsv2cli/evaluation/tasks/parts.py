"""What the tasks share: rows of multiple-choice questions, and examples before a question."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from dsv2cli.errors import Dsv2Error, UsageError
from dsv2cli.evaluation.data import Data, Row
from dsv2cli.evaluation.question import Question
from dsv2cli.outside import reason

LETTERS = "ABCDEFGHIJ"
T = TypeVar("T")
COLUMNS = ("question", "a", "b", "c", "d", "answer")  # of CSV files that do not name theirs


@dataclass(frozen=True)
class Choice:
    """A multiple-choice question; `answer` is the number of the right one."""

    question: str
    choices: tuple[str, ...]
    answer: int

    @property
    def letters(self) -> str:
        return LETTERS[: len(self.choices)]

    def listed(self) -> str:
        """The question with its choices below it, a letter before each."""
        lines = [f"{letter}. {text}" for letter, text in zip(self.letters, self.choices, strict=True)]
        return "\n".join([self.question, *lines])


def choice_of(row: Row) -> Choice:
    """Of a row in one of the shapes in which such questions are published.

    Raises ValueError for what is none.
    """
    question: Any = row.get("question")
    choices: Any = row.get("choices")
    labels, named = list(LETTERS), False
    if isinstance(question, dict):  # ARC as its authors publish it
        question, choices = question.get("stem"), question.get("choices")
    if isinstance(choices, list) and choices and isinstance(choices[0], dict):
        labels, named = [str(each.get("label")) for each in choices], True
        choices = [each.get("text") for each in choices]
    elif isinstance(choices, dict):
        labels, named = [str(each) for each in choices.get("label", ())], True
        choices = choices.get("text")
    elif choices is None:
        choices = [row[name] for name in ("a", "b", "c", "d", "e") if row.get(name) is not None]
    given = row.get("answer", row.get("answerkey"))
    known = isinstance(question, str) and question.strip() and isinstance(choices, list)
    if not known or not 1 < len(choices) <= len(LETTERS):
        raise ValueError("it is no question with choices")
    if not all(isinstance(each, str | int | float) and str(each).strip() for each in choices):
        raise ValueError("one of its choices is no text")
    if isinstance(given, int) and not isinstance(given, bool) and not named:
        answer = given
    else:
        answer = labels.index(str(given).strip()) if str(given).strip() in labels else -1
    if not 0 <= answer < len(choices):
        raise ValueError(f"{str(given)[:40]!r} is none of its {len(choices)} choices")
    return Choice(question.strip(), tuple(str(each).strip() for each in choices), answer)


def text_in(row: Row, name: str) -> str:
    """A text of a row, without the blanks around it. Raises ValueError, KeyError."""
    if not isinstance(row[name], str) or not row[name].strip():
        raise ValueError(f"its {name} is no text")
    return str(row[name]).strip()


def texts_in(row: Row, name: str) -> list[str]:
    """Several texts of a row. Raises ValueError, KeyError."""
    value = row[name]
    if not isinstance(value, list | tuple) or not value or not all(isinstance(each, str) for each in value):
        raise ValueError(f"its {name} are no texts")
    return list(value)


def read(row: Row, kind: Callable[[Row], T], data: Data) -> T:
    """What `kind` makes of a row. Raises Dsv2Error naming the data where it makes nothing of it."""
    try:
        return kind(row)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{data.folder}: a row of {data.task} can not be used"
        why = f"{reason(error)}; its columns are {', '.join(map(str, list(row)[:12]))}"
        raise Dsv2Error(what, why=why, fix="files as they are published") from None


def lettered(
    data: Data,
    splits: tuple[str, ...],
    shots: int,
    head: Callable[[str], str],
    ask: Callable[[Choice], str],
    before: str = "",
) -> Iterator[Question]:
    """Questions whose answer is a letter, with the first examples of split dev of the same subset; `before`
    stands before the letter.
    """
    examples = data.rows("dev", columns=COLUMNS) if shots else {}
    for subset, rows in data.rows(*splits, columns=COLUMNS).items():
        given = [choice(row, data) for row in examples.get(subset, [])[:shots]]
        if len(given) < shots:
            raise too_few(data, subset, len(given), shots)
        before_it = tuple(f"{ask(each)}{before}{LETTERS[each.answer]}\n\n" for each in given)
        for number, row in enumerate(rows):
            each = choice(row, data)
            choices = tuple(before + letter for letter in each.letters)
            yield Question(
                data.task, subset, str(number), ask(each), str(each.answer), head(subset), before_it, choices
            )


def choice(row: Row, data: Data) -> Choice:
    """Raises Dsv2Error."""
    return read(row, choice_of, data)


def too_few(data: Data, subset: str, count: int, shots: int) -> UsageError:
    where = f"{data.folder}: {subset}" if subset else str(data.folder)
    why = f"{shots} stand before each question of {data.task}"
    return UsageError(f"{where} has {count} examples", why=why, fix=f"--shots {count}, or more data")


def spelled(subset: str) -> str:
    """A subset's name in words."""
    return re.sub(r"[_-]+", " ", subset).strip()


def shots_of(name: str, count: int) -> tuple[str, ...]:
    """The first examples in shots/NAME.txt, which lines of --- part, as they stand before a question.

    Raises UsageError where there are fewer.
    """
    text = (Path(__file__).parent / "shots" / f"{name}.txt").read_text(encoding="utf-8")
    examples = [part.strip("\n") for part in re.split(r"^---\n", text, flags=re.MULTILINE)[1:]]
    if count > len(examples):
        raise UsageError(f"--shots {count} is too many", why=f"{name} has {len(examples)} examples")
    return tuple(f"{each}\n\n" for each in examples[:count])
