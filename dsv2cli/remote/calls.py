"""What a server is asked for, and what it came to. Imports no torch."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any, Self

from dsv2cli.engine.request import RULES, Request, Result
from dsv2cli.errors import Dsv2Error

CHAT, TEXT = "/chat/completions", "/completions"


@dataclass(frozen=True)
class ServerRequest(Request):
    """What to generate; what nobody chose is the server's own."""

    given: tuple[str, ...] = ()  # settings that somebody chose, by name
    ignore_eos: bool = False
    schema: Any = None  # that the answer is to be held to

    def having(self, **values: Any) -> Self:
        return replace(super().having(**values), given=tuple(sorted({*self.given, *values})))

    def chosen(self) -> dict[str, Any]:
        return {name: value for name, value in super().chosen().items() if name in self.given}

    def fields(self, chat: bool) -> dict[str, Any]:
        """As a body has them."""
        out: dict[str, Any] = {name: getattr(self.sampling, name) for name in RULES if name in self.given}
        if "seed" in self.given:
            out["seed"] = self.seed % 2**63  # which is what most servers take
        # A server continues a text with 16 tokens where nothing is said, and a chat as far as it goes.
        if "max_new_tokens" in self.given or not chat:
            out["max_tokens"] = self.max_new_tokens
        if self.stop:
            out["stop"] = list(self.stop)
        if self.ignore_eos:
            out["ignore_eos"] = True
        if self.logprobs is not None:
            out |= {"logprobs": True, "top_logprobs": self.logprobs} if chat else {"logprobs": self.logprobs}
        if self.schema is not None:
            form = {"name": "answer", "schema": self.schema, "strict": True}
            out["response_format"] = {"type": "json_schema", "json_schema": form}
        return out


@dataclass
class Answer(Result):
    """What came from a server, which gives texts and counts, but no ids."""

    pieces: int = 0  # of text that came, each one token or more
    told: dict[str, Any] = field(default_factory=dict)  # the server's own counts, once they are there
    scores: list[dict[str, Any]] = field(
        default_factory=list
    )  # {"token", "logprob", "top": [[text, logprob]]}
    times: list[float] = field(default_factory=list)  # when each piece came, by time.perf_counter
    ended: float = 0.0  # when the last of it came, by the same

    def begin_anew(self) -> None:
        """Forget what has come so far: it is asked for again."""
        vars(self).update(vars(Answer()))

    def take(self, piece: str, began: float) -> None:
        """More of its text, of a try that `began` then."""
        self.times.append(time.perf_counter())
        if not self.pieces:
            self.ttft_seconds = self.times[0] - began
        self.decode_seconds = self.times[-1] - self.times[0]
        self.pieces += 1
        self.text += piece

    @property
    def prompt_length(self) -> int:
        return number(self.told.get("prompt_tokens")) or 0

    @property
    def length(self) -> int:
        return number(self.told.get("completion_tokens")) or self.pieces

    @property
    def cached(self) -> int | None:
        """Tokens of the prompt that the server had read before."""
        details = self.told.get("prompt_tokens_details")
        return number(details.get("cached_tokens")) if isinstance(details, dict) else None

    @property
    def unit(self) -> str:
        return "tokens" if self.counted else "pieces"

    @property
    def counted(self) -> bool:
        """Whether the server told how many tokens there are."""
        return number(self.told.get("completion_tokens")) is not None


@dataclass(eq=False)
class Call:
    """A prompt for a server, and what comes of it. `prompt` has "messages", or "prompt" and perhaps
    "suffix".
    """

    prompt: dict[str, Any]
    request: ServerRequest
    result: Answer = field(default_factory=Answer)
    error: str = ""  # why it could not be answered, or not to its end
    failure: Dsv2Error | None = None  # what `error` says

    @property
    def chat(self) -> bool:
        return "messages" in self.prompt

    @property
    def path(self) -> str:
        return CHAT if self.chat else TEXT

    def body(self, model: str) -> dict[str, Any]:
        streaming = {"stream": True, "stream_options": {"include_usage": True}}
        return {"model": model} | self.prompt | self.request.fields(self.chat) | streaming

    def fail(self, error: Dsv2Error) -> None:
        self.error, self.failure = error.sentence, error
        self.result.finish_reason = "error" if self.result.pieces else ""


def number(value: Any) -> int | None:
    """A count, where it is one."""
    return value if type(value) is int and 0 <= value < 2**53 else None
