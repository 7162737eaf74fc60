"""DeepSeek-V2 in one file: token ids in, hidden states and logits out.

Modules and parameters carry the checkpoint's own names, except that the routed experts of a layer are stacked into
`experts.gate_up_proj` and `experts.down_proj`. It knows nothing of files, tokenizers or sampling.
Sources: the DeepSeek-V2 paper (arXiv 2405.04434, sections 2.1 and 2.2) and the official modeling_deepseek.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv2cli.kernels import attention, experts
from dsv2cli.kernels.linear import gated_mlp, linear, rms_norm
from dsv2cli.model.cache import LatentCache
from dsv2cli.model.config import DeepseekV2Config
from dsv2cli.model.rope import RotaryTable, rotate, softmax_scale
from dsv2cli.model.share import Share, share_of
from dsv2cli.team import ALONE, Team

ATTENTION_PATHS = ("auto", "absorbed", "expanded", "reference")


class Linear(nn.Module):
    """y = x W^T + b through kernels.linear, so that one row on a CPU takes the fast road."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.product: Callable[[Tensor], Tensor] | None = None  # a kernel, where one is in use

    def forward(self, x: Tensor) -> Tensor:
        if self.product is not None:
            return self.product(x)
        return linear(x, self.weight, self.bias)


class Embedding(nn.Module):
    """Rows of a table, of which a team's rank holds some. Unlike nn.Embedding it does not fill the table with random numbers."""

    def __init__(self, rows: range, size: int, team: Team) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(len(rows), size))
        self.rows, self.team = rows, team

    def forward(self, ids: Tensor) -> Tensor:
        if self.team.size == 1:
            return F.embedding(ids, self.weight)
        here = (ids >= self.rows.start) & (ids < self.rows.stop)
        found = F.embedding(torch.where(here, ids - self.rows.start, 0), self.weight)
        return self.team.sum(found.masked_fill(~here[..., None], 0))


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class MLP(nn.Module):
    """The dense feed-forward layer. gate_proj and up_proj are stored as one matrix and read in one go."""

    def __init__(self, config: DeepseekV2Config, width: int, team: Team = ALONE) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(2 * width, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(config.hidden_size, width))
        self.team = team
        self.product: Callable[[Tensor], Tensor] | None = None  # a kernel, where one is in use

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden] -> the same shape."""
        out = (
            gated_mlp(x, self.gate_up_proj, self.down_proj)
            if self.product is None
            else self.product(x.flatten(0, -2)).view_as(x)
        )
        return self.team.sum(out)


class Experts(nn.Module):
    """The routed experts of one layer that this rank holds, stacked."""

    def __init__(self, config: DeepseekV2Config, count: int) -> None:
        super().__init__()
        width = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * width, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(count, config.hidden_size, width))
        self.product: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None

    def forward(self, x: Tensor, index: Tensor, weight: Tensor, first: int) -> Tensor:
        """x [tokens, hidden], index and weight [tokens, k] -> [tokens, hidden]. The experts here are `first` and those after it."""
        if self.product is None:
            return experts.run_experts(x, index, weight, self.gate_up_proj, self.down_proj, first)
        index = index - first
        return self.product(
            x, torch.where((index >= 0) & (index < self.gate_up_proj.shape[0]), index, -1), weight
        )


class MoEGate(nn.Module):
    """The router. Its weight stays in fp32: bf16 router logits choose other experts on 2-25% of the rows."""

    def __init__(self, config: DeepseekV2Config) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(
            torch.empty(config.n_routed_experts or 0, config.hidden_size, dtype=torch.float32)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [tokens, hidden] -> expert index and weight, both [tokens, top_k]."""
        config = self.config
        with torch.autocast(x.device.type, enabled=False):  # training casts everything else down
            router_logits = linear(x.float(), self.weight)
        top_k, scaling = config.num_experts_per_tok or 0, config.routed_scaling_factor
        routing = experts.Routing(top_k, *config.router_groups, config.norm_topk_prob, scaling)
        return experts.route(router_logits, routing)


