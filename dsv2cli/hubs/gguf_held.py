"""What the tensors of a GGUF file become in memory, by the parts of a model, from its header alone."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from dsv2cli.errors import Dsv2Error
from dsv2cli.formats import GGUF_CODINGS, GGUF_PLAIN
from dsv2cli.hubs.gguf import TYPES, Gguf, GgufTensor

PARTS = {  # by what stands behind the number of the block
    "token_embd": "embedding",
    "output": "head",
    "attn_q": "attention",
    "attn_q_a": "attention",
    "attn_q_b": "attention",
    "attn_kv_a_mqa": "attention",
    "attn_output": "attention",
    **dict.fromkeys(("ffn_gate", "ffn_up", "ffn_down"), "dense layers"),
    **dict.fromkeys(("ffn_gate_exps", "ffn_up_exps", "ffn_gate_up_exps", "ffn_down_exps"), "routed experts"),
    **dict.fromkeys(("ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp"), "shared experts"),
}
BF16_BITS = 16.0


def refuse_types(gguf: Gguf) -> None:
    """Raises Dsv2Error for types that are not read, all named at once."""
    readable = (*GGUF_PLAIN, *GGUF_CODINGS)
    kinds = sorted({TYPES[tensor.type][0] for tensor in gguf.tensors.values()} - set(readable))
    if kinds:
        why = f"it holds {', '.join(kinds)}; {', '.join(readable)} are read"
        raise Dsv2Error(f"{gguf.path} can not be run", why=why, fix="a file in one of these, such as Q4_K_M")


def held_of(gguf: Gguf) -> dict[str, Any]:
    """For config.json's entry: `label`, the most frequent type; `bits_held` and `bits_on_gpu`, of a weight
    once it is loaded, by part; and `kinds`: for each part the types with their weights.
    """
    kinds: dict[str, Counter[str]] = {}
    for tensor in gguf.tensors.values():
        if (part := part_of(tensor)) is not None:
            kinds.setdefault(part, Counter())[TYPES[tensor.type][0]] += math.prod(tensor.shape)
    everything = sum(kinds.values(), Counter[str]())
    label = everything.most_common(1)[0][0] if everything else "gguf"

    def held(gpu: bool) -> dict[str, float]:
        return {
            part: sum(bits_of(kind, gpu) * count for kind, count in counts.items()) / counts.total()
            for part, counts in kinds.items()
        }

    named = {part: dict(counts) for part, counts in kinds.items()}
    return {"label": f"gguf {label}", "bits_held": held(False), "bits_on_gpu": held(True), "kinds": named}


def part_of(tensor: GgufTensor) -> str | None:
    """The part of the model, as in model/size.py, of a matrix whose codes are kept; None for others."""
    return PARTS.get(tensor.name.removesuffix(".weight").rpartition(".")[2])


def bits_of(kind: str, gpu: bool) -> float:
    """Bits that a weight of this type takes in memory, with its scales."""
    coding = GGUF_CODINGS.get(kind)
    if coding is None:
        return BF16_BITS
    return (coding.multiplied_out if gpu else coding).bits_held
