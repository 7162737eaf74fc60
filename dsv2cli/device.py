"""Which device and number format to run on, and how much memory was used."""

from __future__ import annotations

import resource
import sys

import torch

from dsv2cli.errors import UsageError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str) -> torch.device:
    """`auto` takes the first CUDA device, else the CPU. Raises UsageError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UsageError(
            f"Unknown device {name!r}", why="devices are cpu, cuda and cuda:N", fix="--device auto"
        )
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise UsageError(
                f"Device {name!r} is not there", why=f"{count} CUDA devices found", fix="--device auto"
            )
        return torch.device("cuda", device.index or 0)
    return torch.device("cpu")


def device_name(device: torch.device) -> str:
    """A name to print beside a measurement."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def gpu_memories() -> list[int]:
    """Bytes of each CUDA device."""
    return [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was asked, so that a clock reads work and not queueing."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held so far: of the device on CUDA, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
