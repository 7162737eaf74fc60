"""Latents in 8, 6 and 4 bits: what the codes stand for, on every path, and what they cost."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from conftest import CPU, DATA
from rows import Rows
from running import run_dsv2

from dsv2cli.checkpoint.load import load_model
from dsv2cli.formats import CACHE_BITS
from dsv2cli.hubs.find import EMBEDDED
from dsv2cli.kernels import native
from dsv2cli.kernels.latents import Packing, apart, hadamard, rotated, together
from dsv2cli.memory import ram_bytes
from dsv2cli.model import size
from dsv2cli.model.config import DeepseekV2Config
from dsv2cli.model.pool import LatentPool, memory
from dsv2cli.run.cpu import CppRunner
from dsv2cli.run.runner import PlainRunner
from training.train import held_out_rows

FORMATS = tuple(CACHE_BITS)


@pytest.fixture
def kernels():
    library, why = native.load()
    return library or pytest.skip(why)


@pytest.mark.parametrize("size", [1, 2, 16, 512])
def test_sums_and_differences_are_the_hadamard_matrix_and_its_own_inverse(size):
    torch.manual_seed(0)
    x = torch.randn(5, 3 * size if size > 1 else 1)
    turned = rotated(x)
    wanted = (x.unflatten(-1, (-1, size)) @ hadamard(size)).flatten(-2)
    torch.testing.assert_close(turned, wanted)
    torch.testing.assert_close(rotated(turned), x)
    torch.testing.assert_close(hadamard(size) @ hadamard(size), torch.eye(size))


@pytest.mark.parametrize("bits", [4, 6, 12])
def test_codes_of_a_few_bits_lie_together_and_come_apart(bits):
    codes = torch.randint(2**bits, (7, 48), dtype=torch.int32)
    data = together(codes, bits)
    assert data.dtype == torch.uint8 and data.shape[-1] == 48 * bits // 8
    assert torch.equal(apart(data, bits, 48), codes)


@pytest.mark.parametrize(("cache", "error"), [("int8", 0.012), ("int6", 0.032), ("int4", 0.13)])
@pytest.mark.parametrize("sizes", [(512, 64), (32, 8), (80, 6)])
def test_what_is_held_is_near_to_what_was_given(sizes, cache, error):
    torch.manual_seed(0)
    rank, rope = sizes
    packing = Packing(CACHE_BITS[cache], rank, rope)
    x = torch.randn(200, rank + rope) * torch.linspace(0.1, 4, rank + rope)
    x[3], x[4, 5] = 0, 100.0
    planes = packing.encode(x)
    assert tuple(plane.shape[-1] * plane.element_size() for plane in planes) == packing.widths
    found = packing.decode(planes, torch.float32)
    latent, key = (
        ((found - x)[5:, part].norm() / x[5:, part].norm()) for part in (slice(rank), slice(rank, None))
    )
    assert 0.2 * error < latent < error and key < 0.0018, (latent, key)
    assert found[3].abs().max() < 1e-6 and abs(found[4, 5] - 100) < 25
    turned = packing.decode(planes, torch.float32, turned=True)[:, :rank]
    torch.testing.assert_close(rotated(turned) if packing.rotates else turned, found[:, :rank])


def test_a_pool_takes_the_bytes_that_info_says():
    """The issue's own bounds for V2-Lite: 17,334 and 13,200 bytes a token."""
    config = DeepseekV2Config.load(DATA / "configs" / "DeepSeek-V2-Lite" / "config.json")
    told = {cache: size.kv_bytes_per_token(config, "bfloat16", cache) for cache in ("auto", "bf16", *FORMATS)}
    assert told == {"auto": 31_104, "bf16": 31_104, "int8": 17_334, "int6": 13_068, "int4": 9_612}
    for cache, each in told.items():
        devices = [CPU] * config.num_hidden_layers
        assert LatentPool(config, 2, devices, torch.bfloat16, cache).bytes_per_token() == each
    assert size.kv_bytes_per_token(config, "float32", "bf16") == 31_104


