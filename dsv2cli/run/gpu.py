"""A model through the Triton kernels, and a decode step as one CUDA graph."""

from __future__ import annotations

from functools import partial
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from dsv2cli.kernels.native import Kernels
from dsv2cli.kernels.triton import attention as gpu_attention
from dsv2cli.kernels.triton import experts as gpu_experts
from dsv2cli.kernels.triton import linear as gpu_linear
from dsv2cli.kernels.triton.linear import Table, table
from dsv2cli.model.cache import LatentCache
from dsv2cli.model.layers import MLP, ExpertProduct, OneProduct, Weight
from dsv2cli.model.step import Step
from dsv2cli.model.transformer import DeepseekV2, Layer, MoE
from dsv2cli.run.cpu import CppProducts
from dsv2cli.run.runner import PlainRunner, decode_among_all

ABSORBED_TOKENS = 8  # new tokens of a row up to which attention is absorbed; more are a prefill
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)  # for which graphs are made; steps between are filled up


class TritonRunner(PlainRunner):
    """A Runner whose layers are the kernels'.

    They run whole, and decode in steps that CUDA graphs can hold, unless experts lie in RAM, or in a team
    some rank has no head or each has sequences of its own: then they run product by product.
    """

    def __init__(
        self,
        model: DeepseekV2,
        attention: str = "auto",
        graphs: bool = False,
        apart: bool = False,
        kernels: Kernels | None = None,
    ) -> None:
        """`apart`: routed experts lie in RAM, or are to run as if they did, where the C++ `kernels` compute
        them.
        """
        super().__init__(model, attention)
        whole = not apart and all(share.heads for share in model.shares) and not model.team.sequences
        ram = None if kernels is None else CppProducts(kernels, model.config, mlps=True)
        self.use(TritonProducts(self.device, mlps=not whole, ram=ram))
        self.layers = [GpuLayer(layer) for layer in model.layers] if whole else []
        self.graphs = graphs
        self.steps: WeakKeyDictionary[LatentCache, DecodeSteps] = WeakKeyDictionary()

    @property
    def decodes_ahead(self) -> bool:
        return bool(self.layers) and self.absorbs

    def run_layers(self, x: Tensor, step: Step) -> Tensor:
        if not self.layers:
            return super().run_layers(x, step)
        for i, layer in enumerate(self.layers):
            x = step.watch("attention", partial(layer.attend, x, step, i))
            x = step.watch(layer.layer.mlp_name, partial(layer.feed, x))
        return x

    def decode(self, ids: Tensor, cache: LatentCache, rows: list[int] | None = None) -> Tensor:
        """As Runner.decode.

        A cache's steps are kept as long as it lies where it is: a graph serves many answers.

        ids [rows, seq] -> logits [rows, seq, vocab]
        """
        if not self.decodes_ahead:
            return decode_among_all(self, ids, cache, rows)
        seq = ids.shape[1]
        assert seq <= ABSORBED_TOKENS
        rows = list(range(len(cache.lengths))) if rows is None else rows
        starts = [cache.lengths[row] for row in rows]
        cache.reserve(max(starts) + seq)
        steps = self.steps.get(cache)
        if steps is None or steps.capacity != cache.capacity:
            steps = self.steps[cache] = DecodeSteps(self, cache)
        logits = steps.of(len(rows), seq)(ids, starts, rows)
        for row in rows:
            cache.lengths[row] += seq
        return logits


