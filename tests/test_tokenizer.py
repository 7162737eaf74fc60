"""Text survives the round trip, half characters are never shown, and BOS comes exactly once."""

from __future__ import annotations

import json
import random

import pytest
from conftest import DATA
from jinja2 import Environment

from dsv2cli.checkpoint.tokenizer import IncrementalDecoder, Tokenizer
from dsv2cli.errors import Dsv2Error
from dsv2cli.hubs.find import EMBEDDED

TEXTS = [
    "hello world\n  你好 é 🙂",
    "The quick brown fox jumps over the lazy dog.  Two spaces, a tab\tand 3.14159!",
    "深度求索的模型在这里运行。今天天气很好,我们去公园吧。",
    "👩‍👩‍👧‍👦 family, 🇫🇷 flag, 👍🏽 skin tone, ﷽",
    "def f(x):\n    return {\n        'a': x[0],  # comment\n    }\n\n\tif x != 1: pass\r\n",
    " leading and trailing ",
    "",
]


@pytest.fixture(params=["real", "embedded"])
def tokenizer(request, real_tokenizer, embedded_tokenizer) -> Tokenizer:
    return real_tokenizer if request.param == "real" else embedded_tokenizer


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_text_survives_the_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_streaming_gives_the_same_text_and_no_half_characters(tokenizer, text):
    decoder = IncrementalDecoder(tokenizer)
    pieces = [decoder.add(token) for token in tokenizer.encode(text)] + [decoder.finish()]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_streaming_any_ids_gives_what_decoding_them_at_once_gives(tokenizer):
    """Also where lone bytes follow one another, which are no characters however long one waits."""
    numbers, vocab = random.Random(0), tokenizer.fast.get_vocab_size()
    halves = [token for token in range(vocab) if "\ufffd" in tokenizer.decode([token])]
    for pool in (range(vocab), halves, [*halves, *tokenizer.encode("a b", add_bos=False)]):
        for _ in range(100):
            ids = [numbers.choice(pool) for _ in range(numbers.randint(1, 60))]
            decoder = IncrementalDecoder(tokenizer)
            assert "".join(map(decoder.add, ids)) + decoder.finish() == tokenizer.decode(ids)


def test_an_unfinished_character_comes_out_at_the_end_as_a_mark(embedded_tokenizer):
    ids = embedded_tokenizer.encode("a🙂", add_bos=False)
    decoder = IncrementalDecoder(embedded_tokenizer)
    assert "".join(decoder.add(token) for token in ids[:-1]) == "a"
    assert "\ufffd" in decoder.finish()


def test_bos_comes_exactly_once(tokenizer):
    bos = tokenizer.fast.token_to_id(tokenizer.special("bos_token"))
    assert tokenizer.encode("hello").count(bos) == 1
    assert tokenizer.encode(tokenizer.special("bos_token") + "hello") == tokenizer.encode("hello")
    chat = tokenizer.encode_chat(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    )
    assert chat[0] == bos and chat.count(bos) == 1


def test_the_chat_template_is_the_checkpoints_own(tokenizer):
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "U"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "V"},
    ]
    rendered = tokenizer.fast.decode(tokenizer.encode_chat(messages), skip_special_tokens=False)
    bos, eos = tokenizer.special("bos_token"), tokenizer.special("eos_token")
    assert rendered == f"{bos}S\n\nUser: U\n\nAssistant: A{eos}User: V\n\nAssistant:"


def test_known_ids_of_the_released_tokenizer(real_tokenizer):
    assert real_tokenizer.encode("Hello")[0] == 100000
    assert len(real_tokenizer.encode("12345", add_bos=False)) == 5  # every digit is single


def test_a_template_that_rejects_the_messages_is_reported(embedded_tokenizer):
    tokenizer = Tokenizer(EMBEDDED)
    tokenizer.chat_template = "{{ raise_exception('no system prompts here') }}"
    with pytest.raises(Dsv2Error) as caught:
        tokenizer.encode_chat([{"role": "user", "content": "hi"}])
    assert "no system prompts here" in caught.value.why
    tokenizer.chat_template = None
    with pytest.raises(Dsv2Error, match="no chat template"):
        tokenizer.encode_chat([{"role": "user", "content": "hi"}])


def test_the_embedded_model_carries_deepseeks_chat_template():
    theirs = json.loads((DATA / "tokenizer" / "tokenizer_config.json").read_text())["chat_template"]
    ours = json.loads((EMBEDDED / "tokenizer_config.json").read_text())["chat_template"]
    assert ours == theirs
    assert Environment().from_string(ours)  # parses
