"""The devices that are there, and how much of their memory was used. Imports torch only when it is needed."""

from __future__ import annotations

import os
import resource
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")  # of NVIDIA, of the same under Windows, of AMD


def dtype_of(name: str) -> torch.dtype:
    """float32, bfloat16 or float16 as torch has it."""
    import torch

    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def device_name(device: torch.device) -> str:
    """A name to print beside a measurement."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def may_be_there() -> bool:
    """Whether to look for GPUs takes torch, and so its time."""
    return sys.platform != "linux" or any(map(os.path.exists, DRIVERS))


def gpu_memories() -> list[int]:
    """Bytes of each CUDA device. Where Linux has no driver for one, torch need not be asked."""
    if not may_be_there():
        return []
    import torch

    return [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was asked, so that a clock reads work and not queueing."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held so far: of the device on CUDA, of the whole process on a CPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
