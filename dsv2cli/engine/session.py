"""Messages to text: a conversation, rendered whole each turn, with the cache of the last one reused."""

from __future__ import annotations

from collections.abc import Iterator

from dsv2cli.checkpoint.tokenizer import Message, Tokenizer
from dsv2cli.engine.generate import Request, Result, check_prompt, stream_text
from dsv2cli.model.transformer import DeepseekV2


class Session:
    """A conversation and what the model remembers of it. messages[i] is {"role", "content"}."""

    def __init__(self, model: DeepseekV2, tokenizer: Tokenizer, system: str | None = None) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []
        self.cache = model.new_cache()
        self.cached_ids: list[int] = []  # the tokens in the cache, in order

    def reply(self, text: str, request: Request, result: Result) -> Iterator[str]:
        """Add a user message and yield the answer as it comes; `result` is filled in as in stream_text.

        However it ends, messages and cache agree: a partial answer is kept as a turn, an answer without a word is
        not, and then the user's message is taken back as well.
        """
        prompt_ids = self.tokenizer.encode_chat([*self.messages, {"role": "user", "content": text}])
        check_prompt(self.model, prompt_ids)
        self.messages.append({"role": "user", "content": text})
        self.cache.truncate(common_prefix(self.cached_ids, prompt_ids[:-1]))
        try:
            # The template ends in "Assistant:", so the model's first token brings a space that is not part of the answer.
            started = False
            for piece in stream_text(self.model, self.tokenizer, prompt_ids, request, self.cache, result):
                yield piece if started else piece.removeprefix(" ")
                started = started or bool(piece)
        finally:
            self.cached_ids = (prompt_ids + result.token_ids)[: self.cache.lengths[0]]
            answer = result.text.removeprefix(" ")
            if answer:
                self.messages.append({"role": "assistant", "content": answer})
            else:
                self.messages.pop()


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many leading items two lists share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
