"""What a kernel that triton compiled takes, read from its machine code: registers, stack, shared memory, and
the instructions of its loop.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_OF_AN_SM = {80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 120: 100}  # KiB
MULTIPROCESSORS = 132  # of an H100 or H200


@dataclass(frozen=True)
class Resources:
    """Of a thread, and shared memory of a program."""

    registers: int
    stack: int  # bytes, where registers are spilled
    shared: int
    loop: int = 0  # instructions
    loads: int = 0  # among them, from global memory, that the thread waits for
    copies: int = 0  # asynchronous ones to shared memory: LDGSTS
    unrolled: int = 1  # how often the loop of the source is in it


def resources(kernel) -> Resources:
    """Of a kernel compiled for NVIDIA or AMD."""
    return of_nvidia(kernel) if "cubin" in kernel.asm else of_amd(kernel)


def of_nvidia(kernel) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, code = (dumped(file.name, option) for option in ("-res-usage", "-sass"))
    line = next(line for line in usage.splitlines() if "REG:" in line)
    found = dict(item.split(":") for item in line.split() if ":" in item)
    loop = main_loop(code)
    loads, copies = (sum(name in each for each in loop) for name in (" LDG.", " LDGSTS."))
    written = len(re.findall(r"\b(?:ld\.global|cp\.async\.c[ag])", main_ptx_loop(kernel.asm["ptx"])))
    unrolled = max(1, round((loads + copies) / max(1, written)))
    return Resources(
        int(found["REG"]), int(found["STACK"]), kernel.metadata.shared, len(loop), loads, copies, unrolled
    )


def dumped(path: str, option: str) -> str:
    command = [TOOLS / "cuobjdump", option, path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main_loop(sass: str) -> list[str]:
    """The instructions from where a branch leads back to, to that branch: of the loops that one that loads
    most.
    """
    code = re.findall(r"^ +/\*([0-9a-f]{4,})\*/( .*?;)", sass, re.MULTILINE)
    places = {int(address, 16): i for i, (address, _) in enumerate(code)}
    loops = [[]]
    for i, (_, text) in enumerate(code):
        branch = re.search(r"\bBRA(?:\.\w+)* .*?0x([0-9a-f]+)", text)
        if branch and (start := places.get(int(branch[1], 16), i)) < i:
            loops.append([text for _, text in code[start : i + 1]])
    return max(loops, key=lambda loop: sum(" LDG" in text for text in loop))


def main_ptx_loop(ptx: str) -> str:
    """The same loop before ptxas unrolled it."""
    loops = [""]
    for label in re.finditer(r"^(\$L__BB\w+):", ptx, re.MULTILINE):
        if back := re.search(rf"bra(?:\.uni)?\s+\{label[1]};", ptx[label.end() :]):
            loops.append(ptx[label.end() : label.end() + back.end()])
    return max(loops, key=lambda loop: len(re.findall(r"\b(?:ld\.global|cp\.async\.c[ag])", loop)))


def of_amd(kernel) -> Resources:
    """Vector registers; registers spilled lie in the private segment."""
    found = dict(
        re.findall(r"^ +\.(vgpr_count|private_segment_fixed_size): +(\d+)", kernel.asm["amdgcn"], re.M)
    )
    return Resources(
        int(found["vgpr_count"]), int(found["private_segment_fixed_size"]), kernel.metadata.shared
    )


def resident(taken: Resources, warps: int, capability: int) -> int:
    """Programs that one multiprocessor holds at once: by registers (each of its four parts has 16,384, given
    out in eights to a thread), shared memory (1 KiB of which each program takes by itself) and threads.
    """
    a_warp = -(-max(taken.registers, 1) // 8) * 8 * 32
    by_shared = SHARED_OF_AN_SM.get(capability, 100) * 1024 // (taken.shared + 1024)
    return max(1, min(16384 // a_warp * 4 // warps, by_shared, 64 // warps, 32))
