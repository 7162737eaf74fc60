"""A model through the C++ kernels: all layers of a step in one call, or product by product."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dsv2cli.formats import own_coding
from dsv2cli.kernels.latents import rotated
from dsv2cli.kernels.native import AttentionPart, Kernels, LayerParts, MlpPart, PageTables, matrix
from dsv2cli.kernels.quantized import Quantized
from dsv2cli.model.config import DeepseekV2Config
from dsv2cli.model.layers import MLP, ExpertProduct, OneProduct, Weight
from dsv2cli.model.step import Span, Step, unwatched
from dsv2cli.model.transformer import Attention, DeepseekV2, Layer, MoE
from dsv2cli.run.runner import PlainRunner

AHEAD = (None, "chosen", "guess")  # as cpu/mlp.h numbers them
FUSED_TOKENS = 64  # that look at the latents in one call


class CppRunner(PlainRunner):
    """A Runner whose layers are the kernels': whole ones where the model lies here alone; in a team each
    rank's attention, and otherwise products.
    """

    def __init__(
        self,
        model: DeepseekV2,
        kernels: Kernels,
        attention: str = "auto",
        apart: bool = False,
        cache: str = "auto",
        ahead: str | None = None,
    ) -> None:
        """`apart`: only the routed experts lie where the kernels run, or are to run as if they did.

        `ahead`: they are mapped, and the system is to be asked for those chosen, or by guess for those of the
        next layer, too.
        """
        super().__init__(model, attention, cache=cache)
        alone = not apart and model.team.size == 1
        assert apart or self.dtype == torch.bfloat16, "activations are bf16"
        self.use(CppProducts(kernels, model.config, mlps=not alone))
        self.fused = None if apart else FusedLayers(kernels, model, self.turned, ahead)

    @property
    def saved_bytes(self) -> int:
        return 0 if self.fused is None else self.fused.saved_bytes

    @property
    def alike(self) -> bool:
        return self.fused is not None and self.fused.whole and self.attention == "auto"

    def run_layers(self, x: Tensor, step: Step) -> Tensor:
        return super().run_layers(x, step) if self.fused is None else self.fused(x, step)


class CppProducts:
    """Products with what lies in RAM; `mlps`: those of whole MLPs and experts, too."""

    def __init__(self, kernels: Kernels, config: DeepseekV2Config, mlps: bool) -> None:
        self.kernels, self.config, self.mlps = kernels, config, mlps

    def linear(self, weight: Weight) -> OneProduct | None:
        return self.kernels.linear(weight) if lies_here(weight) else None

    def mlp(self, gate_up: Weight, down: Weight) -> OneProduct | None:
        return self.mlp_or_experts(gate_up, down)

    def experts(self, gate_up: Weight, down: Weight) -> ExpertProduct | None:
        return self.mlp_or_experts(gate_up, down)

    def mlp_or_experts(self, gate_up: Weight, down: Weight) -> Callable[..., Tensor] | None:
        """The product of an MLP or of a stack of experts, where it is wanted and there is something of it."""
        if not self.mlps or not lies_here(down):
            return None
        return partial(self.kernels.feed, bare_part(self.config, gate_up, down))


def lies_here(weight: Weight) -> bool:
    """Whether there is something of it, in RAM."""
    return weight.device.type == "cpu" and 0 not in weight.shape


class FusedLayers:
    """Layers through the kernels. The structures hold addresses: the weights must stay where they are."""

    def __init__(self, kernels: Kernels, model: DeepseekV2, turned: bool, ahead: str | None = None) -> None:
        """`turned`: latents lie in the pool rotated, and so must be what is multiplied with them.

        `ahead` as for CppRunner.
        """
        self.kernels, self.layers, self.whole = kernels, model.layers, model.team.size == 1
        self.team = model.layers[0].self_attn.o_proj.team  # over which heads are shared out
        self.heads = model.layers[0].self_attn.heads
        self.up = [up_projections(kernels, layer.self_attn, turned) for layer in self.layers if self.heads]
        self.attention = [
            attention_part(layer, *up) for layer, up in zip(self.layers, self.up, strict=self.heads > 0)
        ]
        mlps = [mlp_part(layer, ahead) for layer in self.layers if self.whole]
        parts = [LayerParts(*both) for both in zip(self.attention, mlps, strict=self.whole)]
        self.parts = (LayerParts * len(parts))(*parts)
        self.each = [(LayerParts * 1)(part) for part in parts]

    @property
    def saved_bytes(self) -> int:
        """Bytes a decode step saves by the 8-bit copy of kv_b_proj"""
        stored = sum(layer.self_attn.kv_b_proj.weight.nbytes for layer in self.layers)
        copies = [up for pair in self.up for up in pair]
        tensors = [t for up in copies for t in (up.buffers() if isinstance(up, Quantized) else [up])]
        return stored - sum(tensor.nbytes for tensor in tensors)

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        """All of them, in one call if the tokens are few. x [tokens, hidden] -> the same shape

        Whole pieces of a prompt, and where that is asked for everything, attend through torch.
        """
        x = x.contiguous()
        absorbs = step.path in ("auto", "absorbed")
        few = [i for i, span in enumerate(step.spans) if absorbs and not (span.whole and step.path == "auto")]
        all_few = len(few) == len(step.spans) and len(x) <= FUSED_TOKENS
        if self.whole and all_few and step.watch is unwatched:
            assert step.pool is not None
            self.kernels.layers(self.parts, x, *seen_by(step, step.pool.layers))
            return x
        many = [i for i in range(len(step.spans)) if i not in set(few)]
        pieces = [step.part(each) for each in slices(few, step.spans)]
        rest = step.part(many) if many else None
        for i, layer in enumerate(self.layers):
            x = step.watch("attention", partial(self.attend, i, x, rest, pieces))
            x = step.watch(layer.mlp_name, partial(self.feed, i, x, step))
        return x

    def attend(
        self, i: int, x: Tensor, rest: tuple[Step, Tensor] | None, pieces: list[tuple[Step, Tensor]]
    ) -> Tensor:
        """The first half of layer i: of `rest` through torch, of the `pieces` through the kernel.

        x [tokens, hidden] -> the same shape
        """
        if rest is not None:
            step, index = rest
            x[index] = self.layers[i].attend(x[index], step, i)
        for step, index in pieces:
            x[index] = self.attend_few(i, x[index], step)
        return x

    def attend_few(self, i: int, x: Tensor, step: Step) -> Tensor:
        """The same of a few tokens, through the kernel. In a team each rank adds what its heads give."""
        if not self.heads:  # it keeps the latents like all others
            return self.layers[i].attend(x, step, i)
        assert step.pool is not None
        to = x if self.team.size == 1 else torch.zeros_like(x)
        self.kernels.attention(self.attention[i], x, to, *seen_by(step, step.pool.layers[i : i + 1]))
        return to if self.team.size == 1 else x + self.team.sum(to)

    def feed(self, i: int, x: Tensor, step: Step) -> Tensor:
        """The second half of layer i. x [tokens, hidden], which may change in place"""
        if not self.whole:
            return self.layers[i].feed(x, step)
        self.kernels.mlp(self.each[i], x)
        return x


def seen_by(step: Step, layers: list[Tensor]) -> tuple[Tensor, Tensor, PageTables]:
    """Rotations, lengths and pages of a step's tokens in some layers of its pool, as kernels take them."""
    assert step.pool is not None
    spans = [(span.pages, span.count) for span in step.spans]
    tables = PageTables(layers, step.pool.bits, spans)
    return step.rotary.contiguous(), (step.positions + 1).int(), tables


