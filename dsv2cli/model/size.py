"""How large a model is and what it reads per token, from its config alone. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from dsv2cli.model.config import DeepseekV2Config

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Part:
    """Parameters of one kind over all layers: how many there are, and how many one token at batch 1 reads."""

    name: str
    parameters: int
    read: int


def attention_parameters(config: DeepseekV2Config) -> int:
    """Multi-head latent attention of one layer with its two inner norms (paper section 2.1, appendix C)."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    if config.q_lora_rank is None:
        q = hidden * heads * config.qk_head_dim
    else:
        q = config.q_lora_rank * (hidden + 1 + heads * config.qk_head_dim)
    kv_a = hidden * config.cached_dim + config.kv_lora_rank
    kv_b = config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
    bias = config.cached_dim + hidden + (config.q_lora_rank or 0) if config.attention_bias else 0
    return q + kv_a + kv_b + heads * config.v_head_dim * hidden + bias


def parts(config: DeepseekV2Config) -> list[Part]:
    """All parameters by kind. A tied head adds none but is read whole; the embedding gives one row a token."""
    hidden, layers = config.hidden_size, config.num_hidden_layers
    moe = config.moe_layers
    routed, top_k = config.n_routed_experts or 0, config.num_experts_per_tok or 0
    expert = 3 * hidden * config.moe_intermediate_size
    table = config.vocab_size * hidden

    def whole(name: str, count: int) -> Part:
        return Part(name, count, count)

    listed = [
        Part("embedding", table, hidden),
        whole("attention", layers * attention_parameters(config)),
        whole("dense layers", (layers - moe) * 3 * hidden * config.intermediate_size),
        Part("routed experts", moe * routed * expert, moe * top_k * expert),
        whole("shared experts", moe * (config.n_shared_experts or 0) * expert),
        whole("router", moe * routed * hidden),
        whole("norms", (2 * layers + 1) * hidden),
        Part("head", 0 if config.tie_word_embeddings else table, table),
    ]
    return [part for part in listed if part.read]


def kv_bytes_per_token(config: DeepseekV2Config, dtype: str) -> int:
    """The latent and the rope key of every layer."""
    return config.num_hidden_layers * config.cached_dim * ITEM_BYTES[dtype]


def expanded_kv_bytes_per_token(config: DeepseekV2Config, dtype: str) -> int:
    """What full keys and values of every head would take."""
    return config.num_hidden_layers * config.expanded_dim * ITEM_BYTES[dtype]


def longest_context(config: DeepseekV2Config, dtype: str, memory_bytes: float) -> int:
    """Tokens whose cache fits beside the weights, at most what the model was made for; 0 where the weights do not fit.

    The working memory of a forward pass is not counted: leave it some room.
    """
    left = memory_bytes - sum(part.parameters for part in parts(config)) * ITEM_BYTES[dtype]
    return max(0, min(config.max_position_embeddings, int(left // kv_bytes_per_token(config, dtype))))


def decode_ceiling(config: DeepseekV2Config, dtype: str, bytes_per_second: float, context: int) -> float:
    """Tokens a second at batch 1 if reading each needed weight and the cache once were the only cost."""
    weights = sum(part.read for part in parts(config)) * ITEM_BYTES[dtype]
    return bytes_per_second / (weights + context * kv_bytes_per_token(config, dtype))
