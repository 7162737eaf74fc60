"""Another program beside this one: llama-bench, llama.cpp's or ik_llama.cpp's, on the same machine and with
as many threads.

It is asked by its command line and answers in JSON, of which nothing is believed. This model stays loaded
meanwhile, with its threads asleep.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch

from dsv2cli.engine.benchmark import Machine, Ours, Timing, Work, random_prompts, refuse_long_work
from dsv2cli.errors import Dsv2Error
from dsv2cli.kernels.native import Kernels
from dsv2cli.outside import Number, one_line, parse_json, path_of, read_within, reason
from dsv2cli.run.runner import Runner

NAME = "llama-bench"
LARGEST = 2**20  # bytes of an answer; two rows have some three thousand
SAID = 2**14  # bytes of what it says on stderr that are looked at
OURS = (  # flags that this program gives
    "-m --model -t --threads -p --n-prompt -n --n-gen -d --n-depth -r --repetitions -o --output"
).split()
BACKENDS = ("cuda", "vulkan", "metal", "sycl", "blas")  # as ik_llama.cpp names them, a field each
TOLD = ("build_commit", "build_number", "backends", "cpu_info", "model_type", "model_size", "n_threads")
RATE = Number(0.0, 1e12, above=True)
Row = dict[str, Any]


def program_at(text: str) -> str:
    """A program by its path, or by its name where a shell would find it. Raises Dsv2Error."""
    path = path_of(text).absolute()
    if (found := shutil.which(path) or shutil.which(text)) is not None:
        return str(found)
    why = "there is no such file"
    if path.exists():
        why = "it is a folder" if path.is_dir() else "it is not executable"
    fix = "--against PATH, where llama-bench of llama.cpp or ik_llama.cpp lies"
    raise Dsv2Error(f"{text} can not be run", why=why, fix=fix)


@dataclass(frozen=True)
class Peer:
    """A llama-bench, the file that it is to run, and flags of its own."""

    program: str
    file: Path
    flags: tuple[str, ...] = ()

    def command(self, work: Work, threads: int) -> list[str]:
        """As it is typed, for one repetition."""
        asked = f"-t {threads} -p {work.prompt} -n {work.generate} -r 1 -o json"
        if work.depth:
            asked += f" -d {work.depth}"  # which ik_llama.cpp does not know
        return [self.program, "-m", str(self.file), *asked.split(), *self.flags]

    def measure(self, work: Work, threads: int) -> tuple[float, float, Row]:
        """Tokens a second of prefill and of decode, once, and what it tells of itself.

        Raises Dsv2Error where it does not run to its end or answers something else.
        """
        command = self.command(work, threads)
        printed = output(command)
        try:
            rows = parse_json(printed)
            prefill, decode = (
                row_of(rows, prompt, new, threads, work.depth)
                for prompt, new in ((work.prompt, 0), (0, work.generate))
            )
        except ValueError as error:
            raise failed(command, f"its answer can not be used: {reason(error)}") from None
        return prefill["avg_ts"], decode["avg_ts"], about(decode)


def row_of(rows: Any, prompt: int, new: int, threads: int, depth: int) -> Row:
    """The one row of such a measurement. Raises ValueError where it is not there, or is of something else."""
    lengths, listed = (prompt, new), rows if isinstance(rows, list) else []
    found = [
        row for row in listed if isinstance(row, dict) and (row.get("n_prompt"), row.get("n_gen")) == lengths
    ]
    if len(found) != 1:
        many = "several rows" if found else "no row"
        raise ValueError(f"{many} with n_prompt {prompt} and n_gen {new}")
    row: Row = found[0]
    for name, wanted in (("n_threads", threads), ("n_depth", depth)):
        if row.get(name, wanted) != wanted:
            raise ValueError(f"{name} is {str(row[name])[:40]}, where {wanted} was asked for")
    if row.get("avg_ts") not in RATE:
        raise ValueError(f"avg_ts is {str(row.get('avg_ts'))[:40]}, where it must be {RATE}")
    return row


def about(row: Row) -> Row:
    """What a row says of build, machine and model; None for what it does not."""
    told = {name: row.get(name) for name in TOLD}
    if "backends" not in row:
        told["backends"] = ",".join(name for name in BACKENDS if row.get(name) is True) or "CPU"
    return {
        name: one_line(value) if isinstance(value, str) else value if isinstance(value, int) else None
        for name, value in told.items()
    }


def output(command: list[str]) -> bytes:
    """What a program prints. It ends with this one, and with it what it has started.

    Raises Dsv2Error where it can not be started, or fails.
    """
    with tempfile.TemporaryFile() as printed, tempfile.TemporaryFile() as said:
        try:
            # A group of its own can be ended whole; Ctrl-C comes to us alone.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=printed, stderr=said, start_new_session=True
            )
        except (OSError, ValueError) as error:
            raise failed(command, f"it can not be started: {reason(error)}") from None
        try:
            code = process.wait()
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if code != 0:
            raise failed(command, ", and ".join(filter(None, (ending(code), complaint(said)))))
        printed.seek(0)
        try:
            return read_within(printed, LARGEST)
        except OSError as error:
            raise failed(command, f"its answer can not be used: {reason(error)}") from None


def failed(command: list[str], why: str) -> Dsv2Error:
    fix = f"see what it says alone: {shlex.join(command)}"
    return Dsv2Error(f"{command[0]} measured nothing", why=why, fix=fix)


def ending(code: int) -> str:
    """What an exit code says of a program."""
    if code > 0:
        return f"it ended with exit code {code}"
    names = {each.value: each.name for each in signal.Signals}
    more = " (as a system does that has no more memory)" if code == -signal.SIGKILL else ""
    return f"it was ended by {names.get(-code, f'signal {-code}')}{more}"


def complaint(said: BinaryIO) -> str:
    """The line of what it said that tells most: the first that speaks of an error, else the last."""
    said.seek(0)
    lines = [line for line in said.read(SAID).decode("utf-8", "replace").splitlines() if line.strip()]
    telling = [line for line in lines if any(word in line.lower() for word in ("error", "assert", "fail"))]
    return f"said: {one_line((telling or lines[-1:])[0])}" if lines else ""


def measure_beside(
    runner: Runner,
    work: Work,
    repetitions: int,
    peer: Peer,
    tick: Callable[[], None] = lambda: None,
    kernels: Kernels | None = None,
) -> tuple[list[Timing], Row]:
    """Warm up once, then measure ours, theirs, ours, theirs; each as llama-bench does it: prefill and decode
    both begin after `work.depth` tokens. With it what the other program tells of itself.

    Raises Dsv2Error where the work does not fit into the context, or the other program fails.
    """
    work = replace(work, separate=True)
    refuse_long_work(runner, work)
    ours, theirs, told = Timing(Ours.name, work), Timing(NAME, work), Row()
    engine, machine = Ours(runner), Machine(runner.device, runner.dtype, kernels)
    room = work.depth + work.prompt + work.generate + 1
    engine.fill(random_prompts(runner, 1, work.depth, seed=repetitions + 1), room)
    for repetition in range(-1, repetitions):
        ceilings = machine.read_bytes_per_second(), machine.gemm_flops_per_second()
        prompts = random_prompts(runner, 1, work.prompt, seed=repetition + 1)
        once = work if repetition >= 0 else replace(work, generate=2)
        first, _ = engine.measure(prompts, 1)
        _, gaps = engine.measure([ids[:1] for ids in prompts], once.generate + 1)
        tick()
        prefill, decode, told = peer.measure(once, torch.get_num_threads())
        tick()
        if repetition >= 0:
            ours.add(first, gaps)
            theirs.add_rates(prefill, decode)
            for timing in (ours, theirs):
                timing.read_bytes_per_second.append(ceilings[0])
                timing.gemm_flops_per_second.append(ceilings[1])
    return [ours, theirs], told
