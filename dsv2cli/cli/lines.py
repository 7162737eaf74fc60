"""`dsv2 complete --batch` and `--jsonl`: prompts line by line, answered in order.

A file of answers goes on where an interrupted run stopped.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import queue
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from dsv2cli import places
from dsv2cli.cli import ui
from dsv2cli.engine.request import RULES, Request
from dsv2cli.engine.store import checked
from dsv2cli.errors import Dsv2Error, UsageError
from dsv2cli.outside import Number, json_text, lines_within, parse_json, path_of, reason, require_file

PROMPTS = ("prompt", "prompt_ids", "messages")
# What the parts of an answer's fingerprint stand for, in this order.
MARKS = ("another prompt", "other options", "another model")
WAITING = 1000  # lines of a pipe that are read before they are needed
NUMBERS = {"seed": Number(0, 2**64 - 1, whole=True), "max_new_tokens": Number(1, 2**64, whole=True), **RULES}
KNOWN = {"id", "stop", *PROMPTS, *NUMBERS}


class Asking(Protocol):
    """A prompt that is asked, and what comes of it: a Job, or a Call to a server."""

    request: Any
    result: Any
    error: str
    failure: Dsv2Error | None


class Answering(Protocol):
    """What answers: a model of this machine, or one behind a server."""

    @property
    def has_text(self) -> bool:
        """Whether it answers in text, and not in ids alone."""
        ...

    def job_of(self, asked: Any, request: Any) -> Any:
        """What asking.Asked asks for."""
        ...

    def job(self, key: str, prompt: Any, request: Any) -> Any:
        """A prompt as checked_prompt gives it. Raises Dsv2Error."""
        ...

    def bad(self, request: Any, error: str) -> Any:
        """What stands for a line that can not be run."""
        ...

    def stream(self, job: Any) -> Iterator[str]: ...

    def samples(self, jobs: list[Any]) -> Iterator[Any]:
        """Several answers to one prompt, in their order."""
        ...

    def in_order(self, jobs: Iterable[Any], width: int) -> Iterator[Any]:
        """Jobs as they are done, in their order, some at once; None among them: none has come yet."""
        ...

    def report(self, job: Any, asked: Any = None, echo: bool = False, error: str = "") -> dict[str, Any]:
        """The --json object."""
        ...

    def mark(self) -> str:
        """What tells this model from others."""
        ...


@dataclass
class Line:
    """One line of the input: its number, counted from 1, its id (the number, where it has none), what it asks
    for, and what tells it from another.
    """

    number: int
    id: Any
    job: Asking
    digest: str


def parse(text: bytes) -> dict[str, Any]:
    """A line's object. Raises Dsv2Error for what is none, or has keys that are not known."""
    try:
        content = parse_json(text)
    except ValueError as error:
        raise Dsv2Error("it is not JSON", why=reason(error)) from None
    if not isinstance(content, dict):
        raise Dsv2Error("it is not a JSON object")
    for key in content.keys() - KNOWN:
        raise Dsv2Error(f"{key!r} is unknown", why=f"keys are {', '.join(sorted(KNOWN))}")
    return content


