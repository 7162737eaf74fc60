"""One rank of a team leads: the others do, step by step, what it does with its part of the model and its
caches.

The leader alone knows prompts, sampling and the terminal. Before every call that all ranks make together it
broadcasts a Message of what it is about to do; `follow` is the others' loop. Caches are alike in all ranks
and go by numbers.
"""

from __future__ import annotations

import enum
import signal
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dsv2cli.errors import Dsv2Error
from dsv2cli.model.cache import LatentCache
from dsv2cli.model.config import DeepseekV2Config
from dsv2cli.model.step import Watch, unwatched
from dsv2cli.model.transformer import DeepseekV2
from dsv2cli.run import launch
from dsv2cli.run.runner import PlainRunner, decode_among_all

NAMING = 3.0  # seconds for the watcher to name the dead rank first
INLINE = 256  # numbers in one broadcast; what is longer follows in a second one


class What(enum.IntEnum):
    """What a message asks for."""

    STOP, NEW, FORGET, REPEAT, FILL, PASS, LOGITS, DECODE = range(8)


@dataclass
class Message:
    """What the leader is about to do. A kind of message uses some of the fields; the rest
    stay as they are.
    """

    what: What
    cache: int = 0  # the number of the cache that it is about
    copy: int = 0  # REPEAT: the number of the new one
    row: int = -1  # PASS: the one row of the cache that it is about, or -1 for all
    capacity: int = 0  # tokens a row for which the cache must have room
    shape: list[int] = field(
        default_factory=list
    )  # of the ids or hidden states; NEW, REPEAT: [rows]; FILL: [tokens]
    rows: list[int] = field(default_factory=list)  # DECODE: those that go on
    lengths: list[int] = field(default_factory=list)  # of the cache's rows, or of `rows`, before the step
    ids: list[int] = field(default_factory=list)

    def numbers(self) -> list[int]:
        """As whole numbers: a list stands behind its length."""
        out: list[int] = []
        for each in fields(self):
            value = getattr(self, each.name)
            out += [len(value), *value] if isinstance(value, list) else [int(value)]
        return out

    @classmethod
    def of(cls, numbers: list[int]) -> Message:
        left, values = iter(numbers), dict[str, Any]()
        for each in fields(cls):
            first = next(left)
            values[each.name] = [next(left) for _ in range(first)] if each.type == "list[int]" else first
        return cls(**values | {"what": What(values["what"])})


def tell(message: Message) -> None:
    """From the leader to all. The first number broadcast says how many follow."""
    numbers = message.numbers()
    block = torch.zeros(INLINE, dtype=torch.int64)
    block[: min(INLINE, 1 + len(numbers))] = torch.tensor([len(numbers), *numbers[: INLINE - 1]])
    dist.broadcast(block, 0)
    if len(numbers) >= INLINE:
        dist.broadcast(torch.tensor(numbers[INLINE - 1 :]), 0)


def hear() -> Message:
    """What the leader tells next."""
    block = torch.zeros(INLINE, dtype=torch.int64)
    dist.broadcast(block, 0)
    count, *numbers = block.tolist()
    if count < INLINE:
        return Message.of(numbers[:count])
    rest = torch.zeros(count - (INLINE - 1), dtype=torch.int64)
    dist.broadcast(rest, 0)
    return Message.of([*numbers, *rest.tolist()])


@contextmanager
def whole() -> Iterator[None]:
    """A step that all ranks make.

    Ctrl-C waits until it is done: a leader that left in the middle would leave the others waiting.

    Raises Dsv2Error where another rank is gone; whoever watches over the ranks has some seconds to name it
    first.
    """
    with launch.BUSY.now(), named_losses():
        if threading.current_thread() is not threading.main_thread():
            yield
        else:
            with interrupted_afterwards():
                yield


@contextmanager
def named_losses() -> Iterator[None]:
    """What the library says of others that are gone, as a sentence. Raises as whole does."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        time.sleep(NAMING)
        why = str(error).splitlines()[0]
        raise Dsv2Error("The processes that share the model lost each other", why=why) from None


@contextmanager
def interrupted_afterwards() -> Iterator[None]:
    """Ctrl-C waits until what is in here is done."""
    held: list[tuple[int, FrameType | None]] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: held.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if held:
        signal.raise_signal(signal.SIGINT)


class LeaderCache(LatentCache):
    """The leader's own cache, with the number by which the others know theirs."""

    def __init__(self, leader: Leader, number: int, *arguments: Any) -> None:
        """`arguments` are LatentCache's."""
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
            self.leader.tell(What.REPEAT, self.number, copy=many.number, shape=[count], lengths=self.lengths)
        return many

    def fill(self, latents: list[Tensor]) -> None:
        """latents each [1, length, latent + rope]; the others take them over, too."""
        super().fill(latents)
        with whole():
            self.leader.tell(What.FILL, self.number, shape=self.lengths)
            for layer in self.latents(self.lengths[0]):
                dist.broadcast(layer.contiguous(), 0)


