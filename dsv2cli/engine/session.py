"""Messages to text: a conversation, rendered whole each turn, with the latents of the last one reused."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from dsv2cli.checkpoint.tokenizer import Message, Tokenizer
from dsv2cli.engine.pages import Full, Sequence, common_prefix
from dsv2cli.engine.request import Request, Result, check_prompt
from dsv2cli.engine.scheduler import Job, Reading, Scheduler, unheard
from dsv2cli.engine.text import without_first_blank
from dsv2cli.run.page_store import PageStore
from dsv2cli.run.runner import Runner


class Session:
    """What the model remembers of a conversation. messages[i] is {"role", "content"}."""

    def __init__(self, runner: Runner, tokenizer: Tokenizer, store: PageStore | None = None) -> None:
        self.runner, self.tokenizer = runner, tokenizer
        self.scheduler = Scheduler(runner, tokenizer, store=store)
        self.sequence = Sequence(self.scheduler.books[0])
        self.cached_ids: list[int] = []  # the tokens in the pool, in order

    def reply(
        self,
        messages: list[Message],
        request: Request,
        result: Result,
        start: str = "",
        reading: Reading = unheard,
    ) -> Iterator[str]:
        """Yield the answer to these messages, or what follows `start` of it, as it comes; `result` is filled
        in and `reading` told as a Job's are.

        However it ends, what is remembered is what is in the pool. Raises UsageError for messages that
        leave no room for an answer.
        """
        self.tokenizer.refuse_too_long(*(message["content"] for message in messages))
        prompt_ids = self.tokenizer.encode_chat(messages, start)
        check_prompt(self.runner.config, prompt_ids)
        self.sequence.truncate(common_prefix(self.cached_ids, prompt_ids[:-1]))
        job = Job(prompt_ids, request, result, after=self.sequence, reading=reading)
        stream = self.scheduler.stream(job)
        try:
            yield from stream if start and not start.endswith(" ") else without_first_blank(stream)
        finally:
            stream.close()  # type: ignore[attr-defined]
            self.cached_ids = (prompt_ids + result.token_ids)[: self.sequence.length]

    def latents(self) -> list[Tensor]:
        """Those of `cached_ids`, layer by layer. Each [length, latent + rope]"""
        return self.runner.read(self.scheduler.pool, self.sequence.pages, self.sequence.length)

    def take_latents(self, ids: list[int], latents: list[Tensor]) -> None:
        """Remember tokens whose latents [len(ids), latent + rope], layer by layer, were kept; none where
        there is no room for them.
        """
        self.sequence.end()
        try:
            self.sequence.make_room(len(ids), lambda source, target: None)
        except Full:
            self.sequence.end()
            return
        self.runner.fill(self.scheduler.pool, self.sequence.pages, latents)
        self.sequence.length, self.cached_ids = len(ids), ids
