"""Shared by all tests: where the data is, models, and processes that end with the test that started them."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pexpect
import psutil
import pytest
import torch
from hubs import home, hub, repository  # noqa: F401
from person import Person
from running import forked
from safetensors.torch import save_file
from shapes import smallest_config

from dsv2cli.checkpoint.load import load_model, random_model
from dsv2cli.checkpoint.names import destinations
from dsv2cli.checkpoint.template import renderer
from dsv2cli.checkpoint.tokenizer import Tokenizer
from dsv2cli.hubs.find import EMBEDDED
from dsv2cli.model.config import DeepseekV2Config
from dsv2cli.run.runner import PlainRunner

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests" / "data"
SHARED = ROOT.parent / "shared"
CPU = torch.device("cpu")
MARK = "STARTED_BY_TESTS"  # in the environment of all that this process starts

os.environ[MARK] = f"{os.getpid()} {time.time()}"
for name in ("COLUMNS", "LINES"):  # which readline sets where pytest imports it, and terminals here are other
    os.environ.pop(name, None)
os.environ["DSV2_CONFIG"] = os.devnull  # nor is a person's configuration theirs
os.environ["XDG_DATA_HOME"] = tempfile.mkdtemp(
    prefix="dsv2-tests-"
)  # what tests say in chats is nobody's history
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported
torch.set_num_threads(1)  # the models here are tiny: a second thread only waits


def golden_folders() -> list[Path]:
    """All golden checkpoints where the shared folder is at hand, else the three kept here."""
    folder = SHARED / "golden" if (SHARED / "golden").is_dir() else DATA / "golden"
    return sorted(path for path in folder.iterdir() if path.is_dir())


# A new prompt, not one drawn again: it turns bracketed paste on, is drawn, and shows the cursor.
PROMPT = r"\x1b\[\?2004h.*?>.*?\x1b\[\?25h"


@pytest.fixture(scope="session", autouse=True)
def nothing_outlives_the_tests() -> Iterator[None]:
    """Neither a child of this process, nor, where its parent is gone, what it had started: it has our
    environment.
    """
    yield
    renderer().end()
    children = psutil.Process().children(recursive=True)
    left = {process: line for process in psutil.process_iter() if (line := ours(process, children))}
    end(list(left))
    assert not list(left.values())


def ours(process: psutil.Process, children: list[psutil.Process]) -> str:
    """What a process was started as, if it runs and was started by these tests; not what
    Python itself keeps.
    """
    try:
        line = shlex.join(process.cmdline())
        mine = process in children or process.environ().get(MARK) == os.environ[MARK]
        runs = process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE
        return line if mine and runs and "multiprocessing.resource_tracker" not in line else ""
    except psutil.Error:
        return ""


def end(processes: list[psutil.Process]) -> None:
    """With all that they have started: asked to, and where that takes too long, made to."""
    for process in list(processes):
        with contextlib.suppress(psutil.Error):
            processes = [*processes, *process.children(recursive=True)]
    for way in ("terminate", "kill"):
        for process in processes:
            with contextlib.suppress(psutil.Error):
                getattr(process, way)()
        processes = psutil.wait_procs(processes, timeout=5)[1]


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts dsv2 in a process that ends with the test, however that ends.

    It is forked from this one, or started `by` another.
    """
    started: list[subprocess.Popen[str]] = []

    def start(
        *arguments: str, by: tuple[str, ...] = (), stdin: int = subprocess.DEVNULL, **environment: str
    ) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, *by, "-m", "dsv2cli", *arguments],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            env=os.environ | environment,
            preexec_fn=None if by else forked(arguments, environment),
        )
        started.append(process)
        return process

    yield start
    end([psutil.Process(process.pid) for process in started if process.poll() is None])
    for process in started:
        with process:  # closes its pipes
            pass


@pytest.fixture
def in_terminal() -> Iterator[Callable[..., pexpect.spawn]]:
    """Starts dsv2 in a pseudo-terminal, as a person would see it, in a process that ends with the test."""
    started: list[pexpect.spawn] = []

    def start(
        *arguments: str,
        columns: int = 100,
        rows: int = 30,
        before: Callable[[], object] = bool,
        **environment: str,
    ) -> pexpect.spawn:
        """`before` is called in the new process."""
        environment = {"PROMPT_TOOLKIT_NO_CPR": "1"} | environment  # nobody answers where the cursor is
        child = forked(arguments, environment)
        terminal = pexpect.spawn(
            sys.executable,
            ["-m", "dsv2cli", *arguments],
            encoding="utf-8",
            timeout=60,
            dimensions=(rows, columns),
            preexec_fn=lambda: (before(), child()),
        )
        started.append(terminal)
        return terminal

    yield start
    end([psutil.Process(terminal.pid) for terminal in started if terminal.isalive()])
    for terminal in started:
        with contextlib.suppress(pexpect.ExceptionPexpect):  # where it was ended here, nobody is left to ask
            terminal.close()


@pytest.fixture
def person(in_terminal: Callable[..., pexpect.spawn]) -> Callable[..., Person]:
    """Starts dsv2 in a pseudo-terminal, with somebody who types and looks at the screen."""

    def start(*arguments: str, columns: int = 100, rows: int = 30, **options: Any) -> Person:
        options = {"PROMPT_TOOLKIT_NO_CPR": "0"} | options
        return Person(in_terminal(*arguments, columns=columns, rows=rows, **options), columns, rows)

    return start


def load(folder: Path, device: torch.device = CPU, *arguments: Any, **options: Any) -> PlainRunner:
    """A checkpoint run by plain torch; the arguments are load_model's."""
    return PlainRunner(load_model(folder, device, *arguments, **options))


@pytest.fixture(scope="session")
def v2() -> PlainRunner:
    """A tiny random DeepSeek-V2 with everything: q_lora, grouped routing, YaRN."""
    return load(DATA / "golden" / "v2")


@pytest.fixture(scope="session")
def embedded() -> PlainRunner:
    return load(EMBEDDED)


@pytest.fixture(scope="module")
def start_server(embedded: PlainRunner, embedded_tokenizer: Tokenizer) -> Iterator[Callable[..., Any]]:
    """Starts servers in this process; gives each with its client."""
    from serving import servers

    with servers(embedded, embedded_tokenizer) as start:
        yield start


@pytest.fixture(scope="session")
def smallest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random weights, small enough for interpreted kernels."""
    folder = tmp_path_factory.mktemp("smallest")
    (folder / "config.json").write_text(json.dumps(smallest_config()))
    torch.manual_seed(6)
    model = random_model(DeepseekV2Config.load(folder), CPU, torch.float32, None)
    save_file(dict(destinations(model)), folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def embedded_tokenizer() -> Tokenizer:
    return Tokenizer(EMBEDDED)


@pytest.fixture(scope="session")
def real_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """DeepSeek-V2-Lite's own tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.json").write_bytes(
        gzip.decompress((DATA / "tokenizer" / "tokenizer.json.gz").read_bytes())
    )
    shutil.copy(DATA / "tokenizer" / "tokenizer_config.json", folder)
    return Tokenizer(folder)


@pytest.fixture
def copy_of_v2(tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    folder = tmp_path / "v2"
    shutil.copytree(DATA / "golden" / "v2", folder)
    return folder
