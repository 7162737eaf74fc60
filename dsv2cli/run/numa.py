"""Where a machine has several memories, each near some of its processors: which of these a rank of a team
uses. Imports no torch.

Linux gives a process memory near the processor that first writes to it, so that a rank whose threads are
bound before it loads its part has its weights beside it. Pages of a mapped file lie near whoever read them
first: such a rank reads its part of the file instead, if memory has room for it.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

NODES = Path("/sys/devices/system/node")


def processors_by_node(folder: Path = NODES) -> list[set[int]]:
    """The processors of each node that has some, by the numbers of the nodes; none where Linux tells none."""
    found = {}
    for file in folder.glob("node*/cpulist"):
        number = file.parent.name.removeprefix("node")
        try:
            processors = parse_list(file.read_text())
        except (OSError, ValueError):
            return []
        if number.isdecimal() and processors:
            found[int(number)] = processors
    return [found[number] for number in sorted(found)]


def parse_list(text: str) -> set[int]:
    """Numbers as Linux writes them: 0-3,8,10-11. Raises ValueError."""
    out: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        if not (match := re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part)):
            raise ValueError(f"{part!r} is no list of processors")
        out |= {*range(int(match[1]), int(match[2] or match[1]) + 1)}
    return out


def share_of_processors(rank: int, size: int, nodes: list[set[int]], allowed: set[int]) -> set[int] | None:
    """Those of a rank among `size` on this machine: one node's, or several' where nodes are more than ranks.

    None where there is nothing to choose, or somebody has chosen: not all processors are `allowed`.
    """
    if size < 2 or len(nodes) < 2 or allowed != set.union(*nodes):
        return None
    first, end = rank * len(nodes) // size, (rank + 1) * len(nodes) // size
    return set.union(*nodes[first : max(end, first + 1)])


def bind(rank: int, size: int, folder: Path = NODES) -> set[int] | None:
    """Let all threads of this process, and those to come, run on a rank's share alone; gives the share.

    None where there is none, or the system does not allow it.
    """
    if not hasattr(os, "sched_setaffinity"):
        return None
    share = share_of_processors(rank, size, processors_by_node(folder), os.sched_getaffinity(0))
    if share is None:
        return None
    try:
        for thread in Path("/proc/self/task").iterdir():
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.sched_setaffinity(int(thread.name), share)
    except OSError:
        return None
    return share
