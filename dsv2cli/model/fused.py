"""A model's layers through the C++ kernels: which can, and what they are given."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Callable

import torch
from torch import Tensor

from dsv2cli.formats import GROUP, PACKED_BITS
from dsv2cli.kernels.native import AttentionPart, Kernels, LayerParts, MlpPart, matrix
from dsv2cli.kernels.quantized import Quantized
from dsv2cli.model.config import DeepseekV2Config
from dsv2cli.model.transformer import MLP, Attention, DeepseekV2, Experts, Layer, Linear, MoE, Step

FEW = 16  # tokens up to which absorbed attention is done in one call; more go through torch


class FusedLayers:
    """Layers through the kernels. The structures hold addresses: the weights must stay where they are."""

    def __init__(self, kernels: Kernels, model: DeepseekV2) -> None:
        self.kernels, self.model = kernels, model
        layers: list[Layer] = list(model.model.layers)  # type: ignore[arg-type]
        self.up = [up_projections(kernels, layer.self_attn) for layer in layers]
        parts = (
            LayerParts(attention_part(layer, *up), mlp_part(layer))
            for layer, up in zip(layers, self.up, strict=True)
        )
        self.parts = (LayerParts * len(layers))(*parts)
        for i, layer in enumerate(layers):
            layer.fused = FusedLayer(self, layer, i)

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        """All of them, in one call if the tokens are few. x [batch, seq, hidden]"""
        return self.run(self.parts, x, step) if self.take(x) else self.model.layers(x, step)

    @property
    def saved_bytes(self) -> int:
        """What a token reads less than kv_b_proj has."""
        stored = sum(layer.self_attn.kv_b_proj.weight.nbytes for layer in self.model.model.layers)  # type: ignore[union-attr,misc]
        return stored - sum(
            tensor.nbytes
            for pair in self.up
            for up in pair
            for tensor in (up.buffers() if isinstance(up, Quantized) else [up])
        )

    def take(self, x: Tensor) -> bool:
        return x.shape[0] * x.shape[1] <= FEW and self.model.absorbs

    def run(
        self, parts: ctypes.Array[LayerParts], x: Tensor, step: Step, first: int = 0, mlp: bool = True
    ) -> Tensor:
        """`parts` are those of layer `first` and the ones after it."""
        assert step.cache is not None
        batch, seq, _ = x.shape
        flat = x.flatten(0, 1).contiguous()
        caches = []
        for cache in step.cache.layers[first : first + len(parts)]:
            row = cache.stride(0) * cache.element_size()
            caches += [cache.data_ptr() + i * row for i in range(batch) for _ in range(seq)]
        lengths = (step.positions.flatten() + 1).int()
        self.kernels.layers(parts, flat, step.rotary.contiguous(), lengths, caches, mlp)
        return flat.view_as(x)


class FusedLayer:
    """One of them, in its two parts."""

    def __init__(self, layers: FusedLayers, layer: Layer, index: int) -> None:
        self.layers, self.layer = layers, layer
        self.parts = (LayerParts * 1)(layers.parts[index])

    def __call__(self, x: Tensor, step: Step, index: int) -> Tensor:
        return self.feed(self.attend(x, step, index), step)

    def attend(self, x: Tensor, step: Step, index: int) -> Tensor:
        if not self.layers.take(x):
            return self.layer.attend(x, step, index)
        return self.layers.run(self.parts, x, step, index, mlp=False)

    def feed(self, x: Tensor, step: Step) -> Tensor:
        flat = x.flatten(0, 1).contiguous()
        self.layers.kernels.mlp(self.parts, flat)
        return flat.view_as(x)


def up_projections(kernels: Kernels, attention: Attention) -> tuple[Tensor | Quantized, Tensor | Quantized]:
    """kv_b_proj as one token meets it: [heads, rank, nope], whose product is a query for the latent, and [heads, value, rank].

    They are in 8 bits where the rest of attention is packed: one token is bounded by the bytes it reads. Its own bf16 stays for many tokens.
    """
    config, like = attention.config, attention.o_proj.weight
    weight = attention.kv_b_proj.weight.unflatten(0, (attention.heads, -1))  # [heads, nope + value, rank]
    k_up, v_up = weight[:, : config.qk_nope_head_dim].mT, weight[:, config.qk_nope_head_dim :]
    if not isinstance(like, Quantized):
        return k_up.contiguous(), v_up
    return packed(kernels, k_up, like.group), packed(kernels, v_up, like.group)


def packed(kernels: Kernels, stack: Tensor, group: int) -> Quantized:
    """stack [count, rows, cols] -> the same in 8 bits."""
    out = Quantized(tuple(stack.shape), 8, group, 1, stack.device)
    for i, one in enumerate(stack):
        kernels.pack(one, out.bits, group, *out.part(i, 0), torch.get_num_threads())
    return out


def attention_part(layer: Layer, k_up: Tensor | Quantized, v_up: Tensor | Quantized) -> AttentionPart:
    attention: Attention = layer.self_attn
    config = attention.config
    low = config.q_lora_rank is not None
    return AttentionPart(
        layer.input_layernorm.weight.data_ptr(),
        attention.q_a_layernorm.weight.data_ptr() if low else None,
        attention.kv_a_layernorm.weight.data_ptr(),
        matrix(attention.q_a_proj.weight if low else None),
        matrix(attention.q_b_proj.weight if low else attention.q_proj.weight),
        matrix(attention.kv_a_proj_with_mqa.weight),
        matrix(k_up),
        matrix(v_up),
        matrix(attention.o_proj.weight),
        config.hidden_size,
        config.num_attention_heads,
        config.qk_nope_head_dim,
        config.qk_rope_head_dim,
        config.v_head_dim,
        config.kv_lora_rank,
        config.q_lora_rank or 0,
        layer.input_layernorm.eps,
        attention.scale,
    )


def mlp_part(layer: Layer) -> MlpPart:
    mlp, norm = layer.mlp, layer.post_attention_layernorm
    config = layer.self_attn.config
    if not isinstance(mlp, MoE):
        assert isinstance(mlp, MLP)
        dense = (None, None, mlp.gate_up_proj, mlp.down_proj)
        return MlpPart(
            norm.weight.data_ptr(),
            None,
            *map(matrix, dense),
            config.hidden_size,
            0,
            config.intermediate_size,
            0,
            0,
            0,
            0,
            0,
            norm.eps,
            1.0,
        )
    shared = mlp.shared_experts
    weights = (
        mlp.experts.gate_up_proj,
        mlp.experts.down_proj,
        shared.gate_up_proj if shared else None,
        shared.down_proj if shared else None,
    )
    return MlpPart(
        norm.weight.data_ptr(),
        mlp.gate.weight.data_ptr(),
        *map(matrix, weights),
        config.hidden_size,
        config.moe_intermediate_size,
        config.moe_intermediate_size * (config.n_shared_experts or 0),
        config.n_routed_experts or 0,
        config.num_experts_per_tok or 0,
        *config.router_groups,
        int(config.norm_topk_prob),
        norm.eps,
        config.routed_scaling_factor,
    )


def bare_part(config: DeepseekV2Config, gate_up: Tensor | Quantized, down: Tensor | Quantized) -> MlpPart:
    """An MLP, or a stack of experts, without norm and router."""
    experts = gate_up.shape[0] if len(gate_up.shape) == 3 else 0
    width = down.shape[-1]
    weights = (gate_up, down, None, None) if experts else (None, None, gate_up, down)
    return MlpPart(
        None,
        None,
        *map(matrix, weights),
        config.hidden_size,
        width if experts else 0,
        0 if experts else width,
        experts,
        config.num_experts_per_tok or 0,
        1,
        1,
        0,
        0.0,
        1.0,
    )


def feeder(kernels: Kernels, config: DeepseekV2Config, module: MLP | Experts) -> Callable[..., Tensor]:
    """The product of an MLP or of experts alone, for layers of which the kernels do not run the whole."""
    part = bare_part(config, module.gate_up_proj, module.down_proj)
    return lambda x, *chosen: kernels.feed(part, x, *chosen)


def refusal(config: DeepseekV2Config, device: torch.device, dtype: torch.dtype) -> str:
    """Why the kernels can not run such a model, as words to follow 'because'; empty if they can."""
    if device.type != "cpu":
        return f"the model is on {device.type}"
    if dtype != torch.bfloat16:
        return f"they compute in bfloat16, and the model is {str(dtype)[6:]}"
    if config.kv_lora_rank % 2:
        return "they read the latent in pairs, and kv_lora_rank is odd"
    return "they know no attention_bias" if config.attention_bias else ""


def triton_refusal(config: DeepseekV2Config, device: torch.device) -> str:
    """Why the Triton kernels can not run such a model, as words to follow 'because'; empty if they can."""
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the model is on {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return "they know no attention_bias" if config.attention_bias else ""


def use_kernels(
    model: DeepseekV2, kernels: Kernels | None, triton: bool = False, graphs: bool = False
) -> None:
    """Run layers and single products through the C++ `kernels` from now on, through the Triton ones, or through plain torch.

    With both, where experts lie in RAM, each runs what lies where it can; `graphs` makes CUDA graphs of whole decode steps.

    A team's layers, which sum between their parts, and experts that lie apart from the rest run product by product.
    """
    apart = model.experts_apart
    assert kernels is None or apart or not refusal(model.config, model.device, model.dtype)
    assert not triton or not triton_refusal(model.config, model.device)
    whole = not apart and model.team.size == 1
    for module in model.modules():
        if isinstance(module, MLP | Experts):
            module.product = None
            if (
                kernels is not None
                and not whole
                and module.down_proj.device.type == "cpu"
                and 0 not in module.down_proj.shape
            ):
                module.product = feeder(kernels, model.config, module)
        elif isinstance(module, Linear):
            fits = module.weight.device.type == "cpu" and 0 not in module.weight.shape and module.bias is None
            module.product = kernels.linear(module.weight) if kernels is not None and fits else None
        elif isinstance(module, Layer):
            module.fused = None
    model.steps, model.graphs, model.fused = False, False, None
    if kernels is not None and whole:
        model.fused = FusedLayers(kernels, model)
    if triton:
        from dsv2cli.model.gpu import use_gpu_kernels

        use_gpu_kernels(model, graphs)


def make_quantized(model: DeepseekV2, format: str, group: int = GROUP, only_experts: bool = False) -> None:
    """Put an empty Quantized in the place of every large weight that is read whole for a token, or of the routed experts.

    The head gets 8 bits always; embedding, kv_b_proj (which attention reads both ways), router and norms stay.
    """
    mlp, attention = PACKED_BITS[format]
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear):
            tied = module is model.lm_head and model.config.tie_word_embeddings
            leaves = (
                []
                if tied or name.endswith("kv_b_proj")
                else [("weight", 8 if module is model.lm_head else attention, 1)]
            )
        else:
            leaves = (
                [("gate_up_proj", mlp, 2), ("down_proj", mlp, 1)] if hasattr(module, "gate_up_proj") else []
            )
        if only_experts and not isinstance(module, Experts):
            continue
        for leaf, bits, parts in leaves:
            old = getattr(module, leaf)
            delattr(module, leaf)
            setattr(module, leaf, Quantized(tuple(old.shape), bits, group, parts, old.device))
