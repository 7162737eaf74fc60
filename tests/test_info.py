"""What `dsv2 info` says: counts that follow from a config, the cache, and the card."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys

import pytest
import torch
from conftest import DATA, ROOT, golden_folders
from running import run_dsv2
from safetensors.torch import save_file

from dsv2cli.checkpoint.blueprint import empty_model, make_quantized, weights_bytes
from dsv2cli.checkpoint.load import random_model
from dsv2cli.checkpoint.names import destinations
from dsv2cli.checkpoint.safetensors import list_tensors
from dsv2cli.engine.benchmark import read_bytes_per_token
from dsv2cli.model import predicted, size
from dsv2cli.model.config import DeepseekV2Config
from dsv2cli.model.size import bytes_by_rank
from dsv2cli.run.runner import PlainRunner

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
    assert PlainRunner(model).new_pool(1).bytes_per_token() == size.kv_bytes_per_token(config, "bfloat16")


@pytest.mark.parametrize(
    ("folder", "total", "read", "cache", "expanded"),
    [
        (LITE, 15_706_484_224, 2_451_437_056, 31_104, 276_480),
        (CHAT, 235_741_434_880, 20_851_517_440, 69_120, 4_915_200),
    ],
    ids=["V2-Lite", "V2-Chat"],
)
def test_the_published_models_have_their_published_sizes(folder, total, read, cache, expanded):
    facts = info(folder)
    assert (facts["parameters"], facts["parameters_read_per_token"]) == (total, read)
    assert (facts["kv_bytes_per_token"], facts["kv_bytes_per_token_expanded"]) == (cache, expanded)
    assert sum(part["parameters"] for part in facts["parts"].values()) == total


ROUTER = 26 * 64 * 2048  # of V2-Lite: kept in fp32, so 2 bytes more than bf16 each


def fit(facts, format):
    (found,) = [place for place in facts["fits"] if place["format"] == format]
    return found


def test_memory_and_bandwidth_say_what_fits_and_how_fast_it_can_be():
    facts = info(LITE, "--memory", "31", "--bandwidth", "100")
    bf16, weights = fit(facts, "bfloat16"), facts["formats"]["bfloat16"]["weights_bytes"]
    assert weights == 2 * (15_706_484_224 + ROUTER) and not bf16["fits"] and bf16["longest_context"] == 0
    assert fit(facts, "int8")["fits"] and facts["command"].endswith("--quantize int8")
    facts = info(LITE, "--memory", "32", "--bandwidth", "100", "--context", "1000")
    bf16 = fit(facts, "bfloat16")
    assert bf16["fits"] and bf16["longest_context"] == int((32e9 - weights) // 31_104)
    assert bf16["sequences"] == int((32e9 - weights) // (31_104 * 1000)) and bf16["context"] == 1000
    rate = facts["decode_ceiling_tokens_per_second"]["bfloat16"]
    assert rate == pytest.approx(100e9 / (2 * (2_451_437_056 + ROUTER) + 1000 * 31_104))
    assert (
        fit(info(LITE, "--memory", "640"), "int4")["longest_context"]
        == facts["max_position_embeddings"]
        == 163_840
    )
    assert {place["format"] for place in info(LITE, "--quantize", "int4")["fits"]} == {"int4"}


def test_several_gpus_share_the_weights_and_each_holds_the_cache():
    facts = info(CHAT, "--gpus", "8x80GB,2x24GiB")
    eight, two = [place for place in facts["fits"] if place["format"] == "bfloat16"]
    assert (
        eight["count"] == 8
        and eight["memory_bytes"] == 80e9
        and two["memory_bytes"] == 24 * 2**30
        and not two["fits"]
    )
    each, whole = eight["weights_bytes_each"], facts["formats"]["bfloat16"]["weights_bytes"]
    assert (
        each == max(bytes_by_rank(DeepseekV2Config.load(CHAT), "bfloat16", "bfloat16", 8))
        and whole / 8 < each < 1.03 * whole / 8
    )
    assert facts["command"].endswith("--gpus 8")
    assert eight["sequences"] == int((80e9 - each) // (69_120 * 4096))
    assert facts["kv_saving_against_67b"] == pytest.approx(0.822, abs=5e-4)
    assert facts["kv_saving_against_67b_at_6_bits"] == pytest.approx(0.933, abs=5e-4)  # the paper's figure
    for wrong in ("many", "0x80GB", "8x80XB"):
        done = run_dsv2("info", str(CHAT), "--gpus", wrong)
        assert done.returncode == 2 and wrong in done.stderr


def test_this_machines_memory_is_found():
    ram = [place for place in info(LITE)["fits"] if place["kind"] == "cpu"]
    assert {place["format"] for place in ram} == {"bfloat16", "int8", "int4", "int4-all"} and ram[0][
        "memory_bytes"
    ] > 2**30


@pytest.mark.parametrize("folder", [*golden_folders(), LITE, CHAT], ids=lambda folder: folder.name)
@pytest.mark.parametrize("group", [32, 64])
def test_bytes_in_every_format_are_those_of_the_model_itself(folder, group):
    config = DeepseekV2Config.load(folder)
    for packing in (None, "int8", "int4", "int4-all"):
        model = empty_model(config, torch.device("meta"), torch.bfloat16)
        if packing is not None:
            make_quantized(model, packing, group)
        format = packing or "bfloat16"
        assert size.weights_bytes(config, format, "bfloat16", group) == weights_bytes(model)
        if format != "int8":
            read = sum(part.read_bytes for part in size.parts(config, format, "bfloat16", group))
            assert read - read_bytes_per_token(PlainRunner(model), 0) == (
                2 * config.hidden_size if config.tie_word_embeddings else 0
            )


@pytest.mark.parametrize("packing", [None, "int8", "int4"])
def test_a_load_takes_the_memory_that_was_said(tmp_path, packing):
    """A process loads some 350 MB from a file; what its memory grows by is what info says, within 3%."""
    config = json.loads((LITE / "config.json").read_text()) | {
        "num_hidden_layers": 2,
        "n_routed_experts": 8,
        "vocab_size": 4000,
        "intermediate_size": 8192,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = random_model(DeepseekV2Config.load(tmp_path), torch.device("cpu"), torch.bfloat16, None)
    save_file(
        {name: tensor.clone() for name, tensor in destinations(model).items()}, tmp_path / "model.safetensors"
    )
    if packing is not None:
        packed = tmp_path / "packed"
        assert run_dsv2("quantize", str(tmp_path), str(packed), "--to", packing).returncode == 0
        tmp_path = packed
    code = f"""
