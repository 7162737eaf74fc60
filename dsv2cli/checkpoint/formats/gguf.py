"""GGUF files of `deepseek2` models: llama.cpp's tensors as codes, and their names as the checkpoint's.

Layouts: ggml-quants.h of llama.cpp. Each `unpack` below turns the bytes of some rows [rows, blocks, bytes a
block] into codes one a byte; what these stand for is decoded by kernels/quantized.py, to the last bit as
llama.cpp and its Python package decode them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from dsv2cli.checkpoint.formats.coded import Coded, read_bytes
from dsv2cli.checkpoint.safetensors import DTYPES
from dsv2cli.errors import Dsv2Error
from dsv2cli.formats import GGUF_CODINGS
from dsv2cli.hubs.gguf import TYPES, Gguf, GgufTensor, read_gguf
from dsv2cli.hubs.gguf_held import refuse_types
from dsv2cli.kernels.quantized import Codes
from dsv2cli.model.config import DeepseekV2Config
from dsv2cli.outside import AGAIN


def halves(raw: Tensor, at: int, count: int = 1) -> Tensor:
    """fp16 numbers of each block, from byte `at`. raw [rows, blocks, bytes] -> [rows, blocks * count]"""
    return raw[:, :, at : at + 2 * count].contiguous().view(torch.float16).flatten(1)


def nibbles(raw: Tensor) -> Tensor:
    """Of `size` bytes first the low halves, then the high ones. [rows, n, size] -> [rows, n * 2 * size]"""
    return torch.stack([raw & 15, raw >> 4], 2).flatten(1)


def shifted(raw: Tensor, run: int, step: int) -> Tensor:
    """For each run of `run` bytes the runs of their bits, `step` at a time from the lowest on.

    raw [rows, blocks, size] -> [rows, blocks * size * 8 / step], each of `step` bits.
    """
    shifts = torch.arange(0, 8, step, dtype=torch.uint8)
    runs = raw.unflatten(-1, (-1, 1, run)) >> shifts[:, None]
    return (runs & (2**step - 1)).flatten(1)


def fifth_bits(raw: Tensor, at: int) -> Tensor:
    """The 32 fifth bits of a Q5_0 or Q5_1 block, of column i in bit i. -> [rows, blocks * 32] in place"""
    return shifted(raw[:, :, at : at + 4], 1, 1) << 4


def q4_0(raw: Tensor) -> Codes:
    return Codes(nibbles(raw[:, :, 2:]), halves(raw, 0))


def q4_1(raw: Tensor) -> Codes:
    return Codes(nibbles(raw[:, :, 4:]), halves(raw, 0), halves(raw, 2))


def q5_0(raw: Tensor) -> Codes:
    return Codes((nibbles(raw[:, :, 6:]) | fifth_bits(raw, 2)) + (128 - 16), halves(raw, 0))


def q5_1(raw: Tensor) -> Codes:
    return Codes((nibbles(raw[:, :, 8:]) | fifth_bits(raw, 4)) + 128, halves(raw, 0), halves(raw, 2))


def q8_0(raw: Tensor) -> Codes:
    return Codes(raw[:, :, 2:].flatten(1) ^ 128, halves(raw, 0))


def signed(numbers: Tensor) -> Tensor:
    """Bytes as the same bits of int8."""
    return numbers.contiguous().view(torch.int8)


def q2_k(raw: Tensor) -> Codes:
    scales = raw[:, :, :16].flatten(1)
    return Codes(
        shifted(raw[:, :, 16:80], 32, 2),
        signed(scales & 15),
        signed(scales >> 4),
        halves(raw, 80),
        -halves(raw, 82),
    )


def q3_k(raw: Tensor) -> Codes:
    """Scales have their low four bits in 8 bytes and the high two in 4; codes their third bit in `hmask`."""
    low = nibbles(raw[:, :, 96:104]).unflatten(1, (-1, 16))
    high = shifted(raw[:, :, 104:108], 4, 2).unflatten(1, (-1, 16))
    scales = signed((low | (high << 4)) - 32).flatten(1)
    third = shifted(raw[:, :, :32], 32, 1) << 2
    return Codes((shifted(raw[:, :, 32:96], 32, 2) | third) + 4, scales, supers=halves(raw, 108))


def scales_and_minima(raw: Tensor) -> tuple[Tensor, Tensor]:
    """The eight 6-bit scales and minima in the 12 bytes [rows, blocks, 12] of Q4_K and Q5_K."""
    a, b, c = raw.unflatten(-1, (3, 4)).unbind(-2)
    scales = torch.cat([a & 63, (c & 15) | ((a >> 2) & 48)], -1)
    minima = torch.cat([b & 63, (c >> 4) | ((b >> 2) & 48)], -1)
    return signed(scales.flatten(1)), signed(minima.flatten(1))


def q4_k(raw: Tensor) -> Codes:
    values = shifted(raw[:, :, 16:], 32, 4)
    return Codes(values, *scales_and_minima(raw[:, :, 4:16]), halves(raw, 0), -halves(raw, 2))


def q5_k(raw: Tensor) -> Codes:
    values = shifted(raw[:, :, 48:], 32, 4) | (shifted(raw[:, :, 16:48], 32, 1) << 4)
    return Codes(values + 128, *scales_and_minima(raw[:, :, 4:16]), halves(raw, 0), -halves(raw, 2))


def q6_k(raw: Tensor) -> Codes:
    values = shifted(raw[:, :, :128], 64, 4) | (shifted(raw[:, :, 128:192], 32, 2) << 4)
    return Codes(values + (128 - 32), signed(raw[:, :, 192:208].flatten(1)), supers=halves(raw, 208))


def iq4_xs(raw: Tensor) -> Codes:
    """Scales have their low four bits in 4 bytes and the high two in 2."""
    low = torch.stack([raw[:, :, 4:8] & 15, raw[:, :, 4:8] >> 4], -1).flatten(-2)
    high = torch.stack([(raw[:, :, 2:4] >> shift) & 3 for shift in (0, 2, 4, 6)], -1).flatten(-2)
    scales = signed((low | (high << 4)) - 32).flatten(1)
    values = nibbles(raw[:, :, 8:].unflatten(-1, (-1, 16)).flatten(1, 2))
    return Codes(values, scales, supers=halves(raw, 0))


UNPACK: dict[str, Callable[[Tensor], Codes]] = {
    "Q4_0": q4_0,
    "Q4_1": q4_1,
    "Q5_0": q5_0,
    "Q5_1": q5_1,
    "Q8_0": q8_0,
    "Q2_K": q2_k,
    "Q3_K": q3_k,
    "Q4_K": q4_k,
    "Q5_K": q5_k,
    "Q6_K": q6_k,
    "IQ4_NL": q4_0,
    "IQ4_XS": iq4_xs,
}


def bytes_of(tensor: GgufTensor, begin: int, end: int) -> Tensor:
    """Rows [begin, end) of a tensor as they lie, all its leading dimensions counted as rows. [bytes]"""
    _, weights, size = TYPES[tensor.type]
    width = tensor.shape[-1] // weights * size
    return read_bytes(tensor.file, tensor.offset + begin * width, (end - begin) * width, tensor.name)


def rows_of(tensor: GgufTensor, begin: int, end: int) -> Codes | Tensor:
    """The same as codes, or as numbers."""
    raw, cols, (name, _, size) = bytes_of(tensor, begin, end), tensor.shape[-1], TYPES[tensor.type]
    if name in DTYPES:
        return raw.view(DTYPES[name]).view(end - begin, cols)
    return UNPACK[name](raw.view(end - begin, -1, size))


def coded(tensor: GgufTensor, name: str, first: int, rows: int) -> Coded:
    """A matrix that is `rows` rows of a tensor, from row `first` on; or a vector."""
    kind, weights, size = TYPES[tensor.type]
    cols = tensor.shape[-1]
    shape = (cols,) if len(tensor.shape) == 1 else (rows, cols)
    coding = GGUF_CODINGS.get(kind)

    def read(begin: int, end: int) -> Codes | Tensor:
        return rows_of(tensor, first + begin, first + end)

    def raw(begin: int, end: int) -> Tensor:
        return bytes_of(tensor, first + begin, first + end)

    row = cols // weights * size
    at = tensor.offset + first * row
    lying = None if coding is None else raw
    return Coded(
        tensor.file, name, shape, coding, kind, rows * row, read, offset=at, raw=lying, type=tensor.type
    )


LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}
WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
EXPERTS = {
    "ffn_gate_exps": ("gate_proj",),
    "ffn_up_exps": ("up_proj",),
    "ffn_down_exps": ("down_proj",),
    "ffn_gate_up_exps": ("gate_proj", "up_proj"),  # one above the other
}
UP = ("attn_k_b", "attn_v_b")  # the two halves of kv_b_proj, in newer files
NAME = re.compile(r"(?:blk\.(0|[1-9][0-9]{0,3})\.)?([a-z0-9_]+)\.weight")


def read(path: Path, config: DeepseekV2Config) -> dict[str, Coded]:
    """The weights of a GGUF file, or of all files that it was split into, by their names in a checkpoint.

    Raises Dsv2Error for what it should not hold, and for types that are not read.
    """
    gguf = read_gguf(path, lists=False)
    refuse_types(gguf)
    out: dict[str, Coded] = {}
    for each in weights_of(gguf, config):
        if each.name in out:
            raise Dsv2Error(f"{each.file} holds {each.name} twice", why="under two names", fix=AGAIN)
        out[each.name] = each
    return out


def weights_of(gguf: Gguf, config: DeepseekV2Config) -> Iterator[Coded]:
    """Every weight of a file. Raises Dsv2Error for a tensor that has no place in this model."""
    for name, tensor in gguf.tensors.items():
        match = NAME.fullmatch(name)
        number, leaf = match.groups() if match is not None else (None, "")
        prefix = "" if number is None else f"model.layers.{int(number)}."
        place = (LAYER if prefix else WHOLE).get(leaf)
        if place is not None:
            require_dims(tensor, 1 if leaf.endswith("norm") else 2)
            yield coded(
                tensor, f"{prefix}{place}.weight", 0, 1 if len(tensor.shape) == 1 else tensor.shape[0]
            )
        elif prefix and leaf in EXPERTS:
            yield from experts_of(tensor, prefix, EXPERTS[leaf], config)
        elif prefix and leaf == UP[0]:
            other = gguf.tensors.get(name.replace(*UP))
            yield kv_b_proj(tensor, other, f"{prefix}self_attn.kv_b_proj.weight", config)
        elif prefix and leaf == UP[1] and name.replace(*UP[::-1]) in gguf.tensors:
            continue  # read with the other half
        else:
            raise Dsv2Error(
                f"{tensor.file} holds the extra tensor {name}", why="a deepseek2 model has none", fix=AGAIN
            )


def require_dims(tensor: GgufTensor, dims: int) -> None:
    """Raises Dsv2Error for another number of dimensions."""
    if len(tensor.shape) != dims:
        raise other_shape(tensor, f"{dims} dimensions are called for")


def other_shape(tensor: GgufTensor, why: str) -> Dsv2Error:
    """What to say of a tensor of a shape that is not called for."""
    what = f"{tensor.file}: tensor {tensor.name} has shape {list(tensor.shape)}"
    return Dsv2Error(what, why=why, fix=AGAIN)


def experts_of(
    tensor: GgufTensor, prefix: str, leaves: tuple[str, ...], config: DeepseekV2Config
) -> Iterator[Coded]:
    """The matrices of a stack [experts, rows of all `leaves`, cols]. Raises Dsv2Error for another stack."""
    require_dims(tensor, 3)
    experts, rows, _ = tensor.shape
    if experts != config.n_routed_experts or rows % len(leaves):
        why = f"{config.n_routed_experts} experts are called for, of {' and '.join(leaves)}"
        raise other_shape(tensor, why)
    each = rows // len(leaves)
    for e in range(experts):
        for i, leaf in enumerate(leaves):
            yield coded(tensor, f"{prefix}mlp.experts.{e}.{leaf}.weight", e * rows + i * each, each)


def kv_b_proj(k_b: GgufTensor, v_b: GgufTensor | None, name: str, config: DeepseekV2Config) -> Coded:
    """kv_b_proj [heads * (nope + value), rank] of its halves: the keys' [heads, rank, nope], transposed, and
    the values' [heads, value, rank]. Raises Dsv2Error for other shapes.
    """
    heads, rank = config.num_attention_heads, config.kv_lora_rank
    nope, value = config.qk_nope_head_dim, config.v_head_dim
    for tensor, shape in ((k_b, (heads, rank, nope)), (v_b, (heads, value, rank))):
        why = f"its metadata call for {list(shape)}"
        if tensor is None:
            raise Dsv2Error(f"{k_b.file}: tensor {k_b.name} has no attn_v_b beside it", why=why, fix=AGAIN)
        if tensor.shape != shape:
            raise other_shape(tensor, why)
    assert v_b is not None
    keys, values = coded(k_b, name, 0, heads * rank), coded(v_b, name, 0, heads * value)

    def read_both(begin: int, end: int) -> Tensor:
        first, last = begin // (nope + value), -(-end // (nope + value))  # whole heads
        up = keys.weights(first * rank, last * rank).view(-1, rank, nope).mT
        down = values.weights(first * value, last * value).view(-1, value, rank)
        before = first * (nope + value)
        return torch.cat([up.float(), down.float()], 1).flatten(0, 1)[begin - before : end - before]

    whole = (heads * (nope + value), rank)
    return Coded(k_b.file, name, whole, None, keys.kind, keys.length + values.length, read_both)
