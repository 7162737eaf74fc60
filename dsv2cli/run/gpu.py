"""A model through the Triton kernels, and a decode step as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from dsv2cli.formats import PAGE
from dsv2cli.kernels.latents import rotated
from dsv2cli.kernels.native import Kernels
from dsv2cli.kernels.quantized import Quantized
from dsv2cli.kernels.triton import attention as gpu_attention
from dsv2cli.kernels.triton import experts as gpu_experts
from dsv2cli.kernels.triton import linear as gpu_linear
from dsv2cli.kernels.triton.linear import Table, table
from dsv2cli.model.layers import MLP, ExpertProduct, Experts, Linear, OneProduct, Weight
from dsv2cli.model.pool import LatentPool, pages_for
from dsv2cli.model.step import Span, Step
from dsv2cli.model.transformer import DeepseekV2, Layer, MoE
from dsv2cli.run.cpu import CppProducts
from dsv2cli.run.runner import PlainRunner

ABSORBED_TOKENS = 8  # new tokens of a row up to which attention is absorbed; more are a prefill
MOST_ROOMS = 64  # pinned tensors
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)  # for which graphs are made; steps between are filled up


class TritonRunner(PlainRunner):
    """A Runner whose layers are the kernels'.

    They run whole, and decode in steps that CUDA graphs can hold unless experts lie in RAM. Where in a team
    some rank has no head, or each has sequences of its own, they run product by product.
    """

    def __init__(
        self,
        model: DeepseekV2,
        attention: str = "auto",
        graphs: bool = False,
        apart: bool = False,
        kernels: Kernels | None = None,
        cache: str = "auto",
        rounds: bool = True,
        early: bool = True,
    ) -> None:
        """`apart`: routed experts lie in RAM, or are to run as if they did, where the C++ `kernels` compute
        them. `rounds`: what goes into packed experts is rounded to 8 bits, for few tokens. `early`: a kernel
        may be brought up while the one before runs.
        """
        gpu_linear.LAUNCHES.early = early
        super().__init__(model, attention, cache=cache)
        whole = all(share.heads for share in model.shares) and not model.team.sequences
        ram = None if kernels is None else CppProducts(kernels, model.config, mlps=True)
        self.use(TritonProducts(self.device, mlps=not whole, ram=ram))
        makes = partial(GpuLayer, turned=self.turned, rounds=rounds, copies=Copies(self.device), apart=apart)
        self.layers = [makes(layer) for layer in model.layers] if whole else []
        self.graphs, self.apart = graphs, apart
        self.steps: WeakKeyDictionary[LatentPool, DecodeSteps] = WeakKeyDictionary()

    @property
    def decodes_ahead(self) -> bool:
        return bool(self.layers) and self.absorbs and not self.apart

    @property
    def saved_bytes(self) -> int:
        """Those of kv_b_proj, where a single token reads it in 8 bits."""
        return sum(
            layer.kv_b.nbytes - sum(each.nbytes for each in layer.kv_b_int8)
            for layer in self.layers
            if layer.kv_b_int8 is not None
        )

    def run_layers(self, x: Tensor, step: Step) -> Tensor:
        if not self.layers:
            return super().run_layers(x, step)
        absorbs = step.path in ("auto", "absorbed")
        few = [i for i, span in enumerate(step.spans) if absorbs and span.count <= ABSORBED_TOKENS]
        many = [i for i in range(len(step.spans)) if i not in set(few)]
        rest = step.part(many) if many else None
        some = step.part(few) if few and many else (step, None)
        tokens = FewTokens.of(some[0]) if few else None
        for i, layer in enumerate(self.layers):
            x = step.watch("attention", partial(self.attend, i, x, rest, tokens, some[1]))
            x = step.watch(layer.layer.mlp_name, partial(layer.feed, x))
        return x

    def attend(
        self,
        i: int,
        x: Tensor,
        rest: tuple[Step, Tensor] | None,
        tokens: FewTokens | None,
        index: Tensor | None,
    ) -> Tensor:
        """The first half of layer i: of `rest` through torch, of the few `tokens`, which are x[index] or all
        of x, through the kernels. x [tokens, hidden] -> the same shape
        """
        layer = self.layers[i]
        if tokens is not None and index is None:
            return layer.attend(x, tokens, i)
        if rest is not None:
            x[rest[1]] = layer.layer.attend(x[rest[1]], rest[0], i)
        if tokens is not None and index is not None:
            x[index] = layer.attend(x[index], tokens, i)
        return x

    def decode(self, ids: Tensor, spans: list[Span], pool: LatentPool) -> Tensor:
        """As Runner.decode. A pool's steps are kept as long as it is: a graph serves many answers.

        ids [spans, seq] -> logits [spans, seq, vocab]
        """
        if not self.decodes_ahead or ids.shape[1] > ABSORBED_TOKENS:
            return super().decode(ids, spans, pool)
        if pool not in self.steps:
            self.steps[pool] = DecodeSteps(self, pool)
        return self.steps[pool].of(len(spans), ids.shape[1])(ids, spans)


@dataclass
class FewTokens:
    """New tokens as the attention kernels take them."""

    positions: Tensor  # [tokens] int32; below 0 where there is none
    rotary: Tensor  # [tokens, 2, rope / 2]
    rows: Tensor  # [tokens] int32: of the tables
    tables: Tensor  # [rows, pages] int32
    pool: LatentPool

    @classmethod
    def of(cls, step: Step) -> FewTokens:
        """Those of a step, each span of which is a row."""
        assert step.pool is not None
        device, most = step.positions.device, max(pages_for(span.end) for span in step.spans)
        tables = [(span.pages + [0] * most)[:most] for span in step.spans]
        rows = [i for i, span in enumerate(step.spans) for _ in range(span.count)]
        return cls(
            step.positions.int(),
            step.rotary.contiguous(),
            torch.tensor(rows, dtype=torch.int32, device=device),
            torch.tensor(tables, dtype=torch.int32, device=device),
            step.pool,
        )


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


class Copies:
    """Numbers between the GPU and RAM, which nobody waits for before they are needed."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rooms: dict[tuple[str, tuple[int, ...], torch.dtype], Tensor] = {}  # pinned, each used again

    def to_ram(self, **given: Tensor) -> Callable[[], dict[str, Tensor]]:
        """Begin to bring tensors into RAM; what this gives waits for them, and for nothing asked later."""
        if self.device.type != "cuda":
            return lambda: given
        here = {name: self.room(name, each) for name, each in given.items()}
        for name, each in given.items():
            here[name].copy_(each, non_blocking=True)
        done = torch.cuda.Event()
        done.record()

        def wait() -> dict[str, Tensor]:
            done.synchronize()
            return here

        return wait

    def to_gpu(self, x: Tensor) -> Tensor:
        """Begin to bring a tensor to the GPU, whose next kernels wait for it."""
        if self.device.type != "cuda":
            return x
        room = self.room("back", x)
        room.copy_(x)
        return room.to(self.device, non_blocking=True)

    def room(self, name: str, like: Tensor) -> Tensor:
        """Pinned memory for a tensor of that name; what it held before has been read by then."""
        key = (name, tuple(like.shape), like.dtype)
        if key not in self.rooms:
            if len(self.rooms) > MOST_ROOMS:
                torch.cuda.synchronize(self.device)
                self.rooms.clear()
            self.rooms[key] = torch.empty(like.shape, dtype=like.dtype, pin_memory=True)
        return self.rooms[key]


