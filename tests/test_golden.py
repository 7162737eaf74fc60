"""The official code's numbers, in fp32, on every attention path."""

from __future__ import annotations

import pytest
import torch
from conftest import CPU, golden_folders
from rows import Rows, answered
from safetensors.torch import load_file

from dsv2cli.checkpoint.load import load_model
from dsv2cli.engine.request import Request, SamplingParams
from dsv2cli.model.step import Step
from dsv2cli.run.runner import ATTENTION_PATHS, PlainRunner

FOLDERS = golden_folders()
TOLERANCE = 2e-4


@pytest.mark.parametrize("path", ATTENTION_PATHS)
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
@torch.inference_mode()
def test_logits_and_greedy_text_are_those_of_the_official_code(folder, path):
    golden = load_file(folder / "golden.safetensors")
    model = PlainRunner(load_model(folder, CPU), path)
    for prompt in "ABC":
        ids = golden[f"{prompt}.input_ids"].long().flatten()
        torch.testing.assert_close(
            model.logits(model.model(ids, Step.apart(1, len(ids), model.model.rotary, CPU, path))),
            golden[f"{prompt}.logits"],
            rtol=0,
            atol=TOLERANCE,
        )
        row = Rows(model)
        one_by_one = torch.cat([row.scores([token]) for token in ids.tolist()])
        torch.testing.assert_close(one_by_one, golden[f"{prompt}.decode_logits"], rtol=0, atol=TOLERANCE)
        request = Request(SamplingParams(temperature=0), max_new_tokens=32)
        assert answered(model, ids.tolist(), request).token_ids == golden[f"{prompt}.greedy_ids"].tolist()


@pytest.mark.parametrize("name", ["dense_only", "real_dims"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.inference_mode()
def test_half_precision_mostly_picks_the_same_tokens(name, dtype):
    folder = next((folder for folder in FOLDERS if folder.name == name), None)
    if folder is None:
        pytest.skip("this checkpoint is only in the shared folder")
    golden = load_file(folder / "golden.safetensors")
    model = load_model(folder, CPU, dtype)
    ours = model.logits(model(golden["A.input_ids"].long().flatten())).argmax(-1)
    assert (ours == golden["A.logits"].argmax(-1)).float().mean() >= 0.85
