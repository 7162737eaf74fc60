"""GGUF files as tests need them, written from the format's description alone."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

FORMS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, ARRAY = 8, 9


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def kind_of(value: Any) -> int:
    """The type that a plain value is stored in."""
    if isinstance(value, list):
        return ARRAY
    return {bool: 7, int: 5 if isinstance(value, int) and value < 0 else 4, float: 6, str: TEXT}[type(value)]


def value_of(kind: int, value: Any) -> bytes:
    if kind == TEXT:
        return text(value)
    if kind != ARRAY:
        return struct.pack(f"<{FORMS[kind]}", value)
    inner = kind_of(value[0]) if value else 4
    inner = 5 if inner == 4 else inner  # as token types are written
    return struct.pack("<IQ", inner, len(value)) + b"".join(value_of(inner, each) for each in value)


def key_of(name: str, value: Any) -> bytes:
    """A key: `value` is plain, or its type's number and the value."""
    kind, plain = value if isinstance(value, tuple) else (kind_of(value), value)
    return text(name) + struct.pack("<I", kind) + value_of(kind, plain)


def tensor_of(name: str, kind: int, shape: tuple[int, ...], offset: int) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
    return text(name) + dims + struct.pack("<IQ", kind, offset)


def header_of(keys: list[bytes], tensors: list[bytes], version: int = 3) -> bytes:
    start = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(keys))
    return start + b"".join(keys) + b"".join(tensors)


def padded(data: bytes, alignment: int) -> bytes:
    return data + bytes(-len(data) % alignment)


def write_gguf(
    path: Path,
    keys: dict[str, Any],
    tensors: dict[str, tuple[int, tuple[int, ...], bytes]],
    alignment: int = 32,
    version: int = 3,
) -> Path:
    """A file with these keys (key_of) and tensors: type's number, shape as in torch, bytes."""
    if alignment != 32:
        keys = keys | {"general.alignment": alignment}
    infos, weights = [], b""
    for name, (kind, shape, data) in tensors.items():
        infos.append(tensor_of(name, kind, shape, len(weights)))
        weights += padded(data, alignment)
    header = header_of([key_of(name, value) for name, value in keys.items()], infos, version)
    path.write_bytes(padded(header, alignment) + weights)
    return path
