"""Everything that reaches the screen: stdout for the model's words and JSON, stderr for the rest."""

from __future__ import annotations

import errno
import io
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from dsv2cli.errors import Dsv2Error, UsageError
from dsv2cli.outside import as_text, json_text, lines_within, read_within

if TYPE_CHECKING:
    from rich.console import Console

# Controls of both sets, what else ends a line, what turns the direction of writing, and halves of characters.
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def harmless(text: str) -> str:
    """What could steer a terminal made visible: no escape sequence in a text reaches it."""

    def show(match: re.Match[str]) -> str:
        code = ord(match.group())
        if code < 0x20:
            return chr(0x2400 + code)
        return "\u2421" if code == 0x7F else f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"

    return _CONTROL.sub(show, text)


def stderr() -> Console:
    """For sentences: never broken into lines."""
    return console(sys.stderr, soft_wrap=True)


def stdout(wrap: bool = False) -> Console:
    """For tables and cards. Lines are broken only where `wrap` says so; into a pipe they are never broken."""
    return console(sys.stdout, soft_wrap=not wrap, width=None if sys.stdout.isatty() else 120)


def console(file: TextIO, **settings: Any) -> Console:
    """A rich Console for which every text, in a table's cell too, is text: no markup, no controls."""
    from rich.console import Console
    from rich.text import Text

    class Harmless(Console):
        def render_str(self, text: str, **settings: Any) -> Text:
            return super().render_str(harmless(text), **settings)

    return Harmless(file=file, highlight=False, markup=False, emoji=False, **settings)


class ReaderGone(Exception):
    """Whoever read stdout, such as `head`, has had enough. Not a failure."""


class Output(io.TextIOBase):
    """stdout, where a reader that left and an output that is full or closed are exceptions of ours.

    So they are the same in every command, whoever writes. `file` None is a stdout that was closed.
    """

    def __init__(self, file: TextIO | None) -> None:
        self.file = file
        self.failure: Exception = OSError(errno.EBADF, "it is closed")  # why there is no file any more

    def write(self, text: str) -> int:
        """Raises ReaderGone, and Dsv2Error for an output that can not be written."""
        self.attempt("write", text)
        return len(text)

    def flush(self) -> None:
        """Raises as write does."""
        if self.file is not None:
            self.attempt("flush")

    def attempt(self, name: str, *arguments: str) -> None:
        """Call the file's own method. Raises as write does."""
        try:
            if self.file is None:
                raise self.failure
            getattr(self.file, name)(*arguments)
        except (OSError, ValueError) as error:
            self.give_up(error)
            if isinstance(error, BrokenPipeError):
                raise ReaderGone from None
            why = getattr(error, "strerror", None) or str(error)
            fix = "make room, or write somewhere else"
            raise Dsv2Error("stdout could not be written", why=why, fix=fix) from None

    def give_up(self, why: Exception) -> None:
        """The interpreter flushes stdout once more when it ends; let that go nowhere."""
        if self.file is not None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())
        self.file, self.failure = None, why

    def isatty(self) -> bool:
        return self.file is not None and self.file.isatty()

    def fileno(self) -> int:
        """Raises OSError where stdout was closed."""
        if self.file is None:
            raise OSError(errno.EBADF, "stdout is closed")
        return self.file.fileno()

    def writable(self) -> bool:
        return True

    @property
    def buffer(self) -> Any:
        """Where bytes go. Raises AttributeError where stdout was closed."""
        return getattr(self.file, "buffer")  # noqa: B009

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return "utf-8"

    @property
    def errors(self) -> str:  # type: ignore[override]
        return "replace"


class Remarks(Output):
    """stderr: where it is closed, full or gone, the rest goes on without it."""

    def attempt(self, name: str, *arguments: str) -> None:
        """Call the file's own method, where there is one and it can."""
        try:
            super().attempt(name, *arguments)
        except (ReaderGone, Dsv2Error):
            self.file = None