class GpuLayer:
    """One layer in eight kernels for one token (nine with q_lora). The input is overwritten by the output."""

    def __init__(self, layer: Layer, turned: bool, rounds: bool, copies: Copies, apart: bool) -> None:
        """`turned`: latents lie in the pool rotated, and so must be what is multiplied with them. `rounds`
        and `apart`: as TritonRunner's.
        """
        self.layer = layer
        attention, config = layer.self_attn, layer.self_attn.config
        kv_b: Tensor = attention.kv_b_proj.weight
        self.kv_b = rotated(kv_b).contiguous() if turned else kv_b
        # Where attention is packed a single token reads kv_b_proj in 8 bits, as it does on a CPU.
        small = rounds and isinstance(attention.o_proj.weight, Quantized)
        self.kv_b_int8 = gpu_attention.up_in_int8(self.kv_b) if small else None
        self.shape = gpu_attention.Shape(
            attention.heads,
            config.qk_nope_head_dim,
            config.qk_rope_head_dim,
            config.v_head_dim,
            config.kv_lora_rank,
            attention.scale,
        )
        low = config.q_lora_rank is not None
        first_q = attention.q_a_proj if low else attention.q_proj
        read_alike(first_q, attention.kv_a_proj_with_mqa)
        self.first_q = table(first_q.weight)
        self.q_b = table(attention.q_b_proj.weight) if low else None
        self.kv_a, self.o = table(attention.kv_a_proj_with_mqa.weight), table(attention.o_proj.weight)
        moe = layer.mlp if isinstance(layer.mlp, MoE) else None
        in_ram = apart and moe is not None and moe.experts.down_proj.device.type == "cpu"
        self.copies, self.experts = copies, moe.experts if moe is not None and in_ram else None
        self.mlp = replace(feed_of(layer, in_ram), rounds=rounds)
        self.team = layer.self_attn.o_proj.team
        self.first_expert = layer.mlp.experts.here.start if isinstance(layer.mlp, MoE) else 0

    def attend(self, x: Tensor, tokens: FewTokens, index: int) -> Tensor:
        """The first half of the layer whose number is `index`. x [tokens, hidden] -> the same shape"""
        attention, norm = self.layer.self_attn, self.layer.input_layernorm
        both = gpu_linear.linear(x, self.first_q, self.kv_a, norm.weight, norm.eps)
        q, kv = both.split([self.first_q.rows, self.kv_a.rows], dim=1)
        if self.q_b is not None:
            low = attention.q_a_layernorm
            q = gpu_linear.linear(q.contiguous(), self.q_b, None, low.weight, low.eps)
        out = gpu_attention.attend(
            q,
            kv,
            attention.kv_a_layernorm.weight,
            self.kv_b,
            tokens.rotary,
            tokens.positions,
            tokens.rows,
            tokens.tables,
            tokens.pool.layers[index],
            self.shape,
            tokens.pool.bits,
            self.kv_b_int8 if len(x) <= gpu_attention.ABSORB_TOKENS else None,
        )
        if self.team.size > 1:
            return x + self.team.sum(gpu_linear.linear(out, self.o))
        return gpu_linear.linear(out, self.o, residual=x)

    def feed(self, x: Tensor) -> Tensor:
        """The second half. x [tokens, hidden] -> the same shape"""
        if self.experts is not None:
            return self.feed_beside(x, self.experts)
        if self.team.size > 1:
            return x + self.team.sum(gpu_experts.run(x, self.mlp, torch.zeros_like(x), self.first_expert))
        return gpu_experts.run(x, self.mlp, x)

    def feed_beside(self, x: Tensor, experts: Experts) -> Tensor:
        """The same with the routed experts in RAM: the CPU computes them while the GPU computes the shared
        ones. x [tokens, hidden] -> the same shape
        """
        assert self.team.size == 1, "experts in RAM are for one device"
        routed = gpu_experts.route(x, self.mlp)
        wait = self.copies.to_ram(tokens=routed.normed, index=routed.index, weight=routed.weight)
        shared = gpu_experts.run(x, self.mlp, torch.zeros_like(x))
        here = wait()
        back = self.copies.to_gpu(experts(here["tokens"], here["index"].long(), here["weight"]))
        return x + (shared + back)


