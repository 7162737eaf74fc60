"""GGUF files: decoded to the bit as llama.cpp's own package does, loaded as they are, and run.

tests/make_gguf.py made the files.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import CPU, DATA
from gguf_files import write_gguf
from rows import Rows
from running import run_dsv2
from test_native import TARGETS

from dsv2cli.checkpoint.blueprint import allocate, blueprint, state_of
from dsv2cli.checkpoint.formats.coded import read_stored
from dsv2cli.checkpoint.formats.gguf import UNPACK, coded
from dsv2cli.checkpoint.found import find
from dsv2cli.checkpoint.load import load_model
from dsv2cli.checkpoint.names import destinations, tensors_of
from dsv2cli.checkpoint.safetensors import DTYPES, Stored
from dsv2cli.engine.benchmark import read_bytes_per_token
from dsv2cli.errors import Dsv2Error
from dsv2cli.formats import GGUF_CODINGS
from dsv2cli.hubs.find import find_model
from dsv2cli.hubs.gguf import TYPES, read_gguf
from dsv2cli.kernels import native
from dsv2cli.kernels.quantized import Quantized, interleave
from dsv2cli.model.config import DeepseekV2Config
from dsv2cli.run.cpu import CppRunner
from dsv2cli.run.runner import PlainRunner

FOLDER = DATA / "gguf"
FILES = sorted(FOLDER.glob("*-*.gguf"))
MODELS = [path for path in FILES if not path.name.startswith("tensor")]
HASHES = json.loads((FOLDER / "hashes.json").read_text())
V2, V25, LITE = (FOLDER / name for name in ("v2-Q8_0-old.gguf", "v25-Q5_1.gguf", "lite-Q4_0.gguf"))
IDS = [5, 99, 3, 42, 17, 8] * 4
NUMBERS = {name: (number, weights, size) for number, (name, weights, size) in TYPES.items()}


def rows_of(tensor):
    """All rows of a tensor, whatever its number of dimensions."""
    rows = 1
    for size in tensor.shape[:-1]:
        rows *= size
    return coded(tensor, tensor.name, 0, rows).weights(0, rows)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_tensor_is_to_the_bit_what_llama_cpps_package_makes_of_it(path):
    tensors = read_gguf(path).tensors
    assert tensors.keys() == HASHES[path.name].keys()
    for name, tensor in tensors.items():
        numbers = rows_of(tensor).float().contiguous().numpy().tobytes()
        assert hashlib.sha256(numbers).hexdigest() == HASHES[path.name][name], name


def test_the_files_hold_every_type_that_is_read():
    held = {TYPES[tensor.type][0] for path in FILES for tensor in read_gguf(path).tensors.values()}
    assert held == {*DTYPES, *UNPACK} - {"BF16"}


def test_bf16_is_read(tmp_path):
    numbers = torch.randn(3, 32).bfloat16()
    data = numbers.view(torch.uint8).numpy().tobytes()
    write_gguf(tmp_path / "x.gguf", {}, {"x.weight": (NUMBERS["BF16"][0], (3, 32), data)})
    (tensor,) = read_gguf(tmp_path / "x.gguf").tensors.values()
    assert torch.equal(rows_of(tensor), numbers)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", UNPACK)
def test_unpacking_in_c_equals_unpacking_in_torch(kind, target):
    kernels, why = native.load(target)
    assert kernels is not None, why
    torch.manual_seed(0)
    number, weights, size = NUMBERS[kind]
    for rows, cols in ((37, 512), (16, 256)):
        raw = torch.randint(0, 120, (rows, cols // weights, size), dtype=torch.uint8)  # no NaN among halves
        weight = Quantized((rows, cols), GGUF_CODINGS[kind], 1, CPU)
        kernels.unpack(number, raw.flatten(), rows, weight, (weight.codes, weight.scales, weight.supers))
        codes = UNPACK[kind](raw)
        wanted = interleave(codes, weight.coding)
        for got, want in zip((weight.codes, weight.scales, weight.supers), wanted, strict=True):
            assert (got is None and want is None) or torch.equal(got, want)
        mine = torch.empty_like(weight.codes)
        kernels.interleave(codes.values, weight.coding, mine)
        assert torch.equal(mine, weight.codes)


def dense_model(folder):
    """The same weights as numbers, in fp32."""
    config = DeepseekV2Config.load(folder)
    stored = tensors_of(folder, config)
    model = blueprint(config, torch.float32)
    allocate(model, CPU)
    model.tie()
    for name, place in destinations(model).items():
        rows = place.shape[0] if place.dim() == 2 else 1
        tensor = stored[name]
        numbers = read_stored(tensor) if isinstance(tensor, Stored) else tensor.weights(0, rows)
        place.view(rows, -1).copy_(numbers.view(rows, -1))
    return model.eval().requires_grad_(False)


def logits(runner):
    """Of a prompt, and of some more tokens one by one."""
    rows = Rows(runner)
    return torch.stack([rows.last(IDS, whole=True), *(rows.last([each]) for each in (4, 7, 30, 2, 11, 9))])


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_a_model_gives_the_logits_of_its_dequantised_weights(path):
    """In fp32 by plain torch; and by the kernels as near as their activations in 8 bits allow."""
    folder, kernels = find_model(str(path)), native.load()[0]
    wanted = logits(PlainRunner(dense_model(folder)))
    model = load_model(folder, CPU, torch.float32)
    kept = [module for module in model.modules() if isinstance(module, Quantized)]
    assert len(kept) > 10 and all(weight.coding in GGUF_CODINGS.values() for weight in kept)
    assert (logits(PlainRunner(model)) - wanted).abs().max() <= 1e-3
    fast = load_model(folder, CPU, torch.bfloat16, kernels=kernels)
    error = (logits(CppRunner(fast, kernels)) - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    plain = (logits(PlainRunner(fast)) - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert error.median() < 1.3 * plain.median() + 0.08


def test_what_is_kept_is_the_files_own_codes():
    model = load_model(find_model(str(LITE)), CPU, torch.bfloat16, kernels=native.load()[0])
    weight = model.layers[1].mlp.experts.down_proj
    assert weight.coding == GGUF_CODINGS["Q4_0"] and weight.coding.bits_held == 4.5
    assert model.model.embed_tokens.weight.coding == GGUF_CODINGS["Q4_0"]
    assert isinstance(
        model.layers[0].self_attn.o_proj.weight, torch.Tensor
    )  # its columns are no whole blocks


def test_of_the_embedding_a_token_reads_one_row():
    model = load_model(find_model(str(LITE)), CPU, torch.bfloat16)
    held = {name: tensor.nbytes for name, tensor in state_of(model).items()}
    experts = sum(size for name, size in held.items() if ".mlp.experts." in name)
    table = sum(size for name, size in held.items() if "embed_tokens" in name)
    chosen = model.config.num_experts_per_tok / model.config.n_routed_experts
    rest = sum(held.values()) - experts - table
    one_row = table / model.config.vocab_size
    assert read_bytes_per_token(PlainRunner(model), 0) == pytest.approx(rest + chosen * experts + one_row)


def as_written(path):
    """A file's keys and tensors in the words of write_gguf."""
    found = read_gguf(path)
    tensors = {}
    for name, tensor in found.tensors.items():
        with path.open("rb") as file:
            file.seek(tensor.offset)
            tensors[name] = (tensor.type, tensor.shape, file.read(tensor.length))
    return found.keys, tensors


