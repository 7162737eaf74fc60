"""What a person attaches to a message: files, parts of files, folders, and what a command writes.

Names come from `/file` and from @ in a sentence. What they stand for is found first, all of it, and then
read, so that where a name is wrong no command runs. Knows nothing of chats, and imports no torch.
"""

from __future__ import annotations

import codecs
import contextlib
import difflib
import errno
import io
import itertools
import os
import re
import selectors
import shlex
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from urllib.parse import unquote

from dsv2cli.errors import UsageError
from dsv2cli.outside import mended, pasted_path, path_of, read_text, reason, require_file

LARGEST_FILE = 2**20  # bytes of one file, or of what a command writes
LARGEST = 4 * 2**20  # bytes of all that is attached at once
MOST_FILES = 500
MOST_FOUND = 100_000  # names that are looked at for one folder or pattern
LONGEST_LIST = 64 * 2**20  # bytes of names from git
SECONDS = 30.0  # for a command
PASSED_OVER = ("node_modules", "__pycache__")  # folders that nobody wrote
VANISHED = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)  # links to nowhere, and what git knows but is deleted
OTHER_REPOSITORY = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")  # variables that a git hook sets

RANGE = re.compile(r"(.+):([0-9]{1,9})(?:(-)([0-9]{1,9})?)?", re.DOTALL)
MENTION = re.compile(
    r'(?:^|(?<=[\s(\[{<]))@(?:"([^"\n]{1,4096})"(:[0-9]+(?:-[0-9]*)?)?|([^\s"，。；：！？、][^\s，。；：！？、]{0,4095}))'
)
TRAILING = ".,;:!?)'\"]}>"  # what ends a sentence, a bracket or a quotation, and seldom a name

LANGUAGES = {
    "bash": "sh bash zsh",
    "c": "c h",
    "cpp": "cpp cc cxx hpp hh cu cuh",
    "csharp": "cs",
    "css": "css scss",
    "dart": "dart",
    "diff": "diff patch",
    "elixir": "ex exs",
    "erlang": "erl",
    "fish": "fish",
    "go": "go",
    "haskell": "hs",
    "html": "html htm vue svelte",
    "ini": "ini cfg",
    "java": "java",
    "javascript": "js mjs cjs jsx",
    "json": "json",
    "julia": "jl",
    "kotlin": "kt kts",
    "lua": "lua",
    "ocaml": "ml mli",
    "perl": "pl pm",
    "php": "php",
    "proto": "proto",
    "python": "py pyi pyx",
    "r": "r",
    "ruby": "rb",
    "rust": "rs",
    "scala": "scala",
    "sql": "sql",
    "swift": "swift",
    "toml": "toml",
    "typescript": "ts tsx",
    "xml": "xml svg",
    "yaml": "yaml yml",
    "zig": "zig",
}
LANGUAGE = {f".{suffix}": name for name, suffixes in LANGUAGES.items() for suffix in suffixes.split()}


@dataclass(frozen=True)
class Attachment:
    """A text and what it is called: "a.py", "a.py:10-40", "$ git diff"."""

    name: str
    text: str

    @property
    def shown(self) -> str:
        """How it stands before a message: code within a fence that nothing inside it can close."""
        language = language_of(self.name)
        if not language:
            return f"{self.name}:\n\n{self.text}\n\n"
        longest = max(map(len, re.findall("`+", self.text)), default=0)
        fence = "`" * max(3, longest + 1)
        end = "" if self.text.endswith("\n") or not self.text else "\n"
        return f"{self.name}:\n\n{fence}{language}\n{self.text}{end}{fence}\n\n"


def language_of(name: str) -> str:
    """What a fence says of a file's text; nothing for plain text and for a command's output."""
    if name.startswith("$ "):
        return ""
    if part := RANGE.fullmatch(name):
        name = part[1]
    return LANGUAGE.get(PurePath(name).suffix.lower(), "")


