"""The C++ in cpu/: compiled for this very processor on first use, and kept. Imports no torch.

Where there is no compiler, or it fails, the plain torch path runs, and `library` says why.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

from dsv2cli.errors import Dsv2Error
from dsv2cli.places import compiled_kernels, private_folder, remove, temporary_folder, unfinished

SOURCES = Path(__file__).with_name("cpu")  # api.cpp there includes all the others
ARM = platform.machine() in ("arm64", "aarch64")  # where -march names no processor
TARGETS = {
    "native": ["-mcpu=native" if ARM else "-march=native"],
    "avx2": ["-march=x86-64-v3"],
    "portable": [],
}
INSTRUCTIONS = (  # by which programs like this one differ, as Linux writes them
    "avx2 f16c avx_vnni avx512f avx512bw avx512vl avx512_vnni avx512_bf16 avx512_fp16 amx_int8 amx_bf16 "
    "asimd asimddp i8mm bf16 sve sve2"
).split()
# Sums are taken as they are written, or as `omp simd` says, so that a token gets the same bits from
# every form of a loop. Not -ffast-math: the whole process would flush small numbers to zero, too.
FLAGS = (
    "-O3 -std=c++17 -fPIC -shared -pthread -Wno-psabi "
    "-fno-math-errno -fno-trapping-math -fno-signed-zeros -ffp-contract=fast -fopenmp-simd"
)


def compiler() -> str | None:
    """The C++ compiler that would be used."""
    return shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++") or shutil.which("clang++")


@functools.cache
def library(target: str = "native") -> tuple[ctypes.CDLL | None, str]:
    """The kernels for a target, or None and the reason, as words to follow 'because'."""
    if target == "avx2" and ARM:
        return None, f"AVX2 is of x86 processors, and this one is {platform.machine()}"
    program = compiler()
    flags = FLAGS.split() + TARGETS[target]
    try:
        folder = safe_folder()
        built = folder / f"{target}-{key_of(SOURCES, flags, processor())}.so"
        if not is_whole(built):
            if program is None:
                return None, "there is no C++ compiler (c++, g++ or clang++)"
            build(program, flags, built)
        loaded = ctypes.CDLL(str(built))
        loaded.dsv2_path.restype = ctypes.c_char_p
        return loaded, ""
    except (OSError, subprocess.CalledProcessError, AttributeError) as error:
        return None, f"they could not be compiled ({str(error).splitlines()[0]})"


def safe_folder() -> Path:
    """Where compiled kernels are kept: a folder of our own that nobody else can write, or else a temporary
    one.

    Raises OSError.
    """
    try:
        folder = private_folder(compiled_kernels())
        if is_ours(folder):
            return folder
        if folder.stat().st_uid == os.geteuid():
            folder.chmod(0o700)
            return folder
    except (OSError, Dsv2Error):
        pass  # no home, or none that can be written
    return temporary_folder("dsv2-kernels")


def is_ours(path: Path) -> bool:
    """Whether a file or folder is this user's, and nobody else can write it. Raises OSError."""
    about = path.lstat()
    return about.st_uid == os.geteuid() and not about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def is_whole(built: Path) -> bool:
    """Whether a library is there as it was compiled: ours, a plain file, with the SHA-256 that lies beside
    it.
    """
    try:
        ours = is_ours(built) and stat.S_ISREG(built.lstat().st_mode)
        return ours and hash_file(built).read_text() == hashlib.sha256(built.read_bytes()).hexdigest()
    except (OSError, ValueError):
        return False


def hash_file(built: Path) -> Path:
    """Where the SHA-256 of a library lies."""
    return built.with_suffix(".sha256")


def key_of(sources: Path, flags: list[str], cpu: str) -> str:
    """What a compiled library is kept by: names and contents of all `sources`, flags, and the processor."""
    digest = hashlib.sha256(repr((flags, cpu)).encode())
    for path in sorted(path for path in sources.iterdir() if path.is_file()):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)} ".encode() + content)
    return digest.hexdigest()[:16]


def build(program: str, flags: list[str], built: Path) -> None:
    """Compile beside the place and move there, so that two processes may do it at once.

    With OpenMP where there is one. Raises subprocess.CalledProcessError if the compiler fails, and OSError if
    it can not be started or the place can not be written.
    """
    with unfinished(built, folder=True) as folder:
        out = folder / built.name
        done = None
        for openmp in (["-fopenmp"], []):
            done = subprocess.run(
                [program, *flags, *openmp, "-o", str(out), str(SOURCES / "api.cpp")], capture_output=True
            )
            if done.returncode == 0:
                out.chmod(0o700)
                written = hash_file(out)
                written.write_text(hashlib.sha256(out.read_bytes()).hexdigest())
                if built.is_dir():
                    remove(built)
                out.replace(built)
                written.replace(hash_file(built))
                return
        assert done is not None
        done.check_returncode()


def processor() -> str:
    """What must be the same for a compiled library to run: the instruction sets, as Linux lists them, or the
    name that macOS has for them all.
    """
    if platform.system() == "Darwin":
        asked = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(asked, capture_output=True, text=True).stdout + platform.machine()
    return cpuinfo("flags", "Features") or platform.processor() + platform.machine()


def cpuinfo(*names: str) -> str:
    """The first line of what Linux says of the processor that begins with one of the names, or nothing."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(names)), "")


def about_processor() -> dict[str, Any]:
    """Its name, and which of the instruction sets that matter here it has."""
    name = cpuinfo("model name").partition(":")[2].strip() or platform.processor() or platform.machine()
    there = processor().split()
    return {"processor": name, "instructions": [each for each in INSTRUCTIONS if each in there]}


def name_of(loaded: ctypes.CDLL) -> str:
    """What the kernels call themselves: the instruction set that they use."""
    return str(loaded.dsv2_path().decode())