def test_gate_and_up_in_one_tensor_are_the_same(tmp_path):
    keys, tensors = as_written(LITE)
    wanted = load_model(find_model(str(LITE)), CPU, torch.float32)
    for block in (1, 2, 3):
        gate, up = (tensors.pop(f"blk.{block}.ffn_{leaf}_exps.weight") for leaf in ("gate", "up"))
        experts, rows, cols = gate[1]
        each = len(gate[2]) // experts
        halves = [b"".join(one[2][e * each : (e + 1) * each] for one in (gate, up)) for e in range(experts)]
        tensors[f"blk.{block}.ffn_gate_up_exps.weight"] = (
            gate[0],
            (experts, 2 * rows, cols),
            b"".join(halves),
        )
    write_gguf(tmp_path / "merged.gguf", keys, tensors)
    merged = load_model(find_model(str(tmp_path / "merged.gguf")), CPU, torch.float32)
    assert torch.equal(logits(PlainRunner(merged)), logits(PlainRunner(wanted)))


def test_gate_and_up_of_two_types_meet_in_eight_bits(tmp_path):
    """As in files that were made layer by layer; nothing is lost, and no other weight changes."""
    keys, tensors = as_written(FOLDER / "random-Q4_K_M.gguf")
    _, others = as_written(FOLDER / "random-Q3_K_M.gguf")
    for name in ("blk.0.ffn_up.weight", "blk.1.ffn_up_exps.weight"):
        assert tensors[name][0] != others[name][0]
        tensors[name] = others[name]
    write_gguf(tmp_path / "mixed.gguf", keys, tensors)
    folder = find_model(str(tmp_path / "mixed.gguf"))
    model = load_model(folder, CPU, torch.float32)
    assert str(model.layers[0].mlp.gate_up_proj.coding) == "8 16 signed F32 added"
    assert model.layers[0].mlp.down_proj.coding in GGUF_CODINGS.values()
    assert torch.equal(logits(PlainRunner(model)), logits(PlainRunner(dense_model(folder))))


