"""Headers of GGUF files, whatever they say, and the settings of a model that follow from one."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import random
import struct
import time
from pathlib import Path
from typing import Any

import gguf_files
import numpy as np
import pytest
from conftest import DATA, ROOT, SHARED
from gguf_files import header_of, key_of, padded, tensor_of, text, write_gguf
from tokenizers import Tokenizer as FastTokenizer

from dsv2cli.checkpoint.tokenizer import Tokenizer
from dsv2cli.errors import Dsv2Error
from dsv2cli.hubs import gguf_settings
from dsv2cli.hubs.gguf import LARGEST, TYPES, Gguf, GgufTensor, architecture, read_gguf
from dsv2cli.hubs.gguf_settings import folder_of, settings_of
from dsv2cli.model.config import DeepseekV2Config

FAMILY = {"general.architecture": "deepseek2"}
F32, Q8_0 = 0, 8

OFFICIAL = {"temperature": 0.3, "top_p": 0.95}  # sampling, where a file names none


def small(path: Path, **changed: Any) -> Path:
    """A file with keys of many types and two tensors."""
    keys = {
        **FAMILY,
        "whole": 7,
        "real": 0.5,
        "large": (10, 2**63),
        "yes": True,
        "texts": ["a", "é", ""],
        "numbers": [1, 2, 3],
        "nested": (9, [["a"], ["b", "c"]]),
    }
    tensors = {
        "one.weight": (F32, (2, 3), struct.pack("<6f", *range(6))),
        "two.weight": (Q8_0, (2, 4, 32), bytes(range(8)) * 34),
    }
    return write_gguf(path, keys, tensors, **changed)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [1, 32, 4096])
def test_keys_and_places_are_those_that_were_written(tmp_path: Path, version: int, alignment: int) -> None:
    path = small(tmp_path / "m.gguf", version=version, alignment=alignment)
    found = read_gguf(path)
    assert found.path == path and found.keys["texts"] == ["a", "é", ""]
    assert found.keys["nested"] == [["a"], ["b", "c"]] and found.keys["large"] == 2**63
    assert found.keys["numbers"] == [1, 2, 3] and found.keys["yes"] is True and found.keys["real"] == 0.5
    two = found.tensors["two.weight"]
    assert (two.name, two.shape, two.type, two.file) == ("two.weight", (2, 4, 32), Q8_0, path)
    data = path.read_bytes()
    assert data[two.offset : two.offset + two.length] == bytes(range(8)) * 34
    one = found.tensors["one.weight"]
    assert np.frombuffer(data, "<f4", 6, one.offset).tolist() == list(range(6)) and one.length == 24
    assert architecture(path) == "deepseek2"


def test_a_file_of_another_writer_is_read() -> None:
    path = DATA / "gguf" / "header.gguf"  # written by llama.cpp's own Python package
    found = read_gguf(path)
    assert architecture(path) == "deepseek2"
    assert found.keys["tokenizer.ggml.tokens"] == ["a", "é", "<｜end▁of▁sentence｜>"]
    assert found.keys["some.numbers"] == [1.5, 2.5] and found.keys["some.negative"] == -3
    one, two = found.tensors["one.weight"], found.tensors["two.weight"]
    assert (one.shape, TYPES[one.type][0], two.shape, TYPES[two.type][0]) == ((2, 3), "F32", (2, 96), "Q8_0")
    data = path.read_bytes()
    assert np.frombuffer(data, "<f4", 6, one.offset).tolist() == list(range(6))
    assert data[two.offset : two.offset + two.length] == bytes(range(204))


def test_a_header_with_a_whole_vocabulary_is_read_in_no_time(tmp_path: Path) -> None:
    words = [f"Ġword{number}" for number in range(102400)]
    keys = FAMILY | {"tokens": words, "merges": [f"{each} x" for each in words], "types": [1] * 102400}
    path = write_gguf(tmp_path / "m.gguf", keys, {})
    start = time.perf_counter()
    found = read_gguf(path)
    assert time.perf_counter() - start < 2 and found.keys["tokens"] == words  # 0.1 on an idle machine


def split(folder: Path, **changed: Any) -> list[Path]:
    """A model in two files; the first has the keys. `changed` are keys of the second."""
    one = struct.pack("<6f", *range(6))
    about = {"split.count": (2, 2), "split.tensors.count": 2}
    keys = (
        FAMILY | about | {"split.no": (2, 0), "whole": 7},
        about | {"split.no": (2, 1)} | {name.replace("_", "."): value for name, value in changed.items()},
    )
    return [
        write_gguf(folder / f"m-0000{number + 1}-of-00002.gguf", each, {f"t{number}": (F32, (2, 3), one)})
        for number, each in enumerate(keys)
    ]


def test_any_part_of_a_split_file_leads_to_all(tmp_path: Path) -> None:
    files = split(tmp_path)
    for path in files:
        found = read_gguf(path)
        assert found.keys["whole"] == 7
        assert [tensor.file for tensor in found.tensors.values()] == files


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"split_no": (2, 0)}, "says that it is part 0 (from 0) of 2"),
        ({"split_count": (2, 3)}, "says that it is part 1 (from 0) of 3"),
        ({"split_count": ["x"]}, "says that it is part 1"),
        ({"whole": 8}, "its parts differ in the key whole"),
    ],
)
def test_parts_that_are_not_of_one_model_are_refused(tmp_path: Path, changed: Any, words: str) -> None:
    path = split(tmp_path, **changed)[0]
    with pytest.raises(Dsv2Error) as error:
        read_gguf(path)
    assert words in error.value.why


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    first, second = split(tmp_path)
    second.unlink()
    with pytest.raises(Dsv2Error, match=r"m-00002-of-00002\.gguf is missing"):
        read_gguf(first)
    lonely = first.rename(tmp_path / "lonely.gguf")
    with pytest.raises(Dsv2Error) as error:
        read_gguf(lonely)
    assert "part 0 (from 0) of 2" in error.value.why
    with pytest.raises(Dsv2Error) as error:
        read_gguf(tmp_path / "m-00003-of-00002.gguf")
    assert "part 3 of 2" in error.value.why


ARCHITECTURE = key_of("general.architecture", "deepseek2")
ONE = tensor_of("t", F32, (2, 3), 0)
FULL = 2**64 - 1


def raw_key(kind: int, value: bytes) -> bytes:
    return text("k") + struct.pack("<I", kind) + value


def raw_array(kind: int, count: int) -> bytes:
    return struct.pack("<IQ", kind, count)


def started(version: int = 3, tensors: int = 0, keys: int = 0, magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, keys) + bytes(64)


def deep(levels: int) -> bytes:
    return raw_key(9, raw_array(9, 1) * levels + raw_array(4, 0))


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "it has 0 bytes"),
    "short": (b"GGUF\3\0\0\0", "it has 8 bytes"),
    "another magic": (started(magic=b"GGML"), "does not begin with GGUF"),
    "version 1": (started(1), "its version is 1"),
    "version 4": (started(4), "its version is 4"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "many keys": (started(keys=FULL), "more than fit into the file"),
    "many tensors": (started(tensors=FULL), "more than fit into the file"),
    "too many keys": (started(keys=2**17) + bytes(2**21), "are too many"),
    "a long name": (header_of([struct.pack("<Q", FULL) + bytes(40)], []), "a name has"),
    "no name": (header_of([key_of("", 1)], []) + bytes(9), "a name has 0 bytes"),
    "a name of other bytes": (header_of([struct.pack("<Q", 2) + b"\xff\xfe" + bytes(40)], []), "not UTF-8"),
    "a long text": (header_of([raw_key(8, struct.pack("<Q", FULL))], []), "ends within its header"),
    "a token of other bytes": (
        header_of([raw_key(9, raw_array(8, 1) + struct.pack("<Q", 1) + b"\xff")], []),
        "not UTF-8",
    ),
    "half a character": (header_of([raw_key(8, struct.pack("<Q", 3) + b"\xed\xa0\x80")], []), "not UTF-8"),
    "a long array": (header_of([raw_key(9, raw_array(4, FULL))], []), "longer than the file"),
    "an array of texts": (header_of([raw_key(9, raw_array(8, 9) + bytes(64))], []), "longer than the file"),
    "a huge array": (
        header_of([raw_key(9, raw_array(0, 2**21 + 1) + bytes(2**21 + 1))], []),
        "hold more than",
    ),
    "an unknown value": (header_of([raw_key(13, bytes(8))], []), "no value has type 13"),
    "an array of it": (header_of([raw_key(9, raw_array(13, 0))], []), "no value has type 13"),
    "deep arrays": (header_of([deep(100)], []), "nested too deeply"),
    "a key twice": (header_of([ARCHITECTURE] * 2, []), "the key general.architecture twice"),
    "alignment 0": (header_of([key_of("general.alignment", 0)], []), "general.alignment is 0"),
    "alignment 3": (header_of([key_of("general.alignment", 3)], []), "no power of two"),
    "alignment text": (header_of([key_of("general.alignment", "32")], []), "no power of two"),
    "alignment 2**31": (header_of([key_of("general.alignment", 2**31)], []), "no power of two"),
    "a tensor twice": (padded(header_of([], [ONE, ONE]), 32) + bytes(64), "the tensor t twice"),
    "overlap": (
        padded(header_of([], [ONE, tensor_of("u", F32, (3,), 0)]), 32) + bytes(64),
        "t and u overlap",
    ),
    "behind the end": (padded(header_of([], [ONE]), 32) + bytes(8), "ends behind the end"),
    "far behind": (header_of([], [tensor_of("t", F32, (1,), 2**64 - 32)]) + bytes(99), "ends behind the end"),
    "no multiple": (header_of([], [tensor_of("t", F32, (1,), 4)]) + bytes(99), "multiple of 32 bytes"),
    "no dimension": (header_of([], [tensor_of("t", F32, (), 0)]) + bytes(99), "0 dimensions"),
    "five": (header_of([], [tensor_of("t", F32, (1,) * 5, 0)]) + bytes(99), "5 dimensions"),
    "an empty one": (header_of([], [tensor_of("t", F32, (1, 0), 0)]) + bytes(99), "has the shape [1, 0]"),
    "a large one": (header_of([], [tensor_of("t", F32, (FULL, 8), 0)]) + bytes(99), "has the shape"),
    "one that wraps": (header_of([], [tensor_of("t", F32, (2**32, 2**32), 0)]) + bytes(99), "the shape"),
    "half a block": (header_of([], [tensor_of("t", Q8_0, (2, 48), 0)]) + bytes(199), "blocks of 32"),
    "an unknown type": (header_of([], [tensor_of("t", 4, (32,), 0)]) + bytes(99), "type 4, which is unknown"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_is_refused_in_words(tmp_path: Path, case: str) -> None:
    data, words = HOSTILE[case]
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    with pytest.raises(Dsv2Error, match="is not a GGUF file that can be read") as error:
        read_gguf(path)
    assert words in error.value.why


def test_a_header_without_end_is_not_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(header_of([raw_key(8, struct.pack("<Q", 2**34))], []))
    os.truncate(path, 2**35)  # which takes no room
    with pytest.raises(Dsv2Error) as error:
        read_gguf(path)
    assert f"more than {LARGEST:,} bytes" in error.value.why


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.gguf")
    for path, words in (
        (tmp_path, "a folder"),
        (tmp_path / "fifo.gguf", "a FIFO"),
        (tmp_path / "no", "No such"),
    ):
        with pytest.raises(Dsv2Error, match="cannot be read") as error:
            read_gguf(path)
        assert words in error.value.why and architecture(path) == ""


def test_whatever_is_damaged_is_refused_or_read(tmp_path: Path) -> None:
    whole, chance, path = small(tmp_path / "whole.gguf").read_bytes(), random.Random(7), tmp_path / "m.gguf"
    special = [b"\0", b"\xff", b"\x7f", b"\xff" * 4, b"\xff" * 8, b"\0" * 8, struct.pack("<Q", 2**62)]
    outcomes = {"read": 0, "refused": 0}
    for _ in range(2000):
        data = bytearray(whole)
        for _ in range(chance.choice((1, 1, 2, 5))):
            at = chance.randrange(len(data))
            piece = chance.choice([*special, bytes([chance.randrange(256)])])
            data[at : at + chance.choice((len(piece), len(piece), 0))] = piece
        path.write_bytes(data[: chance.choice((len(data), len(data), chance.randrange(len(data))))])
        try:
            read_gguf(path)
            outcomes["read"] += 1
        except Dsv2Error as error:
            assert error.why
            outcomes["refused"] += 1
        assert architecture(path) in ("", "deepseek2") or len(architecture(path)) < 99
    assert outcomes["read"] > 100 and outcomes["refused"] > 500


def test_the_architecture_is_found_behind_other_keys_and_nothing_is_read_for_long(tmp_path: Path) -> None:
    sorted_keys = {"deepseek2.block_count": 2, **FAMILY, "tokenizer.ggml.tokens": ["a"]}
    assert architecture(write_gguf(tmp_path / "m.gguf", sorted_keys, {})) == "deepseek2"
    late = {"tokens": ["word"] * 30_000, **FAMILY}
    assert architecture(write_gguf(tmp_path / "m.gguf", late, {})) == ""
    assert architecture(write_gguf(tmp_path / "m.gguf", {"general.architecture": 3}, {})) == ""


# --- what a model's metadata says ---


def official(name: str) -> dict[str, Any]:
    return json.loads((DATA / "configs" / name / "config.json").read_text())


def coder_v2() -> dict[str, Any]:
    """Of DeepSeek-V2.5 and DeepSeek-Coder-V2: V2's, but for YaRN's magnitude."""
    config = official("DeepSeek-V2-Chat")
    return config | {"rope_scaling": config["rope_scaling"] | {"mscale": 1.0, "mscale_all_dim": 1.0}}


CONFIGS = {
    "Lite": lambda: official("DeepSeek-V2-Lite"),
    "V2": lambda: official("DeepSeek-V2-Chat"),
    "V2.5": coder_v2,
}


def float32(value: float) -> float:
    return struct.unpack("<f", struct.pack("<f", value))[0]


def keys_of(config: dict[str, Any], new: bool) -> dict[str, Any]:
    """The keys that llama.cpp's converter writes, before spring 2025 or after it."""
    c, scaling = config, config["rope_scaling"]
    head = c["qk_nope_head_dim"] + c["qk_rope_head_dim"]
    keys = {
        "block_count": c["num_hidden_layers"],
        "context_length": c["max_position_embeddings"],
        "embedding_length": c["hidden_size"],
        "feed_forward_length": c["intermediate_size"],
        "attention.head_count": c["num_attention_heads"],
        "attention.head_count_kv": 1 if new else c["num_attention_heads"],
        "rope.freq_base": float(c["rope_theta"]),
        "attention.layer_norm_rms_epsilon": float32(c["rms_norm_eps"]),
        "expert_used_count": c["num_experts_per_tok"],
        "leading_dense_block_count": c["first_k_dense_replace"],
        "vocab_size": c["vocab_size"],
        "attention.kv_lora_rank": c["kv_lora_rank"],
        "attention.key_length": c["kv_lora_rank"] + c["qk_rope_head_dim"] if new else head,
        "attention.value_length": c["kv_lora_rank"] if new else c["v_head_dim"],
        "expert_feed_forward_length": c["moe_intermediate_size"],
        "expert_count": c["n_routed_experts"],
        "expert_shared_count": c["n_shared_experts"],
        "expert_weights_scale": float(c["routed_scaling_factor"]),
        "rope.dimension_count": c["qk_rope_head_dim"],
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(scaling["factor"]),
        "rope.scaling.original_context_length": scaling["original_max_position_embeddings"],
        "rope.scaling.yarn_log_multiplier": float32(0.1 * scaling["mscale_all_dim"]),
    }
    if c["q_lora_rank"] is not None:
        keys["attention.q_lora_rank"] = c["q_lora_rank"]
    if new:
        keys |= {"attention.key_length_mla": head, "attention.value_length_mla": c["v_head_dim"]}
        keys |= {"rope.scaling.yarn_beta_fast": 32.0, "rope.scaling.yarn_beta_slow": 1.0}
        keys |= {"expert_group_count": c["n_group"], "expert_group_used_count": c["topk_group"]}
    return FAMILY | {f"deepseek2.{name}": value for name, value in keys.items()}


