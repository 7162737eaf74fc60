"""A server that speaks OpenAI's protocol, as its client: where it is, what it serves, answers as they stream.

Imports no torch.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import queue
import random
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx2 as httpx

from dsv2cli.errors import Dsv2Error, UsageError
from dsv2cli.outside import one_line, parse_json, reason
from dsv2cli.remote.calls import Answer, Call, number

T = TypeVar("T")
TRIES = 6  # of a request that did not come through
LONGEST_WAIT = 60.0  # seconds that a server may ask for between two of them
AGAIN = (429, 502, 503, 504)  # statuses that are over soon
SECONDS_TO_CONNECT, SECONDS_OF_SILENCE = 10.0, 600.0
LONGEST_LINE = 16 * 2**20  # bytes of an object
# What no further try would mend.
FOR_GOOD = (httpx.ReadTimeout, httpx.LocalProtocolError, httpx.UnsupportedProtocol, httpx.ProxyError)
TICK = 0.1  # seconds between two looks at whether an answer is still wanted


class Unreachable(Dsv2Error):
    """It is the server, or the way to it, that is at fault: another request would fare no better."""


class NotThere(Unreachable):
    """Nobody listens there."""


class Unknown(UsageError):
    """There is no such path or model."""


@dataclass(frozen=True)
class Address:
    """Where a server is (`url` ends where its paths begin, as .../v1), its key, and which of its models is
    meant.
    """

    url: str
    key: str | None = field(default=None, repr=False)
    model: str | None = None

    @classmethod
    def of(cls, text: str, key: str | None = None, model: str | None = None) -> Address:
        """From what a person types: http://HOST:PORT, with or without /v1, or HOST:PORT. Raises
        UsageError.
        """
        fix = "--api http://localhost:8000"
        try:
            url = httpx.URL(text if "://" in text else f"http://{text}")
        except (httpx.InvalidURL, ValueError) as error:
            raise UsageError(f"{text[:200]!r} is no address", why=reason(error), fix=fix) from None
        wrong = url.scheme not in ("http", "https") or not url.host or (url.port or 1) > 65535
        if wrong or url.query or url.fragment:
            why = "it is http:// or https://, a host, and perhaps a port and a path"
            raise UsageError(f"{text[:200]!r} is no address of a server", why=why, fix=fix)
        if url.userinfo:
            why = "others see the command line"
            raise UsageError("The address holds a password", why=why, fix="DSV2_API_KEY=... dsv2 ...")
        path = url.path.rstrip("/").removesuffix("/completions").removesuffix("/chat")
        if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key):
            raise UsageError("The key can not be sent", why="it is not plain ASCII, or has blanks around it")
        return cls(str(url.copy_with(path=path or "/v1")), key, model)

    @property
    def host(self) -> str:
        return httpx.URL(self.url).netloc.decode()

    @property
    def here(self) -> bool:
        """Whether it is this machine's own."""
        return httpx.URL(self.url).host in ("localhost", "127.0.0.1", "::1")

    @property
    def open(self) -> bool:
        """Whether the key would go through a network that others may read."""
        return self.key is not None and self.url.startswith("http:") and not self.here


