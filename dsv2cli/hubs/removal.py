"""Deleting a copy of a model: what belongs to it alone, and nothing that another copy needs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dsv2cli import places
from dsv2cli.hubs import shelf
from dsv2cli.hubs.hashes import SUMS, manifest_of, read_sums, save_sums
from dsv2cli.hubs.shelf import INDEX, OURS, Copy, size_below


@dataclass
class Plan:
    """What is to go: a whole folder, or files, and the blobs that only they lead to."""

    folder: Path | None
    files: list[Path]
    blobs: set[Path]

    @property
    def bytes(self) -> int:
        """That are free afterwards."""
        total = 0 if self.folder is None else size_below(Path(os.path.realpath(self.folder)))
        for path in (*self.files, *self.blobs):
            if path.exists() and not path.is_symlink() and self.folder not in path.parents:
                total += path.stat().st_size
        return total


def planned(copy: Copy) -> Plan:
    """What deleting a copy takes. Raises OSError."""
    beside = [other for other in shelf.copies() if other.folder == copy.folder and other != copy]
    snapshots = copy.root / "snapshots"
    if beside:
        files = [
            path for path in copy.files if path.suffix in (".safetensors", ".gguf") or path.name == INDEX
        ]
        rest = set(links_in([copy.root])) - set(files)
        return Plan(None, files, blobs_of(copy, files) - blobs_of(copy, rest))
    revisions = [path for path in snapshots.glob("*") if path.is_dir()]
    if copy.root == copy.folder or (not shelf.stages(copy.root) and revisions == [copy.folder]):
        return Plan(copy.root, [], set())
    own, others = links_in([copy.folder]), links_in(path for path in revisions if path != copy.folder)
    return Plan(copy.folder, [], blobs_of(copy, own) - blobs_of(copy, others))


def remove(copy: Copy) -> None:
    """Delete a copy. Raises OSError, and BlockingIOError where somebody fetches into its repository."""
    with idle(copy):
        plan = planned(copy)
        if plan.folder is not None and plan.folder != copy.root:
            for ref in (copy.root / "refs").rglob("*"):
                with contextlib.suppress(ValueError):
                    if ref.is_file() and ref.read_text().strip() == copy.folder.name:
                        ref.unlink()
        for path in (*plan.blobs, *plan.files):
            path.unlink(missing_ok=True)
        if plan.folder is None:
            names = {path.name for path in plan.files}
            for manifest in (manifest_of(copy.folder), copy.folder / SUMS):
                if manifest.exists():
                    sums = read_sums(manifest)
                    save_sums(manifest, {name: sums[name] for name in sums if name not in names})
            return
        if plan.folder != copy.root:
            manifest_of(copy.folder).unlink(missing_ok=True)
        gone(plan.folder)


@contextlib.contextmanager
def idle(copy: Copy) -> Iterator[None]:
    """Nobody fetches into a copy's repository meanwhile. Raises BlockingIOError where somebody does."""
    root = copy.root.parent.parent if copy.root.parent.name == OURS else copy.root
    locks = [*(root / OURS).glob("*.lock"), *root.parent.glob(f".{root.name}{OURS}*.lock")]
    locks += [lock for lock in [root.with_name(f"{root.name}.lock")] if lock.exists()]
    with contextlib.ExitStack() as held:
        for lock in locks:
            held.enter_context(places.held(lock))
        yield


def links_in(folders: Iterable[Path]) -> list[Path]:
    """All files below."""
    return [path for folder in folders for path in folder.rglob("*") if path.is_symlink() or path.is_file()]


def blobs_of(copy: Copy, links: Iterable[Path]) -> set[Path]:
    """Which of the repository's blobs links lead to; what lies elsewhere is not ours to delete."""
    blobs = os.path.realpath(copy.root / "blobs")
    targets = {Path(os.path.realpath(link)) for link in links if link.is_symlink()}
    return {target for target in targets if str(target.parent) == blobs}


def gone(folder: Path) -> None:
    """Delete a folder that nobody sees half deleted. Raises OSError."""
    real = Path(os.path.realpath(folder))
    with places.unfinished(real, folder=True) as aside:
        real.rename(aside / real.name)
    if aside.exists():
        raise OSError(f"some files in {aside} could not be deleted")
    if folder.is_symlink():
        folder.unlink()


def sweep(folders: Iterable[Path]) -> None:
    """Delete what a killed process left of its deleting."""
    for folder in folders:
        with contextlib.suppress(OSError):
            for left in folder.glob(".*.unfinished"):
                with contextlib.suppress(OSError), places.held(left):
                    places.remove(left)
