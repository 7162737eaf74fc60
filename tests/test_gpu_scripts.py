"""The scripts for a day with a GPU, on tiny models: what they write, not how fast that is."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch
from conftest import smallest_config

pytest.importorskip("triton")

import gpu_kernels


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