def read_alike(one: Linear, other: Linear) -> None:
    """Widen the codes of `one` to those of `other`, where that can be, so that one launch reads both."""
    mine, others = one.weight, other.weight
    if not isinstance(mine, Quantized) or not isinstance(others, Quantized):
        return
    if mine.coding != others.coding and mine.bits == 4 and mine.coding.widened == others.coding:
        one.weight = mine.widened()


def feed_of(layer: Layer, in_ram: bool = False) -> gpu_experts.Feed:
    """A layer's MLP, or router and experts, as the kernels take them; those `in_ram` they do not take."""
    norm, mlp = layer.post_attention_layernorm, layer.mlp
    if not isinstance(mlp, MoE):
        assert isinstance(mlp, MLP)
        shared = (held(mlp.gate_up_proj), held(mlp.down_proj))
        return gpu_experts.Feed(norm.weight, norm.eps, None, gpu_experts.NO_ROUTING, None, None, *shared)
    shared = (None, None)
    if mlp.shared_experts is not None:
        shared = (held(mlp.shared_experts.gate_up_proj), held(mlp.shared_experts.down_proj))
    routed = (None, None) if in_ram else (held(mlp.experts.gate_up_proj), held(mlp.experts.down_proj))
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
    """The decode steps of one pool, by the rows and new tokens they are made for."""

    def __init__(self, runner: TritonRunner, pool: LatentPool) -> None:
        # Not the pool itself, whose end is to be the end of its steps.
        self.runner, self.pool = runner, pool.alias()
        self.made: dict[tuple[int, int], DecodeStep] = {}

    def of(self, rows: int, seq: int) -> DecodeStep:
        """One for at least so many rows."""
        size = next((size for size in ROWS if size >= rows), rows)
        if (size, seq) not in self.made:
            self.made[size, seq] = DecodeStep(self.runner, self.pool, size, seq)
        return self.made[size, seq]


