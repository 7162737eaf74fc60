"""A conversation: what is on the screen, in the history and in the cache stays the same thing."""

from __future__ import annotations

import pytest

from dsv2cli.engine.request import Request, Result, SamplingParams
from dsv2cli.engine.session import Session, common_prefix

GREEDY = Request(SamplingParams(temperature=0), max_new_tokens=40, eos_ids=frozenset([4095]))


@pytest.fixture
def session(embedded, embedded_tokenizer) -> Session:
    return Session(embedded, embedded_tokenizer, "Be brief.")


def say(session, text, request=GREEDY):
    result = Result()
    return "".join(session.reply(text, request, result)), result


def fresh_answer(session, text):
    """The same conversation up to now, with nothing cached."""
    other = Session(session.runner, session.tokenizer)
    other.messages = [dict(message) for message in session.messages]
    return say(other, text)[0]


def test_a_follow_up_reuses_the_cache_and_answers_as_if_it_had_not(session):
    say(session, "Hello")
    wanted = fresh_answer(session, "What is your name?")
    answer, result = say(session, "What is your name?")
    assert answer == wanted
    assert result.reused_tokens > 10
    assert [message["role"] for message in session.messages] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
    ]


def test_an_answer_that_is_cut_off_is_kept_and_the_next_one_is_consistent(session):
    result = Result()
    pieces = session.reply("Tell me a story about a fox.", GREEDY, result)
    shown = "".join(next(pieces) for _ in range(6))
    pieces.close()  # what Ctrl-C does
    assert result.finish_reason == "interrupted"
    assert session.messages[-1] == {"role": "assistant", "content": shown}
    wanted = fresh_answer(session, "Who was it?")
    assert say(session, "Who was it?")[0] == wanted


def test_a_question_without_an_answer_leaves_no_trace(session):
    before = list(session.messages)
    pieces = session.reply("Hello", GREEDY, Result())
    pieces.close()
    assert session.messages == before
    say(session, "Hello", Request(SamplingParams(temperature=0), eos_ids=frozenset(range(4096))))
    assert session.messages == before
    assert say(session, "Hello")[0] == fresh_answer(
        Session(session.runner, session.tokenizer, "Be brief."), "Hello"
    )


def test_the_answer_starts_without_the_templates_space(session):
    answer, result = say(session, "Hello")
    assert answer and not answer.startswith(" ")
    assert result.text == " " + answer


def test_common_prefix():
    assert common_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert common_prefix([1, 2], [1, 2, 3]) == 2
    assert common_prefix([], [1]) == 0
