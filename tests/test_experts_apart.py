"""Routed experts in RAM and everything else elsewhere: the same numbers as in one place."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import CPU, DATA, golden_folders, load
from rows import scores_of
from running import run_dsv2
from safetensors.torch import load_file

from dsv2cli.checkpoint.blueprint import blueprint, weights_bytes
from dsv2cli.checkpoint.load import give_memory, load_model
from dsv2cli.formats import own_coding
from dsv2cli.kernels import native
from dsv2cli.kernels.experts import run_experts
from dsv2cli.kernels.linear import gated_mlp
from dsv2cli.kernels.quantized import Quantized, pack_reference
from dsv2cli.model.config import DeepseekV2Config
from dsv2cli.model.layers import Experts
from dsv2cli.model.transformer import MoE
from dsv2cli.run.cpu import CppRunner, bare_part
from dsv2cli.run.plan import cpp_refusal

GREEDY = ("--temperature", "0", "-n", "12")
WITH_EXPERTS = [
    folder
    for folder in golden_folders()
    if json.loads((folder / "config.json").read_text()).get("n_routed_experts")
]


@pytest.fixture(scope="module")
def kernels():
    library, why = native.load()
    if library is None:
        pytest.skip(why)
    return library


def test_experts_lie_in_ram_from_the_layer_on_that_is_named():
    """All else, and the experts before it, elsewhere: here where tensors have no memory."""
    model = blueprint(DeepseekV2Config.load(DATA / "golden" / "v2"))
    give_memory(model, torch.device("meta"), experts_on_gpu=1)
    moes = [layer.mlp for layer in model.layers if isinstance(layer.mlp, MoE)]
    homes = [moe.experts.down_proj.device.type for moe in moes]
    assert len(homes) > 1 and homes == ["meta", *["cpu"] * (len(moes) - 1)]
    in_ram = [name for name, tensor in model.named_parameters() if tensor.device.type == "cpu"]
    assert all(".experts." in name for name in in_ram)


@pytest.mark.parametrize("folder", WITH_EXPERTS, ids=lambda folder: folder.name)
def test_golden_logits_hold_with_experts_apart(folder):
    golden = load_file(folder / "golden.safetensors")
    model = load(folder, experts_on_gpu=1)
    logits = scores_of(model, golden["A.input_ids"].flatten().tolist())
    assert (logits - golden["A.logits"]).abs().max() < 1e-3


@pytest.mark.parametrize("folder", WITH_EXPERTS, ids=lambda folder: folder.name)
@pytest.mark.parametrize("format", [None, "int8", "int4"])
def test_the_kernels_compute_experts_where_they_lie(kernels, folder, format):
    """Prefill and decode in bf16 against the plain path over the same weights, as far as two roundings may
    differ.
    """
    plain, fast = (
        load_model(folder, CPU, torch.bfloat16, format=format, kernels=kernels, experts_on_gpu=0)
        for _ in range(2)
    )
    if why := cpp_refusal(fast.config, "cpu", "bfloat16"):
        pytest.skip(why)
    CppRunner(fast, kernels, apart=True)
    assert all(module.product is not None for module in fast.modules() if isinstance(module, Experts))
    torch.manual_seed(0)
    for n in (1, 2, 40):
        x = torch.randn(n, fast.config.hidden_size).bfloat16()
        for a, b in zip(plain.layers, fast.layers, strict=True):
            if isinstance(a.mlp, MoE):
                index, weight = a.mlp.gate(x)
                expected, found = (
                    a.mlp.experts(x, index, weight).float(),
                    b.mlp.experts(x, index, weight).float(),
                )
                assert (found - expected).norm() < (0.02 if format is None else 0.04) * expected.norm()


def stack(count, rows, cols, bits):
    weight = torch.randn(count, rows, cols) * 0.1
    if bits is None:
        return weight.bfloat16()
    parts = 2 if rows > cols else 1
    packed = Quantized((count, rows, cols), own_coding(bits, 64), parts, CPU)
    for e in range(count):
        for part, piece in enumerate(weight[e].chunk(parts)):
            for place, values in zip(packed.part(e, part), pack_reference(piece, bits, 64), strict=True):
                place.copy_(values)
    return packed


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("n", [1, 3, 20, 150])
def test_experts_of_another_rank_are_left_out(kernels, bits, n, v2):
    """With some, and with all, of a token's experts elsewhere; and each token has the bits it has alone."""
    from dataclasses import replace

    torch.manual_seed(n)
    config = replace(v2.config, hidden_size=160, num_experts_per_tok=3)
    gate_up, down = stack(4, 2 * 96, 160, bits), stack(4, 160, 96, bits)
    part = bare_part(config, gate_up, down)
    x, weight = torch.randn(n, 160).bfloat16(), torch.rand(n, 3)
    for first in (0, 3, 50):
        index = torch.stack([torch.randperm(8)[:3] for _ in range(n)])
        here = torch.where((index >= first) & (index < first + 4), index - first, -1)
        expected = run_experts(x, index, weight, gate_up, down, first).float()
        found = kernels.feed(part, x, here, weight).float()
        assert (found - expected).norm() <= 0.04 * expected.norm()
        assert first < 50 or not found.any()
        alone = [
            kernels.feed(part, *one).float()
            for one in zip(*(t.split(1) for t in (x, here, weight)), strict=True)
        ]
        assert torch.equal(found, torch.cat(alone))


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("hidden", [64, 1000])
def test_one_mlp_without_its_norm(kernels, bits, n, hidden, v2):
    """Also where the last of several jobs of rows is not whole."""
    from dataclasses import replace

    torch.manual_seed(0)
    gate_up, down = (
        stack(1, 3 * hidden, hidden, bits).unbind()[0],
        stack(1, hidden, 3 * hidden // 2, bits).unbind()[0],
    )
    x = torch.randn(n, hidden).bfloat16()
    found = kernels.feed(bare_part(replace(v2.config, hidden_size=hidden), gate_up, down), x).float()
    expected = gated_mlp(x, gate_up, down).float()
    assert (found - expected).norm() < (0.02 if bits is None else 0.04) * expected.norm()


def test_only_the_experts_are_packed():
    folder = WITH_EXPERTS[0]
    whole, packed = (
        load_model(folder, CPU, experts_on_gpu=0),
        load_model(folder, CPU, format="int4", experts_on_gpu=0),
    )
    names = [name for name, module in packed.named_modules() if isinstance(module, Quantized)]
    assert (
        names
        and all(".mlp.experts." in name for name in names)
        and weights_bytes(packed) < weights_bytes(whole)
    )


def test_commands_run_with_experts_apart():
    plain, apart = run_dsv2("complete", "Once upon a time", *GREEDY).stdout, ("--experts", "cpu")
    done = run_dsv2("complete", "Once upon a time", *GREEDY, *apart)
    assert done.returncode == 0 and done.stdout == plain and done.stderr == ""
    assert (
        run_dsv2("chat", *GREEDY, *apart, stdin="Hello\n").stdout
        == run_dsv2("chat", *GREEDY, stdin="Hello\n").stdout
    )
    assert run_dsv2("bench", "--prompt", "8", "--generate", "2", "-r", "1", *apart).returncode == 0
    assert run_dsv2("niah", "--lengths", "128", "--depths", "0", *apart).returncode == 0
    assert "routed experts of 5 layers in RAM" in run_dsv2("complete", "Once", "--dry-run", *apart).stdout
    done = run_dsv2("complete", "Once", *apart, "--gpus", "2")
    assert done.returncode == 2 and "one device" in done.stderr
    dense = DATA / "golden" / "dense_only"
    if dense.exists():
        assert run_dsv2("complete", "--prompt-ids", "1", "--model", str(dense), *apart).returncode == 2
