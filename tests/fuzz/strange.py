"""What can be wrong with a file: its bytes, its JSON, and what lies in its place."""

from __future__ import annotations

import json
import math
import os
import random
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Mutation:
    """What was done to a case, and whether it `changes` the meaning, so that another result may follow."""

    what: str
    changes: bool = False


DEPTH = 100_000
VALUES = [  # as JSON texts: Python could not write some of them
    *("null", "true", "false", "0", "-1", "1", "2", "3", "7", "100", "0.5", "1.0", "3.7", "-0.0", "-0.5"),
    *("1e-5", "1e308", "5e-324", "1e400", "-1e400", "NaN", "Infinity", "-Infinity"),
    *("2147483648", "9223372036854775808", "-9223372036854775809", "18446744073709551616"),
    *("9" * 300, "-" + "9" * 300, "9" * 5000, "0." + "3" * 300),
    *('""', '"0.5"', '"1"', '"true"', '"\\ud800"', '"a\\u0000b"', '"../x"', '"/etc/passwd"', '"\\u001b[2J"'),
    *('"' + "a" * 100_000 + '"', '"é\\ud83d\\ude42"', '"float32"', '"torch.float64"', '"x\\ny"'),
    *("[]", "{}", "[1]", "[[1, 2]]", "[null]", '["a", "b"]', '[0.5, "x"]', '{"a": 1}', '{"": null}'),
    *("[" * DEPTH + "]" * DEPTH, '{"a":' * DEPTH + "1" + "}" * DEPTH),
    *("nul", "01", "1_000", "'a'", "undefined", ""),
]
HOLE = "@@here@@"  # stands in a tree where a JSON text is to be put


def short(text: str, most: int = 60) -> str:
    """The beginning of a text, for a description."""
    shown = ascii(text)[1:-1]
    return shown if len(shown) <= most else f"{shown[:most]}... ({len(text)} characters)"


def kind(value: Any) -> str:
    """The JSON type of a value, with whole numbers apart, and those that are no numbers."""
    if isinstance(value, float) and not math.isfinite(value):
        return "not finite"
    kinds: list[tuple[type, str]] = [(bool, "bool"), (int, "int"), (float, "float"), (str, "text")]
    kinds += [(list, "list"), (dict, "object")]
    return next((name for each, name in kinds if isinstance(value, each)), "null")


def alike(old: Any, text: str) -> bool:
    """Whether a JSON text is a value of the same type as `old`: another one, but no wrong one."""
    try:
        new = json.loads(text)
    except (ValueError, RecursionError):
        return False
    same = kind(new) == kind(old) or {kind(new), kind(old)} == {"float", "int"}
    return same and not (isinstance(new, int | float) and abs(new) > 1e30)


