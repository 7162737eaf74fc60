"""dsv2 doctor: it finds nothing where all is well, and names what is broken."""

from __future__ import annotations

import json
import shutil

import pytest
from conftest import DATA
from running import run_dsv2, run_process

from dsv2cli.cli.doctor import Gpus, gpu_finding, triton_finding
from dsv2cli.hubs.find import EMBEDDED


def doctor(*arguments, **environment):
    run = run_process if environment else run_dsv2
    done = run("doctor", *map(str, arguments), "--json", **environment)
    out = json.loads(done.stdout)
    assert done.returncode == (0 if out["healthy"] else 1) and done.stderr == ""
    return {finding["name"]: finding for finding in out["findings"]}


def test_all_is_well_here():
    done = run_dsv2("doctor")
    assert done.returncode == 0 and done.stdout.endswith("nothing is wrong\n") and done.stderr == ""
    for name in (
        "python",
        "torch",
        "gpu",
        "compiler",
        "cpu kernels",
        "weights",
        "tokenizer",
        "begin of text",
        "template",
    ):
        assert f" {name}: " in done.stdout


def test_without_a_compiler_it_says_what_runs_instead(tmp_path):
    found = doctor(CXX="/nowhere", PATH=str(tmp_path), XDG_CACHE_HOME=str(tmp_path))
    assert found["compiler"]["state"] == found["cpu kernels"]["state"] == "note"
    assert "no C++ compiler" in found["cpu kernels"]["text"]


NVIDIA, AMD = ("NVIDIA H200",), ("AMD Instinct MI300X",)
INTEL = ("Intel(R) Data Center GPU Max 1550",)


@pytest.mark.parametrize(
    ("seen", "state", "words"),
    [
        (Gpus(NVIDIA, cuda="12.8", driver="NVIDIA H200 150.1 GB"), "ok", "NVIDIA H200, CUDA 12.8"),
        (Gpus(AMD, rocm="6.4.1"), "note", "ROCm 6.4.1, as --device cuda: plain torch"),
        (Gpus(intel=INTEL), "note", "which nothing here uses: models run on the CPU"),
        (Gpus(driver="H200"), "bad", "a CPU build"),
        (Gpus(cuda="13.0", driver="H200"), "bad", "the driver may be too old"),
        (Gpus(rocm="6.4.1", driver="H200"), "bad", "a build for AMD's"),
        (Gpus(cuda="12.8"), "ok", "none; models run on the CPU"),
    ],
    ids=["nvidia", "amd", "intel", "cpu build", "old driver", "wrong build", "none"],
)
def test_each_makers_gpu_is_said_with_what_would_run_there(seen, state, words):
    found = gpu_finding(seen)
    assert found.state == state and words in found.text
    kernels = triton_finding(seen, installed=True)
    assert (kernels.text == "on") == (seen.names == NVIDIA)
    assert ("never tried on an AMD GPU" in kernels.text) == (seen.names == AMD)
    assert ("pip install triton" in triton_finding(seen, installed=False).fix) == bool(seen.names)


def truncate(folder):
    shard = next(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-9])


def change(file, **values):
    def damage(folder):
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return damage


def break_tokenizer(folder):
    """A tokenizer that drops spaces, as transformers 5's LlamaTokenizerFast does."""
    content = json.loads((folder / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": ""}
    (folder / "tokenizer.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "name", "words"),
    [
        (truncate, "weights", "truncated"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer", "tokenizer.json is missing"),
        (break_tokenizer, "tokenizer", "comes back as"),
        (change("config.json", bos_token_id=7), "begin of text", "config.json says 7"),
        (change("config.json", hidden_size=100), "weights", "shape"),
        (change("config.json", scoring_func="sigmoid"), "config", "scoring_func"),
        (
            change(
                "tokenizer_config.json",
                chat_template="{{ bos_token }}{{ bos_token }}{{ messages[0].content }}",
            ),
            "template",
            "twice",
        ),
        (
            change("tokenizer_config.json", chat_template="{{ raise_exception('no') }}"),
            "template",
            "rejected",
        ),
    ],
    ids=["shard", "no tokenizer", "spaces", "bos", "shape", "config", "twice", "template"],
)
def test_what_is_broken_is_named(tmp_path, damage, name, words):
    shutil.copytree(EMBEDDED, tmp_path / "model")
    damage(tmp_path / "model")
    found = doctor(tmp_path / "model")
    assert found[name]["state"] == "bad" and words in found[name]["text"]


def test_a_packed_checkpoint_is_looked_at_too(tmp_path):
    assert run_dsv2("quantize", str(EMBEDDED), str(tmp_path / "packed")).returncode == 0
    found = doctor(tmp_path / "packed")
    assert found["weights"]["state"] == "ok" and "int4" in found["config"]["text"]
    assert doctor(DATA / "golden" / "v2")["weights"]["state"] == "ok"
