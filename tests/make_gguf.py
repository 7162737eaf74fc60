"""GGUF fixtures of tests/data/gguf, by llama.cpp's own tools: `pip install gguf`, llama-quantize in the PATH.

    python tests/make_gguf.py tests/data/golden/v2 OUT.gguf Q4_0 [old]   a golden checkpoint, in one type
    python tests/make_gguf.py random OUT.gguf Q4_K_M                     random weights, by llama-quantize
    python tests/make_gguf.py one FILE OUT.gguf                          one of its matrices alone
    python tests/make_gguf.py hashes FILE...                             what gguf itself decodes them to

`old` is the layout before 2025: one attn_kv_b, key_length 192 and so on.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import gguf
import torch
from safetensors import safe_open

RANDOM = {
    "vocab_size": 272,
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "kv_lora_rank": 256,
    "q_lora_rank": 256,
    "qk_nope_head_dim": 112,
    "qk_rope_head_dim": 16,
    "v_head_dim": 128,
    "n_routed_experts": 2,
    "n_shared_experts": 1,
    "num_experts_per_tok": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.0,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
}
MLP = (("gate", "gate_proj"), ("up", "up_proj"), ("down", "down_proj"))


def letters() -> list[str]:
    """The letters by which byte-level vocabularies write bytes; last the two that are in no UTF-8."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 256)]
    found = [chr(byte) for byte in plain] + [chr(256 + i) for i in range(256 - len(plain))]
    return sorted(found, key="\xfe\xff".find)


