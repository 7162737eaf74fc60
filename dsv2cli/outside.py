"""What comes from outside, read by one rule: paths, files, text and JSON. Imports no torch.

Files are regular ones of a bounded size, text is UTF-8, JSON is bounded in depth and numbers. What is not so
raises OSError or ValueError in words that can stand behind "why:".
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shlex
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn
from urllib.parse import unquote

from dsv2cli.errors import Dsv2Error, UsageError

LARGEST = 256 * 2**20  # bytes of a file that is read whole
LARGEST_LINE = 64 * 2**20  # bytes of one that is read by lines
TOO_LONG = b"\xff a line that is too long"
DEEPEST = 64  # lists and objects within one another
STALL = 30.0  # seconds without a byte of a download, after which another way is tried
AGAIN = "download the file again"
UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "bytes"))
KINDS = {  # what may stand in a file's place
    stat.S_IFIFO: "a FIFO",
    stat.S_IFDIR: "a folder",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def path_of(text: str | Path) -> Path:
    """A path as a person writes it, with ~ for a home. Raises UsageError for what can be none."""
    try:
        path = Path(text).expanduser()
        if "\0" in str(path):
            raise ValueError("it holds a null character")
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        why = reason(error)
        raise UsageError(
            f"{str(text)[:80]!r} can be no path", why=why, fix="check how it is written"
        ) from None
    return path


def pasted_path(text: str) -> Path:
    """path_of for what may have quotes, backslashes or file:// around it, as terminals paste names."""
    plain = path_of(text)
    if plain.exists():
        return plain
    if text.startswith("file://"):
        return path_of(unquote(text.removeprefix("file://")))
    try:
        words = shlex.split(text)
    except ValueError:
        return plain
    return path_of(words[0]) if len(words) == 1 and path_of(words[0]).exists() else plain


def reason(error: BaseException) -> str:
    """Why reading failed, in one line."""
    if isinstance(error, KeyError):
        return f"it lacks {error}"
    return one_line(getattr(error, "strerror", None) or str(error) or repr(error))


def one_line(text: str) -> str:
    """Words of somebody else, as they can stand behind "why:"."""
    return " ".join(text.split())[:300]


def in_units(size: float) -> str:
    """Bytes as a person reads them."""
    unit, name = next((each for each in UNITS if size >= each[0] * 0.9995), UNITS[-1])
    return f"{size / unit:.4g} {name}" if unit > 1 else f"{size:.0f} {name}"


def require_file(path: Path, pipes: bool = False) -> os.stat_result:
    """What the system says of a regular file, or a pipe where that may be. Raises OSError where there is
    none, or something else.
    """
    try:
        found = path.stat()
    except ValueError as error:
        raise OSError(errno.EINVAL, str(error)) from None
    if not stat.S_ISREG(found.st_mode) and not (pipes and is_pipe(path, found)):
        raise OSError(errno.EINVAL, f"it is {KINDS.get(stat.S_IFMT(found.st_mode), 'no file')}, not a file")
    return found


def is_pipe(path: Path, found: os.stat_result) -> bool:
    """Whether a path that a person names, such as /dev/stdin, gives bytes until somebody ends it."""
    if stat.S_ISCHR(found.st_mode):
        terminals = (("/", "dev", "pts"), ("/", "dev", "tty"))
        return str(path) == os.devnull or path.resolve().parts[:3] in terminals
    return stat.S_ISFIFO(found.st_mode) or stat.S_ISSOCK(found.st_mode)


def read_bytes(path: Path, most: int = LARGEST, pipes: bool = False) -> bytes:
    """A regular file's bytes, or a pipe's where that may be; /dev/null has none.

    Raises OSError, also for anything else and for more than `most`.
    """
    if str(path) == os.devnull:
        return b""
    size = require_file(path, pipes).st_size
    if size > most:
        raise OSError(errno.EFBIG, f"it has {size:,} bytes, and {most:,} are the most")
    # Between the look and this a FIFO may have taken its place: it must not make us wait.
    waits = 0 if pipes else os.O_NONBLOCK
    with os.fdopen(os.open(path, os.O_RDONLY | waits | os.O_CLOEXEC), "rb") as file:
        return read_within(file, most)


def read_within(file: BinaryIO, most: int = LARGEST) -> bytes:
    """All that an open file or pipe gives. Raises OSError where that is more than `most` bytes."""
    blocks, size = [], 0
    while block := file.read(2**20):
        blocks.append(block)
        size += len(block)
        if size > most:
            raise OSError(errno.EFBIG, f"it has more than {most:,} bytes")
    return b"".join(blocks)


def lines_within(file: BinaryIO, most: int = LARGEST_LINE) -> Iterator[bytes]:
    """The lines of an open file or pipe as they come; TOO_LONG in the place of one with more than `most`
    bytes.

    Raises OSError.
    """
    while line := file.readline(most + 1):
        if len(line) > most:
            while line and not line.endswith(b"\n"):
                line = file.readline(most)
            line = TOO_LONG
        yield line


def read_text(path: Path, most: int = LARGEST, pipes: bool = False) -> str:
    """read_bytes as text. Raises as it does, and ValueError for other bytes than text."""
    return as_text(read_bytes(path, most, pipes))


def text_of(path: Path) -> str:
    """A file of a checkpoint as text. Raises Dsv2Error naming it."""
    try:
        return read_text(path)
    except (OSError, ValueError) as error:
        raise Dsv2Error(f"{path} cannot be read", why=reason(error), fix=AGAIN) from None


