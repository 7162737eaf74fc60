"""The Triton kernels compiled for a GPU with no GPU at hand: interpreted kernels may still not compile."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from conftest import ROOT

LAYERS = {"DeepSeek-V2-Lite": 8, "DeepSeek-V2-Chat": 9}  # launches for one token and a layer of experts


def compiled(*words):
    """What tests/compile_for_gpu.py says. In a process of its own: here kernels are interpreted."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "tests/compile_for_gpu.py", *words, "--json"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if "cuobjdump" in done.stderr or "ptxas" in done.stderr:
        pytest.skip("triton came without NVIDIA's tools")
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def test_every_kernel_compiles_for_a_gpu_spills_no_registers_and_launches_are_few():
    """V2-Lite's own shapes in all kinds, V2's, and the smallest, where an argument may be 1."""
    found = compiled("--sample")
    assert not [(row["name"], row["case"], row["error"]) for row in found["rows"] if row["error"]]
    assert not [row for row in found["rows"] if row["taken"]["stack"] and "fp32" not in row["case"]]
    assert {row["name"] for row in found["rows"]} >= {
        "few_rows_kernel",
        "few_up_kernel",
        "few_down_kernel",
        "many_rows_kernel",
        "many_up_kernel",
        "many_down_kernel",
        "attend_kernel",
        "prepare_kernel",
        "merge_kernel",
        "router_kernel",
        "sort_kernel",
        "gather_kernel",
    }
    of_one = [step for step in found["steps"] if step["rows"] == "1"]
    for name, most in LAYERS.items():
        steps = [step for step in of_one if step["case"].startswith(name)]
        assert steps
        for step in steps:
            dense, moe = (triton for triton, _ in step["layers"])
            assert dense <= most - 1 and moe <= most, step
            assert not any(torchs for _, torchs in step["layers"]), "a layer of one token is our own kernels"
