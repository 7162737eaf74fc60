"""The model's config.json: read, checked, and refused where it asks for something this
program does not do.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeGuard

from dsv2cli.errors import Dsv2Error
from dsv2cli.formats import (
    GROUPS,
    ITEM_BYTES,
    KEPT_FORMAT,
    PACKED_BITS,
    PACKED_BY,
    PACKED_FORMAT,
    PACKED_SIZES,
    Coding,
)
from dsv2cli.outside import Number, read_json

SIZE, COUNT, FACTOR = Number(1, 2**24, whole=True), Number(1, 2**14, whole=True), Number(0, 1e6)
LAYERS, POSITIONS = Number(1, 1024, whole=True), Number(1, 2**31, whole=True)
NUMBERS = {
    "vocab_size": SIZE,
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "moe_intermediate_size": SIZE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": COUNT,
    "kv_lora_rank": SIZE,
    "qk_rope_head_dim": COUNT,
    "v_head_dim": COUNT,
    "qk_nope_head_dim": COUNT,
    "moe_layer_freq": COUNT,
    "max_position_embeddings": POSITIONS,
    "first_k_dense_replace": Number(0, 2**14, whole=True),
    "rms_norm_eps": Number(0, 1, above=True),
    "rope_theta": Number(1, 1e12, above=True),
    "routed_scaling_factor": Number(0, 1e6, above=True),
}
OPTIONAL = {  # or null
    "q_lora_rank": SIZE,
    "n_shared_experts": COUNT,
    "n_routed_experts": COUNT,
    "num_experts_per_tok": COUNT,
    "n_group": COUNT,
    "topk_group": COUNT,
}
SCALING = {
    "factor": Number(1, 1e6),
    "original_max_position_embeddings": POSITIONS,
    "beta_fast": Number(0, 1e6, above=True),
    "beta_slow": Number(0, 1e6, above=True),
    "mscale": FACTOR,
    "mscale_all_dim": FACTOR,
}


@dataclass(frozen=True)
class RopeScaling:
    """Stretching of the rotary positions. `type` is none, linear or yarn; names are the checkpoint's own."""

    type: str = "none"
    factor: float = 1.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32
    beta_slow: float = 1
    mscale: float = 1.0
    mscale_all_dim: float = 0.0


@dataclass(frozen=True)
class Packed:
    """How `dsv2 quantize` packed the weights: one of PACKED_BITS, and how many numbers share a scale; or the
    codes of another program, kept as they were: `format` is then its name, and `codings` say what each weight
    is in.
    """

    format: str
    group: int
    codings: dict[str, Coding] | None = field(default=None, hash=False)
    bits: dict[str, float] = field(default_factory=dict, hash=False)  # of a weight, by size.Part, with scales
    bits_on_gpu: dict[str, float] = field(default_factory=dict, hash=False)  # where they differ


@dataclass(frozen=True)
class Foreign:
    """Weights that another program has packed, which are read as they are: the program's name for it, and
    what it says of them.
    """

    method: str  # gguf, or quant_method: awq, gptq, fp8, compressed-tensors; or mlx
    label: str  # for people
    entry: dict[str, Any] = field(hash=False)
    bits: dict[str, float] = field(hash=False)  # of a weight once it is loaded, by size.Part, with scales
    bits_on_gpu: dict[str, float] = field(default_factory=dict, hash=False)  # where they differ


