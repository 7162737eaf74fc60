"""Whether a model's files are whole: there, with headers that fit the config, and what was published."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dsv2cli.checkpoint.names import inspect
from dsv2cli.errors import Dsv2Error
from dsv2cli.hubs.hashes import SUMS, hash_like, published
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


def looked_at(copy: Copy, today: dict[str, str], progress: Progress | None) -> Iterator[Verdict]:
    """Each file of a copy, against what was published when it came, and the hashes that the hub says today.

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
    for name in sorted(today.keys() - names):
        yield Verdict(name, 0, "bad", "the hub has it, and it is missing")
    total, done = copy.bytes, 0

    def counted(number: int) -> None:
        nonlocal done
        done += number
        if progress is not None:
            progress(done, total)

    for file in copy.files:
        if file.name.startswith(".") or file.name == SUMS:
            continue
        wanted = {digest for digest in (known.get(file.name), today.get(file.name)) if digest is not None}
        try:
            size = file.stat().st_size
            found = {len(kind): hash_like(file, kind, counted) for kind in one_of_each(wanted)}
        except OSError as error:
            yield Verdict(file.name, 0, "bad", reason(error))
            continue
        wrong = sorted(digest for digest in wanted if digest != found[len(digest)])
        if wrong:
            why = f"its hash is {found[len(wrong[0])]}, not {wrong[0]}"
            yield Verdict(file.name, size, "bad", why)
        elif not wanted:
            yield Verdict(file.name, size, "unknown", "nothing says what its hash should be")
        else:
            yield Verdict(file.name, size, "ok")


def one_of_each(digests: set[str]) -> list[str]:
    """One hash of each kind, which their lengths tell."""
    return list({len(digest): digest for digest in digests}.values())


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
