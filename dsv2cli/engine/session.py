"""Messages to text: a conversation, rendered whole each turn, with the cache of the last one reused."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from dsv2cli.checkpoint.tokenizer import Message, Tokenizer
from dsv2cli.engine.generate import Reading, stream_text, unheard, without_first_blank
from dsv2cli.engine.request import Request, Result, check_prompt
from dsv2cli.run.runner import Runner


class Session:
    """What the model remembers of a conversation. messages[i] is {"role", "content"}."""

    def __init__(self, runner: Runner, tokenizer: Tokenizer) -> None:
        self.runner, self.tokenizer = runner, tokenizer
        self.cache = runner.new_cache()
        self.cached_ids: list[int] = []  # the tokens in the cache, in order

    def reply(
        self,
        messages: list[Message],
        request: Request,
        result: Result,
        start: str = "",
        reading: Reading = unheard,
    ) -> Iterator[str]:
        """Yield the answer to these messages, or what follows `start` of it, as it comes; `result` is filled
        in and `reading` told as in stream_text.

        However it ends, what is remembered is what is in the cache. Raises UsageError for messages that
        leave no room for an answer.
        """
        self.tokenizer.refuse_too_long(*(message["content"] for message in messages))
        prompt_ids = self.tokenizer.encode_chat(messages, start)
        check_prompt(self.runner.config, prompt_ids)
        self.cache.truncate(common_prefix(self.cached_ids, prompt_ids[:-1]))
        stream = stream_text(self.runner, self.tokenizer, prompt_ids, request, self.cache, result, reading)
        try:
            yield from stream if start and not start.endswith(" ") else without_first_blank(stream)
        finally:
            stream.close()  # type: ignore[attr-defined]
            self.cached_ids = (prompt_ids + result.token_ids)[: self.cache.lengths[0]]

    def take_cache(self, ids: list[int], latents: list[Tensor]) -> None:
        """Remember tokens whose latents [1, len(ids), latent + rope], layer by layer, were kept."""
        self.cache.fill(latents)
        self.cached_ids = ids


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many leading items two lists share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