@dataclass(frozen=True)
class DeepseekV2Config:
    """Architecture of one checkpoint. Defaults are those of the official configuration_deepseek.py."""

    vocab_size: int = 102400
    hidden_size: int = 4096
    intermediate_size: int = 11008
    moe_intermediate_size: int = 1407
    num_hidden_layers: int = 30
    num_attention_heads: int = 32
    n_shared_experts: int | None = None
    n_routed_experts: int | None = None
    num_experts_per_tok: int | None = None
    routed_scaling_factor: float = 1.0
    kv_lora_rank: int = 512
    q_lora_rank: int | None = 1536
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    qk_nope_head_dim: int = 128
    topk_method: str = "greedy"
    n_group: int | None = None
    topk_group: int | None = None
    moe_layer_freq: int = 1
    first_k_dense_replace: int = 0
    norm_topk_prob: bool = False
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = RopeScaling()
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 100000
    eos_token_id: int | list[int] | None = 100001
    torch_dtype: str = "bfloat16"
    packed: Packed | None = None
    foreign: Foreign | None = None

    def held_bits(self, gpu: bool = False) -> dict[str, float]:
        """Bits that a weight takes in RAM or on a GPU, by size.Part, where another program has packed them;
        else nothing.
        """
        held = self.foreign or self.packed
        if held is None:
            return {}
        return held.bits | held.bits_on_gpu if gpu else held.bits

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_norm_eps(self) -> float:
        """Of the norms of both latents: fixed in the official code, whatever rms_norm_eps says."""
        return 1e-6

    @property
    def cached_dim(self) -> int:
        """Numbers cached per token and layer: the latent and the rope key that all heads share."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def expanded_dim(self) -> int:
        """Numbers per token and layer that a cache of full keys and values would hold."""
        return self.num_attention_heads * (self.qk_head_dim + self.v_head_dim)

    def is_moe(self, layer: int) -> bool:
        return (
            self.n_routed_experts is not None
            and layer >= self.first_k_dense_replace
            and layer % self.moe_layer_freq == 0
        )

    @property
    def router_groups(self) -> tuple[int, int]:
        """How many groups the routed experts are in, and how many of them a token may choose from; (1, 1)
        where there are none.
        """
        return (
            (self.n_group or 1, self.topk_group or 1)
            if self.topk_method == "group_limited_greedy"
            else (1, 1)
        )

    @property
    def moe_layers(self) -> int:
        return sum(self.is_moe(layer) for layer in range(self.num_hidden_layers))

    @classmethod
    def load(cls, folder: Path) -> DeepseekV2Config:
        """Read `folder/config.json`, or the file itself.

        Raises Dsv2Error when missing, malformed or not implemented.
        """
        path = folder if folder.is_file() else folder / "config.json"
        if not os.path.lexists(path):
            raise Dsv2Error(
                f"{folder} holds no config.json",
                why="a checkpoint is a folder with config.json and safetensors files",
            )
        raw = read_json(path)
        return cls.from_dict(raw, str(path))

    @classmethod
    def from_dict(cls, raw: dict[str, Any], source: str = "config.json") -> DeepseekV2Config:
        """Check a parsed config.json. Raises Dsv2Error with a sentence that names the offending value."""
        refuse_unimplemented(raw, source)
        known = {field.name for field in fields(cls)}
        values = {key: value for key, value in raw.items() if key in known}
        if "dtype" in raw:  # transformers 5 writes dtype where 4 wrote torch_dtype
            values["torch_dtype"] = raw["dtype"]
        values["torch_dtype"] = str(values.get("torch_dtype") or cls.torch_dtype).removeprefix("torch.")
        values["topk_method"] = str(values.get("topk_method") or "greedy").replace("gready", "greedy")
        rope = rope_of(raw, source)
        thetas = (raw.get("rope_theta"), rope.get("rope_theta"), cls.rope_theta)
        values["rope_theta"] = next(theta for theta in thetas if theta is not None)
        values["rope_scaling"] = parse_rope_scaling(rope, source)
        values["packed"], values["foreign"] = parse_quantization(raw, source)
        config = cls(**values)
        check_numbers(config, source)
        return config


def rope_of(raw: dict[str, Any], source: str) -> dict[str, Any]:
    """`rope_scaling` of the release or `rope_parameters` of transformers 5; both name the same numbers.

    Raises Dsv2Error for what is no object, or for two that differ.
    """
    found: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        value = raw.get(name)
        if value is not None and not isinstance(value, dict):
            raise not_implemented(source, name, value, "it must be an object")
        if value and found and value != found:
            raise not_implemented(source, name, value, "rope_scaling says something else")
        found = found or value or {}
    return found


def parse_rope_scaling(rope: dict[str, Any], source: str) -> RopeScaling:
    """What rope_of gives, checked. Raises Dsv2Error."""
    known = set(SCALING) & rope.keys()
    kind = rope.get("type") or rope.get("rope_type")
    if rope.get("rope_type") not in (None, kind):
        raise not_implemented(source, "rope_scaling.rope_type", rope["rope_type"], f"its type is {kind}")
    if kind is None and known:
        raise not_implemented(source, "rope_scaling.type", kind, "what its other numbers mean depends on it")
    if kind in (None, "default", "none"):
        return RopeScaling()
    if kind not in ("linear", "yarn"):
        raise not_implemented(source, "rope_scaling.type", kind, "none, linear and yarn are implemented")
    if "factor" not in rope:
        raise not_implemented(source, "rope_scaling.factor", None, f"{kind} needs it")
    for key in rope.keys() - known - {"type", "rope_type", "rope_theta", "partial_rotary_factor"}:
        if rope[key] is not None:
            raise not_implemented(source, f"rope_scaling.{key}", rope[key], "this key is unknown here")
    for key in sorted(known):
        if rope[key] not in SCALING[key]:
            raise not_implemented(source, f"rope_scaling.{key}", rope[key], f"it must be {SCALING[key]}")
    return RopeScaling(type=kind, **{key: rope[key] for key in known})


FOREIGN = ("gguf", "awq", "gptq", "fp8", "compressed-tensors")


def parse_quantization(raw: dict[str, Any], source: str) -> tuple[Packed | None, Foreign | None]:
    """`quantization_config` as `dsv2 quantize` writes it, or another program, or MLX's `quantization`.

    Raises Dsv2Error.
    """
    entry = raw.get("quantization_config")
    if isinstance(raw.get("quantization"), dict) and not (
        isinstance(entry, dict) and "quant_method" in entry
    ):
        return None, Foreign("mlx", "mlx", raw["quantization"], foreign_bits("mlx", raw["quantization"]))
    if entry is None:
        return None, None
    method = entry.get("quant_method") if isinstance(entry, dict) else None
    if method == PACKED_BY:
        return parse_packed(entry, source), None
    if method not in FOREIGN:
        why = f"the codes of dsv2 quantize, {', '.join(FOREIGN)} and MLX are read"
        raise not_implemented(source, "quantization_config", entry, why)
    label = entry.get("label") if method == "gguf" else method
    label = label if is_label(label) else method
    on_gpu = numbers_of(entry.get("bits_on_gpu"))
    return None, Foreign(method, label, entry, foreign_bits(method, entry), on_gpu)


def numbers_of(bits: Any) -> dict[str, float]:
    """Numbers of bits by the parts of a model; nothing for what is none."""
    items = bits.items() if isinstance(bits, dict) else ()
    return {name: float(each) for name, each in items if each in BITS}


def is_label(label: Any) -> TypeGuard[str]:
    """Whether a file's name for a format can be shown, and is none of our own."""
    shown = isinstance(label, str) and re.fullmatch(r"[a-z][A-Za-z0-9_ -]{0,40}", label) is not None
    return shown and label not in (*PACKED_BITS, *ITEM_BYTES)


