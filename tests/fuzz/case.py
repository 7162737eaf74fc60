"""One case: damaged in a folder of its own, tried in a process of its own, judged here."""

from __future__ import annotations

import json
import math
import os
import random
import re
import resource
import select
import shutil
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

from dsv2cli.errors import Dsv2Error
from tests.fuzz.strange import Mutation
from tests.running import opened

GOOD = ("refused", "right", "lenient")
FAULTS = ("wrong", "traceback", "crash", "hang", "memory")
SECONDS = 10.0
SPARE_BYTES = 2**30  # of memory that a case may take
NO_MEMORY = ("MemoryError", "can't allocate memory", "memory allocation of", "Cannot allocate memory")


class Driver(Protocol):
    """One way in for what is damaged."""

    name: str
    reference: Any  # the answer to what is not damaged

    def prepare(self, folder: Path) -> None:
        """Write what is not damaged into an empty folder."""
        ...

    def mutate(self, folder: Path, numbers: random.Random) -> Mutation:
        """Damage one thing."""
        ...

    def act(self, folder: Path) -> Any:
        """What a person would do with it. Called in a process of its own, stdout going to ../out."""
        ...

    def judge(self, answer: Any, mutation: Mutation) -> tuple[str, str]:
        """The outcome, and a line that says what is wrong."""
        ...


@dataclass(frozen=True)
class Verdict:
    """What became of a case."""

    seed: int
    outcome: str
    mutation: str
    line: str = ""  # the last of its error
    seconds: float = 0.0


def run_case(driver: Driver, seed: int, work: Path, keep: bool = False) -> Verdict:
    """The case of a seed, in a folder below `work`, which stays where it is a fault and to be kept."""
    home = work / f"{driver.name}-{seed}"
    shutil.rmtree(home, ignore_errors=True)
    folder = home / "case"
    folder.mkdir(parents=True)
    numbers = random.Random(f"{driver.name} {seed}")
    driver.prepare(folder)
    mutation = driver.mutate(folder, numbers)
    began = time.perf_counter()
    outcome, line = in_child(driver, folder, mutation)
    line = re.sub(rf"{home}[^'\"]*", "PATH", line)  # so that the lines of like faults are alike
    line = re.sub(r"\d{20,}|(.)\1{20,}", "...", ascii(line)[1:-1])
    verdict = Verdict(seed, outcome, mutation.what, line, time.perf_counter() - began)
    if keep and outcome in FAULTS:
        (home / "verdict.txt").write_text(f"{outcome}\n{mutation.what}\n{line}\n", errors="backslashreplace")
    else:
        shutil.rmtree(home, ignore_errors=True)
    return verdict


