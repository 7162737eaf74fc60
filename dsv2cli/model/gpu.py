"""A model's layers through the Triton kernels, and a decode step as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from dsv2cli.kernels.quantized import Quantized
from dsv2cli.kernels.triton import attention as gpu_attention
from dsv2cli.kernels.triton import experts as gpu_experts
from dsv2cli.kernels.triton import linear as gpu_linear
from dsv2cli.kernels.triton.linear import Table, table
from dsv2cli.model.cache import LatentCache
from dsv2cli.model.transformer import MLP, Attention, DeepseekV2, Experts, Layer, Linear, MoE, Step

FEW = 8  # new tokens of a row up to which attention is absorbed; more are a prefill
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)  # rows for which graphs are made; steps between are filled up


class GpuLayer:
    """One layer in ten kernels for one token (eleven with q_lora). The input is overwritten by the output."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        attention: Attention = layer.self_attn
        config = attention.config
        self.shape = gpu_attention.Shape(
            attention.heads,
            config.qk_nope_head_dim,
            config.qk_rope_head_dim,
            config.v_head_dim,
            config.kv_lora_rank,
            attention.scale,
        )
        low = config.q_lora_rank is not None
        self.first_q = table((attention.q_a_proj if low else attention.q_proj).weight)
        self.q_b = table(attention.q_b_proj.weight) if low else None
        self.kv_a, self.o = table(attention.kv_a_proj_with_mqa.weight), table(attention.o_proj.weight)
        self.mlp = feed_of(layer)
        self.first = layer.mlp.first if isinstance(layer.mlp, MoE) else 0

    def __call__(self, x: Tensor, step: Step, index: int) -> Tensor:
        return self.feed(self.attend(x, step, index), step)

    def attend(self, x: Tensor, step: Step, index: int) -> Tensor:
        attention = self.layer.self_attn
        if x.shape[1] > FEW or not attention.absorbs:
            return self.layer.attend(x, step, index)
        assert step.cache is not None
        flat, norm = x.flatten(0, 1), self.layer.input_layernorm
        both = gpu_linear.linear(flat, self.first_q, self.kv_a, norm.weight, norm.eps)
        q, kv = both.split([self.first_q.rows, self.kv_a.rows], dim=1)
        if self.q_b is not None:
            q = gpu_linear.linear(
                q.contiguous(), self.q_b, None, attention.q_a_layernorm.weight, attention.q_a_layernorm.eps
            )
        positions, slots = step.tokens
        out = gpu_attention.attend(
            q,
            kv,
            attention.kv_a_layernorm.weight,
            attention.kv_b_proj.weight,
            step.rotary.flatten(0, 1),
            positions,
            slots,
            step.cache.layers[index],
            self.shape,
        )
        if attention.team.size > 1:
            return x + attention.team.sum(gpu_linear.linear(out, self.o)).view_as(x)
        return gpu_linear.linear(out, self.o, residual=flat).view_as(x)

    def feed(self, x: Tensor, step: Step) -> Tensor:
        flat, team = x.flatten(0, 1), self.layer.self_attn.team
        if team.size > 1:
            return x + team.sum(gpu_experts.run(flat, self.mlp, torch.zeros_like(flat), self.first)).view_as(
                x
            )
        return gpu_experts.run(flat, self.mlp, flat).view_as(x)


def feed_of(layer: Layer) -> gpu_experts.Feed:
    norm, mlp, config = layer.post_attention_layernorm, layer.mlp, layer.self_attn.config
    if not isinstance(mlp, MoE):
        assert isinstance(mlp, MLP)
        return gpu_experts.Feed(
            norm.weight,
            norm.eps,
            None,
            gpu_experts.NO_ROUTING,
            None,
            None,
            part(mlp.gate_up_proj),
            part(mlp.down_proj),
        )
    top_k = config.num_experts_per_tok or 0
    routing = gpu_experts.Routing(
        config.n_routed_experts or 0,
        top_k,
        *config.router_groups,
        config.norm_topk_prob and top_k > 1,
        config.routed_scaling_factor,
    )
    shared = mlp.shared_experts
    return gpu_experts.Feed(
        norm.weight,
        norm.eps,
        mlp.gate.weight,
        routing,
        part(mlp.experts.gate_up_proj),
        part(mlp.experts.down_proj),
        part(shared.gate_up_proj) if shared else None,
        part(shared.down_proj) if shared else None,
    )


def part(weight: Tensor | Quantized) -> Table | None:
    """None where a rank of a team holds nothing of it."""
    return None if 0 in weight.shape else table(weight)


