"""What the engine asks of a model that runs, and the plainest way to do it: torch alone.

The other ways are cpu.py (C++ kernels), gpu.py (Triton kernels) and leader.py (several processes). A model
has one runner at a time, the last one made, because a runner tells the model's boxes which kernels to use.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from dsv2cli.model.cache import LatentCache
from dsv2cli.model.config import DeepseekV2Config
from dsv2cli.model.layers import Products
from dsv2cli.model.step import Step, Watch, unwatched
from dsv2cli.model.transformer import DeepseekV2

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
        """Of hidden states and cache."""
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

    def new_cache(self, batch: int = 1) -> LatentCache:
        """Of `batch` empty rows."""
        ...

    def __call__(self, ids: Tensor, cache: LatentCache, watch: Watch = unwatched) -> Tensor:
        """ids [batch, seq] continue the cache's rows -> hidden states [batch, seq, hidden]; its lengths
        follow.
        """
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., hidden] -> scores for the next token [..., vocab] in fp32"""
        ...

    def decode(self, ids: Tensor, cache: LatentCache, rows: list[int] | None = None) -> Tensor:
        """Few new tokens: ids [rows, seq] continue these rows of the cache, or all -> logits [rows, seq,
        vocab]

        The cache's lengths follow; the next call may overwrite the logits.
        """
        ...


class PlainRunner:
    """A Runner in plain torch, and what the others have in common with it."""

    def __init__(
        self,
        model: DeepseekV2,
        attention: str = "auto",
        main: torch.device | None = None,
        layer_devices: list[torch.device] | None = None,
    ) -> None:
        """`attention` is one of ATTENTION_PATHS; `main` and `layer_devices` say what computes where weights
        travel.
        """
        assert attention in ATTENTION_PATHS, attention
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
        return self.model.model.embed_tokens.weight.dtype

    @property
    def decodes_ahead(self) -> bool:
        return False

    @property
    def saved_bytes(self) -> int:
        return 0

    @property
    def absorbs(self) -> bool:
        """Whether few new tokens take the absorbed attention path, the only one that kernels know."""
        return self.attention in ("auto", "absorbed")

    def new_cache(self, batch: int = 1) -> LatentCache:
        return LatentCache(self.config, batch, *self.cache_layout())

    def cache_layout(self) -> tuple[list[torch.device], torch.dtype, int, int]:
        """Of every cache: each layer's device, the number format, and this rank among those that share the
        rows.
        """
        devices = self.layer_devices or [self.device] * self.config.num_hidden_layers
        team = self.model.team
        return devices, self.dtype, *((team.rank, team.size) if team.sequences else (0, 1))

    def __call__(self, ids: Tensor, cache: LatentCache, watch: Watch = unwatched) -> Tensor:
        assert self.model.products is self.products, "the model has another runner"
        step = Step.after(cache, ids, self.model.rotary, self.attention, self.model.team, watch)
        hidden = self.model(ids, step, self.run_layers)
        cache.lengths = [length + ids.shape[1] for length in cache.lengths]
        return hidden

    def run_layers(self, x: Tensor, step: Step) -> Tensor:
        """x [batch, seq, hidden] -> the same shape"""
        return self.model.run_layers(x, step)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.model.logits(hidden).to(self.device)

    def decode(self, ids: Tensor, cache: LatentCache, rows: list[int] | None = None) -> Tensor:
        return decode_among_all(self, ids, cache, rows)


def decode_among_all(runner: Runner, ids: Tensor, cache: LatentCache, rows: list[int] | None) -> Tensor:
    """Runner.decode by a pass of all rows, in which those that are not asked for are carried along and forget
    it.

    The shapes are its own.
    """
    if rows is None:
        return runner.logits(runner(ids, cache))
    before = list(cache.lengths)
    every = ids.new_zeros(len(before), ids.shape[1])
    every[rows] = ids
    logits = runner.logits(runner(every, cache)[rows])
    cache.lengths = [length + (ids.shape[1] if i in rows else 0) for i, length in enumerate(before)]
    return logits
