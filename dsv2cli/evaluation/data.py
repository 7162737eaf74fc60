"""Where the questions of a task are: a person's files, or the hub's data sets.

Files are read in the shapes in which benchmarks are published: JSON, JSON lines, CSV and TSV, Parquet, each
also compressed by gzip. Which split and subset a file holds is said by its name and its folders.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv2cli.errors import Dsv2Error, UsageError
from dsv2cli.outside import as_text, parse_json, path_of, read_bytes, read_within, reason

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
SPLITS = {  # words in names, and the splits they stand for
    "train": "train",
    "dev": "dev",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "prompt": "prompt",
}
NO_SUBSET = {"data", "all", "main", "default", "full"}
MOST_FILES = 20_000
Row = dict[str, Any]


@dataclass(frozen=True)
class Home:
    """Where a task's data set is on the hub: a repository, which of its files, and its revision."""

    repository: str
    files: tuple[str, ...]
    revision: str | None = None


@dataclass(frozen=True)
class Table:
    """A file of rows, with what its name says of it."""

    path: Path
    split: str
    subset: str


class Data:
    """The files of one task."""

    def __init__(self, task: str, folder: Path, tables: list[Table]) -> None:
        self.task, self.folder, self.tables = task, folder, tables

    def first_of(self, splits: tuple[str, ...]) -> str:
        """The first of these splits that is there, or else the first."""
        there = {table.split for table in self.tables}
        return next((each for each in splits if each in there), splits[0])

    def rows(self, *splits: str, columns: tuple[str, ...] = ()) -> dict[str, list[Row]]:
        """The rows of the first of these splits that is there, by subset; a row may name its own.

        `columns` are those of a CSV file that does not name them. Raises Dsv2Error.
        """
        split = self.first_of(splits)
        found = dict[str, list[Row]]()
        for table in self.tables:
            if table.split == split and table.path.suffix != ".txt":
                for row in rows_of(table.path, columns):
                    named = row.get("subject") or row.get("type") or table.subset
                    found.setdefault(str(named).replace(" ", "_"), []).append(row)
        return found

    def only_rows(self, *splits: str) -> list[Row]:
        """The same of a task without subsets. Raises Dsv2Error where the folder holds several sets of it."""
        split = self.first_of(splits)
        tables = [each for each in self.tables if each.split == split and each.path.suffix != ".txt"]
        sets = sorted({each.subset for each in tables})
        if len(sets) > 1:
            why = f"they are called {', '.join(name or self.task for name in sets[:5])}"
            fix = "--data with a folder that holds one of them"
            raise UsageError(f"{self.folder} has {len(sets)} sets of {self.task}", why=why, fix=fix)
        return [row for rows in self.rows(split).values() for row in rows]

    def narrowed(self, word: str) -> Data:
        """The files in whose paths a word is, where it is in any."""
        mine = [each for each in self.tables if word in str(each.path.relative_to(self.folder)).lower()]
        return Data(self.task, self.folder, mine or self.tables)

    def texts(self, subset: str) -> Iterator[str]:
        """The .txt files that are called so. Raises Dsv2Error."""
        for table in self.tables:
            if table.path.suffix == ".txt" and table.subset == subset:
                yield as_text(content(table.path))


def find_data(task: str, names: tuple[str, ...], home: Home | None, given: Path | None, alone: bool) -> Data:
    """The data of a task in a person's folder or file, or of the hub where none is given.

    `names` are what its files may be called besides; `alone`: the folder is this task's, whatever they are
    called. Raises Dsv2Error.
    """
    folder = fetched(task, home) if given is None else path_of(given)
    if folder.is_file():
        return Data(task, folder.parent, [table_of(folder, Path(folder.name))])
    if not folder.is_dir():
        raise UsageError(f"There is no {folder}", fix="--data with a folder or a file that is there")
    files = [path.relative_to(folder) for path in files_in(folder)]
    names = (task, *names)
    mine = [path for path in files if any(called(part, names) for part in path.parts)]
    if not mine and (alone or given is None or any(called(folder.resolve().name, (name,)) for name in names)):
        mine = files
    tables = [table_of(folder / path, path) for path in mine]
    if not any(table.path.suffix != ".txt" for table in tables):
        why = f"none of its {len(files)} files and folders is called {' or '.join(names)}"
        fix = f"put the task's files into {folder}/{task}"
        raise UsageError(f"{folder} has no data of {task}", why=why, fix=fix)
    return Data(task, folder, tables)


def files_in(folder: Path) -> list[Path]:
    """Files of known kinds, in order. Raises UsageError for a folder with too many."""
    found = []
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(each for each in folders if not each.startswith("."))
        found += [Path(where, name) for name in sorted(names) if kind_of(name) in SUFFIXES]
        if len(found) > MOST_FILES:
            raise UsageError(
                f"{folder} has more than {MOST_FILES:,} files", fix="--data with a smaller folder"
            )
    return found


def kind_of(name: str) -> str:
    return Path(name.removesuffix(".gz")).suffix.lower()


def called(part: str, names: tuple[str, ...]) -> bool:
    """Whether a file or folder has one of these names, alone or with a split's, a version's or a part's."""
    plain = re.sub(r"-\d{5}-of-\d{5}", "", part.removesuffix(".gz"))
    plain = plain.removesuffix(Path(plain).suffix) if kind_of(part) in SUFFIXES else plain
    more = rf"([._ -]({'|'.join(SPLITS)}|first\d+|v\d[\d._]*))*"
    return any(re.fullmatch(re.escape(name) + more, plain, re.IGNORECASE) for name in names)


