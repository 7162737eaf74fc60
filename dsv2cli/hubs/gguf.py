"""The header of a GGUF file: its keys, and where its tensors lie. Imports no torch.

All of it comes from strangers. It is read in pieces, at most as far as LARGEST; every count and length is
held against the bytes that are left before anything is made of it.
"""

from __future__ import annotations

import contextlib
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from dsv2cli.errors import Dsv2Error
from dsv2cli.outside import AGAIN, reason, require_file

MAGIC = b"GGUF"
FILE_TYPES = {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K"}
FILE_TYPES |= {11: "Q3_K_S", 12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S"}
FILE_TYPES |= {17: "Q5_K_M", 18: "Q6_K", 25: "IQ4_NL", 30: "IQ4_XS", 32: "BF16"}  # general.file_type
START = struct.Struct("<4sIQQ")  # magic, version, tensors, keys
LENGTH = struct.Struct("<Q")
KIND = struct.Struct("<I")
SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, ARRAY = 8, 9

LARGEST = 64 * 2**20  # bytes of a header; those of this family have about 5 MB
FIRST_KEYS = 2**18  # bytes in which general.architecture is looked for
LEAST_READ, MOST_READ = 2**16, 2**22  # bytes that are read at once, beyond what is asked for
KEYS, TENSORS, PARTS = 2**16, 2**17, 1000  # the most that are read
VALUES = 2**21  # in all arrays of a file together
DEEPEST = 4  # arrays within one another
LONGEST_NAME = 2**16
LARGEST_ALIGNMENT = 2**16
MOST = 2**62  # weights of a tensor
LEAST_KEY, LEAST_TENSOR = 14, 33  # bytes that each takes in a header, with a name of one letter

TYPES: dict[int, tuple[str, int, int]] = {  # number: name, weights of a block, bytes of a block
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 36),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
    42: ("Q2_0", 64, 18),
}


@dataclass(frozen=True)
class GgufTensor:
    """A tensor as it lies in a file."""

    file: Path
    name: str
    shape: tuple[int, ...]  # the last one lies together, as in torch
    type: int  # a key of TYPES
    offset: int  # in the file
    length: int  # in bytes


@dataclass(frozen=True)
class Gguf:
    """What the header says, of all parts where a file was split."""

    path: Path
    keys: dict[str, Any]
    tensors: dict[str, GgufTensor]


class Header:
    """The bytes that a file begins with, read as far as they are asked for.

    All methods raise ValueError for what can not be, OSError where reading fails.
    """

    def __init__(self, file: BinaryIO, size: int, most: int = LARGEST, lists: bool = True) -> None:
        """Without `lists` those of texts are passed over, and empty."""
        self.file, self.size, self.most, self.lists = file, size, most, lists
        self.data, self.at, self.values = bytearray(), 0, 0

    def have(self, end: int) -> int:
        """Read at least so far; how far it is read now."""
        if end > self.size:
            raise ValueError("it ends within its header")
        if end > self.most:
            raise ValueError(f"its header has more than {self.most:,} bytes")
        while len(self.data) < end:
            ahead = min(max(len(self.data), LEAST_READ), MOST_READ)
            piece = self.file.read(max(ahead, end - len(self.data)))
            if not piece:
                raise ValueError("it ends within its header")
            self.data += piece
        return len(self.data)

    def take(self, form: struct.Struct) -> tuple[Any, ...]:
        """The next numbers."""
        at, self.at = self.at, self.at + form.size
        self.have(self.at)
        return form.unpack_from(self.data, at)

    def texts(self, count: int, keep: bool = True) -> list[str]:
        """The next texts, each with its length before it."""
        found, data, at, here = [], self.data, self.at, len(self.data)
        for _ in range(count):
            if at + 8 > here:
                here = self.have(at + 8)
            end = at + 8 + LENGTH.unpack_from(data, at)[0]
            if end > here:
                here = self.have(end)
            try:
                if keep:
                    found.append(data[at + 8 : end].decode())
            except UnicodeDecodeError:
                raise ValueError(f"the text at byte {at + 8:,} is not UTF-8") from None
            at = end
        self.at = at
        return found

    def name(self) -> str:
        """Of a key or a tensor."""
        at = self.at
        (length,) = self.take(LENGTH)
        if not 0 < length <= LONGEST_NAME:
            raise ValueError(f"a name has {length:,} bytes")
        self.at = at
        return self.texts(1)[0]

    def value(self, kind: int, deep: int = 0) -> Any:
        """The next value of a key."""
        if kind in NUMBERS:
            return self.take(struct.Struct(f"<{NUMBERS[kind]}"))[0]
        if kind == TEXT:
            return self.texts(1)[0]
        if kind == ARRAY and deep < DEEPEST:
            return self.array(deep)
        raise ValueError("its arrays are nested too deeply" if kind == ARRAY else f"no value has type {kind}")

    def array(self, deep: int) -> list[Any]:
        """The next array, of which a number takes at least a byte, a text 8 and an array 12."""
        (kind,), (count,) = self.take(KIND), self.take(LENGTH)
        self.values += 16 * count if kind == ARRAY else count  # an array takes longer than a number
        least = {TEXT: 8, ARRAY: 12}.get(kind, 1)
        if count * least > self.size - self.at:
            raise ValueError(f"an array of {count:,} values is longer than the file")
        if self.values > VALUES:
            raise ValueError(f"its arrays hold more than {VALUES:,} values")
        if kind in NUMBERS:
            return list(self.take(struct.Struct(f"<{count}{NUMBERS[kind]}")))
        if kind == TEXT:
            return self.texts(count, self.lists)
        if kind != ARRAY:
            raise ValueError(f"no value has type {kind}")
        return [self.value(kind, deep + 1) for _ in range(count)]

    def counts(self) -> tuple[int, int]:
        """How many tensors and keys there are, from the first bytes."""
        if self.size < START.size:
            raise ValueError(f"it has {self.size} bytes")
        magic, version, tensors, keys = self.take(START)
        if magic != MAGIC:
            raise ValueError("it does not begin with GGUF")
        if version not in (2, 3):
            big = version & 0xFFFF == 0
            raise ValueError("it is big-endian" if big else f"its version is {version}, and 2 and 3 are read")
        if keys * LEAST_KEY + tensors * LEAST_TENSOR > self.size - self.at:
            raise ValueError(f"{tensors:,} tensors and {keys:,} keys are more than fit into the file")
        if keys > KEYS or tensors > TENSORS:
            raise ValueError(f"{tensors:,} tensors and {keys:,} keys are too many")
        return tensors, keys

    def pairs(self, count: int) -> Iterator[tuple[str, Any]]:
        """The next keys and their values."""
        for _ in range(count):
            name = self.name()
            yield name, self.value(self.take(KIND)[0])

    def about(self) -> tuple[str, tuple[int, ...], int, int]:
        """The next tensor: name, shape, type, and where it begins among the weights."""
        name = self.name()
        (dims,) = self.take(KIND)
        if not 1 <= dims <= 4:
            raise ValueError(f"{name[:80]} has {dims:,} dimensions, and may have 1 to 4")
        shape = self.take(struct.Struct(f"<{dims}Q"))[::-1]
        type, offset = self.take(struct.Struct("<IQ"))
        return name, shape, type, offset


def read_gguf(path: Path, lists: bool = True) -> Gguf:
    """The header of a GGUF file, or of all parts of one that was split; `lists` of texts are the vocabulary.

    Raises Dsv2Error for what is none, is damaged, or lacks a part.
    """
    files = parts_of(path)
    parts = [read_part(file, lists) for file in files]
    try:
        return Gguf(path, *joined(files, parts))
    except ValueError as error:
        raise unreadable(path, error) from None


def parts_of(path: Path) -> list[Path]:
    """A GGUF file, or all parts of it by its name. Raises Dsv2Error naming one that is missing."""
    split = SPLIT.fullmatch(path.name)
    if split is None:
        return [path]
    count = int(split[3])
    if not 1 <= int(split[2]) <= count <= PARTS:
        raise unreadable(path, ValueError(f"its name says part {int(split[2])} of {count}"))
    parts = [path.with_name(f"{split[1]}-{part:05}-of-{split[3]}.gguf") for part in range(1, count + 1)]
    for part in parts:
        if not os.path.exists(part):  # which is False for a name that no file can have
            raise Dsv2Error(f"{part} is missing", why=f"the model was split into {count} files", fix=AGAIN)
    return parts


def joined(files: list[Path], parts: list[Gguf]) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    """The keys and tensors of all parts. Raises ValueError where they are not parts of one another."""
    keys = dict(parts[0].keys)
    tensors: dict[str, GgufTensor] = {}
    for number, part in enumerate(parts):
        said = part.keys.get("split.no", 0), part.keys.get("split.count", 0)
        if said != (number, len(files)) and not (len(files) == 1 and said[1] in (0, 1)):
            where = f"part {said[0]} (from 0) of {said[1]}"
            raise ValueError(f"{files[number].name} says that it is {where}, which its name does not")
        for name, value in part.keys.items():
            if not name.startswith("split.") and keys.setdefault(name, value) != value:
                raise ValueError(f"its parts differ in the key {name[:80]}")
        if twice := tensors.keys() & part.tensors.keys():
            raise ValueError(f"two of its parts hold the tensor {min(twice)[:80]}")
        tensors |= part.tensors
    if (count := keys.get("split.tensors.count", len(tensors))) != len(tensors):
        raise ValueError(f"its parts hold {len(tensors):,} tensors, and should hold {str(count)[:40]}")
    return keys, tensors


def read_part(path: Path, lists: bool) -> Gguf:
    """The header of one file. Raises Dsv2Error."""
    try:
        with opened(path) as (file, size):
            header = Header(file, size, lists=lists)
            tensors, count = header.counts()
            keys: dict[str, Any] = {}
            for name, value in header.pairs(count):
                if name in keys:
                    raise ValueError(f"it holds the key {name[:80]} twice")
                keys[name] = value
            return Gguf(path, keys, placed(path, header, tensors, alignment_of(keys)))
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None


def unreadable(path: Path, error: Exception) -> Dsv2Error:
    if isinstance(error, OSError):
        return Dsv2Error(f"{path} cannot be read", why=reason(error), fix=AGAIN)
    return Dsv2Error(f"{path} is not a GGUF file that can be read", why=reason(error), fix=AGAIN)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """A regular file, and its size. Raises OSError."""
    size = require_file(path).st_size
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0) as file:
        yield file, size


