"""What this machine has for a model. Imports no torch where no GPU is."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from dsv2cli import disk, memory
from dsv2cli.device import dtype_of, gpu_memories
from dsv2cli.kernels import build
from dsv2cli.model import size
from dsv2cli.model.config import DeepseekV2Config
from dsv2cli.run import launch
from dsv2cli.run.plan import Here, Plan
from dsv2cli.run.wish import Wish


def look_around() -> Here:
    """What this machine has for a model."""
    memories = tuple(gpu_memories())
    return Here(
        gpu_memories=memories,
        cores=os.cpu_count() or 1,
        torchrun=launch.torchrun_size(),
        no_triton="" if importlib.util.find_spec("triton") else "triton is not installed",
        interpreted=os.environ.get("TRITON_INTERPRET") == "1",
        cpu_kernels=name_of_kernels,
        places=places_for,
        rocm=bool(memories) and is_rocm(),
        ram=memory.ram_bytes(),
    )


def from_disk(
    config: DeepseekV2Config, plan: Plan, folder: Path, cache_bytes: int = 0
) -> size.FromDisk | None:
    """What to expect where a mapped checkpoint in `folder` is larger than memory; None where it is not, or
    nothing is mapped.
    """
    if config.packed is None or plan.on_gpu or plan.ranks > 1 or plan.places is not None:
        return None
    return expected_from(config, plan.format, plan.dtype, memory.ram_bytes(), folder, cache_bytes)


def expected_from(
    config: DeepseekV2Config,
    format: str,
    dtype: str,
    memory_bytes: int,
    folder: Path,
    cache_bytes: int = 0,
    memory_speed: float | None = None,
) -> size.FromDisk | None:
    """The same for any memory; `memory_speed` in bytes a second. Measures the disk where that is needed."""
    if size.from_disk(config, format, dtype, memory_bytes, cache_bytes).fits:
        return None
    speed = disk.bytes_per_second(folder)
    return size.from_disk(config, format, dtype, memory_bytes, cache_bytes, speed, memory_speed)


def is_rocm() -> bool:
    """Whether what torch calls CUDA are AMD's GPUs."""
    import torch

    return torch.version.hip is not None


def name_of_kernels(target: str) -> tuple[str, str]:
    """What the C++ kernels of a target call themselves, or nothing and why they are not there."""
    library, why = build.library(target)
    return ("" if library is None else build.name_of(library)), why


def places_for(config: DeepseekV2Config, dtype: str, wish: Wish) -> dict[str, Any]:
    """Module -> device, as --placement and --max-memory say. Raises UsageError where they make no sense."""
    from dsv2cli.checkpoint.placement import place  # with it comes accelerate, which takes its time

    return place(config, dtype_of(dtype), wish.packing, wish.placement or "auto", wish.max_memory)