def shapes_of(config: dict[str, Any], new: bool, merged: bool = False) -> dict[str, tuple[int, ...]]:
    c, hidden, experts = config, config["hidden_size"], config["n_routed_experts"]
    heads, rank, nope, v = (
        c[name] for name in ("num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim")
    )
    width, shared = c["moe_intermediate_size"], c["moe_intermediate_size"] * c["n_shared_experts"]
    rows = heads * (nope + c["qk_rope_head_dim"])
    found: dict[str, tuple[int, ...]] = {
        "token_embd": (c["vocab_size"], hidden),
        "output_norm": (hidden,),
        "output": (c["vocab_size"], hidden),
    }
    for layer in range(c["num_hidden_layers"]):
        block: dict[str, tuple[int, ...]] = {
            "attn_norm": (hidden,),
            "ffn_norm": (hidden,),
            "attn_kv_a_mqa": (rank + c["qk_rope_head_dim"], hidden),
            "attn_kv_a_norm": (rank,),
            "attn_output": (hidden, heads * v),
        }
        if c["q_lora_rank"] is None:
            block["attn_q"] = (rows, hidden)
        else:
            block |= {"attn_q_a": (c["q_lora_rank"], hidden), "attn_q_b": (rows, c["q_lora_rank"])}
        if new:
            block |= {"attn_k_b": (heads, rank, nope), "attn_v_b": (heads, v, rank)}
        else:
            block["attn_kv_b"] = (heads * (nope + v), rank)
        if layer < c["first_k_dense_replace"]:
            block |= {f"ffn_{part}": (c["intermediate_size"], hidden) for part in ("gate", "up")}
            block["ffn_down"] = (hidden, c["intermediate_size"])
        else:
            block |= {"ffn_gate_inp": (experts, hidden), "ffn_down_exps": (experts, hidden, width)}
            block |= {f"ffn_{part}_shexp": (shared, hidden) for part in ("gate", "up")}
            block["ffn_down_shexp"] = (hidden, shared)
            if merged:
                block["ffn_gate_up_exps"] = (experts, 2 * width, hidden)
            else:
                block |= {f"ffn_{part}_exps": (experts, width, hidden) for part in ("gate", "up")}
        found |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    return {f"{name}.weight": shape for name, shape in found.items()}


