"""Number formats by name, and how weights are packed: lanes, groups and bits, each said
once. Needs no torch.
"""

from __future__ import annotations

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
GROUPS = (32, 64)  # sizes of a group that kernels know

PACKED_BITS = {"int8": (8, 8), "int4": (4, 8), "int4-all": (4, 4)}  # of the MLPs, and of attention
HEAD_BITS = 8
PACKED_BY, PACKED_FORMAT = "dsv2", 1  # quant_method and format in config.json's quantization_config
