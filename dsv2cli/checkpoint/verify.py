"""Whether a model's files are whole: there, with headers that fit the config, and what was published."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dsv2cli.checkpoint.names import inspect
from dsv2cli.errors import Dsv2Error
from dsv2cli.hubs.hashes import git_sha1, published
from dsv2cli.hubs.shelf import Copy
from dsv2cli.model.config import DeepseekV2Config
from dsv2cli.outside import reason

Progress = Callable[[int, int], None]


@dataclass
class Verdict:
    """On one file: ok, bad, or unknown where nothing says what it should be."""

    file: str
    bytes: int
    state: str
    why: str = ""


def looked_at(
    copy: Copy, online: dict[str, tuple[int, str]] | None, progress: Progress | None
) -> Iterator[Verdict]:
    """Each file of a copy; with `online`, sizes and hashes of the hub today, against those too.

    Raises Dsv2Error for a manifest that can not be read.
    """
    known = {path.name: digest for path, digest in published(copy.folder).items()}
    if copy.gguf is not None and copy.gguf.name.startswith("sha256-"):  # Ollama's names
        known = {copy.gguf.name: copy.gguf.name.removeprefix("sha256-")}
    elif copy.gguf is None:
        yield whole(copy)
    names = {file.name for file in copy.files}
    if copy.gguf is None:
        for name in sorted(known.keys() - names):
            yield Verdict(name, 0, "bad", "it is missing")
    for name in sorted((online or {}).keys() - names):
        yield Verdict(name, 0, "bad", "the hub has it, and it is missing")
    total, done = copy.bytes, 0
    for file in copy.files:
        if file.name.startswith(".") or file.name == "SHA256SUMS":
            continue
        wanted = {known.get(file.name), (online or {}).get(file.name, (0, None))[1]} - {None}
        try:
            size = file.stat().st_size
            digests = read(
                file, {40 if len(str(each)) == 40 else 64 for each in wanted}, progress, done, total
            )
        except OSError as error:
            yield Verdict(file.name, 0, "bad", reason(error))
            continue
        done += size
        wrong = sorted(str(each) for each in wanted if each not in digests)
        if wrong:
            found = next(digest for digest in digests if len(digest) == len(wrong[0]))
            yield Verdict(file.name, size, "bad", f"its hash is {found}, not {wrong[0]}")
        elif not wanted:
            yield Verdict(file.name, size, "unknown", "nothing says what its hash should be")
        else:
            yield Verdict(file.name, size, "ok")


def whole(copy: Copy) -> Verdict:
    """On the headers of all weights, against the index and the config."""
    name = "headers"
    try:
        if copy.lacks:
            return Verdict(name, 0, "bad", copy.lacks)
        count = len(inspect(copy.folder, DeepseekV2Config.load(copy.folder)))
    except Dsv2Error as error:
        return Verdict(name, 0, "bad", error.sentence)
    return Verdict(name, 0, "ok", f"{count:,} tensors, as config and index call for")


def read(file: Path, lengths: set[int], progress: Progress | None, done: int, total: int) -> set[str]:
    """The hashes of a file that have these lengths. Raises OSError."""
    digests = set()
    if 40 in lengths:
        digests.add(git_sha1(file))
    if 64 in lengths:
        digest = hashlib.sha256()
        with file.open("rb") as opened:
            while block := opened.read(2**22):
                digest.update(block)
                done += len(block)
                if progress is not None:
                    progress(done, total)
        digests.add(digest.hexdigest())
    return digests
