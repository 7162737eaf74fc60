"""How much memory this machine has, and memories written as `8x80GB`. Needs no torch."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from dsv2cli.errors import UsageError

UNITS = {"GB": 10**9, "GIB": 2**30, "G": 10**9, "MB": 10**6, "MIB": 2**20, "TB": 10**12}


@dataclass(frozen=True)
class Memory:
    """`count` alike memories of `bytes` each."""

    name: str
    bytes: int
    count: int = 1
    kind: str = "gpu"

    @property
    def label(self) -> str:
        each = f"{self.bytes / 1e9:.1f} GB".replace(".0 GB", " GB")
        return f"{self.count} x {self.name} {each}" if self.count > 1 else f"{self.name} {each}"


def parse_gpus(text: str) -> list[Memory]:
    """`8x80GB` or `80GB,2x24GiB`. Raises UsageError for anything else."""
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(?:(\d+)\s*[x×*]\s*)?(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", part)
        unit = UNITS.get((match[3] or "GB").upper()) if match else None
        if match is None or unit is None or int(match[1] or 1) == 0 or float(match[2]) == 0:
            raise UsageError(
                f"--gpus {text} is not a list of memories", fix="--gpus 8x80GB, or --gpus 80GB,2x24GB"
            )
        found.append(Memory("GPU", int(float(match[2]) * unit), int(match[1] or 1)))
    return found


def detected() -> list[Memory]:
    """The GPUs that the NVIDIA driver knows, and what RAM this process may use."""
    return [*gpus(), Memory("RAM", ram_bytes(), kind="cpu")]


def gpus() -> list[Memory]:
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
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):
        return total