def guard_streams() -> None:
    """Put Output and Remarks in the places of stdout and stderr; take the numbers of closed ones, so that no
    file gets them.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number
    for name, kind in (("stdout", Output), ("stderr", Remarks)):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")
            if kind is Remarks:
                stream = own_stderr(stream)
        if not isinstance(stream, Output):
            setattr(sys, name, kind(stream))


def own_stderr(stream: TextIO) -> TextIO:
    """The same on a descriptor of its own: number 2 is turned aside where a library would write to it."""
    try:
        return open(os.dup(stream.fileno()), "w", buffering=1, encoding="utf-8", errors="replace")
    except OSError:
        return stream


def write(text: str) -> None:
    """The model's text to stdout at once: as it is into a pipe or file, made harmless on a terminal."""
    emit(harmless(text) if sys.stdout.isatty() else text)


def emit(text: str) -> None:
    """Text to stdout at once. Raises ReaderGone, and Dsv2Error for an output that can not be written."""
    sys.stdout.write(text)
    sys.stdout.flush()


def write_json(value: Any) -> None:
    """One object on one line. On a terminal everything beyond ASCII is escaped.

    Raises ValueError for a number that JSON does not have.
    """
    emit(json_text(value, ascii_only=sys.stdout.isatty()) + "\n")


def note(text: str) -> None:
    """A remark for the person at the terminal; nothing where stderr is not one."""
    if sys.stderr.isatty():
        stderr().print(text, style="dim", soft_wrap=False)


def show_error(error: Dsv2Error) -> None:
    """Up to three lines on stderr."""
    screen = stderr()
    for label, line in (("error", error.what), ("  why", error.why), ("  fix", error.fix)):
        if line:
            screen.print(f"{label}:", style="bold red" if label == "error" else "bold", end=" ")
            screen.print(" ".join(line.split("\n")))


def last_words(error: Dsv2Error) -> None:
    """An error after which the program ends at once."""
    show_error(error)


@contextmanager
def loading(name: str, doing: str = "loading") -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar with GB, GB/s and time left on stderr while weights are read or fetched; gives the
    callback, or None without a terminal.
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
        TextColumn("{task.description} {task.fields[name]}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=stderr(),
        transient=True,
    )
    with bar:
        task = bar.add_task(doing, name=harmless(name), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def counting(what: str, total: int, done: int = 0) -> Iterator[Callable[..., None]]:
    """A progress bar on stderr for `total` steps of which some are done; gives the callback for one step
    more, which may be told how it stands.
    """
    if not sys.stderr.isatty():
        yield lambda stand=None: None
        return
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    text = TextColumn("{task.description}", markup=False)
    with Progress(text, *columns, console=stderr(), transient=True) as bar:
        task = bar.add_task(what, total=total, completed=done)
        yield lambda stand=None: bar.update(task, advance=1, description=harmless(stand or what))


def stdin_lines() -> Iterator[str]:
    """Lines of stdin as they come, so that a program may wait for an answer before it writes the next."""
    for line in stdin_bytes():
        yield text_of_stdin(line).rstrip("\r\n")


def stdin_bytes() -> Iterable[bytes]:
    """Lines of stdin as they come; none where it is closed. A byte order mark before the first is dropped.

    Raises Dsv2Error where it can not be read.
    """
    if sys.stdin is None:
        return
    try:
        first = True
        for line in lines_within(sys.stdin.buffer):
            yield line.removeprefix(b"\xef\xbb\xbf") if first else line
            first = False
    except OSError as error:
        raise UsageError("stdin can not be read", why=error.strerror or str(error)) from None


def read_stdin() -> str:
    """All of stdin as UTF-8, or nothing where it is a terminal or closed. Raises Dsv2Error on other bytes."""
    if sys.stdin is None or sys.stdin.isatty():
        return ""
    try:
        return text_of_stdin(read_within(sys.stdin.buffer))
    except OSError as error:
        raise UsageError("stdin can not be read", why=error.strerror or str(error)) from None


def text_of_stdin(data: bytes) -> str:
    """Bytes of stdin as UTF-8. Raises UsageError."""
    try:
        return as_text(data)
    except ValueError as error:
        fix = "convert it first, for example with iconv -t utf-8"
        raise UsageError("stdin is not UTF-8 text", why=str(error), fix=fix) from None
