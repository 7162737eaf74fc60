"""Starting the processes that share a model, watching over them, and ending them all together.

`dsv2 ... --gpus N` starts N - 1 more processes of itself on this machine. Under torchrun they are there
already. Either way rank 0 is the program the user sees, and the others (worker.py) do what it does. Nothing
here imports torch at import time.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv2cli.errors import Dsv2Error, UsageError
from dsv2cli.places import temporary_folder
from dsv2cli.run import numa

if TYPE_CHECKING:
    from torch.distributed import Store

    from dsv2cli.run.plan import Plan
    from dsv2cli.team import Team

Complain = Callable[[Dsv2Error], None]  # shows an error to the person

LAUNCHED = "DSV2_LAUNCHED"  # set for processes that this module starts: the leader's number
# The file through which they find each other, in a folder that only this user can enter.
MEETING = "DSV2_MEETING"
TORCHRUN = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_RUN_ID",
)
# Seconds after which a rank is given up that is stopped, or that does nothing in a step while the leader
# waits.
STOPPED, HUNG = 10.0, 20.0
# -P: nothing of the folder we are in is imported; the package's own place comes last.
START = "import sys; sys.path.append(sys.argv.pop()); from dsv2cli.cli.app import main; main()"
ORDERS = "dsv2/orders"  # where the leader leaves what is to be loaded
PATIENCE = 5.0  # seconds for a process to end by itself
WAITING = timedelta(days=365)  # of a rank for the next order, at a prompt where nobody types


def is_follower() -> bool:
    """Whether this process is a rank above 0, started by us or by torchrun. Raises UsageError."""
    return rank_and_size()[0] > 0


def torchrun_size() -> int:
    """Ranks that torchrun has started, or 1. Raises UsageError."""
    return 1 if LAUNCHED in os.environ else rank_and_size()[1]


def rank_and_size() -> tuple[int, int]:
    """Which rank of how many this process is: (0, 1) alone. Variables that a cluster has left make no team:
    all of torchrun's must be there, or ours.

    Raises UsageError for values that make no sense.
    """
    if LAUNCHED not in os.environ and not all(name in os.environ for name in TORCHRUN):
        return 0, 1
    numbers = []
    known = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    for name in known[:3] if LAUNCHED in os.environ else known:
        value = os.environ.get(name, "")
        if not value.isdecimal() or len(value) > 6:
            raise UsageError(f"{name}={value[:80]!r} is no number", fix=f"unset {name}, or use torchrun")
        numbers.append(int(value))
    rank, size = numbers[:2]
    if not rank < size:
        raise UsageError(f"RANK={rank} and WORLD_SIZE={size} make no team", fix="unset RANK WORLD_SIZE")
    return rank, size


class Busy:
    """Since when this process has been in a step that all ranks make; None between two."""

    def __init__(self) -> None:
        self.since: float | None = None

    @contextlib.contextmanager
    def now(self) -> Iterator[None]:
        before, self.since = self.since, self.since or time.monotonic()
        try:
            yield
        finally:
            self.since = before


BUSY = Busy()


def connect(store: Store, rank: int, size: int, plan: Plan) -> Team:
    """Make this process one rank of the team.

    Sums go through memory that all GPUs see, where kernels may use it. On CPUs it stays near one memory.
    """
    import torch
    import torch.distributed as dist

    from dsv2cli.team import Team, shared_memory

    beside = rank, size  # which this one is among those on this machine
    if LAUNCHED in os.environ or torchrun_size() == 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    else:
        beside = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    bound = not plan.on_gpu and numa.bind(*beside) is not None
    backend = "cpu:gloo,cuda:nccl" if plan.on_gpu else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=WAITING)
    if torchrun_size() > 1 or not plan.on_gpu:  # NCCL wants all to leave, and a Crew's others are ended
        atexit.register(leave)
    shared = shared_memory(rank, torch.device(plan.device)) if plan.on_gpu and plan.triton else None
    return Team(rank, size, shared, plan.sequences, bound)


def leave() -> None:
    """End the team's threads while Python still runs: one that lets go of a tensor later ends the process by
    SIGABRT, with all its work done.
    """
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


class Crew:
    """The processes that rank 0 has started. Where one ends by itself all end, with a
    sentence that names it.
    """

    def __init__(self, size: int, meeting: Path, complain: Complain) -> None:
        self.complain, self.closing = complain, False
        self.terminal = terminal_settings()
        self.processes = [self.start(rank, size, meeting) for rank in range(1, size)]
        atexit.register(self.close)
        threading.Thread(target=self.watch, daemon=True).start()

    def start(self, rank: int, size: int, meeting: Path) -> subprocess.Popen[bytes]:
        place = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": size,
            MEETING: meeting,
            LAUNCHED: os.getpid(),
        }
        return subprocess.Popen(
            [sys.executable, "-P", "-c", START, str(Path(__file__).parents[2])],
            env=os.environ | {name: str(value) for name, value in place.items()},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is the leader's
        )

    def watch(self) -> None:
        """Until the end: whether every process lives, and does something where it should."""
        pulses = [Pulse(process.pid) for process in self.processes]
        for turn in itertools.count():
            for rank, (process, pulse) in enumerate(zip(self.processes, pulses, strict=True), 1):
                if self.closing:
                    return
                if process.poll() is not None:
                    rank = 1 + first_cause(self.processes)
                    self.fail(f"Rank {rank} of the model ended", self.how_it_ended(self.processes[rank - 1]))
                if turn % 10 == 0 and (how := pulse.look()):  # once a second is often enough
                    self.fail(f"Rank {rank} of the model does not answer", how)
            time.sleep(0.1)

    def fail(self, what: str, why: str) -> None:
        """Say what has become of a rank and why, and end the whole program: the leader may be waiting for it
        inside a library.
        """
        self.stop()
        restore(self.terminal)
        self.complain(Dsv2Error(what, why=why, fix="what was said is saved; run the command again"))
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


def first_cause(processes: list[subprocess.Popen[bytes]], seconds: float = 1.0) -> int:
    """Which of several processes, of which one has ended, to name: one that was killed may take longer to be
    gone than those that abort because they hear no more of it, or end with an exit code.
    """
    until = time.monotonic() + seconds
    while True:
        codes = [(index, process.poll()) for index, process in enumerate(processes)]
        ended = [(index, code) for index, code in codes if code is not None]
        killed = [index for index, code in ended if code < 0 and code != -signal.SIGABRT]
        if killed or time.monotonic() >= until:
            with_code = [index for index, code in ended if code > 0]
            return [*killed, *with_code, ended[0][0]][0]
        time.sleep(0.02)


class Pulse:
    """Whether a process still does something, by what the system says of it."""

    def __init__(self, pid: int) -> None:
        self.pid, self.moved, self.stopped_at = pid, time.monotonic(), 0.0
        self.seconds = (-1.0, -1.0)  # of the processor, for it and for our main thread

    def look(self) -> str:
        """Why it is to be given up, or nothing. Only within a step must it or our main thread have used the
        processor: one that is ready before us waits for us.
        """
        import psutil

        now = time.monotonic()
        try:
            process = psutil.Process(self.pid)
            stopped = process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
            threads = psutil.Process().threads()
            ours = sum(each.user_time + each.system_time for each in threads if each.id == os.getpid())
            used = (sum(process.cpu_times()[:2]), ours)
        except psutil.Error:  # it has ended, which others see
            return ""
        self.stopped_at = (self.stopped_at or now) if stopped else 0.0
        if used != self.seconds or BUSY.since is None:
            self.seconds, self.moved = used, now
        if stopped and now - self.stopped_at > STOPPED:
            return f"its process {self.pid} has been stopped for {STOPPED:.0f} seconds"
        if BUSY.since is not None and now - max(self.moved, BUSY.since) > HUNG:
            return f"its process {self.pid} has done nothing for {HUNG:.0f} seconds"
        return ""


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
            meeting = temporary_folder("dsv2-team") / "store"
            store, rank = dist.FileStore(str(meeting), size), 0
            Crew(size, meeting, complain)
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
