"""What the engine asks of a model that runs, and the plainest way to do it: torch alone.

The other ways are cpu.py (C++ kernels), gpu.py (Triton kernels) and leader.py (several processes). A model
has one runner at a time, the last one made, because a runner tells the model's boxes which kernels to use.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from dsv2cli.checkpoint.blueprint import state_of
from dsv2cli.checkpoint.names import seldom_read
from dsv2cli.errors import Dsv2Error
from dsv2cli.formats import CACHE_BITS, PAGE
from dsv2cli.memory import ram_bytes
from dsv2cli.model import size
from dsv2cli.model.config import DeepseekV2Config
from dsv2cli.model.layers import Products
from dsv2cli.model.pool import LatentPool, pages_for
from dsv2cli.model.step import Span, Step, Watch, unwatched
from dsv2cli.model.transformer import DeepseekV2

# Tokens of prompts in a forward pass: enough for full GEMM speed, few enough to bound memory.
CPU_CHUNK, GPU_CHUNK = 512, 4096
MOST_SEQUENCES = 64  # as long as the context, for which a pool has pages at most
POOL_SHARE = 0.8  # of the memory that the weights have left
ATTENTION_PATHS = ("auto", "absorbed", "expanded", "reference")


class Runner(Protocol):
    """A model ready to run. Every call is made in inference mode."""

    @property
    def model(self) -> DeepseekV2:
        """The weights that lie in this process."""
        ...

    @property
    def config(self) -> DeepseekV2Config: ...

    @property
    def device(self) -> torch.device:
        """Where ids go in and scores come out."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states and latents."""
        ...

    @property
    def ranks(self) -> int:
        """How many pools of pages there are: a team that shares out sequences has one a rank."""
        ...

    @property
    def alike(self) -> bool:
        """Whether what a token gets does not depend on the others in its step, down to the last bit; only on
        whether it is of a `whole` piece.
        """
        ...

    @property
    def chunk(self) -> int:
        """Tokens of prompts that one step should read at most."""
        ...

    @property
    def cache(self) -> str:
        """The number format of its pools, as --cache names it."""
        ...

    @property
    def decodes_ahead(self) -> bool:
        """Whether `decode` only asks the device for its work, so that it can be given more before that is
        done.
        """
        ...

    @property
    def saved_bytes(self) -> int:
        """Bytes of the weights that a decode step needs not read, because a kernel has a smaller copy."""
        ...

    def new_pool(self, tokens: int | None = None) -> LatentPool:
        """Pages for so many tokens (on each of `ranks`), or for as many as there is room for. Raises
        Dsv2Error where there is none.
        """
        ...

    def __call__(self, ids: Tensor, spans: list[Span], pool: LatentPool, watch: Watch = unwatched) -> Tensor:
        """ids [tokens] of the spans, one after the other -> hidden states [tokens, hidden]. What is `whole`
        stands before what is not, and that of a lower rank before all else.
        """
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., hidden] -> scores for the next token [..., vocab] in fp32"""
        ...

    def decode(self, ids: Tensor, spans: list[Span], pool: LatentPool) -> Tensor:
        """Equally few new tokens in each span, none of them whole: ids [spans, seq] -> logits [spans, seq,
        vocab], which the next call may overwrite.
        """
        ...

    def copy_page(self, pool: LatentPool, rank: int, source: int, target: int) -> None:
        """Let a page of a rank's pool hold what another does."""
        ...

    def set_page(self, pool: LatentPool, page: int, held: Tensor) -> None:
        """Let a page hold `held` [bytes], as LatentPool.page gave it, in every rank's pool."""
        ...

    def read(self, pool: LatentPool, pages: list[int], length: int) -> list[Tensor]:
        """The latents of the first `length` tokens in these pages, by layers. Each [length, latent + rope]"""
        ...

    def fill(self, pool: LatentPool, pages: list[int], latents: list[Tensor]) -> None:
        """Put tokens [length, latent + rope], layer by layer, into these pages, from their beginning on."""
        ...


