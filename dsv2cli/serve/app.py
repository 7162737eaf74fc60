"""The server itself: who may come in, where each path leads, and what an answer looks like on the wire."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from dsv2cli.engine.request import Token
from dsv2cli.engine.scheduler import Job
from dsv2cli.outside import json_text, parse_json
from dsv2cli.serve.anthropic import asked_message, counted
from dsv2cli.serve.desk import Crowded, Desk, Ended, Ticket
from dsv2cli.serve.door import Door
from dsv2cli.serve.fields import Fields, Refused, messages_of, refusing, whole_numbers
from dsv2cli.serve.metrics import Meter
from dsv2cli.serve.openai import DONE, Asked, Event, Model, asked_chat, asked_completion, listed
from dsv2cli.serve.responses import asked_response

RETRY_AFTER = 2  # seconds
OPEN = ("/health", "/")  # paths that need no key; the page asks for one
PAGE = Path(__file__).with_name("page.html")
KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


def problem(status: int, message: str, param: str | None = None, code: str = "", **headers: str) -> Response:
    """An error, as OpenAI's clients read it, and Anthropic's."""
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    error = {"message": message, "type": kind, "param": param, "code": code or None}
    return JSONResponse({"type": "error", "error": error}, status, headers=headers)


class Guard:
    """Looks at every request before anything else does."""

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self.app, self.door = app, door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self.refusal(scope["path"], scope["method"], headers)
        origin = headers.get("origin", "")
        allowed = origin in self.door.origins

        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start" and allowed:
                message["headers"] = [*message.get("headers", []), *cors(origin)]
            await send(message)

        if refusal is not None:
            await refusal(scope, receive, sending)
        elif allowed and scope["method"] == "OPTIONS":
            await Response(status_code=204)(scope, receive, sending)
        else:
            await self.app(scope, limited(receive, self.door.most_bytes), sending)

    def refusal(self, path: str, method: str, headers: dict[str, str]) -> Response | None:
        """Why a request may not come in."""
        door, host = self.door, headers.get("host", "")
        if door.hosts and name_of(host) not in door.hosts:
            return problem(403, f"This server does not go by the name {host[:80]!r}")
        origin = headers.get("origin")
        here = (f"http://{host}", f"https://{host}")
        if origin is not None and origin not in (*door.origins, *here):
            message = f"A web page from {origin[:80]} may not use this server: --allow-origin lets it"
            return problem(403, message)
        preflight = method == "OPTIONS" and origin in door.origins
        if door.keys and path not in OPEN and not preflight and not self.knows(headers):
            return problem(401, "A key is needed: Authorization: Bearer KEY", code="invalid_api_key")
        return None

    def knows(self, headers: dict[str, str]) -> bool:
        """Whether a request brings one of the keys."""
        scheme, _, given = headers.get("authorization", "").partition(" ")
        given = given.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        return any([hmac.compare_digest(given.encode(), key.encode()) for key in self.door.keys])


def name_of(host: str) -> str:
    """A Host header without its port."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def cors(origin: str) -> list[tuple[bytes, bytes]]:
    """What a browser wants to hear before it lets a page from elsewhere read an answer."""
    return [
        (b"access-control-allow-origin", origin.encode("latin-1")),
        (b"access-control-allow-headers", b"authorization, content-type, x-api-key"),
        (b"access-control-allow-methods", b"GET, POST, OPTIONS"),
        (b"vary", b"origin"),
    ]


class TooLarge(Exception):
    """A body with more bytes than one may have."""


def limited(receive: Receive, most: int) -> Receive:
    """The same, which raises TooLarge where more than `most` bytes come."""
    come = 0

    async def receiving() -> Any:
        nonlocal come
        message = await receive()
        come += len(message.get("body", b""))
        if come > most:
            raise TooLarge
        return message

    return receiving


