"""How the embedded model is made, and that the one in the package is a real one."""

from __future__ import annotations

import collections
import itertools
import math
import random
import re
import sys

import pytest
import torch
from conftest import CPU
from rows import answered

from dsv2cli.checkpoint.blueprint import empty_model
from dsv2cli.checkpoint.load import load_model
from dsv2cli.checkpoint.tokenizer import Tokenizer
from dsv2cli.engine.request import Request, SamplingParams
from dsv2cli.hubs.find import EMBEDDED
from training import chats, train
from training.chats import make_chat
from training.corpus import render, rule_made
from training.evaluate import IDENTITY, IMPOSSIBLE
from training.intents import CAN_NOT_ROWS, EVERYDAY_ROWS, IDENTITY_ROWS, SLOTS, SMALL_TALK_ROWS
from training.stories import HELD_OUT_PLOTS, MORALS, PLOTS, tell
from training.train import (
    SMALL,
    evaluate,
    held_out_rows,
    initialise,
    learning_rate,
    make_optimizer,
    next_token_loss,
)


def test_the_corpus_follows_from_its_seed():
    first, again, other = ([rule_made(rng) for _ in range(20)] for rng in map(random.Random, (1, 1, 2)))
    assert first == again != other


def test_every_plot_can_be_told_and_leaves_no_gaps():
    rng = random.Random(0)
    for plot in PLOTS:
        story = tell(rng, plot)
        assert not set("{}[]|") & set(story.text), story.text
        assert story.slots["hero"] in story.text


def test_held_out_plots_are_never_trained_on():
    rng = random.Random(0)
    assert not {tell(rng).plot for _ in range(2000)} & HELD_OUT_PLOTS


def pattern(ask):
    """All that a way to ask can become."""
    known = SLOTS | chats.AFTER_A | {"name": chats.NAMES}
    parts = chats.SLOT.split(ask.lower().strip(".?!"))
    slots = ["|".join(map(re.escape, known[name])).lower() if name in known else ".+" for name in parts[1::2]]
    return re.compile(
        re.escape(parts[0]) + "".join(f"({a}){re.escape(b)}" for a, b in zip(slots, parts[2::2], strict=True))
    )


def test_no_evaluated_wording_is_trained_on():
    tables = (SMALL_TALK_ROWS, IDENTITY_ROWS, CAN_NOT_ROWS, EVERYDAY_ROWS)
    trained = [pattern(ask) for rows in tables for asks, _ in rows for ask in asks]
    asked = [text.lower().strip(".?!") for text in re.split(r"\||\n", f"{IMPOSSIBLE}|{IDENTITY}")]
    assert any(ask.fullmatch("did google make you") for ask in trained) and len(asked) == 45
    assert [text for text in asked if any(ask.fullmatch(text) for ask in trained)] == []


def test_the_corpus_is_as_wide_as_it_claims():
    assert len(PLOTS) == 60 and set(MORALS) == set(PLOTS)
    assert sum(map(len, (SMALL_TALK_ROWS, IDENTITY_ROWS, CAN_NOT_ROWS, EVERYDAY_ROWS))) > 300
    rng, words = random.Random(0), collections.Counter()
    for _ in range(20_000):
        words.update(set(re.findall(r"[a-z]+", rule_made(rng).lower())))
    assert sum(count >= 5 for count in words.values()) > 1800


def test_every_slot_is_filled_and_alike_in_question_and_answer():
    rng = random.Random(0)
    for rows in (SMALL_TALK_ROWS, IDENTITY_ROWS, CAN_NOT_ROWS, EVERYDAY_ROWS):
        for asks, replies in rows:
            for text in asks + replies:
                assert not chats.SLOT.search(*chats.fill(rng, text)), text
    for _ in range(20):
        first, second = chats.fill(rng, "{animal} {big}", "{animal} {big}")
        assert first == second


def test_made_up_answers_are_true():
    rng = random.Random(0)
    rank = {animal: i for i, group in enumerate(chats.SIZES) for animal in group}
    for _ in range(200):
        ((ask, answer),) = chats.compare(rng)
        a, word, b = re.search(r"(\w+) is (bigger|smaller) than \w+ (\w+)", answer).groups()
        assert (rank[a.lower()] > rank[b]) == (word == "bigger"), answer
        assert answer.split(",")[0] != "Yes" or f"{a} bigger than" in ask
        ((ask, answer),) = chats.counting(rng)
        numbers = [int(number) for number in re.findall(r"\d+", answer)]
        assert numbers == list(range(numbers[0], numbers[-1] + 1)) if numbers else " comes " in answer


