"""Checkpoints that other programs have quantised: what is read is what their own formulas give."""

from __future__ import annotations

import json
from dataclasses import replace

import foreign
import pytest
import torch
from conftest import DATA
from safetensors.torch import save_file

from dsv2cli.checkpoint.formats import awq, compressed, fp8, gptq, mlx
from dsv2cli.checkpoint.formats.coded import Coded, read_stored
from dsv2cli.checkpoint.safetensors import Stored, read_header
from dsv2cli.errors import Dsv2Error
from dsv2cli.formats import Coding

V2 = DATA / "golden" / "v2"
READERS = {"awq": awq, "gptq": gptq, "fp8": fp8, "compressed-tensors": compressed}
CHECKPOINTS = {
    "awq": lambda out: foreign.write_awq(V2, out, group=32),
    "gptq": lambda out: foreign.write_gptq(V2, out, 4, 32, True, False, 1),
    "gptq 8 bits": lambda out: foreign.write_gptq(V2, out, 8, 32, False, False, 2),
    "gptq act-order": lambda out: foreign.write_gptq(V2, out, 4, 16, False, True, 1),
    "fp8 tensor": lambda out: foreign.write_fp8(V2, out, "tensor"),
    "fp8 channel": lambda out: foreign.write_fp8(V2, out, "channel"),
    "fp8 block": lambda out: foreign.write_fp8(V2, out, "block"),
    **{
        f"compressed {kind}": lambda out, kind=kind: foreign.write_compressed(V2, out, kind)
        for kind in foreign.COMPRESSED
    },
    "mlx": lambda out: foreign.write_mlx(V2, out, 4, 32),
    "mlx 6 bits": lambda out: foreign.write_mlx(V2, out, 6, 64),
}


def read_folder(folder):
    config = json.loads((folder / "config.json").read_text())
    stored = read_header(folder / "model.safetensors")
    if "quantization" in config:
        return mlx.read(stored, config["quantization"], "config.json")
    entry = config["quantization_config"]
    return READERS[entry["quant_method"]].read(stored, entry, "config.json")


def numbers(weight):
    return weight.weights(0, weight.shape[0]) if isinstance(weight, Coded) else read_stored(weight).float()


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_every_weight_of_a_checkpoint_is_what_its_formula_gives(kind, tmp_path):
    means = CHECKPOINTS[kind](tmp_path / "out")
    weights = read_folder(tmp_path / "out")
    assert weights.keys() == means.keys()
    for name, weight in weights.items():
        assert torch.equal(numbers(weight), means[name]), name
    plain = {name for name, weight in weights.items() if isinstance(weight, Stored)}
    assert {"model.norm.weight", "model.layers.1.mlp.gate.weight"} <= plain
    assert ("lm_head.weight" in plain) == (not kind.startswith("mlx"))
    lengths = sum(weight.length for weight in weights.values())
    assert lengths <= (tmp_path / "out" / "model.safetensors").stat().st_size


def matrix(rows, cols, seed=0):
    torch.manual_seed(seed)
    return torch.randn(rows, cols) * torch.rand(rows, 1) + 0.1 * torch.randn(rows, 1)


def written(folder, parts, module="a"):
    """The headers of a file with one module's tensors, and a norm and a bias beside them."""
    tensors = {f"{module}.{part}": tensor.contiguous() for part, tensor in parts.items()}
    tensors |= {"norm.weight": torch.ones(8), f"{module}.bias": torch.ones(4)}
    save_file(tensors, folder / "one.safetensors")
    return read_header(folder / "one.safetensors")


