"""The scripts for a day with a GPU, on tiny models: what they write, not how fast that is."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch
from conftest import DATA, smallest_config

pytest.importorskip("triton")

import gpu_kernels
import gpu_table

from dsv2cli.engine.benchmark import Work
from dsv2cli.model.config import DeepseekV2Config


@pytest.fixture
def config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(smallest_config()))
    return tmp_path


@pytest.mark.parametrize(
    ("words", "runner"),
    [
        (("bfloat16",), "TritonRunner"),
        (("int8", "2", "70", "apart"), "TritonRunner"),
        (("int4", "2", "70"), "Runner"),
        (("int4-all", "1", "5", "apart"), "Runner"),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, tuple) else each,
)
def test_the_script_for_kernels_says_what_a_step_takes(monkeypatch, config, words, runner):
    """On the road of a GPU, interpreted, and on the CPU's own."""
    if runner != "TritonRunner":
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(sys, "argv", ["gpu_kernels.py", str(config / "out"), str(config), *words])
    gpu_kernels.main()
    first, second, *more = (config / "out.txt").read_text().splitlines()
    assert first.endswith(runner) and f"torch {torch.__version__}" in first
    format, batch, context, apart = (*words, "1", "64", "")[:4] if len(words) < 2 else (*words, "")[:4]
    began = f"{config} {format} batch {batch} context {context}{apart and ' apart'}: "
    assert second.startswith(began)
    typical, least, most = map(float, re.findall(r"[\d.]+", second.removeprefix(began))[:3])
    assert 0 < least <= typical <= most
    assert any(line.startswith("reads ") for line in more) == (batch == "1" and not apart)


def test_kernels_are_listed_by_their_share_of_a_step():
    seen = [gpu_kernels.Kernel("few", 40, 100.0), gpu_kernels.Kernel("many", 20, 300.0)]
    first, *rows = gpu_kernels.listed(seen, 20)
    assert first == "in kernels 0.020 ms a step"
    assert [row.split() for row in rows] == [
        ["1.0", "x", "15.00", "us", "75.0%", "many"],
        ["2.0", "x", "2.50", "us", "25.0%", "few"],
    ]
    assert "saw no kernels" in gpu_kernels.listed([], 20)[0]


def table(monkeypatch, folder, words):
    """The rows of OUT.json, and the lines of OUT.md below its head."""
    asked = f"--device cpu --generate 3 -r 1 {words}"
    monkeypatch.setattr(sys, "argv", ["gpu_table.py", str(folder / "out"), str(folder), *asked.split()])
    gpu_table.main()
    runs = json.loads((folder / "out.json").read_text())["runs"]
    return runs, (folder / "out.md").read_text().splitlines()[4:]


def test_the_cache_before_a_prompt_is_not_read_and_what_is_too_long_is_a_row(monkeypatch, config):
    """A prompt of 30,000 tokens would take minutes."""
    words = "--kernels off --formats bfloat16 --batch 1 --context 30000,999999 --prefill 4"
    runs, lines = table(monkeypatch, config, words)
    assert [(run["depth"], run["prompt_tokens"]) for run in runs] == [(29936, 64), (999935, 64), (0, 4)]
    assert [run.get("left_out", "")[:29] for run in runs] == ["", "999999 + 3 tokens do not fit ", ""]
    assert lines[1] == f"| bfloat16 | dsv2 | 1 | 999999 | {runs[1]['left_out']} |"


def test_a_model_that_can_not_be_opened_is_a_row_and_not_the_end(monkeypatch, config):
    (config / "config.json").write_text(json.dumps(smallest_config() | {"attention_bias": True}))
    words = "--kernels triton --formats bfloat16,int4 --batch 1 --context 8 --prefill 4"
    runs, _ = table(monkeypatch, config, words)
    assert len(runs) == 4 and all("attention_bias" in run["left_out"] for run in runs)


def test_out_of_memory_is_said_and_other_errors_are_raised():
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert gpu_table.attempt(lambda: torch.empty(2**50, device=device)) == "out of memory"
    assert gpu_table.attempt(lambda: torch.empty(2, device=device)) == ""
    with pytest.raises(RuntimeError, match="shape"):
        gpu_table.attempt(lambda: torch.ones(2, 3) @ torch.ones(2, 3))


def test_rows_are_tried_up_to_nearly_all_of_the_memory():
    """V2 in int4 on an H200, with a talk of 100,000 tokens beside it, and with three."""
    config, memory = DeepseekV2Config.load(DATA / "configs" / "DeepSeek-V2-Chat"), int(139.8 * 2**30)
    assert gpu_table.too_large(config, "int4", Work(64, 64, 100_000), memory) == ""
    assert "149 GB" in gpu_table.too_large(config, "int4", Work(64, 64, 100_000, batch=3), memory)
    assert gpu_table.too_large(config, "int4", Work(64, 64, 100_000, batch=3), None) == ""
