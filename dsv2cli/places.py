"""Where this program keeps what belongs to a person. Needs no torch."""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import glob
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import platformdirs

from dsv2cli.errors import Dsv2Error, UsageError
from dsv2cli.outside import require_file

ENDING = 1.0  # so many seconds a killed process may take until what it held is free


def data_folder() -> Path:
    """Raises Dsv2Error where nothing says where a person's files are."""
    folder = Path(platformdirs.user_data_path("dsv2", appauthor=False))
    if str(folder).startswith("~"):
        raise Dsv2Error("There is no home folder", why="HOME is not set", fix="export HOME=/path")
    return folder


def sessions() -> Path:
    """Saved conversations."""
    return data_folder() / "sessions"


def models() -> Path:
    """Packed copies of models."""
    return data_folder() / "models"


def pages() -> Path:
    """Pages of prompts, where `--cache-store auto` keeps them."""
    return Path(platformdirs.user_cache_dir("dsv2")) / "pages"


def gguf_settings() -> Path:
    """What GGUF files say of themselves, as the files of checkpoints."""
    return Path(platformdirs.user_cache_dir("dsv2")) / "gguf"


def session_names() -> list[str]:
    """Saved conversations, the latest first; what else may lie there, such as an editor's link, is none.

    Those in the form of earlier versions end in .json.
    """
    found: dict[str, int] = {}
    try:
        for file in sessions().glob("[!.]*.json*"):
            if file.suffix in (".json", ".jsonl"):
                with contextlib.suppress(OSError):
                    found[file.stem] = max(require_file(file).st_mtime_ns, found.get(file.stem, 0))
    except OSError:
        return []
    return sorted(found, key=lambda name: (found[name], name), reverse=True)


def session_file(name: str) -> Path:
    """Where a saved conversation lies: in the form of today, or else as an earlier version left it."""
    today = sessions() / f"{name}.jsonl"
    before = today.with_suffix(".json")
    return before if before.exists() and not today.exists() else today


def keep_names(folder: Path) -> None:
    """Let the disk have the names in a folder, not only what the files hold. Raises OSError."""
    number = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def compiled_kernels() -> Path:
    return Path(platformdirs.user_cache_dir("dsv2")) / "kernels"


def private_folder(path: Path) -> Path:
    """A folder that only its owner can read and write, made with all above it where they are not there.

    Raises OSError.
    """
    for folder in reversed([path, *path.parents]):
        with contextlib.suppress(FileExistsError):
            if not folder.exists():
                folder.mkdir(mode=0o700)
    if not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{path} is no folder")
    return path


@contextlib.contextmanager
def unfinished(beside: Path, folder: bool = False) -> Iterator[Path]:
    """A new private file, or folder, in the folder of `beside` to be filled, and to be moved to its place.

    It is gone afterwards unless it was moved, and a killed process's at the next call: whoever makes one
    holds a lock on it. Raises OSError.
    """
    start = f".{beside.name[:100]}-"
    for left in beside.parent.glob(f"{glob.escape(start)}*.unfinished"):
        with contextlib.suppress(OSError), held(left):
            remove(left)
    if folder:
        path = Path(tempfile.mkdtemp(prefix=start, suffix=".unfinished", dir=beside.parent))
    else:
        number, name = tempfile.mkstemp(prefix=start, suffix=".unfinished", dir=beside.parent)
        os.close(number)
        path = Path(name)
    with held(path):
        try:
            yield path
        finally:
            if path.exists():
                remove(path)


def temporary_folder(name: str, inside: Path | None = None) -> Path:
    """A private folder below `inside`, or where the system keeps temporary files, gone with this process.

    Raises OSError.
    """
    stack = contextlib.ExitStack()
    folder = stack.enter_context(unfinished((inside or Path(tempfile.gettempdir())) / name, folder=True))
    atexit.register(stack.close)
    return folder


def lock(file: int, seconds: float = 0.0) -> None:
    """Have a file of our own for us alone, waiting so long for a process that is just ending.

    Raises BlockingIOError where another has it still.
    """
    until = time.monotonic() + seconds
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                raise
        time.sleep(0.02)


@contextlib.contextmanager
def appended(path: Path, option: str) -> Iterator[IO[bytes]]:
    """A file that a person named by `option`, to append to; a regular one no other run writes meanwhile.

    Raises OSError, and UsageError where one does.
    """
    with path.open("ab") as file:
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            try:
                lock(file.fileno(), ENDING)
            except BlockingIOError:
                fix = f"wait for it, or another {option}"
                raise UsageError(f"Another run is writing to {path}", fix=fix) from None
        yield file


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """A lock on a file or folder of our own. Raises BlockingIOError where a process that lives has it."""
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        lock(number)
        yield
    finally:
        os.close(number)


def remove(path: Path) -> None:
    """A file, or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