AWQ = {"bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
GPTQ = {"bits": 4, "group_size": 32, "sym": False, "desc_act": False, "checkpoint_format": "gptq"}
MLX = {"bits": 4, "group_size": 32}
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


def ct(format="pack-quantized", **weights):
    group = {"targets": ["Linear"], "weights": foreign.weights_entry(**weights), "input_activations": None}
    return {"format": format, "config_groups": {"group_0": group}}


INT4 = ct(num_bits=4, strategy="group", group_size=32)
INT8 = ct("int-quantized", num_bits=8, strategy="channel")
ONE = {  # reader, settings, shape, writer, the coding that is expected
    "awq, a last group that is partial": (awq, AWQ, (40, 72), lambda w: foreign.awq(w, 32), "zero 4 F16 32"),
    "awq in bf16": (awq, AWQ, (24, 64), lambda w: foreign.awq(w, 32, BF16), "zero 4 BF16 32"),
    "awq by rows": (awq, AWQ | {"group_size": -1}, (24, 200), lambda w: foreign.awq(w, -1), "zero 4 F16 128"),
    "awq, group 96": (awq, AWQ | {"group_size": 96}, (8, 192), lambda w: foreign.awq(w, 96), "zero 4 F16 32"),
    "awq, group 256": (
        awq,
        {"w_bit": 4, "q_group_size": 256},
        (8, 512),
        lambda w: foreign.awq(w, 256),
        "zero 4 F16 128",
    ),
    "gptq, a last group that is partial": (
        gptq,
        GPTQ,
        (40, 72),
        lambda w: foreign.gptq(w, 4, 32, False),
        "zero 4 F16 32",
    ),
    "gptq in the second version": (
        gptq,
        GPTQ | {"checkpoint_format": "gptq_v2"},
        (24, 64),
        lambda w: foreign.gptq(w, 4, 32, False, version=2),
        "zero 4 F16 32",
    ),
    "gptq with zeros in the middle": (
        gptq,
        GPTQ | {"sym": True},
        (24, 64),
        lambda w: foreign.gptq(w, 4, 32, True, dtype=F32),
        "none 4 F32 32",
    ),
    "gptq in 8 bits": (
        gptq,
        GPTQ | {"bits": 8},
        (12, 72),
        lambda w: foreign.gptq(w, 8, 32, False),
        "zero 8 F16 32",
    ),
    "gptq in 8 bits with zeros in the middle": (
        gptq,
        GPTQ | {"bits": 8, "sym": True},
        (12, 68),
        lambda w: foreign.gptq(w, 8, 32, True),
        "none 8 F16 32",
    ),
    "gptq by rows": (
        gptq,
        GPTQ | {"group_size": -1},
        (24, 200),
        lambda w: foreign.gptq(w, 4, -1, False),
        "zero 4 F16 128",
    ),
    "gptq with desc_act and columns in order": (
        gptq,
        GPTQ | {"desc_act": True},
        (24, 64),
        lambda w: foreign.gptq(w, 4, 32, False),
        "zero 4 F16 32",
    ),
    "gptq with columns in another order": (
        gptq,
        GPTQ | {"desc_act": True},
        (24, 72),
        lambda w: foreign.gptq(w, 4, 32, False, act_order=True),
        None,
    ),
    "gptq with bits of its own": (
        gptq,
        GPTQ | {"dynamic": {"+:a": {"bits": 8, "group_size": 64}, "-:b": {}}},
        (16, 128),
        lambda w: foreign.gptq(w, 8, 64, False),
        "zero 8 F16 64",
    ),
    "fp8 with odd sizes": (fp8, {}, (37, 201), lambda w: foreign.fp8(w, "channel"), "e4m3 8 F32 128"),
    "fp8 with one scale": (fp8, {}, (37, 201), lambda w: foreign.fp8(w, "tensor"), "e4m3 8 F32 128"),
    "fp8 in blocks": (
        fp8,
        {"weight_block_size": [128, 128]},
        (150, 300),
        lambda w: foreign.fp8(w, "block"),
        "e4m3 8 F32 128",
    ),
    "fp8 in blocks of 64": (
        fp8,
        {"weight_block_size": [16, 192]},
        (50, 400),
        lambda w: foreign.fp8(w, "block", (16, 192)),
        "e4m3 8 F32 64",
    ),
    "int4 with odd rows": (
        compressed,
        INT4,
        (37, 96),
        lambda w: foreign.packed_int(w, 4, 32, True),
        "none 4 BF16 32",
    ),
    "int4 with zeros": (
        compressed,
        ct(num_bits=4, strategy="group", group_size=32, symmetric=False),
        (37, 96),
        lambda w: foreign.packed_int(w, 4, 32, False),
        "zero 4 BF16 32",
    ),
    "int4 by rows that end within a word": (
        compressed,
        ct(num_bits=4, strategy="channel", symmetric=False),
        (21, 203),
        lambda w: foreign.packed_int(w, 4, -1, False),
        "zero 4 BF16 128",
    ),
    "int4 with columns in another order": (
        compressed,
        ct(num_bits=4, strategy="group", group_size=32, actorder="group", symmetric=False),
        (37, 96),
        lambda w: foreign.packed_int(w, 4, 32, False, act_order=True),
        None,
    ),
    "packed int8 with zeros": (
        compressed,
        ct(num_bits=8, strategy="group", group_size=64, symmetric=False),
        (21, 128),
        lambda w: foreign.packed_int(w, 8, 64, False, dtype=F16),
        "zero 8 F16 64",
    ),
    "int8 by rows": (compressed, INT8, (37, 201), lambda w: foreign.plain_int8(w, -1), "none 8 BF16 128"),
    "int8 in groups with zeros": (
        compressed,
        ct("int-quantized", num_bits=8, strategy="group", group_size=32, symmetric=False),
        (37, 96),
        lambda w: foreign.plain_int8(w, 32, False, F32),
        "zero 8 F32 32",
    ),
    "mlx in odd rows": (mlx, MLX, (37, 96), lambda w: foreign.mlx(w, 4, 32), "added 4 BF16 32"),
    "mlx in 8 bits": (
        mlx,
        {"bits": 8, "group_size": 64, "mode": "affine"},
        (37, 192),
        lambda w: foreign.mlx(w, 8, 64, F16),
        "added 8 F16 64",
    ),
    "mlx with bits of its own": (
        mlx,
        MLX | {"a": {"bits": 8, "group_size": 64}, "b": False},
        (37, 192),
        lambda w: foreign.mlx(w, 8, 64, F32),
        "added 8 F32 64",
    ),
    **{
        f"mlx in {bits} bits": (
            mlx,
            MLX | {"bits": bits},
            (21, 96),
            lambda w, bits=bits: foreign.mlx(w, bits, 32),
            f"added {4 if bits < 4 else 8} BF16 32",
        )
        for bits in (2, 3, 5, 6)
    },
}


def coding_of(text):
    if text is None:
        return None
    how, bits, scale, group = text.split()
    tables = {
        "e4m3": "e4m3",
        "added": "plain",
        "none": "signed",
        "zero": "plain" if bits == "4" else "signed",
    }
    return Coding(int(bits), int(group), tables[how], scale, how if how in ("added", "zero") else "")


@pytest.mark.parametrize("kind", ONE)
def test_any_rows_of_a_matrix_are_what_its_formula_gives(kind, tmp_path):
    reader, settings, shape, writer, expected = ONE[kind]
    parts, means = writer(matrix(*shape))
    weights = reader.read(written(tmp_path, parts), settings, "config.json")
    assert set(weights) == {"a.weight", "a.bias", "norm.weight"}
    one = weights["a.weight"]
    assert (one.shape, one.coding) == (shape, coding_of(expected))
    for begin, end in ((0, shape[0]), (0, 1), (3, 8), (7, shape[0])):
        assert torch.equal(one.weights(begin, end), means[begin:end])
        if one.coding is not None:
            codes = one.read(begin, end)
            groups = -(-shape[1] // one.coding.group)
            assert (codes.values.dtype, codes.values.shape) == (torch.uint8, (end - begin, shape[1]))
            assert codes.scales.shape == (end - begin, groups)
            assert codes.offsets is None or codes.offsets.shape == codes.scales.shape
            assert codes.offsets is None or codes.offsets.dtype == codes.scales.dtype


def test_a_stack_of_experts_is_read_expert_by_expert(tmp_path):
    parts, means = zip(*(foreign.mlx(matrix(24, 64, seed), 4, 32) for seed in range(3)), strict=True)
    tensors = {f"m.mlp.experts.{e}.up_proj.{part}": t for e in range(3) for part, t in parts[e].items()}
    tensors |= {f"m.mlp.experts.{e}.down_proj.weight": matrix(8, 24, e) for e in range(3)}
    save_file(foreign.stacked(tensors), tmp_path / "stacked.safetensors")
    weights = mlx.read(read_header(tmp_path / "stacked.safetensors"), MLX, "config.json")
    assert len(weights) == 6
    for expert in range(3):
        up, down = (weights[f"m.mlp.experts.{expert}.{name}.weight"] for name in ("up_proj", "down_proj"))
        assert torch.equal(up.weights(5, 24), means[expert][5:])
        assert torch.equal(read_stored(down), matrix(8, 24, expert))


def test_awq_without_zeros_has_them_in_the_middle(tmp_path):
    parts, _ = foreign.awq(matrix(16, 64), 32)
    zeros = parts.pop("qzeros")
    one = awq.read(written(tmp_path, parts), AWQ | {"zero_point": False}, "config.json")["a.weight"]
    assert one.coding == Coding(4, 32, "signed", "F16")
    without = one.weights(0, 16)
    parts["qzeros"] = torch.full_like(zeros, -0x77777778)  # eight times 8
    same = awq.read(written(tmp_path, parts), AWQ, "config.json")["a.weight"]
    assert torch.equal(without, same.weights(0, 16))


def test_what_an_unquantised_model_does_not_have_is_left_out(tmp_path):
    parts, _ = foreign.fp8(matrix(16, 64), "tensor")
    parts |= {"input_scale": torch.ones(1), "k_scale": torch.ones(()), "v_scale": torch.ones(())}
    assert set(fp8.read(written(tmp_path, parts), {}, "config.json")) == {"a.weight", "a.bias", "norm.weight"}


def test_matrices_of_several_schemes_are_told_apart_by_their_shapes(tmp_path):
    groups = INT4["config_groups"] | {
        "group_1": ct(num_bits=8, strategy="channel")["config_groups"]["group_0"],
        "group_2": ct(num_bits=8, type="float", strategy="channel")["config_groups"]["group_0"],
    }
    writers = {
        "a": lambda w: foreign.packed_int(w, 4, 32, True),
        "b": lambda w: foreign.packed_int(w, 8, -1, True),
        "c": lambda w: foreign.fp8(w, "channel"),
    }
    both = {name: writer(matrix(24, 96)) for name, writer in writers.items()}
    tensors = {f"{name}.{part}": t.contiguous() for name in both for part, t in both[name][0].items()}
    save_file(tensors, tmp_path / "mixed.safetensors")
    settings = {"format": "mixed-precision", "config_groups": groups}
    weights = compressed.read(read_header(tmp_path / "mixed.safetensors"), settings, "config.json")
    for name, (_, means) in both.items():
        assert torch.equal(weights[f"{name}.weight"].weights(0, 24), means)


BLOCKS = {"weight_block_size": [32, 32]}
REFUSED_SETTINGS = [
    *((awq, AWQ | {"bits": bits}, "bits") for bits in (3, "4", True, None, [4], {})),
    *(
        (awq, AWQ | {"version": version}, "version")
        for version in ("gemv", "gemv_fast", "marlin", 1, ["gemm"])
    ),
    *((awq, AWQ | {"group_size": group}, "group_size") for group in (0, -2, True, "32", 2**40, 32.0, None)),
    (awq, AWQ | {"group_size": 40}, "multiple of 16"),
    (awq, AWQ | {"group_size": 64}, "shape"),
    (awq, AWQ | {"zero_point": "yes"}, "zero_point"),
    *((gptq, GPTQ | {"bits": bits}, "bits") for bits in (2, 3, True, "4", None, [])),
    *((gptq, GPTQ | {"group_size": group}, "group_size") for group in (0, -2, False, "32", 1e9, {})),
    *((gptq, GPTQ | {"checkpoint_format": each}, "checkpoint_format") for each in ("marlin", "bitblas", 2)),
    (gptq, GPTQ | {"is_marlin_format": True}, "is_marlin_format"),
    (gptq, GPTQ | {"sym": 1}, "sym"),
    (gptq, GPTQ | {"desc_act": "no"}, "desc_act"),
    (gptq, GPTQ | {"pack_dtype": "int16"}, "pack_dtype"),
    (gptq, GPTQ | {"dynamic": []}, "dynamic"),
    (gptq, GPTQ | {"dynamic": {"+:a": 3}}, "dynamic"),
    (gptq, GPTQ | {"dynamic": {"+:a": {"bits": 3}}}, "bits"),
    (gptq, GPTQ | {"bits": 8}, "8 bits"),
    (gptq, GPTQ | {"group_size": 16}, "group_size"),
    (gptq, GPTQ | {"dynamic": {"+:x": {"group_size": 40}}}, "more than one way"),
    (fp8, BLOCKS | {"fmt": "e5m2"}, "e5m2"),
    (fp8, BLOCKS | {"activation_scheme": 8}, "activation_scheme"),
    *(
        (fp8, {"weight_block_size": block}, "weight_block_size")
        for block in (32, [], [32], [0, 32], [-1, 32], [True, 32], ["32", 32], {"0": 1}, [2**40, 1])
    ),
    (fp8, {"weight_block_size": [32, 64]}, "shape"),
    (fp8, {}, "shape"),
    (fp8, {"weight_block_size": [32, 40]}, "multiple of 16"),
    (compressed, {}, "config_groups"),
    (compressed, {"config_groups": []}, "config_groups"),
    (compressed, {"config_groups": {"W4A16": ["Linear"]}}, "W4A16"),
    *(
        (compressed, INT4 | {"format": format}, "format")
        for format in ("nvfp4-pack-quantized", "marlin-24", "sparse-bitmask", "dense", 4, [])
    ),
    *(
        (compressed, ct(**{"num_bits": 4, "strategy": "group", "group_size": 32} | change), word)
        for change, word in (
            ({"num_bits": 3}, "num_bits"),
            ({"num_bits": True}, "num_bits"),
            ({"type": "float"}, "num_bits"),
            ({"type": "complex"}, "type"),
            ({"group_size": 0}, "group_size"),
            ({"group_size": None}, "group_size"),
            ({"group_size": -1}, "group_size"),
            ({"group_size": "32"}, "group_size"),
            ({"group_size": 64}, "shape"),
            ({"strategy": "channel"}, "shape"),
            ({"strategy": "tensor_group"}, "strategy"),
            ({"strategy": ["group"]}, "strategy"),
            ({"strategy": "block"}, "block_structure"),
            ({"strategy": "block", "block_structure": "32x32"}, "block_structure"),
            ({"symmetric": "no"}, "symmetric"),
            ({"symmetric": False}, "weight_zero_point"),
            ({"dynamic": True}, "dynamic"),
            ({"actorder": "random"}, "actorder"),
        )
    ),
    (compressed, INT4 | {"transform_config": {"config_groups": {}}}, "transform_config"),
    (compressed, INT4 | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
    (compressed, {"config_groups": {"0": {"weights": None}}}, "weights"),
    (compressed, {"config_groups": {"0": {"weights": []}}}, "weights"),
    (compressed, {"config_groups": {"0": {"weights": {}, "output_activations": {}}}}, "output_activations"),
    *((mlx, MLX | {"bits": bits}, "bits") for bits in (1, 7, 16, True, "4", None)),
    *((mlx, MLX | {"group_size": group}, "group_size") for group in (0, 16, -1, True, "32", None)),
    *((mlx, MLX | {"mode": mode}, "mode") for mode in ("mxfp4", "nvfp4", 4, [])),
    (mlx, MLX | {"a": False}, "quantization.a"),
    (mlx, MLX | {"a": 4}, "quantization.a"),
    (mlx, MLX | {"a": {"bits": 4}}, "group_size"),
    (mlx, MLX | {"a": {"bits": 7, "group_size": 32}}, "bits"),
    (mlx, MLX | {"bits": 8}, "groups of 32 codes of 8 bits"),
    (mlx, MLX | {"group_size": 128}, "groups of 128"),
]
PROPER = {
    awq: (AWQ, lambda w: foreign.awq(w, 32)),
    gptq: (GPTQ, lambda w: foreign.gptq(w, 4, 32, False)),
    fp8: (BLOCKS, lambda w: foreign.fp8(w, "block", (32, 32))),
    compressed: (INT4, lambda w: foreign.packed_int(w, 4, 32, True)),
    mlx: (MLX, lambda w: foreign.mlx(w, 4, 32)),
}


@pytest.fixture(scope="module")
def proper(tmp_path_factory):
    """By reader, the headers of one proper matrix of 48 x 96."""
    found = {}
    for reader, (_, writer) in PROPER.items():
        parts, _ = writer(matrix(48, 96))
        found[reader] = written(tmp_path_factory.mktemp("proper"), parts)
    return found


def refusal(reader, stored, settings):
    """What is said of a checkpoint whose matrix is wanted."""
    with pytest.raises(Dsv2Error) as error:
        reader.read(stored, settings, "config.json")["a.weight"].read(0, 48)
    assert error.value.fix
    return f"{error.value.what} {error.value.why}"


@pytest.mark.parametrize(("reader", "settings", "word"), REFUSED_SETTINGS)
def test_settings_that_are_not_read_are_named(reader, settings, word, proper):
    assert word in refusal(reader, proper[reader], settings)


TENSORS = [
    (reader, part)
    for reader, parts in {
        awq: ("qweight", "qzeros", "scales"),
        gptq: ("qweight", "qzeros", "scales", "g_idx"),
        fp8: ("weight", "weight_scale_inv"),
        compressed: ("weight_packed", "weight_scale", "weight_shape"),
        mlx: ("weight", "scales", "biases"),
    }.items()
    for part in parts
]
SHAPES = [
    (),
    (0,),
    (1,),
    (48,),
    (0, 96),
    (48, 0),
    (1, 1),
    (7, 5),
    (2**40, 2**40),
    (2**23, 2**23),
    (1, 48, 96),
]


@pytest.mark.parametrize(("reader", "part"), TENSORS)
def test_tensors_of_another_type_or_shape_are_named(reader, part, proper):
    stored, settings, name = proper[reader], PROPER[reader][0], f"a.{part}"
    for dtype in ("BOOL", "F8_E5M2", "F64", "U8", "X", ""):
        assert name in refusal(reader, stored | {name: replace(stored[name], dtype=dtype)}, settings)
    for shape in SHAPES if reader is not fp8 or part == "weight" else SHAPES[-4:]:
        assert "a." in refusal(reader, stored | {name: replace(stored[name], shape=shape)}, settings)


@pytest.mark.parametrize(
    ("reader", "part"),
    [each for each in TENSORS if each[1] not in ("qweight", "weight", "weight_packed", "g_idx")],
)
def test_a_tensor_that_is_missing_is_named(reader, part, proper):
    stored = {name: tensor for name, tensor in proper[reader].items() if name != f"a.{part}"}
    assert f"a.{part.removesuffix('_inv')}" in refusal(reader, stored, PROPER[reader][0])


@pytest.mark.parametrize("reader", [awq, gptq])
def test_a_weight_that_is_there_plain_and_quantised_is_refused(reader, proper):
    stored = proper[reader] | {"a.weight": proper[reader]["norm.weight"]}
    assert "a.weight" in refusal(reader, stored, PROPER[reader][0])


def test_zeros_that_are_not_in_the_middle_are_refused_where_sym_is_true(proper):
    assert "sym is true" in refusal(gptq, proper[gptq], GPTQ | {"sym": True})


@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("wrong", [-1, 3, 2**31 - 1])
def test_an_order_of_columns_that_cannot_be_is_refused(desc_act, wrong, tmp_path):
    parts, _ = foreign.gptq(matrix(48, 96), 4, 32, False, act_order=True)
    parts["g_idx"][5] = wrong
    assert "a.g_idx" in refusal(gptq, written(tmp_path, parts), GPTQ | {"desc_act": desc_act})


def test_columns_in_another_order_are_refused_where_desc_act_is_false(tmp_path):
    parts, _ = foreign.gptq(matrix(48, 96), 4, 32, False, act_order=True)
    assert "desc_act is false" in refusal(gptq, written(tmp_path, parts), GPTQ)


@pytest.mark.parametrize("byte", [0x7F, 0xFF])
def test_a_float_that_is_no_number_is_refused(byte, tmp_path):
    parts, _ = foreign.fp8(matrix(48, 96), "tensor")
    parts["weight"].view(torch.uint8)[47, 95] = byte
    assert "no number" in refusal(fp8, written(tmp_path, parts), {})


def test_floats_of_another_kind_are_refused(tmp_path):
    parts, _ = foreign.fp8(matrix(48, 96), "tensor")
    parts["weight"] = parts["weight"].float().to(torch.float8_e5m2)
    assert "F8_E5M2" in refusal(fp8, written(tmp_path, parts), {})


def test_attention_that_was_split_by_heads_is_refused(proper):
    stored = proper[mlx] | {"model.layers.0.self_attn.embed_q.weight": proper[mlx]["norm.weight"]}
    assert "kv_b_proj" in refusal(mlx, stored, MLX)


def test_more_experts_than_a_model_has_are_refused(proper):
    stack = replace(proper[mlx]["norm.weight"], shape=(2**20, 1, 1))
    stored = proper[mlx] | {"m.mlp.switch_mlp.up_proj.weight": stack}
    assert "experts" in refusal(mlx, stored, MLX)


def test_a_shape_that_does_not_fit_the_packed_words_is_refused(tmp_path):
    for shape in ([48, 97], [48, 0], [48, -1], [48, 2**62], [47, 96]):
        parts, _ = foreign.packed_int(matrix(48, 96), 4, 32, True)
        parts["weight_shape"] = torch.tensor(shape)
        assert "a.weight" in refusal(compressed, written(tmp_path, parts), INT4)