class Server:
    """The connection to one. All that goes over the network does so in a thread of its own."""

    def __init__(self, address: Address, note: Callable[[str], object] = lambda text: None) -> None:
        """`note` is told when a request has to wait; any thread may call it."""
        self.address, self.note = address, note
        headers = {} if address.key is None else {"authorization": f"Bearer {address.key}"}
        self.client = httpx.AsyncClient(
            headers={"user-agent": "dsv2"} | headers,
            timeout=httpx.Timeout(SECONDS_OF_SILENCE, connect=SECONDS_TO_CONNECT),
            trust_env=not address.here,  # what is here is not asked for through a proxy
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=32),
        )
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, name="server", daemon=True).start()
        self.name = address.model or ""
        self.context: int | None = None  # tokens that the model holds, where the server says so
        self.counts = True  # until the server turns out not to count tokens

    # What it serves.

    def models(self) -> list[dict[str, Any]]:
        """Its models, each with an id. Raises Dsv2Error."""
        content = self.wait(self.whole("GET", self.address.url + "/models"))
        listed = content.get("data") if isinstance(content, dict) else content
        if not isinstance(listed, list):
            what = f"{self.address.url}/models is no list of models"
            raise Unreachable(what, fix="check the address: it may need a path, as /v1")
        return [each for each in listed if isinstance(each, dict) and isinstance(each.get("id"), str)]

    def choose(self) -> None:
        """Find out which model is meant, where nobody said so, and how much it holds. Raises Dsv2Error."""
        try:
            there = self.models()
        except NotThere:
            raise
        except Dsv2Error:
            if not self.name:
                raise
            return  # there are servers that list none
        if not self.name:
            if len(there) != 1:
                names = ", ".join(each["id"] for each in there[:8]) or "none"
                raise UsageError(
                    f"{self.address.host} serves {len(there)} models", why=names, fix="--model NAME"
                )
            self.name = there[0]["id"]
        self.context = next((context_of(each) for each in there if each["id"] == self.name), None)

    def count(self, messages: list[dict[str, str]]) -> int | None:
        """How many tokens a conversation takes, where the server tells."""
        content = self.tokenized({"messages": messages})
        return number(content.get("count"))

    def ids(self, text: str) -> list[int] | None:
        """The tokens of a text, where the server tells."""
        ids = self.tokenized({"prompt": text, "add_special_tokens": False}).get("tokens")
        return ids if isinstance(ids, list) and all(type(each) is int for each in ids) else None

    def tokenized(self, body: dict[str, Any]) -> dict[str, Any]:
        """What /tokenize says, as vLLM and `dsv2 serve` have it; nothing where there is none."""
        if not self.counts:
            return {}
        root = self.address.url.removesuffix("/v1")
        try:
            asked = self.whole("POST", root + "/tokenize", {"model": self.name} | body, once=True)
            content = self.wait(asked)
        except UsageError as error:  # of this text alone, where it is not that there is no such path
            self.counts = not isinstance(error, Unknown)
            return {}
        except Dsv2Error:
            return {}  # what is asked for next says what is wrong
        self.counts = isinstance(content, dict) and "count" in content
        return content if self.counts else {}

    # Answers.

    def stream(self, call: Call, waiting: Callable[[], object] = lambda: None) -> Iterator[str]:
        """An answer as it comes; the call's result is filled in. `waiting` is told while nothing comes, and
        may raise.

        Raises Dsv2Error for what could not be answered, or not to its end.
        """
        pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        task = asyncio.run_coroutine_threadsafe(self.answer(call, pieces.put), self.loop)
        task.add_done_callback(lambda done: pieces.put(None))
        try:
            while True:
                try:
                    piece = pieces.get(timeout=TICK)
                except queue.Empty:
                    waiting()
                    continue
                if piece is None:
                    break
                yield piece
            task.result()
        finally:
            task.cancel()
            call.result.finish_reason = call.result.finish_reason or "interrupted"

    def in_order(self, calls: Iterable[Call | None], width: int) -> Iterator[Call]:
        """Calls as they are answered, in their order, `width` at once; one that the server refuses says so
        itself. None among them: there is none yet.

        Raises Unreachable and Unknown, after those that were answered.
        """
        source, more = iter(calls), True
        running: deque[tuple[Call, concurrent.futures.Future[None]]] = deque()
        try:
            while more or running:
                open_ones = [task for _, task in running if not task.done()]
                if more and len(open_ones) < width and len(running) < 4 * width:
                    try:
                        call = next(source)
                    except StopIteration:
                        more = False
                        continue
                    if call is not None:
                        task = asyncio.run_coroutine_threadsafe(self.brought_in(call), self.loop)
                        running.append((call, task))
                        continue
                if open_ones and not running[0][1].done():
                    concurrent.futures.wait(open_ones, TICK, concurrent.futures.FIRST_COMPLETED)
                while running and running[0][1].done():
                    call, task = running.popleft()
                    task.result()
                    yield call
        finally:
            for _, task in running:
                task.cancel()

    async def brought_in(self, call: Call) -> None:
        """The whole of an answer, or why there is none. Raises Unreachable, Unknown."""
        if call.error:
            return
        try:
            await self.answer(call)
        except (Unreachable, Unknown):
            raise
        except Dsv2Error as error:
            call.fail(error)

    async def answer(self, call: Call, tell: Callable[[str], object] | None = None) -> None:
        """Ask until it comes through; one that nobody is told of before its end is also asked for again where
        it was cut. Raises Dsv2Error.
        """

        async def one_try() -> None:
            call.result.begin_anew()
            await self.asked(call, tell or (lambda piece: None))

        try:
            await self.tried(one_try, TRIES, lambda: tell is None or not call.result.pieces)
        except Passing as error:
            call.result.finish_reason = "error"
            raise error.lasting(bool(call.result.pieces)) from None

    async def tried(
        self, one_try: Callable[[], Awaitable[T]], tries: int, again: Callable[[], bool] = lambda: True
    ) -> T:
        """What comes of a try, or of one after it. Raises Passing where all failed, or there is not to be
        another.
        """
        number = 1
        while True:
            try:
                return await one_try()
            except Passing as error:
                if number == tries or not again():
                    raise
                await self.pause(error, number)
                number += 1

    async def pause(self, error: Passing, number: int) -> None:
        """Before the next try: as long as the server asks for, or twice as long as before."""
        wait = min(2.0 ** (number - 2), LONGEST_WAIT) if error.wait is None else max(error.wait, 0.1)
        if wait >= 1:
            self.note(f"{self.address.host}: {error.what}; trying again in {wait:.0f} s")
        await asyncio.sleep(wait * random.uniform(1.0, 1.25))

    async def asked(self, call: Call, tell: Callable[[str], object]) -> None:
        """One try. Raises Passing for what may be over soon, Dsv2Error."""
        result, began, body = call.result, time.perf_counter(), call.body(self.name)
        try:
            async with contextlib.aclosing(self.events(self.address.url + call.path, body)) as events:
                async for event in events:
                    if event is None:
                        result.finish_reason = result.finish_reason or "stop"  # some say no more
                        break
                    if piece := taken_in(event, result, call):
                        result.take(piece, began)
                        tell(piece)
        except Passing:
            if not result.finish_reason:
                raise
        result.ended = time.perf_counter()
        if not result.finish_reason:
            raise Passing("its answer broke off")
        if call.request.logprobs is not None and result.pieces and not result.scores:
            raise Dsv2Error(
                "The server gave no log probabilities",
                why="it knows no such field",
                fix="leave --logprobs out",
            )

    async def events(self, url: str, body: dict[str, Any]) -> AsyncGenerator[Any]:
        """Objects of a stream, and None at its end. Raises Passing, Dsv2Error."""
        with_usage = True
        while True:
            with self.trouble():
                async with self.client.stream("POST", url, **sent(body)) as response:
                    if response.status_code != 200:
                        data = await all_of(response)
                        if response.status_code == 400 and with_usage and b"stream_options" in data:
                            body, with_usage = {k: v for k, v in body.items() if k != "stream_options"}, False
                            continue
                        raise self.refused(response, data)
                    if "json" in response.headers.get("content-type", ""):
                        yield parsed(await all_of(response))
                        yield None
                        return
                    async for line in lines_of(response):
                        if line.startswith("data:"):
                            said = line.removeprefix("data:").strip()
                            if said == "[DONE]":
                                yield None
                                return
                            yield parsed(said.encode())
                    return

    async def whole(self, method: str, url: str, body: Any = None, once: bool = False) -> Any:
        """One object for another; asked for `once`, and not long. Raises Dsv2Error."""
        content: dict[str, Any] = {} if body is None else sent(body)
        if once:
            content["timeout"] = SECONDS_TO_CONNECT

        async def one_try() -> Any:
            with self.trouble():
                async with self.client.stream(method, url, **content) as response:
                    data = await all_of(response)
            if response.status_code != 200:
                raise self.refused(response, data)
            return parsed(data)

        try:
            return await self.tried(one_try, 1 if once else TRIES)
        except Passing as error:
            raise error.lasting(False) from None

    def wait(self, coroutine: Any) -> Any:
        """What comes of work in the other thread. Raises what it raises."""
        task = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        try:
            return task.result()
        finally:
            task.cancel()

    # What may go wrong.

    @contextlib.contextmanager
    def trouble(self) -> Iterator[None]:
        """Raises what the network's errors in here mean."""
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            what = f"There is no server at {self.address.url}"
            raise NotThere(what, why=reason(error), fix="start it, or another --api") from None
        except FOR_GOOD as error:
            what = f"{self.address.host} can not be asked"
            raise Unreachable(what, why=reason(error) if str(error) else type(error).__name__) from None
        except httpx.HTTPError as error:
            raise Passing(reason(error) if str(error) else type(error).__name__) from None

    def refused(self, response: httpx.Response, data: bytes) -> Dsv2Error | Passing:
        """What an answer with another status than 200 means."""
        status, url, words = response.status_code, self.address.url, words_of(data)
        if status in AGAIN:
            return Passing(f"it says {status}: {words}", seconds_of(response.headers.get("retry-after")))
        if status in (401, 403):
            fix = "DSV2_API_KEY=... dsv2 ..."
            return Unreachable(f"{self.address.host} does not let us in ({status})", why=words, fix=fix)
        if 300 <= status < 400:
            where = response.headers.get("location", "")[:200]
            return Unreachable(f"{url} sends us elsewhere ({status})", why=where, fix="that as --api")
        if status in (404, 405):
            fix = f"dsv2 models --api {url}"
            return Unknown(f"{url} knows no such path or model ({status})", why=words, fix=fix)
        if status >= 500:
            return Unreachable(f"{url} failed ({status})", why=words)
        return UsageError(f"The server refused this ({status})", why=words)


