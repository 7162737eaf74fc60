"""What commands do with --api: which server is meant, its model in the place of one of this machine, and what
it can not be asked for.
"""

from __future__ import annotations

import os
import secrets
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from typer._click.globals import get_current_context  # not among what typer exports

from dsv2cli.cli import ui
from dsv2cli.cli.talk import Preparing
from dsv2cli.errors import Dsv2Error, UsageError
from dsv2cli.outside import parse_json, reason

if TYPE_CHECKING:
    from collections.abc import Callable

    from dsv2cli.cli.asking import Asked
    from dsv2cli.cli.options import Sampling
    from dsv2cli.engine.request import Result
    from dsv2cli.remote.calls import Call, ServerRequest
    from dsv2cli.remote.server import Address, Server
    from dsv2cli.run.wish import Wish

KEYS = ("DSV2_API_KEY", "OPENAI_API_KEY")
HERE = "leave it out, or leave --api out and run the model here"


def address_of(api: str, model: str | None) -> Address:
    """The server that --api names, by its address or as a table [servers.NAME] does, with its key. Raises
    UsageError.
    """
    from dsv2cli.cli.config import config_path, read_config
    from dsv2cli.remote.server import Address

    servers = read_config().get("servers", {})
    table = servers.get(api)
    if table is None and "://" not in api and ":" not in api and "." not in api and api != "localhost":
        there = ", ".join(sorted(servers)) or "none"
        why = f"{config_path()} has {there}"
        raise UsageError(
            f"There is no server {api!r}", why=why, fix="--api http://HOST:PORT, or a table [servers.NAME]"
        )
    named = {"url": table} if isinstance(table, str) else table or {}
    key: str | None = None
    if "key-env" in named:
        key = os.environ.get(named["key-env"])
        if not key:
            raise UsageError(f"{named['key-env']} is not set", why=f"[servers.{api}] takes its key from it")
    else:
        key = next((os.environ[name] for name in KEYS if name in os.environ), None) or None
    return Address.of(named.get("url", api), key, model or named.get("model"))


def connect(api: str, model: str | None, note: Callable[[str], object] = ui.note) -> Server:
    """The server that --api names, which nobody has asked anything yet. Raises UsageError."""
    from dsv2cli.remote.server import Server

    address = address_of(api, model)
    if address.open:
        note(f"the key goes to {address.host} unencrypted: https:// would hide it")
    try:
        return Server(address, note)
    except (ValueError, ImportError, OSError) as error:  # of variables that name proxies or certificates
        why = "HTTPS_PROXY, ALL_PROXY, SSL_CERT_FILE and the like are looked at"
        raise UsageError(f"No connection can be made: {reason(error)}", why=why) from None


def refuse_what_is_here(wish: Wish, given: dict[str, bool] | None = None) -> None:
    """Raises UsageError for options that say how a model of this machine runs, and for those `given` that no
    server knows.
    """
    started = "a server runs its model as it was started to"
    asked = {
        f"--{field.name.replace('_', '-')}": (getattr(wish, field.name) != field.default, started)
        for field in fields(wish)
    }
    asked |= {option: (is_given, "there is no field for it") for option, is_given in (given or {}).items()}
    for option, (is_given, why) in asked.items():
        if is_given:
            raise UsageError(f"{option} goes without --api", why=why, fix=HERE)


def request_of(sampling: Sampling, **more: Any) -> ServerRequest:
    """What is asked of a server: the settings that were given, and no others. Raises UsageError."""
    from dsv2cli.engine.request import SamplingParams
    from dsv2cli.remote.calls import ServerRequest

    names = [field.name for field in fields(SamplingParams)] + ["seed"]
    chosen = {name: getattr(sampling, name) for name in names if getattr(sampling, name) is not None}
    if typed("max_new_tokens"):
        chosen["max_new_tokens"] = sampling.max_new_tokens
    most, stop, seed = sampling.max_new_tokens, sampling.stops(), secrets.randbits(32)
    request = ServerRequest(max_new_tokens=most, stop=stop, seed=seed, **more)
    return request.having(**chosen)


def typed(parameter: str) -> bool:
    """Whether somebody gave an option of the command that runs, wherever they did."""
    source = get_current_context().get_parameter_source(parameter)
    return source is not None and source.name != "DEFAULT"


