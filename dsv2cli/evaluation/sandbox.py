"""Running a program that a language model wrote, which may be hostile, in a box that holds it. Linux only.

The program has no network, sees no files but Python's and the system's, which it can not change, and no
process but itself. It starts none. It has a small folder in memory, what it may use is bounded, and with its
time it ends. What it can know of is the kernel, the load, and the names of the folders above Python.

The box is made by bubblewrap, or by `enter` out of Linux's namespaces. In it, `inside` sets the limits and
calls the program. Both of these functions are sent as text to an interpreter of their own.

That it does no harm is surer than that it is right, for its checks run in its own process. One that leaves
early, in whatever way, does not pass. One that looks for its checks can cheat them: by an answer that is
equal to everything, by replacing a built-in function, or by taking the token from its caller's frame.
"""

from __future__ import annotations

import errno
import inspect
import json
import os
import platform
import secrets
import selectors
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO, Any

from dsv2cli.errors import Dsv2Error

OPENING = 30.0  # seconds until a box is open, on a busy machine
MOST_PRINTED = 2**16  # bytes that are kept of what it prints
LONGEST = 200  # characters of a reason
SCRATCH = "/box"
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": SCRATCH, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/nix/store", "/gnu/store")
TRIAL = """
import os, socket

def write():
    open("/written", "w")

for outside in ("/proc/self", "/dev/null", "/etc/passwd", "/run"):
    assert not os.path.exists(outside), f"it shows {outside}"
for forbidden in (os.fork, socket.socket, write):
    try:
        forbidden()
    except OSError:
        continue
    raise AssertionError(f"it does not forbid {forbidden.__name__}")
open("written", "w").write("to its own folder")
"""

# System calls that a program has no need of, and their numbers on each machine: they start processes and
# programs, reach what no namespace holds back, keep memory that nothing counts, or are where holes are found.
FORBIDDEN = """
fork 57 -, vfork 58 -, execve 59 221, execveat 322 281, ptrace 101 117, process_vm_readv 310 270,
process_vm_writev 311 271, kcmp 312 272, socket 41 198, unshare 272 97, setns 308 268, mount 165 40,
umount2 166 39, pivot_root 155 41, chroot 161 51, open_by_handle_at 304 265, shmget 29 194, shmat 30 196,
semget 64 190, msgget 68 186, mq_open 240 180, memfd_create 319 279, keyctl 250 219, add_key 248 217,
request_key 249 218, bpf 321 280, perf_event_open 298 241, userfaultfd 323 282, syslog 103 116
"""
NEWEST = (
    424  # from here on the numbers are the same everywhere, and Python does without: clone3, io_uring_setup
)
MACHINES = {"x86_64": (0xC000003E, 56, 157), "aarch64": (0xC00000B7, 220, 167)}  # name, clone, prctl


@dataclass(frozen=True)
class Limits:
    """What a program may use. Its memory is its address space; its folder's comes in addition."""

    seconds: float = 10.0
    memory: int = 2**30  # bytes
    file_bytes: int = 2**20  # of the largest file
    folder_bytes: int = 16 * 2**20  # of all its files


DEFAULT = Limits()


@dataclass(frozen=True)
class Ran:
    """Whether a program came to its end, and if not, why: one harmless line."""

    passed: bool
    why: str = ""


@dataclass(frozen=True)
class Box:
    """A way to hold a program. Many may run at once, from any thread."""

    name: str
    command: Callable[[list[str], Limits], list[str]]  # that runs these words within the box; raises OSError

    def run(self, program: str, limits: Limits = DEFAULT) -> Ran:
        """Runs a program to its end or that of its time. Raises Dsv2Error where the box does not open."""
        token = secrets.token_hex(16)
        receiver, sender = os.pipe()
        with open(receiver, "rb", buffering=0) as channel:
            try:
                with open(sender, "wb", buffering=0):
                    process = self.start({"program": program, "token": token, "channel": sender}, limits)
            except OSError as error:
                raise unopened(self.name, error.strerror or str(error)) from None
            said, printed, code = follow(process, channel, limits.seconds)
        if not said:
            late = f"it did not open within {OPENING:g} s" if code is None else f"it ended with code {code}"
            raise unopened(self.name, harmless(printed, last=True) or late)
        if said == b"\n" + token.encode() and code == 0:
            return Ran(True)
        if code is None:
            return Ran(False, f"timed out after {limits.seconds:g} s")
        return Ran(False, harmless(said) or ending(code))

    def start(self, wishes: dict[str, Any], limits: Limits) -> subprocess.Popen[bytes]:
        """The outermost process of the box. What `inside` is to do is its input. Raises OSError."""
        words = [interpreter(), "-s", "-S", "-P", "-B", "-c", text_of(inside)]
        with tempfile.TemporaryFile() as given:  # it has no name, so nothing of it can be left
            given.write(json.dumps({**wishes, **vars(limits), "filter": system_calls().hex()}).encode())
            given.seek(0)
            return subprocess.Popen(
                self.command(words, limits),
                stdin=given,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                bufsize=0,
                env=ENVIRONMENT,
                pass_fds=(wishes["channel"],),
                start_new_session=True,
            )