def as_text(data: bytes) -> str:
    """UTF-8 to text, without the byte order mark that may stand before it. Raises ValueError."""
    if data is TOO_LONG:
        raise ValueError(f"it has more than {LARGEST_LINE:,} bytes")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError("it is UTF-16, and must be UTF-8")
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        at = f"byte {data[error.start]:#04x} at {error.start:,}"
        raise ValueError(f"it is not UTF-8 text ({at})") from None


def is_text(text: str) -> bool:
    """Whether every character is one: arguments and JSON may hold halves (lone surrogates)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def mended(text: str) -> str:
    """Text with the mark U+FFFD in the place of every half of a character."""
    return text if is_text(text) else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def json_text(value: Any, indent: int | None = None, ascii_only: bool = False) -> str:
    """Strict JSON, as all of this program's: no half characters, and no number that JSON does not have.

    Raises ValueError for such a number.
    """
    return mended(json.dumps(value, ensure_ascii=ascii_only, allow_nan=False, indent=indent))


def parse_json(data: bytes | str, mend: bool = False) -> Any:
    """JSON in UTF-8; `mend` puts U+FFFD in the place of halves of characters.

    Raises ValueError for what is none, holds a key twice, numbers beyond 64 bits or not finite, halves of
    characters, or lists within lists beyond DEEPEST.
    """
    if isinstance(data, bytes):
        data = mended(data.decode("utf-8", "surrogatepass")) if mend else as_text(data)
    text = data.removeprefix("\ufeff")
    try:
        value = json.loads(
            text,
            parse_constant=not_a_number,
            parse_float=finite,
            parse_int=sixty_four_bits,
            object_pairs_hook=each_once,
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except NoNumber as error:
        name = re.search(rf'"([^"\\]{{1,80}})"\s*:[\s\[]*{re.escape(error.text)}', text)
        raise ValueError(f"{error} ({name[1]})" if name else str(error)) from None
    check_depth(value)
    if is_text(text) and ("\\u" not in text or all_text(value)):
        return value
    if not mend:
        raise ValueError("it holds half a character (a lone surrogate)")
    return all_mended(value)


class NoNumber(ValueError):
    """A number of JSON that is none or too large; `text` is how it is written."""

    def __init__(self, text: str, what: str) -> None:
        super().__init__(f"{text if len(text) < 40 else text[:24] + '...'} is {what}")
        self.text = text


def not_a_number(text: str) -> NoReturn:
    """Raises NoNumber."""
    raise NoNumber(text, "no number")


def finite(text: str) -> float:
    """Raises NoNumber for one that is too large."""
    if not math.isfinite(value := float(text)):
        raise NoNumber(text, "too large a number")
    return value


def sixty_four_bits(text: str) -> int:
    """Raises NoNumber for one that has more."""
    if len(text) > 21 or abs(int(text)) >= 2**64:
        raise NoNumber(text, "a number beyond 64 bits")
    return int(text)


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object's members. Raises ValueError for a name that occurs twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it holds the name {twice[:80]!r} twice")
    return found


def check_depth(value: Any) -> None:
    """Raises ValueError for lists and objects more than DEEPEST within one another."""
    level = [value]
    for _ in range(DEEPEST):
        level = [part for each in level if isinstance(each, dict | list) for part in parts(each)]
        if not level:
            return
    raise ValueError(f"it is nested more than {DEEPEST} deep")


def parts(value: dict[str, Any] | list[Any]) -> list[Any]:
    return value if isinstance(value, list) else list(value.values())


def all_text(value: Any) -> bool:
    """Whether every text in a JSON value is one, the names too."""
    if isinstance(value, dict):
        return all(is_text(name) and all_text(each) for name, each in value.items())
    if isinstance(value, list):
        return all(map(all_text, value))
    return not isinstance(value, str) or is_text(value)


def all_mended(value: Any) -> Any:
    """A JSON value with every text in it mended."""
    if isinstance(value, dict):
        return {mended(name): all_mended(each) for name, each in value.items()}
    if isinstance(value, list):
        return [all_mended(each) for each in value]
    return mended(value) if isinstance(value, str) else value


def read_json(path: Path, missing: Callable[[], dict[str, Any]] | None = None) -> dict[str, Any]:
    """A file that holds one JSON object; what `missing` gives where there is no file.

    Raises Dsv2Error naming the file.
    """
    try:
        content = parse_json(read_bytes(path))
    except (OSError, ValueError) as error:
        if missing is not None and isinstance(error, FileNotFoundError) and not path.is_symlink():
            return missing()
        raise Dsv2Error(f"{path} cannot be read", why=reason(error), fix=AGAIN) from None
    if not isinstance(content, dict):
        raise Dsv2Error(f"{path} cannot be read", why="it holds no JSON object", fix=AGAIN)
    return content


@dataclass(frozen=True)
class Number:
    """Which numbers a field may hold: from `least` to `most`; `above` leaves `least` itself out."""

    least: float
    most: float
    whole: bool = False
    above: bool = False

    def __contains__(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            return False
        return self.least <= value <= self.most and not (self.above and value == self.least)

    def __str__(self) -> str:
        """As it follows "it must be"."""
        what, least, most = (
            "a whole number" if self.whole else "a number",
            f"{self.least:,g}",
            f"{self.most:,g}",
        )
        if self.whole:
            least, most = f"{self.least:,}", f"{self.most:,}"
        return f"{what} above {least}, at most {most}" if self.above else f"{what} from {least} to {most}"