class MoE(nn.Module):
    """DeepSeekMoE: a few routed experts a token, plus shared experts that every token passes through."""

    def __init__(self, config: DeepseekV2Config, share: Share, team: Team) -> None:
        super().__init__()
        self.gate = MoEGate(config)
        self.experts = Experts(config, len(share.experts))
        self.first, self.team = share.experts.start, team
        self.apart = (
            False  # whether the routed experts lie in RAM and the rest on a GPU, or run as if they did
        )
        self.shared_experts = None
        if config.n_shared_experts is not None:
            self.shared_experts = MLP(config, len(share.shared))

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, seq, hidden] -> the same shape."""
        flat = x.flatten(0, 1)
        index, weight = self.gate(flat)
        # The shared experts first: a GPU is busy with them while the CPU computes the experts that lie in its memory.
        shared = None if self.shared_experts is None else self.shared_experts(flat)
        out = self.run_routed(flat, index, weight)
        return self.team.sum(out if shared is None else out + shared).view_as(x)

    def run_routed(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """Where the experts lie: the tokens go there, not the weights here."""
        home = self.experts.down_proj.device
        return self.experts(x.to(home), index.to(home), weight.to(home), self.first).to(x.device)


class Attention(nn.Module):
    """Multi-head latent attention. Only the normed latent and the rotated shared key are kept per token."""

    def __init__(self, config: DeepseekV2Config, heads: int, team: Team) -> None:
        super().__init__()
        self.config, self.heads, self.team = config, heads, team
        self.scale = softmax_scale(config)
        self.path = "auto"  # one of ATTENTION_PATHS
        hidden, bias = config.hidden_size, config.attention_bias
        if config.q_lora_rank is None:
            self.q_proj = Linear(hidden, heads * config.qk_head_dim)
        else:
            self.q_a_proj = Linear(hidden, config.q_lora_rank, bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, 1e-6)  # fixed in the official code
            self.q_b_proj = Linear(config.q_lora_rank, heads * config.qk_head_dim)
        self.kv_a_proj_with_mqa = Linear(hidden, config.cached_dim, bias)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, 1e-6)
        self.kv_b_proj = Linear(config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim))
        self.o_proj = Linear(heads * config.v_head_dim, hidden, bias)

    def forward(self, x: Tensor, step: Step, layer: int) -> Tensor:
        """x [batch, seq, hidden] -> the same shape; the new tokens enter the cache."""
        config = self.config
        latent, k_rope = self.kv_a_proj_with_mqa(x).split(
            [config.kv_lora_rank, config.qk_rope_head_dim], dim=-1
        )
        # The rope key is shared by all heads, so it is cached once, not per head.
        k_rope = rotate(k_rope[:, :, None], step.rotary).squeeze(2)
        cached = step.remember(layer, torch.cat([self.kv_a_layernorm(latent), k_rope], dim=-1))
        if not self.heads:  # a rank without heads keeps the cache like all others
            return self.merge(x[..., :0])
        q = (
            self.q_proj(x)
            if config.q_lora_rank is None
            else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        )
        q = q.unflatten(-1, (self.heads, config.qk_head_dim))  # [batch, seq, heads, nope + rope]
        q_nope, q_rope = q.split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1)
        out = attention.attend(
            q_nope,
            rotate(q_rope, step.rotary),
            cached,
            self.kv_b_proj.weight.unflatten(0, (self.heads, config.qk_nope_head_dim + config.v_head_dim)),
            lambda: step.mask,
            self.scale,
            self.path,
            step.start,
        )
        return self.merge(out.flatten(-2))

    @property
    def absorbs(self) -> bool:
        """Whether few new tokens take the absorbed path, the only one that kernels know."""
        return self.path in ("auto", "absorbed")

    def merge(self, out: Tensor) -> Tensor:
        """The heads' outputs [batch, seq, heads * value] -> hidden, summed over the ranks before the bias."""
        if self.team.size == 1:
            return self.o_proj(out)
        if not self.heads:
            part = out.new_zeros(*out.shape[:-1], self.config.hidden_size)
        else:
            part = self.o_proj(out) if self.o_proj.bias is None else linear(out, self.o_proj.weight)
        return self.team.sum(part) if self.o_proj.bias is None else self.team.sum(part) + self.o_proj.bias