def changed(tmp_path, change):
    keys, tensors = as_written(LITE)
    change(keys, tensors)
    write_gguf(tmp_path / "changed.gguf", keys, tensors)
    return tmp_path / "changed.gguf"


def renamed(old, new):
    def change(keys, tensors):
        tensors[new] = tensors.pop(old)

    return change


def retyped(keys, tensors):
    iq2_xxs = NUMBERS["IQ2_XXS"]
    tensors["blk.0.ffn_down.weight"] = (iq2_xxs[0], (3, 256), bytes(3 * iq2_xxs[2]))


def other_shape(keys, tensors):
    kind, (rows, cols), data = tensors["blk.2.attn_output.weight"]
    tensors["blk.2.attn_output.weight"] = (kind, (rows // 2, cols), data[: len(data) // 2])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (renamed("blk.1.attn_v_b.weight", "blk.1.attn_w_b.weight"), "attn_"),
        (renamed("blk.2.ffn_down_exps.weight", "blk.2.ffn_sideways.weight"), "extra tensor"),
        (renamed("blk.2.attn_norm.weight", "blk.9.attn_norm.weight"), "its tensors say 5"),
        (lambda keys, tensors: tensors.pop("blk.3.ffn_up_shexp.weight"), "lacks the tensor"),
        (retyped, "IQ2_XXS"),
        (other_shape, "attn_output|o_proj"),
        (lambda keys, tensors: keys.update({"general.architecture": "llama"}), "llama"),
    ],
    ids=["half of kv_b_proj", "extra", "too many layers", "missing", "a type", "shape", "another family"],
)
def test_a_file_that_is_none_is_refused_by_name(tmp_path, change, words):
    path = changed(tmp_path, change)
    with pytest.raises(Dsv2Error) as error:
        load_model(find_model(str(path)), CPU, torch.float32)
    sentence = f"{error.value.what} {error.value.why}"
    assert any(word in sentence for word in words.split("|")), sentence