class Leader:
    """The Runner of rank 0: every call goes to the others, too, and is then made by `own`, its own runner."""

    def __init__(self, own: PlainRunner) -> None:
        self.own = own
        self.numbers = 0
        self.forgotten: list[int] = []

    @property
    def model(self) -> DeepseekV2:
        return self.own.model

    @property
    def config(self) -> DeepseekV2Config:
        return self.own.config

    @property
    def device(self) -> torch.device:
        return self.own.device

    @property
    def dtype(self) -> torch.dtype:
        return self.own.dtype

    @property
    def decodes_ahead(self) -> bool:
        return self.own.decodes_ahead

    @property
    def saved_bytes(self) -> int:
        return self.own.saved_bytes

    def next_number(self) -> int:
        self.numbers += 1
        return self.numbers

    def tell(self, what: What, cache: int = 0, **about: Any) -> None:
        """To all, and first of the caches that are gone; `about` are fields of Message."""
        while self.forgotten:
            tell(Message(What.FORGET, self.forgotten.pop()))
        tell(Message(what, cache, **about))

    def new_cache(self, batch: int = 1) -> LeaderCache:
        number = self.next_number()
        with whole():
            self.tell(What.NEW, number, shape=[batch])
        return LeaderCache(self, number, self.config, batch, *self.own.cache_layout())

    def __call__(self, ids: Tensor, cache: LatentCache, watch: Watch = unwatched) -> Tensor:
        assert isinstance(cache, LeaderCache)
        batch, seq = ids.shape
        cache.reserve(max(cache.lengths) + seq)
        about = {"row": cache.index, "capacity": cache.capacity, "shape": [batch, seq]}
        with whole():
            self.tell(What.PASS, cache.number, **about, lengths=cache.lengths, ids=ids.flatten().tolist())
            return self.own(ids, cache, watch)

    def logits(self, hidden: Tensor) -> Tensor:
        with whole():
            self.tell(What.LOGITS, shape=list(hidden.shape))
            dist.broadcast(hidden.contiguous(), 0)
            return self.own.logits(hidden)

    def decode(self, ids: Tensor, cache: LatentCache, rows: list[int] | None = None) -> Tensor:
        if not self.decodes_ahead:
            return decode_among_all(self, ids, cache, rows)
        assert isinstance(cache, LeaderCache) and cache.index < 0
        rows = list(range(len(cache.lengths))) if rows is None else rows
        lengths = [cache.lengths[row] for row in rows]
        cache.reserve(max(lengths) + ids.shape[1])
        about = {"capacity": cache.capacity, "shape": list(ids.shape), "rows": rows, "lengths": lengths}
        with whole():
            self.tell(What.DECODE, cache.number, **about)  # the ids are broadcast from device to device
            return self.own.decode(ids, cache, rows)

    def stop(self) -> None:
        """Let the others go."""
        with whole():
            self.tell(What.STOP)


class Follower:
    """A rank above 0: does with its part of the model and its caches what it hears."""

    def __init__(self, own: PlainRunner) -> None:
        self.own = own
        self.caches: dict[int, LatentCache] = {}

    def obey(self, message: Message) -> None:
        """One message, but for STOP."""
        match message.what:
            case What.NEW:
                self.caches[message.cache] = self.own.new_cache(message.shape[0])
            case What.FORGET:
                self.caches.pop(message.cache, None)
            case What.REPEAT:
                self.caches[message.cache].lengths = message.lengths
                self.caches[message.copy] = self.caches[message.cache].repeated(message.shape[0])
            case What.FILL:
                self.fill(self.caches[message.cache], message.shape[0])
            case What.LOGITS:
                hidden = torch.empty(message.shape, dtype=self.own.dtype, device=self.own.device)
                dist.broadcast(hidden, 0)
                self.own.logits(hidden)
            case What.PASS:
                cache = self.cache_of(message)
                cache.lengths = message.lengths
                self.own(torch.tensor(message.ids, device=self.own.device).view(message.shape), cache)
            case What.DECODE:
                cache = self.cache_of(message)
                for row, length in zip(message.rows, message.lengths, strict=True):
                    cache.lengths[row] = length
                ids = torch.zeros(
                    message.shape, dtype=torch.long, device=self.own.device
                )  # the leader's follow
                self.own.decode(ids, cache, message.rows)

    def fill(self, cache: LatentCache, length: int) -> None:
        """A cache of one row takes over the leader's."""
        latents = [layer.new_empty(1, length, layer.shape[2]) for layer in cache.layers]
        for layer in latents:
            dist.broadcast(layer, 0)
        cache.fill(latents)

    def cache_of(self, message: Message) -> LatentCache:
        """The cache that a step is about, as large as the leader's."""
        cache = self.caches[message.cache]
        if cache.capacity < message.capacity:
            cache.grow(message.capacity)
        return cache if message.row < 0 else cache.row(message.row)


@torch.inference_mode()
def follow(own: PlainRunner) -> None:
    """Do what the leader does until it stops."""
    follower = Follower(own)
    while (message := hear()).what is not What.STOP:
        follower.obey(message)
