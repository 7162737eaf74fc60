"""The library of the kernels where another processor runs it, emulated: as ctypes would call it, so that
native.Kernels takes it as it is.

Neither knows the other's memory. Before a call everything that it reaches is copied there: the tensors and
structures whose addresses are among its arguments, and those whose addresses stand in these structures.
Afterwards what has changed is copied back.
"""

from __future__ import annotations

import bisect
import ctypes
import gc
import struct
import subprocess
import threading
from functools import partial
from typing import Any

import numpy
import torch

# In the order of emulated.cpp.
NAMES = "dsv2_linear dsv2_mlp dsv2_attention dsv2_layers dsv2_pack dsv2_read".split()
ARGUMENTS = 12
STRUCTURES = (ctypes.Structure, ctypes.Array)


class Emulated:
    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.path = self.process.stdout.readline().strip()
        self.room = int(self.process.stdout.readline())
        self.one_at_a_time = threading.Lock()

    def dsv2_path(self) -> bytes:
        return self.path

    def __getattr__(self, name: str) -> Any:
        return partial(self.call, NAMES.index(name))

    def call(self, function: int, *arguments: Any) -> None:
        with self.one_at_a_time:
            self.call_alone(function, *arguments)

    def call_alone(self, function: int, *arguments: Any) -> None:
        lent = Lent(self.room)
        numbers = [lent.argument(each) for each in arguments]
        sent = lent.content()
        numbers += [0] * (ARGUMENTS - len(numbers))
        self.process.stdin.write(struct.pack(f"<{2 + ARGUMENTS}q", len(sent), function, *numbers) + sent)
        self.process.stdin.flush()
        answer = self.process.stdout.read(len(sent))
        assert len(answer) == len(sent), f"it ended with {self.process.wait()}"
        lent.take_back(sent, answer)

    def end(self) -> None:
        self.process.communicate()
        assert self.process.returncode == 0


class Lent:
    """What one call reaches, and where it is put in the `room` of the other process."""

    def __init__(self, room: int) -> None:
        self.end = room
        self.room = room
        self.held = in_memory()
        self.starts = [start for start, _, _ in self.held]
        self.places: dict[int, int] = {}  # number in `held` -> where it is there

    def argument(self, value: Any) -> int:
        if value is None or isinstance(value, int):
            return value or 0
        if isinstance(value, ctypes.c_int64):
            return value.value
        if isinstance(value, ctypes.c_void_p):
            return self.address(value.value or 0)
        return self.address(ctypes.addressof(getattr(value, "_obj", value)))  # byref's, or an array

    def address(self, here: int) -> int:
        """Where what lies at an address is put; what is no address stays as it is."""
        at = bisect.bisect_right(self.starts, here) - 1
        if at < 0 or here >= self.held[at][1]:
            return here
        start, end, _ = self.held[at]
        if at not in self.places:
            self.places[at] = self.end
            self.end += (end - start + 127) // 64 * 64  # with a gap, as kernels read whole vectors
        return self.places[at] + here - start

    def content(self) -> bytes:
        """Of all that is lent. What structures hold of addresses is lent, too."""
        content: dict[int, bytes] = {}
        while open_ones := self.places.keys() - content.keys():
            for at in open_ones:
                start, end, holds_addresses = self.held[at]
                content[at] = ctypes.string_at(start, end - start)
                if holds_addresses:
                    whole = (end - start) // 8 * 8
                    words = struct.unpack(f"<{whole // 8}q", content[at][:whole])
                    moved = struct.pack(f"<{whole // 8}q", *map(self.address, words))
                    content[at] = moved + content[at][whole:]
        out = bytearray(self.end - self.room)
        for at, place in self.places.items():
            out[place - self.room : place - self.room + len(content[at])] = content[at]
        return bytes(out)

    def take_back(self, sent: bytes, answer: bytes) -> None:
        """Only what has changed: another thread may meanwhile write beside it."""
        before, after = (numpy.frombuffer(each, numpy.uint8) for each in (sent, answer))
        for at, place in self.places.items():
            start, end, _ = self.held[at]
            part = slice(place - self.room, place - self.room + end - start)
            changed = before[part] != after[part]
            if changed.any():
                here = (ctypes.c_uint8 * (end - start)).from_address(start)
                numpy.frombuffer(here, numpy.uint8)[changed] = after[part][changed]


def in_memory() -> list[tuple[int, int, bool]]:
    """Begin and end of each tensor's memory and each structure of ctypes, and whether it holds addresses."""
    found = []
    for each in gc.get_objects():
        if issubclass(type(each), torch.Tensor):
            storage = each.untyped_storage()
            found.append((storage.data_ptr(), storage.data_ptr() + storage.nbytes(), False))
        elif issubclass(type(each), STRUCTURES):
            found.append((ctypes.addressof(each), ctypes.addressof(each) + ctypes.sizeof(each), True))
    out: list[tuple[int, int, bool]] = []
    for start, end, holds_addresses in sorted(found):
        if out and start < out[-1][1]:  # a part of what is there already
            before = out.pop()
            start, end, holds_addresses = before[0], max(end, before[1]), holds_addresses or before[2]
        if start < end:
            out.append((start, end, holds_addresses))
    return out
