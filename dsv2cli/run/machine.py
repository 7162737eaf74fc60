"""What this machine has for a model. Imports no torch where no GPU is."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from dsv2cli.device import dtype_of, gpu_memories
from dsv2cli.kernels import build
from dsv2cli.model.config import DeepseekV2Config
from dsv2cli.run import launch
from dsv2cli.run.plan import Here
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
    )


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
