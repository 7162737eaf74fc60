"""The model against itself and against transformers: every road leads to the same numbers."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from conftest import CPU, DATA, SHARED
from rows import Rows, answered, together

from dsv2cli.checkpoint.blueprint import empty_model
from dsv2cli.checkpoint.load import load_model
from dsv2cli.engine.benchmark import transformers_twin
from dsv2cli.engine.request import Request, SamplingParams
from dsv2cli.errors import Dsv2Error
from dsv2cli.kernels import attention, experts
from dsv2cli.kernels.experts import Routing
from dsv2cli.model.config import DeepseekV2Config, RopeScaling
from dsv2cli.model.rope import frequencies
from dsv2cli.run.runner import PlainRunner
from training.train import initialise

GREEDY = Request(SamplingParams(temperature=0), max_new_tokens=12)


def random_ids(count, seed=0, vocab=257):
    return torch.randint(2, vocab, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def close(a, b, atol=1e-4):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize("length", [1, 5, 511, 512, 513, 700])
def test_prefill_in_chunks_equals_one_pass(v2, length):
    ids = random_ids(length)
    with torch.inference_mode():
        whole = v2.logits(v2.model(torch.tensor(ids))[-1:])
    row = Rows(v2)
    for start in range(0, length, 512):
        scores = row.last(ids[start : start + 512], whole=True)
    close(scores, whole, atol=5e-4)


def test_a_batch_of_different_lengths_equals_each_prompt_alone(v2):
    prompts = [random_ids(length, seed=length) for length in (3, 700, 1, 40)]
    assert together(v2, prompts, GREEDY) == [answered(v2, ids, GREEDY).token_ids for ids in prompts]


def test_a_row_that_ends_leaves_the_others_as_they_were(v2):
    prompts = [random_ids(9, seed=seed) for seed in (1, 2)]
    alone = [answered(v2, ids, GREEDY).token_ids for ids in prompts]
    eos = alone[0][3]
    assert eos not in alone[1]
    request = replace(GREEDY, eos_ids=frozenset([eos]))
    assert together(v2, prompts, request) == [alone[0][:4], alone[1]]


def test_a_truncated_sequence_continues_as_if_the_rest_had_never_been(v2):
    ids, others = random_ids(60), random_ids(60, seed=9)
    row = Rows(v2)
    row.scores(ids[:40] + others, whole=True)
    row.sequences[0].truncate(40)
    close(row.last(ids[40:], whole=True), Rows(v2).last(ids, whole=True))
    assert row.lengths == [60]


@pytest.mark.parametrize(("batch", "seq", "past"), [(1, 1, 0), (1, 1, 37), (2, 3, 5), (1, 9, 0), (3, 1, 8)])
def test_absorbed_and_expanded_attention_equal_the_reference(batch, seq, past):
    torch.manual_seed(0)
    heads, nope, rope, value, rank = 3, 24, 16, 20, 32
    q_nope, q_rope = torch.randn(batch, seq, heads, nope), torch.randn(batch, seq, heads, rope)
    cached, kv_b_proj = torch.randn(batch, past + seq, rank + rope), torch.randn(heads, nope + value, rank)
    wanted, *others = [
        attention.attend(q_nope, q_rope, cached, kv_b_proj, 0.2, path)
        for path in ("reference", "absorbed", "expanded", "auto")
    ]
    assert wanted.shape == (batch, seq, heads, value)
    for other in others:
        close(other, wanted)


@pytest.mark.parametrize(("start", "piece"), [(1, 4), (12, 4), (13, 5), (7, 100)])
def test_attention_in_pieces_merged_by_their_sums_equals_attention_in_one(start, piece):
    torch.manual_seed(0)
    batch, seq, heads, nope, rope, value, rank = 2, 6, 3, 24, 16, 20, 32
    q_nope, q_rope = torch.randn(batch, seq, heads, nope), torch.randn(batch, seq, heads, rope)
    cached, kv_b_proj = torch.randn(batch, start + seq, rank + rope), torch.randn(heads, nope + value, rank)
    mask = attention.visible((start + torch.arange(seq)).expand(batch, seq), start + seq)
    wanted = attention.attend_expanded(q_nope, q_rope, cached, kv_b_proj, mask, 0.2)
    close(attention.attend_in_pieces(q_nope, q_rope, cached, kv_b_proj, start, 0.2, piece), wanted)


@pytest.mark.parametrize(("tokens", "top_k", "count"), [(1, 3, 8), (2, 1, 4), (17, 6, 8), (5, 2, 64)])
def test_sorted_experts_equal_one_by_one(tokens, top_k, count):
    torch.manual_seed(0)
    x, gate_up, down = torch.randn(tokens, 16), torch.randn(count, 24, 16), torch.randn(count, 16, 12)
    index, weight = experts.route(torch.randn(tokens, count), Routing(top_k, 1, 1, False, 2.0))
    with torch.inference_mode():
        close(
            experts.run_experts(x, index, weight, gate_up, down),
            experts.experts_reference(x, index, weight, gate_up, down),
        )


def test_grouped_routing_stays_within_the_best_groups():
    logits = torch.tensor([[5.0, 0.0, 4.0, 3.9, 0.0, 4.5]])  # groups of two: best experts 5.0, 4.0, 4.5
    routing = Routing(3, n_group=3, topk_group=2, norm_topk_prob=False, scaling_factor=16.0)
    index, weight = experts.route(logits, routing)
    assert set(index[0].tolist()[:2]) == {0, 5} and index[0, 2].item() in (1, 4)
    close(weight[0, 0], logits.softmax(-1)[0, 0] * 16)


def test_normalised_weights_are_not_scaled():
    routing = Routing(2, 1, 1, norm_topk_prob=True, scaling_factor=16.0)
    _, weight = experts.route(torch.randn(4, 8), routing)
    close(weight.sum(-1), torch.ones(4))


def test_frequencies_none_linear_and_yarn():
    plain = frequencies(16, 10000.0, RopeScaling())
    close(plain[1], torch.tensor(10000.0 ** (-2 / 16)))
    close(frequencies(16, 10000.0, RopeScaling("linear", 4.0)), plain / 4)
    yarn = frequencies(64, 10000.0, RopeScaling("yarn", 40.0))
    unscaled = frequencies(64, 10000.0, RopeScaling())
    close(yarn[0], unscaled[0])  # the fastest pair keeps its speed
    close(yarn[-1], unscaled[-1] / 40)  # the slowest is stretched in full


def released_shape(**changes):
    """V2-Lite's own config.json with smaller sizes."""
    raw = json.loads((DATA / "golden" / "v2" / "config.json").read_text())
    raw |= {
        "q_lora_rank": None,
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
    }
    return raw | changes


