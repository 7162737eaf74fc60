"""Messages to text: a conversation, rendered whole each turn, with the cache of the last one reused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from dsv2cli.checkpoint.tokenizer import Message, Tokenizer
from dsv2cli.engine.generate import stream_text, without_first_blank
from dsv2cli.engine.request import Request, Result, check_prompt
from dsv2cli.errors import UsageError
from dsv2cli.run.runner import Runner

SUMMARISE = "Summarize our conversation so far in a few sentences."
SUMMARY_TOKENS = 256


class Session:
    """A conversation and what the model remembers of it. messages[i] is {"role", "content"}."""

    def __init__(self, runner: Runner, tokenizer: Tokenizer, system: str | None = None) -> None:
        self.runner, self.tokenizer = runner, tokenizer
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []
        self.cache = runner.new_cache()
        self.cached_ids: list[int] = []  # the tokens in the cache, in order
        self.branch = "main"
        self.branches: dict[str, list[Message]] = {}  # the others; `messages` is the one we are on

    def reply(self, text: str, request: Request, result: Result) -> Iterator[str]:
        """Add a user message and yield the answer as it comes; `result` is filled in as in stream_text.

        However it ends, messages and cache agree: a partial answer is kept as a turn, an answer without a
        word is not, and then the user's message is taken back as well.
        """
        self.tokenizer.refuse_too_long(text)
        prompt_ids = self.tokenizer.encode_chat([*self.messages, {"role": "user", "content": text}])
        check_prompt(self.runner.config, prompt_ids)
        self.messages.append({"role": "user", "content": text})
        self.cache.truncate(common_prefix(self.cached_ids, prompt_ids[:-1]))
        try:
            yield from without_first_blank(
                stream_text(self.runner, self.tokenizer, prompt_ids, request, self.cache, result)
            )
        finally:
            self.cached_ids = (prompt_ids + result.token_ids)[: self.cache.lengths[0]]
            answer = result.text.removeprefix(" ")
            if answer:
                self.messages.append({"role": "assistant", "content": answer})
            else:
                self.messages.pop()

    def start_over(self, messages: list[Message]) -> None:
        """Put these messages in the place of all there are, and of all branches."""
        self.messages, self.branch, self.branches = messages, "main", {}

    def take_over(self, branches: dict[str, list[Message]], branch: str) -> None:
        """Go on with all branches of a saved conversation, on the one named."""
        self.branch, self.branches = branch, dict(branches)
        self.messages = self.branches.pop(branch)

    def take_cache(self, ids: list[int], latents: list[Tensor]) -> None:
        """Remember tokens whose latents [1, len(ids), latent + rope], layer by layer, were kept."""
        self.cache.fill(latents)
        self.cached_ids = ids

    def asked(self) -> list[int]:
        """Where in `messages` each user message stands."""
        return [i for i, message in enumerate(self.messages) if message["role"] == "user"]

    def cut(self, turn: int) -> str:
        """Take back turn `turn` (1 is the first, -1 the last) and all after it; gives what the user had said.

        Raises UsageError where there is no such turn. The cache needs no care: the next reply reuses what
        still fits.
        """
        asked = self.asked()
        if turn == 0 or not -len(asked) <= turn <= len(asked):
            raise UsageError(
                "There is no such turn", why=f"this conversation has {len(asked)}", fix="/history shows them"
            )
        start = asked[turn - 1 if turn > 0 else turn]
        text = self.messages[start]["content"]
        del self.messages[start:]
        return text

    def set_system(self, text: str) -> None:
        """Replace the system prompt, or take it away where `text` is empty."""
        rest = [message for message in self.messages if message["role"] != "system"]
        self.messages = ([{"role": "system", "content": text}] if text else []) + rest

    def switch(self, name: str) -> bool:
        """Go to branch `name`; where there is none yet it begins as a copy of this one.
        True if it was there.
        """
        known = name in self.branches or name == self.branch
        self.branches[self.branch] = self.messages
        self.messages = self.branches.pop(name) if known else [dict(message) for message in self.messages]
        self.branch = name
        return known

    def prompt_tokens(self, text: str = "") -> int:
        """How many tokens the conversation takes, with `text` as the next message."""
        extra = [{"role": "user", "content": text}] if text else []
        return len(self.tokenizer.encode_chat([*self.messages, *extra])) if self.messages or extra else 0

    def make_room(self, text: str, spare: int) -> int:
        """Drop the oldest turns, never the system prompt, until `text` and `spare` tokens fit; gives how
        many.
        """
        limit, dropped = self.runner.config.max_position_embeddings - spare, 0
        while len(asked := self.asked()) > 0 and self.prompt_tokens(text) >= limit:
            end = asked[1] if len(asked) > 1 else len(self.messages)
            del self.messages[asked[0] : end]
            dropped += 1
        return dropped

    def summarise(self, request: Request) -> str:
        """Put a summary by the model itself in the place of all turns but the last, and give that summary.

        Whatever goes wrong meanwhile, the conversation is then as it was before.
        """
        before, asked = self.messages, self.asked()
        if len(asked) < 2:
            return ""
        system, old, last = before[: asked[0]], before[asked[0] : asked[-1]], before[asked[-1] :]
        self.messages = system + old
        try:
            self.make_room(SUMMARISE, SUMMARY_TOKENS)
            short = replace(request, max_new_tokens=SUMMARY_TOKENS)
            summary = "".join(self.reply(SUMMARISE, short, Result())).strip()
        except BaseException:
            self.messages = before
            raise
        turn: list[Message] = [
            {"role": "user", "content": SUMMARISE},
            {"role": "assistant", "content": summary},
        ]
        self.messages = system + turn + last if summary else before
        return summary


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many leading items two lists share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