class TritonProducts:
    """Products with what lies on `device`; `mlps`: those of whole MLPs and experts, too.

    `ram` does what lies there.
    """

    def __init__(self, device: torch.device, mlps: bool, ram: CppProducts | None) -> None:
        self.device, self.mlps, self.ram = device, mlps, ram

    def lies_here(self, weight: Weight) -> bool:
        return 0 not in weight.shape and weight.device == self.device

    def linear(self, weight: Weight) -> OneProduct | None:
        product = None if self.ram is None else self.ram.linear(weight)
        if product is not None or not self.lies_here(weight):
            return product
        return partial(linear_product, table(weight))

    def mlp(self, gate_up: Weight, down: Weight) -> OneProduct | None:
        product = None if self.ram is None else self.ram.mlp(gate_up, down)
        if product is not None or not self.mlps or not self.lies_here(down):
            return product
        return partial(mlp_product, table(gate_up), table(down))

    def experts(self, gate_up: Weight, down: Weight) -> ExpertProduct | None:
        product = None if self.ram is None else self.ram.experts(gate_up, down)
        if product is not None or not self.mlps or not self.lies_here(down):
            return product
        return partial(experts_product, table(gate_up), table(down))


def linear_product(weight: Table, x: Tensor) -> Tensor:
    """x [..., in] -> [..., out]"""
    return gpu_linear.linear(x.flatten(0, -2).contiguous(), weight).unflatten(0, x.shape[:-1])


def mlp_product(gate_up: Table, down: Table, x: Tensor) -> Tensor:
    """x [tokens, hidden] -> the same shape"""
    return gpu_experts.dense(x.contiguous(), gate_up, down)


