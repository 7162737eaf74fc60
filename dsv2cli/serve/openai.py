"""OpenAI's chat completions and completions: from a body to jobs, and from what comes of them to objects."""

from __future__ import annotations

import codecs
import json
import secrets
import time
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from dsv2cli.checkpoint.found import Checkpoint
from dsv2cli.checkpoint.tokenizer import Tokenizer
from dsv2cli.engine.fill import fill_in
from dsv2cli.engine.grammar import Grammar
from dsv2cli.engine.request import Request, Result, Token, check_prompt
from dsv2cli.engine.scheduler import Job
from dsv2cli.errors import Dsv2Error
from dsv2cli.serve.fields import (
    MOST_CHOICES,
    MOST_LOGPROBS,
    Fields,
    Refused,
    messages_of,
    refusing,
    sampling_of,
    streaming_of,
    whole_numbers,
)
from dsv2cli.serve.tools import Tools, in_words, new_id, tools_of

REASONS = {"interrupted": "stop", "deadline": "length"}  # theirs, where it is another word
WITHOUT_MEANING = ("user", "metadata", "safety_identifier", "prompt_cache_key", "store", "service_tier")


@dataclass
class Model:
    """The model that is served, and how it is asked where a request says nothing."""

    checkpoint: Checkpoint
    tokenizer: Tokenizer
    request: Request
    names: list[str]  # the first is what it is called
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def context(self) -> int:
        return self.checkpoint.config.max_position_embeddings

    def require(self, fields: Fields) -> None:
        """Raises Refused for a body that names another model."""
        name = fields.take("model", (str,), self.name)
        if name not in self.names:
            message = f"There is no model {name[:80]!r} here, but {self.name!r}"
            raise Refused(message, "model", 404, "model_not_found")

    def check(self, ids: list[int], param: str) -> list[int]:
        """A prompt that the model can read. Raises Refused."""
        try:
            check_prompt(self.checkpoint.config, ids)
        except Dsv2Error as error:
            code = "context_length_exceeded" if len(ids) >= self.context else ""
            raise Refused(error.sentence, param, code=code) from None
        return ids

    def encode(self, text: str, param: str) -> list[int]:
        """A text as a prompt. Raises Refused."""
        with refusing(param):
            self.tokenizer.refuse_too_long(text)
            return self.check(self.tokenizer.encode(text), param)

    def chat_ids(self, messages: list[dict[str, str]], start: str = "", whole: bool = True) -> list[int]:
        """A conversation as a prompt, and how its answer starts; `whole` where the model is to read it.

        Raises Refused.
        """
        with refusing("messages"):
            self.tokenizer.refuse_too_long(start, *(message["content"] for message in messages))
            ids = self.tokenizer.encode_chat(messages, start)
            return self.check(ids, "messages") if whole else ids

    def room(self, ids: list[int], most: int | None, param: str) -> int | None:
        """How many tokens may come. Raises Refused where the context holds fewer."""
        if most is not None and len(ids) + most > self.context:
            asked = f"The prompt has {len(ids):,} tokens and {most:,} are to come"
            message = f"{asked}, but this model's context holds {self.context:,}"
            raise Refused(message, param, code="context_length_exceeded")
        return most

    def seed(self, fields: Fields, request: Request) -> Request:
        """With a seed of its own where the body gives none."""
        return request if "seed" in fields.left else replace(request, seed=secrets.randbits(32))

    def grammar(self, request: Request, schema: str | None = None, lark: str | None = None) -> Request:
        """The request held to a schema, or to a grammar. Raises Dsv2Error where that can not be."""
        size = self.checkpoint.config.vocab_size
        held = Grammar(self.tokenizer, size, request.eos_ids, None, schema, lark=lark)
        return replace(request, grammar=held)

    def word(self, token_id: int) -> str:
        """A token as a text, with marks for what is half a character."""
        return self.tokenizer.bytes_of(token_id).decode(errors="replace")

    def held(self, form: Any, request: Request) -> Request:
        """The request held to a `response_format`. Raises Refused."""
        fields = Fields(form)
        kind = fields.take("type", (str,), "text")
        schema: Any = None
        if kind == "json_schema":
            inner = Fields(fields.take("json_schema", (dict,), {}))
            inner.ignore("name", "description", "strict")
            schema = inner.take("schema", (dict, bool))
            inner.done()
            if schema is None:
                raise Refused("response_format.json_schema.schema is missing", "response_format")
        elif kind == "json_object":
            schema = {"type": "object"}
        elif kind != "text":
            raise Refused(f"response_format.type = {kind[:40]!r} is unknown", "response_format")
        fields.done()
        if schema is None:
            return request
        with refusing("response_format"):
            return self.grammar(request, schema=json.dumps(schema))

    def calling(self, tools: Tools, request: Request) -> Request:
        """The request held to calls of these functions, or words. Raises Refused."""
        if not tools:
            return request
        if request.grammar is not None:
            raise Refused("response_format goes without tools", "response_format")
        with refusing("tools", "tools can not be used: "):
            return self.grammar(request, lark=tools.lark)