def places(tree: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside a tree of JSON."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    found = []
    for key, value in items:
        found += [(*before, key), *places(value, (*before, key))]
    return found


def at(tree: Any, path: tuple[Any, ...]) -> Any:
    """What lies at a path."""
    for key in path:
        tree = tree[key]
    return tree


def mutate_tree(
    tree: Any, numbers: random.Random, may_differ: Callable[[tuple[Any, ...], Any, str], bool]
) -> tuple[bytes, Mutation]:
    """JSON with one value replaced, taken away, named otherwise, doubled or added; `tree` is changed.

    `may_differ` says of a path, its value and the new value's text (nothing for one taken away) whether
    the result may change.
    """
    path, text = numbers.choice(places(tree)), numbers.choice(VALUES)
    inside, key, old = at(tree, path[:-1]), path[-1], at(tree, path)
    way = numbers.choice(["replace"] * 5 + ["remove", "rename", "double", "add", "root", "exchange"])
    where, differs = "/".join(map(str, path)), False
    if way == "replace":
        inside[key], differs = HOLE, may_differ(path, old, text)
    elif way == "remove":
        del inside[key]
        differs = may_differ(path, old, "")
    elif way in ("rename", "double", "add") and isinstance(inside, dict):
        inside[{"rename": f"{key}x", "double": HOLE + str(key), "add": "surprise"}[way]] = (
            inside.pop(key) if way == "rename" else HOLE
        )
        differs = may_differ(path, old, "" if way == "rename" else text) and way != "add"
    elif way == "exchange":
        other = numbers.choice(places(tree))
        if path == other[: len(path)] or other == path[: len(other)]:
            return json.dumps(tree).encode(), Mutation("nothing")
        text = json.dumps(at(tree, other))
        differs = may_differ(path, old, text) and may_differ(other, at(tree, other), json.dumps(old))
        at(tree, other[:-1])[other[-1]] = old
        inside[key] = HOLE
        where += " and " + "/".join(map(str, other))
    else:
        tree, way, where = HOLE, "replace", "the root"
    written = json.dumps(tree).replace(f'"{HOLE}"', text, 1).replace(HOLE, "")
    return written.encode("utf-8", "surrogatepass"), Mutation(f"{way} {where}: {short(text)}", differs)


def mutate_bytes(data: bytes, numbers: random.Random, changes: bool) -> tuple[bytes, Mutation]:
    """A text or a body with bytes flipped, cut off, put in, or in another encoding."""
    where = numbers.randrange(len(data) + 1)
    text = data.decode("utf-8", "replace")
    ways: list[tuple[str, Callable[[], bytes], bool]] = [
        ("cut off", lambda: data[:where], False),
        ("a byte removed", lambda: data[:where] + data[where + 1 :], changes),
        ("random bytes put in", lambda: data[:where] + numbers.randbytes(3) + data[where:], changes),
        ("a begin of UTF-8", lambda: b"\xef\xbb\xbf" + data, False),
        ("UTF-16", lambda: text.encode("utf-16"), False),
        ("UTF-32", lambda: text.encode("utf-32"), False),
        ("Latin-1", lambda: text.encode("latin-1", "replace"), changes),
        ("twice", lambda: data + data, False),
        ("zeros after it", lambda: data + b"\0" * 9, False),
        ("nothing but zeros", lambda: bytes(len(data)), False),
        ("nothing but spaces", lambda: b" " * 1000, False),
        ("CRLF", lambda: data.replace(b"\n", b"\r\n"), changes),
        ("deep nesting", lambda: b"[" * DEPTH, False),
    ]
    if numbers.random() < 0.5:
        changed = bytearray(data)
        spots = [numbers.randrange(len(data)) for _ in range(numbers.choice([1, 1, 1, 2, 8]))]
        for spot in spots:
            changed[spot] ^= 1 << numbers.randrange(8)
        return bytes(changed), Mutation(f"bits flipped at {spots}", changes)
    name, make, differs = numbers.choice(ways)
    return make(), Mutation(f"{name}, at {where}", differs)


def mutate_place(path: Path, numbers: random.Random) -> Mutation:
    """Something else where a file was."""
    data, elsewhere = path.read_bytes(), path.parent.parent / f"elsewhere-{path.name}"
    path.unlink()
    way = numbers.choice(
        "fifo,folder,dangling link,looping link,link elsewhere,link out of here,empty,/dev/zero,/dev/null,"
        "missing,socket,link to a fifo".split(",")
    )
    if way == "fifo":
        os.mkfifo(path)
    elif way == "folder":
        path.mkdir()
    elif way == "dangling link":
        path.symlink_to("nothing-there")
    elif way == "looping link":
        path.symlink_to(path.name)
    elif way in ("link elsewhere", "link out of here"):
        elsewhere.write_bytes(data)
        path.symlink_to(elsewhere if way == "link elsewhere" else f"../{elsewhere.name}")
    elif way == "empty":
        path.write_bytes(b"")
    elif way.startswith("/dev"):
        path.symlink_to(way)
    elif way == "socket":
        here = os.getcwd()
        os.chdir(path.parent)  # the path of a socket must be short
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(path.name)
        os.chdir(here)
    elif way == "link to a fifo":
        os.mkfifo(elsewhere)
        path.symlink_to(elsewhere)
    return Mutation(f"{path.name}: {way}", way == "missing")
