"""One rank of a team leads: the others do, step by step, what it does with its part of the model and its
pools.

The leader alone knows prompts, sampling and which pages belong to whom. Before every call that all ranks make
together it broadcasts a Message of what it is about to do; `follow` is the others' loop. Pools are alike in
all ranks and go by numbers.
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
from dsv2cli.model.config import DeepseekV2Config
from dsv2cli.model.pool import LatentPool, pages_for
from dsv2cli.model.step import Span, Watch, unwatched
from dsv2cli.model.transformer import DeepseekV2
from dsv2cli.run import launch
from dsv2cli.run.runner import PlainRunner

NAMING = 3.0  # seconds for the watcher to name the dead rank first
INLINE = 256  # numbers in one broadcast; what is longer follows in a second one


class What(enum.IntEnum):
    """What a message asks for."""

    STOP, ROOM, NEW, FORGET, COPY, SET, FILL, PASS, LOGITS, DECODE = range(10)


@dataclass
class Message:
    """What the leader is about to do. A kind of message uses some of the fields; the rest
    stay as they are.
    """

    what: What
    pool: int = 0  # the number of the pool that it is about
    rank: int = 0  # COPY: whose page
    count: int = 0  # NEW, FILL: tokens; SET: bytes
    shape: list[int] = field(default_factory=list)  # of the hidden states (LOGITS) or ids (DECODE)
    starts: list[int] = field(default_factory=list)  # of the spans
    counts: list[int] = field(default_factory=list)
    wholes: list[int] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    pages: list[int] = field(
        default_factory=list
    )  # of one span after the other; COPY: from, to; SET: the one
    ids: list[int] = field(default_factory=list)

    def spans(self) -> list[Span]:
        """Those that it tells of."""
        out, pages = [], iter(self.pages)
        for start, count, whole, rank in zip(self.starts, self.counts, self.wholes, self.ranks, strict=True):
            own = [next(pages) for _ in range(pages_for(start + count))]
            out.append(Span(own, start, count, bool(whole), rank))
        return out

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


def told_of(spans: list[Span]) -> dict[str, list[int]]:
    """Spans as fields of a Message."""
    return {
        "starts": [span.start for span in spans],
        "counts": [span.count for span in spans],
        "wholes": [int(span.whole) for span in spans],
        "ranks": [span.rank for span in spans],
        "pages": [page for span in spans for page in span.pages[: pages_for(span.end)]],
    }


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


class Leader:
    """The Runner of rank 0: every call goes to the others, too, and is then made by `own`, its own runner."""

    def __init__(self, own: PlainRunner) -> None:
        self.own = own
        self.numbers: weakref.WeakKeyDictionary[LatentPool, int] = weakref.WeakKeyDictionary()
        self.last = 0
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
    def cache(self) -> str:
        return self.own.cache

    @property
    def decodes_ahead(self) -> bool:
        return self.own.decodes_ahead

    @property
    def saved_bytes(self) -> int:
        return self.own.saved_bytes

    @property
    def ranks(self) -> int:
        return self.own.ranks

    @property
    def alike(self) -> bool:
        return self.own.alike

    @property
    def chunk(self) -> int:
        return self.own.chunk

    def tell(self, what: What, pool: LatentPool | None = None, **about: Any) -> None:
        """To all, and first of the pools that are gone; `about` are fields of Message."""
        while self.forgotten:
            tell(Message(What.FORGET, self.forgotten.pop()))
        tell(Message(what, 0 if pool is None else self.numbers[pool], **about))

    def new_pool(self, tokens: int | None = None) -> LatentPool:
        """As Runner.new_pool, where no rank has less room than all others."""
        if tokens is None:
            with whole():
                self.tell(What.ROOM)
                tokens = self.own.agreed_tokens()
        pool = self.own.new_pool(tokens)
        self.last += 1
        self.numbers[pool] = self.last
        weakref.finalize(pool, self.forgotten.append, self.last).atexit = False
        with whole():
            self.tell(What.NEW, pool, count=tokens)
        return pool

    def __call__(self, ids: Tensor, spans: list[Span], pool: LatentPool, watch: Watch = unwatched) -> Tensor:
        with whole():
            self.tell(What.PASS, pool, **told_of(spans), ids=ids.tolist())
            return self.own(ids, spans, pool, watch)

    def logits(self, hidden: Tensor) -> Tensor:
        with whole():
            self.tell(What.LOGITS, shape=list(hidden.shape))
            dist.broadcast(hidden.contiguous(), 0)
            return self.own.logits(hidden)

    def decode(self, ids: Tensor, spans: list[Span], pool: LatentPool) -> Tensor:
        if not self.decodes_ahead:
            return self.logits(self(ids.flatten(), spans, pool)).unflatten(0, ids.shape)
        with whole():
            # The ids are broadcast from device to device.
            self.tell(What.DECODE, pool, shape=list(ids.shape), **told_of(spans))
            return self.own.decode(ids, spans, pool)

    def copy_page(self, pool: LatentPool, rank: int, source: int, target: int) -> None:
        with whole():
            self.tell(What.COPY, pool, rank=rank, pages=[source, target])
            self.own.copy_page(pool, rank, source, target)

    def set_page(self, pool: LatentPool, page: int, held: Tensor) -> None:
        with whole():
            self.tell(What.SET, pool, count=len(held), pages=[page])
            dist.broadcast(held, 0)
            self.own.set_page(pool, page, held)

    def read(self, pool: LatentPool, pages: list[int], length: int) -> list[Tensor]:
        return self.own.read(pool, pages, length)

    def fill(self, pool: LatentPool, pages: list[int], latents: list[Tensor]) -> None:
        self.own.fill(pool, pages, latents)
        with whole():
            self.tell(What.FILL, pool, count=len(latents[0]), pages=pages)
            for layer in self.own.read(pool, pages, len(latents[0])):
                dist.broadcast(layer.contiguous(), 0)

    def stop(self) -> None:
        """Let the others go."""
        with whole():
            self.tell(What.STOP)


class Follower:
    """A rank above 0: does with its part of the model and its pools what it hears."""

    def __init__(self, own: PlainRunner) -> None:
        self.own = own
        self.pools: dict[int, LatentPool] = {}

    def obey(self, message: Message) -> None:
        """One message, but for STOP."""
        own, pool = self.own, self.pools.get(message.pool)
        match message.what:
            case What.ROOM:
                own.agreed_tokens()
            case What.NEW:
                self.pools[message.pool] = own.new_pool(message.count)
            case What.FORGET:
                self.pools.pop(message.pool, None)
            case What.LOGITS:
                hidden = torch.empty(message.shape, dtype=own.dtype, device=own.device)
                dist.broadcast(hidden, 0)
                own.logits(hidden)
            case _:
                assert pool is not None
                self.work_on(pool, message)

    def work_on(self, pool: LatentPool, message: Message) -> None:
        """One message about a pool that is here."""
        own = self.own
        match message.what:
            case What.COPY:
                own.copy_page(pool, message.rank, *message.pages)
            case What.SET:
                held = torch.empty(message.count, dtype=torch.uint8)
                dist.broadcast(held, 0)
                own.set_page(pool, message.pages[0], held)
            case What.FILL:
                shape = (message.count, own.config.cached_dim)
                like = [torch.empty(shape, dtype=own.dtype, device=layer.device) for layer in pool.layers]
                for layer in like:
                    dist.broadcast(layer, 0)
                own.fill(pool, message.pages, like)
            case What.PASS:
                own(torch.tensor(message.ids, device=own.device), message.spans(), pool)
            case What.DECODE:
                ids = torch.zeros(message.shape, dtype=torch.long, device=own.device)  # the leader's follow
                own.decode(ids, message.spans(), pool)


@torch.inference_mode()
def follow(own: PlainRunner) -> None:
    """Do what the leader does until it stops."""
    follower = Follower(own)
    while (message := hear()).what is not What.STOP:
        follower.obey(message)
