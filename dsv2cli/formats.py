"""Number formats by name, and how weights are packed: lanes, groups and bits, each said
once. Needs no torch.
"""

from __future__ import annotations

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

PAGE = 64  # tokens whose latents lie together

LANES = 16  # rows of a packed matrix that lie interleaved
GROUP = 64  # numbers of a row that share a scale
GROUPS = (32, 64)  # sizes of a group that kernels know

PACKED_BITS = {"int8": (8, 8), "int4": (4, 8), "int4-all": (4, 4)}  # of the MLPs, and of attention
HEAD_BITS = 8
PACKED_BY, PACKED_FORMAT = "dsv2", 1  # quant_method and format in config.json's quantization_config
