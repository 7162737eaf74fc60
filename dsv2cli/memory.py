"""How much memory this machine has, and memories written as `8x80GB`. Needs no torch."""

from __future__ import annotations

import contextlib
import ctypes
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dsv2cli.errors import UsageError

MOST = 4096  # memories
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "G": 10**9}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(text: str, unit: str = "") -> int | None:
    """`75GB` or `1.5 TiB` in bytes; `unit` is what a bare number is in. None for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    scale = UNITS.get((match[2] or unit).upper()) if match else None
    return None if match is None or scale is None else int(float(match[1]) * scale)


@dataclass(frozen=True)
class Memory:
    """`count` alike memories of `bytes` each; `kind` is gpu or cpu."""

    name: str
    bytes: int
    count: int = 1
    kind: str = "gpu"

    @property
    def label(self) -> str:
        """As it is shown: `8 x H100 80 GB`."""
        each = f"{self.bytes / 1e9:.1f} GB".replace(".0 GB", " GB")
        return f"{self.count} x {self.name} {each}" if self.count > 1 else f"{self.name} {each}"


def parse_gpus(text: str) -> list[Memory]:
    """`8x80GB` or `80GB,2x24GiB`. Raises UsageError for anything else."""
    found = []
    for entry in text.split(","):
        match = re.fullmatch(r"(?:\s*(\d+)\s*[x×*])?(.*)", entry)
        count, size = (int(match[1] or 1), parse_size(match[2], "GB")) if match else (0, None)
        if not 0 < count <= MOST or not size or size > 2**60:
            fix = "--gpus 8x80GB, or --gpus 80GB,2x24GB"
            raise UsageError(f"--gpus {text} is not a list of memories", fix=fix)
        found.append(Memory("GPU", size, count))
    return found


def detected() -> list[Memory]:
    """The GPUs that the NVIDIA driver knows, and what RAM this process may use."""
    return [*gpus(), Memory("RAM", ram_bytes(), kind="cpu")]


def gpus() -> list[Memory]:
    """Those that the NVIDIA driver knows; none where there is no driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    cards: dict[tuple[str, int], int] = {}
    for line in listed.splitlines():
        name, _, mebibytes = line.rpartition(",")
        if mebibytes.strip().isdigit():
            card = (name.strip(), int(mebibytes) * 2**20)
            cards[card] = cards.get(card, 0) + 1
    return [Memory(name, size, count) for (name, size), count in cards.items()]


def ram_bytes() -> int:
    """Of the machine, or of the container where that has less."""
    import psutil

    total = int(psutil.virtual_memory().total)
    try:
        groups = Path("/proc/self/cgroup").read_text()
    except OSError:
        groups = "0::/"
    return min(total, *group_limits(groups, Path("/sys/fs/cgroup")), total)


def group_limits(groups: str, root: Path) -> Iterator[int]:
    """Bytes that control groups under `root` allow a process and its parents, in both versions of them.

    `groups` is what Linux lists of the process: lines of number, controllers and path.
    """
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        folder, name = root, "memory.max"
        if controllers:
            folder, name = root / "memory", "memory.limit_in_bytes"
        if controllers not in ("", "memory"):
            continue
        group = folder / path.strip("/")
        for place in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):
                yield int((place / name).read_text())
            if place == folder:
                break


def give_back() -> None:
    """Let the system have what the C library keeps of memory that is free, where that can be asked for."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