def slices(chosen: list[int], spans: list[Span]) -> list[list[int]]:
    """The chosen spans in order, cut where more than FUSED_TOKENS tokens would come together; one that has
    more stays alone.
    """
    out, tokens = list[list[int]](), 0
    for i in chosen:
        if not out or tokens + spans[i].count > FUSED_TOKENS:
            out, tokens = [*out, []], 0
        out[-1].append(i)
        tokens += spans[i].count
    return out


def up_projections(kernels: Kernels, attention: Attention, turned: bool) -> tuple[Weight, Weight]:
    """kv_b_proj as one token meets it: [heads, rank, nope], whose product is a query for the latent, and
    [heads, value, rank].

    They are in 8 bits where the rest of attention is packed: one token is bounded by the bytes it reads. Its
    own bf16 stays for many tokens.
    """
    config, like = attention.config, attention.o_proj.weight
    weight = attention.kv_b_proj.weight.unflatten(0, (attention.heads, -1))  # [heads, nope + value, rank]
    weight = rotated(weight) if turned else weight
    k_up, v_up = weight[:, : config.qk_nope_head_dim].mT, weight[:, config.qk_nope_head_dim :]
    if not isinstance(like, Quantized):
        return k_up.contiguous(), v_up
    return packed(kernels, k_up, like.group), packed(kernels, v_up, like.group)