class There:
    """A model behind a server, as `dsv2 complete` asks it."""

    has_text = True

    def __init__(self, server: Server) -> None:
        self.server = server

    def job_of(self, asked: Asked, request: ServerRequest) -> Call:
        from dsv2cli.remote.calls import Call

        return Call(asked.given, request)

    def job(self, key: str, prompt: Any, request: ServerRequest) -> Call:
        from dsv2cli.remote.calls import Call

        return Call({"messages" if key == "messages" else "prompt": prompt}, request)

    def bad(self, request: ServerRequest, error: str) -> Call:
        from dsv2cli.remote.calls import Call

        return Call({"prompt": ""}, request, error=error)

    def stream(self, job: Call) -> Iterator[str]:
        return self.server.stream(job)

    def samples(self, jobs: list[Call]) -> Iterator[Call]:
        return self.server.in_order(jobs, len(jobs))

    def in_order(self, jobs: Iterable[Call | None], width: int) -> Iterator[Call]:
        return self.server.in_order(jobs, width)

    def mark(self) -> str:
        return repr((self.server.address.url, self.server.name))

    def report(
        self, job: Call, asked: Asked | None = None, echo: bool = False, error: str = ""
    ) -> dict[str, Any]:
        """As of a model of this machine, with null for what a server does not tell."""
        result, told = job.result, job.result.counted
        return {
            "text": result.text if asked is None else asked.around(result.text, echo),
            "prompt_ids": None,
            "token_ids": None,
            "finish_reason": result.finish_reason or "error",
            "logprobs": None if job.request.logprobs is None else result.scores,
            "prompt_logprobs": None,
            "usage": {
                "prompt_tokens": result.prompt_length if told else None,
                "generated_tokens": result.length if told else None,
                "reused_tokens": result.cached,
            },
            "timing": {
                "load_seconds": None,
                "ttft_seconds": result.ttft_seconds,
                "prefill_tokens_per_second": None,
                "decode_tokens_per_second": result.decode_tokens_per_second if told else None,
            },
            "seed": job.request.seed if "seed" in job.request.given else None,
            "model": self.server.name,
        } | ({"error": error} if error else {})


class ServerModel(Preparing):
    """A model behind a server, as a talk has it: see talk.Model."""

    def __init__(self, server: Server) -> None:
        super().__init__()
        self.server = server
        self.counted: deque[tuple[list[dict[str, str]], int | None]] = deque(maxlen=8)

    @property
    def name(self) -> str:
        return self.server.name or self.server.address.host

    @property
    def place(self) -> str:
        return self.server.address.url

    @property
    def limit(self) -> int | None:
        return self.server.context

    held_bytes, counts_at_once = None, False

    def prepare(self) -> None:
        self.server.choose()

    def session(self, stop: threading.Event) -> ServerModel:
        self.wait(stop)
        return self

    def result(self) -> Result:
        from dsv2cli.remote.calls import Answer

        return Answer()

    def reply(
        self,
        messages: list[dict[str, str]],
        request: Any,
        result: Any,
        start: str = "",
        reading: Callable[[int, int], None] = lambda done, total: None,
    ) -> Iterator[str]:
        """The answer as it comes. Raises Dsv2Error, UsageError for one that is to be gone on with."""
        from dsv2cli.remote.calls import Call

        if start:
            why = "a server begins each answer anew"
            raise UsageError("/continue goes without --api", why=why, fix="/retry, or ask it to go on")
        call = Call({"messages": messages}, request, result)
        yield from self.server.stream(call, waiting=lambda: reading(0, 0))

    def count(self, messages: list[dict[str, str]]) -> int | None:
        if self.limit is None or not self.ready.is_set() or self.failure is not None:
            return None
        if messages not in [known for known, _ in self.counted]:
            self.counted.append((messages, self.server.count(messages)))
        return next(count for known, count in self.counted if known == messages)

    def length(self, text: str) -> int | None:
        return None  # each look at what is typed would be a request

    def ids(self, text: str) -> list[int]:
        ids = self.server.ids(text)
        if ids is None:
            raise UsageError("/tokens TEXT goes without --api", why="this server does not tell its tokens")
        return ids

    def check(self, *texts: str) -> None:
        from dsv2cli.remote.server import sent

        sent(texts)  # what is too long is for the server to refuse

    def remember(self, path: Any) -> str:
        return ""

    def keep(self, path: Any) -> None:
        pass

    def complaint(self) -> Dsv2Error | None:
        return None


def schema_of(text: str | None, chat: bool) -> Any:
    """What --json-schema holds. Raises UsageError for what is no JSON, or where no field asks for it."""
    if text is None:
        return None
    if not chat:
        why = "the protocol knows a schema for the answer to a message only"
        raise UsageError("--json-schema goes with --chat here", why=why, fix="--chat")
    try:
        return parse_json(text)
    except ValueError as error:
        raise UsageError("--json-schema is no JSON", why=reason(error)) from None
