"""A rank above 0: load a part of the model and do what the leader does."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
import time

from dsv2cli.cli import launch
from dsv2cli.cli import options as opt

PR_SET_PDEATHSIG = 1


def work() -> None:
    """The whole life of a rank. Raises Dsv2Error where it can not load its part."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if launch.LAUNCHED in os.environ:
        end_with(int(os.environ[launch.LAUNCHED]))

    import torch.distributed as dist

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if launch.LAUNCHED in os.environ:
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), size, is_master=False
        )
    else:
        store, rank, size = next(dist.rendezvous("env://"))
    orders = json.loads(store.get(launch.ORDERS))
    if orders is None:
        return
    name, random_weights = orders["model"], orders["random_weights"]
    compute = opt.Compute.from_json(orders["compute"])
    found = opt.find(name, random_weights)
    plan = opt.make_plan(found.config, compute, int(os.environ.get("LOCAL_RANK", rank)))
    team = launch.connect(store, rank, size, plan.device, plan.triton, plan.sequences)
    model = opt.load(found, plan, compute, random_weights is not None, team)

    from dsv2cli.model.conductor import follow

    try:
        follow(model)
    except RuntimeError:  # the leader is gone, and says why itself
        sys.exit(1)
    dist.destroy_process_group()


def end_with(parent: int) -> None:
    """Let this process die when the leader does, however that happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
