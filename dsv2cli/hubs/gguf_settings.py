"""What the metadata of a GGUF file says, as the files of a checkpoint folder: config.json, the tokenizer's,
and generation_config.json. Imports no torch.

Sizes are taken from the tensors' shapes, since the keys of early files lack some; where both speak they must
agree.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

from dsv2cli import places
from dsv2cli.errors import Dsv2Error
from dsv2cli.hubs.gguf import Gguf, parts_of, read_gguf, unreadable
from dsv2cli.hubs.gguf_held import held_of, refuse_types
from dsv2cli.model.config import DeepseekV2Config
from dsv2cli.outside import AGAIN, Number, is_text, json_text, read_json, reason, require_file

FORM = 2  # of the folders that folder_of makes: one more makes them all anew
FAMILY = "deepseek2"
LITE, LARGE = 27, 60  # layers of V2-Lite and Coder-V2-Lite, and of V2, Coder-V2 and V2.5
BLOCK = re.compile(r"blk\.(\d{1,6})\.(.+)")

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # types of tokens
# The letters by which a byte-level vocabulary writes bytes: any other is an added token's.
BYTE_LETTERS = re.compile("[!-~\u00a1-\u00ac\u00ae-\u0143]+")
MARK = re.compile(r"<[|｜].+[|｜]>")
PADDING = re.compile(r"\[PAD\d+\]")
SAMPLING = (("temperature", "temp", 0.3, Number(0, 100)), ("top_p", "top_p", 0.95, Number(0, 1, above=True)))
BEGIN, END = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
NEVER_TEXT = {BEGIN, END, "<|EOT|>"}  # the marks that the official tokenizers call special

# What splits a text before its pieces are merged, as the official tokenizer.json files have it: in that of
# the V2 family, and in that of the first DeepSeek Coder.
LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚ"
    "Ḁ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ"
    "-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
CHINESE = "[一-龥ࠀ-一가-\ud7ff]+"
SPLITS = {
    "deepseek-llm": ("[\r\n]", rf"\s?[{LETTERS}]+", "\\s?[!-/:-~！-／：-～‘-‟\u3000-。]+", r"\s+$", CHINESE),
    "deepseek-coder": ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CHINESE),
}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def settings_of(gguf: Gguf) -> dict[str, Any]:
    """The files of a checkpoint folder by name, as what JSON holds.

    Raises Dsv2Error for another architecture, for what is not implemented, and for metadata that can not be.
    """
    try:
        meta = Meta(gguf)
        config = config_of(meta)
        tokenizer = TokenList(meta, config["vocab_size"])
        eos = [tokenizer.eos, tokenizer.eot]
        ids = list(dict.fromkeys(each for each in eos if each is not None))
        config |= {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos}
        found = {
            "config.json": config,
            "generation_config.json": {
                "bos_token_id": tokenizer.bos,
                "eos_token_id": ids if len(ids) > 1 else tokenizer.eos,
                **sampling_of(gguf),
            },
            "tokenizer.json": tokenizer.json(),
            "tokenizer_config.json": tokenizer.settings(config["max_position_embeddings"]),
        }
    except Another as error:
        fix = "a file of DeepSeek-V2, V2.5 or Coder-V2"
        raise Dsv2Error(f"{gguf.path} can not be run", why=reason(error), fix=fix) from None
    except ValueError as error:
        raise Dsv2Error(f"{gguf.path} can not be run", why=reason(error), fix=AGAIN) from None
    DeepseekV2Config.from_dict(config, str(gguf.path))
    return found


def sampling_of(gguf: Gguf) -> dict[str, Any]:
    """The defaults of sampling that the file names, else those that all official checkpoints have."""
    found = {}
    for name, key, official, allowed in SAMPLING:
        said = gguf.keys.get(f"general.sampling.{key}")
        found[name] = said if said in allowed else official
    return found


class Another(ValueError):
    """What a file says of a model that is not run here, however whole it is."""


class Meta:
    """The keys and shapes of a file, asked for by name. All methods raise ValueError in words."""

    def __init__(self, gguf: Gguf) -> None:
        self.keys = gguf.keys
        self.shapes = {name: tensor.shape for name, tensor in gguf.tensors.items()}
        kind = self.keys.get("general.architecture")
        if kind != FAMILY:
            raise Another(f"its architecture is {str(kind)[:40]}, and {FAMILY} is run")

    def number(self, name: str, missing: Any = None) -> Any:
        """A number of the architecture; of a list, what all of it are."""
        value = self.keys.get(f"{FAMILY}.{name}")
        if isinstance(value, list):
            if not value or any(each != value[0] for each in value):
                raise ValueError(f"{name} differs between its layers")
            value = value[0]
        if value is None:
            return missing
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{FAMILY}.{name} is {str(value)[:40]!r}, and should be a number")
        return value

    def real(self, name: str, missing: Any = None) -> Any:
        """A number that was stored in 32 bits, as it was written down."""
        value = self.number(name, missing)
        return value if value is None else float(f"{value:.6g}")

    def whole(self, name: str, missing: int | None = None) -> int:
        value = self.number(name, missing)
        if value is None:
            raise ValueError(f"it lacks the key {FAMILY}.{name}")
        if not isinstance(value, int) or value < 0:
            raise ValueError(f"{FAMILY}.{name} is {value}, and should be a whole number")
        return value

    def agreed(self, name: str, from_shapes: int) -> int:
        """What the shapes say, where the key does not say something else."""
        if (said := self.whole(name, from_shapes)) != from_shapes:
            raise ValueError(f"{FAMILY}.{name} is {said:,}, and its tensors say {from_shapes:,}")
        return from_shapes

    def shape(self, name: str, dims: int) -> tuple[int, ...]:
        """Of a tensor that must be there."""
        shape = self.shapes.get(f"{name}.weight")
        if shape is None:
            raise ValueError(f"it lacks the tensor {name}.weight")
        if len(shape) != dims:
            raise ValueError(f"{name}.weight has the shape {list(shape)}, and should have {dims} dimensions")
        return shape

    def has(self, name: str) -> bool:
        return f"{name}.weight" in self.shapes


def config_of(meta: Meta) -> dict[str, Any]:
    """config.json without the ids of tokens, in the words of the official ones. Raises ValueError."""
    refuse_others(meta)
    layers = layers_of(meta)
    vocabulary, hidden = meta.shape("token_embd", 2)
    return {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "vocab_size": meta.agreed("vocab_size", vocabulary),
        "hidden_size": meta.agreed("embedding_length", hidden),
        "num_hidden_layers": layers,
        **attention_of(meta, layers),
        **experts_of(meta, layers),
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": not meta.has("output"),
        "max_position_embeddings": meta.whole("context_length"),
        "rms_norm_eps": meta.real("attention.layer_norm_rms_epsilon", 1e-6),
        "rope_theta": meta.real("rope.freq_base", 10000.0),
        "rope_scaling": rope_scaling_of(meta, layers),
        "torch_dtype": "bfloat16",
    }


def refuse_others(meta: Meta) -> None:
    """Models that share the architecture's name and compute something else: V3, and some that came after it.

    Raises ValueError.
    """
    if (gating := meta.whole("expert_gating_func", 0)) not in (0, 1):
        raise Another(f"expert_gating_func is {gating}, as in DeepSeek-V3; DeepSeek-V2 has softmax (1)")
    if any(".exp_probs_b" in name for name in meta.shapes):
        raise Another("its router adds a bias, as DeepSeek-V3's does")
    if meta.number("nextn_predict_layers", 0):
        raise Another("it predicts several tokens at once, as DeepSeek-V3 does")
    if meta.number("attention.temperature_scale", 0):
        raise Another("it scales attention by a temperature, which DeepSeek-V2 does not")
    for name in ("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor"):
        if meta.number(name, 1) != 1:
            raise Another(f"{FAMILY}.{name} is not 1")


def layers_of(meta: Meta) -> int:
    """How many there are. Raises ValueError where some are missing."""
    blocks = {int(found[1]) for name in meta.shapes if (found := BLOCK.fullmatch(name))}
    if not blocks:
        raise ValueError("it holds no layers")
    layers = meta.agreed("block_count", len(blocks))
    if not layers or max(blocks) != layers - 1:
        raise ValueError(f"its layers are not those from 0 to {layers - 1}")
    return layers


def attention_of(meta: Meta, layers: int) -> dict[str, Any]:
    """Raises ValueError."""
    rank = meta.agreed("attention.kv_lora_rank", meta.shape("blk.0.attn_kv_a_norm", 1)[0])
    rope = meta.agreed("rope.dimension_count", meta.shape("blk.0.attn_kv_a_mqa", 2)[0] - rank)
    heads = meta.whole("attention.head_count", {LITE: 16, LARGE: 128}.get(layers))
    compressed = meta.has("blk.0.attn_q_a")
    # Some files of V2-Lite name a rank and have no such tensor: the tensors say what is computed.
    query_rank = meta.shape("blk.0.attn_q_a", 2)[0] if compressed else None
    if query_rank is not None:
        meta.agreed("attention.q_lora_rank", query_rank)
    rows = meta.shape("blk.0.attn_q_b" if compressed else "blk.0.attn_q", 2)[0]
    columns = meta.shape("blk.0.attn_output", 2)[1]
    if not heads or rows % heads or columns % heads:
        raise ValueError(f"{heads} heads can not share {rows:,} rows of queries and {columns:,} of values")
    # Files that hold attn_k_b count what is cached in key_length, and name the heads' own length apart.
    apart = "_mla" if meta.has("blk.0.attn_k_b") else ""
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "q_lora_rank": query_rank,
        "kv_lora_rank": rank,
        "qk_rope_head_dim": rope,
        "qk_nope_head_dim": meta.agreed(f"attention.key_length{apart}", rows // heads) - rope,
        "v_head_dim": meta.agreed(f"attention.value_length{apart}", columns // heads),
    }


def experts_of(meta: Meta, layers: int) -> dict[str, Any]:
    """Dense layers, and those of experts. Raises ValueError."""
    dense = [layer for layer in range(layers) if not meta.has(f"blk.{layer}.ffn_gate_inp")]
    first = len(dense)
    if dense != list(range(first)):
        raise ValueError("a layer without experts follows one with experts")
    meta.agreed("leading_dense_block_count", first)
    width = meta.shape("blk.0.ffn_gate", 2)[0] if first else meta.whole("feed_forward_length")
    found: dict[str, Any] = {
        "intermediate_size": meta.agreed("feed_forward_length", width),
        "first_k_dense_replace": first,
        "moe_layer_freq": 1,
        "norm_topk_prob": meta.keys.get(f"{FAMILY}.expert_weights_norm", False),
    }
    if first == layers:
        return found | {"n_routed_experts": None, "n_shared_experts": None}
    block = f"blk.{first}"
    experts, _, inner = meta.shape(f"{block}.ffn_down_exps", 3)
    if meta.shape(f"{block}.ffn_gate_inp", 2)[0] != experts:
        raise ValueError(f"the router of layer {first} does not choose among its {experts} experts")
    shared = meta.shape(f"{block}.ffn_down_shexp", 2)[1] if meta.has(f"{block}.ffn_down_shexp") else 0
    if shared % inner:
        raise ValueError(f"shared experts of {shared:,} rows are no multiple of {inner:,}")
    scale = meta.real("expert_weights_scale", 16.0 if layers == LARGE else 1.0)
    return found | {
        "n_routed_experts": meta.agreed("expert_count", experts),
        "n_shared_experts": meta.agreed("expert_shared_count", shared // inner) or None,
        "moe_intermediate_size": meta.agreed("expert_feed_forward_length", inner),
        "num_experts_per_tok": meta.whole("expert_used_count", 6 if layers in (LITE, LARGE) else None),
        "routed_scaling_factor": scale or 1.0,  # 0 is how some say that there is none
        "scoring_func": "softmax",
        **groups_of(meta, layers, experts),
    }


def groups_of(meta: Meta, layers: int, experts: int) -> dict[str, Any]:
    """How the router's choice is limited. Raises ValueError.

    Most files do not say. The official models of 160 experts, V2, V2-Chat, Coder-V2 and V2.5, all have 8
    groups and choose from 3; the Lite ones have none.
    """
    groups, kept = (8, 3) if (layers, experts) == (LARGE, 160) else (1, 1)
    groups = meta.whole("expert_group_count", groups)
    kept = meta.whole("expert_group_used_count", min(kept, groups))
    method = "group_limited_greedy" if groups > 1 else "greedy"
    return {"topk_method": method, "n_group": groups or 1, "topk_group": kept if groups > 1 else 1}


def rope_scaling_of(meta: Meta, layers: int) -> dict[str, Any] | None:
    """Raises ValueError."""
    kind, factor = meta.keys.get(f"{FAMILY}.rope.scaling.type"), meta.real("rope.scaling.factor")
    if kind not in (None, "none", "linear", "yarn"):
        raise Another(f"rope.scaling.type is {str(kind)[:40]}, and none, linear and yarn are implemented")
    if kind in (None, "none"):
        return None
    if factor is None:
        raise ValueError(f"it lacks the key {FAMILY}.rope.scaling.factor")
    if kind == "linear":
        return {"type": kind, "factor": factor}
    # The first files lack the multiplier: they are V2's and Lite's, which have 0.707. In models that are none
    # of these it means that there is none.
    multiplier = meta.real("rope.scaling.yarn_log_multiplier", 0.0707 if layers in (LITE, LARGE) else 0.0)
    all_dim = float(f"{10 * multiplier:.6g}")
    return {
        "type": kind,
        "factor": factor,
        "original_max_position_embeddings": meta.whole("rope.scaling.original_context_length", 4096),
        "beta_fast": meta.real("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": meta.real("rope.scaling.yarn_beta_slow", 1.0),
        "mscale": all_dim or 1.0,  # of all official models the two are one number
        "mscale_all_dim": all_dim,
    }


class TokenList:
    """The vocabulary of a file. Raises ValueError for what can be none."""

    def __init__(self, meta: Meta, most: int) -> None:
        self.keys = meta.keys
        kind, split = self.key("model", "gpt2"), self.key("pre", "default")
        self.split = "deepseek-llm" if split == "default" else split  # what the first files say, or nothing
        if kind != "gpt2" or not isinstance(self.split, str) or self.split not in SPLITS:
            raise Another(f"its tokenizer is {str(kind)[:40]} / {str(split)[:40]}, which is none of V2's")
        self.tokens = self.texts("tokens")
        if not 0 < len(self.tokens) <= most:
            raise ValueError(f"it has {len(self.tokens):,} tokens, and embeddings of {most:,}")
        self.types = self.key("token_type", [NORMAL] * len(self.tokens))
        if not isinstance(self.types, list) or len(self.types) != len(self.tokens):
            raise ValueError("its tokens have types of another number")
        self.merges = self.texts("merges")
        self.ids = self.used()
        self.bos, self.eos = self.special("bos", BEGIN), self.special("eos", END)
        self.eot = self.special("eot", "")
        self.added = self.added_tokens()

    def key(self, name: str, missing: Any = None) -> Any:
        return self.keys.get(f"tokenizer.ggml.{name}", missing)

    def texts(self, name: str) -> list[str]:
        """A list of texts. Raises ValueError."""
        found = self.key(name)
        if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
            raise ValueError(f"it lacks the list tokenizer.ggml.{name}")
        return found

    def used(self) -> dict[str, int]:
        """Tokens and their ids, without those that only fill the vocabulary. Raises ValueError for two of one
        name.
        """
        ids: dict[str, int] = {}
        for number, (text, kind) in enumerate(zip(self.tokens, self.types, strict=True)):
            if kind == UNUSED or PADDING.fullmatch(text):
                continue
            if not text or text in ids:
                raise ValueError(f"its token {number:,} is {text[:40]!r}, which is empty or another's too")
            ids[text] = number
        return ids

    def special(self, name: str, text: str) -> int | None:
        """The id of a token with a role: as the key says, else by its official text. Raises ValueError."""
        number = self.key(f"{name}_token_id", self.ids.get(text))
        if number is None:
            return None
        known = type(number) is int and 0 <= number < len(self.tokens)
        if not known or self.ids.get(self.tokens[number]) != number:
            raise ValueError(f"its {name} token is {str(number)[:40]}, which is none of its tokens")
        return number

    def added_tokens(self) -> list[dict[str, Any]]:
        """Those that a text spells as a whole, whatever their type: early files type some of them as normal.
        Raises ValueError for merges of what is no token.
        """
        merged = set()
        for merge in self.merges:
            first, _, second = merge.partition(" ")
            if first not in self.ids or second not in self.ids or first + second not in self.ids:
                raise ValueError(f"{merge[:80]!r} merges what are no tokens")
            merged.add(first + second)
        never = {
            self.tokens[each] for each in (self.bos, self.eos, self.eot) if each is not None
        } | NEVER_TEXT
        found = []
        for text, number in self.ids.items():
            kind = self.types[number]
            mark = MARK.fullmatch(text) and text not in merged
            if mark or kind in (CONTROL, USER_DEFINED) or not BYTE_LETTERS.fullmatch(text):
                special = text in never or (kind == CONTROL and not mark)
                found.append(added(number, text, special))
        return found

    def json(self) -> dict[str, Any]:
        """tokenizer.json, as the official ones are. Added tokens are in the vocabulary too: only there can
        their ids have gaps.
        """
        splits = [
            {"type": "Split", "pattern": {"Regex": each}, "behavior": "Isolated", "invert": False}
            for each in SPLITS[self.split]
        ]
        digits = {"type": "Digits", "individual_digits": True}
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": self.added,
            "normalizer": {"type": "Sequence", "normalizers": []},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, digits, BYTE_LEVEL]},
            "post_processor": None if self.bos is None else begins(self.tokens[self.bos], self.bos),
            "decoder": BYTE_LEVEL | {"add_prefix_space": True, "use_regex": True},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "vocab": self.ids,
                "merges": self.merges,
            },
        }

    def settings(self, context: int) -> dict[str, Any]:
        """tokenizer_config.json. Raises ValueError for entries that can not be."""
        adds = self.key("add_bos_token", True)
        if not isinstance(adds, bool):
            raise ValueError(f"add_bos_token is {str(adds)[:40]}, and should be true or false")
        bos, eos = (None if each is None else self.tokens[each] for each in (self.bos, self.eos))
        found = {
            "add_bos_token": adds and bos is not None,
            "add_eos_token": False,
            "bos_token": bos,
            "eos_token": eos,
            "pad_token": eos,
            "clean_up_tokenization_spaces": False,
            "model_max_length": context,
            "tokenizer_class": "LlamaTokenizerFast",
        }
        template = self.keys.get("tokenizer.chat_template")
        if not isinstance(template, str | None):
            raise ValueError("its chat template is no text")
        return found if template is None else found | {"chat_template": template}


def added(number: int, text: str, special: bool) -> dict[str, Any]:
    """An entry of added_tokens."""
    around = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True}
    return {"id": number, "content": text, **around, "special": special}


def begins(token: str, number: int) -> dict[str, Any]:
    """A post-processor that puts a token before every text."""

    def part(letter: str, type_id: int) -> list[dict[str, Any]]:
        return [
            {"SpecialToken": {"id": token, "type_id": type_id}},
            {"Sequence": {"id": letter, "type_id": type_id}},
        ]

    return {
        "type": "TemplateProcessing",
        "single": part("A", 0),
        "pair": part("A", 0) + part("B", 1),
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }


def folder_of(path: Path) -> Path:
    """A folder with what settings_of gives for a GGUF file, made at its first use and kept in the cache;
    where nothing can be kept there it is gone with this process.

    Raises Dsv2Error.
    """
    files = [file.absolute() for file in parts_of(path)]
    try:
        folder = places.gguf_settings() / stamp_of(files)
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None
    if (folder / "config.json").is_file():
        return folder
    gguf = read_gguf(path)
    refuse_types(gguf)
    settings = settings_of(gguf)
    entry = {"quant_method": "gguf", "files": [str(file) for file in files], "stamp": folder.name}
    entry |= held_of(gguf)
    settings["config.json"]["quantization_config"] = entry
    try:
        forget_others(folder.parent)
        return keep(folder, settings)
    except OSError:
        pass
    try:
        return fill(places.temporary_folder(path.stem[:100]), settings)
    except OSError as error:
        raise Dsv2Error(f"What {path} says could not be kept", why=reason(error)) from None


def forget_others(root: Path) -> None:
    """Delete what was kept of files that are gone, or have changed. Raises OSError."""
    for folder in root.glob("[0-9a-f]" * 16):  # others are still being written
        with contextlib.suppress(Dsv2Error, KeyError, TypeError, ValueError, OSError):
            files = [Path(file) for file in read_json(folder / "config.json")["quantization_config"]["files"]]
            if all(file.exists() for file in files) and stamp_of(files) == folder.name:
                continue
            shutil.rmtree(folder)


def require_unchanged(entry: dict[str, Any], source: str) -> Path:
    """The GGUF file that a config.json was made from, which no other may name. Raises Dsv2Error."""
    files = entry.get("files")
    if isinstance(files, list) and files and all(isinstance(file, str) for file in files):
        with contextlib.suppress(OSError, ValueError):
            if stamp_of([Path(file) for file in files]) == entry.get("stamp"):
                return Path(files[0])
    raise Dsv2Error(
        f"{source} names no GGUF file that is as it was", why="it is gone or has changed", fix=AGAIN
    )


def stamp_of(files: list[Path]) -> str:
    """What changes when one of the files does. Raises OSError, and ValueError for a name that is no text."""
    lines = [f"form {FORM}"]
    for file in files:
        about = require_file(file)
        lines.append(f"{file} {about.st_size} {about.st_mtime_ns}")
    if not is_text(text := "\n".join(lines)):
        raise ValueError("its name is not UTF-8")
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def keep(folder: Path, settings: dict[str, Any]) -> Path:
    """The folder with these files in it, whole or not at all. Raises OSError."""
    places.private_folder(folder.parent)
    with places.unfinished(folder, folder=True) as made:
        fill(made, settings)
        try:
            os.rename(made, folder)
        except OSError:  # another process may have been first
            if not (folder / "config.json").is_file():
                raise
    return folder


def fill(folder: Path, settings: dict[str, Any]) -> Path:
    """The folder, with these files written. Raises OSError."""
    for name, content in settings.items():
        with (folder / name).open("w", encoding="utf-8") as file:
            file.write(json_text(content))
            file.flush()
            os.fsync(file.fileno())
    return folder