LARGE = ("attention", "dense layers", "routed experts", "shared experts")  # size.Parts that are packed
BITS, GROUP_SIZE = Number(1, 32), Number(1, 2**14)


def foreign_bits(method: str, entry: dict[str, Any]) -> dict[str, float]:
    """About how many bits a weight takes of what a config says; a GGUF file's own tensors have said it."""
    if isinstance(entry.get("bits_held"), dict):
        return numbers_of(entry["bits_held"])
    inner: dict[str, Any] = {}
    if isinstance(groups := entry.get("config_groups"), dict):
        first = next((each for each in groups.values() if isinstance(each, dict)), {})
        inner = first["weights"] if isinstance(first.get("weights"), dict) else {}
    bits, group = 8.0 if method == "fp8" else 4.0, 128.0
    for name in ("bits", "w_bit", "num_bits"):
        for each in (entry, inner):
            bits = each[name] if each.get(name) in BITS else bits
    for name in ("group_size", "q_group_size"):
        for each in (entry, inner):
            group = each[name] if each.get(name) in GROUP_SIZE else group
    if method == "mlx":  # codes of fewer bits take 4, and of 5 and 6 a byte
        bits = 4.0 if bits <= 4 else 8.0
    if entry.get("desc_act") is True:  # packed anew
        bits, group = 8.0, 64
    parts = (*LARGE, "embedding", "head") if method == "mlx" else LARGE
    return dict.fromkeys(parts, bits + 32 / min(group, 128))


def parse_packed(quantization: dict[str, Any], source: str) -> Packed:
    """What `dsv2 quantize` writes. Raises Dsv2Error."""
    number = quantization.get("format")
    if number == KEPT_FORMAT:
        return parse_kept(quantization, source)
    if number != PACKED_FORMAT:
        why = f"this version reads formats {PACKED_FORMAT} and {KEPT_FORMAT}; pack the original again"
        raise not_implemented(source, "quantization_config.format", number, why)
    bits, group = tuple(map(quantization.get, PACKED_SIZES)), quantization.get("group")
    format = next((name for name, each in PACKED_BITS.items() if each == bits), None)
    if format is None or type(group) is not int or group not in GROUPS:
        why = "bits are 8, or 4 with head and kv_a_proj_with_mqa in 8 or 4, groups 32 or 64"
        raise not_implemented(source, "quantization_config", quantization, why)
    return Packed(format, group)


