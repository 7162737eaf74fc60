"""OpenAI's responses, of which nothing is kept: from a body to a job, and from its answer to objects."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field, replace
from typing import Any

from dsv2cli.engine.request import Token
from dsv2cli.engine.scheduler import Job
from dsv2cli.serve.anthropic import named
from dsv2cli.serve.fields import Fields, Refused, messages_of, sampling_of, text_of
from dsv2cli.serve.openai import WITHOUT_MEANING, Asked, Event, Model, usage_of
from dsv2cli.serve.tools import Tools, chosen, function_of, in_words, listed_tools, new_id

PARTS = ("input_text", "output_text", "text")


def conversation_of(fields: Fields) -> list[dict[str, str]]:
    """Instructions and input as messages. Raises Refused."""
    instructions = fields.take("instructions", (str,), "")
    given = fields.take("input", (str, list))
    if not given:
        raise Refused("input is missing or empty", "input")
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    messages: list[dict[str, Any]] = [{"role": "system", "content": instructions}] if instructions else []
    for place, item in enumerate(items):
        kind = item.get("type") if isinstance(item, dict) else None
        if kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "function": function}
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
            continue
        if kind == "function_call_output":
            given = item.get("output")
            given = given if isinstance(given, str) else text_of(texts(given), "input")
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": given})
            continue
        if not isinstance(item, dict) or item.get("type", "message") != "message":
            kind = item.get("type") if isinstance(item, dict) else item
            raise Refused(f"input[{place}] is not a message but {str(kind)[:40]!r}", "input")
        messages.append({"role": item.get("role"), "content": texts(item.get("content"))})
    try:
        return messages_of(Fields({"messages": in_words(messages)}))
    except Refused as error:
        raise Refused(error.message.replace("messages", "input"), "input") from None


def texts(content: Any) -> Any:
    """Parts as chat completions name them."""
    if not isinstance(content, list):
        return content
    return [
        {"type": "text", "text": part.get("text")}
        if isinstance(part, dict) and part.get("type") in PARTS
        else part
        for part in content
    ]


def asked_response(body: Any, model: Model) -> Asked:
    """Raises Refused."""
    fields = Fields(body)
    model.require(fields)
    tools = tools_of(fields)
    ids = model.chat_ids(tools.introduced(conversation_of(fields)))
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
    request = model.calling(tools, request)
    if "previous_response_id" in fields.left:
        raise Refused("previous_response_id: nothing is kept here, send all of it", "previous_response_id")
    fields.only("background", False)
    fields.only("truncation", "disabled")
    fields.only("include", [], ["reasoning.encrypted_content"])
    fields.only("parallel_tool_calls", True, False)
    fields.ignore("reasoning", "max_tool_calls", *WITHOUT_MEANING)
    fields.done()
    request = replace(request, max_new_tokens=model.room(ids, most, "max_output_tokens"))
    return Asked([Job(ids, request)], stream, Responses(model, most, tools))


def tools_of(fields: Fields) -> Tools:
    """The functions of a body; tools that the other side would run by itself are not there. Raises
    Refused.
    """
    functions = []
    for place, tool in enumerate(listed_tools(fields)):
        if not isinstance(tool, dict):
            raise Refused(f"tools[{place}] is no object", "tools")
        if tool.get("type") == "function":
            functions.append(function_of(place, {key: tool[key] for key in tool if key != "type"}))
    choice = fields.take("tool_choice", (str, dict), "auto")
    name = None
    if isinstance(choice, dict):
        inner = Fields(choice)
        inner.only("type", "function")
        choice, name = "required", inner.take("name", (str,), "")
        inner.done()
    return chosen(functions, choice, name)


@dataclass
class Responses:
    """Objects of /v1/responses."""

    model: Model
    most: int | None
    tools: Tools
    id: str = field(default_factory=lambda: "resp_" + secrets.token_hex(12))
    item: str = field(default_factory=lambda: "msg_" + secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))
    number: int = 0  # of the next event
    text: str = ""
    begun: bool = False  # whether the message was
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
            "tool_choice": self.tools.choice,
            "tools": [{"type": "function", "strict": True} | each for each in self.tools.functions],
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
        call = self.tools.call_in(text)
        item = self.message(text, status) if call is None else self.call(*call)
        return self.about(status, [item], job)

    def call(self, name: str, arguments: str) -> dict[str, Any]:
        """A call of a function, as an item."""
        about = {"type": "function_call", "id": self.item, "call_id": new_id(), "status": "completed"}
        return about | {"name": name, "arguments": arguments}

    def event(self, kind: str, **content: Any) -> Event:
        self.number += 1
        return named(kind, sequence_number=self.number - 1, **content)

    def first(self, index: int, job: Job) -> list[Event]:
        empty = self.about("in_progress", [], None)
        return [
            self.event("response.created", response=empty),
            self.event("response.in_progress", response=empty),
        ]

    def begin(self) -> list[Event]:
        """The message, where it was not begun yet."""
        begun, self.begun = self.begun, True
        if begun:
            return []
        return [
            self.event("response.output_item.added", output_index=0, item=self.message("", "in_progress")),
            self.event("response.content_part.added", **self.place, part=self.part("")),
        ]

    def more(self, index: int, job: Job, text: str, tokens: list[Token]) -> list[Event]:
        self.text += text
        if not self.begun and self.tools.may_call(job.result.text):
            return []
        delta = self.text if not self.begun else text
        return [
            *self.begin(),
            self.event("response.output_text.delta", **self.place, delta=delta, logprobs=[]),
        ]

    def last(self, index: int, job: Job) -> list[Event]:
        status, call = self.status(job), None if self.begun else self.tools.call_in(self.text)
        if call is None:
            item, out = self.message(self.text, status), self.said()
        else:
            item, place = self.call(*call), {"item_id": self.item, "output_index": 0}
            empty = item | {"arguments": "", "status": "in_progress"}
            done: dict[str, Any] = place | {"arguments": call[1]}
            out = [
                self.event("response.output_item.added", output_index=0, item=empty),
                self.event("response.function_call_arguments.delta", **place, delta=call[1]),
                self.event("response.function_call_arguments.done", **done, name=call[0]),
            ]
        return [
            *out,
            self.event("response.output_item.done", output_index=0, item=item),
            self.event(f"response.{status}", response=self.about(status, [item], job)),
        ]

    def said(self) -> list[Event]:
        """The end of the message's one text."""
        whole = [] if self.begun else [self.text]  # nothing yet, or a call that was cut off
        return [
            *self.begin(),
            *(self.event("response.output_text.delta", **self.place, delta=t, logprobs=[]) for t in whole),
            self.event("response.output_text.done", **self.place, text=self.text, logprobs=[]),
            self.event("response.content_part.done", **self.place, part=self.part(self.text)),
        ]

    def end(self, jobs: list[Job]) -> list[Event]:
        return []
