"""Downloading a repository: asked for, given room, fetched beside its place, checked, and then put there.

The place is the hub's own cache, in its own layout, so that other programs find it too, or a folder. One
process at a time fills it; a second waits, and finds the work done.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from dsv2cli import places
from dsv2cli.errors import Dsv2Error, UsageError
from dsv2cli.hubs.download import PART, Download, Progress
from dsv2cli.hubs.hashes import SUMS, hash_like, read_sums, save_sums, sha256, write_whole
from dsv2cli.hubs.reference import Reference
from dsv2cli.hubs.remote import WANTED, Listing, RemoteFile, Tell, list_files
from dsv2cli.hubs.shelf import COMMIT, INDEX, OURS, SINGLE, hub_folder, modelscope_folder, named_by
from dsv2cli.outside import STALL, in_units, path_of, read_json, reason

LAST = (INDEX, "config.json")  # what makes a folder a model comes last

Bar = Callable[[str], AbstractContextManager[Progress | None]]


class Destination(ABC):
    """Where a listing's files go; `stage`, on the same disk, holds them until all are there."""

    def __init__(self, listing: Listing, folder: Path, stage: Path) -> None:
        self.listing, self.folder, self.stage = listing, folder, stage

    @abstractmethod
    def missing(self, check: bool = False) -> list[RemoteFile]:
        """The files that are not at their place; with `check`, those that are there are read, and wrong ones
        taken away. Raises OSError.
        """

    @abstractmethod
    def publish(self, digests: dict[str, str]) -> None:
        """Put what is in the stage to its place; `digests` are the SHA-256 of what has just come.

        Raises OSError.
        """

    def needed(self) -> int:
        """Bytes that are still to come."""
        left = 0
        for file in self.missing():
            sizes = [size_of(self.stage / name) for name in (file.name, file.name + PART)]
            left += max(0, file.size - max(0, *sizes))
        return left

    @contextlib.contextmanager
    def held(self, tell: Tell) -> Iterator[None]:
        """Alone with the place, once others are done. Raises OSError."""
        self.stage.parent.mkdir(parents=True, exist_ok=True)
        lock = self.stage.with_name(f"{self.stage.name}.lock")
        while True:
            number = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                try:
                    places.lock(number, places.ENDING)
                except BlockingIOError:
                    tell(f"another dsv2 fetches {self.listing.reference.name}: waiting for it")
                    places.lock(number, float("inf"))
                if same(number, lock):
                    self.stage.mkdir(exist_ok=True)
                    yield
                    return
            finally:
                os.close(number)

    def tidy(self) -> None:
        """Leave nothing of what was only looked at; a beginning of weights stays. Raises OSError."""
        for name in LAST:
            for path in (self.stage / name, self.stage / (name + PART)):
                path.unlink(missing_ok=True)
        self.leave()

    def leave(self) -> None:
        """Take the stage away where it is empty. Raises OSError."""
        with contextlib.suppress(OSError):
            self.stage.rmdir()
        if not self.stage.exists():
            self.stage.with_name(f"{self.stage.name}.lock").unlink(missing_ok=True)

    def end(self) -> None:
        """Take the stage away; what another download of the same revision left stays. Raises OSError."""
        for file in self.listing.files:
            for name in (file.name, file.name + PART):
                (self.stage / name).unlink(missing_ok=True)
        self.leave()


class HubCache(Destination):
    """The cache of Hugging Face: blobs by their hash, a snapshot of links to them, and refs by name."""

    def __init__(self, listing: Listing) -> None:
        self.root = hub_folder(listing.reference.name)
        folder = self.root / "snapshots" / listing.revision
        super().__init__(listing, folder, self.root / OURS / listing.revision)

    @contextlib.contextmanager
    def held(self, tell: Tell) -> Iterator[None]:
        for name in ("snapshots", "blobs", "refs"):  # without which no folder is a repository's
            (self.root / name).mkdir(parents=True, exist_ok=True)
        with super().held(tell):
            yield

    def leave(self) -> None:
        super().leave()
        with contextlib.suppress(OSError):  # a repository of which nothing is here is none
            for name in (OURS, "refs", "blobs", "snapshots", ""):
                (self.root / name).rmdir()

    def blob(self, file: RemoteFile) -> Path:
        return self.root / "blobs" / file.hash

    def missing(self, check: bool = False) -> list[RemoteFile]:
        if check:
            for file in self.listing.files:
                if size_of(self.blob(file)) >= 0 and hash_like(self.blob(file), file.hash) != file.hash:
                    self.blob(file).unlink()
        return [file for file in self.listing.files if size_of(self.blob(file)) != file.size]

    def publish(self, digests: dict[str, str]) -> None:
        for file in self.missing():
            os.replace(self.stage / file.name, self.blob(file))
        sums = {}
        self.folder.mkdir(exist_ok=True)
        for file in sorted(self.listing.files, key=lambda file: file.name in LAST):
            known = file.hash if len(file.hash) == 64 else digests.get(file.name)
            sums[file.name] = known or sha256(self.blob(file))
            link, target = self.folder / file.name, Path("..", "..", "blobs", file.hash)
            if not link.is_symlink() or Path(os.readlink(link)) != target:
                new = self.folder / f".{file.name}.{os.getpid()}"
                new.unlink(missing_ok=True)
                new.symlink_to(target)
                os.replace(new, link)
        manifest = self.stage.with_name(f"{self.listing.revision}.sha256")
        save_sums(manifest, read_sums(manifest) | sums)
        name = self.listing.reference.revision or "main"
        if not (COMMIT.fullmatch(name) and self.listing.revision.startswith(name)):
            (self.root / "refs" / name).parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.root / "refs" / name, self.listing.revision)