import gc, psutil, torch
from pathlib import Path
from dsv2cli.checkpoint.blueprint import state_of
from dsv2cli.checkpoint.load import load_model
load_model(Path({str(DATA / "golden" / "v2")!r}), torch.device("cpu"))
before = psutil.Process().memory_info().rss
model = load_model(Path({str(tmp_path)!r}), torch.device("cpu"))
for tensor in state_of(model).values():
    tensor.view(torch.uint8).max()  # what is mapped is read now
gc.collect()
print(psutil.Process().memory_info().rss - before)
"""
    grown = int(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    )
    said = info(tmp_path)["formats"][packing or "bfloat16"]["weights_bytes"]
    assert said > 50e6 and grown == pytest.approx(said, rel=0.03), grown / said


def test_a_packed_checkpoint_is_counted_as_it_lies(tmp_path):
    assert run_dsv2("quantize", str(DATA / "golden" / "v2"), str(tmp_path / "out")).returncode == 0
    facts = info(tmp_path / "out")
    assert list(facts["formats"]) == ["int4"]
    stored = sum(tensor.length for tensor in list_tensors(tmp_path / "out").values())
    assert facts["formats"]["int4"]["weights_bytes"] == stored


def test_a_config_file_will_do_and_the_number_format_can_be_chosen():
    assert (
        info(LITE / "config.json", "--dtype", "float32")["formats"]["float32"]["weights_bytes"]
        == 4 * 15_706_484_224
    )


def test_without_a_model_it_shows_the_card_of_the_embedded_one():
    done = run_dsv2("info")
    assert done.returncode == 0 and done.stdout.endswith(
        (ROOT / "dsv2cli" / "demo" / "MODEL_CARD.md").read_text()
    )
    assert "not a DeepSeek release" in done.stdout
    assert "MODEL_CARD" not in run_dsv2("info", str(LITE)).stdout


def test_it_needs_no_torch():
    code = f"""
