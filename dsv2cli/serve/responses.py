"""OpenAI's responses, of which nothing is kept: from a body to a job, and from its answer to objects."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field, replace
from typing import Any

from dsv2cli.engine.request import Token
from dsv2cli.engine.scheduler import Job
from dsv2cli.serve.anthropic import named
from dsv2cli.serve.fields import Fields, Refused, messages_of, sampling_of
from dsv2cli.serve.openai import WITHOUT_MEANING, Asked, Event, Model, usage_of

PARTS = ("input_text", "output_text", "text")


def conversation_of(fields: Fields) -> list[dict[str, str]]:
    """Instructions and input as messages. Raises Refused."""
    instructions = fields.take("instructions", (str,), "")
    given = fields.take("input", (str, list))
    if not given:
        raise Refused("input is missing or empty", "input")
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    messages = [{"role": "system", "content": instructions}] if instructions else []
    for place, item in enumerate(items):
        if not isinstance(item, dict) or item.get("type", "message") != "message":
            kind = item.get("type") if isinstance(item, dict) else item
            raise Refused(f"input[{place}] is not a message but {str(kind)[:40]!r}", "input")
        content = item.get("content")
        if isinstance(content, list):
            content = [
                {"type": "text", "text": part.get("text")}
                if isinstance(part, dict) and part.get("type") in PARTS
                else part
                for part in content
            ]
        messages.append({"role": item.get("role"), "content": content})
    try:
        return messages_of(Fields({"messages": messages}))
    except Refused as error:
        raise Refused(error.message.replace("messages", "input"), "input") from None


def asked_response(body: Any, model: Model) -> Asked:
    """Raises Refused."""
    fields = Fields(body)
    model.require(fields)
    ids = model.chat_ids(conversation_of(fields))
    most = fields.whole("max_output_tokens", 1, 2**31)
    text = Fields(fields.take("text", (dict,), {}))
    form = text.take("format", (dict,), {})
    text.ignore("verbosity")
    text.done()
    if form.get("type") == "json_schema":  # here its parts lie beside its type
        inner = {key: value for key, value in form.items() if key != "type"}
        form = {"type": "json_schema", "json_schema": inner}
    stream = bool(fields.take("stream", (bool,), False))
    options = Fields(fields.take("stream_options", (dict,), {}))
    options.only("include_obfuscation", False)
    options.done()
    request = model.held(form, sampling_of(fields, model.seed(fields, model.request)))
    if "previous_response_id" in fields.left:
        raise Refused("previous_response_id: nothing is kept here, send all of it", "previous_response_id")
    skip_tools(fields)
    fields.only("background", False)
    fields.only("truncation", "disabled")
    fields.only("include", [], ["reasoning.encrypted_content"])
    fields.only("parallel_tool_calls", True, False)
    fields.only("tool_choice", "none", "auto")
    fields.ignore("reasoning", "max_tool_calls", *WITHOUT_MEANING)
    fields.done()
    request = replace(request, max_new_tokens=model.room(ids, most, "max_output_tokens"))
    return Asked([Job(ids, request)], stream, Responses(model, most))


def skip_tools(fields: Fields) -> None:
    """Tools that the other side would run by itself are not there. Raises Refused for functions, which it
    would wait for.
    """
    for tool in fields.take("tools", (list,), []):
        if not isinstance(tool, dict) or tool.get("type") == "function":
            raise Refused("tools: functions are not supported here", "tools")


@dataclass
class Responses:
    """Objects of /v1/responses."""

    model: Model
    most: int | None
    id: str = field(default_factory=lambda: "resp_" + secrets.token_hex(12))
    item: str = field(default_factory=lambda: "msg_" + secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))
    number: int = 0  # of the next event
    text: str = ""
    blank, named = True, True

    def about(self, status: str, output: list[Any], job: Job | None) -> dict[str, Any]:
        """The object, as far as it is known; with a job that has ended, its usage."""
        cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
        usage = None
        if job is not None:
            used = usage_of([job])
            usage = {
                "input_tokens": used["prompt_tokens"],
                "input_tokens_details": used["prompt_tokens_details"],
                "output_tokens": used["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": used["total_tokens"],
            }
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": cut,
            "instructions": None,
            "max_output_tokens": self.most,
            "model": self.model.name,
            "output": output,
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "tool_choice": "none",
            "tools": [],
            "usage": usage,
            "metadata": {},
        }

    def message(self, text: str, status: str) -> dict[str, Any]:
        content = [self.part(text)] if status != "in_progress" else []
        about = {"type": "message", "id": self.item, "status": status, "role": "assistant"}
        return about | {"content": content}

    def part(self, text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    @property
    def place(self) -> dict[str, Any]:
        """Where the one text of the answer is."""
        return {"item_id": self.item, "output_index": 0, "content_index": 0}

    def status(self, job: Job) -> str:
        return "completed" if job.result.finish_reason == "stop" else "incomplete"

    def whole(self, jobs: list[Job]) -> dict[str, Any]:
        (job,) = jobs
        status, text = self.status(job), job.result.text.removeprefix(" ")
        return self.about(status, [self.message(text, status)], job)

    def event(self, kind: str, **content: Any) -> Event:
        self.number += 1
        return named(kind, sequence_number=self.number - 1, **content)

    def first(self, index: int, job: Job) -> list[Event]:
        empty = self.about("in_progress", [], None)
        return [
            self.event("response.created", response=empty),
            self.event("response.in_progress", response=empty),
            self.event("response.output_item.added", output_index=0, item=self.message("", "in_progress")),
            self.event("response.content_part.added", **self.place, part=self.part("")),
        ]

    def more(self, index: int, job: Job, text: str, tokens: list[Token]) -> list[Event]:
        self.text += text
        return [self.event("response.output_text.delta", **self.place, delta=text, logprobs=[])]

    def last(self, index: int, job: Job) -> list[Event]:
        status = self.status(job)
        item = self.message(self.text, status)
        return [
            self.event("response.output_text.done", **self.place, text=self.text, logprobs=[]),
            self.event("response.content_part.done", **self.place, part=self.part(self.text)),
            self.event("response.output_item.done", output_index=0, item=item),
            self.event(f"response.{status}", response=self.about(status, [item], job)),
        ]

    def end(self, jobs: list[Job]) -> list[Event]:
        return []