SOME_TOKENS = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "deepseek-llm",
    "tokenizer.ggml.tokens": ["a", "b", "ab", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "[PAD5]"],
    "tokenizer.ggml.token_type": [1, 1, 1, 3, 3, 5],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.bos_token_id": 3,
    "tokenizer.ggml.eos_token_id": 4,
}


def described(keys: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> Gguf:
    path = Path("m.gguf")
    tensors = {name: GgufTensor(path, name, shape, F32, 0, 0) for name, shape in shapes.items()}
    return Gguf(path, SOME_TOKENS | keys, tensors)


def assert_official(found: dict[str, Any], config: dict[str, Any]) -> None:
    ids = {"bos_token_id": 100000, "eos_token_id": 100001}
    assert DeepseekV2Config.from_dict(found | ids) == DeepseekV2Config.from_dict(config)
    assert {name: config[name] for name in found if name not in ids} == {
        name: value for name, value in found.items() if name not in ids
    }


@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_config_is_the_official_one(name: str, new: bool) -> None:
    config = CONFIGS[name]()
    found = settings_of(described(keys_of(config, new), shapes_of(config, new, merged=new)))
    assert_official(found["config.json"], config)
    assert found["config.json"]["bos_token_id"] == 3
    assert found["generation_config.json"] == {"bos_token_id": 3, "eos_token_id": 4} | OFFICIAL


@pytest.mark.parametrize("folder", sorted((SHARED / "configs").glob("*")), ids=lambda folder: folder.name)
def test_the_config_is_that_of_each_release(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    found = settings_of(described(keys_of(config, True), shapes_of(config, True)))
    assert_official(found["config.json"], config)


@pytest.mark.parametrize("name", ["Lite", "V2"])
def test_what_early_files_lack_is_known_by_their_shapes_and_layers(name: str) -> None:
    config = CONFIGS[name]()
    kept = ("block_count", "context_length", "head_count", "rms_epsilon", "freq_base", "scaling.type")
    kept += ("architecture", "scaling.factor")
    keys = {key: value for key, value in keys_of(config, False).items() if key.endswith(kept)}
    assert_official(settings_of(described(keys, shapes_of(config, False)))["config.json"], config)


def test_a_model_of_another_size_without_the_multiplier_has_no_magnitude() -> None:
    config = official("DeepSeek-V2-Lite") | {"num_hidden_layers": 3}
    keys = keys_of(config, True)
    del keys["deepseek2.rope.scaling.yarn_log_multiplier"]
    scaling = settings_of(described(keys, shapes_of(config, True)))["config.json"]["rope_scaling"]
    assert (scaling["mscale"], scaling["mscale_all_dim"]) == (1.0, 0.0)


def test_an_output_that_is_not_there_is_the_embeddings() -> None:
    config = official("DeepSeek-V2-Lite")
    shapes = shapes_of(config, True)
    del shapes["output.weight"]
    assert settings_of(described(keys_of(config, True), shapes))["config.json"]["tie_word_embeddings"] is True


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another architecture": ({"general.architecture": "llama"}, "its architecture is llama"),
    "no architecture": ({"general.architecture": ["deepseek2"]}, "its architecture is ['deepseek2']"),
    "V3's gating": ({"deepseek2.expert_gating_func": 2}, "expert_gating_func is 2"),
    "next tokens": ({"deepseek2.nextn_predict_layers": 1}, "several tokens at once"),
    "experts": ({"deepseek2.expert_count": 63}, "expert_count is 63, and its tensors say 64"),
    "hidden": ({"deepseek2.embedding_length": 5120}, "embedding_length is 5,120"),
    "vocabulary": ({"deepseek2.vocab_size": 102401}, "vocab_size is 102,401"),
    "layers": ({"deepseek2.block_count": 28}, "block_count is 28"),
    "dense": ({"deepseek2.leading_dense_block_count": 2}, "leading_dense_block_count is 2"),
    "heads": ({"deepseek2.attention.head_count": 7}, "7 heads can not share"),
    "no heads": ({"deepseek2.attention.head_count": 0}, "0 heads can not share"),
    "head's length": ({"deepseek2.attention.key_length_mla": 128}, "key_length_mla is 128"),
    "rank": ({"deepseek2.attention.kv_lora_rank": 256}, "kv_lora_rank is 256"),
    "a list": ({"deepseek2.feed_forward_length": [1, 2]}, "differs between its layers"),
    "text": ({"deepseek2.block_count": "27"}, "should be a number"),
    "nan": ({"deepseek2.rope.freq_base": float("nan")}, "should be a number"),
    "half": ({"deepseek2.block_count": 27.5}, "should be a whole number"),
    "scaling": ({"deepseek2.rope.scaling.type": ["yarn"]}, "rope.scaling.type is ['yarn']"),
    "norm": ({"deepseek2.expert_weights_norm": 1}, "norm_topk_prob"),
    "top": ({"deepseek2.expert_used_count": 65}, "num_experts_per_tok"),
    "eps": ({"deepseek2.attention.layer_norm_rms_epsilon": -1.0}, "rms_norm_eps"),
    "tokenizer": ({"tokenizer.ggml.model": "llama"}, "its tokenizer is llama"),
    "pre": ({"tokenizer.ggml.pre": "deepseek-v3"}, "gpt2 / deepseek-v3"),
    "pre's type": ({"tokenizer.ggml.pre": ["x"]}, "its tokenizer is"),
    "no tokens": ({"tokenizer.ggml.tokens": None}, "lacks the list tokenizer.ggml.tokens"),
    "many tokens": ({"tokenizer.ggml.tokens": ["a"] * 102401}, "102,401 tokens"),
    "types": ({"tokenizer.ggml.token_type": [1]}, "types of another number"),
    "a token twice": ({"tokenizer.ggml.tokens": ["a", "b", "ab", "a", "e", "f"]}, "token 3 is 'a'"),
    "merges": ({"tokenizer.ggml.merges": ["a c"]}, "'a c' merges what are no tokens"),
    "bos": ({"tokenizer.ggml.bos_token_id": 6}, "its bos token is 6"),
    "eos": ({"tokenizer.ggml.eos_token_id": 5}, "its eos token is 5"),
    "adds": ({"tokenizer.ggml.add_bos_token": "no"}, "add_bos_token is no"),
    "template": ({"tokenizer.chat_template": 1}, "its chat template is no text"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_metadata_that_can_not_be_is_refused_in_words(case: str) -> None:
    changed, words = REFUSED[case]
    config = official("DeepSeek-V2-Lite")
    keys = keys_of(config, True) | changed
    with pytest.raises(Dsv2Error, match=r"m\.gguf") as error:
        settings_of(described(keys, shapes_of(config, True)))
    assert words in error.value.sentence


ODD = [
    0,
    -1,
    1,
    2**63,
    0.5,
    -0.0,
    float("nan"),
    float("inf"),
    1e38,
    "",
    "1",
    True,
    [],
    [1],
    [[]],
    ["a"],
    [1.5, 2],
]


def test_no_key_whatever_its_value_and_type_is_more_than_refused() -> None:
    config = official("DeepSeek-V2-Lite") | {"num_hidden_layers": 2}
    keys, shapes = keys_of(config, True), shapes_of(config, True)
    more = ("eot_token_id", "add_bos_token")
    names = {*keys, *SOME_TOKENS, "tokenizer.chat_template", *(f"tokenizer.ggml.{name}" for name in more)}
    names |= {"deepseek2.expert_weights_norm", "deepseek2.expert_gating_func"}
    for name, value in itertools.product(sorted(names), ODD):
        try:
            found = settings_of(described(keys | {name: value}, shapes))
        except Dsv2Error as error:
            assert "m.gguf" in error.what and error.why
        else:
            json.dumps(found, allow_nan=False)


def test_tensors_that_are_missing_or_of_another_form_are_refused_in_words() -> None:
    config = official("DeepSeek-V2-Lite")
    keys, shapes = keys_of(config, True), shapes_of(config, True)
    for name in (
        "token_embd",
        "blk.0.attn_q",
        "blk.0.attn_kv_a_norm",
        "blk.1.ffn_down_exps",
        "blk.0.ffn_gate",
    ):
        less = {each: shape for each, shape in shapes.items() if each != f"{name}.weight"}
        for changed in (less, shapes | {f"{name}.weight": (3, 3, 3, 3)}):
            with pytest.raises(Dsv2Error) as error:
                settings_of(described(keys, changed))
            assert f"{name}.weight" in error.value.why
    holed = {name: shape for name, shape in shapes.items() if not name.startswith("blk.5.")}
    with pytest.raises(Dsv2Error, match=r"m\.gguf can not be run"):
        settings_of(described(keys, holed))
    biased = shapes | {"blk.1.exp_probs_b.bias": (64,)}
    with pytest.raises(Dsv2Error) as error:
        settings_of(described(keys, biased))
    assert "adds a bias" in error.value.why


# --- its tokenizer ---


def official_tokenizers() -> list[bytes]:
    found = [gzip.decompress((DATA / "tokenizer" / "tokenizer.json.gz").read_bytes())]
    path = SHARED / "tokenizer" / "tokenizer.json"
    if path.is_file() and path.read_bytes() not in found:
        found.append(path.read_bytes())
    return found


MARKS = ["<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>", "<｜User｜>", "<｜Assistant｜>", "<|EOT|>"]


def token_keys(official: dict[str, Any], mark_type: int, gap: int = 0) -> dict[str, Any]:
    """The keys of an official tokenizer.json, with the marks that Coder-V2 adds, of a type; `gap` ids before
    them are padding.
    """
    size = 102400
    tokens, types = [f"[PAD{number}]" for number in range(size)], [5] * size
    for token, number in official["model"]["vocab"].items():
        tokens[number], types[number] = token, 1
    for entry in official["added_tokens"]:
        tokens[entry["id"]], types[entry["id"]] = entry["content"], 3
    for number, mark in enumerate(MARKS, 100002 + gap):
        tokens[number], types[number] = mark, mark_type
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "deepseek-llm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": official["model"]["merges"],
        "tokenizer.ggml.bos_token_id": 100000,
        "tokenizer.ggml.eos_token_id": 100001,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{{ bos_token }}{{ messages[0]['content'] }}",
    }


def lines() -> list[str]:
    """2,000 of code, Chinese, emoji, blanks and whatever Unicode has; none spells a mark of MARKS, which the
    official file that is compared with does not have.
    """
    chance = random.Random(11)
    sources = sorted((ROOT / "dsv2cli").rglob("*.py"))
    every = [line for path in sources for line in path.read_text().splitlines(keepends=True)]
    code = [line for line in every if not any(mark in line for mark in MARKS)]
    found = ["".join(chance.choices(code, k=chance.choice((1, 3)))) for _ in range(800)]
    ranges = [(0x4E00, 0x9FA5), (0x1F300, 0x1FAFF), (0x20, 0x7E), (0xA0, 0x24F), (0x3000, 0x30FF)]
    ranges += [(0xAC00, 0xD7FF), (0x370, 0x52F), (0x2000, 0x206F), (0xFF00, 0xFFEF), (0x10000, 0x1FFFF)]
    alphabets = [[chr(code) for code in range(first, last + 1)] for first, last in ranges]
    alphabets += [list(" \t\r\n\u00a0\u3000x1"), list("0123456789٣४½Ⅳ②. "), ["👩‍💻", "🇨🇳", "👍🏽", "é", " "]]
    for _ in range(1200):
        pieces = chance.choices(alphabets, k=chance.choice((1, 2, 3)))
        letters = itertools.chain.from_iterable(chance.choices(each, k=8) for each in pieces)
        text = list(letters)
        if chance.random() < 0.5:
            chance.shuffle(text)
        found.append("".join(text))
    return found


@pytest.mark.parametrize("data", official_tokenizers(), ids=lambda data: f"{len(data)}")
def test_the_tokenizer_is_the_official_one(data: bytes) -> None:
    whole = json.loads(data)
    keys = keys_of(official("DeepSeek-V2-Lite"), True) | token_keys(whole, 3)
    found = settings_of(described(keys, shapes_of(official("DeepSeek-V2-Lite"), True)))
    made = found["tokenizer.json"]
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        assert made[part] == whole[part]
    assert made["model"] | {"vocab": 0} == whole["model"] | {"vocab": 0}
    assert made["added_tokens"][:2] == whole["added_tokens"]
    ours, theirs = FastTokenizer.from_str(json.dumps(made)), FastTokenizer.from_str(data.decode())
    texts = lines()
    assert len(texts) == 2000
    for line in texts:
        ids = theirs.encode(line).ids
        assert ours.encode(line).ids == ids
        assert ours.decode(ids) == theirs.decode(ids)


@pytest.mark.parametrize(("kind", "gap"), [(1, 0), (3, 0), (4, 0), (1, 17)])
def test_marks_are_tokens_of_their_own_whatever_type_a_file_gives_them(
    tmp_path: Path, kind: int, gap: int
) -> None:
    whole = json.loads(official_tokenizers()[0])
    config = official("DeepSeek-V2-Lite")
    keys = (
        keys_of(config, True) | token_keys(whole, kind, gap) | {"tokenizer.ggml.eot_token_id": 100007 + gap}
    )
    found = settings_of(described(keys, shapes_of(config, True)))
    for name, content in found.items():
        (tmp_path / name).write_text(json.dumps(content))
    tokenizer = Tokenizer(tmp_path)
    text = f"{MARKS[1]}a = {MARKS[0]}\n{MARKS[2]}"
    ids = tokenizer.ids_of(text)
    assert [each - gap for each in ids if each > 100001] == [100003, 100002, 100004]
    assert tokenizer.decode(ids) == text  # as the official ones, which do not call them special
    assert not tokenizer.is_special(100005 + gap) and tokenizer.is_special(100007 + gap)
    assert tokenizer.is_special(100000) and tokenizer.bos_id == 100000 and tokenizer.adds_bos
    assert tokenizer.chat_template == keys["tokenizer.chat_template"]
    assert tokenizer.largest_id == 100007 + gap  # padding is no token
    assert found["generation_config.json"]["eos_token_id"] == [100001, 100007 + gap]


def test_a_coder_of_the_first_kind_splits_by_letters_and_punctuation() -> None:
    keys = keys_of(official("DeepSeek-V2-Lite"), True) | {"tokenizer.ggml.pre": "deepseek-coder"}
    made = settings_of(described(keys, shapes_of(official("DeepSeek-V2-Lite"), True)))["tokenizer.json"]
    split = FastTokenizer.from_str(json.dumps(made)).pre_tokenizer.pre_tokenize_str("ab (c)1 2\n一x")
    assert [piece for piece, _ in split] == ["ab", "Ġ(", "c", ")", "1", "Ġ", "2", "Ċ", "ä¸Ģ", "x"]


# --- the folder of a file ---


def tiny(path: Path, **changed: Any) -> Path:
    """A file of a tiny model, with weights of zeros."""
    config = official("DeepSeek-V2-Lite") | {
        **{"hidden_size": 8, "intermediate_size": 6, "moe_intermediate_size": 4, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "kv_lora_rank": 8},
        **{"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4, "vocab_size": 6},
    }
    tensors = {
        name: (F32, shape, bytes(4 * int(np.prod(shape)))) for name, shape in shapes_of(config, True).items()
    }
    return write_gguf(path, keys_of(config, True) | SOME_TOKENS | changed, tensors)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dsv2" / "gguf"


def test_a_files_folder_is_made_once_and_anew_when_the_file_changes(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny(tmp_path / "m.gguf")
    folder = folder_of(path)
    assert folder.parent == cache and [each.name for each in cache.iterdir()] == [folder.name]
    config = json.loads((folder / "config.json").read_text())
    entry = config["quantization_config"]
    assert (entry["quant_method"], entry["files"], entry["label"]) == ("gguf", [str(path)], "gguf F32")
    assert entry["bits_held"]["attention"] == 16
    assert {each.name for each in folder.iterdir()} == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    with monkeypatch.context() as nothing_read:
        nothing_read.setattr(gguf_settings, "read_gguf", None)
        assert folder_of(path) == folder
    tiny(path, **{"tokenizer.chat_template": "x"})
    again = folder_of(path)
    assert (
        again != folder and json.loads((again / "tokenizer_config.json").read_text())["chat_template"] == "x"
    )


def test_where_nothing_can_be_kept_a_files_folder_is_temporary(tmp_path: Path, cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text("no folder")
    folder = folder_of(tiny(tmp_path / "m.gguf"))
    assert cache not in folder.parents and (folder / "tokenizer.json").is_file()


def test_a_file_that_can_not_be_run_leaves_no_folder(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(Dsv2Error, match="can not be run"):
        folder_of(tiny(tmp_path / "m.gguf", **{"deepseek2.expert_gating_func": 2}))
    with pytest.raises(Dsv2Error, match="cannot be read"):
        folder_of(tmp_path / "none.gguf")
    assert not cache.exists()


def test_the_writer_of_these_tests_stores_types_as_they_are_asked_for() -> None:
    assert gguf_files.key_of("a", (2, 3)) == text("a") + struct.pack("<IH", 2, 3)
    assert gguf_files.key_of("a", -3) == text("a") + struct.pack("<Ii", 5, -3)
