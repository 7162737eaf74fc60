"""How large a model is and what it reads per token, from its config alone. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from dsv2cli.formats import CACHE_BITS, GROUP, ITEM_BYTES, LANES, PACKED_BITS, SUPER, latent_widths
from dsv2cli.model.config import DeepseekV2Config
from dsv2cli.model.share import Share, share_of

# DeepSeek 67B's keys and values in bf16: what the paper's 93.3% compares with, counting the latent in 6 bits.
DENSE_67B_KV_BYTES = 389_120


@dataclass(frozen=True)
class Part:
    """Numbers of one kind over all layers: how many there are, how many one token at batch 1 reads, and both
    in bytes.
    """

    name: str
    parameters: int
    read: int
    bytes: int
    read_bytes: int


STORED = ("mlp", "attention", "latent", "head")  # in the order of PACKED_BITS


@dataclass(frozen=True)
class Matrix:
    """`count` weights [rows, cols] of one part, of which a token reads `read`.

    `stored` is one of STORED (which differ in bits where packed), `query`, `plain`, or `router` (always
    fp32). `query`, the first projection of queries, is attention's, but a GPU reads it together with the
    latents', and so in as many bits.
    """

    part: str
    rows: int
    cols: int
    count: int
    read: int
    stored: str = "plain"
    halves: int = 1  # gate and up in one matrix are padded to whole blocks each

    def bytes_each(self, format: str, dtype: str, group: int, held: dict[str, float], gpu: bool) -> int:
        """`held`: bits of a weight by part, where another program has packed them."""
        if self.stored == "router":
            return 4 * self.rows * self.cols
        if self.part in held and (self.stored != "plain" or self.part == "embedding"):
            return math.ceil(self.rows * self.cols * held[self.part] / 8)
        if self.stored == "plain" or format not in PACKED_BITS:
            return ITEM_BYTES[dtype] * self.rows * self.cols
        stored = self.stored if self.stored != "query" else "latent" if gpu else "attention"
        bits = PACKED_BITS[format][STORED.index(stored)]
        blocks, groups = self.halves * -(-self.rows // self.halves // LANES), -(-self.cols // group)
        return blocks * groups * LANES * (group * bits // 8 + 2)  # a bf16 scale a group


def matrices(config: DeepseekV2Config, share: Share | None = None) -> Iterator[Matrix]:
    """All weights by kind, or those of a part, attention as in paper section 2.1 and appendix C."""
    share = share or share_of(config)
    hidden, layers, heads, moe = (
        config.hidden_size,
        config.num_hidden_layers,
        len(share.heads),
        config.moe_layers,
    )
    rank, low, width = config.kv_lora_rank, config.q_lora_rank, config.moe_intermediate_size
    shared, dense, tied = len(share.shared), len(share.dense), config.tie_word_embeddings

    def every(
        part: str, rows: int, cols: int, stored: str = "plain", halves: int = 1, count: int = layers
    ) -> Matrix:
        return Matrix(part, rows, cols, count, count, stored, halves)

    yield Matrix("embedding", 1, hidden, len(share.vocab), 1)
    if low is None:
        yield every("attention", heads * config.qk_head_dim, hidden, "query")
    else:
        yield every("attention", low, hidden, "query")
        yield every("attention", 1, low)
        yield every("attention", heads * config.qk_head_dim, low, "attention")
    yield every("attention", config.cached_dim, hidden, "latent")
    yield every("attention", 1, rank)
    yield every("attention", heads * (config.qk_nope_head_dim + config.v_head_dim), rank)
    yield every("attention", hidden, heads * config.v_head_dim, "attention")
    if config.attention_bias:
        yield every("attention", 1, config.cached_dim + hidden + (low or 0))
    yield every("dense layers", 2 * dense, hidden, "mlp", 2, layers - moe)
    yield every("dense layers", hidden, dense, "mlp", 1, layers - moe)
    chosen = config.num_experts_per_tok or 0
    yield Matrix("routed experts", 2 * width, hidden, moe * len(share.experts), moe * chosen, "mlp", 2)
    yield Matrix("routed experts", hidden, width, moe * len(share.experts), moe * chosen, "mlp")
    yield every("shared experts", 2 * shared, hidden, "mlp", 2, moe)
    yield every("shared experts", hidden, shared, "mlp", 1, moe)
    yield every("router", config.n_routed_experts or 0, hidden, "router", 1, moe)
    yield every("norms", 1, hidden, count=2 * layers + 1)
    yield Matrix(
        "head", len(share.vocab), hidden, 0 if tied else 1, 1, "plain" if tied else "head"
    )  # a tied one is read whole


def stored(
    config: DeepseekV2Config,
    format: str,
    dtype: str | None = None,
    group: int = GROUP,
    share: Share | None = None,
    gpu: bool = False,
) -> Iterator[tuple[Matrix, int]]:
    """Those of `parts` one by one, with the bytes of each."""
    dtype = dtype or (format if format in ITEM_BYTES else config.torch_dtype)
    group = config.packed.group if config.packed is not None else group
    held = config.held_bits(gpu) if format == own_format(config) else {}
    for matrix in matrices(config, share):
        yield matrix, matrix.bytes_each(format, dtype, group, held, gpu)


def parts(
    config: DeepseekV2Config,
    format: str = "bfloat16",
    dtype: str | None = None,
    group: int = GROUP,
    share: Share | None = None,
    gpu: bool = False,
) -> list[Part]:
    """All weights by kind, or those of a part, in `format`: a number format, or one of PACKED_BITS.

    What is not packed has `dtype`.
    """
    sums: dict[str, list[int]] = {}
    for m, size in stored(config, format, dtype, group, share, gpu):
        numbers = m.rows * m.cols
        adding = (m.count * numbers, m.read * numbers, m.count * size, m.read * size)
        sums[m.part] = [a + b for a, b in zip(sums.get(m.part, [0] * 4), adding, strict=True)]
    return [Part(name, *values) for name, values in sums.items() if values[0] or values[1]]


def weights_bytes(
    config: DeepseekV2Config,
    format: str,
    dtype: str | None = None,
    group: int = GROUP,
    share: Share | None = None,
    gpu: bool = False,
) -> int:
    return sum(part.bytes for part in parts(config, format, dtype, group, share, gpu))


def bytes_by_rank(
    config: DeepseekV2Config, format: str, dtype: str, size: int, sequences: bool = False, gpu: bool = False
) -> list[int]:
    """What the weights of each rank of a team take, in RAM or on GPUs; `sequences` as for share_of."""
    group = None
    if format in PACKED_BITS:
        group = config.packed.group if config.packed is not None else GROUP
    elif config.held_bits() and format == own_format(config):
        group = SUPER
    return [
        weights_bytes(config, format, dtype, share=share_of(config, rank, size, group, sequences), gpu=gpu)
        for rank in range(size)
    ]


def own_format(config: DeepseekV2Config) -> str:
    """What the checkpoint itself is in."""
    if config.foreign is not None:
        return config.foreign.label
    return config.torch_dtype if config.packed is None else config.packed.format


def kv_bytes_per_token(config: DeepseekV2Config, dtype: str, cache: str = "auto") -> int:
    """The latent and the rope key of every layer, in the format that --cache names."""
    if cache in CACHE_BITS:
        widths = latent_widths(CACHE_BITS[cache], config.kv_lora_rank, config.qk_rope_head_dim)
        return config.num_hidden_layers * sum(widths)
    item = ITEM_BYTES["bfloat16" if cache == "bf16" else dtype]
    return config.num_hidden_layers * config.cached_dim * item


def expanded_kv_bytes_per_token(config: DeepseekV2Config, dtype: str) -> int:
    """What full keys and values of every head would take."""
    return config.num_hidden_layers * config.expanded_dim * ITEM_BYTES[dtype]


@dataclass(frozen=True)
class Room:
    """What fits into a memory beside the weights.

    The working memory of a forward pass is not counted: leave it some room.
    """

    fits: bool
    longest_context: int  # tokens of one sequence, at most what the model was made for
    sequences: int  # of `context` tokens each
    context: int


def room(
    config: DeepseekV2Config, weights: int, dtype: str, memory_bytes: float, context: int, cache: str = "auto"
) -> Room:
    """`weights` in bytes; the activations are in `dtype`."""
    context = min(context, config.max_position_embeddings)
    left, each = max(0.0, memory_bytes - weights), kv_bytes_per_token(config, dtype, cache)
    longest = min(config.max_position_embeddings, int(left // each))
    return Room(memory_bytes >= weights, longest, int(left // (each * context)), context)


def decode_ceiling(
    config: DeepseekV2Config,
    format: str,
    dtype: str,
    bytes_per_second: float,
    context: int,
    cache: str = "auto",
) -> float:
    """Tokens a second at batch 1 if reading each needed weight and the cache once were the only cost."""
    weights = sum(part.read_bytes for part in parts(config, format, dtype))
    return bytes_per_second / (weights + context * kv_bytes_per_token(config, dtype, cache))


# Beside weights and cache: torch, the kernels' copies, a forward pass. V2-Lite has taken 220 MB at short
# prompts, 390 at 1,000 tokens and 530 at 3,000; larger models run in larger memories, of which it is a part.
PROCESS_BYTES, PROCESS_SHARE = 600 * 10**6, 1 / 16


@dataclass(frozen=True)
class FromDisk:
    """What to expect of weights that lie in a mapped file, of which memory holds a part.

    What every token needs is read from memory if it finds room there. Experts are taken to be chosen equally
    often, and those that were read last to stay.
    """

    memory_bytes: int
    kept_share: float  # of the routed experts' bytes there is room for
    hit_rate: float  # share of the routed experts' bytes read by a token that is found in memory
    missed_bytes_per_token: float
    disk_bytes_per_second: float | None
    tokens_per_second: float | None  # at batch 1

    @property
    def fits(self) -> bool:
        return self.kept_share == 1

    @property
    def holds_rest(self) -> bool:
        """Whether there is room for all that every token needs."""
        return self.kept_share > 0


def from_disk(
    config: DeepseekV2Config,
    format: str,
    dtype: str,
    memory_bytes: int,
    cache_bytes: int = 0,
    disk: float | None = None,
    memory: float | None = None,
) -> FromDisk:
    """`disk` and `memory` are bytes a second, where they are known."""
    listed = parts(config, format, dtype)
    always = sum(part.read_bytes for part in listed if part.name != "routed experts")
    routed, read = (
        sum(getattr(part, name) for part in listed if part.name == "routed experts")
        for name in ("bytes", "read_bytes")
    )
    room = memory_bytes - max(PROCESS_BYTES, memory_bytes * PROCESS_SHARE) - cache_bytes - always
    kept = float(room >= 0) if not routed else min(1.0, max(0.0, room / routed))
    hit = hits_of_last_read(kept, read / routed) if routed else 1.0
    missed = read * (1 - hit) + (always if room < 0 else 0)
    rate = None
    if disk is not None and missed:
        rate = 1 / (missed / disk + (0 if memory is None else (read + always) / memory))
    return FromDisk(memory_bytes, kept, hit, missed, disk, rate)


def hits_of_last_read(kept: float, chosen: float) -> float:
    """Share of experts found in memory that holds a share `kept` of them, those of the last tokens, where
    each token reads a share `chosen` at random.

    The last d tokens have read 1 - (1 - chosen)^d of all experts; what was read longer ago is gone. Where
    even one token reads more than there is room for, nothing is found.
    """
    if kept == 1 or chosen == 1:
        return float(kept == 1)
    tokens = int(math.log(1 - kept) / math.log(1 - chosen))
    return 1 - (1 - chosen) ** tokens


# What a step on GPUs is made of beside reading. From what others have published, not measured by us: the part
# of the memory's
# bandwidth that a good kernel reaches, starting one within a CUDA graph, and a small sum over the GPUs of one
# machine.
REACHED = 0.85
LAUNCH_SECONDS = 1.3e-6
SUM_SECONDS = 8e-6
LAUNCHES = 11  # kernels a layer at one token, with q_lora
SUMS = 2  # a layer


def busiest_share(config: DeepseekV2Config, ranks: int) -> float:
    """Expected share of a token's experts on the busiest rank, over even routing.

    Where a rank holds whole groups of a group-limited router, a token's experts are in `topk_group` groups at
    most.
    """
    top_k = config.num_experts_per_tok or 0
    groups, top_groups = config.router_groups
    bins = min(ranks, top_groups) if groups % ranks == 0 else ranks

    def at_most(most: int) -> float:
        """The chance that no rank has more than `most`: of k things in b bins, k! / b^k times a coefficient
        of (sum of x^i / i!)^b.
        """
        one = [1 / math.factorial(i) if i <= most else 0.0 for i in range(top_k + 1)]
        power = [1.0] + [0.0] * top_k
        for _ in range(bins):
            power = [sum(power[i] * one[n - i] for i in range(n + 1)) for n in range(top_k + 1)]
        return power[top_k] * math.factorial(top_k) / bins**top_k

    return sum(1 - at_most(most) for most in range(top_k)) / top_k


def predicted_step_seconds(
    config: DeepseekV2Config, format: str, dtype: str, ranks: int, bytes_per_second: float
) -> float:
    """One token at batch 1 and a short context on `ranks` GPUs that share the model: a prediction, not a
    measurement.
    """
    read = {part.name: part.read_bytes for part in parts(config, format, dtype)}
    alone = sum(read.get(name, 0) for name in ("router", "norms"))  # on every rank
    routed = read.get("routed experts", 0) * (busiest_share(config, ranks) if ranks > 1 else 1)
    split = sum(read.values()) - alone - read.get("routed experts", 0)
    layers = config.num_hidden_layers
    moving = (alone + routed + split / ranks) / (REACHED * bytes_per_second)
    return moving + layers * (LAUNCHES * LAUNCH_SECONDS + (SUMS * SUM_SECONDS if ranks > 1 else 0))