def parse_kept(quantization: dict[str, Any], source: str) -> Packed:
    """Codes of another program, kept as they were: its name, and for each weight its Coding in a few words.

    Raises Dsv2Error.
    """
    label, named = quantization.get("label"), quantization.get("codings")
    if not is_label(label) or not isinstance(named, dict):
        raise not_implemented(source, "quantization_config", quantization, "it names no codings")
    codings = {}
    for name, words in named.items():
        coding = Coding.parse(words) if isinstance(words, str) else None
        if coding is None:
            raise not_implemented(source, f"quantization_config.codings.{name}", words, "it is no coding")
        codings[name] = coding
    bits, on_gpu = (numbers_of(quantization.get(key)) for key in ("bits_held", "bits_on_gpu"))
    return Packed(label, 0, codings, bits, on_gpu)


def refuse_unimplemented(raw: dict[str, Any], source: str) -> None:
    """Values that would change the arithmetic in ways this program does not follow. Raises Dsv2Error."""
    only: dict[str, tuple[Any, ...]] = {
        "model_type": ("deepseek_v2",),
        "hidden_act": ("silu",),
        "scoring_func": ("softmax",),
        "topk_method": ("greedy", "gready", "group_limited_greedy", None),
        "mlp_bias": (False,),
        "rope_interleave": (True,),
        "sliding_window": (None,),
    }
    if "model_type" not in raw:
        raise Dsv2Error(f"{source} names no model_type", why="only deepseek_v2 checkpoints run here")
    for key, allowed in only.items():
        if key in raw and (type(raw[key]), raw[key]) not in [(type(value), value) for value in allowed]:
            names = ", ".join(str(value) for value in allowed if value is not None) or "null"
            raise not_implemented(source, key, raw[key], f"only {names} is implemented")


def check_numbers(config: DeepseekV2Config, source: str) -> None:
    """Sizes that cannot be a model are refused here, before they become a shape error somewhere else.

    Raises Dsv2Error.
    """
    for name, allowed in (NUMBERS | OPTIONAL).items():
        value = getattr(config, name)
        if value not in allowed and not (value is None and name in OPTIONAL):
            raise not_implemented(source, name, value, f"it must be {allowed}")
    for name in ("bos_token_id", "eos_token_id"):
        token_ids(getattr(config, name), name, source, config.vocab_size)
    for name in ("norm_topk_prob", "attention_bias", "tie_word_embeddings"):
        if not isinstance(getattr(config, name), bool):
            raise not_implemented(source, name, getattr(config, name), "it must be true or false")
    if config.torch_dtype not in ("float32", "bfloat16", "float16"):
        raise not_implemented(source, "torch_dtype", config.torch_dtype, "float32, bfloat16 and float16 are")
    if config.v_head_dim > config.qk_head_dim:
        why = f"a head's values may not be wider than its keys, {config.qk_head_dim}"
        raise not_implemented(source, "v_head_dim", config.v_head_dim, why)
    if config.qk_rope_head_dim % 2:
        raise not_implemented(
            source, "qk_rope_head_dim", config.qk_rope_head_dim, "rotation needs an even size"
        )
    if config.n_routed_experts is not None:
        check_routing(config, source)


def token_ids(value: Any, name: str, source: str, vocab_size: int) -> tuple[int, ...]:
    """The ids that a file gives for a special token, one, several or null; those that the model does not have
    are left out.

    Raises Dsv2Error for what is no id.
    """
    listed = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(each) is int for each in listed):
        raise not_implemented(source, name, value, "it must be a token id, or a list of them")
    return tuple(each for each in listed if 0 <= each < vocab_size)


def check_routing(config: DeepseekV2Config, source: str) -> None:
    """Raises Dsv2Error for routing that can not be."""
    experts, top_k = config.n_routed_experts or 0, config.num_experts_per_tok
    if top_k is None or top_k > experts:
        raise not_implemented(source, "num_experts_per_tok", top_k, f"there are {experts} routed experts")
    if config.topk_method == "group_limited_greedy":
        groups, kept = config.n_group or 0, config.topk_group or 0
        if not groups or experts % groups:
            raise not_implemented(
                source, "n_group", config.n_group, f"it must divide the {experts} routed experts"
            )
        if not 0 < kept <= groups:
            raise not_implemented(source, "topk_group", config.topk_group, f"there are {groups} groups")


def not_implemented(source: str, key: str, value: Any, why: str) -> Dsv2Error:
    shown = json.dumps(value, default=str)
    shown = shown if len(shown) < 200 else f"{shown[:200]}..."
    return Dsv2Error(f"{source}: {key} = {shown} is not supported", why=why)
