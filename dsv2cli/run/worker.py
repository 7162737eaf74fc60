"""A rank above 0: load a part of the model and do what the leader does."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

import torch.distributed as dist

from dsv2cli.checkpoint.found import find
from dsv2cli.errors import Dsv2Error
from dsv2cli.run import launch
from dsv2cli.run.leader import follow
from dsv2cli.run.open import load_runner, settle
from dsv2cli.run.plan import Plan

PR_SET_PDEATHSIG = 1


class Silence:
    """The Screen of a process that nobody looks at: what goes wrong is raised, and said by the leader."""

    @contextlib.contextmanager
    def loading(self, name: str) -> Iterator[None]:
        yield None

    def note(self, text: str) -> None: ...

    def last_words(self, error: Dsv2Error) -> None: ...


def work() -> None:
    """The whole life of a rank. Raises Dsv2Error where it can not load its part."""
    if launch.LAUNCHED in os.environ:
        end_with(int(os.environ[launch.LAUNCHED]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):  # at once, whatever library it waits in
        signal.signal(number, signal.SIG_DFL)
    rank, size = launch.rank_and_size()
    store: dist.Store
    if launch.LAUNCHED in os.environ:
        store = dist.FileStore(os.environ[launch.MEETING], size)
    else:
        store, rank, size = next(dist.rendezvous("env://"))
    orders = json.loads(store.get(launch.ORDERS))
    if orders is None:
        return
    plan = Plan(**orders["plan"]).for_rank(int(os.environ.get("LOCAL_RANK", rank)))
    settle(plan)
    team = launch.connect(store, rank, size, plan)
    found = find(orders["model"], orders["random_weights"])
    runner = load_runner(found, plan, team, Silence(), orders["random_weights"] is not None)
    gc.enable()  # the program began without: cli/app.py
    try:
        follow(runner)
    except RuntimeError:  # the leader is gone, and says why itself
        sys.exit(1)


def end_with(parent: int) -> None:
    """Let this process die when the leader does, however that happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
