"""The C++ kernels against the plain torch that says what they compute, for every instruction set this CPU
runs.
"""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from rows import Rows
from shapes import CODINGS

from dsv2cli.checkpoint.blueprint import make_quantized
from dsv2cli.checkpoint.load import load_model
from dsv2cli.formats import GROUP, own_coding
from dsv2cli.kernels import build, native
from dsv2cli.kernels.quantized import (
    CODEBOOK,
    SCALES,
    TABLES,
    Codes,
    Quantized,
    decode,
    interleave,
    pack_reference,
    round_activations,
)
from dsv2cli.run.cpu import CppRunner
from dsv2cli.run.plan import cpp_refusal
from dsv2cli.run.runner import PlainRunner

CPU = torch.device("cpu")
GOLDEN = sorted(path.parent for path in (Path(__file__).parent / "data" / "golden").glob("*/config.json"))
FLAGS = build.processor().split()
TARGETS = [name for name in build.TARGETS if name != "avx2" or {"avx2", "fma", "f16c"} <= set(FLAGS)]
if "avx_vnni" in FLAGS:  # what smaller processors have, beside no AVX-512
    build.TARGETS["avx2-vnni"] = [*build.TARGETS["avx2"], "-mavxvnni"]
    TARGETS.append("avx2-vnni")
# Widths of V2 and V2-Lite, fewer rows; and odd ones.
SHAPES = [(48, 2048), (33, 1408), (64, 5120), (40, 1536), (576, 512), (19, 50), (1, 7), (130, 96)]


@pytest.fixture(params=TARGETS)
def kernels(request):
    library, why = native.load(request.param)
    assert library is not None, why
    return library


def quantize(weight, bits, parts=1, group=GROUP):
    out = Quantized(tuple(weight.shape), own_coding(bits, group), parts, CPU)
    for part, rows in enumerate(weight.chunk(parts)):
        for to, values in zip(out.part(None, part), pack_reference(rows, bits, group), strict=True):
            to.copy_(values)
    return out


def close(got, wanted, share):
    """The error is small beside the numbers themselves."""
    assert torch.isfinite(got).all()
    assert (got.float() - wanted.float()).norm() <= share * wanted.float().norm(), (got, wanted)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group", [32, 64])
def test_a_product_equals_the_plain_one(kernels, shape, group):
    torch.manual_seed(0)
    weight = (torch.randn(shape) * 0.02).bfloat16()
    for count in (1, 2, 5, 13, 40):
        x = torch.randn(count, shape[1]).bfloat16()
        close(kernels.linear(weight)(x), x.float() @ weight.float().T, 4e-3)
        for bits in (8, 4):
            packed = quantize(weight, bits, group=group)
            wanted = round_activations(x, group) @ packed.dequantize(torch.float32).T
            close(kernels.linear(packed)(x), wanted, 4e-3)


@pytest.mark.parametrize("coding", [each for each in CODINGS if each.bits == 4], ids=str)
def test_codes_of_8_bits_hold_what_those_of_4_stand_for(coding):
    torch.manual_seed(0)
    _, packed = random_codes((33, 1408), coding)
    wide = packed.widened()
    assert wide.bits == 8 and torch.equal(wide.dequantize(torch.float32), packed.dequantize(torch.float32))


def test_numbers_of_six_bits_are_our_own_and_those_of_most_programs():
    """What AVX2 multiplies by the shorter product; sums of four such with numbers of x stay in 16 bits."""
    spans = {name: native.span_of(tuple(map(int, values))) for name, values in TABLES.items()}
    assert spans == {"codebook": (-27, 60), "iq4_nl": (-127, 240), "signed": (-8, 15), "plain": (0, 15)}
    assert 4 * 63 * 127 < 1 << 15 and list(CODEBOOK) == sorted(set(CODEBOOK))


