"""The training text as token ids: rule-made stories and chats, plus found text with its sources in NOTICE.md."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from training.chats import Message, make_chat
from training.stories import tell

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
# The chat template of DeepSeek-V2-Chat, word for word.
CHAT_TEMPLATE = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{{ bos_token }}"
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token }}"
    "{% elif message['role'] == 'system' %}{{ message['content'] + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
FAIRY = ("fairytaleqa_stories.jsonl", "onestop_elementary.jsonl")
SIMPLE = ("tinystories_found.jsonl", "tf1_fables_sample.jsonl", "aesop_for_children_pd.jsonl")


def render(messages: list[Message]) -> str:
    """What CHAT_TEMPLATE makes of finished messages; a test holds the two together."""
    tags = {"system": "{}\n\n", "user": "User: {}\n\n", "assistant": "Assistant: {}" + EOS}
    return BOS + "".join(tags[message["role"]].format(message["content"]) for message in messages)


def rule_made(rng: random.Random, held_out: bool = False) -> str:
    """One document: a bare story, or a chat."""
    if rng.random() < 0.3:
        return BOS + tell(rng, held_out=held_out).text + EOS
    return render(make_chat(rng, held_out))


def pieces(text: str, most: int = 2500) -> Iterator[str]:
    """Long texts are cut at paragraphs or sentences, so that each piece fits the context."""
    piece = ""
    for part in re.split(r"(?<=\n)|(?<=[.!?]) ", text):
        if piece and len(piece) + len(part) > most:
            yield piece.strip()
            piece = ""
        piece += part if part.endswith("\n") else part + " "
    if piece.strip():
        yield piece.strip()


def found_text(folder: Path, files: tuple[str, ...]) -> list[str]:
    """Found documents with plain quotes and dashes, each at most once."""
    plain = str.maketrans(
        {"\u2019": "'", "\u2018": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "-"}
    )
    seen: dict[str, None] = {}
    for name in files:
        for line in (folder / name).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            text = str(row.get("text") or row.get("fable") or "").translate(plain)
            for piece in pieces(text):
                seen[piece] = None
    return list(seen)


def documents(rng: random.Random, found: Path | None, share: float = 0.16) -> Iterator[str]:
    """Endless training documents; `share` of the characters, about, is found text."""
    simple = found_text(found, SIMPLE) if found else []
    fairy = found_text(found, FAIRY) if found else []
    while True:
        roll = rng.random() if found else 1.0
        if roll < share * 0.6:
            yield BOS + rng.choice(simple) + EOS
        elif roll < share * 0.75:  # fairy tales are long, so they are drawn less often
            yield BOS + rng.choice(fairy) + EOS
        else:
            yield rule_made(rng)


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with single digits and no prefix space; the two special tokens come last, as DeepSeek's do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator((text.replace(BOS, "").replace(EOS, "") for text in texts), trainer)
    tokenizer.add_special_tokens([BOS, EOS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def token_rows(tokenizer: Tokenizer, texts: Iterator[str], length: int) -> Iterator[list[int]]:
    """Documents end to end, cut into rows of `length` ids."""
    buffer: list[int] = []
    while True:
        batch = [next(texts) for _ in range(32)]
        for encoding in tokenizer.encode_batch(batch, add_special_tokens=False):
            buffer += encoding.ids
        while len(buffer) >= length:
            yield buffer[:length]
            buffer = buffer[length:]
