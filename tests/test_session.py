"""What the model remembers of a conversation: the cache, and that it is never seen in an answer."""

from __future__ import annotations

import pytest

from dsv2cli.engine.request import Request, Result, SamplingParams
from dsv2cli.engine.session import Session, common_prefix

GREEDY = Request(SamplingParams(temperature=0), max_new_tokens=40, eos_ids=frozenset([4095]))
HELLO = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]


@pytest.fixture
def session(embedded, embedded_tokenizer) -> Session:
    return Session(embedded, embedded_tokenizer)


def reply(session, messages, request=GREEDY, **more):
    result = Result()
    return "".join(session.reply(messages, request, result, **more)), result


def behind(messages, answer, text):
    return [*messages, {"role": "assistant", "content": answer}, {"role": "user", "content": text}]


def fresh(session, messages):
    return reply(Session(session.runner, session.tokenizer), messages)[0]


def test_a_follow_up_reuses_the_cache_and_answers_as_if_it_had_not(session):
    messages = behind(HELLO, reply(session, HELLO)[0], "What is your name?")
    answer, result = reply(session, messages)
    assert answer == fresh(session, messages) and result.reused_tokens > 10


def test_an_answer_that_is_cut_off_leaves_a_cache_that_fits(session):
    story = [{"role": "user", "content": "Tell me a story about a fox."}]
    result = Result()
    pieces = session.reply(story, GREEDY, result)
    shown = "".join(next(pieces) for _ in range(6))
    pieces.close()  # what Ctrl-C does
    assert result.finish_reason == "interrupted" and shown == result.text.removeprefix(" ")
    messages = behind(story, shown, "Who was it?")
    assert reply(session, messages)[0] == fresh(session, messages)


def test_a_prompt_that_is_stopped_between_two_parts_keeps_what_was_read(session):
    long = [{"role": "user", "content": "word " * 1500}]
    told = []

    def stop_at_the_second(done, total):
        told.append((done, total))
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reply(session, long, reading=stop_at_the_second)
    assert told[0][0] == 0 and told[1][0] == len(session.cached_ids) == session.sequence.length > 0
    answer, result = reply(session, long)
    assert result.reused_tokens == told[1][0] and answer == fresh(session, long)


def test_an_answer_goes_on_where_it_was_cut_off(session):
    whole = reply(session, HELLO)[0]
    start, cut = reply(session, HELLO, Request(SamplingParams(temperature=0), max_new_tokens=4))
    rest, result = reply(session, HELLO, start=start)
    assert cut.finish_reason == "length" and start + rest == whole and result.reused_tokens > 10


def test_the_answer_starts_without_the_templates_space(session):
    answer, result = reply(session, HELLO)
    assert answer and not answer.startswith(" ")
    assert result.text == " " + answer


def test_common_prefix():
    assert common_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert common_prefix([1, 2], [1, 2, 3]) == 2
    assert common_prefix([], [1]) == 0