def alignment_of(keys: dict[str, Any]) -> int:
    """Of the tensors. Raises ValueError for what is no power of two."""
    found = keys.get("general.alignment", 32)
    if type(found) is not int or not 0 < found <= LARGEST_ALIGNMENT or found & (found - 1):
        raise ValueError(f"general.alignment is {str(found)[:40]}, which is no power of two that can be")
    return found


def placed(path: Path, header: Header, count: int, alignment: int) -> dict[str, GgufTensor]:
    """The tensors that a header lists, with their places in the file. Raises ValueError for those that can
    not lie there.
    """
    listed = [header.about() for _ in range(count)]
    start = -(-header.at // alignment) * alignment
    found: dict[str, GgufTensor] = {}
    for name, shape, type, offset in listed:
        if name in found:
            raise ValueError(f"it holds the tensor {name[:80]} twice")
        length = length_of(name, shape, type)
        if offset % alignment:
            raise ValueError(f"{name[:80]} does not begin at a multiple of {alignment} bytes")
        if start + offset + length > header.size:
            raise ValueError(f"{name[:80]} ends behind the end of the file")
        found[name] = GgufTensor(path, name, shape, type, start + offset, length)
    refuse_gaps(found, start, alignment, header.size)
    return found


def refuse_gaps(tensors: dict[str, GgufTensor], start: int, alignment: int, size: int) -> None:
    """Raises ValueError unless the tensors lie one behind the other from `start` to the file's end, `size`,
    with no more behind each than fills up the alignment: llama.cpp reads no file with a hole either.
    """
    end, before = start, "its header"
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
        if tensor.offset < end:
            raise ValueError(f"{before} and {tensor.name[:80]} overlap")
        if tensor.offset > -(-end // alignment) * alignment:
            raise ValueError(
                f"{tensor.offset - end:,} bytes between {before} and {tensor.name[:80]} are no tensor's"
            )
        end, before = tensor.offset + tensor.length, tensor.name[:80]
    if size > -(-end // alignment) * alignment:
        raise ValueError(f"its last {size - end:,} bytes are no tensor's")


def length_of(name: str, shape: tuple[int, ...], type: int) -> int:
    """Bytes of a tensor. Raises ValueError for a shape that can not be, and for types that are unknown."""
    if not all(shape) or prod(shape) > MOST:
        raise ValueError(f"{name[:80]} has the shape {list(shape)}")
    if type not in TYPES:
        raise ValueError(f"{name[:80]} has type {type}, which is unknown")
    kind, weights, size = TYPES[type]
    if shape[-1] % weights:
        raise ValueError(f"{name[:80]} has rows of {shape[-1]:,} weights, and {kind} has blocks of {weights}")
    return prod(shape) // weights * size


def glance(path: Path) -> dict[str, Any]:
    """The keys in a file's first bytes, which are those before its vocabulary; none for what is no GGUF."""
    found: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError), opened(path) as (file, size):
        header = Header(file, size, FIRST_KEYS)
        for name, value in header.pairs(header.counts()[1]):
            found[name] = value
    return found


def architecture(path: Path) -> str:
    """The model's kind, which is general.architecture; empty for anything else."""
    kind = glance(path).get("general.architecture")
    return kind if isinstance(kind, str) else ""
