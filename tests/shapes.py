"""Shapes, codings and the smallest model: what the kernels are tested with, and compiled for with no GPU."""

import json
from pathlib import Path
from typing import Any

from dsv2cli.formats import Coding

DATA = Path(__file__).parent / "data"

CODINGS = [
    Coding(4, 32, "signed", "F16"),
    Coding(4, 32, "iq4_nl", "F16"),
    Coding(4, 32, "iq4_nl", "I8"),
    Coding(4, 32, "plain", "F16", "added"),
    Coding(4, 32, "plain", "I8", "added"),
    Coding(4, 16, "signed", "I8"),
    Coding(4, 64, "plain", "BF16", "zero"),
    Coding(4, 128, "plain", "F16", "zero"),
    Coding(8, 16, "signed", "I8"),
    Coding(8, 32, "signed", "I8", "added"),
    Coding(8, 32, "signed", "F16"),
    Coding(8, 128, "signed", "F32"),
    Coding(8, 64, "plain", "BF16", "added"),
    Coding(8, 128, "e4m3", "F32"),
]
GPU_CODINGS = sorted({each.multiplied_out for each in CODINGS}, key=str)

# Rows and columns: several blocks and chunks, whole and not, odd ones, and one row; on a GPU also the widths
# of V2 and V2-Lite.
PRODUCTS = [(24, 1100), (32, 512), (19, 50), (1, 7), (70, 96)]
WIDE_PRODUCTS = [(16, 2048), (20, 1408), (16, 5120), (24, 1536)]

ROUTINGS = [
    (8, 2, 1, 1, False),
    (20, 3, 5, 2, False),
    (6, 2, 1, 1, True),
    (64, 6, 1, 1, False),
    (160, 6, 8, 3, False),
]
# Routing, hidden, width, shared experts.
EXPERTS = [(ROUTINGS[0], 96, 40, 2), (ROUTINGS[1], 64, 64, 1), (ROUTINGS[2], 50, 24, 0)]

# Heads, nope, rope, value, rank: tiny; odd, in tiles of which the last is not whole; in two tiles of heads;
# V2-Lite's own.
ATTENTIONS = [(4, 16, 8, 24, 32), (3, 12, 6, 68, 80), (17, 8, 4, 8, 16)]
WIDE_ATTENTIONS = [(16, 128, 64, 128, 512)]


def smallest_config() -> dict[str, Any]:
    """q_lora, grouped routing, one dense layer and one of experts."""
    return json.loads((DATA / "golden" / "v2" / "config.json").read_text()) | {
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 2,
        "first_k_dense_replace": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "vocab_size": 48,
    }
