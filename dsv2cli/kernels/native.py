"""cpu.cpp for this very processor: compiled on first use, kept by source and CPU, called through ctypes.

Where there is no compiler, or it fails, the plain torch path runs, and `load` says why.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dsv2cli.formats import LANES
from dsv2cli.kernels.quantized import CODEBOOK, SHRINKS, Quantized
from dsv2cli.places import compiled_kernels

SOURCE = Path(__file__).with_name("cpu.cpp")
TARGETS = {"native": ["-march=native"], "avx2": ["-march=x86-64-v3"], "portable": []}
# Copies of functions for constants (ipa-cp-clone) cost a fifth of the time to compile, and gain nothing here.
# Sums may be taken in any order. Not -ffast-math: it would switch the whole process to flush small numbers to zero.
FLAGS = "-O3 -fno-ipa-cp-clone -std=c++17 -fPIC -shared -fno-math-errno -fno-trapping-math -fno-signed-zeros -fassociative-math -Wno-psabi"


class Matrix(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "scales")),
        *((name, ctypes.c_int64) for name in ("codes_step", "scales_step")),
        *((name, ctypes.c_int32) for name in ("kind", "rows", "cols", "group")),
    ]


class AttentionPart(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("norm", "q_a_norm", "kv_a_norm")),
        *((name, Matrix) for name in ("q_a", "q", "kv_a", "k_up", "v_up", "o")),
        *((name, ctypes.c_int32) for name in ("hidden", "heads", "nope", "rope", "value", "rank", "q_rank")),
        *((name, ctypes.c_float) for name in ("eps", "scale")),
    ]


class MlpPart(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("norm", "gate")),
        *((name, Matrix) for name in ("gate_up", "down", "shared_gate_up", "shared_down")),
        *((name, ctypes.c_int32) for name in ("hidden", "width", "shared_width", "experts", "top_k")),
        *((name, ctypes.c_int32) for name in ("groups", "top_groups", "normalise")),
        *((name, ctypes.c_float) for name in ("eps", "factor")),
    ]


class LayerParts(ctypes.Structure):
    _fields_ = [("attention", AttentionPart), ("mlp", MlpPart)]


class Kernels:
    """The loaded library. Weights are bf16 tensors or Quantized; activations are bf16, on the CPU, contiguous."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        library.dsv2_path.restype = ctypes.c_char_p
        library.dsv2_read.restype = ctypes.c_uint64
        library.dsv2_codebook(bytes(int(value) + 128 for value in CODEBOOK))
        self.path = str(library.dsv2_path().decode())

    def linear(self, weight: Tensor | Quantized) -> Callable[[Tensor], Tensor]:
        """x [..., cols] -> x times weight [rows, cols], both bf16."""
        table, rows = matrix(weight), weight.shape[-2]

        def product(x: Tensor) -> Tensor:
            x = x.contiguous()
            out = torch.empty(*x.shape[:-1], rows, dtype=torch.bfloat16)
            count = x.numel() // x.shape[-1]
            self.library.dsv2_linear(
                ctypes.byref(table), pointer(x), count, pointer(out), 0, torch.get_num_threads()
            )
            return out

        return product

    def layers(
        self,
        parts: ctypes.Array[LayerParts],
        x: Tensor,
        rotary: Tensor,
        lengths: Tensor,
        caches: list[int],
        mlp: bool = True,
    ) -> None:
        """x [tokens, hidden] through all the layers of `parts`, or through their attention alone.

        rotary [tokens, 2, rope / 2]; token i is the last of the first lengths[i] (int32) rows of its cache; caches are the addresses
        of each layer's [capacity, rank + rope] for each token.
        """
        assert len(caches) == len(parts) * len(x)
        addresses = (ctypes.c_void_p * len(caches))(*caches)
        self.library.dsv2_layers(
            parts,
            len(parts),
            1,
            int(mlp),
            pointer(x),
            len(x),
            pointer(rotary),
            pointer(lengths),
            addresses,
            torch.get_num_threads(),
        )

    def mlp(self, parts: ctypes.Array[LayerParts], x: Tensor) -> None:
        """x [tokens, hidden] += MLP or MoE, for each of `parts`."""
        self.library.dsv2_layers(
            parts, len(parts), 0, 1, pointer(x), len(x), None, None, None, torch.get_num_threads()
        )

    def feed(
        self, part: MlpPart, x: Tensor, index: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        """MLP of x [tokens, hidden], or with index and weight [tokens, k] the weighted sum of its experts; one below 0 is left out."""
        x, out = x.contiguous(), torch.zeros_like(x)
        chosen, factors = (
            (None, None)
            if index is None or weight is None
            else (index.int().contiguous(), weight.float().contiguous())
        )
        self.library.dsv2_feed(
            ctypes.byref(part),
            pointer(x),
            None if chosen is None else pointer(chosen),
            None if factors is None else pointer(factors),
            pointer(out),
            x.shape[0],
            torch.get_num_threads(),
        )
        return out

    def pack(
        self, weight: Tensor, bits: int, group: int, codes: Tensor, scales: Tensor, threads: int = 1
    ) -> None:
        """The same as quantized.pack_reference, into codes and scales. weight [rows, cols]"""
        wide = weight.float().contiguous()
        shrinks = (ctypes.c_float * len(SHRINKS))(*SHRINKS)
        self.library.dsv2_pack(
            pointer(wide),
            *wide.shape,
            bits,
            group,
            shrinks,
            len(SHRINKS),
            pointer(codes),
            pointer(scales),
            threads,
        )

    def read(self, data: Tensor) -> None:
        """Read every byte once, with all threads: what the memory can give."""
        self.library.dsv2_read(
            pointer(data), ctypes.c_int64(data.numel() * data.element_size()), torch.get_num_threads()
        )


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def matrix(weight: Tensor | Quantized | None) -> Matrix:
    """How C++ sees a weight [rows, cols] or a stack of them; kind 0 for none. The weight must outlive it."""
    if weight is None:
        return Matrix()
    rows, cols = weight.shape[-2:]
    if isinstance(weight, Quantized):
        steps = (weight.codes.stride(0), weight.scales.stride(0)) if len(weight.shape) == 3 else (0, 0)
        return Matrix(
            weight.codes.data_ptr(), weight.scales.data_ptr(), *steps, weight.bits, rows, cols, weight.group
        )
    assert weight.dtype == torch.bfloat16 and weight.stride()[-2:] == (cols, 1), (
        "kernels read bf16 as it lies"
    )
    return Matrix(
        weight.data_ptr(), None, weight.stride(0) * 2 if weight.dim() == 3 else 0, 0, LANES, rows, cols, 0
    )


def compiler() -> str | None:
    """The C++ compiler that would be used."""
    return shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++") or shutil.which("clang++")


@functools.cache
def load(target: str = "native") -> tuple[Kernels | None, str]:
    """The kernels for a target, or None and the reason, as words to follow 'because'."""
    program = compiler()
    flags = FLAGS.split() + TARGETS[target]
    key = hashlib.sha256(SOURCE.read_bytes() + repr((flags, processor())).encode()).hexdigest()[:16]
    folder = compiled_kernels()
    built = folder / f"{target}-{key}.so"
    try:
        if not built.exists():
            if program is None:
                return None, "there is no C++ compiler (c++, g++ or clang++)"
            folder.mkdir(parents=True, exist_ok=True)
            build(program, flags, built)
        return Kernels(ctypes.CDLL(str(built))), ""
    except (OSError, subprocess.CalledProcessError) as error:
        return None, f"they could not be compiled ({str(error).splitlines()[0]})"


def build(program: str, flags: list[str], built: Path) -> None:
    """Compile beside the place and move there, so that two processes may do it at once. OpenMP where there is one."""
    with tempfile.TemporaryDirectory(dir=built.parent) as folder:
        out = Path(folder) / built.name
        done = None
        for openmp in (["-fopenmp"], []):
            done = subprocess.run(
                [program, *flags, *openmp, "-o", str(out), str(SOURCE)], capture_output=True
            )
            if done.returncode == 0:
                out.replace(built)
                return
        assert done is not None
        done.check_returncode()


def processor() -> str:
    """What must be the same for a compiled library to run."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.processor() + platform.machine()