import sys
sys.argv = ["dsv2", "info", {str(LITE)!r}]
from dsv2cli.cli.app import main
try: main()
except SystemExit: pass
"""
    done = subprocess.run(
        [sys.executable, "-c", code + "sys.exit('torch' in sys.modules)"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "15,706,484,224" in done.stdout


@pytest.mark.parametrize(
    ("model", "code", "words"),
    [
        ("no/such/model", 2, "There is no model"),
        (str(ROOT / "README.md"), 1, "cannot be read"),
        (str(ROOT), 1, "config.json"),
    ],
)
def test_what_is_no_model_is_refused_in_a_sentence(model, code, words):
    done = run_dsv2("info", model)
    assert (
        done.returncode == code
        and done.stdout == ""
        and words in done.stderr
        and "Traceback" not in done.stderr
    )


def test_the_busiest_rank_reads_what_counting_all_cases_says():
    config = DeepseekV2Config.load(CHAT)  # 6 experts of at most 3 groups, and a group a rank
    cases = list(itertools.product(range(3), repeat=6))
    wanted = sum(max(case.count(rank) for rank in range(3)) for case in cases) / len(cases) / 6
    assert size.busiest_share(config, 8) == pytest.approx(wanted)
    assert size.busiest_share(config, 1) == pytest.approx(1)
    lite = DeepseekV2Config.load(LITE)
    assert 1 / 6 < size.busiest_share(lite, 8) < size.busiest_share(lite, 2) < 1


def test_a_prediction_is_for_gpus_that_hold_the_model_and_says_that_it_is_one():
    arguments = ("info", str(CHAT), "--gpus", "8x80GB,24GB", "--bandwidth", "3350")
    facts = json.loads(run_dsv2(*arguments, "--json").stdout)
    rates = facts["predicted_tokens_per_second"]
    assert rates.keys() == {f"8 x GPU 80 GB, {format}" for format in ("bfloat16", "int8", "int4", "int4-all")}
    one = size.predicted_step_seconds(DeepseekV2Config.load(CHAT), "int4", "bfloat16", 1, 3.35e12)
    assert 1 / one < facts["decode_ceiling_tokens_per_second"]["int4"] < rates["8 x GPU 80 GB, int4"]
    assert run_dsv2(*arguments).stdout.count("predicted at a short context, not measured") == 4


H200 = "4800"  # GB/s


@pytest.mark.parametrize(
    ("folder", "format", "least", "most"),
    [
        (LITE, "bfloat16", 570, 630),
        (LITE, "int8", 880, 1000),
        (LITE, "int4", 1090, 1300),  # the review's figures were of attention in 8 bits: 1050-1250
        (CHAT, "int4", 160, 200),  # and 150-190
    ],
    ids=lambda each: each.name if hasattr(each, "name") else str(each),
)
def test_what_one_gpu_is_predicted_to_reach_is_what_the_review_of_the_compiled_code_says(
    folder, format, least, most
):
    facts = info(folder, "--bandwidth", H200)
    rate = facts["predicted_decode_tokens_per_second"][format]
    assert least < rate < most and rate < facts["decode_ceiling_tokens_per_second"][format]


def test_a_prediction_for_one_gpu_is_shown_beside_each_ceiling_as_one():
    done = run_dsv2("info", str(LITE), "--bandwidth", H200)
    rates = info(LITE, "--bandwidth", H200)["predicted_decode_tokens_per_second"]
    lines = done.stdout.splitlines()[-2 * len(rates) :]
    for (format, rate), most, some in zip(rates.items(), lines[::2], lines[1::2], strict=True):
        assert most.startswith(f"{format}: at most ")
        assert f"some {rate:,.0f} predicted for one GPU" in some and some.endswith("never run; not measured")


def test_a_predicted_step_is_reading_arithmetic_on_packed_weights_and_launches():
    """Without bandwidth's limit there is arithmetic and launches, and in bf16 launches alone."""
    config = DeepseekV2Config.load(LITE)
    dense, int8, int4 = (
        predicted.step_seconds(config, format, "bfloat16", 1e30) for format in ("bfloat16", "int8", "int4")
    )
    starting = (27 * 8 + predicted.STEP_LAUNCHES) * predicted.LAUNCH_SECONDS
    assert dense == pytest.approx(starting)
    kept = 27 * (16 * 256 * 512 + 512) + 2048 + 112_640 + ROUTER  # kv_b_proj and so on
    packed = 2_451_437_056 - kept  # of a token's
    arithmetic = predicted.NOT_HIDDEN * packed * 2.5 / predicted.A_SECOND
    assert int8 - starting == pytest.approx(arithmetic, rel=1e-6)
    assert 1 < (int4 - starting) / arithmetic < 4.0 / 2.5  # the head stays in 8 bits
    assert predicted.launches(DeepseekV2Config.load(CHAT)) == 60 * 9 + predicted.STEP_LAUNCHES
