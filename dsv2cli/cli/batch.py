"""`dsv2 complete --batch`: a file of prompts, answered in order, going on where an interrupted run stopped."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dsv2cli.checkpoint.tokenizer import Tokenizer
from dsv2cli.cli import options as opt
from dsv2cli.cli import ui
from dsv2cli.engine.batch import Job, run_batch
from dsv2cli.engine.generate import Request, check_prompt
from dsv2cli.engine.store import checked
from dsv2cli.errors import Dsv2Error, UsageError

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
BEGINNING = b'{"id": '  # of every line of answers
KNOWN = {"id", "prompt", "prompt_ids", "messages", "max_new_tokens", "seed", "stop", *SAMPLING}


@dataclass
class Line:
    """One line of the input: its number, counted from 1, its id (the number, where it has none) and what it asks for."""

    number: int
    id: Any
    job: Job


def read_jobs(
    lines: Iterable[bytes],
    name: str,
    opened: opt.Opened,
    tokenizer: Tokenizer | None,
    request: Request,
    skip_bad: bool,
) -> Iterator[Line]:
    """A line for each that is not blank. One that can not be run carries its error; without `skip_bad` it is raised."""
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        content: Any = None
        try:
            content = parse(text)
            job = make_job(content, number, opened, tokenizer, request)
        except Dsv2Error as error:
            if not skip_bad:
                raise UsageError(
                    f"{name}, line {number}: {error.what}",
                    why=error.why,
                    fix="mend it, or --on-bad-line skip",
                ) from None
            job = Job([], request, error=f"{error.what} ({error.why})" if error.why else error.what)
        yield Line(number, content.get("id", number) if isinstance(content, dict) else number, job)


def parse(text: bytes) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise Dsv2Error("it is not JSON", why=str(error)) from None
    if not isinstance(content, dict):
        raise Dsv2Error("it is not a JSON object")
    for key in content.keys() - KNOWN:
        raise Dsv2Error(f"{key!r} is unknown", why=f"keys are {', '.join(sorted(KNOWN))}")
    return content


def make_job(
    content: dict[str, Any], number: int, opened: opt.Opened, tokenizer: Tokenizer | None, request: Request
) -> Job:
    """The command line's request with the line's own values on top; its seed is the run's plus the line's number."""
    given = [key for key in ("prompt", "prompt_ids", "messages") if content.get(key)]
    if len(given) != 1:
        raise Dsv2Error(
            "it has no prompt" if not given else "it has several prompts",
            why="give one of prompt, prompt_ids, messages",
        )
    prompt = content[given[0]]
    if given[0] == "prompt_ids":
        if not isinstance(prompt, list) or not all(type(token) is int for token in prompt):
            raise Dsv2Error("prompt_ids is not a list of whole numbers")
        ids = prompt
    else:
        tokenizer = tokenizer or opened.tokenizer()  # says what is missing
        if given[0] == "prompt" and not isinstance(prompt, str):
            raise Dsv2Error("prompt is not a text")
        ids = (
            tokenizer.encode(prompt)
            if given[0] == "prompt"
            else tokenizer.encode_chat(checked(prompt, "messages"))
        )
    check_prompt(opened.config, ids)
    seed, most, stop = (
        content.get(key, value)
        for key, value in (
            ("seed", request.seed + number),
            ("max_new_tokens", request.max_new_tokens),
            ("stop", list(request.stop)),
        )
    )
    if type(seed) is not int or seed < 0 or type(most) is not int or most < 1:
        raise Dsv2Error("seed and max_new_tokens are whole numbers", why="max_new_tokens is at least 1")
    if not isinstance(stop, list) or not all(isinstance(text, str) for text in stop):
        raise Dsv2Error("stop is not a list of texts")
    own = {key: content[key] for key in SAMPLING if key in content}
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in own.values()):
        raise Dsv2Error("sampling values are numbers")
    return Job(
        ids,
        replace(
            request,
            sampling=replace(request.sampling, **own),
            seed=seed,
            max_new_tokens=most,
            stop=tuple(stop),
        ),
    )


def finished(out: Path) -> list[Any]:
    """The ids answered in an earlier run; a last line that was cut off is taken away, so that its prompt runs again."""
    if not out.exists():
        return []
    data = out.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    cut_off = data[len(whole) :]
    try:
        ids = [json.loads(line)["id"] for line in whole.splitlines()]
        if cut_off[: len(BEGINNING)] != BEGINNING[: len(cut_off)]:
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise UsageError(
            f"{out} holds something else", why="its lines are not answers of dsv2", fix="another --output"
        ) from None
    os.truncate(out, len(whole))
    return ids


def lines_of(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from file


def answer_lines(opened: opt.Opened, request: Request, skip_bad: bool, report: Any) -> None:
    """Each line of stdin answered on stdout before the next is read, so that a program may wait for its answer."""
    tokenizer = opened.tokenizer_if_any()
    for line in read_jobs(
        sys.stdin.buffer if sys.stdin is not None else (), "stdin", opened, tokenizer, request, skip_bad
    ):
        for job in run_batch(opened.model, tokenizer, [line.job], 1):
            ui.write_json(answer(line, job, opened, report))


def answer(line: Line, job: Job, opened: opt.Opened, report: Any) -> dict[str, Any]:
    return {
        "id": line.id,
        "line": line.number,
        **({"error": job.error} if job.error else report(job.result, opened, job.request)),
    }


def run(
    path: Path, out: Path, opened: opt.Opened, request: Request, width: int, skip_bad: bool, report: Any
) -> tuple[int, int]:
    """Answer what is not answered yet; gives how many lines were written now, and how many of them are errors.

    Answers stand in the order of the prompts, one line each, and reach the file as soon as all before them are done.
    """
    tokenizer = opened.tokenizer_if_any()
    try:
        # All lines are read before the first is run: what is wrong is said before an hour's work, not after.
        total = sum(1 for _ in read_jobs(lines_of(path), str(path), opened, tokenizer, request, skip_bad))
    except OSError as error:
        raise UsageError(f"{path} can not be read", why=error.strerror or str(error)) from None
    done = finished(out)
    lines = read_jobs(lines_of(path), str(path), opened, tokenizer, request, skip_bad)
    for answered in done:
        line = next(lines, None)
        if line is None or line.id != answered:
            where = (
                f"its answer {answered!r} stands where line {line.number} has id {line.id!r}"
                if line
                else "it has more answers than there are prompts"
            )
            raise UsageError(f"{out} belongs to other prompts", why=where, fix="another --output")
    written = errors = 0
    running: list[Line] = []

    def jobs() -> Iterator[Job]:
        for line in lines:
            running.append(line)
            yield line.job

    try:
        with ui.counting("answering", total) as tick, out.open("ab") as file:
            for _ in done:
                tick()
            for job in run_batch(opened.model, tokenizer, jobs(), width):
                line = running.pop(0)
                file.write(json.dumps(answer(line, job, opened, report), ensure_ascii=False).encode() + b"\n")
                file.flush()
                written, errors = written + 1, errors + bool(job.error)
                tick()
            os.fsync(file.fileno())
    except OSError as error:
        raise Dsv2Error(
            f"{out} could not be written",
            why=error.strerror or str(error),
            fix="make room, then run the same command again",
        ) from None
    return written, errors