class Passing(Exception):
    """What may be over when it is tried again, in `wait` seconds if the server says so."""

    def __init__(self, what: str, wait: float | None = None) -> None:
        super().__init__(what)
        self.what, self.wait = what, wait

    def lasting(self, said_something: bool) -> Dsv2Error:
        """The error, once it was tried often enough."""
        if said_something:
            return Dsv2Error("The answer was cut off", why=self.what)
        return Unreachable("The server does not answer", why=self.what, fix="try again later")


OURS = ("interrupted", "error", "deadline")  # reasons that mean something else here


def sent(body: Any) -> dict[str, Any]:
    """A body as httpx takes it. Raises UsageError for halves of characters, which no JSON may hold."""
    try:
        content = json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:
        raise UsageError("This is no text that can be sent", why=reason(error)) from None
    return {"content": content, "headers": {"content-type": "application/json"}}


def taken_in(event: Any, result: Answer, call: Call) -> str:
    """An object of a stream, or a whole answer, into the result; gives its text. Raises Dsv2Error."""
    if not isinstance(event, dict):
        raise Dsv2Error("The server's answer can not be read", why="it is no object")
    if event.get("error"):
        what = "The server gave up on this" if result.pieces else "The server refused this"
        raise Dsv2Error(what, why=words_of(json.dumps(event).encode()))
    if isinstance(event.get("usage"), dict):
        result.told = event["usage"]
    text = ""
    choices = event.get("choices") or []
    if not isinstance(choices, list):
        raise Dsv2Error("The server's answer can not be read", why="its choices are no list")
    for choice in choices:
        if not isinstance(choice, dict) or choice.get("index") not in (0, None):
            continue
        holder = choice.get("delta") or choice.get("message") or choice
        for name in ("content", "text"):
            if isinstance(holder, dict) and isinstance(holder.get(name), str):
                text += holder[name]
        if isinstance(ended := choice.get("finish_reason"), str):
            result.finish_reason = "stop" if ended in OURS else ended
        if call.request.logprobs is not None:
            result.scores += scores_of(choice.get("logprobs"))
    return text