def open_box(boxes: Sequence[Box] | None = None) -> Box:
    """The first box that holds a trial program on this machine. Raises Dsv2Error where none does."""
    reasons = []
    for box in BOXES if boxes is None else boxes:
        try:
            ran = box.run(TRIAL)
        except Dsv2Error as error:
            reasons.append(f"{box.name}: {error.why}")
            continue
        if ran.passed:
            return box
        reasons.append(f"{box.name}: {ran.why}")
    raise Dsv2Error(
        "Programs that a model wrote can not be run safely here",
        why="; ".join(reasons) or "no way to hold them is known",
        fix="install bubblewrap, or leave out --run-code and score the saved answers on another machine",
    )


def unopened(name: str, why: str) -> Dsv2Error:
    fix = "see that the machine has memory and processes left, or leave out --run-code"
    return Dsv2Error(f"The box for programs ({name}) did not open", why=why, fix=fix)


# From outside


def follow(
    process: subprocess.Popen[bytes], channel: IO[bytes], seconds: float
) -> tuple[bytes, bytes, int | None]:
    """What comes through the channel, the last of what is printed, and the exit code; None if it is late.

    The seconds count from the first byte on the channel. Afterwards all of the box is ended.
    """
    said, printed, until = bytearray(), bytearray(), time.monotonic() + OPENING
    assert process.stdout is not None
    with process, selectors.DefaultSelector() as ready:
        ready.register(channel, selectors.EVENT_READ, said)
        ready.register(process.stdout, selectors.EVENT_READ, printed)
        try:
            while ready.get_map() and (left := until - time.monotonic()) > 0:
                for key, _ in ready.select(left):
                    if not (block := os.read(key.fd, MOST_PRINTED)):
                        ready.unregister(key.fileobj)
                    elif key.data is said and not said:
                        until = time.monotonic() + seconds
                    key.data.extend(block)
                    del key.data[:-MOST_PRINTED]
            code = process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            return bytes(said), bytes(printed), None
        finally:
            end(process)
    return bytes(said), bytes(printed), code


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends the outermost process of a box, and with it all others."""
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)


def ending(code: int) -> str:
    """What an exit code says of a program that did not come to its end."""
    number = code - 128 if code > 128 else -code
    if number == signal.SIGKILL:
        return "killed (memory or signal 9)"
    return f"killed (signal {number})" if number > 0 else "it ended before its last line"


def harmless(text: bytes, last: bool = False) -> str:
    """The first line with something in it, or the last, with nothing that a terminal obeys."""
    lines = [line for line in text.decode(errors="replace").splitlines() if line.strip()] or [""]
    line = lines[-1 if last else 0].strip()
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in line[:LONGEST])


def interpreter() -> str:
    """Python itself, and not the link to it in a virtual environment, of which a program sees nothing."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def shown() -> dict[str, str]:
    """What a program sees of the file system: paths, and where links lead. Raises OSError."""
    python = [os.path.realpath(path) for path in (sys.base_prefix, sys.base_exec_prefix)] + [interpreter()]
    paths: dict[str, str] = {}
    for path in (*SYSTEM, *python):
        if os.path.islink(path):
            paths[path] = os.readlink(path)
        elif os.path.exists(path) and not any(is_within(path, folder) for folder in paths):
            paths[path] = ""
    for secret in ("/tmp", "/run", os.path.realpath(os.path.expanduser("~"))):
        if holder := next((path for path in python if is_within(secret, path)), ""):
            raise OSError(errno.EPERM, f"{holder}, where Python is, holds {secret}, which must not be seen")
    return paths


