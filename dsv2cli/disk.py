"""How fast a disk gives the files of a checkpoint. Needs no torch."""

from __future__ import annotations

import mmap
import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PIECE = 2**20  # bytes read at once
READERS = 4  # that read at the same time
SECONDS = 0.2


def bytes_per_second(folder: Path) -> float | None:
    """What reading pieces of a folder's weights in a random order gives, measured for a moment.

    The memory where the system keeps what was read is passed by, or emptied of these pieces. None where
    nothing can be read.
    """
    files = [file for file in sorted(folder.glob("*.safetensors")) if file.stat().st_size >= 2 * PIECE]
    if not files:
        return None
    began = time.perf_counter()
    try:
        with ThreadPoolExecutor(READERS) as pool:
            total = sum(pool.map(lambda seed: read_some(files, seed, began + SECONDS), range(READERS)))
    except OSError:
        return None
    return total / (time.perf_counter() - began) or None


def read_some(files: list[Path], seed: int, end: float) -> int:
    """Read pieces until a moment of time.perf_counter; gives how many bytes. Raises OSError."""
    draw, total = random.Random(seed), 0
    with mmap.mmap(-1, PIECE) as buffer:  # whole pages, as direct reading demands
        while time.perf_counter() < end:
            file = draw.choice(files)
            at = draw.randrange(file.stat().st_size // PIECE) * PIECE
            total += read_piece(file, at, buffer)
    return total


def read_piece(file: Path, at: int, buffer: mmap.mmap) -> int:
    """Fill the buffer with a file's bytes from `at` on, from the disk; gives how many. Raises OSError."""
    try:
        opened = os.open(file, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    except OSError:  # file systems in memory know no direct reading
        opened = os.open(file, os.O_RDONLY)
    try:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(opened, at, PIECE, os.POSIX_FADV_DONTNEED)
        return os.preadv(opened, [buffer], at)
    finally:
        os.close(opened)