Event = tuple[str, Any]  # of a stream: its name, where it has one, and its object
DONE: Event = ("", None)  # the end of one


class Shape(Protocol):
    """How answers to one request look on the wire."""

    @property
    def blank(self) -> bool:
        """Whether an answer's first blank is dropped."""
        ...

    @property
    def named(self) -> bool:
        """Whether events have names."""
        ...

    def whole(self, jobs: list[Job]) -> dict[str, Any]:
        """The answer to a request that is not streamed."""
        ...

    def first(self, index: int, job: Job) -> list[Event]:
        """What a stream says of a job before any of its text."""
        ...

    def more(self, index: int, job: Job, text: str, tokens: list[Token]) -> list[Event]:
        """Some more of its text."""
        ...

    def last(self, index: int, job: Job) -> list[Event]:
        """It has ended."""
        ...

    def end(self, jobs: list[Job]) -> list[Event]:
        """All have."""
        ...


@dataclass
class Asked:
    """What a body asks for. `shape` makes the objects of its answers."""

    jobs: list[Job]
    stream: bool
    shape: Shape


def asked_chat(body: Any, model: Model) -> Asked:
    """Raises Refused."""
    fields = Fields(body)
    model.require(fields)
    tools = tools_of(fields)
    fields.left["messages"] = in_words(fields.left.get("messages"))
    ids = model.chat_ids(tools.introduced(messages_of(fields)))
    stream, usage = streaming_of(fields)
    request = sampling_of(fields, model.seed(fields, model.request))
    most = fields.whole("max_completion_tokens", 1, 2**31)
    older = fields.whole("max_tokens", 1, 2**31)
    most = older if most is None else most
    choices = fields.whole("n", 1, MOST_CHOICES, 1) or 1
    scored = fields.take("logprobs", (bool,), False)
    top = fields.whole("top_logprobs", 0, MOST_LOGPROBS)
    if top is not None and not scored:
        raise Refused("top_logprobs needs logprobs: true", "top_logprobs")
    request = model.calling(tools, model.held(fields.take("response_format", (dict,), {}), request))
    fields.only("modalities", ["text"])
    fields.only("reasoning_effort", "none")
    fields.ignore(*WITHOUT_MEANING)
    fields.done()
    most = model.room(ids, most, "max_tokens")
    request = replace(request, max_new_tokens=most, logprobs=(top or 0) if scored else None)
    shape = Chat("chatcmpl-" + secrets.token_hex(12), model, usage, tools)
    return Asked(choices_of(ids, request, choices), stream, shape)


def asked_completion(body: Any, model: Model) -> Asked:
    """Raises Refused."""
    fields = Fields(body)
    model.require(fields)
    prompts = prompts_of(fields, model)
    stream, usage = streaming_of(fields)
    request = sampling_of(fields, model.seed(fields, model.request))
    echo = bool(fields.take("echo", (bool,), False))
    most = fields.whole("max_tokens", 0 if echo else 1, 2**31, 16)
    scored = fields.whole("logprobs", 0, MOST_LOGPROBS)
    choices = fields.whole("n", 1, MOST_CHOICES, 1) or 1
    best_of = fields.whole("best_of", 1, MOST_CHOICES, choices)
    if best_of != choices:
        raise Refused("best_of is not supported here: leave it out", "best_of")
    request = model.held(fields.take("response_format", (dict,), {}), request)
    fields.ignore(*WITHOUT_MEANING)
    fields.done()
    if len(prompts) * choices > MOST_CHOICES:
        raise Refused(f"n times the prompts are more than {MOST_CHOICES} answers", "prompt")
    jobs = list[Job]()
    for ids in prompts:
        model.room(ids, most, "max_tokens")
        # Nothing is to come: the model still says what it says after the prompt, and that is dropped.
        each = replace(request, max_new_tokens=max(1, most or 0), logprobs=scored)
        if echo and scored is not None:
            each = replace(each, prompt_logprobs=scored)
        jobs += choices_of(ids, each, choices)
    shape = Completion("cmpl-" + secrets.token_hex(12), model, echo, most == 0, usage)
    return Asked(jobs, stream, shape)