def gather(words: str) -> list[Attachment]:
    """What the words behind /file stand for: paths, patterns, folders, parts such as a.py:10-40, or ! and a
    command. Raises UsageError naming what is wrong.
    """
    words = words.strip()
    if not words.strip("\"' "):
        raise UsageError(
            "There is nothing to attach", fix="/file PATH, /file 'src/*.py', /file a.py:10-40 or /file !ls"
        )
    whole = as_typed(words)
    return within_limits([whole] if whole else [asked_for(word) for word in split(words)])


def mentioned(message: str) -> list[Attachment]:
    """The files and folders that a message names with an @ before them; any other @ is text.

    Raises UsageError for a file that can not be read as text, or not in the lines that are asked for.
    """
    matches = dict.fromkeys(MENTION.findall(message))
    asked = [files for quoted, part, plain in matches if (files := mention(quoted, part, plain))]
    try:
        return within_limits(asked)
    except UsageError as error:
        fix = "name another file or part, or leave out the @"
        raise UsageError(error.what, why=error.why, fix=fix) from None


def within_limits(asked: Sequence[Files | Command]) -> list[Attachment]:
    """All of it, read, each once. Raises UsageError where it is too much."""
    kept: dict[Attachment, None] = {}
    size, fix = 0, "attach fewer files, or parts of them: /file a.py:10-40"
    for each in itertools.chain.from_iterable(files.read() for files in asked):
        if each in kept:
            continue
        kept[each] = None
        size += len(each.text.encode())
        if len(kept) > MOST_FILES:
            count = sum(len(files.paths) if isinstance(files, Files) else 1 for files in asked)
            why = f"there are {count:,}, and {MOST_FILES:,} with text are the most"
            raise UsageError("These are too many files", why=why, fix=fix)
        if size > LARGEST:
            why = f"the first {len(kept):,} have {size:,} bytes, and {LARGEST:,} are the most"
            raise UsageError("This is too much to attach", why=why, fix=fix)
    return list(kept)


# What is asked for


@dataclass(frozen=True)
class Lines:
    """A part of a file, as it is written behind its name."""

    written: str  # ":10-40"
    first: int
    last: int | None  # None: to the end

    def of(self, text: str, name: str) -> str:
        """Raises UsageError for lines that are not there."""
        lines = text.split("\n")  # what editors count, and not all that str.splitlines does
        lines = lines if lines[-1] else lines[:-1]
        last = len(lines) if self.last is None else self.last
        if 1 <= self.first <= last <= len(lines):
            return "\n".join(lines[self.first - 1 : last])
        if self.first < 1:
            why = "lines are counted from 1"
        elif self.last is not None and self.last < self.first:
            why = "the last comes before the first"
        else:
            why = f"it has {len(lines):,} line{'s' * (len(lines) != 1)}"
        fix = f"choose lines from 1 to {len(lines)}" if lines else "attach another file"
        raise UsageError(f"There are no lines {self.written[1:]} in {short(name)}", why=why, fix=fix)


@dataclass(frozen=True)
class Files:
    """What one word stands for: a file, or all below a folder or under a pattern."""

    word: str
    base: Path  # the file or the folder that was named
    paths: list[Path]
    lines: Lines | None = None
    named: bool = False  # it is one file, which must be text; others are passed over
    may_be_empty: bool = False

    def read(self) -> Iterator[Attachment]:
        """Raises UsageError for what can not be read, and where nothing is left."""
        found = False
        for path in self.paths:
            name = shown_name(path, self.base)
            if (text := text_at(path, name, self.named)) is not None:
                found = True
                part, written = (self.lines.of(text, name), self.lines.written) if self.lines else (text, "")
                yield Attachment(name + written, part)
        if not found and not self.may_be_empty:
            why = "no file is in it that git does not ignore"
            if self.paths:
                why = f"of {len(self.paths):,} found there none is text"
            fix = "/file takes text files; a pattern, such as build/*, finds ignored ones too"
            raise UsageError(f"{short(self.word)} holds no text", why=why, fix=fix)