class PlainRunner:
    """A Runner in plain torch, and what the others have in common with it."""

    def __init__(
        self,
        model: DeepseekV2,
        attention: str = "auto",
        main: torch.device | None = None,
        layer_devices: list[torch.device] | None = None,
        cache: str = "auto",
    ) -> None:
        """`attention` is one of ATTENTION_PATHS; `main` and `layer_devices` say what computes where weights
        travel; `cache` is the number format of its pools.
        """
        assert attention in ATTENTION_PATHS, attention
        self.cache = cache
        self.model, self.attention, self.main, self.layer_devices = model, attention, main, layer_devices
        self.use(None)

    def use(self, products: Products | None) -> None:
        """Compute with these kernels. The runner that the model had before can not go on."""
        self.products = products
        self.model.compute_with(products)

    @property
    def config(self) -> DeepseekV2Config:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.main or self.model.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.model.norm.weight.dtype

    @property
    def decodes_ahead(self) -> bool:
        return False

    @property
    def saved_bytes(self) -> int:
        return 0

    @property
    def turned(self) -> bool:
        """Whether latents lie in the pool rotated."""
        return CACHE_BITS.get(self.cache, 16) < 8

    @property
    def absorbs(self) -> bool:
        """Whether few new tokens take the absorbed attention path, the only one that kernels know."""
        return self.attention in ("auto", "absorbed")

    @property
    def ranks(self) -> int:
        return self.model.team.size if self.model.team.sequences else 1

    @property
    def alike(self) -> bool:
        return False

    @property
    def chunk(self) -> int:
        return CPU_CHUNK if self.device.type == "cpu" else GPU_CHUNK

    def new_pool(self, tokens: int | None = None) -> LatentPool:
        devices = self.pool_devices
        pages = self.most_pages(devices) if tokens is None else pages_for(tokens)
        while True:
            try:
                return LatentPool(self.config, pages, devices, self.dtype, self.cache)
            except OSError as error:  # a limit on address space
                if tokens is not None or pages <= 2:
                    why = error.strerror or str(error)
                    raise Dsv2Error(
                        "There is no memory for the latents", why=why, fix="--cache int6"
                    ) from None
                pages //= 2

    @property
    def pool_devices(self) -> list[torch.device]:
        """Where each layer's latents lie."""
        return self.layer_devices or [self.device] * self.config.num_hidden_layers

    def agreed_tokens(self) -> int:
        """For how many tokens there is room in the pool of every rank; all ranks ask at once."""
        most = torch.tensor(self.most_pages(self.pool_devices) * PAGE, device=self.device)
        dist.all_reduce(most, dist.ReduceOp.MIN)
        return int(most)

    def most_pages(self, devices: list[torch.device]) -> int:
        """For how many pages there is room on the layers' devices, up to MOST_SEQUENCES of the longest."""
        most = MOST_SEQUENCES * pages_for(self.config.max_position_embeddings)
        token = size.kv_bytes_per_token(self.config, str(self.dtype).removeprefix("torch."), self.cache)
        page = PAGE * token // self.config.num_hidden_layers  # bytes a layer
        for device in set(devices):
            free = self.free_ram() if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
            most = min(most, int(POOL_SHARE * free) // (page * devices.count(device)))
        return max(most, 2)

    def free_ram(self) -> int:
        """Bytes of RAM that the weights leave; where they do not fit and are mapped, half of what all but the
        experts leave.
        """
        tensors = {name: each for name, each in state_of(self.model).items() if each.device.type == "cpu"}
        free = ram_bytes() - sum(tensor.nbytes for tensor in tensors.values())
        if self.config.packed is None:
            return free
        mapped = sum(tensor.nbytes for name, tensor in tensors.items() if seldom_read(name, self.config))
        return max(free, (free + mapped) // 2)

    def __call__(self, ids: Tensor, spans: list[Span], pool: LatentPool, watch: Watch = unwatched) -> Tensor:
        assert self.model.products is self.products, "the model has another runner"
        rotary, team = self.model.rotary, self.model.team
        step = Step.of(spans, pool, rotary, ids.device, self.attention, self.alike, team, watch)
        return self.model(ids, step, self.run_layers)

    def run_layers(self, x: Tensor, step: Step) -> Tensor:
        """x [tokens, hidden] -> the same shape"""
        return self.model.run_layers(x, step)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.model.logits(hidden).to(self.device)

    def decode(self, ids: Tensor, spans: list[Span], pool: LatentPool) -> Tensor:
        return self.logits(self(ids.flatten(), spans, pool)).unflatten(0, ids.shape)

    def copy_page(self, pool: LatentPool, rank: int, source: int, target: int) -> None:
        if self.ranks == 1 or rank == self.model.team.rank:
            pool.copy_page(source, target)

    def set_page(self, pool: LatentPool, page: int, held: Tensor) -> None:
        pool.set_page(page, held)

    def read(self, pool: LatentPool, pages: list[int], length: int) -> list[Tensor]:
        return [
            pool.read(i, torch.tensor(pages, device=layer.device), length)
            for i, layer in enumerate(pool.layers)
        ]

    def fill(self, pool: LatentPool, pages: list[int], latents: list[Tensor]) -> None:
        slots = torch.tensor(Span(pages, 0, len(latents[0])).slots())
        for i, (layer, rows) in enumerate(zip(pool.layers, latents, strict=True)):
            pool.write(i, slots.to(layer.device), rows.to(layer.device))