@dataclass
class Server:
    """What the paths lead to."""

    model: Model
    desk: Desk
    door: Door
    seconds: float | None = None  # that an answer may take

    def app(self) -> Starlette:
        """All of it, behind the guard."""
        routes = [
            Route("/", self.page),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.one_model),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.complete, methods=["POST"]),
            Route("/v1/responses", self.respond, methods=["POST"]),
            Route("/v1/messages", self.message, methods=["POST"]),
            Route("/v1/messages/count_tokens", self.count_tokens, methods=["POST"]),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
            Route("/tokenizer_info", self.tokenizer_info),
        ]
        app = Starlette(
            routes=routes,
            exception_handlers={
                Refused: refused,
                Crowded: crowded,
                TooLarge: too_large,
                ClientDisconnect: gone,
                HTTPException: no_such_path,
                Exception: mistaken,
            },
        )
        app.add_middleware(Guard, door=self.door)
        return app

    async def page(self, request: Request) -> Response:
        """A page to talk with the model, which nobody else's page may frame."""
        headers = {"x-frame-options": "DENY", "cache-control": "no-cache"}
        return FileResponse(PAGE, media_type="text/html", headers=headers)

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "model": self.model.name})

    async def metrics(self, request: Request) -> Response:
        """In Prometheus' text format."""
        registry = CollectorRegistry()
        registry.register(Meter(self.desk))
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    async def models(self, request: Request) -> Response:
        return JSONResponse(listed(self.model))

    async def one_model(self, request: Request) -> Response:
        self.model.require(Fields({"model": request.path_params["name"]}))
        return JSONResponse(listed(self.model)["data"][0])

    async def chat(self, request: Request) -> Response:
        return await self.answer(request, asked_chat)

    async def complete(self, request: Request) -> Response:
        return await self.answer(request, asked_completion)

    async def respond(self, request: Request) -> Response:
        return await self.answer(request, asked_response)

    async def message(self, request: Request) -> Response:
        return await self.answer(request, asked_message)

    async def count_tokens(self, request: Request) -> Response:
        return JSONResponse(await asyncio.to_thread(counted, await body_of(request), self.model))

    async def tokenize(self, request: Request) -> Response:
        """As vLLM's: a text or messages to ids."""
        return JSONResponse(await asyncio.to_thread(self.tokenized, await body_of(request)))

    def tokenized(self, body: Any) -> dict[str, Any]:
        """Raises Refused."""
        fields, tokenizer = Fields(body), self.model.tokenizer
        self.model.require(fields)
        if "messages" in fields.left:  # more than the model holds, too: that is for who counts to know
            ids = self.model.chat_ids(messages_of(fields), whole=False)
            fields.only("add_generation_prompt", True)
        else:
            text, bos = fields.take("prompt", (str,), ""), fields.take("add_special_tokens", (bool,), True)
            with refusing("prompt"):
                tokenizer.refuse_too_long(text)
                ids = tokenizer.encode(text, bool(bos))
        spelled = fields.take("return_token_strs", (bool,), False)
        fields.done()
        words = [self.model.word(each) for each in ids] if spelled else None
        return {"count": len(ids), "max_model_len": self.model.context, "tokens": ids, "token_strs": words}

    async def detokenize(self, request: Request) -> Response:
        fields = Fields(await body_of(request))
        self.model.require(fields)
        ids = fields.take("tokens", (list,), [])
        fields.done()
        if not whole_numbers(ids):
            raise Refused("tokens is not a list of whole numbers", "tokens")
        self.model.check(ids or [0], "tokens")
        return JSONResponse({"prompt": self.model.tokenizer.decode(ids)})

    async def tokenizer_info(self, request: Request) -> Response:
        tokenizer = self.model.tokenizer
        return JSONResponse(
            {
                "tokenizer_class": "dsv2",
                "bos_token": tokenizer.bos,
                "eos_token": tokenizer.eos,
                "add_bos_token": tokenizer.adds_bos,
                "chat_template": tokenizer.chat_template,
                "model_max_length": self.model.context,
            }
        )

    async def answer(self, request: Request, asked_by: Callable[[Any, Model], Asked]) -> Response:
        """Run what a body asks for; streamed, or whole when all of it is there."""
        body = await body_of(request)
        asked = await asyncio.to_thread(asked_by, body, self.model)
        for job in asked.jobs:
            job.deadline = None if self.seconds is None else time.monotonic() + self.seconds
        ticket = self.desk.submit(asked.jobs)
        if asked.stream:
            stream = self.stream(ticket, asked)
            try:
                first = await unless_gone(request, anext(stream))
            except BaseException:
                await stream.aclose()
                raise
            if all(job.failure is not None for job in asked.jobs):  # before its first word it is no stream
                await stream.aclose()
                return broken(asked.jobs[0])
            return StreamingResponse(
                joined(first, stream),
                media_type="text/event-stream",
                headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
            )
        try:
            await unless_gone(request, self.all_of(ticket))
        finally:
            self.desk.cancel(ticket)
        if failed := next((job for job in asked.jobs if job.failure is not None), None):
            return broken(failed)
        return JSONResponse(asked.shape.whole(asked.jobs))

    async def all_of(self, ticket: Ticket) -> None:
        """Wait until all jobs have ended."""
        async for _ in self.desk.news(ticket):
            pass

    async def stream(self, ticket: Ticket, asked: Asked) -> AsyncGenerator[bytes]:
        """Server-sent events: each line one object, and a last one that says so."""
        shape, jobs = asked.shape, asked.jobs
        number = {id(job): i for i, job in enumerate(jobs)}
        held: dict[int, list[Token]] = {i: [] for i in range(len(jobs))}  # tokens whose text is to come
        begun, texts = set[int](), set[int]()
        try:
            async for what in self.desk.news(ticket):
                i = number[id(what.job)]
                job = jobs[i]
                if isinstance(what, Ended) and job.failure is not None:
                    yield event(("error" if shape.named else "", json.loads(bytes(broken(job).body))))
                    continue
                if i not in begun:
                    begun.add(i)
                    for each in shape.first(i, job):
                        yield event(each)
                if isinstance(what, Ended):
                    for each in shape.last(i, job):
                        yield event(each)
                    continue
                if what.token is not None:
                    held[i].append(what.token)
                text = what.text
                if shape.blank and text and i not in texts:
                    text = text.removeprefix(" ")
                    texts.add(i)
                scored = job.request.logprobs is not None
                if text or (scored and held[i] and job.ended):
                    for each in shape.more(i, job, text, held[i]):
                        yield event(each)
                    held[i] = []
            for each in shape.end(jobs):
                yield event(each)
        finally:
            self.desk.cancel(ticket)


