"""One rank of a team leads: the others do, step by step, what it does with its part of the model and its caches.

The leader alone knows prompts, sampling and the terminal. Before every call that all ranks make together it broadcasts what
it is about to do; `follow` is the others' loop. Caches are alike in all ranks and go by numbers.
"""

from __future__ import annotations

import signal
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dsv2cli.errors import Dsv2Error
from dsv2cli.model.cache import LatentCache
from dsv2cli.model.transformer import DeepseekV2

STOP, FORWARD, LOGITS, REPEAT, FILL, FORGET, NEW, DECODE = range(8)
NAMING = 3.0  # seconds
INLINE = 256  # numbers in one message; what is longer follows in a second one


def tell(numbers: list[int]) -> None:
    """From the leader to all. The first number is how many follow."""
    message = torch.zeros(INLINE, dtype=torch.int64)
    message[: min(INLINE, 1 + len(numbers))] = torch.tensor([len(numbers), *numbers[: INLINE - 1]])
    dist.broadcast(message, 0)
    if len(numbers) >= INLINE:
        dist.broadcast(torch.tensor(numbers[INLINE - 1 :]), 0)


def hear() -> list[int]:
    message = torch.zeros(INLINE, dtype=torch.int64)
    dist.broadcast(message, 0)
    count, *numbers = message.tolist()
    if count < INLINE:
        return numbers[:count]
    rest = torch.zeros(count - (INLINE - 1), dtype=torch.int64)
    dist.broadcast(rest, 0)
    return [*numbers, *rest.tolist()]


@contextmanager
def whole() -> Iterator[None]:
    """A step that all ranks make. Ctrl-C waits until it is done: a leader that left in the middle would leave the others waiting.

    Raises Dsv2Error where another rank is gone; whoever watches over the ranks has some seconds to name it first.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[tuple[int, FrameType | None]] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: held.append((number, frame)))
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        time.sleep(NAMING)
        raise Dsv2Error(
            "The processes that share the model lost each other", why=str(error).splitlines()[0]
        ) from None
    finally:
        signal.signal(signal.SIGINT, before)
    if held:
        signal.raise_signal(signal.SIGINT)


class LeaderCache(LatentCache):
    """The leader's own cache, with the number by which the others know theirs."""

    def __init__(self, leader: Leader, number: int, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.leader, self.number, self.index = leader, number, -1
        weakref.finalize(self, leader.forgotten.append, number).atexit = False

    def row(self, index: int) -> LeaderCache:
        row = super().row(index)
        assert isinstance(row, LeaderCache)
        row.index = index
        return row

    def repeated(self, count: int) -> LeaderCache:
        many = super().repeated(count)
        assert isinstance(many, LeaderCache) and self.index < 0
        many.number = self.leader.next_number()
        weakref.finalize(many, self.leader.forgotten.append, many.number).atexit = False
        with whole():
            self.leader.tell(REPEAT, self.number, many.number, count, *self.lengths)
        return many

    def fill(self, layers: list[Tensor]) -> None:
        super().fill(layers)
        with whole():
            self.leader.tell(FILL, self.number, self.lengths[0])
            for layer in self.layers:
                dist.broadcast(layer[:, : self.lengths[0]].contiguous(), 0)


class Leader(DeepseekV2):
    """Rank 0's part of the model; every call goes to the others, too."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.numbers = 0
        self.forgotten: list[int] = []

    def next_number(self) -> int:
        self.numbers += 1
        return self.numbers

    def tell(self, what: int, *numbers: int) -> None:
        while self.forgotten:
            tell([FORGET, self.forgotten.pop()])
        tell([what, *numbers])

    def new_cache(self, batch: int = 1) -> LeaderCache:
        number = self.next_number()
        with whole():
            self.tell(NEW, number, batch)
        return LeaderCache(self, number, self.config, batch, self.devices, self.dtype, *self.row_shares)

    def forward(
        self, input_ids: Tensor, cache: LatentCache | None = None, new_tokens: list[int] | None = None
    ) -> Tensor:
        assert isinstance(cache, LeaderCache), "ranks step together only with a cache"
        batch, seq = input_ids.shape
        cache.reserve(max(cache.lengths) + seq)
        with whole():
            self.tell(
                FORWARD,
                cache.number,
                cache.index,
                cache.capacity,
                batch,
                seq,
                *cache.lengths,
                *input_ids.flatten().tolist(),
            )
            return super().forward(input_ids, cache, new_tokens)

    @contextmanager
    def together(self, cache: LatentCache, seq: int, rows: list[int]) -> Iterator[None]:
        assert isinstance(cache, LeaderCache) and cache.index < 0
        with whole():
            self.tell(
                DECODE,
                cache.number,
                cache.capacity,
                seq,
                len(rows),
                *rows,
                *(cache.lengths[row] for row in rows),
            )
            yield

    def logits(self, hidden: Tensor) -> Tensor:
        with whole():
            self.tell(LOGITS, *hidden.shape)
            dist.broadcast(hidden.contiguous(), 0)
            return super().logits(hidden)

    def stop(self) -> None:
        with whole():
            self.tell(STOP)


@torch.inference_mode()
def follow(model: DeepseekV2) -> None:
    """Do what the leader does until it stops."""
    caches: dict[int, LatentCache] = {}
    while True:
        what, *numbers = hear()
        if what == STOP:
            return
        if what == NEW:
            caches[numbers[0]] = model.new_cache(numbers[1])
        elif what == FORGET:
            caches.pop(numbers[0], None)
        elif what == REPEAT:
            source, target, count, *lengths = numbers
            caches[source].lengths = lengths
            caches[target] = caches[source].repeated(count)
        elif what == FILL:
            cache, length = caches[numbers[0]], numbers[1]
            layers = [layer.new_empty(1, length, layer.shape[2]) for layer in cache.layers]
            for layer in layers:
                dist.broadcast(layer, 0)
            cache.fill(layers)
        elif what == LOGITS:
            hidden = torch.empty(numbers, dtype=model.dtype, device=model.device)
            dist.broadcast(hidden, 0)
            model.logits(hidden)
        elif what == DECODE:
            decode_step(model, caches, numbers)
        else:
            step(model, caches, numbers)


def decode_step(model: DeepseekV2, caches: dict[int, LatentCache], numbers: list[int]) -> None:
    from dsv2cli.model.gpu import decode  # needs triton

    number, capacity, seq, count, *rest = numbers
    cache, rows = caches[number], rest[:count]
    if cache.capacity < capacity:
        cache.grow(capacity)
    for row, length in zip(rows, rest[count:], strict=True):
        cache.lengths[row] = length
    decode(
        model, cache, torch.zeros(count, seq, dtype=torch.long, device=model.device), rows
    )  # the leader's ids follow


def step(model: DeepseekV2, caches: dict[int, LatentCache], numbers: list[int]) -> None:
    number, index, capacity, batch, seq, *rest = numbers
    cache = caches[number]
    if cache.capacity < capacity:
        cache.grow(capacity)
    if index >= 0:
        cache = cache.row(index)
    cache.lengths = rest[:batch]
    model(torch.tensor(rest[batch:], device=model.device).view(batch, seq), cache)
