"""Compile every Triton kernel that a function launches, for a GPU that need not be there, instead of
launching it.

Run as a program it compiles what a model's config needs and prints what each kernel takes: see `main`.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from dsv2cli.checkpoint.blueprint import blueprint, make_places, weights_to_pack
from dsv2cli.formats import Coding
from dsv2cli.model.config import DeepseekV2Config
from dsv2cli.model.step import Span
from dsv2cli.run.gpu import TritonRunner

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class NoDriver:
    """Answers what the compiler asks of a driver."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


COMPILED: dict[str, object] = {}
LAUNCHED: list[str] = []


def compile_only(capability: int) -> None:
    """From now on launching a kernel compiles it; outputs stay as they were."""
    driver.set_active(NoDriver(capability))
    launch = JITFunction.run

    def run(self, *arguments, **options):
        kernel = launch(self, *arguments, **options | {"warmup": True})
        COMPILED[kernel.hash] = kernel
        LAUNCHED.append(kernel.metadata.name)
        return kernel

    JITFunction.run = run


def resources(kernel) -> dict[str, int]:
    """Registers a thread, bytes of stack (registers spilled), and bytes of shared memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    line = next(line for line in text.splitlines() if "REG:" in line)
    found = dict(item.split(":") for item in line.split() if ":" in item)
    return {"registers": int(found["REG"]), "stack": int(found["STACK"]), "shared": kernel.metadata.shared}


def shortened(config, layers: int = 2):
    """The config with its layers' kinds, and fewer of them."""
    return dataclasses.replace(config, num_hidden_layers=layers, first_k_dense_replace=1, vocab_size=1024)


def model_of(config, kind: str):
    """Without numbers: with weights in bf16 for 16, in int8 or int4 for 8 or 4, or in codes of a Coding."""
    format = None if kind == "16" else f"int{kind}"
    model = blueprint(config, torch.bfloat16, format=format if kind in ("16", "8", "4") else None)
    if (coding := Coding.parse(kind)) is not None:
        make_places(model, {name: coding for name, _ in weights_to_pack(model)})
    return model.to_empty(device="cpu").requires_grad_(False)


def compile_steps(config, kind: str, sizes: list[int]) -> None:
    """All that a decode step of so many rows, and a prefill, launch."""
    model = model_of(config, kind)
    runner = TritonRunner(model)
    with torch.inference_mode():
        pool = runner.new_pool(4096)
        for rows in sizes:
            runner.decode(
                torch.zeros(rows, 1, dtype=torch.long), [Span([i % 64], 0, 1) for i in range(rows)], pool
            )
        runner(torch.zeros(256, dtype=torch.long), [Span([0, 1, 2, 3], 0, 256, True)], pool)


def main() -> None:
    """python tests/compile_for_gpu.py CONFIG KIND CAPABILITY: what each kernel takes, with KIND 16, 8, 4 or a
    Coding such as "4 32 plain F16 added", for sm_CAPABILITY.
    """
    path, kind, capability = sys.argv[1:]
    compile_only(int(capability))
    compile_steps(shortened(DeepseekV2Config.load(Path(path))), kind, [1, 64])
    # The first step: a dense layer, and one of experts up to the head's own launch.
    layer = LAUNCHED[LAUNCHED.index("few_down_kernel") + 1 :]
    print(f"one token: {layer.index('few_down_kernel') + 1} launches a layer")
    for kernel in COMPILED.values():
        print(f"{kernel.metadata.name}: {kernel.metadata.num_warps} warps, {resources(kernel)}")


if __name__ == "__main__":
    main()