def random_codes(shape, coding, device=CPU):
    """Codes as a file may hold them, with scales that give weights of about 0.02, and the matrix of them."""
    rows, cols = shape
    groups, largest = -(-cols // coding.group), 15 if coding.bits == 4 else 255
    values = torch.randint(0, largest + 1, shape, dtype=torch.uint8)
    if coding.table == "e4m3":
        values = torch.where(values % 128 == 127, 0, values)

    def numbers(size, low, high):
        if coding.scale == "I8":
            return torch.randint(1, 64, (rows, size)).to(torch.int8)
        return (low + (high - low) * torch.rand(rows, size)).to(SCALES[coding.scale])

    scales = numbers(groups, 0.5, 1.5) if coding.scale == "I8" else numbers(groups, 1e-3, 3e-3)
    offsets = numbers(groups, -0.02, 0.02) if coding.offset == "added" else None
    if coding.offset == "zero":
        offsets = torch.randint(0, 16, (rows, groups)).to(SCALES[coding.scale])
    supers = [None, None]
    if coding.scale == "I8":
        supers = [(torch.rand(rows, -(-cols // 256)) * 1e-5).half() for _ in range(2 if coding.offset else 1)]
    codes = Codes(values, scales, offsets, supers[0], supers[1] if coding.offset else None)
    out = Quantized(shape, coding, 1, device)
    out.codes, out.scales, out.supers = interleave(codes, coding)
    return codes, out


@pytest.mark.parametrize("coding", CODINGS, ids=str)
def test_codes_of_other_programs_mean_the_same_in_a_matrix_and_multiply_as_it(kernels, coding):
    """All types of scales, offsets and tables; whole SUPERs and not."""
    torch.manual_seed(0)
    for shape in ((48, 2048), (33, 1408), (19, 72), (16, 10944)):
        codes, packed = random_codes(shape, coding)
        weights = decode(codes, coding)
        assert torch.equal(packed.dequantize(torch.float32), weights)
        index = torch.tensor([[0, shape[0] - 1], [17, 3]]) % shape[0]
        assert torch.equal(packed.rows(index, torch.float32), weights[index])
        for count in (1, 2, 5, 13):
            x = torch.randn(count, shape[1]).bfloat16()
            taken = x.float() if coding.table == "e4m3" else round_activations(x, coding.group)
            close(kernels.linear(packed)(x), taken @ weights.T, 4e-3)


def test_a_token_gets_the_same_bits_alone_and_among_others(kernels):
    torch.manual_seed(0)
    weights = {str(coding): random_codes((33, 1408), coding)[1] for coding in CODINGS}
    for cols in (20, 100, 1410, 5130):  # no round of sums, one, and more than a part of rounds
        weights[f"bf16 {cols}"] = (torch.randn(33, cols) * 0.02).bfloat16()
    for name, weight in weights.items():
        product, x = kernels.linear(weight), torch.randn(13 + 53, weight.shape[1]).bfloat16()
        alone = torch.cat([product(row) for row in x.split(1)])
        assert torch.equal(torch.cat([product(some) for some in x.split([13, 53])]), alone), name


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [8, 4])
def test_packing_in_c_equals_packing_in_torch(kernels, shape, bits):
    torch.manual_seed(1)
    weight = torch.randn(shape) * 0.02
    weight[0, : shape[1] // 2] = 0
    codes, scales = pack_reference(weight, bits, GROUP)
    mine, theirs = torch.empty_like(codes), torch.empty_like(scales)
    kernels.pack(weight, bits, GROUP, mine, theirs)
    packed, other = Quantized(shape, own_coding(bits, GROUP), 1, CPU), quantize(weight, bits)
    packed.codes, packed.scales = mine, theirs
    close(
        packed.dequantize(torch.float32), other.dequantize(torch.float32), 5e-3
    )  # near ties may fall either way
    close(packed.dequantize(torch.float32), weight, 0.01 if bits == 8 else 0.09)


def test_a_scale_is_searched_for():
    torch.manual_seed(2)
    x = torch.randn(1024, GROUP)
    searched = quantize(x, 4).dequantize(torch.float32)
    even = x.abs().amax(1, keepdim=True) / 7
    assert (searched - x).pow(2).sum() < 0.6 * ((x / even).round() * even - x).pow(2).sum()


def logits_of(model, prompts, steps):
    """Prefill and then fixed tokens one by one, for a batch of prompts of different lengths."""
    rows = Rows(model, len(prompts))
    out = [rows.last(*prompts, whole=True)]
    for step in range(steps):
        out.append(rows.last(*[[step % model.config.vocab_size]] * len(prompts)))
    return torch.stack(out)


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda path: path.name)
@pytest.mark.parametrize("format", [None, "int8", "int4", "int4-all"])
def test_a_whole_model_is_as_near_to_fp32_as_the_plain_path(kernels, folder, format):
    model = load_model(folder, CPU, torch.bfloat16, format=format, kernels=kernels)
    if why := cpp_refusal(model.config, "cpu", "bfloat16"):
        pytest.skip(why)
    torch.manual_seed(3)
    prompts = [torch.randint(model.config.vocab_size, (length,)).tolist() for length in (3, 40, 150)]
    wide = load_model(folder, CPU, torch.float32, format=format, kernels=kernels)
    exact, plain = (logits_of(PlainRunner(each), prompts, 6) for each in (wide, model))
    fused = logits_of(CppRunner(model, kernels), prompts, 6)
    # The median over rows: a near tie in a router may fall the other way in bf16, on either path.
    error, allowed = (((out - exact).norm(dim=-1) / exact.norm(dim=-1)).median() for out in (fused, plain))
    # int8 activations cost 0.02 of these random logits, and 0.08 where they tip a router of eight experts.
    assert error < 1.3 * allowed + (0 if format is None else 0.08), (error, allowed)
    assert torch.equal(logits_of(PlainRunner(model), prompts, 6), plain)


def test_a_gate_far_below_zero_shuts_and_one_far_above_lets_through(kernels):
    """SiLU of -100 is 0 and of 200 is 200: an exponential that overflows would say otherwise."""
    model = load_model(next(folder for folder in GOLDEN if folder.name == "dense_only"), CPU, torch.bfloat16)
    mlp, layer = model.layers[0].mlp, model.layers[0]
    runner = CppRunner(model, kernels)
    gate = mlp.gate_up_proj.data.chunk(2)[0]
    torch.manual_seed(4)
    for size in (1, 3):
        x = torch.ones(size, gate.shape[1]).bfloat16()  # its norm is itself, so the gate is the weight
        layer.post_attention_layernorm.weight.data.fill_(1.0)
        for weight in (-100.0, -200.0, 200.0):
            gate.fill_(weight / gate.shape[1])
            wanted = mlp(layer.post_attention_layernorm(x))
            found = x.clone()
            kernels.mlp(runner.fused.each[0], found)
            close(found - x, wanted, 0.02)


def test_loading_quantises_every_large_weight():
    model = load_model(GOLDEN[0], CPU, torch.bfloat16, format="int4")
    kinds = {
        name.rpartition(".")[2]: module.bits
        for name, module in model.named_modules()
        if isinstance(module, Quantized)
    }
    assert kinds["gate_up_proj"] == kinds["down_proj"] == 4 and kinds["weight"] == 8
    attention = model.model.layers[0].self_attn
    assert attention.o_proj.weight.bits == 4 and attention.kv_a_proj_with_mqa.weight.bits == 8
    small = load_model(GOLDEN[0], CPU, torch.bfloat16, format="int4-all")
    attention = small.model.layers[0].self_attn
    assert small.lm_head.weight.bits == attention.kv_a_proj_with_mqa.weight.bits == 4
    twin = load_model(GOLDEN[0], CPU, torch.bfloat16)
    make_quantized(twin, "int8")
    assert not any(name.endswith(("gate_up_proj", "o_proj.weight")) for name, _ in twin.named_parameters())


def test_what_is_compiled_is_kept_by_all_of_its_source(tmp_path):
    """A change in any one file, another flag or another processor asks for another library."""
    sources = shutil.copytree(build.SOURCES, tmp_path / "cpu")
    key = build.key_of(sources, ["-O3"], "avx2")
    assert key == build.key_of(build.SOURCES, ["-O3"], "avx2")
    files = sorted(sources.iterdir())
    assert {"api.cpp", "vector.h", "mlp.h", "attention.h"} <= {path.name for path in files}
    for path in files:
        text = path.read_text()
        path.write_text(text + "\n")
        assert build.key_of(sources, ["-O3"], "avx2") != key, path.name
        path.write_text(text)
    assert build.key_of(sources, ["-O3"], "avx2") == key
    assert build.key_of(sources, ["-O2"], "avx2") != key != build.key_of(sources, ["-O3"], "avx512")


@pytest.mark.skipif("amx_int8" not in FLAGS, reason="this processor has no AMX")
def test_amx_is_used_where_compiler_and_system_know_it():
    """What it gives is what other products give, so that nothing else would tell."""
    macros = subprocess.run(
        [build.compiler(), *build.TARGETS["native"], "-dM", "-E", "-xc++", "/dev/null"],
        capture_output=True,
        text=True,
    ).stdout
    library, why = native.load("native")
    assert library is not None, why
    known = ("__AMX_INT8__" in macros or "__AMXINT8__" in macros) and torch.cpu._init_amx()
    assert library.path.endswith("AMX") == known


def test_without_a_compiler_the_reason_is_given(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library, why = build.library.__wrapped__("portable")
    assert library is None and "compiler" in why


@pytest.mark.parametrize("name", ["clang++", "one without OpenMP"])
def test_other_compilers_do_as_well(name, monkeypatch, tmp_path):
    """Apple's is clang, and has no OpenMP."""
    program = shutil.which(name) or str(tmp_path / "without")
    if name == "clang++" and shutil.which(name) is None:
        pytest.skip(f"there is no {name}")
    if name != "clang++":
        refuse = f'#!/bin/sh\ncase "$*" in *"-fopenmp "*) exit 1;; esac\nexec {build.compiler()} "$@"\n'
        Path(program).write_text(refuse)
        Path(program).chmod(0o700)
    monkeypatch.setenv("CXX", program)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library, why = build.library.__wrapped__("native")
    assert library is not None, why
    kernels = native.Kernels(library)
    for shape in SHAPES[-2:]:
        test_a_product_equals_the_plain_one(kernels, shape, 32)
    test_a_token_gets_the_same_bits_alone_and_among_others(kernels)
    test_a_whole_model_is_as_near_to_fp32_as_the_plain_path(kernels, GOLDEN[-1], "int4-all")
