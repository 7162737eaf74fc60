"""The file of a run: what was run, and line by line what came of each question, as it came.

A run that was ended by whatever goes on where the file ends; a line that was cut off is left out.
"""

from __future__ import annotations

import base64
import contextlib
import os
import sys
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from dsv2cli import places
from dsv2cli.errors import Dsv2Error, UsageError
from dsv2cli.outside import json_text, lines_within, parse_json, path_of, reason, require_file

FORMAT = "dsv2 eval 1"
# What must be alike for a run to go on, and how it is called.
ALIKE = {"model": "model", "mark": "weights, or number formats", "settings": "options"}
Row = dict[str, Any]


@dataclass
class Record:
    """A run as it stands: `facts` of model and options, and the rows by the keys of their questions."""

    facts: Row
    rows: dict[str, Row] = field(default_factory=dict)
    path: Path | None = None
    file: IO[bytes] | None = None
    size: int = 0  # bytes of the file's whole lines

    def add(self, row: Row) -> None:
        """Note what came of a question, in the file too. Raises Dsv2Error."""
        self.rows[row["key"]] = row
        self.write(row)

    def write(self, row: Row) -> None:
        """Raises Dsv2Error."""
        if self.file is not None:
            try:
                self.file.write(json_text(row).encode() + b"\n")
                self.file.flush()
            except OSError as error:
                fix = "make room, then run the same command again: it goes on from here"
                raise Dsv2Error(f"{self.path} could not be written", why=reason(error), fix=fix) from None

    def of_task(self, task: str) -> list[Row]:
        return [row for row in self.rows.values() if row["task"] == task]


def load(path: Path) -> Record:
    """A file that a run has written, but for a last line that was cut off. Raises UsageError."""
    path, rows, size, cut = path_of(path), list[Row](), 0, False
    try:
        require_file(path)
        with path.open("rb") as file:
            for number, line in enumerate(lines_within(file), 1):
                row = row_of(line)
                if cut or (row is not None and number > 1 and not is_answer(row)):
                    why = f"line {number - cut} is no answer of a run"
                    raise UsageError(f"{path} is damaged", why=why, fix="take the line out, or run it again")
                if row is None:
                    cut = True
                else:
                    rows.append(row)
                    size += len(line)
    except OSError as error:
        raise UsageError(f"{path} cannot be read", why=reason(error)) from None
    if not rows or rows[0].get("format") != FORMAT or not isinstance(rows[0].get("settings"), dict):
        why = "its first line does not say that dsv2 eval wrote it"
        raise UsageError(f"{path} is no result of dsv2 eval", why=why, fix="a file written with --save")
    return Record(rows[0], {row["key"]: row for row in rows[1:]}, path, size=size)


# What the values of a row are; others are anything.
KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("key", "task", "subset", "digest", "remark", "error"), (str,)),
    **dict.fromkeys(("nats", "kept_places", "program"), (str,)),
    **dict.fromkeys(("prompt_tokens", "reused_tokens", "generated_tokens", "bytes", "shots"), (int,)),
    "right": (bool, type(None)),
    "tokens": (int, list),
    "top": (int, str),
    "kept": (list,),
}


def is_answer(row: Row) -> bool:
    """Whether a row is one that a run has written."""
    if not {"key", "task", "subset"} <= row.keys():
        return False
    if any(type(row[name]) not in kinds for name, kinds in KINDS.items() if name in row):
        return False
    pairs = row.get("kept", [])
    if not all(isinstance(each, list) and len(each) == 2 for each in pairs):
        return False
    return row["task"] != "perplexity" or "error" in row or {"nats", "top", "tokens", "bytes"} <= row.keys()


def row_of(line: bytes) -> Row | None:
    """A whole line as an object."""
    try:
        row = parse_json(line)
    except ValueError:
        return None
    return row if line.endswith(b"\n") and isinstance(row, dict) else None


@contextlib.contextmanager
def recording(facts: Row, path: Path | None) -> Iterator[Record]:
    """A record to add to: a new one, or with `path` that of the file there, of a run with the same facts.

    Raises UsageError where the file is of another run, or written by one just now; Dsv2Error.
    """
    facts = {"format": FORMAT} | facts
    if path is None:
        yield Record(facts)
        return
    path = path_of(path)
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is no file", why="what is saved is read again", fix="another --save")
    if not path.parent.is_dir():
        raise UsageError(f"There is no folder {path.parent}", fix="make it, or another --save")
    try:
        with places.appended(path, "--save") as file:
            yield gone_on_with(facts, path, file)
            os.fsync(file.fileno())
    except OSError as error:
        fix = "another --save"
        raise Dsv2Error(f"{path} could not be written", why=reason(error), fix=fix) from None


def gone_on_with(facts: Row, path: Path, file: IO[bytes]) -> Record:
    """The record in an open file, whose last line is cut off where it is not whole. Raises UsageError."""
    if path.stat().st_size == 0 or is_cut_header(path):
        file.truncate(0)
        record = Record(facts, path=path, file=file)
        record.write(facts)
        return record
    record = load(path)
    for key, what in ALIKE.items():
        if record.facts.get(key) != facts[key]:
            why = f"{what}: {brief(record.facts.get(key), facts[key])}"
            raise UsageError(f"{path} is of another run", why=why, fix="another --save, or the same options")
    file.truncate(record.size)
    record.file = file
    return record


def is_cut_header(path: Path) -> bool:
    """Whether all that is in a file is the beginning of its first line."""
    with path.open("rb") as file:
        line = file.readline(2**16)
    return line.startswith(json_text({"format": FORMAT})[:-1].encode()) and not line.endswith(b"\n")


def brief(then: Any, now: Any) -> str:
    """How two values differ, in few words."""
    if isinstance(then, dict) and isinstance(now, dict):
        keys = [key for key in {**then, **now} if then.get(key) != now.get(key)]
        return ", ".join(f"{key} {then.get(key)}, now {now.get(key)}" for key in keys)
    return f"{str(then)[:60]}, now {str(now)[:60]}"


def packed(kind: str, numbers: Iterable[float] | Iterable[int]) -> str:
    """Numbers as text: of array's kinds "i" and "f", little-endian, base64."""
    held = array(kind, numbers)
    if sys.byteorder == "big":
        held.byteswap()
    return base64.b64encode(held.tobytes()).decode()


def unpacked(kind: str, text: Any) -> array[Any]:
    """The numbers again. Raises UsageError for a text that is none of packed's."""
    held = array(kind)
    try:
        held.frombytes(base64.b64decode(text, validate=True))
    except (ValueError, TypeError):
        raise UsageError(
            "A saved result is damaged", why="its numbers can not be read", fix="run it again"
        ) from None
    if sys.byteorder == "big":
        held.byteswap()
    return held
