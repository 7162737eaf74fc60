"""Anthropic's messages, which some agents speak: from a body to a job, and from its answer to objects."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, replace
from typing import Any

from dsv2cli.engine.request import Token
from dsv2cli.engine.scheduler import Job
from dsv2cli.serve.fields import Fields, Refused, messages_of, sampling_of, text_of
from dsv2cli.serve.openai import Asked, Event, Model
from dsv2cli.serve.tools import Tools, chosen, function_of, in_words, listed_tools, new_id


def prompt_of(fields: Fields, model: Model) -> tuple[list[int], str, Tools]:
    """The conversation as a prompt, how its answer starts, where the last message is its beginning, and the
    functions that may be called. Raises Refused.
    """
    system = text_of(fields.take("system", (str, list), ""), "system")
    tools = tools_of(fields)
    listed = fields.left.get("messages")
    if isinstance(listed, list):
        fields.left["messages"] = in_words([each for message in listed for each in plain(message)])
    messages = messages_of(fields)
    if any(message["role"] == "system" for message in messages):
        raise Refused("messages has a system message: system is a field of its own", "messages")
    start = messages.pop()["content"] if messages[-1]["role"] == "assistant" else ""
    if system:
        messages = [{"role": "system", "content": system}, *messages]
    fields.only("thinking", {"type": "disabled"})
    if not messages:
        raise Refused("messages has no message to answer", "messages")
    return model.chat_ids(tools.introduced(messages), start), start, tools


def tools_of(fields: Fields) -> Tools:
    """The functions of a body. Raises Refused."""
    functions = []
    for place, tool in enumerate(listed_tools(fields)):
        inner = Fields(tool)
        inner.ignore("cache_control", "eager_input_streaming")
        if inner.take("type", (str,), "custom") != "custom":
            raise Refused(f"tools[{place}] is no function, and nobody would run it here", "tools")
        functions.append(function_of(place, inner.left, "input_schema"))
    choice = Fields(fields.take("tool_choice", (dict,), {}))
    kind = choice.take("type", (str,), "auto")
    choice.only("disable_parallel_tool_use", True, False)
    name = choice.take("name", (str,), "") if kind == "tool" else None
    choice.done()
    kind = {"any": "required", "tool": "required"}.get(kind, kind)
    return chosen(functions, kind, name)


def plain(message: Any) -> list[Any]:
    """A message without what says how to cache its parts, since prompts are cached anyway; calls and their
    results in messages of their own, as chat completions have them. Raises Refused.
    """
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return [message]
    texts, calls, results = list[Any](), list[Any](), list[Any]()
    for part in message["content"]:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "tool_use":
            function = {"name": part.get("name"), "arguments": json.dumps(part.get("input") or {})}
            calls.append({"id": part.get("id"), "function": function})
        elif kind == "tool_result":
            given = text_of(part.get("content") or "", "messages")
            given = f"an error: {given}" if part.get("is_error") else given
            results.append({"role": "tool", "tool_call_id": part.get("tool_use_id"), "content": given})
        elif isinstance(part, dict):
            texts.append({key: part[key] for key in part if key not in ("cache_control", "citations")})
        else:
            texts.append(part)
    if calls:
        return [message | {"content": text_of(texts, "messages"), "tool_calls": calls}]
    return results + ([message | {"content": texts}] if texts or not results else [])


def asked_message(body: Any, model: Model) -> Asked:
    """Raises Refused."""
    fields = Fields(body)
    model.require(fields)
    ids, start, tools = prompt_of(fields, model)
    most = fields.whole("max_tokens", 1, 2**31)
    if most is None:
        raise Refused("max_tokens is missing", "max_tokens")
    if (stop := fields.take("stop_sequences", (list,))) is not None:
        fields.left["stop"] = stop
    stream = bool(fields.take("stream", (bool,), False))
    request = sampling_of(fields, model.seed(fields, model.request))
    fields.ignore("metadata", "service_tier", "cache_control")
    fields.done()
    request = replace(model.calling(tools, request), max_new_tokens=model.room(ids, most, "max_tokens"))
    shape = Messages("msg_" + secrets.token_hex(12), model, not start, tools)
    return Asked([Job(ids, request)], stream, shape)


def counted(body: Any, model: Model) -> dict[str, int]:
    """How many tokens a conversation has. Raises Refused."""
    fields = Fields(body)
    model.require(fields)
    ids, _, _ = prompt_of(fields, model)
    fields.done()
    return {"input_tokens": len(ids)}


@dataclass
class Messages:
    """Objects of /v1/messages."""

    id: str
    model: Model
    blank: bool
    tools: Tools
    held: str = ""  # of a stream, what may become a call
    begun: bool = False  # whether a block of text was
    named = True

    def about(self, content: list[Any], job: Job, ended: bool) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model.name,
            "content": content,
            **(self.reason(job, content) if ended else {"stop_reason": None, "stop_sequence": None}),
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

    def reason(self, job: Job, content: list[Any]) -> dict[str, str | None]:
        """Why an answer with these blocks ended, in their words."""
        result = job.result
        if result.stop:
            return {"stop_reason": "stop_sequence", "stop_sequence": result.stop}
        reason = "end_turn" if result.finish_reason == "stop" else "max_tokens"
        if any(block["type"] == "tool_use" for block in content):
            reason = "tool_use"
        return {"stop_reason": reason, "stop_sequence": None}

    def block(self, text: str) -> dict[str, Any]:
        """An answer as a block: a call, or text."""
        if (call := self.tools.call_in(text)) is None:
            return {"type": "text", "text": text}
        name, arguments = call
        return {"type": "tool_use", "id": new_id(), "name": name, "input": json.loads(arguments)}

    def whole(self, jobs: list[Job]) -> dict[str, Any]:
        (job,) = jobs
        text = job.result.text.removeprefix(" ") if self.blank else job.result.text
        return self.about([self.block(text)], job, ended=True)

    def first(self, index: int, job: Job) -> list[Event]:
        return [named("message_start", message=self.about([], job, ended=False))]

    def more(self, index: int, job: Job, text: str, tokens: list[Token]) -> list[Event]:
        if not self.begun and self.tools.may_call(job.result.text):
            self.held += text
            return []
        said = {"type": "text_delta", "text": self.held + text}
        self.held = ""
        return [*self.begin({"type": "text", "text": ""}), named("content_block_delta", index=0, delta=said)]

    def begin(self, block: dict[str, Any]) -> list[Event]:
        """The one block of the answer, where it was not begun yet."""
        begun, self.begun = self.begun, True
        return [] if begun else [named("content_block_start", index=0, content_block=block)]

    def last(self, index: int, job: Job) -> list[Event]:
        out, block = list[Event](), self.block("" if self.begun else self.held)
        if block["type"] == "tool_use":
            said = {"type": "input_json_delta", "partial_json": json.dumps(block["input"])}
            out = self.begin(block | {"input": {}})
            out.append(named("content_block_delta", index=0, delta=said))
        else:
            out = self.begin({"type": "text", "text": ""})
            if self.held:  # blanks, or a call that was cut off
                said = {"type": "text_delta", "text": self.held}
                out.append(named("content_block_delta", index=0, delta=said))
        return [
            *out,
            named("content_block_stop", index=0),
            named("message_delta", delta=self.reason(job, [block]), usage=self.used(job)),
        ]

    def end(self, jobs: list[Job]) -> list[Event]:
        return [named("message_stop")]


def named(kind: str, **content: Any) -> Event:
    """An event that says its name outside and inside."""
    return kind, {"type": kind} | content