@dataclass(frozen=True)
class Command:
    """A line for the shell, whose output is attached."""

    line: str

    def read(self) -> Iterator[Attachment]:
        """Raises UsageError for a command that can not be run, takes too long, or writes nothing or too
        much.
        """
        name = f"$ {short(self.line)}"
        if not self.line:
            raise UsageError("There is no command after !", fix="/file !git diff")
        try:
            data, code = run(["/bin/sh", "-c", self.line], LARGEST_FILE)
        except (OSError, ValueError) as error:
            fix = "run it in a shell, and attach a file with what it wrote"
            if getattr(error, "errno", None) == errno.EMSGSIZE:
                fix = f"/file !{short(self.line)} | head -n 100"
            raise UsageError(f"{name} can not be attached", why=reason(error), fix=fix) from None
        if not data.strip():
            fix = "try it in a shell, and choose one that writes something"
            raise UsageError(f"{name} wrote nothing", why=f"its exit code is {code}", fix=fix)
        yield Attachment(f"{name} (exit {code})" if code else name, data.decode("utf-8", "replace"))


def as_typed(words: str) -> Files | None:
    """One path for all the words, where there is such a file: blanks in it need no quotes then.

    Raises UsageError for a folder that can not be listed.
    """
    part = RANGE.fullmatch(words)
    at: tuple[Path, Lines | None] | None = None
    with contextlib.suppress(
        UsageError, OSError
    ):  # many paths may be too long for one; each is looked at later
        if (path := pasted_path(words)).exists():
            at = path, None
        elif part and (path := pasted_path(part[1])).is_file():
            at = path, lines_of(part)
    return files_at(at[0], words, at[1]) if at and not words.startswith("!") else None