def table_of(path: Path, inner: Path) -> Table:
    """What a path within a folder of data says of its file.

    The split is the last word in it that names one; the subset is what is left of the file's name, or the
    folder next to it.
    """
    name = inner.name.removesuffix(".gz")
    stem = re.sub(r"-\d{5}-of-\d{5}$", "", name[: len(name) - len(Path(name).suffix)])
    split, kept = "test", list[str]()
    known = False
    for part in (stem, *reversed(inner.parts[:-1])):
        words = re.split(r"([._ -])", part)
        at = next((i for i in reversed(range(len(words))) if words[i].lower() in SPLITS), None)
        if at is not None and not known:
            split, known = SPLITS[words[at].lower()], True
            del words[max(0, at - 1) : at + 1]
        rest = "".join(words).strip("._ -")
        if rest and not rest.isdecimal() and rest.lower() not in NO_SUBSET:
            kept.append(rest)
    return Table(path, split, kept[0] if kept else "")


def content(path: Path) -> bytes:
    """A file's bytes, unpacked. Raises Dsv2Error naming it."""
    try:
        data = read_bytes(path)
        if path.suffix == ".gz":
            with gzip.open(io.BytesIO(data)) as file:
                data = read_within(file)  # type: ignore[arg-type]
        return data
    except (OSError, EOFError, ValueError) as error:
        raise broken(path, reason(error)) from None


def rows_of(path: Path, columns: tuple[str, ...] = ()) -> Iterator[Row]:
    """The rows of a file, their names in lower case. Raises Dsv2Error naming it."""
    kind = kind_of(path.name)
    reader: dict[str, Callable[[Path, tuple[str, ...]], Iterator[Row]]] = {
        ".jsonl": json_lines,
        ".json": json_rows,
        ".csv": separated,
        ".tsv": separated,
        ".parquet": parquet_rows,
    }
    for row in reader[kind](path, columns):
        yield {str(name).strip().lower(): value for name, value in row.items()}


def json_lines(path: Path, columns: tuple[str, ...]) -> Iterator[Row]:
    """Raises Dsv2Error."""
    for number, line in enumerate(content(path).splitlines(), 1):
        if line.strip():
            yield json_object(path, line, f"line {number}: ")


def json_object(path: Path, text: bytes, where: str) -> Row:
    """Raises Dsv2Error."""
    try:
        value = parse_json(text)
    except ValueError as error:
        raise broken(path, where + reason(error)) from None
    if not isinstance(value, dict):
        raise broken(path, where + "it is no JSON object")
    return value


def json_rows(path: Path, columns: tuple[str, ...]) -> Iterator[Row]:
    """A list of objects, by itself or as the one list in an object; or one object. Raises Dsv2Error."""
    data = content(path)
    try:
        value = parse_json(data)
    except ValueError as error:
        if b"\n{" in data.strip():  # lines of JSON under another name
            yield from json_lines(path, columns)
            return
        raise broken(path, reason(error)) from None
    if isinstance(value, dict):
        lists = [each for each in value.values() if isinstance(each, list) and each]
        value = lists[0] if len(lists) == 1 and isinstance(lists[0][0], dict) else [value]
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise broken(path, "it holds no list of objects")
    yield from value


def separated(path: Path, columns: tuple[str, ...]) -> Iterator[Row]:
    """Rows of a CSV or TSV file; its first line names its columns, or is a row like the others where the
    first of `columns` is not in it. Raises Dsv2Error.
    """
    try:
        text = as_text(content(path))
        lines = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if ".tsv" in path.name else ",")
        first = next(lines, [])
        named = not columns or columns[0] in [word.strip().lower() for word in first]
        names = first if named else list(columns)
        for row in lines if named else itertools.chain([first], lines):
            if len(row) == len(names):
                yield dict(zip(names, row, strict=True))
            elif row:
                raise ValueError(f"line {lines.line_num} has {len(row)} columns, and {len(names)} are named")
    except (ValueError, csv.Error) as error:
        raise broken(path, reason(error)) from None


def parquet_rows(path: Path, columns: tuple[str, ...]) -> Iterator[Row]:
    """Raises Dsv2Error, also where nothing that reads it is installed."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        fix = "pip install pyarrow, or give the data as JSON or CSV"
        raise Dsv2Error(
            f"{path} is a Parquet file", why="pyarrow, which reads it, is not installed", fix=fix
        ) from None
    try:
        yield from parquet.read_table(path).to_pylist()
    except (ArrowException, OSError, ValueError) as error:
        raise broken(path, reason(error)) from None


def broken(path: Path, why: str) -> Dsv2Error:
    return Dsv2Error(f"{path} cannot be read", why=why, fix="mend it, or get it again")


def fetched(task: str, home: Home | None) -> Path:
    """The folder of a data set of the hub, downloaded where it is not here. Raises Dsv2Error.

    Nobody's token is sent: these data sets are open to all.
    """
    if home is None:
        raise UsageError(f"{task} needs a file of yours", fix="--data FILE")
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    try:
        return Path(
            snapshot_download(
                home.repository,
                repo_type="dataset",
                revision=home.revision,
                allow_patterns=list(home.files),
                token=False,
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, ValueError) as error:
        if constants.HF_HUB_OFFLINE:
            why = f"HF_HUB_OFFLINE is set, and {home.repository} has not been downloaded before"
        else:
            why = f"the hub was asked for {home.repository}: {reason(error)}"
        fix = f"--data DIR, a folder with {task} in it"
        raise Dsv2Error(f"The questions of {task} are not here", why=why, fix=fix) from None