class Lines:
    """How lines become jobs and jobs become lines."""

    def __init__(self, model: Answering, request: Request, skip_bad: bool, seeded: bool = True) -> None:
        """`request` is what a line asks for where it says nothing, with a seed that somebody chose where
        `seeded`; `skip_bad`: a bad line is answered with its error.
        """
        self.model, self.request, self.skip_bad, self.seeded = model, request, skip_bad, seeded
        self.bad: UsageError | None = None  # the bad line that ended a run, after those before it

    def marks(self) -> list[str]:
        """What tells this run's options and model from others, each a few letters. Raises Dsv2Error."""
        grammar = None if self.request.grammar is None else self.request.grammar.text
        options = replace(self.request, grammar=None, seed=self.request.seed if self.seeded else 0)
        ends, options = sorted(options.eos_ids), replace(options, eos_ids=frozenset(), speculate=False)
        # A newer option is named only where it is used: answers of earlier versions are gone on with.
        asked = repr((options, ends, grammar)).replace(", prompt_logprobs=None", "")
        return [short(asked), short(self.model.mark())]

    def read(self, lines: Iterable[bytes | None], name: str) -> Iterator[Line | None]:
        """A Line for each that is not blank, and None for None: nothing has come yet.

        One that can not be run carries its error, or raises it as UsageError.
        """
        number = 0
        for text in lines:
            if text is None:
                yield None
                continue
            number += 1
            if not text.strip():
                continue
            content: Any = None
            try:
                content = parse(text)
                job = self.job(content, number)
            except Dsv2Error as error:
                if not self.skip_bad:
                    fix = "mend it, or --on-bad-line skip"
                    raise UsageError(f"{name}, line {number}: {error.what}", why=error.why, fix=fix) from None
                job = self.model.bad(self.request, error.sentence)
            line_id = content.get("id", number) if isinstance(content, dict) else number
            yield Line(number, line_id, job, short(text.strip().decode("utf-8", "backslashreplace")))

    def job(self, content: dict[str, Any], number: int) -> Asking:
        """The command line's request with the line's own values on top; its seed is the run's plus the line's
        number.

        Raises Dsv2Error.
        """
        given = [key for key in PROMPTS if content.get(key) is not None]
        if len(given) != 1 or not content[given[0]]:
            what = "it has several prompts" if len(given) > 1 else "it has no prompt"
            raise Dsv2Error(what, why=f"give one of {', '.join(PROMPTS)}")
        for key, rule in NUMBERS.items():
            if key in content and content[key] not in rule:
                what = f"{key} = {str(content[key])[:80]!r} makes no sense"
                raise Dsv2Error(what, why=f"it must be {rule}")
        stop = content.get("stop", list(self.request.stop))
        stop = [stop] if isinstance(stop, str) else stop
        if not isinstance(stop, list) or not all(isinstance(text, str) for text in stop):
            raise Dsv2Error("stop is neither a text nor a list of texts")
        if stop and not (self.model.has_text and all(stop)):
            raise Dsv2Error("stop can not be used", why="it needs a tokenizer, and texts that are not empty")
        request = replace(self.request, seed=self.request.seed + number, stop=tuple(stop))
        own = request.having(**{key: content[key] for key in NUMBERS if key in content})
        return self.model.job(given[0], checked_prompt(given[0], content[given[0]]), own)

    def answer(self, line: Line, job: Asking) -> dict[str, Any]:
        """The object of a finished job."""
        said = {"error": job.error}
        if not job.error or job.result.finish_reason:
            said = self.model.report(job, error=job.error)
        return {"id": line.id, "line": line.number, **said}

    def answer_stdin(self) -> None:
        """Each line answered on stdout before the next is read, so that a program may wait for its answer."""
        for line in self.read(ui.stdin_bytes(), "stdin"):
            assert line is not None
            for job in self.model.in_order([line.job], 1):
                ui.write_json(self.answer(line, job))

    def answer_file(self, path: Path, out: Path, width: int, restart: bool = False) -> tuple[int, int]:
        """Answer what is not answered yet, or all where `restart` says so; gives how many lines were written
        now, and how many of them are errors.

        Answers stand in the order of the prompts, one line each, and reach the file as soon as all before
        them are done. Raises UsageError where a file is not what it should be, or answers stand there to
        other prompts, and Dsv2Error for a full disk.
        """
        out = destination(out)
        running: list[Line] = []
        source, total = self.source(path, running)
        marks = self.marks()
        if restart:
            put_away(out)
        try:
            with places.appended(out, "--output") as file, ui.counting("answering", total) as tick:
                lines = self.read(source, str(path))
                if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    done = Done(out)
                    lines = done.skipped(lines, marks)
                    for _ in done.answers:
                        tick()
                counts = self.write(lines, running, file, width, marks, tick)
        except BrokenPipeError:
            raise ui.ReaderGone from None
        except OSError as error:
            why, fix = reason(error), "make room, then run the same command again"
            raise Dsv2Error(f"{out} could not be written", why=why, fix=fix) from None
        if self.bad is not None:
            raise self.bad
        return counts

    def source(self, path: Path, running: list[Line]) -> tuple[Iterable[bytes | None], int]:
        """The lines of a file, all of which are looked at first, and how many there are; or of a pipe, as
        they come, where None says that none has come and those `running` may go on.

        Raises UsageError.
        """
        if str(path) != "-":
            path = path_of(path)
        try:
            if str(path) == "-":
                return as_they_come(ui.stdin_bytes(), running), 0
            if not stat.S_ISREG(require_file(path, pipes=True).st_mode):
                return as_they_come(lines_of(path), running), 0
            # What is wrong is said before an hour's work, not after.
            return lines_of(path), sum(1 for _ in self.read(lines_of(path), str(path)))
        except OSError as error:
            raise UsageError(f"{path} can not be read", why=reason(error)) from None

    def write(
        self,
        lines: Iterator[Line | None],
        running: list[Line],
        file: Any,
        width: int,
        marks: list[str],
        tick: Callable[[], None],
    ) -> tuple[int, int]:
        """Run lines, `width` at once, and write their answers in order; gives how many, and how many errors.

        `running` are those that are not answered yet. Raises OSError.
        """
        written = errors = 0

        def jobs() -> Iterator[Asking | None]:
            try:
                for line in lines:
                    if line is not None:
                        running.append(line)
                    yield None if line is None else line.job
            except UsageError as error:
                self.bad = error

        for job in self.model.in_order(jobs(), width):
            line = running.pop(0)
            answer = self.answer(line, job) | {"fingerprint": "-".join([line.digest, *marks])}
            file.write(json_text(answer).encode() + b"\n")
            file.flush()
            written, errors = written + 1, errors + bool(job.error)
            tick()
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            os.fsync(file.fileno())
        return written, errors