def split(words: str) -> list[str]:
    """Words as a shell splits them, but ! makes all that follows one. Raises UsageError for an open quote."""
    stream, found = io.StringIO(words), list[str]()
    lexer = shlex.shlex(stream, posix=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    try:
        while (begin := next_character(stream)) and begin != "!":
            found.append(lexer.get_token() or "")
    except ValueError as error:
        what, fix = f"{short(words)} can not be split into paths", 'quote such a name: /file "it\'s here.txt"'
        raise UsageError(what, why=reason(error).lower(), fix=fix) from None
    return found + ([stream.read()] if begin else [])


def next_character(stream: io.StringIO) -> str:
    """The first that is no blank, still to be read; "" at the end."""
    while (character := stream.read(1)).isspace():
        pass
    stream.seek(stream.tell() - len(character))
    return character


def asked_for(word: str) -> Files | Command:
    """Raises UsageError for a word that stands for nothing."""
    if not word:
        raise UsageError("An empty name can not be attached", fix="take the two quotes away")
    if at := located(word):
        path, lines = at
        return files_at(path, word, lines)
    if word.startswith("!"):
        return Command(word[1:].strip())
    if is_pattern(word):
        return matching(word)
    raise missing(word)


def mention(quoted: str, part: str, plain: str) -> Files | None:
    """What an @ stands for. Raises UsageError for a folder that can not be listed."""
    for word in [quoted + part] if quoted else without_punctuation(plain):
        if at := mentionable(word):
            return replace(files_at(at[0], word, at[1]), may_be_empty=True)
    return None


def mentionable(word: str) -> tuple[Path, Lines | None] | None:
    """As located, for files and folders; a mark at the end makes a folder's name none: "we met @."."""
    if word.strip("/~"):
        with contextlib.suppress(UsageError, OSError):
            at = located(word)
            if at and (at[0].is_file() or (at[0].is_dir() and word[-1] not in TRAILING)):
                return at
    return None


def without_punctuation(word: str) -> Iterator[str]:
    """The word, and what is left of it as one mark after the other is taken from its end."""
    yield word
    while word and word[-1] in TRAILING:
        word = word[:-1]
        yield word


def located(word: str) -> tuple[Path, Lines | None] | None:
    """What exists under a name: all of it, or lines of a file. A file with a colon in its name comes first.

    Raises UsageError for what can be no path.
    """
    try:
        if (path := place(word)).exists():
            return path, None
        if (part := RANGE.fullmatch(word)) and (path := place(part[1])).is_file():
            return path, lines_of(part)
    except OSError as error:
        raise cannot(word, error) from None
    return None


def place(word: str) -> Path:
    """Raises UsageError for what can be no path."""
    return path_of(unquote(word.removeprefix("file://")) if word.startswith("file://") else word)


def lines_of(part: re.Match[str]) -> Lines:
    """From a match of RANGE."""
    name, first, dash, last = part.groups()
    end = None if dash and not last else int(last or first)
    return Lines(part.string[len(name) :], int(first), end)


def missing(word: str) -> UsageError:
    """The error for a name that is none, with the nearest one in its folder."""
    near: list[str] = []
    with contextlib.suppress(OSError, ValueError, UsageError):
        path = place(word)
        near = difflib.get_close_matches(path.name, itertools.islice(os.listdir(path.parent), 1000), 1)
    fix = f"did you mean {short(near[0])}?" if near else "check how it is written; ~ * ** and quotes work"
    return UsageError(f"There is no file {short(word)}", why="nothing has this name", fix=fix)


# Finding files


def files_at(path: Path, word: str, lines: Lines | None = None) -> Files:
    """A file, or all below a folder. Raises UsageError for a folder that can not be listed."""
    if not os.path.isdir(path):
        return Files(word, path, [path], lines, named=True)
    if os.path.realpath(path) == os.sep:
        raise UsageError(
            f"{short(word)} can not be attached", why="it is the root folder", fix="/file FOLDER"
        )
    return Files(word, path, sorted(bounded(below(path), word)))


def below(folder: Path) -> Iterable[Path]:
    """The files in a folder and its folders, without what git ignores. Raises OSError."""
    listed = listed_by_git(folder)
    return walked(folder) if listed is None else listed


def bounded(paths: Iterable[Path], word: str) -> list[Path]:
    """All of them. Raises UsageError where they are too many to be looked at, or can not be listed."""
    try:
        found = list(itertools.islice(paths, MOST_FOUND + 1))
    except OSError as error:
        at = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else word
        raise cannot(at, error) from None
    if len(found) > MOST_FOUND:
        why = f"there are more than {MOST_FOUND:,} names, and {MOST_FILES:,} files are the most"
        raise UsageError(f"{short(word)} is too much to attach", why=why, fix="name a smaller folder")
    return found


def listed_by_git(folder: Path) -> list[Path] | None:
    """What is in a work tree and not ignored; None where there is no work tree, or no git."""
    environment = {name: value for name, value in os.environ.items() if name not in OTHER_REPOSITORY}
    # A repository from somewhere else may name a program as its monitor, which git would run.
    words = ["git", "-c", "core.fsmonitor=false", "-C", str(folder)]
    words += ["ls-files", "-co", "--exclude-standard", "-z"]
    try:
        data, code = run(words, LONGEST_LIST, environment=environment, errors=subprocess.DEVNULL)
    except (OSError, ValueError):
        return None
    return None if code else [folder / os.fsdecode(name) for name in set(data.split(b"\0")) if name]


def walked(folder: Path) -> Iterator[Path]:
    """All files that are not hidden and that no .gitignore names. Raises OSError.

    Links to folders are not followed: they may lead in circles.
    """
    waiting: list[tuple[Path, list[Ignore]]] = [(folder, [])]
    while waiting:
        where, rules = waiting.pop()
        rules = rules + rules_in(where)
        for entry in entries(where):
            path, is_folder = where / entry.name, entry.is_dir(follow_symlinks=False)
            if is_passed_over(entry.name) or is_ignored(path, is_folder, rules):
                continue
            if is_folder:
                waiting.append((path, rules))
            else:
                yield path


def entries(folder: Path) -> list[os.DirEntry[str]]:
    """Raises OSError for a folder that can not be read; nothing is in one that is none."""
    try:
        with os.scandir(folder) as found:
            return list(found)
    except (FileNotFoundError, NotADirectoryError):
        return []


def is_passed_over(name: str) -> bool:
    return name.startswith(".") or name in PASSED_OVER


@dataclass(frozen=True)
class Ignore:
    """A line of a .gitignore."""

    folder: Path  # where it stands
    parts: tuple[str, ...]
    only_folders: bool
    keeps: bool  # it takes back what a line above it said

    def fits(self, path: Path, is_folder: bool) -> bool:
        wanted = is_folder or not self.only_folders
        return wanted and fits(path.relative_to(self.folder).parts, self.parts)


def rules_in(folder: Path) -> list[Ignore]:
    """Of a folder's own .gitignore, if it has one that can be read."""
    try:
        lines = read_text(folder / ".gitignore", LARGEST_FILE).splitlines()
    except (OSError, ValueError):
        return []
    return [rule(folder, line.rstrip()) for line in lines if line.strip(" \t/!") and line[0] != "#"]


def rule(folder: Path, line: str) -> Ignore:
    keeps, line = line.startswith("!"), line.removeprefix("!").removeprefix("\\")
    parts = [part for part in line.split("/") if part]
    if "/" not in line.rstrip("/"):
        parts = ["**", *parts]  # a bare name is ignored at every depth
    return Ignore(folder, tuple(parts), line.endswith("/"), keeps)


def is_ignored(path: Path, is_folder: bool, rules: list[Ignore]) -> bool:
    """The last line that fits decides."""
    return next((not rule.keeps for rule in reversed(rules) if rule.fits(path, is_folder)), False)


def fits(names: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Whether the names of a path are those of a pattern, in which ** stands for any number of them."""
    used = {0}  # how many names the parts so far may have taken
    for part in pattern:
        if part == "**":
            used = set(range(min(used), len(names) + 1))
        else:
            used = {at + 1 for at in used if at < len(names) and fnmatchcase(names[at], part)}
        if not used:
            return False
    return len(names) in used


def is_pattern(text: str) -> bool:
    return any(character in text for character in "*?[")


def matching(word: str) -> Files:
    """Files by a pattern with * ? [] and **. Raises UsageError where there is none."""
    parts = list(place(word).parts)
    if parts[-1] == "**":
        parts.append("*")
    fixed = next(number for number, part in enumerate(parts) if is_pattern(part))
    base = Path(*parts[:fixed])
    found = [base]
    for part in parts[fixed:]:
        steps = itertools.chain.from_iterable(step(path, part) for path in found)
        found = list(dict.fromkeys(bounded(steps, word)))
    files = sorted(path for path in found if not os.path.isdir(path))
    if not files:
        fix = "**/*.py looks into folders too; what is hidden must be named"
        raise UsageError(f"Nothing matches {short(word)}", why="no file has such a name", fix=fix)
    return Files(word, base, files)


def step(path: Path, part: str) -> Iterator[Path]:
    """One name further: what of a folder fits a part of a pattern. Raises OSError."""
    if part == "**":
        yield from folders(path)
    elif is_pattern(part):
        for entry in entries(path):
            hidden = entry.name.startswith(".") and not part.startswith(".")
            if not hidden and fnmatchcase(entry.name, part):
                yield path / entry.name
    elif os.path.lexists(path / part):
        yield path / part


def folders(path: Path) -> Iterator[Path]:
    """A folder and those in it at any depth. Links are not followed. Raises OSError."""
    waiting = [path]
    while waiting:
        yield (where := waiting.pop())
        waiting += [
            where / entry.name
            for entry in entries(where)
            if entry.is_dir(follow_symlinks=False) and not is_passed_over(entry.name)
        ]


# Reading


def text_at(path: Path, name: str, named: bool) -> str | None:
    """A file's text; None for one that is passed over. Raises UsageError."""
    try:
        require_file(path)
        text = read_text(path, LARGEST_FILE)
        if "\0" in text:
            raise ValueError("it is not text (it holds null characters)")
        return text
    except (OSError, ValueError) as error:
        if not named and is_nobodys_text(path, error):
            return None
        raise cannot(name, error, path) from None


def is_nobodys_text(path: Path, error: Exception) -> bool:
    """Whether what could not be read is something other than text, or gone."""
    number = getattr(error, "errno", errno.EINVAL)  # EINVAL: no regular file
    if number != errno.EFBIG:
        return number in (errno.EINVAL, *VANISHED)
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            begin = file.read(2**13) or b""
        codecs.getincrementaldecoder("utf-8")().decode(begin)  # it may end within a character
    except (OSError, ValueError):
        return True
    return b"\0" in begin


def cannot(name: str, error: Exception, path: Path | None = None) -> UsageError:
    fix = "/file takes text files, folders, patterns, and ! with a command"
    number = getattr(error, "errno", None)
    if number == errno.EFBIG:
        fix = f"attach a part of it: /file !head -n 100 {shlex.quote(short(str(path or name), 200))}"
    elif number in (errno.EACCES, errno.EPERM):
        fix = "get the right to read it, or name other files"
    return UsageError(f"{short(name)} can not be attached", why=reason(error), fix=fix)


def shown_name(path: Path, base: Path) -> str:
    """From the folder we are in if that holds it; else from the folder that holds what was named."""
    near = path
    if path.is_absolute():
        near = path.relative_to(base.parent)
        with contextlib.suppress(OSError, ValueError):
            near = path.relative_to(Path.cwd())
    return re.sub(r"\s", " ", mended(str(near)))


def short(text: str, most: int = 60) -> str:
    """In one line, without halves of characters."""
    line = " ".join(mended(text[: 4 * most]).replace("\0", "\ufffd").split())
    return line if len(line) <= most and len(text) <= 4 * most else line[: most - 1] + "\u2026"


# Running


def run(
    words: list[str],
    most: int,
    seconds: float = SECONDS,
    environment: dict[str, str] | None = None,
    errors: int = subprocess.STDOUT,
) -> tuple[bytes, int]:
    """What a program writes, and its exit code as a shell counts it. All that it started ends with it.

    Raises OSError, TimeoutError among them, and ValueError for words that can be none.
    """
    with subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=errors,
        env=environment,
        bufsize=0,
        start_new_session=True,  # a group that can be ended whole, with no terminal to ask for passwords at
    ) as process:
        try:
            until = time.monotonic() + seconds
            data = output(process, most, until)
            code = process.wait(max(0.0, until - time.monotonic()))
        except (subprocess.TimeoutExpired, TimeoutError):
            why = f"it took more than {seconds:g} seconds and was ended"
            raise TimeoutError(errno.ETIMEDOUT, why) from None
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
    return data, code if code >= 0 else 128 - code


def output(process: subprocess.Popen[bytes], most: int, until: float) -> bytes:
    """All that it writes. Raises OSError for more than `most` bytes, and TimeoutError."""
    data = bytearray()
    assert process.stdout is not None
    with selectors.DefaultSelector() as ready:
        ready.register(process.stdout, selectors.EVENT_READ)
        while time.monotonic() < until:
            ended = process.poll() is not None
            if not ready.select(0 if ended else 0.05):
                if ended:  # what it left running holds the pipe open
                    return bytes(data)
                continue
            if not (block := os.read(process.stdout.fileno(), 2**16)):
                return bytes(data)
            data += block
            if len(data) > most:
                raise OSError(errno.EMSGSIZE, f"it writes more than {most:,} bytes, which are the most")
    raise TimeoutError
