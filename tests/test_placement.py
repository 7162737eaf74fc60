"""Layers over RAM and disk: the same numbers wherever they lie, nothing left behind, and senseless places
refused.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import CPU, golden_folders, load
from rows import Rows, scores_of
from running import run_dsv2
from safetensors.torch import load_file

from dsv2cli.checkpoint.placement import layer_devices, load_placed, parse_memory, place
from dsv2cli.errors import UsageError
from dsv2cli.model import size
from dsv2cli.model.config import DeepseekV2Config
from dsv2cli.model.layers import RMSNorm
from dsv2cli.run.plan import places_line
from dsv2cli.run.runner import PlainRunner

GREEDY = ("--temperature", "0", "-n", "12")


def placed(folder, config, format, places, scratch):
    """A runner of layers that travel."""
    model = load_placed(folder, config, torch.float32, format, places, CPU, scratch)
    return PlainRunner(model, main=CPU, layer_devices=layer_devices(places, CPU))


@pytest.mark.parametrize("folder", golden_folders(), ids=lambda folder: folder.name)
@pytest.mark.parametrize("format", [None, "int8"])
def test_layers_on_disk_give_the_same_logits(folder, format, tmp_path):
    """Prefill and a decode step; in fp32 the very golden ones."""
    config, golden = DeepseekV2Config.load(folder), load_file(folder / "golden.safetensors")
    half = size.weights_bytes(config, format or "float32", "float32") // 2000
    places = place(config, torch.float32, format, "auto", f"cpu={half}KB")
    assert "disk" in places.values()
    model = placed(folder, config, format, places, tmp_path)
    alone = load(folder, format=format)
    assert any(parameter.device.type == "meta" for parameter in model.model.parameters())
    ids, outputs = golden["A.input_ids"].flatten().tolist(), []
    for one in (model, alone):
        row = Rows(one)
        outputs.append(torch.cat([row.scores(ids, whole=True), row.scores(ids[:1])]))
    assert torch.equal(outputs[0], outputs[1])
    if format is None:
        assert (outputs[0][:-1] - golden["A.logits"]).abs().max() < 1e-3


def test_a_layer_is_in_memory_only_while_it_runs(tmp_path):
    folder = golden_folders()[-1]
    config = DeepseekV2Config.load(folder)
    places = place(config, torch.float32, None, "auto", "cpu=1KB")
    model = placed(folder, config, None, places, tmp_path)
    norm = model.model.layers[1].input_layernorm
    assert isinstance(norm, RMSNorm) and norm.weight.device.type == "meta"
    scores_of(model, [1, 2])
    assert all(parameter.device.type == "meta" for parameter in model.model.parameters())


def test_commands_run_with_layers_spread_and_leave_nothing_behind(tmp_path):
    plain = run_dsv2("complete", "Once upon a time", *GREEDY).stdout
    scratch = ("--offload-folder", str(tmp_path))
    done = run_dsv2("complete", "Once upon a time", *GREEDY, "--max-memory", "cpu=12MB", *scratch)
    assert done.returncode == 0 and done.stdout == plain and done.stderr == "" and not any(tmp_path.iterdir())
    (tmp_path / "places.json").write_text(
        json.dumps({"model": "cpu", "model.layers.3": "disk", "lm_head": "disk"})
    )
    file = ("--placement", str(tmp_path / "places.json"), *scratch)
    assert run_dsv2("complete", "Once upon a time", *GREEDY, *file).stdout == plain
    talks = [
        run_dsv2("chat", "--temperature", "0", *more, stdin="Hello\nWho are you?\n").stdout
        for more in ((), file)
    ]
    assert talks[0] == talks[1]
    assert run_dsv2("bench", "--prompt", "8", "--generate", "2", "-r", "1", *file).returncode == 0
    assert (
        run_dsv2(
            "niah",
            "--lengths",
            "128",
            "--depths",
            "0",
            "--placement",
            "auto",
            "--max-memory",
            "cpu=12MB",
            *scratch,
        ).returncode
        == 0
    )
    assert list(tmp_path.iterdir()) == [tmp_path / "places.json"]


def test_the_plan_is_shown_before_anything_is_loaded():
    before = set(Path(tempfile.gettempdir()).glob("dsv2-offload-*"))
    done = run_dsv2("complete", "Once", "--dry-run", "--max-memory", "cpu=12MB")
    assert (
        "places: embed_tokens to layers.0 on cpu, layers.1 to norm on disk, lm_head on cpu\n" in done.stdout
    )
    assert set(Path(tempfile.gettempdir()).glob("dsv2-offload-*")) == before


def test_places_are_told_in_runs():
    places = {
        "model.embed_tokens": 0,
        "model.layers.0": 0,
        "model.layers.1": 1,
        "model.norm": "disk",
        "lm_head": "disk",
    }
    assert (
        places_line(places) == "embed_tokens to layers.0 on GPU 0, layers.1 on GPU 1, norm to lm_head on disk"
    )


def test_memory_is_read_as_the_official_instructions_write_it():
    assert parse_memory("0=75GB, 1=75GiB,cpu=1.5TB") == {0: 75 * 10**9, 1: 75 * 2**30, "cpu": 1500 * 10**9}
    for wrong in ("75GB", "0=75", "gpu=1GB", "0=75XB", ""):
        with pytest.raises(UsageError, match="--max-memory"):
            parse_memory(wrong)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[1]", "no placement"),
        ("{", "no placement"),
        ('{"model": "cpu"}', "places no lm_head"),
        ('{"": "attic"}', "no device attic"),
        ('{"": 7}', "no device 7"),
        ('{"": true}', "no device True"),
    ],
)
def test_a_file_that_places_nothing_is_refused(tmp_path, content, words):
    (tmp_path / "places.json").write_text(content)
    done = run_dsv2("complete", "Once", "--placement", str(tmp_path / "places.json"))
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr


def test_placement_refuses_what_it_can_not_do(tmp_path):
    assert "no device 0" in run_dsv2("complete", "Once", "--max-memory", "0=5GB").stderr
    done = run_dsv2("complete", "Once", "--placement", "auto", "--gpus", "2", "--device", "cpu")
    assert done.returncode == 2 and "do not go together" in done.stderr
    assert (
        run_dsv2(
            "complete", "Once", "--max-memory", "cpu=1MB", "--offload-folder", str(tmp_path / "nowhere")
        ).returncode
        == 1
    )
