"""Starting the processes that share a model, watching over them, and ending them all together.

`dsv2 ... --gpus N` starts N - 1 more processes of itself on this machine. Under torchrun they are there
already. Either way rank 0 is the program the user sees, and the others (worker.py) do what it does. Nothing
here imports torch at import time.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dsv2cli.errors import Dsv2Error

if TYPE_CHECKING:
    from torch.distributed import Store

    from dsv2cli.run.plan import Plan
    from dsv2cli.team import Team

Complain = Callable[[Dsv2Error], None]  # shows an error to the person

LAUNCHED = "DSV2_LAUNCHED"  # set for processes that this module starts
ORDERS = "dsv2/orders"  # where the leader leaves what is to be loaded
PATIENCE = 5.0  # seconds for a process to end by itself


def is_follower() -> bool:
    """Whether this process is a rank above 0, started by us or by torchrun."""
    return int(os.environ.get("RANK", 0)) > 0 and int(os.environ.get("WORLD_SIZE", 1)) > 1


def torchrun_size() -> int:
    """Ranks that torchrun has started, or 1."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ and LAUNCHED not in os.environ else 1


def connect(store: Store, rank: int, size: int, plan: Plan) -> Team:
    """Make this process one rank of the team.

    Sums go through memory that all GPUs see, where kernels may use it.
    """
    import torch
    import torch.distributed as dist

    from dsv2cli.team import Team, shared_memory

    if LAUNCHED in os.environ or torchrun_size() == 1:  # all are on this machine
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    backend = "cpu:gloo,cuda:nccl" if plan.on_gpu else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    shared = shared_memory(rank, torch.device(plan.device)) if plan.on_gpu and plan.triton else None
    return Team(rank, size, shared, plan.sequences)


class Crew:
    """The processes that rank 0 has started. Where one ends by itself all end, with a
    sentence that names it.
    """

    def __init__(self, size: int, port: int, complain: Complain) -> None:
        self.complain, self.closing = complain, False
        self.terminal = terminal_settings()
        self.processes = [self.start(rank, size, port) for rank in range(1, size)]
        atexit.register(self.close)
        threading.Thread(target=self.watch, daemon=True).start()

    def start(self, rank: int, size: int, port: int) -> subprocess.Popen[bytes]:
        place = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": size,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            LAUNCHED: os.getpid(),
        }
        return subprocess.Popen(
            [sys.executable, "-m", "dsv2cli"],
            env=os.environ | {name: str(value) for name, value in place.items()},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is the leader's
        )

    def watch(self) -> None:
        while not self.closing:
            for rank, process in enumerate(self.processes, 1):
                if process.poll() is not None and not self.closing:
                    self.fail(rank, process)
            time.sleep(0.1)

    def fail(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        """Say which rank ended and why, and end the whole program: the leader may be waiting for it inside a
        library.
        """
        how = self.how_it_ended(process)
        self.stop()
        restore(self.terminal)
        fix = "what was said is saved; run the command again"
        self.complain(Dsv2Error(f"Rank {rank} of the model ended", why=how, fix=fix))
        sys.stderr.flush()
        os._exit(1)

    @staticmethod
    def how_it_ended(process: subprocess.Popen[bytes]) -> str:
        """The signal, the error it printed, its last line, or its exit code."""
        if process.returncode < 0:
            return f"it was killed by {signal.Signals(-process.returncode).name}"
        said = process.stderr.read().decode(errors="replace") if process.stderr is not None else ""
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        errors = [line.removeprefix("error:").strip() for line in lines if line.startswith("error:")]
        return next(iter(errors or lines[-1:]), "") or f"it ended with exit code {process.returncode}"

    def stop(self) -> None:
        """End the processes: they are asked to, and after some seconds made to."""
        self.closing = True
        for process in self.processes:
            if process.poll() is None:
                process.terminate()
        limit = time.monotonic() + PATIENCE
        for process in self.processes:
            try:
                process.wait(max(0.0, limit - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def close(self) -> None:
        if not self.closing:
            self.stop()


def terminal_settings() -> Any:
    """How the terminal is set, to put it back where a prompt may have changed it."""
    try:
        import termios
    except ImportError:
        return None
    try:
        return termios.tcgetattr(sys.stdin.fileno())
    except (termios.error, OSError, ValueError, AttributeError):  # no terminal, or no stdin
        return None


def restore(settings: Any) -> None:
    if settings is not None:
        import termios

        termios.tcsetattr(sys.stdin.fileno(), termios.TCSADRAIN, settings)


def gather(orders: dict[str, Any], plan: Plan, complain: Complain) -> Team:
    """The team of the plan with this process as its leader.

    `orders` tell the others what to load. Raises Dsv2Error.
    """
    import torch.distributed as dist

    size = plan.ranks
    try:
        if torchrun_size() > 1:
            store, rank, size = next(dist.rendezvous("env://"))
        else:
            store, rank = dist.TCPStore("127.0.0.1", 0, size, is_master=True, wait_for_workers=False), 0
            Crew(size, store.port, complain)
        store.set(ORDERS, json.dumps(orders))
        return connect(store, rank, size, plan)
    except (RuntimeError, OSError) as error:
        what, why = f"{size} processes could not be brought together", str(error).splitlines()[0]
        raise Dsv2Error(what, why=why, fix="fewer --gpus") from None


def dismiss() -> None:
    """Under torchrun, tell the others that nothing is to be loaded, where that is so."""
    import torch.distributed as dist

    if torchrun_size() > 1 and not is_follower() and not dist.is_initialized():
        next(dist.rendezvous("env://"))[0].set(ORDERS, "null")