def event(what: Event) -> bytes:
    """As it is sent."""
    name, content = what
    data = "[DONE]" if what == DONE else json_text(content)
    return (f"event: {name}\n" * bool(name) + f"data: {data}\n\n").encode()


async def joined(first: bytes, rest: AsyncGenerator[bytes]) -> AsyncIterator[bytes]:
    """The first and then the rest, which ends where this does."""
    try:
        yield first
        async for each in rest:
            yield each
    finally:
        await rest.aclose()


T = TypeVar("T")


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """What work gives. Raises ClientDisconnect where nobody wants that any more."""

    async def nobody_there() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(nobody_there())
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.wait({working, watching})


async def body_of(request: Request) -> Any:
    """A body as JSON. Raises Refused for anything else, TooLarge."""
    text = await request.body()
    try:
        return parse_json(text)
    except ValueError as error:
        raise Refused(f"The body is not JSON: {error}") from None


def broken(job: Job) -> Response:
    """A job that could not be brought to its end."""
    assert job.failure is not None
    wrong = job.failure.exit_code == 2
    return problem(400 if wrong else 500, job.failure.sentence)


async def refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return problem(error.status, error.message, error.param, error.code)


async def crowded(request: Request, error: Exception) -> Response:
    message = "Too many requests are waiting already: try again in a moment"
    return problem(429, message, code="queue_full", **{"retry-after": str(RETRY_AFTER)})


async def too_large(request: Request, error: Exception) -> Response:
    return problem(413, "The body is too large", **{"connection": "close"})


async def gone(request: Request, error: Exception) -> Response:
    return PlainTextResponse("", 499)


async def mistaken(request: Request, error: Exception) -> Response:
    """One of ours, which is told on stderr, too."""
    return problem(500, f"The server has made a mistake: {error!r}"[:300])


async def no_such_path(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = "There is no such path here" if error.status_code == 404 else str(error.detail)
    return problem(error.status_code, what, **dict(error.headers or {}))