def random_weights(config: dict) -> dict[str, torch.Tensor]:
    """Weights of a tiny model whose columns are multiples of 256, which K-quants need."""
    torch.manual_seed(0)
    hidden, heads, rank = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    nope, rope, value = (config[key] for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    out = {}

    def add(name: str, *shape: int) -> None:
        out[f"{name}.weight"] = torch.randn(shape) * 0.1 if len(shape) > 1 else 1 + 0.1 * torch.randn(shape)

    add("model.embed_tokens", config["vocab_size"], hidden)
    add("lm_head", config["vocab_size"], hidden)
    add("model.norm", hidden)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        add(layer + "input_layernorm", hidden)
        add(layer + "post_attention_layernorm", hidden)
        add(layer + "self_attn.q_a_proj", config["q_lora_rank"], hidden)
        add(layer + "self_attn.q_a_layernorm", config["q_lora_rank"])
        add(layer + "self_attn.q_b_proj", heads * (nope + rope), config["q_lora_rank"])
        add(layer + "self_attn.kv_a_proj_with_mqa", rank + rope, hidden)
        add(layer + "self_attn.kv_a_layernorm", rank)
        add(layer + "self_attn.kv_b_proj", heads * (nope + value), rank)
        add(layer + "self_attn.o_proj", hidden, heads * value)
        mlps = ["mlp."]
        if i >= config["first_k_dense_replace"]:
            add(layer + "mlp.gate", config["n_routed_experts"], hidden)
            mlps = ["mlp.shared_experts.", *(f"mlp.experts.{e}." for e in range(config["n_routed_experts"]))]
        for mlp in mlps:
            for name in ("gate_proj", "up_proj"):
                add(layer + mlp + name, config["moe_intermediate_size"], hidden)
            add(layer + mlp + "down_proj", hidden, config["moe_intermediate_size"])
    return out


def write(config: dict, weights: dict[str, torch.Tensor], out: str, kind: str, old: bool) -> None:
    """A checkpoint as a GGUF file, with matrices in `kind` where their columns are whole blocks, else F16."""
    w = gguf.GGUFWriter(out, "deepseek2")
    add_keys(w, config, old)
    add_tokens(w, config["vocab_size"])
    type = gguf.GGMLQuantizationType[kind]

    def add(name: str, tensor: torch.Tensor, plain: bool = False) -> None:
        numbers = tensor.float().contiguous().numpy()
        if plain or numbers.ndim == 1:
            w.add_tensor(f"{name}.weight", numbers)
            return
        whole = numbers.shape[-1] % gguf.GGML_QUANT_SIZES[type][0] == 0
        taken = type if whole else gguf.GGMLQuantizationType.F16
        w.add_tensor(f"{name}.weight", gguf.quants.quantize(numbers, taken), raw_dtype=taken)

    add("token_embd", weights["model.embed_tokens.weight"])
    add("output_norm", weights["model.norm.weight"])
    if not config.get("tie_word_embeddings"):
        add("output", weights["lm_head.weight"])
    heads, rank = config["num_attention_heads"], config["kv_lora_rank"]
    nope, value = config["qk_nope_head_dim"], config["v_head_dim"]
    for i in range(config["num_hidden_layers"]):
        layer, block = f"model.layers.{i}.", f"blk.{i}."
        add(block + "attn_norm", weights[layer + "input_layernorm.weight"])
        add(block + "ffn_norm", weights[layer + "post_attention_layernorm.weight"])
        attention = layer + "self_attn."
        names = {"q_a_proj": "q_a", "q_a_layernorm": "q_a_norm", "q_b_proj": "q_b", "q_proj": "q"}
        names |= {"kv_a_proj_with_mqa": "kv_a_mqa", "kv_a_layernorm": "kv_a_norm", "o_proj": "output"}
        for ours, theirs in names.items():
            if f"{attention}{ours}.weight" in weights:
                add(f"{block}attn_{theirs}", weights[f"{attention}{ours}.weight"])
        kv_b = weights[attention + "kv_b_proj.weight"]
        if old:
            add(block + "attn_kv_b", kv_b)
        else:
            both = kv_b.view(heads, nope + value, rank)
            add(block + "attn_k_b", both[:, :nope].transpose(1, 2))
            add(block + "attn_v_b", both[:, nope:])
        if layer + "mlp.gate.weight" not in weights:
            for theirs, ours in MLP:
                add(f"{block}ffn_{theirs}", weights[f"{layer}mlp.{ours}.weight"])
            continue
        add(block + "ffn_gate_inp", weights[layer + "mlp.gate.weight"], plain=True)
        for theirs, ours in MLP:
            names = [f"{layer}mlp.experts.{e}.{ours}.weight" for e in range(config["n_routed_experts"])]
            add(f"{block}ffn_{theirs}_exps", torch.stack([weights[name] for name in names]))
            if config.get("n_shared_experts"):
                add(f"{block}ffn_{theirs}_shexp", weights[f"{layer}mlp.shared_experts.{ours}.weight"])
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def add_keys(w: gguf.GGUFWriter, config: dict, old: bool) -> None:
    heads, rank, rope = (config[k] for k in ("num_attention_heads", "kv_lora_rank", "qk_rope_head_dim"))
    key, value = config["qk_nope_head_dim"] + rope, config["v_head_dim"]
    w.add_name("fixture")
    w.add_block_count(config["num_hidden_layers"])
    w.add_context_length(config["max_position_embeddings"])
    w.add_embedding_length(config["hidden_size"])
    w.add_feed_forward_length(config["intermediate_size"])
    w.add_head_count(heads)
    w.add_head_count_kv(heads if old else 1)
    w.add_rope_freq_base(config.get("rope_theta", 10000.0))
    w.add_layer_norm_rms_eps(config["rms_norm_eps"])
    w.add_kv_lora_rank(rank)
    w.add_vocab_size(config["vocab_size"])
    if config.get("q_lora_rank"):
        w.add_q_lora_rank(config["q_lora_rank"])
    w.add_key_length(key if old else rank + rope)
    w.add_value_length(value if old else rank)
    if not old:
        w.add_key_length_mla(key)
        w.add_value_length_mla(value)
    w.add_rope_dimension_count(rope)
    w.add_leading_dense_block_count(config["first_k_dense_replace"])
    w.add_expert_count(config["n_routed_experts"])
    w.add_expert_used_count(config["num_experts_per_tok"])
    w.add_expert_feed_forward_length(config["moe_intermediate_size"])
    w.add_expert_weights_scale(config["routed_scaling_factor"])
    w.add_expert_weights_norm(config.get("norm_topk_prob", False))
    w.add_expert_shared_count(config["n_shared_experts"])
    if config.get("topk_method") == "group_limited_greedy":
        w.add_expert_group_count(config["n_group"])
        w.add_expert_group_used_count(config["topk_group"])
    if scaling := config.get("rope_scaling"):
        w.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        w.add_rope_scaling_factor(scaling["factor"])
        w.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
        w.add_rope_scaling_yarn_log_mul(0.1 * scaling["mscale_all_dim"])


def add_tokens(w: gguf.GGUFWriter, size: int) -> None:
    """A letter for each byte as far as there is room for them, one merge, and the two special tokens."""
    tokens = [*letters()[: size - 3], "ab", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"]
    unused = [f"[PAD{i}]" for i in range(size - len(tokens))]
    types = [1] * (len(tokens) - 2) + [3, 3] + [5] * len(unused)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("deepseek-llm")
    w.add_token_list(tokens + unused)
    w.add_token_types(types)
    w.add_token_merges(["a b"])
    w.add_bos_token_id(len(tokens) - 2)
    w.add_eos_token_id(len(tokens) - 1)
    w.add_add_bos_token(True)


def checkpoint(folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    weights = {}
    for file in folder.glob("model*.safetensors"):
        with safe_open(file, "pt") as opened:
            weights |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return json.loads((folder / "config.json").read_text()), weights


def one(path: str, out: str) -> None:
    """A file of one tensor."""
    tensor = next(each for each in gguf.GGUFReader(path).tensors if each.name == "blk.0.attn_output.weight")
    w = gguf.GGUFWriter(out, "deepseek2")
    w.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def hashes(path: Path) -> dict[str, str]:
    """SHA-256 of each tensor's numbers in fp32, as the gguf package decodes them."""
    return {
        tensor.name: hashlib.sha256(
            gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype("<f4").tobytes()
        ).hexdigest()
        for tensor in gguf.GGUFReader(path).tensors
    }


if __name__ == "__main__":
    source, *rest = sys.argv[1:]
    if source == "hashes":
        print(json.dumps({Path(path).name: hashes(Path(path)) for path in rest}, indent=1))
    elif source == "one":
        one(*rest)
    elif source == "random":
        out, kind = rest
        write(RANDOM, random_weights(RANDOM), f"{out}.f16", "F16", False)
        subprocess.run(["llama-quantize", f"{out}.f16", out, kind, "1"], check=True, stdout=sys.stderr)
        Path(f"{out}.f16").unlink()
    else:
        write(*checkpoint(Path(source)), rest[0], rest[1], "old" in rest)
