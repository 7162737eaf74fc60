"""From a model's name to a runner: find the checkpoint, look at the machine, plan, load, and choose the
runner.
"""

from __future__ import annotations

import atexit
import hashlib
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from dsv2cli.checkpoint.found import Checkpoint, find
from dsv2cli.checkpoint.load import load_model, random_model
from dsv2cli.device import dtype_of
from dsv2cli.errors import Dsv2Error, UsageError
from dsv2cli.kernels import native
from dsv2cli.model.transformer import DeepseekV2
from dsv2cli.run import launch
from dsv2cli.run.cpu import CppRunner
from dsv2cli.run.leader import Leader, whole
from dsv2cli.run.machine import from_disk, look_around
from dsv2cli.run.page_store import PageStore, identity, require_room
from dsv2cli.run.plan import Plan, apart_line, from_disk_line, make_plan
from dsv2cli.run.runner import PlainRunner, Runner
from dsv2cli.run.wish import Wish
from dsv2cli.team import ALONE, Team


class Screen(Protocol):
    """Where a person is told how it goes: cli/ui.py, or Silence."""

    def loading(self, name: str, /) -> AbstractContextManager[Callable[[int, int], None] | None]:
        """A progress bar; gives what is to be called with the bytes done and the bytes in all."""
        ...

    def note(self, text: str, /) -> None: ...

    def last_words(self, error: Dsv2Error, /) -> None:
        """Show an error after which the program ends at once. Called by any thread."""
        ...


@dataclass
class Opened(Checkpoint):
    """A model ready to run."""

    runner: Runner
    plan: Plan
    load_seconds: float
    store: PageStore | None = None


def open_model(
    name: str | None,
    wish: Wish,
    screen: Screen,
    random_weights: str | None = None,
    found: Checkpoint | None = None,
) -> Opened:
    """Find, plan, load.

    `random_weights` names a config to make a model from; `found` is what the name means, where that is known
    already. Raises Dsv2Error for whatever stands in the way.
    """
    if wish.kept is not None:
        if wish.sequences:
            why = "each rank has pages of its own"
            raise UsageError("--cache-store goes without --split-attention sequences", why=why)
        require_room(wish.kept[0])
    found = found or find(name, random_weights)
    plan = make_plan(found.config, wish, look_around())
    if plan.surprising:
        kernels = "Triton" if plan.on_gpu else "C++"
        screen.note(f"plain torch instead of the {kernels} kernels, because {plan.why_slower}")
    if plan.apart:
        screen.note(apart_line(found.config, plan))
    if random_weights is None and (expected := from_disk(found.config, plan, found.folder)) is not None:
        screen.note(from_disk_line(expected, plan.format))
    began = time.perf_counter()
    settle(plan)
    team = ALONE
    if plan.ranks > 1:
        orders = {"model": name, "random_weights": random_weights, "plan": plan.as_json()}
        team = launch.gather(orders, plan, screen.last_words)
    runner: Runner = load_runner(found, plan, team, screen, random_weights is not None)
    if team.size > 1:
        leader = runner = Leader(runner)  # type: ignore[arg-type]
        if launch.torchrun_size() > 1:
            atexit.register(leader.stop)
    store = None
    if wish.kept is not None:
        store = open_store(*wish.kept, found.folder, runner, plan)
    return Opened(
        **vars(found), runner=runner, plan=plan, load_seconds=time.perf_counter() - began, store=store
    )


def open_store(folder: Path, limit: int, checkpoint: Path, runner: Runner, plan: Plan) -> PageStore:
    """Where a loaded model keeps pages. Kernels that differ in the last bit do not share them.

    Raises Dsv2Error where the checkpoint can not be looked at.
    """
    made_by = (plan.device.partition(":")[0], plan.kernels_name, plan.kernels, plan.attention, plan.ranks)
    model = hashlib.sha256(f"{identity(checkpoint, runner)} {made_by}".encode()).hexdigest()
    return PageStore(folder, limit, model)


def with_wish(opened: Opened, wish: Wish) -> PlainRunner:
    """Another runner for a loaded model, as planned for a wish that differs in --cache alone; the one before
    can not go on. Raises Dsv2Error where that can not be.
    """
    runner = opened.runner
    assert isinstance(runner, PlainRunner), "a team has one format"
    plan = make_plan(opened.config, wish, look_around())
    if plan.places is not None:
        return PlainRunner(runner.model, runner.attention, runner.main, runner.layer_devices, plan.cache)
    return runner_of(runner.model, plan, kernels_of(plan))


def kernels_of(plan: Plan) -> native.Kernels | None:
    """The C++ kernels that the plan names."""
    return None if plan.kernels is None else native.load(plan.kernels)[0]


def settle(plan: Plan) -> None:
    """Give this process the device and the threads of the plan."""
    if plan.threads is not None:
        torch.set_num_threads(plan.threads)
    if plan.on_gpu and ":" in plan.device:  # or Triton and graphs take the first with pointers of another
        torch.cuda.set_device(plan.device)


def load_runner(found: Checkpoint, plan: Plan, team: Team, screen: Screen, random: bool) -> PlainRunner:
    """The model, or this rank's part of it, as planned; in a team this ends when all have loaded theirs."""
    device, dtype = torch.device(plan.device), dtype_of(plan.dtype)
    kernels = kernels_of(plan)
    if plan.places is not None:
        runner = load_spread(found, plan, plan.places, screen, random)
    elif random:
        model = random_model(found.config, device, dtype, plan.packing, team, plan.experts_on_gpu)
        runner = runner_of(model, plan, kernels)
    else:
        with screen.loading(found.name) as progress:
            model = load_model(
                found.folder,
                device,
                dtype,
                progress,
                plan.packing,
                kernels,
                team,
                plan.experts_on_gpu,
                plan.held,
                team.bound and plan.fits,
            )
        runner = runner_of(model, plan, kernels)
    if team.size > 1:
        with whole():
            dist.barrier()
    return runner


def load_spread(
    found: Checkpoint, plan: Plan, places: dict[str, Any], screen: Screen, random: bool
) -> PlainRunner:
    """A model whose layers lie on several devices, in RAM or on disk.

    Raises UsageError for one of random weights.
    """
    from dsv2cli.checkpoint.placement import layer_devices, load_placed  # with it comes accelerate

    if random:
        raise UsageError("--placement is for checkpoints", fix="leave --random-weights out")
    main, dtype = torch.device(plan.device), dtype_of(plan.dtype)
    scratch = None if plan.offload_folder is None else Path(plan.offload_folder)
    with screen.loading(found.name) as progress:
        model = load_placed(found.folder, found.config, dtype, plan.packing, places, main, scratch, progress)
    return PlainRunner(model, plan.attention, main, layer_devices(places, main), plan.cache)


def runner_of(model: DeepseekV2, plan: Plan, kernels: native.Kernels | None) -> PlainRunner:
    """The runner that the plan names, for a loaded model or a rank's part of it."""
    if plan.triton:
        from dsv2cli.run.gpu import TritonRunner  # needs triton

        how = (plan.cache, plan.rounds, plan.early)
        return TritonRunner(model, plan.attention, plan.graphs, plan.apart, kernels, *how)
    if kernels is not None:
        return CppRunner(model, kernels, plan.attention, plan.apart, plan.cache, plan.ahead)
    return PlainRunner(model, plan.attention, cache=plan.cache)