def is_within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def text_of(function: Callable[[], None]) -> str:
    """A function that needs nothing around it, as a program."""
    return f"{inspect.getsource(function)}\n{function.__name__}()\n"


def system_calls() -> bytes:
    """The kernel's filter: system calls fail that are forbidden, or too new to be known. Raises OSError."""
    machine = platform.machine()
    if sys.platform != "linux" or machine not in MACHINES:
        raise OSError(errno.ENOSYS, f"there is none for {platform.system()} on {machine}")
    architecture, clone, prctl = MACHINES[machine]
    load, equal, at_least, has, leave = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, fail, unknown = 0x7FFF0000, 0x80000000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS
    number, machine_at, first_argument = 0, 4, 16  # where the kernel puts them
    steps = [(load, 0, 0, machine_at), (equal, 1, 0, architecture), (leave, 0, 0, kill), (load, 0, 0, number)]
    steps += [(at_least, 0, 1, NEWEST), (leave, 0, 0, unknown)]
    column = 1 + list(MACHINES).index(machine)
    for each in FORBIDDEN.split(","):
        if (forbidden := each.split()[column]) != "-":
            steps += [(equal, 0, 1, int(forbidden)), (leave, 0, 0, fail)]
    # A clone must be a thread (0x10000), and the signal at a parent's death (1) stays.
    steps += [(equal, 0, 4, clone), (load, 0, 0, first_argument), (has, 0, 1, 0x10000)]
    steps += [(leave, 0, 0, allow), (leave, 0, 0, fail)]
    steps += [(equal, 0, 3, prctl), (load, 0, 0, first_argument), (equal, 0, 1, 1), (leave, 0, 0, fail)]
    steps += [(leave, 0, 0, allow)]
    return b"".join(struct.pack("=HBBI", *step) for step in steps)


# The ways


def bubblewrap(words: list[str], limits: Limits) -> list[str]:
    """By the program bwrap, 0.7 or later. Raises OSError."""
    if not (bwrap := shutil.which("bwrap")):
        raise OSError(errno.ENOENT, "it is not installed")
    command = [
        bwrap,
        "--unshare-all",
        "--unshare-user",
        "--die-with-parent",
        "--new-session",
        "--cap-drop",
        "ALL",
    ]
    command += ["--uid", "65534", "--gid", "65534", "--hostname", "box"]
    for path, target in shown().items():
        command += ["--symlink", target, path] if target else ["--ro-bind", path, path]
    command += [
        "--size",
        str(limits.folder_bytes),
        "--tmpfs",
        SCRATCH,
        "--remount-ro",
        "/",
        "--chdir",
        SCRATCH,
    ]
    return [*command, *words]


def namespaces(words: list[str], limits: Limits) -> list[str]:
    """By Linux alone, 5.12 or later. Raises OSError."""
    plan = {"words": words, "shown": shown(), "scratch": SCRATCH, "bytes": limits.folder_bytes}
    return [interpreter(), "-I", "-S", "-B", "-c", text_of(enter), json.dumps(plan)]


BOXES = (Box("bubblewrap", bubblewrap), Box("namespaces", namespaces))


