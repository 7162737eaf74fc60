"""A checkpoint with all that a checkpoint has, read in milliseconds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dsv2cli.checkpoint.found import Checkpoint
from dsv2cli.checkpoint.load import random_model
from dsv2cli.checkpoint.names import destinations
from dsv2cli.checkpoint.pack import quantize_checkpoint
from dsv2cli.errors import Dsv2Error
from dsv2cli.hubs.find import EMBEDDED
from dsv2cli.model.config import DeepseekV2Config
from dsv2cli.run.open import Opened, open_model
from dsv2cli.run.wish import Wish

WORDS = 300  # of the embedded model's vocabulary: its bytes, and the first that were merged
PLAIN = Wish(device="cpu", kernels="off", threads=1)
CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "vocab_size": WORDS + 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_shared_experts": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "topk_method": "group_limited_greedy",
    "routed_scaling_factor": 2.0,
    "norm_topk_prob": False,
    "moe_layer_freq": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    },
    "hidden_act": "silu",
    "scoring_func": "softmax",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": WORDS,
    "eos_token_id": WORDS + 1,
    "torch_dtype": "float32",
}
SETTINGS = {
    "bos_token_id": WORDS,
    "eos_token_id": [WORDS + 1],
    "do_sample": True,
    "temperature": 0.8,
    "top_p": 0.9,
    "top_k": 40,
    "repetition_penalty": 1.1,
}


class Silence:
    """A screen for nobody."""

    @contextmanager
    def loading(self, name: str, /) -> Iterator[None]:
        yield None

    def note(self, text: str, /) -> None:
        pass

    def last_words(self, error: Dsv2Error, /) -> None:
        pass


def make(folder: Path, shards: int) -> None:
    """Write the checkpoint as one file, or as several with an index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1))
    (folder / "generation_config.json").write_text(json.dumps(SETTINGS, indent=1))
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary(), ensure_ascii=False))
    settings = (EMBEDDED / "tokenizer_config.json").read_text(encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(settings, encoding="utf-8")
    torch.manual_seed(6)
    model = random_model(DeepseekV2Config.load(folder), torch.device("cpu"), torch.float32, None)
    for parameter in model.parameters():  # scores that differ enough for a wrong weight to be seen
        parameter.data.normal_(0, 0.3) if parameter.dim() > 1 else parameter.data.uniform_(0.5, 1.5)
    tensors = dict(destinations(model))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in list(tensors)[number::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def pack(whole: Path, folder: Path) -> None:
    """Write what `dsv2 quantize` makes of a checkpoint."""
    quantize_checkpoint(whole, folder, "int8", 32)


def vocabulary() -> dict[str, Any]:
    """The embedded model's tokenizer.json, of which the first words stay."""
    whole: dict[str, Any] = json.loads((EMBEDDED / "tokenizer.json").read_text(encoding="utf-8"))
    model = whole["model"]
    model["vocab"] = {word: number for word, number in model["vocab"].items() if number < WORDS}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in model["vocab"]]
    for number, token in enumerate(whole["added_tokens"]):
        token["id"] = WORDS + number
    special = whole["post_processor"]["special_tokens"]
    special[whole["added_tokens"][0]["content"]]["ids"] = [WORDS]
    return whole


def opened(folder: Path, found: Checkpoint | None = None) -> Opened:
    """The checkpoint, run by plain torch."""
    return open_model(str(folder), PLAIN, Silence(), found=found)