def packed(kernels: Kernels, stack: Tensor, group: int) -> Quantized:
    """stack [count, rows, cols] -> the same in 8 bits"""
    out = Quantized(tuple(stack.shape), own_coding(8, group), 1, stack.device)
    for i, one in enumerate(stack):
        kernels.pack(one, out.bits, group, *out.part(i, 0), torch.get_num_threads())
    return out


def attention_part(layer: Layer, k_up: Weight, v_up: Weight) -> AttentionPart:
    """Where the weights of a layer's attention lie, and its sizes."""
    attention, config = layer.self_attn, layer.self_attn.config
    low = config.q_lora_rank is not None
    return AttentionPart(
        norm=layer.input_layernorm.weight.data_ptr(),
        q_a_norm=attention.q_a_layernorm.weight.data_ptr() if low else None,
        kv_a_norm=attention.kv_a_layernorm.weight.data_ptr(),
        q_a=matrix(attention.q_a_proj.weight if low else None),
        q=matrix(attention.q_b_proj.weight if low else attention.q_proj.weight),
        kv_a=matrix(attention.kv_a_proj_with_mqa.weight),
        k_up=matrix(k_up),
        v_up=matrix(v_up),
        o=matrix(attention.o_proj.weight),
        hidden=config.hidden_size,
        heads=attention.heads,
        nope=config.qk_nope_head_dim,
        rope=config.qk_rope_head_dim,
        value=config.v_head_dim,
        rank=config.kv_lora_rank,
        q_rank=config.q_lora_rank or 0,
        eps=layer.input_layernorm.eps,
        scale=attention.scale,
    )


def mlp_part(layer: Layer, ahead: str | None = None) -> MlpPart:
    """Where the weights of a layer's MLP, or router and experts, lie, and their sizes."""
    mlp, norm, config = layer.mlp, layer.post_attention_layernorm, layer.self_attn.config
    part = MlpPart(norm=norm.weight.data_ptr(), eps=norm.eps, hidden=config.hidden_size, factor=1.0)
    if not isinstance(mlp, MoE):
        assert isinstance(mlp, MLP)
        part.shared_gate_up, part.shared_down = matrix(mlp.gate_up_proj), matrix(mlp.down_proj)
        part.shared_width = config.intermediate_size
        return part
    part.gate, part.ahead = mlp.gate.weight.data_ptr(), AHEAD.index(ahead)
    part.gate_up, part.down = matrix(mlp.experts.gate_up_proj), matrix(mlp.experts.down_proj)
    part.width, part.experts = config.moe_intermediate_size, config.n_routed_experts or 0
    if mlp.shared_experts is not None:
        shared = mlp.shared_experts
        part.shared_gate_up, part.shared_down = matrix(shared.gate_up_proj), matrix(shared.down_proj)
        part.shared_width = config.moe_intermediate_size * (config.n_shared_experts or 0)
    routing = mlp.gate.routing
    part.top_k, part.groups, part.top_groups = routing.top_k, routing.n_group, routing.topk_group
    part.normalise, part.factor = int(routing.norm_topk_prob), routing.scaling_factor
    return part


def bare_part(config: DeepseekV2Config, gate_up: Weight, down: Weight) -> MlpPart:
    """An MLP [rows, cols], or a stack of experts [count, rows, cols], without norm and router."""
    part = MlpPart(
        hidden=config.hidden_size, top_k=config.num_experts_per_tok or 0, groups=1, top_groups=1, factor=1.0
    )
    width = down.shape[-1]
    if len(gate_up.shape) == 3:
        part.gate_up, part.down, part.width, part.experts = (
            matrix(gate_up),
            matrix(down),
            width,
            gate_up.shape[0],
        )
    else:
        part.shared_gate_up, part.shared_down, part.shared_width = matrix(gate_up), matrix(down), width
    return part