class Folder(Destination):
    """A folder of files, which SHA256SUMS lists: one that the person named, or a snapshot of ModelScope.

    The stage becomes the folder where that is not there yet; else files move into it one by one, those that
    make it a model last.
    """

    def __init__(self, listing: Listing, folder: Path, beside: Path, purpose: str = "") -> None:
        key = f"{listing.reference.name} {listing.wanted} {purpose}"
        digest = hashlib.sha256(key.encode()).hexdigest()[:8]
        super().__init__(listing, folder, beside.with_name(f"{beside.name}-{digest}"))

    def missing(self, check: bool = False) -> list[RemoteFile]:
        sums = {} if check else read_sums(self.folder / SUMS)
        missing = [file for file in self.listing.files if not self.has(file, sums)]
        for file in missing if check else ():
            (self.folder / file.name).unlink(missing_ok=True)  # so that nothing vouches for it later
        return missing

    def has(self, file: RemoteFile, sums: dict[str, str]) -> bool:
        place = self.folder / file.name
        if size_of(place) != file.size:
            return False
        known = sums.get(file.name) if len(file.hash) == 64 else None
        return (known or hash_like(place, file.hash)) == file.hash

    def publish(self, digests: dict[str, str]) -> None:
        sums = read_sums(self.folder / SUMS)
        names = {file.name for file in self.listing.files}
        came = [name for name in names if (self.stage / name).exists()]
        anew = not self.folder.exists()
        if not anew and came:  # until they are there nobody vouches for them
            save_sums(self.folder / SUMS, {name: sums[name] for name in sums if name not in came})
        for file in self.listing.files:
            known = file.hash if len(file.hash) == 64 else digests.get(file.name)
            path = (self.stage if file.name in came else self.folder) / file.name
            sums[file.name] = known or sha256(path)
        if not anew:
            for name in sorted(came, key=lambda name: name in LAST):
                os.replace(self.stage / name, self.folder / name)
            save_sums(self.folder / SUMS, sums)
            return
        for path in self.stage.iterdir():
            if path.name not in names and path.name != OURS:
                places.remove(path)
        save_sums(self.stage / SUMS, sums)
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.stage.rename(self.folder)


def size_of(path: Path) -> int:
    """Of a file; -1 where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def same(number: int, path: Path) -> bool:
    """Whether an open file is still the one at a path."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(number), path.stat())
    return False


def destination_of(listing: Listing, to: Path | None) -> Destination:
    """Raises UsageError for a folder that holds something else, OSError for one that can not be looked at."""
    if to is not None:
        to = own_folder(to)
        refuse_other_folder(to, listing)
        return Folder(listing, to, beside(to))
    if listing.reference.source == "ms":
        root = modelscope_folder(listing.reference.name)
        stage = root / OURS / listing.revision.replace("/", "--")
        return Folder(listing, root / "snapshots" / listing.revision, stage)
    return HubCache(listing)


def packed_place(listing: Listing, out: Path, format: str, group: int) -> Folder:
    """The destination of a repository that is packed while it comes."""
    return Folder(listing, out, beside(out), f"packed {format} {group}")


def refuse_other_folder(to: Path, listing: Listing | None = None) -> None:
    """Raises UsageError for what is there and is neither an empty folder nor one of this repository, OSError
    where it can not be looked at.
    """
    if not os.path.lexists(to):
        return
    if to.is_dir():
        held = [path for path in to.iterdir() if not path.name.startswith(f"{OURS}-")]
        mark = to / OURS
        known = listing is not None and mark.is_file() and mark.read_bytes() == marked(listing)
        if not held or known:
            return
    raise UsageError(f"{to} exists already", fix="another --to, or remove it first")