def scores_of(given: Any) -> list[dict[str, Any]]:
    """Log probabilities in either of the protocol's two forms, in ours."""
    if not isinstance(given, dict):
        return []
    if isinstance(content := given.get("content"), list):
        return [
            {
                "token": each.get("token"),
                "logprob": each.get("logprob"),
                "top": [
                    [top.get("token"), top.get("logprob")]
                    for top in list_of(each.get("top_logprobs"))
                    if isinstance(top, dict)
                ],
            }
            for each in content
            if isinstance(each, dict)
        ]
    tokens, logprobs, tops = (given.get(key) or [] for key in ("tokens", "token_logprobs", "top_logprobs"))
    if not all(isinstance(each, list) for each in (tokens, logprobs, tops)):
        return []
    tops += [None] * (len(tokens) - len(tops))
    return [
        {
            "token": token,
            "logprob": logprob,
            "top": [list(pair) for pair in top.items()] if isinstance(top, dict) else [],
        }
        for token, logprob, top in zip(tokens, logprobs, tops, strict=False)
    ]


def list_of(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


async def all_of(response: httpx.Response) -> bytes:
    """The whole body. Raises Dsv2Error for one that is too long."""
    data = bytearray()
    async for block in response.aiter_bytes():
        data += block
        if len(data) > LONGEST_LINE:
            raise Dsv2Error(
                "The server's answer can not be read", why=f"it is longer than {LONGEST_LINE:,} bytes"
            )
    return bytes(data)


async def lines_of(response: httpx.Response) -> AsyncIterator[str]:
    """Lines as they come, which end with LF, CR LF or CR alone. Raises Dsv2Error for one without end."""
    held = bytearray()
    async for block in response.aiter_bytes():
        held += block
        if b"\n" in block or b"\r" in block:
            *lines, rest = bytes(held).replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
            held = bytearray(rest)
            for line in lines:
                yield line.decode(errors="replace")
        if len(held) > LONGEST_LINE:
            raise Dsv2Error("The server's answer can not be read", why="it has a line without end")
    if held:
        yield held.decode(errors="replace")


def parsed(data: bytes) -> Any:
    """Raises Dsv2Error for what is no JSON."""
    try:
        return parse_json(data, mend=True)
    except ValueError as error:
        why = f"{reason(error)}: {data[:80].decode(errors='replace')!r}"
        raise Dsv2Error("The server's answer can not be read", why=why) from None


def words_of(data: bytes) -> str:
    """What a server says of an error, in any of the forms that are in use."""
    try:
        content: Any = parse_json(data, mend=True)
    except ValueError:
        content = data.decode(errors="replace")
    for key in ("error", "message", "detail"):
        while isinstance(content, dict) and content.get(key):
            content = content[key]
    return one_line(content if isinstance(content, str) else json.dumps(content))


def number_in(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() and len(text) < 18 else None


def seconds_of(text: str | None) -> float | None:
    """A Retry-After in seconds; one that is a date is left to the usual pauses."""
    seconds = number_in(text)
    return None if seconds is None else min(float(seconds), LONGEST_WAIT)


def context_of(model: dict[str, Any]) -> int | None:
    """How many tokens a listed model holds, by any of the names that servers have for it."""
    for place in (model, model.get("meta")):
        for name in ("max_model_len", "context_length", "context_window", "n_ctx", "n_ctx_train"):
            if isinstance(place, dict) and (size := number(place.get(name))):
                return size
    return None