class DecodeStep:
    """One forward pass by `seq` new tokens for each of `rows` sequences in a pool, as a CUDA graph where
    there is CUDA.

    What changes from step to step lies in three tensors on the GPU: ids [rows, seq], the place of each row's
    first new token [rows], which moves on by itself, and the pages of each row's sequence [rows, pages].
    """

    def __init__(self, runner: TritonRunner, pool: LatentPool, rows: int, seq: int) -> None:
        model, device = runner.model, runner.device
        self.runner, self.pool = runner, pool
        longest = min(model.config.max_position_embeddings, pool.pages * PAGE)
        self.ids = torch.zeros(rows, seq, dtype=torch.long, device=device)
        self.starts = torch.zeros(rows, dtype=torch.long, device=device)
        self.tables = torch.zeros(rows, pages_for(longest), dtype=torch.int32, device=device)
        self.slots = torch.arange(rows, dtype=torch.int32, device=device).repeat_interleave(seq)
        self.known_starts: list[int] = []  # as the GPU has them
        self.known_pages: list[list[int]] = [[] for _ in range(rows)]
        self.graph: torch.cuda.CUDAGraph | None = None
        model.rotary(self.starts, longest)
        self.table = model.rotary.table  # a graph reads it where it is
        self.logits = torch.empty(0)
        if runner.graphs and device.type == "cuda":
            self.capture()

    def compute(self) -> None:
        """Leaves the scores in `logits`.

        Every rank of a team makes the step; the leader's ids are everybody's.
        """
        (rows, seq), model = self.ids.shape, self.runner.model
        if model.team.size > 1:
            dist.broadcast(self.ids, 0)
        offsets = torch.arange(seq, device=self.ids.device)
        positions = torch.where(self.starts[:, None] >= 0, self.starts[:, None] + offsets, -1).flatten()
        step = Step([], positions, self.table[positions], self.pool)
        tokens = FewTokens(positions.int(), step.rotary, self.slots, self.tables, self.pool)

        x, norm = model.model.embed_tokens(self.ids.flatten()), model.model.norm
        for i, layer in enumerate(self.runner.layers):
            x = layer.feed(layer.attend(x, tokens, i))
        self.logits = model.logits(gpu_linear.rms_norm(x, norm.weight, norm.eps)).unflatten(0, (rows, seq))
        self.starts += torch.where(self.starts >= 0, seq, 0)

    def capture(self) -> None:
        """Once without a graph, so that every kernel is compiled; both runs write nothing."""
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

    def __call__(self, ids: Tensor, spans: list[Span]) -> Tensor:
        """ids [up to rows, seq] on the GPU -> logits [same, seq, vocab], which the next call overwrites."""
        count, (rows, seq) = len(spans), self.ids.shape
        self.ids[:count].copy_(ids)
        starts = [span.start for span in spans]
        if starts != self.known_starts:
            self.starts.copy_(torch.tensor([*starts, *[-1] * (rows - count)]))
        self.known_starts = [start + seq for start in starts]
        for i, span in enumerate(spans):
            self.tell_pages(i, span.pages[: pages_for(span.end)])
        if self.graph is None:
            self.compute()
        else:
            self.graph.replay()
        return self.logits[:count]

    def tell_pages(self, row: int, pages: list[int]) -> None:
        """Let the GPU know the pages of a row, as far as it does not."""
        known = self.known_pages[row]
        if known == pages:
            return
        same = next((i for i, (a, b) in enumerate(zip(known, pages, strict=False)) if a != b), len(known))
        if same < len(pages):
            self.tables[row, same : len(pages)] = torch.tensor(pages[same:], dtype=torch.int32)
        self.known_pages[row] = pages
