"""Loading: strict, sparing of memory, and clear about what is wrong."""

from __future__ import annotations

import json
import struct
import subprocess
import sys

import pytest
import torch
from conftest import CPU
from safetensors.torch import load_file, save_file

from dsv2cli.checkpoint.load import load_model
from dsv2cli.checkpoint.safetensors import read_header
from dsv2cli.errors import Dsv2Error

NAME = "model.layers.1.mlp.experts.3.up_proj.weight"


def shard_of(folder, name):
    return folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]


def rewrite(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def fails(folder, *words):
    with pytest.raises(Dsv2Error) as caught:
        load_model(folder, CPU)
    message = f"{caught.value.what} {caught.value.why} {caught.value.fix}"
    for word in words:
        assert str(word) in message, message


def test_every_stored_number_arrives(copy_of_v2):
    model, stored = load_model(copy_of_v2, CPU), load_file(shard_of(copy_of_v2, NAME))
    up = model.model.layers[1].mlp.experts.gate_up_proj[3].chunk(2)[1]
    assert torch.equal(up, stored[NAME])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_weights_are_converted_but_the_router_stays_fp32(copy_of_v2, dtype):
    model = load_model(copy_of_v2, CPU, dtype)
    kinds = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert {kind for name, kind in kinds.items() if name.endswith("gate.weight")} == {torch.float32}
    assert {kind for name, kind in kinds.items() if not name.endswith("gate.weight")} == {dtype}
    stored = load_file(shard_of(copy_of_v2, NAME))[NAME]
    assert torch.equal(model.model.layers[1].mlp.experts.gate_up_proj[3].chunk(2)[1], stored.to(dtype))


def test_one_file_without_an_index_loads(copy_of_v2):
    index = json.loads((copy_of_v2 / "model.safetensors.index.json").read_text())["weight_map"]
    merged = {}
    for file in set(index.values()):
        merged |= load_file(copy_of_v2 / file)
        (copy_of_v2 / file).unlink()
    (copy_of_v2 / "model.safetensors.index.json").unlink()
    save_file(merged, copy_of_v2 / "model.safetensors")
    load_model(copy_of_v2, CPU)
    merged.pop(NAME)
    save_file(merged, copy_of_v2 / "model.safetensors")
    fails(copy_of_v2, "model.safetensors", NAME)


def test_a_tensor_missing_from_its_shard_is_named(copy_of_v2):
    file = shard_of(copy_of_v2, NAME)
    rewrite(file, lambda tensors: tensors.pop(NAME))
    fails(copy_of_v2, file.name, NAME)


def test_an_extra_tensor_is_named(copy_of_v2):
    file = shard_of(copy_of_v2, NAME)
    rewrite(file, lambda tensors: tensors.update({"model.surprise": torch.zeros(1)}))
    fails(copy_of_v2, file.name, "model.surprise")
    index = copy_of_v2 / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.surprise"] = file.name
    index.write_text(json.dumps(content))
    fails(copy_of_v2, file.name, "model.surprise", "no place")


def test_a_wrong_shape_is_named(copy_of_v2):
    file = shard_of(copy_of_v2, NAME)
    rewrite(file, lambda tensors: tensors.update({NAME: tensors[NAME].T.contiguous()}))
    fails(copy_of_v2, file.name, NAME, "[64, 24]", "[24, 64]")


def test_a_wrong_type_is_named(copy_of_v2):
    file = shard_of(copy_of_v2, NAME)
    rewrite(file, lambda tensors: tensors.update({NAME: tensors[NAME].to(torch.int32)}))
    fails(copy_of_v2, file.name, NAME, "I32")


@pytest.mark.parametrize("keep", [0, 4, 100, -1000])
def test_a_truncated_shard_is_named(copy_of_v2, keep):
    file = shard_of(copy_of_v2, NAME)
    file.write_bytes(file.read_bytes()[:keep])
    fails(copy_of_v2, file.name)


def test_a_header_that_lies_about_a_length_is_refused(copy_of_v2):
    file = shard_of(copy_of_v2, NAME)
    content = file.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    header[NAME]["data_offsets"][1] -= 4
    text = json.dumps(header).encode().ljust(size)
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])
    fails(copy_of_v2, file.name, NAME, "bytes")


def test_a_missing_shard_is_named(copy_of_v2):
    file = shard_of(copy_of_v2, NAME)
    file.unlink()
    fails(copy_of_v2, file.name, "missing")


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}'])
def test_a_broken_index_is_named(copy_of_v2, content):
    (copy_of_v2 / "model.safetensors.index.json").write_text(content)
    fails(copy_of_v2, "model.safetensors.index.json")


def test_an_index_that_points_outside_its_folder_is_refused(copy_of_v2):
    index = copy_of_v2 / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][NAME] = "../elsewhere.safetensors"
    index.write_text(json.dumps(content))
    fails(copy_of_v2, "outside")


def test_a_pickle_checkpoint_is_refused_and_told_how_to_convert(copy_of_v2):
    for file in copy_of_v2.glob("*.safetensors*"):
        file.unlink()
    fails(copy_of_v2, "no safetensors")
    (copy_of_v2 / "pytorch_model.bin").write_bytes(b"x")
    fails(copy_of_v2, "pytorch_model.bin", "save_pretrained")


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"model_type": "llama"}'])
def test_a_broken_config_is_named(copy_of_v2, content):
    (copy_of_v2 / "config.json").write_text(content)
    fails(copy_of_v2, "config.json")


def test_a_file_that_is_no_safetensors_is_named(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00notjson!")
    with pytest.raises(Dsv2Error, match=r"x\.safetensors"):
        read_header(tmp_path / "x.safetensors")


MEASURE = """
import resource, sys, torch
from pathlib import Path
from dsv2cli.checkpoint.load import load_model
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
load_model(Path(sys.argv[2]), torch.device("cpu"))  # imports and buffers are paid for
before = peak()
model = load_model(Path(sys.argv[1]), torch.device("cpu"))
print(peak() - before, sum(p.numel() * p.element_size() for p in model.parameters()))
"""


def test_loading_needs_no_second_copy(tmp_path, copy_of_v2):
    """A 250 MB checkpoint may raise the peak by its own size and a little, far from twice."""
    config = json.loads((copy_of_v2 / "config.json").read_text())
    big = tmp_path / "big"
    big.mkdir()
    (big / "config.json").write_text(json.dumps(config | {"vocab_size": 500_000}))
    index = json.loads((copy_of_v2 / "model.safetensors.index.json").read_text())["weight_map"]
    merged = {}
    for file in set(index.values()):
        merged |= load_file(copy_of_v2 / file)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        merged[name] = torch.zeros(500_000, 64)
    save_file(merged, big / "model.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(big), str(copy_of_v2)], capture_output=True, text=True, check=True
    )
    grown, size = (int(word) for word in done.stdout.split())
    assert size > 250e6
    assert grown < 1.2 * size
