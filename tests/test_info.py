"""What `dsv2 info` says: counts that follow from a config, the cache, and the card."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from conftest import DATA, ROOT, golden_folders, run_dsv2

from dsv2cli.checkpoint.weights import empty_model
from dsv2cli.model import size
from dsv2cli.model.config import DeepseekV2Config

LITE, CHAT = DATA / "configs" / "DeepSeek-V2-Lite", DATA / "configs" / "DeepSeek-V2-Chat"


def info(*arguments):
    done = run_dsv2("info", *map(str, arguments), "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("folder", [*golden_folders(), LITE, CHAT], ids=lambda folder: folder.name)
def test_the_counts_are_those_of_the_model_itself(folder):
    config = DeepseekV2Config.load(folder)
    model = empty_model(config, torch.device("meta"), torch.bfloat16)
    counted = {part.name: part.parameters for part in size.parts(config)}
    assert sum(counted.values()) == sum(parameter.numel() for parameter in model.parameters())
    assert counted["attention"] == sum(p.numel() for n, p in model.named_parameters() if ".self_attn." in n)
    assert model.new_cache().bytes_per_token() == size.kv_bytes_per_token(config, "bfloat16")


@pytest.mark.parametrize(
    ("folder", "total", "read", "cache", "expanded"),
    [(LITE, 15_706_484_224, 2_451_437_056, 31_104, 276_480), (CHAT, 235_741_434_880, 20_851_517_440, 69_120, 4_915_200)],
    ids=["V2-Lite", "V2-Chat"],
)
def test_the_published_models_have_their_published_sizes(folder, total, read, cache, expanded):
    facts = info(folder)
    assert (facts["parameters"], facts["parameters_read_per_token"]) == (total, read)
    assert (facts["kv_bytes_per_token"], facts["kv_bytes_per_token_expanded"]) == (cache, expanded)
    assert sum(part["parameters"] for part in facts["parts"].values()) == total


def test_memory_and_bandwidth_say_what_fits_and_how_fast_it_can_be():
    facts = info(LITE, "--memory", "31", "--bandwidth", "100")
    assert not facts["fits"] and facts["longest_context"] == 0
    facts = info(LITE, "--memory", "32", "--bandwidth", "100")
    assert facts["fits"] and facts["longest_context"] == int((32e9 - facts["weights_bytes"]) // 31_104)
    assert facts["decode_ceiling_tokens_per_second"] == pytest.approx(100e9 / (2 * 2_451_437_056 + 4096 * 31_104))
    assert info(LITE, "--memory", "640")["longest_context"] == facts["max_position_embeddings"] == 163_840


def test_a_config_file_will_do_and_the_number_format_can_be_chosen():
    assert info(LITE / "config.json", "--dtype", "float32")["weights_bytes"] == 4 * 15_706_484_224


def test_without_a_model_it_shows_the_card_of_the_embedded_one():
    done = run_dsv2("info")
    assert done.returncode == 0 and done.stdout.endswith((ROOT / "dsv2cli" / "demo" / "MODEL_CARD.md").read_text())
    assert "not a DeepSeek release" in done.stdout
    assert "MODEL_CARD" not in run_dsv2("info", str(LITE)).stdout


def test_it_needs_no_torch():
    code = f"import sys; sys.argv = ['dsv2', 'info', {str(LITE)!r}]\nfrom dsv2cli.cli.app import main\ntry: main()\nexcept SystemExit: pass\n"
    done = subprocess.run([sys.executable, "-c", code + "sys.exit('torch' in sys.modules)"], capture_output=True, text=True)
    assert done.returncode == 0 and "15,706,484,224" in done.stdout


@pytest.mark.parametrize(
    ("model", "code", "words"),
    [("no/such/model", 2, "There is no model"), (str(ROOT / "README.md"), 1, "cannot be read"), (str(ROOT), 1, "config.json")],
)
def test_what_is_no_model_is_refused_in_a_sentence(model, code, words):
    done = run_dsv2("info", model)
    assert done.returncode == code and done.stdout == "" and words in done.stderr and "Traceback" not in done.stderr