def prompts_of(fields: Fields, model: Model) -> list[list[int]]:
    """The prompts of a body as ids: a text, ids, or a list of one of these; or a hole in a text. Raises
    Refused.
    """
    given = fields.take("prompt", (str, list), "")
    suffix = fields.take("suffix", (str,))
    if suffix:
        if not isinstance(given, str):
            raise Refused("suffix goes with a prompt that is one text", "suffix")
        with refusing("suffix", "suffix can not be used: "):
            return [model.check(fill_in(given, suffix, model.tokenizer), "prompt")]
    prompts = given if isinstance(given, list) and not (given and whole_numbers(given)) else [given]
    if not prompts or len(prompts) > MOST_CHOICES:
        raise Refused(f"prompt is a list of {len(prompts)}, not of 1 to {MOST_CHOICES}", "prompt")
    out = []
    for prompt in prompts:
        if isinstance(prompt, str):
            out.append(model.encode(prompt, "prompt"))
        elif isinstance(prompt, list) and prompt and whole_numbers(prompt):
            out.append(model.check(prompt, "prompt"))
        else:
            raise Refused("prompt is neither a text, nor token ids, nor a list of these", "prompt")
    return out


def choices_of(ids: list[int], request: Request, count: int) -> list[Job]:
    """Jobs for `count` answers to one prompt; their seeds count up."""
    return [Job(list(ids), replace(request, seed=(request.seed + i) % 2**64)) for i in range(count)]


def usage_of(jobs: list[Job]) -> dict[str, Any]:
    """Tokens in and out: a prompt that has several answers counts once, as theirs does."""
    firsts = [job for i, job in enumerate(jobs) if i == 0 or job.prompt_ids != jobs[i - 1].prompt_ids]
    prompt = sum(len(job.prompt_ids) for job in firsts)
    new = sum(len(job.result.tokens) for job in jobs)
    reused = sum(job.result.reused_tokens for job in firsts)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": reused},
    }


def reason_of(result: Result) -> str:
    return REASONS.get(result.finish_reason, result.finish_reason)