@pytest.mark.parametrize(
    "raw",
    [
        released_shape(),
        json.loads((DATA / "golden" / "v2" / "config.json").read_text()),
        released_shape(rope_scaling=None),
        released_shape(tie_word_embeddings=True),
        released_shape(attention_bias=True, q_lora_rank=24),
    ],
    ids=["lite", "v2", "plain_rope", "tied", "bias"],
)
@torch.inference_mode()
def test_transformers_own_model_gives_the_same_logits(raw, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(raw))
    model = empty_model(DeepseekV2Config.load(tmp_path), CPU, torch.float32)
    initialise(model, seed=3)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, 0.0, 0.3)
    twin = transformers_twin(PlainRunner(model), tmp_path)
    ids = torch.tensor(random_ids(50))
    ours = model.logits(model(ids))
    assert ours.std() > 0.1, "a model that says nothing proves nothing"
    close(ours, twin(input_ids=ids[None]).logits[0], atol=2e-4)


def test_a_checkpoint_saved_by_transformers_5_loads(tmp_path):
    """transformers 5 writes rope_parameters, and leaves out what it thinks is a default."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(DATA / "golden" / "v2", dtype=torch.float32)
    theirs.save_pretrained(tmp_path)
    assert "rope_parameters" in json.loads((tmp_path / "config.json").read_text())
    ids = torch.tensor(random_ids(30))
    with torch.inference_mode():
        ours = load_model(tmp_path, CPU, torch.float32)
        close(ours.logits(ours(ids)), load_v2_logits(ids), atol=1e-5)


def load_v2_logits(ids):
    model = load_model(DATA / "golden" / "v2", CPU)
    return model.logits(model(ids))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"scoring_func": "sigmoid"}, "scoring_func"),
        ({"topk_method": "noaux_tc"}, "topk_method"),
        ({"model_type": "deepseek_v3"}, "model_type"),
        ({"quantization_config": {"quant_method": "hqq"}}, "quantization_config"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "rope_scaling.type"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "surprise": 1}}, "rope_scaling.surprise"),
        ({"rope_scaling": {"type": "yarn", "factor": "2"}}, "rope_scaling.factor"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"num_experts_per_tok": 99}, "num_experts_per_tok"),
        ({"n_group": 5}, "n_group"),
        ({"qk_rope_head_dim": 15}, "qk_rope_head_dim"),
        ({"torch_dtype": "int8"}, "torch_dtype"),
        ({"norm_topk_prob": "yes"}, "norm_topk_prob"),
    ],
)
def test_a_config_value_that_is_not_implemented_is_named(change, named):
    raw = json.loads((DATA / "golden" / "v2" / "config.json").read_text())
    with pytest.raises(Dsv2Error, match=named.replace(".", r"\.")):
        DeepseekV2Config.from_dict(raw | change)


@pytest.mark.skipif(not (SHARED / "configs").is_dir(), reason="the released configs are in the shared folder")
@pytest.mark.parametrize(
    ("name", "total"), [("DeepSeek-V2-Lite", 15_706_484_224), ("DeepSeek-V2-Chat", 235_741_434_880)]
)
def test_released_configs_have_the_published_number_of_parameters(name, total):
    with torch.device("meta"):
        model = empty_model(
            DeepseekV2Config.load(SHARED / "configs" / name), torch.device("meta"), torch.bfloat16
        )
    assert sum(parameter.numel() for parameter in model.parameters()) == total
