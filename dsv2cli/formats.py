"""Number formats by name, and how weights are packed: lanes, groups and bits, each said
once. Needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

PAGE = 64  # tokens whose latents lie together
CACHE_BITS = {"int8": 8, "int6": 6, "int4": 4}  # of a latent's numbers in the pool, by --cache
KEY_BITS = {8: 16, 6: 12, 4: 12}  # of its rotated key's beside them; 16 is bf16
SCALE_BYTES = 2


def latent_widths(bits: int, rank: int, rope: int) -> tuple[int, int, int]:
    """Bytes that a token's codes, its rotated key and its scales take in a layer of the pool."""
    scales = 1 if KEY_BITS[bits] == 16 else 2
    return rank * bits // 8, rope * KEY_BITS[bits] // 8, scales * SCALE_BYTES


LANES = 16  # rows of a packed matrix that lie interleaved
GROUP = 64  # numbers of a row that share a scale
GROUPS = (32, 64)  # sizes of a group that `dsv2 quantize` makes
SUPER = 256  # numbers of a row over which scales in 8 bits share another

# Bits of the MLPs, of attention, of kv_a_proj_with_mqa (through which all that follows sees a token) and of
# the head. Each of the last two costs more loss in 4 bits than the rest of attention (manual, WEIGHTS).
PACKED_BITS = {"int8": (8, 8, 8, 8), "int4": (4, 4, 8, 8), "int4-all": (4, 4, 4, 4)}
PACKED_BY, PACKED_FORMAT = "dsv2", 4  # quant_method and format in config.json's quantization_config
PACKED_SIZES = ("bits", "attention_bits", "latent_bits", "head_bits")  # likewise, of PACKED_BITS
KEPT_FORMAT = 2  # the same of codes that another program has made


@dataclass(frozen=True)
class Coding:
    """What the codes of a matrix stand for: a code's value times the scale of its group, plus its offset.

    `table` names what code c means. In 8 bits: `signed` c - 128, `plain` c, `e4m3` the float of these bits.
    In 4 bits: `codebook` our own sixteen numbers, `iq4_nl` llama.cpp's, `signed` c - 8, `plain` c.

    `scale` is the type of scales and offsets: BF16, F16, F32; or I8, whose numbers are multiplied by an F16
    for every SUPER columns. An offset is `added` to the product, or is a `zero` that is taken from the value
    before the product.
    """

    bits: int
    group: int  # columns that share a scale: 16, 32, 64 or 128
    table: str
    scale: str = "BF16"
    offset: str = ""

    @property
    def multiplied_out(self) -> Coding:
        """The same without scales of scales, which GPUs do not read: in fp16 they take a few bits more, and a
        rounding.
        """
        return replace(self, scale="F16") if self.scale == "I8" else self

    @property
    def widened(self) -> Coding:
        """The same in 8 bits, which hold any number that a code of 4 stands for."""
        return replace(self, bits=8, table="signed")

    @property
    def columns(self) -> int:
        """How many columns of a matrix stay together."""
        return SUPER if self.scale == "I8" else self.group

    @property
    def bits_held(self) -> float:
        """Bits that a weight takes, its part of scales and offsets counted."""
        numbers = 2 if self.offset else 1
        supers = 16 / SUPER if self.scale == "I8" else 0
        return self.bits + numbers * (SCALE_BITS[self.scale] / self.group + supers)

    def __str__(self) -> str:
        """As it stands in a packed checkpoint's config.json."""
        words = (self.bits, self.group, self.table, self.scale, self.offset or "-")
        return " ".join(map(str, words))

    @classmethod
    def parse(cls, words: str) -> Coding | None:
        """What __str__ wrote, or None where it is not that."""
        match words.split():
            case [bits, group, table, scale, offset] if (
                (bits, table) in TABLES_BY_BITS
                and group in ("16", "32", "64", "128")
                and scale in SCALE_BITS
                and offset in ("-", "added", "zero")
                and not (offset == "zero" and scale == "I8")
                and not (offset != "-" and table == "e4m3")
                and not (offset == "-" and (bits, table) == ("8", "plain"))
            ):
                return cls(int(bits), int(group), table, scale, offset.removeprefix("-"))
        return None


SCALE_BITS = {"BF16": 16, "F16": 16, "F32": 32, "I8": 8}
TABLES_BY_BITS = {
    *(("8", table) for table in ("signed", "plain", "e4m3")),
    *(("4", table) for table in ("codebook", "iq4_nl", "signed", "plain")),
}
# What each type of a GGUF file is held in, and loses nothing: codes of 5 and 6 bits take a byte, those of 2
# and 3 bits half of one.
GGUF_CODINGS = {
    "Q4_0": Coding(4, 32, "signed", "F16"),
    "Q4_1": Coding(4, 32, "plain", "F16", "added"),
    "Q5_0": Coding(8, 32, "signed", "F16"),
    "Q5_1": Coding(8, 32, "signed", "F16", "added"),
    "Q8_0": Coding(8, 32, "signed", "F16"),
    "Q2_K": Coding(4, 16, "plain", "I8", "added"),
    "Q3_K": Coding(4, 16, "signed", "I8"),
    "Q4_K": Coding(4, 32, "plain", "I8", "added"),
    "Q5_K": Coding(8, 32, "signed", "I8", "added"),
    "Q6_K": Coding(8, 16, "signed", "I8"),
    "IQ4_NL": Coding(4, 32, "iq4_nl", "F16"),
    "IQ4_XS": Coding(4, 32, "iq4_nl", "I8"),
}
GGUF_PLAIN = ("F32", "F16", "BF16")


def own_coding(bits: int, group: int) -> Coding:
    """What `dsv2 quantize` makes."""
    return Coding(bits, group, "signed" if bits == 8 else "codebook")
