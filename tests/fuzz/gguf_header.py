"""GGUF files taken apart into keys, tensors and weights, damaged, and put together again."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.fuzz.strange import Mutation, mutate_bytes, short
from tests.gguf_files import ARRAY, FORMS, TEXT, padded

ALIGNMENT = 32
START = struct.Struct("<4sIQQ")
F32, F16, Q2_K, Q3_K, Q6_K = 0, 1, 10, 11, 14
SCALE_AT = {Q2_K: 80, Q3_K: 108, Q6_K: 208}  # where in a block its scale stands; in others it comes first
BLOCK = {0: 4, 1: 2, 2: 18, 3: 20, 6: 22, 7: 24, 8: 34, 10: 84, 11: 110, 12: 144, 13: 176, 14: 210, 20: 18}
BLOCK |= {23: 136}
TWINS = [{0, 26}, {1, 25, 30}, {2, 20}, {11, 21}, {8}]  # types whose blocks are of one size
ABSURD = [0, 1, 7, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63, 2**64 - 1]
NUMBERS = [0, 1, 2, 3, 5, 16, 64, 127, 255, -1, -2, 2**15, 2**31 - 1, 2**31, 2**40, 2**63, 2**64 - 1]
REALS = [0.0, -0.0, 0.5, 1.0, 3.7, -1.0, 1e-30, 1e30, float("nan"), float("inf"), -float("inf")]
TEXTS = [b"", b"x", b"none", b"linear", b"deepseek2", b"\xff\xfe", b"a\0b", b"\xed\xa0\x80", b"1", b"\x1b[2J"]
TEXTS += [b"a" * 100_000, "é🙂".encode()]
NAMES = [b"", b"x", b"\xff", b"a\0b", b"n" * (2**16 + 1), b"token_embd.weight", b"blk.00.attn_norm.weight"]
NAMES += ["blk.٠.attn_norm.weight".encode(), b"blk.99999.attn_norm.weight", b"blk.1.attn_v_b.weight"]
NAMES += [b"blk.1.attn_kv_b.weight", b"output.weight", b"rope_freqs.weight", b"blk.0.ffn_gate.bias"]
NAMES += [b"blk.1.exp_probs_b.bias", b"blk.1.ffn_gate_up_exps.weight", b"blk.-1.attn_norm.weight", b"a\nb"]


@dataclass
class Key:
    """One of the metadata; `value` as it lies."""

    name: bytes
    kind: int
    value: bytes


@dataclass
class Info:
    """What stands of a tensor in the header; `dims` as they lie, the fastest first."""

    name: bytes
    dims: list[int]
    type: int
    offset: int


@dataclass
class Parsed:
    """A file; what `body` holds begins at a multiple of ALIGNMENT."""

    keys: list[Key]
    tensors: list[Info]
    body: bytes
    first: bytes = b"GGUF"
    version: int = 3
    counts: tuple[int, int] | None = None  # where they are to be others than those of the lists

    def key_bytes(self) -> bytes:
        return b"".join(texts(key.name) + struct.pack("<I", key.kind) + key.value for key in self.keys)

    def info_bytes(self) -> bytes:
        return b"".join(
            texts(each.name)
            + struct.pack(f"<I{len(each.dims)}QIQ", len(each.dims), *each.dims, each.type, each.offset)
            for each in self.tensors
        )

    def header(self) -> bytes:
        counts = self.counts or (len(self.tensors), len(self.keys))
        return START.pack(self.first, self.version, *counts) + self.key_bytes() + self.info_bytes()

    def data(self) -> bytes:
        return padded(self.header(), ALIGNMENT) + self.body


def texts(*values: bytes) -> bytes:
    return b"".join(struct.pack("<Q", len(value)) + value for value in values)


def parse(data: bytes) -> Parsed:
    """A file that is right."""
    first, version, tensors, keys = START.unpack_from(data)
    at, found, infos = START.size, [], []

    def name() -> bytes:
        nonlocal at
        (length,) = struct.unpack_from("<Q", data, at)
        at += 8 + length
        return data[at - length : at]

    for _ in range(keys):
        called = name()
        (kind,) = struct.unpack_from("<I", data, at)
        end = behind(data, at + 4, kind)
        found.append(Key(called, kind, data[at + 4 : end]))
        at = end
    for _ in range(tensors):
        called = name()
        (dims,) = struct.unpack_from("<I", data, at)
        *sizes, type, offset = struct.unpack_from(f"<{dims}QIQ", data, at + 4)
        infos.append(Info(called, sizes, type, offset))
        at += 4 + 8 * dims + 12
    return Parsed(found, infos, data[-(-at // ALIGNMENT) * ALIGNMENT :], first, version)


def behind(data: bytes, at: int, kind: int) -> int:
    """Where a value ends."""
    if kind == TEXT:
        return at + 8 + int(struct.unpack_from("<Q", data, at)[0])
    if kind != ARRAY:
        return at + struct.calcsize(f"<{FORMS[kind]}")
    inner, count = struct.unpack_from("<IQ", data, at)
    at += 12
    for _ in range(count):
        at = behind(data, at, inner)
    return at


def split(whole: Parsed, folder: Path, name: str) -> None:
    """The file as two, as llama.cpp splits it: all keys in the first."""
    half = len(whole.tensors) // 2
    ordered = sorted(whole.tensors, key=lambda each: each.offset)
    for number, part in enumerate((ordered[:half], ordered[half:])):
        begin = part[0].offset
        end = ordered[half].offset if number == 0 else len(whole.body)
        tensors = [replace(each, offset=each.offset - begin) for each in part]
        keys = [
            Key(b"split.no", 2, struct.pack("<H", number)),
            Key(b"split.count", 2, struct.pack("<H", 2)),
            Key(b"split.tensors.count", 5, struct.pack("<i", len(ordered))),
        ]
        parsed = Parsed([*whole.keys, *keys] if number == 0 else keys, tensors, whole.body[begin:end])
        (folder / f"{name}-{number + 1:05}-of-00002.gguf").write_bytes(parsed.data())


def mutate_gguf(path: Path, numbers: random.Random) -> Mutation:
    """One thing in the file."""
    data = path.read_bytes()
    parsed = parse(data)
    way = numbers.choice(
        ["start"] * 2 + ["key"] * 8 + ["tensor"] * 8 + ["bytes"] * 3 + ["body"] * 3 + ["any"]
    )
    if way == "any":
        data, mutation = mutate_bytes(data, numbers, True)
    elif way == "bytes":
        data, mutation = mutate_header_bytes(parsed, numbers)
    elif way == "body":
        data, mutation = mutate_weights(parsed, numbers)
    else:
        change = {"start": mutate_start, "key": mutate_key, "tensor": mutate_tensor}[way]
        mutation = change(parsed, numbers)
        data = parsed.data()
    path.write_bytes(data)
    return Mutation(f"{path.name}, {way}: {mutation.what}", mutation.changes)


def mutate_start(parsed: Parsed, numbers: random.Random) -> Mutation:
    """The magic, the version, and the counts."""
    tensors, keys = len(parsed.tensors), len(parsed.keys)
    one = numbers.choice([*ABSURD, 65, 66, 67])
    ways: dict[str, tuple[str, Any]] = {
        "another magic": ("first", numbers.choice([b"FUGG", b"ggml", b"GGUf", b"\0\0\0\0", b"PK\3\4"])),
        "another version": ("version", numbers.choice([0, 1, 2, 4, 5, 2**24 * 3, 2**16 * 3, 2**32 - 1])),
        "another count of tensors": ("counts", (one, keys)),
        "another count of keys": ("counts", (tensors, one)),
        "a tensor more than there is": ("counts", (tensors + 1, keys)),
        "a tensor fewer than there are": ("counts", (tensors - 1, keys)),
        "a key more than there is": ("counts", (tensors, keys + 1)),
        "a key fewer than there are": ("counts", (tensors, keys - 1)),
        "counts exchanged": ("counts", (keys, tensors)),
        "absurd counts": ("counts", (numbers.choice(ABSURD), numbers.choice(ABSURD))),
    }
    what = numbers.choice(sorted(ways))
    field, value = ways[what]
    setattr(parsed, field, value)
    return Mutation(f"{what}: {value!r}")


def number_value(numbers: random.Random) -> tuple[int, bytes, str]:
    """A number of some type."""
    kind = numbers.choice(sorted(FORMS))
    whole = numbers.choice(NUMBERS)
    if kind in (6, 12):
        value: float = numbers.choice([*REALS, float(whole)])
        return kind, struct.pack(f"<{FORMS[kind]}", value), f"{value} of type {kind}"
    size = struct.calcsize(FORMS[kind])
    raw = (whole % 2 ** (8 * size)).to_bytes(size, "little")
    return kind, raw, f"{whole} of type {kind}"


def strange_value(numbers: random.Random) -> tuple[int, bytes, str]:
    """The type of a value, the value, and what it is."""
    absurd, kind, deep = (
        numbers.choice(ABSURD),
        numbers.choice(sorted(FORMS)),
        numbers.choice([2, 3, 4, 9999]),
    )
    some = numbers.choice(TEXTS)
    unknown = numbers.choice([13, 14, 255, 2**31, 2**32 - 1])
    ways: list[Callable[[], tuple[int, bytes, str]]] = [
        lambda: (TEXT, texts(some), f"the text {short(repr(some))}"),
        lambda: (TEXT, struct.pack("<Q", absurd) + b"abc", f"a text of {absurd} bytes"),
        lambda: (ARRAY, struct.pack("<IQ", kind, absurd) + bytes(64), f"an array of {absurd} of type {kind}"),
        lambda: (ARRAY, struct.pack("<IQ", TEXT, absurd) + texts(b"a"), f"an array of {absurd} texts"),
        lambda: (ARRAY, struct.pack("<IQ", TEXT, 2) + texts(b"a", some), f"texts {short(repr(some))}"),
        lambda: (ARRAY, struct.pack("<IQ", ARRAY, absurd), f"an array of {absurd} arrays"),
        lambda: (
            ARRAY,
            struct.pack("<IQ", ARRAY, 1) * deep + struct.pack("<IQ", 4, 0),
            f"{deep} arrays deep",
        ),
        lambda: (ARRAY, struct.pack("<IQ", 4, 0), "an empty array"),
        lambda: (ARRAY, struct.pack("<IQ", unknown, 2) + bytes(64), f"an array of type {unknown}"),
        lambda: (ARRAY, struct.pack("<IQ", 7, 3 * 2**20) + bytes(3 * 2**20), "an array of three millions"),
        lambda: (ARRAY, struct.pack("<IQ2I", 4, 2, 3, 5), "an array of unlike numbers"),
        lambda: (unknown, bytes(8), f"a value of type {unknown}"),
        lambda: (7, b"\2", "a bool of 2"),
    ]
    return number_value(numbers) if numbers.random() < 0.5 else numbers.choice(ways)()


def sort_of(kind: int) -> str:
    """Types that may stand for one another."""
    return {7: "bool", TEXT: "text", ARRAY: "array"}.get(kind, "number")


def mutate_key(parsed: Parsed, numbers: random.Random) -> Mutation:
    """A name, a type or a value. Another value of a like type is another model; one that is missing has the
    default.
    """
    keys = parsed.keys
    key, other = numbers.sample(keys, 2)
    kind, value, shown = strange_value(numbers)
    like = sort_of(kind) == sort_of(key.kind)
    meant = not key.name.startswith(b"split.")

    def put(**fields: Any) -> None:
        keys[keys.index(key)] = replace(key, **fields)

    def exchange() -> None:
        kept = key.kind, key.value
        key.kind, key.value = other.kind, other.value
        other.kind, other.value = kept

    name = numbers.choice([*NAMES, other.name, key.name.upper(), key.name + b"x", key.name[:-1] + b"\xff"])
    count = struct.pack("<Q", numbers.choice(ABSURD))
    ways: dict[str, tuple[Callable[[], Any], bool]] = {
        f"is now {shown}": (lambda: put(kind=kind, value=value), like and meant),
        f"has type {kind}, its value stays": (lambda: put(kind=kind), like or key.kind == 5),
        f"named {short(repr(name))}": (lambda: put(name=name), name != other.name and meant),
        "gone": (lambda: keys.remove(key), meant),
        "there twice": (lambda: keys.append(key), False),
        f"there again, as {shown}": (lambda: keys.append(replace(key, kind=kind, value=value)), False),
        f"general.alignment {shown} beside it": (
            lambda: keys.append(Key(b"general.alignment", kind, value)),
            sort_of(kind) == "number",
        ),
        f"another beside it, {shown}": (lambda: keys.append(Key(b"deepseek2.surprise", kind, value)), False),
        f"exchanged with {other.name!r}": (exchange, sort_of(key.kind) == sort_of(other.kind) and meant),
        "the last": (lambda: keys.append(keys.pop(keys.index(key))), False),
        f"a length of {struct.unpack('<Q', count)[0]}": (lambda: put(value=count + key.value[8:]), False),
        f"a count of {struct.unpack('<Q', count)[0]}": (
            lambda: put(value=key.value[:4] + count + key.value[12:]),
            key.kind != ARRAY,
        ),
    }
    likely = sorted(ways)[-2 if key.kind in (TEXT, ARRAY) else 0]
    what = numbers.choice([*sorted(ways), *[each for each in ways if each.startswith("is now")] * 6, likely])
    change, changes = ways[what]
    change()
    return Mutation(f"{key.name.decode()} {what}", changes)


def mutate_tensor(parsed: Parsed, numbers: random.Random) -> Mutation:
    """A name, dimensions, a type or a place. What changes places with its like is another model."""
    tensors = parsed.tensors
    one, other = numbers.sample(tensors, 2)
    before, absurd = replace(one, dims=[*one.dims]), numbers.choice(ABSURD)
    twins = [each for each in tensors if (each.dims, each.type) == (one.dims, one.type) and each is not one]
    twin = numbers.choice(twins or [other])
    at, step = numbers.randrange(len(one.dims)), numbers.choice([1, 16, 32, 64, -32, 2**40, 2**63])
    near = [one.name + b"x", one.name.replace(b".weight", b""), one.name.replace(b"blk.", b"blk.0")]
    near += [one.name.replace(b"_k_b", b"_kv_b"), one.name.replace(b"_kv_b", b"_v_b")]
    name = numbers.choice([*NAMES, other.name, *near, *near])
    type = numbers.choice([*BLOCK, 4, 5, 9, 15, 24, 25, 26, 30, 34, 39, 99, 2**31, 2**32 - 1])

    def exchange(field: str) -> None:
        mine, its = getattr(one, field), getattr(twin, field)
        setattr(one, field, its)
        setattr(twin, field, mine)

    def shift(by: int, first: int) -> None:
        for each in tensors:
            each.offset = (each.offset + by) % 2**64 if each.offset >= first else each.offset

    def hole() -> None:
        begin = one.offset
        shift(ALIGNMENT, begin)
        parsed.body = parsed.body[:begin] + bytes(ALIGNMENT) + parsed.body[begin:]

    def behind_all() -> None:
        end = min([each.offset for each in tensors if each.offset > one.offset], default=len(parsed.body))
        tensors.append(replace(one, name=name, offset=len(parsed.body)))
        parsed.body += bytes(end - one.offset)

    sizes = one.dims
    ways: dict[str, Callable[[], Any]] = {
        f"named {short(repr(name))}": lambda: setattr(one, "name", name),
        f"dimension {at} is {absurd}": lambda: sizes.__setitem__(at, absurd),
        f"dimension {at} doubled": lambda: sizes.__setitem__(at, sizes[at] * 2),
        f"dimension {at} halved": lambda: sizes.__setitem__(at, sizes[at] // 2),
        "dimensions turned": sizes.reverse,
        "no dimensions": sizes.clear,
        "a dimension of 1 more": lambda: sizes.append(1),
        "as one dimension": lambda: sizes.__setitem__(slice(0, 2), [sizes[0] * sizes[-1]]),
        f"{absurd % 70_000} dimensions": lambda: sizes.extend([1] * (absurd % 70_000)),
        "dimensions that overflow": lambda: sizes.__setitem__(slice(None), [2**32, 2**32, 32, 1]),
        f"of type {type}": lambda: setattr(one, "type", type),
        f"lies at +{step}": lambda: setattr(one, "offset", (one.offset + step) % 2**64),
        f"lies at {absurd}": lambda: setattr(one, "offset", absurd),
        f"lies where {other.name!r} lies": lambda: setattr(one, "offset", other.offset),
        f"exchanges its place with {twin.name!r}": lambda: exchange("offset"),
        f"exchanges its name with {twin.name!r}": lambda: exchange("name"),
        f"exchanges its type with {twin.name!r}": lambda: exchange("type"),
        f"all lie at +{step}": lambda: shift(step, 0),
        "a hole before it": hole,
        "gone": lambda: tensors.remove(one),
        "there twice": lambda: tensors.append(one),
        f"one like it behind all, named {short(repr(name))}": behind_all,
        "all in another order": lambda: numbers.shuffle(tensors),
    }
    copies = [each for each in ways if each.startswith(("one like", "a hole", "exchanges"))]
    what = numbers.choice([*sorted(ways), *copies])
    ways[what]()
    retyped = before.type != one.type and any({before.type, one.type} <= like for like in TWINS)
    changes = retyped or (bool(twins) and what.startswith("exchanges"))
    return Mutation(f"{before.name.decode()} {what}", changes)


def mutate_header_bytes(parsed: Parsed, numbers: random.Random) -> tuple[bytes, Mutation]:
    """Bits and bytes anywhere in the header: among the keys they may be other values."""
    data, end = parsed.data(), len(parsed.header())
    keys = range(START.size, START.size + len(parsed.key_bytes()))
    area = numbers.choice([range(START.size), keys, range(keys.stop, end), range(keys.stop, end)])
    at = numbers.choice(area)
    bit = bytes([data[at] ^ 1 << numbers.randrange(8)])
    ways = {
        "a bit flipped": data[:at] + bit + data[at + 1 :],
        "another byte": data[:at] + numbers.randbytes(1) + data[at + 1 :],
        "a byte of 255": data[:at] + b"\xff" + data[at + 1 :],
        "eight bytes of 255": data[:at] + b"\xff" * 8 + data[at + 8 :],
        "random bytes": data[:at] + numbers.randbytes(8) + data[at + 8 :],
        "a byte put in": data[:at] + numbers.randbytes(1) + data[at:],
        "a byte taken away": data[:at] + data[at + 1 :],
        "cut off": data[:at],
    }
    what = numbers.choice(sorted(ways))
    return ways[what], Mutation(f"{what} at {at}", area == keys and what != "cut off")


def mutate_weights(parsed: Parsed, numbers: random.Random) -> tuple[bytes, Mutation]:
    """What lies behind the header; a scale that is no number must be seen."""
    one = numbers.choice(parsed.tensors)
    body, block = parsed.body, BLOCK[one.type]
    end = min([each.offset for each in parsed.tensors if each.offset > one.offset], default=len(body))
    at = one.offset + numbers.randrange(max(1, (end - one.offset) // block)) * block
    scale = at + SCALE_AT.get(one.type, 0)
    form = "<f" if one.type == F32 else "<e"
    bad = struct.pack(form, numbers.choice([float("nan"), float("inf"), -float("inf")]))
    whole = padded(parsed.header(), ALIGNMENT)
    where = numbers.randrange(len(body))
    bit = bytes([body[where] ^ 1 << numbers.randrange(8)])
    plain = one.type in (F32, F16) and len([size for size in one.dims if size > 1]) > 1
    ways: dict[str, tuple[bytes, bool]] = {
        f"{bad.hex()} as a scale of {one.name!r}": (body[:scale] + bad + body[scale + len(bad) :], plain),
        "a bit flipped": (body[:where] + bit + body[where + 1 :], True),
        "all zeros": (bytes(len(body)), True),
        "nothing but NaN": (b"\xff" * len(body), False),
        "random": (numbers.randbytes(len(body)), True),
        "a byte put in": (body[:where] + b"\1" + body[where:], False),
        "a byte taken away": (body[:where] + body[where + 1 :], False),
        "32 bytes taken away": (body[:where] + body[where + 32 :], False),
        "cut off": (body[:where], False),
        "longer": (body + numbers.randbytes(numbers.choice([1, 8, 32, 100_000])), False),
        "missing": (b"", False),
    }
    what = numbers.choice([*sorted(ways), *[each for each in sorted(ways) if "scale" in each] * 3])
    changed, changes = ways[what]
    return whole + changed, Mutation(f"{what} at {where}", changes)
