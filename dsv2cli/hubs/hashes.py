"""Whether a checkpoint's files are those that were published, to the bit: where something says what those
are.

That is the hub's cache (a file there is named by its hash), what the hub's client writes beside files that it
puts into a folder, and a SHA256SUMS as `sha256sum` writes it.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from dsv2cli import places
from dsv2cli.errors import Dsv2Error
from dsv2cli.outside import AGAIN, reason, require_file, text_of

SUMS = "SHA256SUMS"
OURS = ".dsv2"  # what `dsv2 pull` keeps beside what a hub's cache holds: beginnings, manifests, a lock
EDGE = 2**16  # bytes of each end of a file that tell it from another
HASH = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")


def published(folder: Path) -> dict[Path, str]:
    """The files of a checkpoint whose hash is known: SHA-256, or git's SHA-1. Raises Dsv2Error for a damaged
    list.
    """
    known: dict[Path, str] = {}
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        note = folder / ".cache" / "huggingface" / "download" / f"{file.name}.metadata"
        blob = file.resolve()
        if file.is_symlink() and blob.parent.name == "blobs" and HASH.fullmatch(blob.name):
            known[file] = blob.name
        elif note.is_file():
            lines = [line.strip() for line in text_of(note).splitlines()]
            known |= {file: lines[1]} if len(lines) > 1 and HASH.fullmatch(lines[1]) else {}
    for manifest in (manifest_of(folder), folder / SUMS):
        known |= {folder / name: digest for name, digest in read_sums(manifest).items()}
    return known


def manifest_of(folder: Path) -> Path:
    """What `dsv2 pull` writes beside a snapshot in the hub's cache, of all files and their SHA-256."""
    return folder.parents[1] / OURS / f"{folder.name}.sha256" if len(folder.parents) > 1 else folder / SUMS


def read_sums(path: Path) -> dict[str, str]:
    """What a file in the form of sha256sum says: name -> SHA-256; nothing where there is none.

    Raises Dsv2Error for a damaged one.
    """
    sums: dict[str, str] = {}
    for line in text_of(path).splitlines() if path.is_file() else ():
        match = re.fullmatch(r"([0-9a-fA-F]{64}) [ *]([^/\0]+)", line)
        if match is None:
            raise Dsv2Error(f"{path} cannot be read", why=f"{line[:80]!r} is no line of it", fix=AGAIN)
        sums[match[2]] = match[1].lower()
    return sums


def save_sums(path: Path, sums: dict[str, str]) -> None:
    """Raises OSError."""
    write_whole(path, sums_text(sums))


def write_whole(path: Path, text: str) -> None:
    """A file that is there whole or not at all. Raises OSError."""
    with places.unfinished(path) as new:
        new.write_text(text, encoding="utf-8")
        new.chmod(0o644)
        new.replace(path)


def sums_text(sums: dict[str, str]) -> str:
    """As sha256sum writes it."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))


def refuse_other(path: Path, wanted: str) -> None:
    """Raises Dsv2Error unless a file has the SHA-256, or git's SHA-1, that was published."""
    try:
        found = hash_like(path, wanted)
    except OSError as error:
        raise Dsv2Error(f"{path} cannot be read", why=reason(error), fix=AGAIN) from None
    if found != wanted:
        raise Dsv2Error(
            f"{path} is not what was published", why=f"its hash is {found}, not {wanted}", fix=AGAIN
        )


def edges(folder: Path, times: bool = False, files: Sequence[Path] = ()) -> str:
    """Tells one checkpoint from another without reading it whole: names, sizes and both ends of its files,
    or of the given ones, and where `times` says so when they were changed. Raises Dsv2Error.
    """
    try:
        listed = files or sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")])
        return read_edges(listed, times)
    except OSError as error:
        raise Dsv2Error(f"{folder} cannot be read", why=reason(error)) from None


def read_edges(files: Sequence[Path], times: bool) -> str:
    """edges, which raises OSError."""
    digest = hashlib.sha256()
    for file in files:
        about = require_file(file)
        when = (about.st_mtime_ns, about.st_ctime_ns) if times else ()
        digest.update(repr((os.fsencode(file.name), about.st_size, when)).encode())
        with file.open("rb") as opened:
            digest.update(opened.read(EDGE))
            opened.seek(max(0, about.st_size - EDGE))
            digest.update(opened.read(EDGE))
    return digest.hexdigest()


def hash_like(path: Path, wanted: str, counted: Callable[[int], None] = lambda _: None) -> str:
    """A file's hash of the kind that another is: SHA-256, or git's SHA-1, which begins with the size.

    `counted` is told the bytes of each block that was read. Raises OSError.
    """
    size = require_file(path).st_size
    digest = hashlib.sha256()
    if len(wanted) == 40:
        digest = hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
            counted(len(block))
    return digest.hexdigest()


def sha256(path: Path) -> str:
    """Of the whole file, in hexadecimal. Raises OSError."""
    return hash_like(path, "")


def write_sums(folder: Path) -> None:
    """SHA256SUMS of all files in a folder. Raises OSError."""
    files = [path for path in folder.iterdir() if path.is_file() and path.name != SUMS]
    (folder / SUMS).write_text(sums_text({path.name: sha256(path) for path in files}), encoding="utf-8")
