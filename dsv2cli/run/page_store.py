"""Pages of latents in files, so that a prompt which begins like one of yesterday's is not read again.

A file is called by its page's name, which stands for all tokens up to its end, and lies in a folder that
stands for the model, its number formats and what computes it. It says all that itself, and the hash of what
it holds: what is anything else is deleted and never used. Nothing here is worth an error: where the disk does
not do as it should, the store is closed, and `trouble` says why.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import queue
import threading
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dsv2cli import places
from dsv2cli.errors import Dsv2Error, UsageError
from dsv2cli.hubs.hashes import edges
from dsv2cli.kernels.quantized import Quantized
from dsv2cli.outside import reason, require_file
from dsv2cli.run.runner import Runner

FORMAT = "dsv2 page 1"
WAITING = 64  # pages that may wait to be written; who brings more waits, too
SWEPT = 0.9  # of the limit is left when the least recently used have been deleted


def identity(checkpoint: Path, runner: Runner) -> str:
    """Tells one model in one number format from another without reading it whole: whoever changes a file
    changes its times. Raises Dsv2Error where it can not be looked at.
    """
    weights = [each for each in runner.model.modules() if isinstance(each, Quantized)]
    codes = sorted({f"{each.bits}:{each.group}" for each in weights})
    files = edges(checkpoint, times=True)
    return hashlib.sha256(f"{runner.dtype} {runner.cache} {codes} {files}".encode()).hexdigest()


def digest_of(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of the names and bytes of tensors on the CPU, of any shapes, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
    return digest.hexdigest()


def require_room(folder: Path) -> None:
    """Raises UsageError unless there is a folder to write to, or one can be made."""
    try:
        places.private_folder(folder)
        with places.unfinished(folder / "page"):
            pass
    except OSError as error:
        why, fix = reason(error), "a folder that you may write to"
        raise UsageError(f"--cache-store {folder} can not be used", why=why, fix=fix) from None


class PageStore:
    """A folder of pages of one model. Several processes may use it at once."""

    def __init__(self, folder: Path, limit: int, model: str) -> None:
        """At most about `limit` bytes are kept in `folder`, those of other models among them; `model` stands
        for all that latents depend on but the tokens. Raises UsageError for a folder that can not be used.
        """
        self.root, self.limit, self.model = folder, limit, model
        self.trouble, self.told = "", False
        self.folder = folder / model[:16]
        self.loaded = self.written = 0  # pages
        self.held: int | None = None  # bytes in all files, once they were counted
        require_room(self.folder)
        self.queue = queue.Queue[tuple[bytes, Tensor] | None](WAITING)
        self.coming = dict[bytes, Tensor]()  # pages that are not in their files yet
        self.writer = threading.Thread(target=self.write_all, daemon=True)
        self.writer.start()
        atexit.register(self.close)

    def file(self, name: bytes) -> Path:
        return self.folder / name.hex()[:2] / f"{name.hex()}.safetensors"

    def has(self, name: bytes) -> bool:
        return name in self.coming or self.file(name).is_file()

    def load(self, name: bytes, size: int) -> Tensor | None:
        """What the page of this name holds, `size` bytes, or None where it is not here or not as it was."""
        if self.trouble:
            return None
        path = self.file(name)
        try:
            held = self.coming.get(name)
            held = self.read(path, name) if held is None else held
            if held.shape != (size,):
                raise ValueError("another size")
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, ValueError, KeyError):
            with suppress(OSError):
                path.unlink()
            return None
        with suppress(OSError):
            os.utime(path)
        self.loaded += 1
        return held

    def read(self, path: Path, name: bytes) -> Tensor:
        """Raises OSError, SafetensorError, ValueError or KeyError."""
        require_file(path)
        with safe_open(path, framework="pt") as file:
            about, held = file.metadata() or {}, file.get_tensor("page")
        if about != self.about(name, held) or held.dtype != torch.uint8:
            raise ValueError("another page")
        return held

    def about(self, name: bytes, held: Tensor) -> dict[str, str]:
        """What a page's file says of it."""
        digest = digest_of({"page": held})
        return {"format": FORMAT, "model": self.model, "name": name.hex(), "sha256": digest}

    def save(self, name: bytes, held: Tensor) -> None:
        """Let a page be written while the caller goes on. held [bytes] is not changed afterwards."""
        if not self.trouble:
            self.coming[name] = held
            self.queue.put((name, held))

    def write_all(self) -> None:
        """Write what comes, until nothing does any more."""
        while (item := self.queue.get()) is not None:
            name, held = item
            try:
                if not self.trouble:
                    self.write(name, held)
            except (OSError, SafetensorError) as error:
                self.trouble = reason(error) if isinstance(error, OSError) else str(error)
            finally:
                self.coming.pop(name, None)

    def write(self, name: bytes, held: Tensor) -> None:
        """One page, whole or not at all. Raises OSError or SafetensorError."""
        path = self.file(name)
        places.private_folder(path.parent)
        with places.unfinished(path.parent / "page") as new:
            save_file({"page": held}, new, self.about(name, held))
            os.chmod(new, 0o600)
            size = new.stat().st_size
            os.replace(new, path)
        self.written += 1
        if self.held is not None:
            self.held += size
        if self.held is None or self.held > self.limit:
            self.sweep()

    def sweep(self) -> None:
        """Count all files, and delete the least recently used where they are too many."""
        found = []
        for path in self.root.glob("*/*/*.safetensors"):
            with suppress(OSError):
                about = path.stat()
                found.append((about.st_mtime_ns, about.st_size, path))
        self.held = sum(size for _, size, _ in found)
        if self.held <= self.limit:
            return
        for _, size, path in sorted(found):
            if self.held <= SWEPT * self.limit:
                break
            with suppress(OSError):
                path.unlink()
                self.held -= size

    def close(self) -> None:
        """Wait until all is written."""
        if self.writer.is_alive():
            self.queue.put(None)
            self.writer.join()

    def complaint(self) -> Dsv2Error | None:
        """What a person is to be told of a store that has trouble, once."""
        if not self.trouble or self.told:
            return None
        self.told = True
        why, fix = self.trouble, "make room, or use another folder"
        return Dsv2Error(f"{self.root} keeps no more pages", why=why, fix=fix)