def checked_prompt(key: str, prompt: Any) -> Any:
    """A line's prompt, of one of the kinds in PROMPTS. Raises Dsv2Error for what is none."""
    if key == "messages":
        return checked(prompt, "messages")
    if key == "prompt_ids":
        if not isinstance(prompt, list) or not all(type(token) is int for token in prompt):
            raise Dsv2Error("prompt_ids is not a list of whole numbers")
    elif not isinstance(prompt, str):
        raise Dsv2Error("prompt is not a text")
    return prompt


def short(text: str) -> str:
    """Some letters that stand for a text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def lines_of(path: Path) -> Iterator[bytes]:
    """Raises OSError."""
    with path.open("rb") as file:
        yield from lines_within(file)


def as_they_come(lines: Iterable[bytes], running: list[Line]) -> Iterator[bytes | None]:
    """Lines of a pipe, read ahead by a thread; None where none is there and others are `running`.

    Raises what reading raises.
    """
    box: queue.Queue[bytes | Exception | None] = queue.Queue(WAITING)

    def read() -> None:
        try:
            for line in lines:
                box.put(line)
            box.put(None)
        except (OSError, Dsv2Error) as error:
            box.put(error)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            item = box.get(block=not running)
        except queue.Empty:
            yield None
            continue
        if item is None:
            return
        if isinstance(item, Exception):
            raise item
        yield item


def destination(out: Path) -> Path:
    """Where answers go; `-` is stdout. Raises UsageError for what can not be written."""
    if str(out) == "-":
        return Path("/dev/stdout")
    out = path_of(out)
    if out.is_dir():
        fix = f"--output {out}/OUT.jsonl"
        raise UsageError(f"{out} is a folder", why="--output is a file of answers", fix=fix)
    if not out.exists() and not out.is_symlink() and not out.parent.is_dir():
        raise UsageError(f"There is no folder {out.parent}", fix="make it, or another --output")
    return out


def put_away(out: Path) -> None:
    """Give a file of earlier answers another name. Raises Dsv2Error, and UsageError where a run writes it."""
    if out.is_file():
        number = next(n for n in itertools.count(1) if not os.path.lexists(f"{out}.{n}"))
        try:
            with places.appended(out, "--output"):
                out.rename(f"{out}.{number}")
        except OSError as error:
            raise Dsv2Error(f"{out} could not be renamed", why=reason(error)) from None
        ui.note(f"earlier answers are in {out}.{number}")


class Done:
    """What an earlier run has written to a file of answers."""

    def __init__(self, out: Path) -> None:
        """Raises UsageError for a file of something else, OSError."""
        self.out = out
        data = out.read_bytes()
        self.whole = data[: data.rfind(b"\n") + 1]
        self.rest = data[len(self.whole) :]  # a line that was cut off
        try:
            read = [parse_json(line) for line in self.whole.splitlines()]
            self.answers = [(answer["id"], answer["fingerprint"].split("-")) for answer in read]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise self.something_else() from None

    def something_else(self) -> UsageError:
        """What to say of a file that is not ours."""
        why, fix = "its lines are not answers of this version of dsv2", "another --output, or --restart"
        return UsageError(f"{self.out} holds something else", why=why, fix=fix)

    def skipped(self, lines: Iterator[Line | None], marks: list[str]) -> Iterator[Line | None]:
        """The lines that are not answered yet. A last answer that was cut off is taken away where it is the
        beginning of the next line's.

        Raises UsageError where answers stand to other lines, or came from other options or another model.
        """
        coming = (line for line in lines if line is not None)
        for answered, marked in self.answers:
            line = next(coming, None)
            if line is None:
                raise self.other("it has more answers than there are prompts")
            now = [line.digest, *marks]
            changed = [name for name, was, what in zip(MARKS, marked, now, strict=False) if was != what]
            if line.id != answered or len(marked) != len(now):
                raise self.other(
                    f"its answer {answered!r} stands where line {line.number} has id {line.id!r}"
                )
            if changed:
                raise self.other(f"line {line.number} was answered with {changed[0]}")
        if self.rest:
            following = next(coming, None)
            if following is None:
                raise self.something_else()
            start = json.dumps({"id": following.id, "line": following.number}).encode().removesuffix(b"}")
            if self.rest[: len(start)] != start[: len(self.rest)]:
                raise self.something_else()
            os.truncate(self.out, len(self.whole))
            return itertools.chain([following], lines)
        return lines

    def other(self, why: str) -> UsageError:
        """What to say of answers to other prompts."""
        return UsageError(
            f"{self.out} belongs to other prompts", why=why, fix="another --output, or --restart"
        )
