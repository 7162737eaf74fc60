"""DeepSeek-V2 in one file: token ids in, hidden states and logits out.

The paper's two ideas, multi-head latent attention (section 2.1) and DeepSeekMoE (section 2.2), and nothing
else: the boxes are in layers.py, what all layers share in a pass in step.py, who computes which part in
share.py, and how it is run on a machine in run/. Modules and parameters carry the checkpoint's own names,
except that the routed experts of a layer are stacked. Sources: arXiv 2405.04434, and the official
modeling_deepseek.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dsv2cli.kernels import attention, experts
from dsv2cli.kernels.linear import linear
from dsv2cli.model.config import DeepseekV2Config
from dsv2cli.model.layers import MLP, Embedding, Experts, Head, Linear, Products, RMSNorm, SummedLinear
from dsv2cli.model.rope import RotaryTable, rotate, softmax_scale
from dsv2cli.model.share import Share
from dsv2cli.model.step import Step
from dsv2cli.team import ALONE, Team


class Attention(nn.Module):
    """Multi-head latent attention: of a token only the normed latent and one rotated key, shared by all
    heads, are kept.
    """

    def __init__(self, config: DeepseekV2Config, heads: int, team: Team) -> None:
        super().__init__()
        self.config, self.heads, self.scale = config, heads, softmax_scale(config)
        hidden, bias, eps = config.hidden_size, config.attention_bias, config.latent_norm_eps
        if config.q_lora_rank is None:
            self.q_proj = Linear(hidden, heads * config.qk_head_dim)
        else:
            self.q_a_proj = Linear(hidden, config.q_lora_rank, bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, eps)
            self.q_b_proj = Linear(config.q_lora_rank, heads * config.qk_head_dim)
        self.kv_a_proj_with_mqa = Linear(hidden, config.cached_dim, bias)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, eps)
        self.kv_b_proj = Linear(config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim))
        self.o_proj = SummedLinear(heads * config.v_head_dim, hidden, bias, team)

    def query(self, x: Tensor) -> Tensor:
        """x [tokens, hidden] -> [tokens, heads, nope + rope]"""
        config = self.config
        q = (
            self.q_proj(x)
            if config.q_lora_rank is None
            else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        )
        return q.unflatten(-1, (self.heads, config.qk_head_dim))

    def forward(self, x: Tensor, step: Step, layer: int) -> Tensor:
        """x [tokens, hidden] -> the same shape; the new tokens enter the pool."""
        config = self.config
        latent, k_rope = self.kv_a_proj_with_mqa(x).split(
            [config.kv_lora_rank, config.qk_rope_head_dim], dim=-1
        )
        # The rope key is shared by all heads, so it is kept once, not per head.
        k_rope = rotate(k_rope[:, None], step.rotary).squeeze(1)
        latents = torch.cat([self.kv_a_layernorm(latent), k_rope], dim=-1)
        step.remember(layer, latents)
        if not self.heads:  # a team's rank without heads keeps the latents like all others
            return self.o_proj(x[..., :0])

        q_nope, q_rope = self.query(x).split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1)
        q_rope = rotate(q_rope, step.rotary)
        kv_b = self.kv_b_proj.weight.unflatten(0, (self.heads, -1))  # [heads, nope + value, latent]
        mixed = []
        for tokens, rows, span, seen in step.sequences(layer, latents):
            each = (rows, span.count)
            q = (q_nope[tokens].unflatten(0, each), q_rope[tokens].unflatten(0, each))
            one = attention.attend(*q, seen, kv_b, self.scale, step.path, step.alike and span.whole)
            mixed.append(one.flatten(0, 1))  # [tokens, heads, value]
        return self.o_proj(torch.cat(mixed).flatten(-2))


class MoEGate(nn.Module):
    """The router. Its weight stays in fp32: bf16 router logits choose other experts on 2-25% of the rows."""

    def __init__(self, config: DeepseekV2Config) -> None:
        super().__init__()
        self.routing = experts.Routing(
            config.num_experts_per_tok or 0,
            *config.router_groups,
            config.norm_topk_prob,
            config.routed_scaling_factor,
        )
        shape = (config.n_routed_experts or 0, config.hidden_size)
        self.weight = nn.Parameter(torch.empty(shape, dtype=torch.float32))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [tokens, hidden] -> expert index and weight, both [tokens, top_k]"""
        with torch.autocast(x.device.type, enabled=False):  # training casts everything else down
            return experts.route(linear(x.float(), self.weight), self.routing)