def enter() -> None:
    """Makes namespaces of all kinds, starts the first process in them, and waits for it.

    In the new file system is what is shown, read-only, and a folder in memory. The user there is nobody.
    """
    import ctypes
    import json
    import os
    import signal
    import sys
    from ctypes import c_char_p, c_int, c_ulong

    plan = json.loads(sys.argv[1])
    libc = ctypes.CDLL(None, use_errno=True)

    def call(name: str, *values: int | str | bytes | None) -> None:
        given = [
            c_ulong(value) if isinstance(value, int) else c_char_p(os.fsencode(value) if value else None)
            for value in values
        ]
        if getattr(libc, name)(*given) < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"{name}: {os.strerror(number)}")

    def write(path: str, text: str) -> None:
        with open(path, "w") as file:
            file.write(text)

    death, bind, recursive, private, detach = 1, 0x1000, 0x4000, 0x40000, 2
    no_set_id, no_devices, no_programs = 2, 4, 8
    call("prctl", death, signal.SIGKILL)
    user, group = os.geteuid(), os.getegid()
    # Mounts, control groups, host name, IPC, users, processes, network
    call("unshare", 0x20000 | 0x2000000 | 0x4000000 | 0x8000000 | 0x10000000 | 0x20000000 | 0x40000000)
    write("/proc/self/setgroups", "deny")
    write("/proc/self/uid_map", f"65534 {user} 1")
    write("/proc/self/gid_map", f"65534 {group} 1")
    if child := os.fork():
        signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGKILL))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os._exit(code if code >= 0 else 128 - code)
    call("prctl", death, signal.SIGKILL)
    os.setsid()
    call("sethostname", "box", 3)
    call("mount", None, "/", None, recursive | private, None)
    call("mount", "box", "/tmp", "tmpfs", no_set_id | no_devices, "mode=755,size=1m")
    os.mkdir("/tmp/old")
    os.mkdir("/tmp/new")
    call("pivot_root", "/tmp", "/tmp/old")
    os.chdir("/")
    call("mount", "box", "/new", "tmpfs", no_set_id | no_devices, "mode=755,size=1m")
    for path, target in plan["shown"].items():
        os.makedirs(os.path.dirname("/new" + path), exist_ok=True)
        if target:
            os.symlink(target, "/new" + path)
            continue
        if os.path.isdir("/old" + path):
            os.makedirs("/new" + path, exist_ok=True)
        else:
            write("/new" + path, "")
        call("mount", "/old" + path, "/new" + path, None, bind | recursive, None)
    os.mkdir("/new" + plan["scratch"])
    # mount_setattr: all that is mounted there, at any depth, is read-only, without devices and set-user-ID.
    attributes = (ctypes.c_uint64 * 4)(1 | 2 | 4, 0, 0, 0)
    if libc.syscall(c_ulong(442), c_int(-100), c_char_p(b"/new"), c_int(0x8000), attributes, c_ulong(32)) < 0:
        raise OSError(ctypes.get_errno(), f"mount_setattr: {os.strerror(ctypes.get_errno())}")
    size = f"mode=700,size={plan['bytes']},nr_inodes=1024"
    call("mount", "box", "/new" + plan["scratch"], "tmpfs", no_set_id | no_devices | no_programs, size)
    os.chdir("/new")
    call("pivot_root", ".", ".")
    call("umount2", ".", detach)
    os.chdir(plan["scratch"])
    os.execv(plan["words"][0], plan["words"])


def inside() -> None:
    """Gives up what is left to give up, runs the program, and tells through the channel how it ended."""
    import ctypes
    import json
    import math
    import os
    import resource
    import signal
    import struct
    import sys
    import types
    from ctypes import c_ulong

    with open(0, "rb", closefd=False) as file:
        given = json.load(file)
    reader, writer = os.pipe()
    os.dup2(reader, 0)  # an empty input: /dev/null itself could be changed by root
    os.close(reader)
    os.close(writer)
    program, token, channel = given["program"], given["token"].encode(), 3
    os.dup2(given["channel"], channel)
    os.closerange(4, min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], 2**16))
    seconds = math.ceil(given["seconds"]) + 1
    for name, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, given["memory"]),
        (resource.RLIMIT_FSIZE, given["file_bytes"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_NPROC, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(name, (most, most))
    libc, code = ctypes.CDLL(None, use_errno=True), bytes.fromhex(given["filter"])
    steps = ctypes.create_string_buffer(code)
    rules = ctypes.create_string_buffer(struct.pack("HP", len(code) // 8, ctypes.addressof(steps)))
    death, dumpable, no_new_privileges, seccomp, by_filter = 1, 4, 38, 22, 2
    for wish, *values in (
        (death, signal.SIGKILL, 0),
        (dumpable, 0, 0),  # no core goes to a program of the system's
        (no_new_privileges, 1, 0),
        (seccomp, by_filter, ctypes.addressof(rules)),
    ):
        if libc.prctl(wish, *map(c_ulong, values), c_ulong(0), c_ulong(0)) < 0:
            raise OSError(ctypes.get_errno(), f"prctl: {os.strerror(ctypes.get_errno())}")

    main = sys.modules["__main__"] = types.ModuleType("__main__")
    sys.argv = ["program.py"]
    tell, leave = os.write, os._exit  # the program may replace them
    tell(channel, b"\n")
    status = 1
    try:
        exec(compile(program, "program.py", "exec", dont_inherit=True), main.__dict__)
        tell(channel, token)
        status = 0
    except BaseException as error:
        error.__traceback__ = None  # and with it what the program held
        text = str(error)
        word = f"{type(error).__name__}: {text}" if text else type(error).__name__
        tell(channel, word[:1000].encode(errors="backslashreplace"))
    finally:
        leave(status)