def in_child(driver: Driver, folder: Path, mutation: Mutation) -> tuple[str, str]:
    """Try it in a forked process; the outcome and the last line of an error."""
    coming, going = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(coming)
        be_child(driver, folder, going)
    os.close(going)
    told, ended = read_until(coming, time.monotonic() + SECONDS)
    os.close(coming)
    if not ended:
        os.killpg(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    said = (folder.parent / "err").read_text(errors="replace") if (folder.parent / "err").exists() else ""
    last = next((line for line in reversed(said.splitlines()) if line.strip()), "")
    if not ended:
        return "hang", f"longer than {SECONDS:g} s"
    if os.WIFSIGNALED(status):
        killed = os.WTERMSIG(status)
        lacking = killed == signal.SIGKILL or any(sign in said for sign in NO_MEMORY)
        return "memory" if lacking else "crash", f"{signal.Signals(killed).name}: {last}"
    if not told:
        code, (fault, line) = os.waitstatus_to_exitcode(status), complaint(said)
        refused = code in (1, 2) and line and not fault
        return ("refused", "") if refused else (fault or "wrong", f"it ended with exit code {code}: {line}")
    outcome, answer = json.loads(told)
    if outcome != "answer":
        return outcome, answer
    return driver.judge(answer, mutation)


def read_until(pipe: int, limit: float) -> tuple[bytes, bool]:
    """All that comes through a pipe, and whether it ended in time."""
    told = b""
    while (left := limit - time.monotonic()) > 0:
        if select.select([pipe], [], [], left)[0]:
            piece = os.read(pipe, 2**20)
            if not piece:
                return told, True
            told += piece
    return told, False


def be_child(driver: Driver, folder: Path, going: int) -> NoReturn:
    """Act, and tell through the pipe what came of it: an answer, or why there is none."""
    told: tuple[str, Any] = ("crash", "nothing was told")
    try:
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        for number, name in ((1, "out"), (2, "err")):
            file = os.open(folder.parent / name, os.O_CREAT | os.O_RDWR | os.O_TRUNC, 0o600)
            os.dup2(file, number)
            os.close(file)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        sys.stdin, sys.stdout, sys.stderr = opened()
        limit_memory(folder)
        told = tried(driver, folder)
    except BaseException as error:  # what is told may be too much, too
        told = ("memory" if isinstance(error, MemoryError) else "traceback", repr(error)[:500])
    finally:
        with os.fdopen(going, "w") as pipe:
            json.dump(told, pipe)
        os._exit(0)


def tried(driver: Driver, folder: Path) -> tuple[str, Any]:
    """The answer, or an outcome with the last line of its error."""
    try:
        return "answer", driver.act(folder)
    except Dsv2Error as error:
        good = bool(error.what) and error.exit_code in (1, 2)
        return ("refused", error.what) if good else ("traceback", f"an error that says nothing: {error!r}")
    except MemoryError:
        return "memory", f"MemoryError {where()}"
    except BaseException as error:
        traceback.print_exc()
        line = f"{type(error).__name__}: {str(error)[:300]}"
        lacking = any(sign in line for sign in NO_MEMORY)
        return "memory" if lacking else "traceback", f"{line} {where()}"


def where() -> str:
    """The last place of this project in the exception being handled."""
    frames = traceback.extract_tb(sys.exc_info()[2])
    ours = [frame for frame in frames if "/dsv2cli/" in frame.filename] or frames
    return f"[{ours[-1].filename.rpartition('dsv2cli/')[2]}, {ours[-1].name}]" if ours else ""


def complaint(said: str) -> tuple[str, str]:
    """The fault that a program's stderr tells of, or nothing, and its last line with the place of it."""
    last = next((line for line in reversed(said.splitlines()) if line.strip()), "")[:300]
    frames = re.findall(r'File ".*/dsv2cli/([^"]+)", line \d+, in (\S+)', said)
    line = f"{last} [{', '.join(frames[-1])}]" if frames else last
    if any(sign in said for sign in NO_MEMORY):
        return "memory", line
    return ("traceback" if "Traceback" in said or "panicked" in said else ""), line


def limit_memory(folder: Path) -> None:
    """What this process has now, twice what lies in the folder, and something to spare."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    there = sum(path.lstat().st_size for path in folder.rglob("*"))
    limit = pages * os.sysconf("SC_PAGE_SIZE") + SPARE_BYTES + 2 * there
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def same(one: Any, other: Any) -> bool:
    """Whether two answers are the same, up to the rounding of their numbers."""
    if isinstance(one, float) and isinstance(other, float):
        return (math.isnan(one) and math.isnan(other)) or math.isclose(one, other, rel_tol=1e-4, abs_tol=1e-4)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return bool(one == other)


def compared(answer: Any, reference: Any, mutation: Mutation) -> tuple[str, str]:
    """The outcome of an answer that is a dictionary."""
    differing = [key for key in reference if not same(answer.get(key), reference[key])]
    if not differing:
        return "right", ""
    line = f"another {', '.join(differing)}"
    return ("lenient" if mutation.changes else "wrong"), line
