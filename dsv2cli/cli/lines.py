"""`dsv2 complete --batch` and `--jsonl`: prompts line by line, answered in order.

A file of answers goes on where an interrupted run stopped.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dsv2cli.cli import ui
from dsv2cli.engine.batch import Job, run_batch
from dsv2cli.engine.generate import Request, check_prompt
from dsv2cli.engine.sampling import RULES
from dsv2cli.engine.store import checked
from dsv2cli.errors import Dsv2Error, UsageError
from dsv2cli.outside import Number, mended, parse_json, path_of, read_bytes, reason
from dsv2cli.run.open import Opened

PROMPTS = ("prompt", "prompt_ids", "messages")
BEGINNING = b'{"id": '  # of every line of answers
NUMBERS = {"seed": Number(0, 2**64, whole=True), "max_new_tokens": Number(1, 2**64, whole=True), **RULES}
KNOWN = {"id", "stop", *PROMPTS, *NUMBERS}


@dataclass
class Line:
    """One line of the input: its number, counted from 1, its id (the number, where it has none) and what it
    asks for.
    """

    number: int
    id: Any
    job: Job


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
    """How lines become jobs and jobs become lines. `report` makes the object of an answer."""

    def __init__(
        self, opened: Opened, request: Request, skip_bad: bool, report: Callable[..., dict[str, Any]]
    ) -> None:
        """`request` is what a line asks for where it says nothing; `skip_bad`: a bad line is answered with
        its error.
        """
        self.opened, self.request, self.skip_bad, self.report = opened, request, skip_bad, report
        self.tokenizer = opened.tokenizer_if_any()

    def read(self, lines: Iterable[bytes], name: str) -> Iterator[Line]:
        """A Line for each that is not blank.

        One that can not be run carries its error, or raises it as UsageError.
        """
        for number, text in enumerate(lines, 1):
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
                job = Job([], self.request, error=error.sentence)
            yield Line(number, content.get("id", number) if isinstance(content, dict) else number, job)

    def job(self, content: dict[str, Any], number: int) -> Job:
        """The command line's request with the line's own values on top; its seed is the run's plus the line's
        number.

        Raises Dsv2Error.
        """
        ids, request = self.prompt_ids(content), self.request
        check_prompt(self.opened.config, ids)
        for key, rule in NUMBERS.items():
            if key in content and content[key] not in rule:
                what = f"{key} = {str(content[key])[:80]!r} makes no sense"
                raise Dsv2Error(what, why=f"it must be {rule}")
        seed = content.get("seed", request.seed + number)
        most = content.get("max_new_tokens", request.max_new_tokens)
        stop = content.get("stop", list(request.stop))
        stop = [stop] if isinstance(stop, str) else stop
        if not isinstance(stop, list) or not all(isinstance(text, str) for text in stop):
            raise Dsv2Error("stop is neither a text nor a list of texts")
        sampling = replace(request.sampling, **{key: content[key] for key in RULES if key in content})
        return Job(ids, replace(request, sampling=sampling, seed=seed, max_new_tokens=most, stop=tuple(stop)))

    def prompt_ids(self, content: dict[str, Any]) -> list[int]:
        """Of the one prompt that a line has. Raises Dsv2Error."""
        given = [key for key in PROMPTS if content.get(key)]
        if len(given) != 1:
            what = "it has several prompts" if given else "it has no prompt"
            raise Dsv2Error(what, why=f"give one of {', '.join(PROMPTS)}")
        key, prompt = given[0], content[given[0]]
        if key == "prompt_ids":
            if not isinstance(prompt, list) or not all(type(token) is int for token in prompt):
                raise Dsv2Error("prompt_ids is not a list of whole numbers")
            return prompt
        tokenizer = self.tokenizer or self.opened.tokenizer()  # says what is missing
        if key == "messages":
            return tokenizer.encode_chat(checked(prompt, "messages"))
        if not isinstance(prompt, str):
            raise Dsv2Error("prompt is not a text")
        return tokenizer.encode(prompt)

    def answer(self, line: Line, job: Job) -> dict[str, Any]:
        """The object of a finished job."""
        said = {"error": job.error}
        if not job.error or job.result.finish_reason:
            said = self.report(job.result, self.opened, job.request) | (said if job.error else {})
        return {"id": line.id, "line": line.number, **said}

    def answer_stdin(self) -> None:
        """Each line answered on stdout before the next is read, so that a program may wait for its answer."""
        for line in self.read(ui.stdin_bytes(), "stdin"):
            for job in run_batch(self.opened.runner, self.tokenizer, [line.job], 1):
                ui.write_json(self.answer(line, job))

    def answer_file(self, path: Path, out: Path, width: int) -> tuple[int, int]:
        """Answer what is not answered yet; gives how many lines were written now, and how many of them are
        errors.

        Answers stand in the order of the prompts, one line each, and reach the file as soon as all before
        them are done. Raises UsageError where a file is not what it should be, Dsv2Error for a full disk.
        """
        out = destination(out)
        try:
            source = lines_of(path)
            # All lines are read before the first is run: what is wrong is said before an hour's work, not
            # after.
            total = sum(1 for _ in self.read(source(), str(path)))
        except OSError as error:
            raise UsageError(f"{path} can not be read", why=reason(error)) from None
        done = finished(out) if out.is_file() else []
        lines = self.read(source(), str(path))
        skip_answered(lines, done, out)
        try:
            with ui.counting("answering", total) as tick, out.open("ab") as file:
                for _ in done:
                    tick()
                return self.write(lines, file, width, tick)
        except BrokenPipeError:
            raise ui.ReaderGone from None
        except OSError as error:
            why, fix = error.strerror or str(error), "make room, then run the same command again"
            raise Dsv2Error(f"{out} could not be written", why=why, fix=fix) from None

    def write(
        self, lines: Iterator[Line], file: Any, width: int, tick: Callable[[], None]
    ) -> tuple[int, int]:
        """Run lines, `width` at once, and write their answers in order; gives how many, and how many errors.

        Raises OSError.
        """
        written = errors = 0
        running: list[Line] = []

        def jobs() -> Iterator[Job]:
            for line in lines:
                running.append(line)
                yield line.job

        for job in run_batch(self.opened.runner, self.tokenizer, jobs(), width):
            answer = self.answer(running.pop(0), job)
            file.write(mended(json.dumps(answer, ensure_ascii=False, allow_nan=False)).encode() + b"\n")
            file.flush()
            written, errors = written + 1, errors + bool(job.error)
            tick()
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            os.fsync(file.fileno())
        return written, errors


def lines_of(path: Path) -> Callable[[], Iterable[bytes]]:
    """What gives the lines of a file, each time it is called; of a pipe, and of stdin for `-`, they are kept.

    Raises OSError where they can not be read.
    """
    if str(path) == "-":
        kept = list(ui.stdin_bytes())
        return lambda: kept
    path = path_of(path)
    if not path.is_file():
        piped = read_bytes(path, pipes=True).splitlines(keepends=True)
        return lambda: piped

    def lines() -> Iterator[bytes]:
        with path.open("rb") as file:
            yield from file

    return lines


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


def finished(out: Path) -> list[Any]:
    """The ids answered in an earlier run; a last line that was cut off is taken away, so that its prompt runs
    again.

    Raises UsageError for a file of something else.
    """
    data = out.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    cut_off = data[len(whole) :]
    try:
        ids = [parse_json(line)["id"] for line in whole.splitlines()]
        if cut_off[: len(BEGINNING)] != BEGINNING[: len(cut_off)]:
            raise ValueError
    except (ValueError, KeyError, TypeError):
        why = "its lines are not answers of dsv2"
        raise UsageError(f"{out} holds something else", why=why, fix="another --output") from None
    os.truncate(out, len(whole))
    return ids


def skip_answered(lines: Iterator[Line], done: list[Any], out: Path) -> None:
    """Pass over the lines whose ids are `done`. Raises UsageError where others stand in their places."""
    for answered in done:
        line = next(lines, None)
        if line is None or line.id != answered:
            where = "it has more answers than there are prompts"
            if line is not None:
                where = f"its answer {answered!r} stands where line {line.number} has id {line.id!r}"
            raise UsageError(f"{out} belongs to other prompts", why=where, fix="another --output")
