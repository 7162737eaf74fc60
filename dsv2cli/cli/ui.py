"""Everything that reaches the screen: stdout for the model's words and JSON, stderr for the rest."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dsv2cli.errors import Dsv2Error

if TYPE_CHECKING:
    from rich.console import Console

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def harmless(text: str) -> str:
    """Control characters made visible, so that no escape sequence in a text can steer the terminal."""

    def show(match: re.Match[str]) -> str:
        code = ord(match.group())
        return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else f"\\x{code:02x}"

    return _CONTROL.sub(show, text)


def stderr() -> Console:
    """For sentences: never broken into lines."""
    from rich.console import Console

    return Console(file=sys.stderr, highlight=False, soft_wrap=True)


def stdout(wrap: bool = False) -> Console:
    """For tables and cards. Lines are broken only where `wrap` says so; into a pipe they are never broken."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else 120
    return Console(file=sys.stdout, highlight=False, markup=False, soft_wrap=not wrap, width=width)


class ReaderGone(Exception):
    """Whoever read stdout, such as `head`, has had enough. Not a failure."""


def write(text: str) -> None:
    """The model's text to stdout at once: as it is into a pipe or file, made harmless on a terminal."""
    emit(harmless(text) if sys.stdout.isatty() else text)


def emit(text: str) -> None:
    """Text to stdout at once. Raises ReaderGone."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter flushes stdout once more when it ends; let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise ReaderGone from None


def write_json(value: Any) -> None:
    """One object on one line. On a terminal everything beyond ASCII is escaped."""
    emit(json.dumps(value, ensure_ascii=sys.stdout.isatty()) + "\n")


def note(text: str) -> None:
    """A remark for the person at the terminal; nothing where stderr is not one."""
    if sys.stderr.isatty():
        stderr().print(harmless(text), style="dim", markup=False, soft_wrap=False)


def show_error(error: Dsv2Error) -> None:
    console = stderr()
    for label, line in (("error", error.what), ("  why", error.why), ("  fix", error.fix)):
        if line:
            console.print(f"[bold red]{label}:[/]" if label == "error" else f"[bold]{label}:[/]", end=" ")
            console.print(harmless(line), markup=False)


@contextmanager
def loading(name: str) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar with GB and GB/s on stderr while weights are read; gives the callback, or None without a
    terminal.
    """
    if not sys.stderr.isatty():
        yield None
        return
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    bar = Progress(
        TextColumn("loading {task.fields[name]}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=stderr(),
        transient=True,
    )
    with bar:
        task = bar.add_task("load", name=harmless(name), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def counting(what: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar on stderr for `total` steps; gives the callback for one step done."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.progress import Progress

    with Progress(console=stderr(), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)


def stdin_lines() -> Iterator[str]:
    """Lines of stdin as they come, so that a program may wait for an answer before it writes the next."""
    for line in sys.stdin.buffer if sys.stdin is not None else ():
        yield as_text(line).rstrip("\r\n")


def read_stdin() -> str:
    """All of stdin as UTF-8, or nothing where it is a terminal or closed. Raises Dsv2Error on other bytes."""
    if sys.stdin is None or sys.stdin.isatty():
        return ""
    return as_text(sys.stdin.buffer.read())


def as_text(data: bytes) -> str:
    """Bytes of stdin as UTF-8. Raises Dsv2Error."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Dsv2Error(
            "stdin is not UTF-8 text",
            why=str(error),
            fix="convert it first, for example with iconv -t utf-8",
            exit_code=2,
        ) from None