def experts_product(gate_up: Table, down: Table, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """x [tokens, hidden], index and weight [tokens, k] -> as x"""
    each = gpu_experts.grouped(x.contiguous(), index.int(), weight.float().contiguous(), gate_up, down)
    return each.view(*index.shape, -1).float().sum(1).type_as(x)


class GpuLayer:
    """One layer in ten kernels for one token (eleven with q_lora). The input is overwritten by the output."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        attention, config = layer.self_attn, layer.self_attn.config
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
        self.team = layer.self_attn.o_proj.team
        self.first_expert = layer.mlp.experts.here.start if isinstance(layer.mlp, MoE) else 0

    def attend(self, x: Tensor, step: Step, index: int) -> Tensor:
        """The first half of the layer whose number is `index`. x [batch, seq, hidden] -> the same shape"""
        attention = self.layer.self_attn
        if x.shape[1] > ABSORBED_TOKENS or step.path not in ("auto", "absorbed"):
            return self.layer.attend(x, step, index)
        assert step.cache is not None
        flat, norm = x.flatten(0, 1), self.layer.input_layernorm
        both = gpu_linear.linear(flat, self.first_q, self.kv_a, norm.weight, norm.eps)
        q, kv = both.split([self.first_q.rows, self.kv_a.rows], dim=1)
        if self.q_b is not None:
            low = attention.q_a_layernorm
            q = gpu_linear.linear(q.contiguous(), self.q_b, None, low.weight, low.eps)
        out = gpu_attention.attend(
            q,
            kv,
            attention.kv_a_layernorm.weight,
            attention.kv_b_proj.weight,
            step.rotary.flatten(0, 1),
            *step.tokens,
            step.cache.layers[index],
            self.shape,
        )
        if self.team.size > 1:
            return x + self.team.sum(gpu_linear.linear(out, self.o)).view_as(x)
        return gpu_linear.linear(out, self.o, residual=flat).view_as(x)

    def feed(self, x: Tensor) -> Tensor:
        """The second half. x [batch, seq, hidden] -> the same shape"""
        flat = x.flatten(0, 1)
        if self.team.size > 1:
            part = gpu_experts.run(flat, self.mlp, torch.zeros_like(flat), self.first_expert)
            return x + self.team.sum(part).view_as(x)
        return gpu_experts.run(flat, self.mlp, flat).view_as(x)


def feed_of(layer: Layer) -> gpu_experts.Feed:
    """A layer's MLP, or router and experts, as the kernels take them."""
    norm, mlp = layer.post_attention_layernorm, layer.mlp
    if not isinstance(mlp, MoE):
        assert isinstance(mlp, MLP)
        shared = (held(mlp.gate_up_proj), held(mlp.down_proj))
        return gpu_experts.Feed(norm.weight, norm.eps, None, gpu_experts.NO_ROUTING, None, None, *shared)
    shared = (None, None)
    if mlp.shared_experts is not None:
        shared = (held(mlp.shared_experts.gate_up_proj), held(mlp.shared_experts.down_proj))
    routed = (held(mlp.experts.gate_up_proj), held(mlp.experts.down_proj))
    plain = mlp.gate.routing
    routing = gpu_experts.Routing(
        len(mlp.gate.weight),
        plain.top_k,
        plain.n_group,
        plain.topk_group,
        plain.norm_topk_prob and plain.top_k > 1,
        plain.scaling_factor,
    )
    return gpu_experts.Feed(norm.weight, norm.eps, mlp.gate.weight, routing, *routed, *shared)


def held(weight: Weight) -> Table | None:
    """None where a rank of a team holds nothing of it."""
    return None if 0 in weight.shape else table(weight)


class DecodeSteps:
    """The decode steps of one cache, by the rows and new tokens they are made for; the cache must not grow
    meanwhile.
    """

    def __init__(self, runner: TritonRunner, cache: LatentCache) -> None:
        # Not the cache itself, whose end is to be the end of its steps.
        self.runner, self.cache, self.capacity = runner, cache.alias(), cache.capacity
        self.made: dict[tuple[int, int], DecodeStep] = {}

    def of(self, rows: int, seq: int) -> DecodeStep:
        """One for at least so many rows."""
        size = next((size for size in ROWS if size >= rows), rows)
        if (size, seq) not in self.made:
            self.made[size, seq] = DecodeStep(self.runner, self.cache, size, seq)
        return self.made[size, seq]


class DecodeStep:
    """One forward pass by `seq` new tokens for each of `rows` rows of a cache, as a CUDA graph where there is
    CUDA.

    What changes from step to step lies in three tensors on the GPU: ids [rows, seq], the place of each row's
    first new token [rows], which moves on by itself, and the row's number in the cache [rows].
    """

    def __init__(self, runner: TritonRunner, cache: LatentCache, rows: int, seq: int) -> None:
        model, device = runner.model, runner.device
        self.runner, self.cache = runner, cache
        self.ids = torch.zeros(rows, seq, dtype=torch.long, device=device)
        self.starts = torch.zeros(rows, dtype=torch.long, device=device)
        self.slots = torch.zeros(rows, dtype=torch.int32, device=device)
        self.known: tuple[list[int], list[int]] | None = None  # starts and slots, as the GPU has them
        self.graph: torch.cuda.CUDAGraph | None = None
        model.rotary(self.starts[:, None], cache.capacity)
        self.table = model.rotary.table  # a graph reads it where it is
        self.logits = torch.empty(0)
        if runner.graphs and device.type == "cuda":
            self.capture()

    def compute(self) -> None:
        """Leaves the scores in `logits`.

        Every rank of a team makes the step; the leader's ids are everybody's.
        """
        seq, model = self.ids.shape[1], self.runner.model
        if model.team.size > 1:
            dist.broadcast(self.ids, 0)
        offsets = torch.arange(seq, device=self.ids.device)
        positions = torch.where(self.starts[:, None] >= 0, self.starts[:, None] + offsets, -1)
        rotary, capacity = self.table[positions], self.cache.capacity
        step = Step(positions, rotary, self.cache, capacity, path=self.runner.attention, slots=self.slots)
        self.logits = model.logits(model(self.ids, step, self.runner.run_layers))
        self.starts += torch.where(self.starts >= 0, seq, 0)

    def capture(self) -> None:
        """Once without a graph, so that every kernel is compiled; both runs only write
        where nothing is yet.
        """
        self.starts.fill_(-1)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.compute()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        # NCCL's own thread asks after its work meanwhile.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.compute()

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
            self.compute()
        else:
            self.graph.replay()
        return self.logits[:count]