def test_stories_hardly_repeat():
    rng = random.Random(0)
    assert len({tell(rng).text for _ in range(2000)}) == 2000


def test_chats_are_rendered_as_the_chat_template_does(embedded_tokenizer):
    rng = random.Random(0)
    for _ in range(30):
        chat = make_chat(rng)
        asked = embedded_tokenizer.encode_chat(chat)
        prompt = embedded_tokenizer.fast.decode(asked, skip_special_tokens=False)
        assert prompt == render(chat) + "Assistant:"


@pytest.fixture
def run_training(monkeypatch, tmp_path):
    """Runs `python -m training.train`, within this process, and gives the folder that it writes to."""

    def run(*options):
        monkeypatch.setattr(
            sys, "argv", ["train", str(tmp_path), "--batch", "1", "--held-out", "1", *options]
        )
        train.main()
        return tmp_path

    return run


def test_training_goes_on_where_it_stopped_and_writes_a_checkpoint(run_training):
    folder = run_training("--minutes", "0.02")
    first = torch.load(folder / "state.pt", weights_only=True)
    run_training("--minutes", "0.04")
    second = torch.load(folder / "state.pt", weights_only=True)
    assert second["step"] > first["step"] > 0
    model, tokenizer = load_model(folder / "checkpoint", CPU), Tokenizer(folder / "checkpoint")
    assert tokenizer.encode("Once upon a time")[0] == model.config.bos_token_id


def test_training_steps_teach_what_they_show():
    model = empty_model(SMALL, CPU, torch.float32)
    initialise(model, seed=0)
    optimizer, rows = (
        make_optimizer(model),
        torch.randint(4000, (1, 65), generator=torch.Generator().manual_seed(0)),
    )
    losses = []
    for _ in range(12):
        losses.append(next_token_loss(model, rows))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert abs(losses[0].item() - math.log(4096)) < 0.3  # knowing nothing costs ln(vocabulary)
    assert losses[-1].item() < losses[0].item() - 1


def test_training_can_begin_from_a_finished_checkpoint(run_training):
    folder = run_training("--begin", str(EMBEDDED), "--minutes", "0.02", "--lr", "1e-9") / "checkpoint"
    assert evaluate(load_model(folder, CPU), held_out_rows(Tokenizer(folder).fast, False, 2)) < 1.0


def test_the_schedule_warms_up_holds_and_ends_near_zero():
    assert learning_rate(0.0, 0, 1.0) < 0.01
    assert learning_rate(0.5, 1000, 1.0) == 1.0
    assert learning_rate(0.999, 1000, 1.0) < 0.02


def test_the_embedded_model_knows_its_small_world(embedded, embedded_tokenizer):
    assert evaluate(embedded.model, held_out_rows(embedded_tokenizer.fast, False, 4)) < 1.0
    assert sum(parameter.numel() for parameter in embedded.model.parameters()) > 3_000_000


def test_the_embedded_model_writes_english_and_ends_by_itself(embedded, embedded_tokenizer):
    request = Request(SamplingParams(temperature=0.5, top_p=0.9), 400, frozenset([4095]), seed=1)
    result = answered(embedded, embedded_tokenizer.encode("Once upon a time"), request, embedded_tokenizer)
    text = result.text
    assert result.finish_reason == "stop"
    rng = random.Random(0)
    english = {word for _ in range(500) for word in re.findall(r"[a-z]+", tell(rng).text.lower())}
    words = re.findall(r"[a-z]+", text.lower())
    assert len(words) > 40 and sum(word in english for word in words) >= 0.95 * len(words), text


def test_the_package_holds_no_more_than_it_should():
    assert sum(path.stat().st_size for path in EMBEDDED.iterdir()) < 80 * 2**20


def test_rows_are_full_and_start_documents_with_bos(embedded_tokenizer):
    rows = held_out_rows(embedded_tokenizer.fast, True, 3)
    assert {len(row) for row in rows} == {1025}
    assert 4094 in itertools.chain(*rows)
