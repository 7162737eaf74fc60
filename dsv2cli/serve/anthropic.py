"""Anthropic's messages, which some agents speak: from a body to a job, and from its answer to objects."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from typing import Any

from dsv2cli.engine.request import Token
from dsv2cli.engine.scheduler import Job
from dsv2cli.serve.fields import Fields, Refused, messages_of, sampling_of, text_of
from dsv2cli.serve.openai import Asked, Event, Model


def prompt_of(fields: Fields, model: Model) -> tuple[list[int], str]:
    """The conversation as a prompt, and how its answer starts, where the last message is its beginning.
    Raises Refused.
    """
    system = text_of(fields.take("system", (str, list), ""), "system")
    listed = fields.left.get("messages")
    if isinstance(listed, list):
        fields.left["messages"] = [plain(each) for each in listed]
    messages = messages_of(fields)
    if any(message["role"] == "system" for message in messages):
        raise Refused("messages has a system message: system is a field of its own", "messages")
    start = messages.pop()["content"] if messages[-1]["role"] == "assistant" else ""
    if system:
        messages = [{"role": "system", "content": system}, *messages]
    fields.only("tools", [])
    fields.only("tool_choice", {"type": "none"}, {"type": "auto"})
    fields.only("thinking", {"type": "disabled"})
    return model.chat_ids(messages, start), start


def plain(message: Any) -> Any:
    """A message without what says how to cache its parts: prompts are cached anyway."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    parts = [
        {key: value for key, value in part.items() if key not in ("cache_control", "citations")}
        if isinstance(part, dict)
        else part
        for part in message["content"]
    ]
    return message | {"content": parts}


def asked_message(body: Any, model: Model) -> Asked:
    """Raises Refused."""
    fields = Fields(body)
    model.require(fields)
    ids, start = prompt_of(fields, model)
    most = fields.whole("max_tokens", 1, 2**31)
    if most is None:
        raise Refused("max_tokens is missing", "max_tokens")
    if (stop := fields.take("stop_sequences", (list,))) is not None:
        fields.left["stop"] = stop
    stream = bool(fields.take("stream", (bool,), False))
    request = sampling_of(fields, model.seed(fields, model.request))
    fields.ignore("metadata", "service_tier", "cache_control")
    fields.done()
    request = replace(request, max_new_tokens=model.room(ids, most, "max_tokens"))
    shape = Messages("msg_" + secrets.token_hex(12), model, not start)
    return Asked([Job(ids, request)], stream, shape)


def counted(body: Any, model: Model) -> dict[str, int]:
    """How many tokens a conversation has. Raises Refused."""
    fields = Fields(body)
    model.require(fields)
    ids, _ = prompt_of(fields, model)
    fields.done()
    return {"input_tokens": len(ids)}


@dataclass
class Messages:
    """Objects of /v1/messages."""

    id: str
    model: Model
    blank: bool
    named = True

    def about(self, content: list[Any], job: Job, ended: bool) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model.name,
            "content": content,
            **(self.reason(job) if ended else {"stop_reason": None, "stop_sequence": None}),
            "usage": self.used(job),
        }

    def used(self, job: Job) -> dict[str, int]:
        """Tokens in and out; those that were cached already are counted for themselves."""
        reused = job.result.reused_tokens
        return {
            "input_tokens": len(job.prompt_ids) - reused,
            "cache_read_input_tokens": reused,
            "cache_creation_input_tokens": 0,
            "output_tokens": len(job.result.tokens),
        }

    def reason(self, job: Job) -> dict[str, str | None]:
        """Why it ended, in their words."""
        result = job.result
        if result.stop:
            return {"stop_reason": "stop_sequence", "stop_sequence": result.stop}
        reason = "end_turn" if result.finish_reason == "stop" else "max_tokens"
        return {"stop_reason": reason, "stop_sequence": None}

    def whole(self, jobs: list[Job]) -> dict[str, Any]:
        (job,) = jobs
        text = job.result.text.removeprefix(" ") if self.blank else job.result.text
        return self.about([{"type": "text", "text": text}], job, ended=True)

    def first(self, index: int, job: Job) -> list[Event]:
        block = {"type": "text", "text": ""}
        return [
            named("message_start", message=self.about([], job, ended=False)),
            named("content_block_start", index=0, content_block=block),
        ]

    def more(self, index: int, job: Job, text: str, tokens: list[Token]) -> list[Event]:
        return [named("content_block_delta", index=0, delta={"type": "text_delta", "text": text})]

    def last(self, index: int, job: Job) -> list[Event]:
        return [
            named("content_block_stop", index=0),
            named("message_delta", delta=self.reason(job), usage=self.used(job)),
        ]

    def end(self, jobs: list[Job]) -> list[Event]:
        return [named("message_stop")]


def named(kind: str, **content: Any) -> Event:
    """An event that says its name outside and inside."""
    return kind, {"type": kind} | content