def complete(model, *more, prompt="5,6,7"):
    done = run_dsv2(
        "complete", "-m", str(model), "--prompt-ids", prompt, "--ignore-eos", "-n", "6", "--temperature", "0",
        "--json", *more,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["token_ids"]


def test_it_runs_from_the_command_line_by_file_by_folder_and_in_parts(tmp_path):
    wanted = complete(V25)
    shutil.copyfile(V25, tmp_path / "model.gguf")
    assert complete(tmp_path) == wanted and complete(tmp_path / "model.gguf", "--kernels", "off") is not None
    shutil.copyfile(LITE, tmp_path / "other.gguf")
    done = run_dsv2("complete", "-m", str(tmp_path), "--prompt-ids", "1")
    assert done.returncode == 2 and "2 GGUF files" in done.stderr and "model.gguf" in done.stderr
    keys, tensors = as_written(V25)
    names, parts = list(tensors), tmp_path / "parts"
    parts.mkdir()
    for part, some in enumerate((names[:30], names[30:])):
        split = {"split.no": part, "split.count": 2, "split.tensors.count": len(names)}
        some_keys = keys | split if part == 0 else split
        write_gguf(
            parts / f"x-{part + 1:05d}-of-00002.gguf", some_keys, {name: tensors[name] for name in some}
        )
    assert complete(parts) == wanted and complete(parts / "x-00002-of-00002.gguf") == wanted


def test_it_can_be_packed_as_it_is_or_anew(tmp_path):
    out = tmp_path / "kept"
    assert run_dsv2("quantize", str(V2), str(out)).returncode == 0
    same, direct = (load_model(folder, CPU, torch.bfloat16) for folder in (out, find_model(str(V2))))
    assert torch.equal(logits(PlainRunner(same)), logits(PlainRunner(direct)))
    weight = same.layers[1].mlp.experts.gate_up_proj
    assert weight.codes.untyped_storage().nbytes() > weight.codes.nbytes  # mapped
    assert complete(out) == complete(V2)
    said = json.loads(run_dsv2("info", str(out), "--json").stdout)
    assert list(said["formats"]) == ["gguf Q8_0"] and said["kept"]["routed experts"]["bits_held"] > 8
    # Of two scales that are as good, plain torch and C++ may take either, and here both pack in torch.
    packing = ("quantize", str(V2), str(tmp_path / "int4"), "--to", "int4", "--kernels", "off")
    assert run_dsv2(*packing).returncode == 0
    assert load_model(tmp_path / "int4", CPU).layers[1].mlp.experts.down_proj.bits == 4
    assert complete(V2, "--quantize", "int4") == complete(tmp_path / "int4")
    for words, model, more in (
        ("is packed already", out, ()),
        ("no codes of another program", DATA / "golden" / "v2", ("--to", "as-is")),
    ):
        done = run_dsv2("quantize", str(model), str(tmp_path / "x"), *more)
        assert done.returncode == 2 and words in done.stderr


def test_info_says_from_the_header_what_each_part_becomes():
    done = run_dsv2("info", str(FOLDER / "random-Q4_K_M.gguf"))
    assert done.returncode == 0 and "routed experts: Q4_K, Q6_K" in done.stdout.replace(
        "Q6_K, Q4_K", "Q4_K, Q6_K"
    )
    said = json.loads(run_dsv2("info", str(FOLDER / "random-Q2_K.gguf"), "--json").stdout)
    assert said["kept"]["attention"]["bits_stored"] < said["kept"]["attention"]["bits_held"] < 5.2
    total = sum(part["bytes"]["gguf Q2_K"] for part in said["parts"].values())
    assert said["formats"]["gguf Q2_K"]["weights_bytes"] == total


def test_its_settings_are_made_once_and_anew_when_it_changes(tmp_path):
    path = tmp_path / "model.gguf"
    shutil.copyfile(LITE, path)
    first = find_model(str(path))
    assert find_model(str(path)) == first and (first / "tokenizer.json").exists()
    shutil.copyfile(V25, path)
    assert find_model(str(path)) != first
    assert Path(DeepseekV2Config.load(find_model(str(path))).foreign.entry["files"][0]) == path
    others = [folder for folder in first.parent.iterdir() if folder == first]
    assert not others, "what was kept of the file as it was is gone"


def test_a_config_may_stand_beside_it_and_safetensors_come_before_it(tmp_path):
    shutil.copyfile(LITE, tmp_path / "model.gguf")
    (tmp_path / "config.json").write_text("{}")
    assert find_model(str(tmp_path)) == find_model(str(tmp_path / "model.gguf"))
    (tmp_path / "model.safetensors").touch()
    assert find_model(str(tmp_path)) == tmp_path


def test_a_file_that_was_copied_or_touched_is_the_same_model(tmp_path):
    shutil.copyfile(LITE, tmp_path / "model.gguf")
    first = find(str(tmp_path / "model.gguf")).mark()
    os.utime(tmp_path / "model.gguf", (1, 1))
    (tmp_path / "copy").mkdir()
    shutil.copyfile(LITE, tmp_path / "copy" / "model.gguf")
    assert find(str(tmp_path / "model.gguf")).mark() == first == find(str(tmp_path / "copy")).mark()
    shutil.copyfile(V25, tmp_path / "model.gguf")
    assert find(str(tmp_path / "model.gguf")).mark() != first


def test_a_checkpoint_can_not_choose_files_of_this_machine(tmp_path):
    shutil.copytree(find_model(str(LITE)), tmp_path / "copy")
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    config["quantization_config"]["files"] = ["/etc/passwd"]
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config))
    with pytest.raises(Dsv2Error, match="names no GGUF file that is as it was"):
        load_model(tmp_path / "copy", CPU)


@pytest.mark.parametrize(
    "name", ["nowhere/model.gguf", "model.gguf", "{folder}/x.gguf", "{folder}/link.gguf"]
)
def test_a_path_that_leads_nowhere_asks_no_hub(tmp_path, name):
    (tmp_path / "link.gguf").symlink_to("nothing")
    for command in ("info", "complete"):
        path = name.format(folder=tmp_path)
        done = run_dsv2(command, *((path,) if command == "info" else ("-m", path, "x")))
        assert done.returncode == 2 and "There is no file" in done.stderr, done.stderr


def test_sampling_is_what_the_file_names_or_what_the_official_checkpoints_have(tmp_path):
    assert find(str(LITE)).settings["temperature"] == 0.3
    keys, tensors = as_written(LITE)
    write_gguf(
        tmp_path / "x.gguf", keys | {"general.sampling.temp": 0.5, "general.sampling.top_p": 7.0}, tensors
    )
    found = find(str(tmp_path / "x.gguf")).settings
    assert (found["temperature"], found["top_p"]) == (0.5, 0.95)
