"""dsv2 run from outside, in three ways: within this process, in one forked from it, and in a new one.

To import torch and all that comes with it takes some 4 s of a processor, a command on a tiny model a tenth of
that. So `run_dsv2` does it here, where all is imported, for whatever only goes in and comes out. Signals,
pipes and terminals need a process, which may be `forked` from this one. A new one (`run_process`) is for what
Python reads when it starts: the locale, variables that libraries read when they are imported, and which
modules those are; and for teams, which start others.
"""

from __future__ import annotations

import atexit
import functools
import logging
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NoReturn
from unittest import mock

import torch

HIDDEN = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)  # by default


def run_dsv2(
    *arguments: str, stdin: str | bytes = "", cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`python -m dsv2cli` as a script would run it, no terminal anywhere, within this process."""
    folder, threads = os.getcwd(), torch.get_num_threads()
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        given.write(stdin.encode() if isinstance(stdin, str) else stdin)
        given.seek(0)
        try:
            os.chdir(cwd or folder)
            with streams(given, out, err):
                code = program(arguments, environment)
        finally:
            os.chdir(folder)
            torch.set_num_threads(threads)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
    return subprocess.CompletedProcess(["dsv2", *arguments], code, *texts)


def run_process(
    *arguments: str, stdin: str | bytes = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """The same in a new process."""
    done = subprocess.run(
        [sys.executable, "-m", "dsv2cli", *arguments],
        input=stdin.encode() if isinstance(stdin, str) else stdin,
        capture_output=True,
        timeout=300,
        env=os.environ | environment,
    )
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def forked(arguments: tuple[str, ...], environment: dict[str, str]) -> Callable[[], NoReturn]:
    """For `preexec_fn`: the child that was to become another program is dsv2 as it is, with all that is
    imported here.

    Its parent waits on a pipe until the other program begins, that is, until the pipe is closed.
    """

    def child() -> NoReturn:
        code = 1
        try:
            os.closerange(3, 4096)
            for number, handler in (
                (signal.SIGINT, signal.default_int_handler),
                (signal.SIGTERM, signal.SIG_DFL),
                (signal.SIGHUP, signal.SIG_DFL),
                (signal.SIGPIPE, signal.SIG_IGN),
                (signal.SIGXFSZ, signal.SIG_IGN),
            ):
                signal.signal(number, handler)
            sys.stdin, sys.stdout, sys.stderr = opened()
            code = program(arguments, environment)
            if sys.stdout is not None:
                sys.stdout.flush()
        finally:
            os._exit(code)

    return child


def program(arguments: tuple[str, ...], environment: dict[str, str]) -> int:
    """`python -m dsv2cli` from its first line to its exit code, with what a new interpreter has."""
    last: list[Callable[[], Any]] = []
    handler = signal.getsignal(signal.SIGINT)
    register = atexit.register

    def remember(function: Callable[..., Any], *values: Any, **options: Any) -> Callable[..., Any]:
        """What dsv2 has put off to its end is done at its end; libraries go on as long as this process."""
        if not sys._getframe(1).f_globals["__name__"].startswith("dsv2cli"):
            return register(function, *values, **options)
        last.append(functools.partial(function, *values, **options))
        return function

    with (
        mock.patch.object(sys, "argv", ["dsv2", *arguments]),
        mock.patch.dict(os.environ, environment),
        mock.patch.object(logging.root, "handlers", []),
        mock.patch.object(atexit, "register", remember),
        warnings.catch_warnings(),
    ):
        warnings.resetwarnings()
        for kind in HIDDEN:
            warnings.simplefilter("ignore", kind)
        warnings.showwarning = lambda *warning: sys.stderr.write(warnings.formatwarning(*warning[:4]))
        code: object = 0
        try:
            runpy.run_module("dsv2cli", run_name="__main__", alter_sys=True)
        except SystemExit as left:
            code = left.code
        except BaseException:
            traceback.print_exc()
            code = 1
        for function in reversed(last):
            function()
        signal.signal(signal.SIGINT, handler)
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        return 1
    return code or 0


@contextmanager
def streams(*files: IO[bytes]) -> Iterator[None]:
    """Files in the place of stdin, stdout and stderr: for Python, for libraries in C, and for processes that
    are started.
    """
    kept, before = [os.dup(number) for number in range(3)], (sys.stdin, sys.stdout, sys.stderr)
    try:
        for number, file in enumerate(files):
            os.dup2(file.fileno(), number)
        sys.stdin, sys.stdout, sys.stderr = mine = opened()
        yield
        for stream in mine[1:]:
            stream.flush()
    finally:
        sys.stdin, sys.stdout, sys.stderr = before
        for number, old in enumerate(kept):
            os.dup2(old, number)
            os.close(old)


def opened() -> list[IO[str] | None]:
    """File descriptors 0, 1 and 2 as the interpreter opens them when it starts; a closed one is None."""
    ways: list[dict[str, Any]] = [
        {"mode": "r"},
        {"mode": "w", "buffering": 1 if is_open(1) and os.isatty(1) else -1},
        {"mode": "w", "buffering": 1, "errors": "backslashreplace"},
    ]
    return [
        open(number, encoding="utf-8", closefd=False, **way) if is_open(number) else None
        for number, way in enumerate(ways)
    ]


def is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True
