"""Lists and ranges of numbers as they are typed, and measured numbers as they are shown."""

from __future__ import annotations

import re
from typing import Any

from dsv2cli.errors import UsageError

MOST = 10_000  # numbers of a range
RANGE_HELP = "a number, a list (64,512), or a range (512-2048+512, 64-4096*2)"


def numbers(option: str, text: str, least: int) -> list[int]:
    """`64,512`, `512-2048+512` or `64-4096*2`. Raises UsageError for anything else, or below `least`."""
    found: list[int] = []
    for entry in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+)(?:([+*])(\d+))?)?\s*", entry)
        value, last, times, by = 0, 0, False, 0
        if match is not None and len(entry) < 60:
            value, last = int(match[1]), int(match[2] or match[1])
            times, by = match[3] == "*", int(match[4] or 1)
        endless = by < 1 or (times and (by < 2 or value == 0))
        if match is None or len(entry) >= 60 or value < least or (match[4] and endless):
            why = f"it is {RANGE_HELP}, from {least} on"
            raise UsageError(f"{option} {text} can not be used", why=why, fix=f"{option} 64,512")
        if value > last:
            raise UsageError(f"{option} {text} is an empty range", why=f"{value} is above {last}")
        while value <= last:
            if len(found) == MOST:
                raise UsageError(f"{option} {text[:80]} is too long", why=f"{MOST:,} numbers are the most")
            found.append(value)
            value = value * by if times else value + by
    return list(dict.fromkeys(found))


def digits(value: float) -> str:
    """Three digits that count."""
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3}f}"


def ranged(rate: dict[str, Any]) -> str:
    """Median and range, to the same place."""
    places = len(digits(rate["median"]).partition(".")[2])
    return f"{rate['median']:.{places}f} ({rate['min']:.{places}f}-{rate['max']:.{places}f})"