@dataclass
class Chat:
    """Objects of /v1/chat/completions."""

    id: str
    model: Model
    usage: bool  # whether a stream ends with it
    tools: Tools
    calls: dict[int, str] = field(default_factory=dict)  # of a stream's choices what may become a call
    blank, named = True, False

    def about(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": int(time.time()), "model": self.model.name}

    def whole(self, jobs: list[Job]) -> dict[str, Any]:
        choices = []
        for i, job in enumerate(jobs):
            text, reason = job.result.text.removeprefix(" "), reason_of(job.result)
            message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
            if (call := self.tools.call_in(text)) is not None:
                message |= {"content": None, "tool_calls": [told_call(*call)]}
                reason = "tool_calls"
            scores = self.scores(job.result.tokens) if job.request.logprobs is not None else None
            choices.append({"index": i, "message": message, "logprobs": scores, "finish_reason": reason})
        return self.about("chat.completion") | {"choices": choices, "usage": usage_of(jobs)}

    def first(self, index: int, job: Job) -> list[Event]:
        return [("", self.piece(index, {"role": "assistant", "content": ""}))]

    def more(self, index: int, job: Job, text: str, tokens: list[Token]) -> list[Event]:
        scores = self.scores(tokens) if job.request.logprobs is not None else None
        if self.tools.may_call(job.result.text):
            self.calls[index] = self.calls.get(index, "") + text  # it comes whole, or not as a call
            return []
        text = self.calls.pop(index, "") + text
        return [("", self.piece(index, {"content": text}, scores))]

    def last(self, index: int, job: Job) -> list[Event]:
        text, reason, out = self.calls.get(index, ""), reason_of(job.result), list[Event]()
        if (call := self.tools.call_in(text)) is not None:
            told = {"index": 0} | told_call(*call)
            out, reason = [("", self.piece(index, {"tool_calls": [told]}))], "tool_calls"
        elif text:
            out = [("", self.piece(index, {"content": text}))]
        return [*out, ("", self.piece(index, {}, None, reason))]

    def piece(
        self, index: int, delta: dict[str, Any], scores: Any = None, reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": scores, "finish_reason": reason}
        return self.about("chat.completion.chunk") | {"choices": [choice]}

    def end(self, jobs: list[Job]) -> list[Event]:
        usage = self.about("chat.completion.chunk") | {"choices": [], "usage": usage_of(jobs)}
        return [*([("", usage)] if self.usage else []), DONE]

    def scores(self, tokens: list[Token]) -> dict[str, Any]:
        return {
            "content": [
                self.score(token.id, token.logprob)
                | {"top_logprobs": [self.score(*each) for each in token.top]}
                for token in tokens
            ]
        }

    def score(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        data = list(self.model.tokenizer.bytes_of(token_id))
        return {"token": self.model.word(token_id), "logprob": logprob, "bytes": data}


def told_call(name: str, arguments: str) -> dict[str, Any]:
    """A call of a function, in an object of its own."""
    return {"id": new_id(), "type": "function", "function": {"name": name, "arguments": arguments}}


@dataclass
class Completion:
    """Objects of /v1/completions."""

    id: str
    model: Model
    echo: bool
    dropped: bool  # whether nothing but the prompt is wanted
    usage: bool = False
    blank, named = False, False

    def about(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": self.model.name,
        }

    def whole(self, jobs: list[Job]) -> dict[str, Any]:
        choices = []
        for i, job in enumerate(jobs):
            text = "" if self.dropped else job.result.text
            tokens = [] if self.dropped else job.result.tokens
            scores = None
            if job.request.logprobs is not None:
                before = self.prompt_tokens(job) if self.echo else []
                scores = self.scores([*before, *tokens])
            reason = "length" if self.dropped else reason_of(job.result)
            text = (self.before(job) if self.echo else "") + text
            choices.append({"index": i, "text": text, "logprobs": scores, "finish_reason": reason})
        return self.about() | {"choices": choices, "usage": usage_of(jobs)}

    def before(self, job: Job) -> str:
        """The prompt, as it is echoed; without a BOS that nobody wrote."""
        return self.model.tokenizer.decode(job.prompt_ids)

    def prompt_tokens(self, job: Job) -> list[Token]:
        """Those of the prompt, of which the first has no score."""
        return [Token(job.prompt_ids[0]), *job.result.prompt_tokens]

    def first(self, index: int, job: Job) -> list[Event]:
        if not self.echo:
            return []
        scores = self.scores(self.prompt_tokens(job)) if job.request.logprobs is not None else None
        return [("", self.piece(index, self.before(job), scores))]

    def more(self, index: int, job: Job, text: str, tokens: list[Token]) -> list[Event]:
        scores = self.scores(tokens) if job.request.logprobs is not None else None
        return [] if self.dropped else [("", self.piece(index, text, scores))]

    def last(self, index: int, job: Job) -> list[Event]:
        return [("", self.piece(index, "", None, "length" if self.dropped else reason_of(job.result)))]

    def piece(self, index: int, text: str, scores: Any = None, reason: str | None = None) -> dict[str, Any]:
        choice = {"index": index, "text": text, "logprobs": scores, "finish_reason": reason}
        return self.about() | {"choices": [choice]}

    def end(self, jobs: list[Job]) -> list[Event]:
        usage = self.about() | {"choices": [], "usage": usage_of(jobs)}
        return [*([("", usage)] if self.usage else []), DONE]

    def scores(self, tokens: list[Token]) -> dict[str, Any]:
        words = [self.model.word(token.id) for token in tokens]
        offsets, at, decoder = list[int](), 0, codecs.getincrementaldecoder("utf-8")("replace")
        for token in tokens:
            offsets.append(at)
            if not self.model.tokenizer.is_special(token.id):  # which stands in no text
                at += len(decoder.decode(self.model.tokenizer.bytes_of(token.id)))
        tops = [
            {self.model.word(i): logprob for i, logprob in token.top} if token.logprob is not None else None
            for token in tokens
        ]
        return {
            "tokens": words,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": tops,
            "text_offset": offsets,
        }


def listed(model: Model) -> dict[str, Any]:
    """What /v1/models says."""
    about = {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "dsv2",
        "max_model_len": model.context,
    }
    return {"object": "list", "data": [about]}