class Layer(nn.Module):
    def __init__(self, config: DeepseekV2Config, layer: int, share: Share, team: Team) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, len(share.heads), ALONE if team.sequences else team)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.team = team
        self.mlp = MoE(config, share, team) if config.is_moe(layer) else MLP(config, len(share.dense), team)
        self.fused: Callable[[Tensor, Step, int], Tensor] | None = (
            None  # the whole layer by kernels, where in use
        )

    def forward(self, x: Tensor, step: Step, layer: int) -> Tensor:
        if self.fused is not None and step.cache is not None:
            return self.fused(x, step, layer)
        return self.feed(self.attend(x, step, layer), step)

    def attend(self, x: Tensor, step: Step, layer: int) -> Tensor:
        if not len(x):  # none of the sequences is this rank's
            return x
        return x + self.self_attn(self.input_layernorm(x), step, layer)

    def feed(self, x: Tensor, step: Step) -> Tensor:
        normed = self.post_attention_layernorm(x)
        if step.counts is None:
            return x + self.mlp(normed)
        # All ranks' tokens pass through each rank's experts, and come back summed.
        every = self.team.join(normed.flatten(0, 1), step.counts, dim=0)
        first = sum(step.counts[: self.team.rank])
        return x + self.mlp(every[None])[0, first : first + x.shape[0] * x.shape[1]].view_as(x)


class Step:
    """What all layers share in one forward pass: where the new tokens stand, their rotation, and what each may see.

    positions [batch, seq], rotary [batch, seq, 2, rope / 2]; all positions are below `length`. `start` is where the rows' new
    tokens begin, if that is one place for all; slots [batch] are the rows of the cache, if they are not its rows in order;
    counts are the new tokens of each rank, where ranks attend for sequences of their own, and the rest is about this rank's.
    """

    def __init__(
        self,
        positions: Tensor,
        rotary: Tensor,
        cache: LatentCache | None,
        length: int,
        start: int | None = None,
        slots: Tensor | None = None,
        counts: list[int] | None = None,
    ) -> None:
        self.positions, self.rotary, self.cache, self.length, self.start, self.slots = (
            positions,
            rotary,
            cache,
            length,
            start,
            slots,
        )
        self.counts = counts
        self.others: dict[torch.device, Step] = {}

    @functools.cached_property
    def mask(self) -> Tensor:
        return attention.visible(self.positions, self.length)

    @functools.cached_property
    def tokens(self) -> tuple[Tensor, Tensor]:
        """Position and row of the cache for each new token, in int32. Both [batch * seq]"""
        batch, seq = self.positions.shape
        slots = (
            torch.arange(batch, device=self.positions.device, dtype=torch.int32)
            if self.slots is None
            else self.slots
        )
        return self.positions.flatten().int(), slots.repeat_interleave(seq)

    def to(self, device: torch.device | int, **_: object) -> Step:
        """The same for layers on another device, copied there once. accelerate calls it before each such layer."""
        device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        if device == self.positions.device:
            return self
        if device not in self.others:
            self.others[device] = Step(
                self.positions.to(device), self.rotary.to(device), self.cache, self.length, self.start
            )
        return self.others[device]

    def remember(self, layer: int, rows: Tensor) -> Tensor:
        """Put the new tokens' rows into the cache; give back all rows up to now. [batch, past + seq, latent + rope]"""
        if self.cache is None:
            return rows
        self.cache.write(layer, self.positions, rows, self.start)
        return self.cache.layers[layer][:, : self.length]


