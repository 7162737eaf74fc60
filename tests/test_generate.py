"""Sampling, stopping and text."""

from __future__ import annotations

import pytest
import torch
from rows import answered

from dsv2cli.engine.request import Request, SamplingParams, check_prompt
from dsv2cli.engine.sampling import sample
from dsv2cli.engine.text import StopStrings
from dsv2cli.errors import UsageError

NOTHING_SEEN = torch.tensor([], dtype=torch.long)
LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0])


def draws(params, count=300, seen=NOTHING_SEEN, logits=LOGITS):
    generator = torch.Generator().manual_seed(0)
    return [sample(logits, params, seen, generator) for _ in range(count)]


def run(model, tokenizer, prompt, **request):
    return answered(model, tokenizer.encode(prompt), Request(**request), tokenizer)


def test_temperature_zero_takes_the_likeliest():
    assert set(draws(SamplingParams(temperature=0))) == {0}
    assert set(draws(SamplingParams(temperature=1e-30))) == {0}


def test_sampling_follows_the_probabilities():
    counts = torch.tensor(draws(SamplingParams(), 4000)).bincount(minlength=4) / 4000
    torch.testing.assert_close(counts, LOGITS.softmax(-1), atol=0.03, rtol=0)


def test_top_k_top_p_and_min_p_leave_the_right_tokens():
    assert set(draws(SamplingParams(top_k=2))) == {0, 1}
    assert set(draws(SamplingParams(top_p=0.6))) == {0}  # the first holds 0.64
    assert set(draws(SamplingParams(top_p=0.7))) == {0, 1}
    assert set(draws(SamplingParams(min_p=0.3))) == {0, 1}  # the second is 0.37 of the first
    assert set(draws(SamplingParams(top_k=99))) == {0, 1, 2, 3}


def test_the_repetition_penalty_pushes_down_what_has_been_said():
    params = SamplingParams(temperature=0, repetition_penalty=3.0)
    assert draws(params, 1, torch.tensor([0, 0])) == [1]
    assert draws(params, 1, torch.tensor([0, 3]), torch.tensor([-1.0, -2.0, -9.0, -1.5])) == [1]


def test_defaults_come_from_generation_config():
    settings = {"do_sample": True, "temperature": 0.3, "top_p": 0.95, "eos_token_id": 1}
    assert SamplingParams.from_generation_config(settings) == SamplingParams(temperature=0.3, top_p=0.95)
    assert SamplingParams.from_generation_config(settings, top_p=None, temperature=0.9).temperature == 0.9
    assert SamplingParams.from_generation_config({"do_sample": False, "temperature": 0.3}).temperature == 0


@pytest.mark.parametrize("name", ["temperature", "top_p", "top_k", "min_p", "repetition_penalty"])
def test_senseless_values_are_refused_by_name(name):
    with pytest.raises(UsageError, match=name.replace("_", "-")):
        SamplingParams(**{name: -1})


def test_same_seed_same_text_and_another_seed_another(embedded, embedded_tokenizer):
    texts = [
        run(embedded, embedded_tokenizer, "Once", max_new_tokens=40, seed=seed).text for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_logprobs_are_those_of_a_fresh_pass_over_the_text(embedded, embedded_tokenizer):
    result = run(embedded, embedded_tokenizer, "Once upon a time", max_new_tokens=20, logprobs=3, seed=5)
    ids = result.prompt_ids + result.token_ids
    with torch.inference_mode():
        rescored = embedded.logits(embedded.model(torch.tensor(ids))).log_softmax(-1)
    for i, token in enumerate(result.tokens):
        row = rescored[len(result.prompt_ids) + i - 1]
        assert token.logprob == pytest.approx(row[token.id].item(), abs=1e-3)
        assert [pair[0] for pair in token.top] == row.topk(3).indices.tolist()


@pytest.mark.parametrize(
    ("pieces", "stop", "shown"),
    [
        (["Hello wor", "ld!"], ["world"], "Hello "),
        (["a", "b", "c", "d"], ["cd"], "ab"),
        (["a#", "#b"], ["###"], "a##b"),
        (["one two three"], ["three", "two"], "one "),
        (["aab"], ["ab"], "a"),
        (["x"], [], "x"),
    ],
)
def test_stop_strings_are_found_across_pieces_and_never_shown(pieces, stop, shown):
    stops = StopStrings(stop)
    text = "".join(stops.add(piece) for piece in pieces if not stops.found)
    assert text + ("" if stops.found else stops.finish()) == shown


def test_a_stop_string_ends_the_text_before_it(embedded, embedded_tokenizer):
    free = run(embedded, embedded_tokenizer, "Once upon a time", max_new_tokens=40, seed=1)
    stop = free.text[20:26]
    cut = run(embedded, embedded_tokenizer, "Once upon a time", max_new_tokens=40, seed=1, stop=(stop,))
    assert cut.text == free.text[: free.text.index(stop)]
    assert cut.finish_reason == "stop" and len(cut.tokens) <= len(free.tokens)


def test_the_context_limit_ends_the_text(v2):
    room = v2.config.max_position_embeddings
    object.__setattr__(v2.config, "max_position_embeddings", 16)
    try:
        assert len(answered(v2, [5, 6, 7], Request()).tokens) == 13
        with pytest.raises(UsageError, match="16 tokens"):
            check_prompt(v2.config, [5] * 16)
    finally:
        object.__setattr__(v2.config, "max_position_embeddings", room)
    with pytest.raises(UsageError, match="empty"):
        check_prompt(v2.config, [])
    with pytest.raises(UsageError, match="no token 257"):
        check_prompt(v2.config, [257])


def test_without_a_tokenizer_tokens_still_come(v2):
    result = answered(v2, [1, 2, 3], Request(SamplingParams(temperature=0), max_new_tokens=4))
    assert result.text == "" and len(result.tokens) == 4 and result.finish_reason == "length"