@pytest.mark.skipif(sys.platform != "linux", reason="how other systems count address space")
def test_a_pool_that_nobody_wrote_to_is_no_promise_of_memory():
    """Else a fork of the process, and any large tensor, may be refused for it."""
    if int(Path("/proc/sys/vm/overcommit_memory").read_text()) == 2:
        pytest.skip("this system promises no more than it has")
    pool = memory((3 * ram_bytes(),), CPU, torch.uint8)
    pool[-1] = 1
    assert pool[-2:].tolist() == [0, 1]
    child = os.fork()
    if child == 0:
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_bf16_beside_other_activations():
    model, ids = load_model(DATA / "golden" / "v2", CPU), [*range(2, 90)]
    wanted = Rows(PlainRunner(model)).scores(ids, whole=True)
    narrow = Rows(PlainRunner(model, cache="bf16"))
    found = narrow.scores(ids, whole=True)
    assert narrow.pool.blocks[0].dtype == torch.bfloat16 and not torch.equal(found, wanted)
    assert ((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).median() < 0.05


def losses(make, rows):
    """Of each row's tokens: half of them read at once, the others one by one or few by few. [rows, tokens]"""
    runner = make()
    held = Rows(runner, len(rows), len(rows[0]))
    half = len(rows[0]) // 2
    parts = [
        [row[:half] for row in rows],
        *([row[at : at + 4] for row in rows] for at in range(half, len(rows[0]), 4)),
    ]
    scores = [held.scores(*part, whole=len(part[0]) > 4).unflatten(0, (len(rows), -1)) for part in parts]
    logits = torch.cat(scores, 1)[:, :-1].float()
    wanted = torch.tensor([row[1:] for row in rows])
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), wanted, reduction="none"), logits


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "cpp"])
def test_what_a_smaller_cache_costs_on_text(embedded_tokenizer, fast):
    """Of the embedded model, whose latent has 64 numbers: int8 at most 0.2% of loss, int6 at most 0.5%."""
    kernels, why = native.load()
    if fast and kernels is None:
        pytest.skip(why)
    model = load_model(EMBEDDED, CPU, torch.bfloat16 if fast else torch.float32)
    rows = [row[:256] for row in held_out_rows(embedded_tokenizer.fast, False, 8)]

    def make(cache):
        return lambda: CppRunner(model, kernels, cache=cache) if fast else PlainRunner(model, cache=cache)

    full, scores = losses(make("auto"), rows)
    for cache, most, least_agreement in (("int8", 0.002, 0.99), ("int6", 0.005, 0.98), ("int4", 0.05, 0.94)):
        loss, found = losses(make(cache), rows)
        agreement = (found.argmax(-1) == scores.argmax(-1)).float().mean()
        assert abs(float(loss.mean() / full.mean()) - 1) < most, (cache, loss.mean(), full.mean())
        assert agreement > least_agreement, (cache, agreement)


@pytest.mark.parametrize("cache", FORMATS)
@pytest.mark.parametrize("folder", [EMBEDDED, DATA / "golden" / "v2"], ids=["embedded", "v2"])
def test_the_kernels_hold_and_read_the_same_codes(kernels, folder, cache):
    """Codes that C++ wrote, read by torch, and the other way round."""
    model = load_model(folder, CPU, torch.bfloat16)
    ids = [*range(2, 102)]
    plain = Rows(PlainRunner(model, cache=cache))
    wanted = torch.cat([plain.scores(ids[:64]), *(plain.scores([token]) for token in ids[64:])])
    fast = Rows(CppRunner(model, kernels, cache=cache))
    found = torch.cat([fast.scores(ids[:64]), *(fast.scores([token]) for token in ids[64:])])
    layers = zip(
        plain.runner.read(plain.pool, plain.sequences[0].pages, 100),
        fast.runner.read(fast.pool, fast.sequences[0].pages, 100),
        strict=True,
    )
    first = next((a.float(), b.float()) for a, b in layers)  # later ones follow from what is read
    assert float((first[0] - first[1]).norm() / first[0].norm()) < 0.02
    if folder is EMBEDDED:  # the other one's random router tips over for less
        errors = (found.float() - wanted.float()).norm(dim=-1) / wanted.float().norm(dim=-1)
        assert errors.median() < 0.05, errors.median()


def test_from_outside(tmp_path):
    shown = json.loads(
        run_dsv2("info", str(DATA / "configs" / "DeepSeek-V2-Lite"), "--cache", "int6", "--json").stdout
    )
    assert shown["cache"] == "int6" and shown["kv_bytes_per_token"] == 13_068
    options = ("Once upon a time", "--temperature", "0", "-n", "12")
    plain = run_dsv2("complete", *options).stdout
    for cache in ("bf16", *FORMATS):
        done = run_dsv2("complete", *options, "--cache", cache)
        assert done.returncode == 0 and done.stderr == "" and len(done.stdout) > 10
        assert cache == "int4" or done.stdout[:8] == plain[:8]
    dry = json.loads(run_dsv2("complete", *options, "--cache", "int8", "--dry-run", "--json").stdout)
    assert dry["cache"] == "int8" and dry["cache_bytes"] == (dry["prompt_tokens"] + 12) * 588
    odd = json.loads((DATA / "golden" / "v2" / "config.json").read_text()) | {"kv_lora_rank": 34}
    (tmp_path / "config.json").write_text(json.dumps(odd))
    for command in (("bench", "--random-weights", str(tmp_path)), ("info", str(tmp_path))):
        refused = run_dsv2(*command, "--cache", "int6")
        assert refused.returncode == 2 and "kv_lora_rank is 34" in refused.stderr