class Decoder(nn.Module):
    """The part that the checkpoint calls `model`."""

    def __init__(self, config: DeepseekV2Config, share: Share, team: Team) -> None:
        super().__init__()
        self.embed_tokens = Embedding(share.vocab, config.hidden_size, team)
        self.layers = nn.ModuleList([Layer(config, i, share, team) for i in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class DeepseekV2(nn.Module):
    """The whole model, or one rank's part of it: then every call is made by all ranks at once.

    `model(ids, cache)` gives hidden states; `model.logits(hidden)` gives scores for the next token.
    """

    def __init__(self, config: DeepseekV2Config, team: Team = ALONE, group: int | None = None) -> None:
        super().__init__()
        self.config, self.team = config, team
        self.main: torch.device | None = None
        self.layer_devices: list[torch.device] = []
        share = share_of(config, team.rank, team.size, group, team.sequences)
        self.share = share
        self.model = Decoder(config, share, team)
        self.lm_head = Linear(config.hidden_size, len(share.vocab))
        shares = [share_of(config, rank, team.size, group, team.sequences) for rank in range(team.size)]
        self.vocab_widths = [len(share.vocab) for share in shares]
        self.heads_everywhere = all(share.heads for share in shares)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.rotary = RotaryTable(config)
        self.steps, self.graphs = (
            False,
            False,
        )  # whether layers run through kernels made for DecodeSteps, and those as CUDA graphs
        self.fused: Callable[[Tensor, Step], Tensor] | None = None  # all layers by kernels, where in use

    def run_on(self, main: torch.device, layers: list[torch.device]) -> None:
        """Say where layers are computed, where that is not where all the weights lie."""
        self.main, self.layer_devices = main, layers

    @property
    def device(self) -> torch.device:
        """Where ids go in and scores come out."""
        return self.main or self.model.embed_tokens.weight.device

    @property
    def devices(self) -> list[torch.device]:
        return self.layer_devices or [self.device] * self.config.num_hidden_layers

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embed_tokens.weight.dtype

    @property
    def experts_apart(self) -> bool:
        """Whether routed experts lie in RAM, or run as if they did."""
        return any(layer.mlp.apart for layer in self.model.layers if isinstance(layer.mlp, MoE))

    @property
    def stepwise(self) -> bool:
        """Whether decoding goes in DecodeSteps: they know one attention path."""
        return self.steps and self.absorbs

    @property
    def absorbs(self) -> bool:
        return self.model.layers[0].self_attn.absorbs  # type: ignore[union-attr,return-value]

    def use_attention(self, path: str) -> None:
        """Choose the attention path for all layers: one of ATTENTION_PATHS."""
        assert path in ATTENTION_PATHS, path
        for layer in self.model.layers:
            layer.self_attn.path = path  # type: ignore[union-attr,assignment]

    def new_cache(self, batch: int = 1) -> LatentCache:
        return LatentCache(self.config, batch, self.devices, self.dtype, *self.row_shares)

    @property
    def row_shares(self) -> tuple[int, int]:
        """Which part of a cache's rows is here: this rank among how many."""
        return (self.team.rank, self.team.size) if self.team.sequences else (0, 1)

    def together(self, cache: LatentCache, seq: int, rows: list[int]) -> AbstractContextManager[None]:
        """What a step of `seq` tokens for some rows is made in: a team's leader tells the others to make it, too."""
        return nullcontext()

    def forward(
        self, input_ids: Tensor, cache: LatentCache | None = None, new_tokens: list[int] | None = None
    ) -> Tensor:
        """input_ids [batch, seq] -> hidden states after the last norm [batch, seq, hidden].

        - Row i continues at cache.lengths[i]; rows may differ.
        - `new_tokens[i]` says how many of row i's ids are real (the rest is padding on the right); default all.
        - Without a cache nothing is kept, which is what training wants.
        """
        batch, seq = input_ids.shape
        starts, counts = [0] * batch, None
        if cache is not None:
            cache.reserve(max(cache.lengths) + seq)
            starts = [cache.lengths[row] for row in cache.own]
            counts = [len(part) * seq for part in cache.parts] if self.team.sequences else None
        positions = torch.tensor(starts, dtype=torch.long, device=input_ids.device)[:, None] + torch.arange(
            seq, device=input_ids.device
        )
        start, length = starts[0] if len(set(starts)) == 1 else None, max(starts, default=0) + seq
        step = Step(positions, self.rotary(positions, length), cache, length, start, counts=counts)
        hidden = self.run(input_ids, step)
        if cache is not None:
            cache.lengths = [
                old + new for old, new in zip(cache.lengths, new_tokens or [seq] * batch, strict=True)
            ]
        return hidden

    def run(self, input_ids: Tensor, step: Step) -> Tensor:
        """The same, with all that depends on where the tokens stand worked out already."""
        x = self.model.embed_tokens(input_ids)
        if step.counts is not None and step.cache is not None:
            x = x[step.cache.own.start : step.cache.own.stop]
        x = self.layers(x, step) if self.fused is None or step.cache is None else self.fused(x, step)
        if step.counts is not None:
            x = self.team.join(x.flatten(0, 1), step.counts, dim=0).view(*input_ids.shape, -1)
        return self.model.norm(x)

    def layers(self, x: Tensor, step: Step) -> Tensor:
        for i, layer in enumerate(self.model.layers):
            x = layer(x, step, i)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., hidden] -> scores [..., vocab] in fp32."""
        if self.team.size == 1:
            return self.lm_head(hidden).float().to(self.device)
        return self.team.join(
            self.lm_head(hidden).float().flatten(0, -2), self.vocab_widths, dim=1
        ).unflatten(0, hidden.shape[:-1])