def marked(listing: Listing) -> bytes:
    """What a folder says of the repository that it is of."""
    return f"{listing.reference.source or 'hf'}:{listing.reference.name}\n".encode()


def own_folder(to: Path) -> Path:
    """A folder that a person names, in full. Raises UsageError for one that can not be made."""
    folder = Path(os.path.abspath(path_of(to)))
    if not folder.name:
        raise UsageError(f"{to} can not be made", fix="--to a new folder")
    return folder


def beside(folder: Path) -> Path:
    """Where what is to become a folder grows: in it where it is there, for it may be a disk of its own."""
    return folder / OURS if folder.is_dir() else folder.with_name(f".{folder.name}{OURS}")


def refuse_full_disk(destination: Destination, needed: int) -> None:
    """Raises Dsv2Error where the disk has not so many bytes free."""
    free = shutil.disk_usage(destination.stage).free
    if needed > free:
        raise Dsv2Error(
            f"There is no room for {destination.listing.reference}",
            why=f"{in_units(needed)} are to come, and {in_units(free)} are free there",
            fix="make room (dsv2 models), or --to a folder on another disk",
        )


def pull(reference: Reference, bar: Bar, tell: Tell, wanted: tuple[str, ...] = WANTED) -> Path:
    """Have a repository on disk, whole and checked; gives its folder. Raises Dsv2Error."""
    return fetch(list_files(reference, wanted, tell), bar, tell)


def fetch(
    listing: Listing, bar: Bar, tell: Tell, to: Path | None = None, stall: float = STALL, check: bool = False
) -> Path:
    """Have a listing's files on disk, whole and checked; gives their folder.

    With `check`, what is there already is read too, and comes once more where it is wrong. Raises Dsv2Error.
    """
    try:
        destination = destination_of(listing, to)
        with destination.held(tell):
            digests = {}
            try:
                if destination.missing(check):
                    refuse_full_disk(destination, destination.needed())
                    useful(destination, tell, stall)
            except Dsv2Error:
                destination.tidy()
                raise
            if missing := destination.missing():
                with bar(str(listing.reference)) as progress:
                    digests = downloaded(listing, missing, destination.stage, progress, tell, stall)
            if to is not None:
                folder = destination.folder if destination.folder.exists() else destination.stage
                (folder / OURS).write_bytes(marked(listing))
            destination.publish(digests)
            destination.end()
    except OSError as error:
        place = to or "the cache"
        raise Dsv2Error(
            f"The files of {listing.reference} could not be written to {place}",
            why=f"{error.filename or ''} {reason(error)}".strip(),
            fix="--to a folder on a disk with room that you may write to",
        ) from None
    return destination.folder


def useful(destination: Destination, tell: Tell, stall: float) -> None:
    """Let the destination's listing hold only what the index names, of weights. Config and index come for
    that, before the weights.

    Raises Dsv2Error where these are of another family, or not whole.
    """
    listing = destination.listing
    names = {file.name for file in listing.files}
    weights = {name for name in names if name.endswith(".safetensors")}
    if not weights:
        return
    if "config.json" not in names:
        what = f"{listing.reference} has no config.json"
        raise Dsv2Error(what, why="without it weights mean nothing", fix="another repository")
    few = [file for file in listing.files if file.name in LAST]
    downloaded(listing, few, destination.stage, None, tell, stall)
    kind = read_json(destination.stage / "config.json").get("model_type")
    if kind != "deepseek_v2":
        what = f"{listing.reference} is no model of the DeepSeek-V2 family"
        raise UsageError(what, why=f"its config says {kind}", fix="dsv2 pull v2-lite-chat")
    named = named_by(destination.stage / INDEX) if INDEX in names else {SINGLE}
    if not named or (missing := sorted(named - names)):
        why = f"it lacks {missing[0]}" if named else f"its {INDEX} names no files"
        what = f"{listing.reference} is not whole at {listing.host}"
        raise Dsv2Error(what, why=why, fix="another repository, or --source")
    kept = [file for file in listing.files if file.name not in weights - named]
    destination.listing = listing.of(kept)


def downloaded(
    listing: Listing,
    files: list[RemoteFile],
    stage: Path,
    progress: Progress | None,
    tell: Tell,
    stall: float = STALL,
) -> dict[str, str]:
    """Have these files in the folder `stage`; gives their SHA-256. Raises Dsv2Error."""
    download = Download(listing.of(files), stage, tell, progress, stall=stall)
    download.start()
    try:
        download.wait()
    finally:
        download.stop()
    return download.finished
