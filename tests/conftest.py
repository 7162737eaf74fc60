"""Shared by all tests: where the data is, and dsv2 run from outside."""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pexpect
import pytest
import torch

from dsv2cli.checkpoint.hub import EMBEDDED
from dsv2cli.checkpoint.tokenizer import Tokenizer
from dsv2cli.checkpoint.weights import load_model
from dsv2cli.model.transformer import DeepseekV2

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests" / "data"
SHARED = ROOT.parent / "shared"
CPU = torch.device("cpu")

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


def run_dsv2(
    *arguments: str, stdin: str | bytes = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """dsv2 as a script would run it: no terminal anywhere."""
    data = stdin.encode() if isinstance(stdin, str) else stdin
    done = subprocess.run(
        [sys.executable, "-m", "dsv2cli", *arguments],
        input=data,
        capture_output=True,
        timeout=300,
        env=os.environ | environment,
    )
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


PROMPT = r">.*\x1b\[\?25h"  # the prompt is drawn and the cursor shown again


def in_terminal(*arguments: str, columns: int = 100, **environment: str) -> pexpect.spawn:
    """dsv2 in a pseudo-terminal, as a person would see it."""
    environment = (
        os.environ | {"PROMPT_TOOLKIT_NO_CPR": "1"} | environment
    )  # nobody answers where the cursor is
    return pexpect.spawn(
        sys.executable,
        ["-m", "dsv2cli", *arguments],
        encoding="utf-8",
        timeout=60,
        dimensions=(30, columns),
        env=environment,
    )


@pytest.fixture(scope="session")
def v2() -> DeepseekV2:
    """A tiny random DeepSeek-V2 with everything: q_lora, grouped routing, YaRN."""
    return load_model(DATA / "golden" / "v2", CPU)


@pytest.fixture(scope="session")
def embedded() -> DeepseekV2:
    return load_model(EMBEDDED, CPU)


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