def use_gpu_kernels(model: DeepseekV2, graphs: bool = False) -> None:
    """Run layers through the Triton kernels from now on.

    Layers whose experts lie in RAM run product by product, and so do those of a team in which a rank has no head, or in which
    each has sequences of its own; a product that another kernel has already stays there.
    """
    whole = not model.experts_apart and model.heads_everywhere and not model.team.sequences
    model.steps, model.graphs = whole, whole and graphs
    for module in model.modules():
        if isinstance(module, Layer) and whole:
            module.fused = GpuLayer(module)
        elif (
            isinstance(module, Linear)
            and module.product is None
            and module.bias is None
            and here(module.weight, model)
        ):
            module.product = product(table(module.weight))
        elif (
            isinstance(module, Experts | MLP)
            and module.product is None
            and not whole
            and here(module.down_proj, model)
        ):
            make = weighted_sum if isinstance(module, Experts) else every_token
            module.product = make(table(module.gate_up_proj), table(module.down_proj))


def here(weight: Tensor | Quantized, model: DeepseekV2) -> bool:
    """Whether there is something of it, and on the device that computes."""
    return 0 not in weight.shape and weight.device == model.device


def product(weight: Table) -> Callable[[Tensor], Tensor]:
    return lambda x: gpu_linear.linear(x.flatten(0, -2).contiguous(), weight).unflatten(0, x.shape[:-1])


def weighted_sum(gate_up: Table, down: Table) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda x, index, weight: (
        gpu_experts.grouped(x.contiguous(), index.int(), weight.float().contiguous(), gate_up, down)
        .view(*index.shape, -1)
        .float()
        .sum(1)
        .type_as(x)
    )


def every_token(gate_up: Table, down: Table) -> Callable[[Tensor], Tensor]:
    return lambda x: gpu_experts.dense(x.contiguous(), gate_up, down)


class DecodeStep:
    """One forward pass by `seq` new tokens for each of `rows` rows of a cache, as a CUDA graph where there is CUDA.

    What changes from step to step lies in three tensors on the GPU: ids [rows, seq], the place of each row's first new token
    [rows], which moves on by itself, and the row's number in the cache [rows].
    """

    def __init__(self, model: DeepseekV2, cache: LatentCache, rows: int, seq: int, graph: bool) -> None:
        device = model.device
        self.model, self.cache = model, cache.alias()  # not the cache itself, which holds this
        self.ids = torch.zeros(rows, seq, dtype=torch.long, device=device)
        self.starts = torch.zeros(rows, dtype=torch.long, device=device)
        self.slots = torch.zeros(rows, dtype=torch.int32, device=device)
        self.known: tuple[list[int], list[int]] | None = None  # starts and slots, as the GPU has them
        self.graph: torch.cuda.CUDAGraph | None = None
        model.rotary(self.starts[:, None], cache.capacity)
        self.table = model.rotary.table  # a graph reads it where it is
        self.logits = torch.empty(0)
        if graph and device.type == "cuda":
            self.capture()

    def run(self) -> None:
        seq, team = self.ids.shape[1], self.model.team
        if team.size > 1:
            dist.broadcast(self.ids, 0)
        positions = torch.where(
            self.starts[:, None] >= 0, self.starts[:, None] + torch.arange(seq, device=self.ids.device), -1
        )
        step = Step(positions, self.table[positions], self.cache, self.cache.capacity, slots=self.slots)
        self.logits = DeepseekV2.logits(
            self.model, self.model.run(self.ids, step)
        )  # a leader's own would tell the others
        self.starts += torch.where(self.starts >= 0, seq, 0)

    def capture(self) -> None:
        """Once without a graph, so that every kernel is compiled; both runs only write where nothing is yet."""
        self.starts.fill_(-1)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.run()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            self.graph, capture_error_mode="thread_local"
        ):  # NCCL's own thread asks after its work meanwhile
            self.run()

    def __call__(self, ids: Tensor, starts: list[int], slots: list[int]) -> Tensor:
        """ids [up to rows, seq] on the GPU -> logits [same, seq, vocab], which the next call overwrites."""
        count, rows = len(starts), self.ids.shape[0]
        seq = self.ids.shape[1]
        self.ids[:count].copy_(ids)
        if (starts, slots) != self.known:
            self.starts.copy_(torch.tensor([*starts, *[-1] * (rows - count)]))
            self.slots.copy_(torch.tensor([*slots, *[0] * (rows - count)]))
        self.known = [start + seq for start in starts], slots
        if self.graph is None:
            self.run()
        else:
            self.graph.replay()
        return self.logits[:count]


def decode(model: DeepseekV2, cache: LatentCache, ids: Tensor, rows: list[int] | None = None) -> Tensor:
    """ids [rows, seq] continue these rows of the cache, or all -> logits [rows, seq, vocab]; the cache's lengths follow.

    The cache keeps the steps that were made for it, so that a graph serves many answers.
    """
    seq = ids.shape[1]
    assert seq <= FEW
    rows = list(range(len(cache.lengths))) if rows is None else rows
    starts = [cache.lengths[row] for row in rows]
    cache.reserve(max(starts) + seq)
    size = next((size for size in ROWS if size >= len(rows)), len(rows))
    with model.together(cache, seq, rows):
        if (size, seq) not in cache.steps:
            cache.steps[size, seq] = DecodeStep(model, cache, size, seq, model.graphs)
        logits = cache.steps[size, seq](ids, starts, rows)
    for row in rows:
        cache.lengths[row] += seq
    return logits