class MoE(nn.Module):
    """DeepSeekMoE: a few routed experts a token, plus shared experts that every token passes through."""

    def __init__(self, config: DeepseekV2Config, share: Share, team: Team) -> None:
        super().__init__()
        self.gate = MoEGate(config)
        self.experts = Experts(config.hidden_size, config.moe_intermediate_size, share.experts)
        self.shared_experts = None
        if config.n_shared_experts is not None:
            self.shared_experts = MLP(config.hidden_size, len(share.shared))
        self.team = team

    def forward(self, x: Tensor) -> Tensor:
        """x [tokens, hidden] -> the same shape"""
        index, weight = self.gate(x)
        # The shared experts first: a GPU is busy with them while the CPU computes the experts that lie in its
        # memory.
        shared = None if self.shared_experts is None else self.shared_experts(x)
        routed = self.experts(x, index, weight)
        return self.team.sum(routed if shared is None else routed + shared)


class DenseMLP(MLP):
    """The feed-forward part of the first layers, summed over a team. x [tokens, hidden] -> the same shape"""

    def __init__(self, config: DeepseekV2Config, share: Share, team: Team) -> None:
        super().__init__(config.hidden_size, len(share.dense))
        self.team = team

    def forward(self, x: Tensor) -> Tensor:
        return self.team.sum(super().forward(x))


class Layer(nn.Module):
    """x + Attention(norm(x)), and on top of that x + MoE(norm(x)), or a dense MLP in the first layers."""

    def __init__(self, config: DeepseekV2Config, layer: int, share: Share, team: Team) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, len(share.heads), ALONE if team.sequences else team)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = (MoE if config.is_moe(layer) else DenseMLP)(config, share, team)

    @property
    def mlp_name(self) -> str:
        """What its second half is called where times are shown."""
        return "experts" if isinstance(self.mlp, MoE) else "dense layers"

    def forward(self, x: Tensor, step: Step, layer: int) -> Tensor:
        """x [tokens, hidden] -> the same shape"""
        mixed = step.watch("attention", lambda: self.attend(x, step, layer))
        return step.watch(self.mlp_name, lambda: self.feed(mixed, step))

    def attend(self, x: Tensor, step: Step, layer: int) -> Tensor:
        """The first half. x [tokens, hidden] -> the same shape"""
        if not len(x):  # none of the sequences is this rank's
            return x
        return x + self.self_attn(self.input_layernorm(x), step, layer)

    def feed(self, x: Tensor, step: Step) -> Tensor:
        """The second half. x [tokens, hidden] -> the same shape"""
        return x + step.for_all_tokens(self.mlp, self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """The part that the checkpoint calls `model`."""

    def __init__(self, config: DeepseekV2Config, share: Share, team: Team) -> None:
        super().__init__()
        self.embed_tokens = Embedding(share.vocab, config.hidden_size, team)
        self.layers = nn.ModuleList([Layer(config, i, share, team) for i in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class DeepseekV2(nn.Module):
    """The whole model, or one rank's part of it, of which all ranks make every call at once.

    `model(ids)` gives hidden states; `model.logits(hidden)` gives scores for the next token.
    """

    def __init__(self, config: DeepseekV2Config, shares: list[Share], team: Team = ALONE) -> None:
        """`shares` are every rank's, and this one's is shares[team.rank]."""
        super().__init__()
        self.config, self.shares, self.team = config, shares, team
        self.model = Decoder(config, self.share, team)
        self.lm_head = Head(config.hidden_size, [len(share.vocab) for share in shares], team)
        self.tie()
        self.rotary = RotaryTable(config)
        self.products: Products | None = None  # what the boxes compute with

    @property
    def share(self) -> Share:
        return self.shares[self.team.rank]

    @property
    def layers(self) -> list[Layer]:
        return list(self.model.layers)  # type: ignore[arg-type]

    def tie(self) -> None:
        """Where the config says so, the head is the embedding. To be done again when that gets new memory."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def compute_with(self, products: Products | None) -> None:
        """Give every box its faster kernel from now on, or take it away."""
        self.products = products
        for module in self.modules():
            if isinstance(module, Linear | MLP | Experts):
                module.compute_with(products)

    def forward(
        self, ids: Tensor, step: Step | None = None, layers: Callable[[Tensor, Step], Tensor] | None = None
    ) -> Tensor:
        """ids [tokens] of the step's spans -> hidden states after the last norm [tokens, hidden]

        Without a step they are one sequence from its beginning, of which nothing is kept. `layers` computes
        what run_layers does.
        """
        step = step or Step.apart(1, len(ids), self.rotary, ids.device)
        x = step.own_tokens(self.model.embed_tokens(ids))
        x = (layers or self.run_layers)(x, step)
        return self.model.norm(step.every_token(x))

    def run_layers(self, x: Tensor, step: Step) -> Tensor:
        """x [tokens, hidden] -> the same shape"""
        for i, layer in enumerate(self.model.layers):
            x = layer(x, step, i)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., hidden] -> scores for the next token [..., vocab] in fp32"""
        return self.lm_head(hidden)
