"""Whole checkpoints that other programs have packed: loaded, run, shared out, packed as they are."""

from __future__ import annotations

import json
from functools import partial

import foreign
import pytest
import torch
from conftest import CPU, DATA
from running import run_dsv2
from test_gguf import FOLDER, dense_model, logits

from dsv2cli.checkpoint.formats.convert import ANEW, common
from dsv2cli.checkpoint.load import load_model
from dsv2cli.formats import Coding
from dsv2cli.hubs.find import find_model
from dsv2cli.kernels import native
from dsv2cli.kernels.quantized import Quantized
from dsv2cli.run.cpu import CppRunner
from dsv2cli.run.runner import PlainRunner

V2 = DATA / "golden" / "v2"
DENSE = DATA / "golden" / "dense_only"  # without a router, which a small error may tip
WRITERS = {
    "awq": lambda source, out: foreign.write_awq(source, out, group=32),
    "gptq": lambda source, out: foreign.write_gptq(source, out, 4, 32, False, False, 1),
    "gptq-8": lambda source, out: foreign.write_gptq(source, out, 8, 32, True, False, 2),
    "gptq-act-order": lambda source, out: foreign.write_gptq(source, out, 4, 32, True, True, 1),
    "fp8": lambda source, out: foreign.write_fp8(source, out, "channel"),
    "fp8-block": lambda source, out: foreign.write_fp8(source, out, "block"),
    "mlx": lambda source, out: foreign.write_mlx(source, out, 4, 32),
    "mlx-8": lambda source, out: foreign.write_mlx(source, out, 8, 32),
    **{f"compressed {kind}": partial(foreign.write_compressed, kind=kind) for kind in foreign.COMPRESSED},
}
ACT_ORDER = ("gptq-act-order", "compressed int4-act-order")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Each kind, written when it is asked for."""
    made = {}

    def of(kind, source=V2):
        if (kind, source) not in made:
            made[kind, source] = tmp_path_factory.mktemp("foreign") / kind
            WRITERS[kind](source, made[kind, source])
        return made[kind, source]

    return of


def codings(model):
    return {module.coding for module in model.modules() if isinstance(module, Quantized)}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_model_gives_the_logits_of_its_dequantised_weights(checkpoints, kind):
    folder = checkpoints(kind)
    wanted = logits(PlainRunner(dense_model(folder)))
    model = load_model(folder, CPU, torch.float32)
    assert codings(model)
    if kind in ACT_ORDER:  # of which no kernel reads the codes: packed anew in 8 bits, and so not to the bit
        assert ANEW in codings(model)
        assert (logits(PlainRunner(model)) - wanted).norm() < 0.05 * wanted.norm()
    else:
        assert (logits(PlainRunner(model)) - wanted).abs().max() <= 1e-3


@pytest.mark.parametrize("kind", WRITERS)
def test_the_kernels_give_them_as_nearly_as_plain_torch_in_bf16(checkpoints, kind):
    folder, kernels = checkpoints(kind, DENSE), native.load()[0]
    wanted, fast = logits(PlainRunner(dense_model(folder))), load_model(folder, CPU, torch.bfloat16)
    error, plain = (
        ((logits(runner) - wanted).norm(dim=-1) / wanted.norm(dim=-1)).median()
        for runner in (CppRunner(fast, kernels), PlainRunner(load_model(folder, CPU, torch.bfloat16)))
    )
    assert codings(fast) and error < 1.3 * plain + 0.03


def test_codes_are_held_as_they_were(checkpoints):
    for kind, expected in (
        ("awq", Coding(4, 32, "plain", "F16", "zero")),
        ("fp8", Coding(8, 128, "e4m3", "F32")),
        ("mlx", Coding(4, 32, "plain", "F16", "added")),
    ):
        found = codings(load_model(checkpoints(kind), CPU))
        assert any((each.bits, each.table, each.offset) == (expected.bits, expected.table, expected.offset)
                   for each in found), found  # fmt: skip


OPTIONS = ("--prompt-ids", "5,6,7,99", "--ignore-eos", "-n", "5", "--temperature", "0", "--json")


def ids(model, *more):
    done = run_dsv2("complete", "-m", str(model), *OPTIONS, *more)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["token_ids"]


@pytest.mark.parametrize("kind", ["awq", "fp8-block", "compressed int8", "mlx"])
def test_it_can_be_packed_as_it_is(checkpoints, kind, tmp_path):
    out, folder = tmp_path / "kept", checkpoints(kind)
    done = run_dsv2("quantize", str(folder), str(out))
    assert done.returncode == 0, done.stderr
    same, direct = (load_model(each, CPU, torch.bfloat16) for each in (out, folder))
    assert codings(same) == codings(direct)
    assert torch.equal(logits(PlainRunner(same)), logits(PlainRunner(direct)))
    assert "quantization" not in json.loads((out / "config.json").read_text())
    said = json.loads(run_dsv2("info", str(folder), "--json").stdout)
    assert said["kept"]["routed experts"]["bits_held"] < 9


@pytest.mark.parametrize("source", ["v2-Q8_0-old", "random-Q4_K_M", "awq", "fp8", "mlx"])
def test_ranks_together_say_what_one_says(checkpoints, source, tmp_path):
    """Whole groups go to each rank, and of scales of scales whole 256 columns; also when it is packed."""
    model = FOLDER / f"{source}.gguf" if "-" in source else checkpoints(source)
    team = ("--device", "cpu", "--gpus", "2", "--dtype", "float32")
    wanted = ids(model, "--dtype", "float32")
    assert ids(model, *team) == wanted
    if source == "random-Q4_K_M":
        assert run_dsv2("quantize", str(model), str(tmp_path / "out")).returncode == 0
        assert ids(tmp_path / "out", *team) == ids(tmp_path / "out", "--dtype", "float32")
        anew = ("--quantize", "int8")
        assert ids(model, *team, *anew) == ids(model, "--dtype", "float32", *anew)


def test_weights_that_share_a_matrix_meet_in_what_holds_all_of_them():
    four, eight = Coding(4, 128, "plain", "F16", "zero"), Coding(8, 32, "signed", "F16")
    assert common([four, four]) == four and common([four, None]) is None
    assert common([four, eight]) == Coding(8, 32, "signed", "F32", "added")
    assert common([four, Coding(8, 128, "e4m3", "F32")]) is None
    assert common([four, ANEW]) == ANEW


@pytest.mark.parametrize(
    "kinds", [5, {"attention": 5}, {"attention": {}}, {"attention": {"FOO": 1, "Q4_K": "x"}}]
)
def test_a_config_that_says_nonsense_of_its_codes_ends_in_no_traceback(tmp_path, kinds):
    config = json.loads((V2 / "config.json").read_text())
    entry = {"quant_method": "gguf", "kinds": kinds, "bits_held": {"attention": 4.5, "head": "x"}}
    for label in ("int4", "gguf \x1b[31m", 5):
        config["quantization_config"] = entry | {"label": label}
        (tmp_path / "config.json").write_text(json.dumps(config))
        said = json.loads(run_dsv2("info", str(tmp_path), "--json").stdout)
        assert next(iter(said["formats"])) == "gguf" and said["kept"] == {
            "attention": {"stored_as": [], "bits_stored": None, "bits_held": 4.5}
        }


def test_what_no_reader_is_there_for_is_named_before_anything_is_read(checkpoints, tmp_path):
    folder = tmp_path / "x"
    folder.mkdir()
    config = json.loads((V2 / "config.json").read_text())
    for entry, words in (
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "hqq"}, "awq, gptq, fp8, compressed-tensors and MLX are read"),
    ):
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": entry}))
        for command in ("info", "doctor", "complete"):
            model = ("-m", str(folder), "x") if command == "complete" else (str(folder),)
            done = run_dsv2(command, *model)
            assert done.returncode in (1, 2) and words in done.stdout + done.stderr, done.stderr


def test_layers_that_are_spread_keep_the_codes(checkpoints):
    folder = checkpoints("awq")
    assert ids(folder, "--placement", "auto", "--device", "cpu", "--dtype", "float32") == ids(
        folder, "--dtype", "float32"
    )


def test_a_gguf_is_run_beside_its_experts_in_ram():
    model = find_model(str(FOLDER / "lite-Q4_0.gguf"))
    assert ids(model, "--experts", "cpu", "--kernels", "off") == ids(model, "--kernels", "off")
