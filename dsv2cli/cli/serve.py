"""`dsv2 serve`: a model for other programs, by OpenAI's protocol."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsv2cli.cli import offer, ui
from dsv2cli.cli import options as opt
from dsv2cli.errors import Dsv2Error, UsageError
from dsv2cli.outside import reason
from dsv2cli.run.wish import CompleteWish
from dsv2cli.serve.door import LOCAL, Door

if TYPE_CHECKING:
    from dsv2cli.checkpoint.tokenizer import Tokenizer
    from dsv2cli.run.open import Opened
    from dsv2cli.serve.app import Server


@dataclass(frozen=True)
class Place:
    """Where it listens, and to whom."""

    heading = "Where it listens, and to whom"

    model: opt.ModelOption = None
    yes: opt.YesOption = False
    host: Annotated[
        str, typer.Option(help="Address to listen at. Any but this machine's own needs --api-key.")
    ] = "127.0.0.1"
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="DSV2_API_KEY",
            help="Key that clients must send. Better in DSV2_API_KEY: others see the command line.",
        ),
    ] = None
    no_auth: Annotated[
        bool, typer.Option("--no-auth", help="Let whoever reaches the address in, without a key.")
    ] = False
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="Web page elsewhere that may use it; may be given several times."),
    ] = None
    name: Annotated[
        str | None, typer.Option(help="What the model is called. Default: its folder's or repository's name.")
    ] = None

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach it."""
        return self.host in LOCAL

    def door(self, most_bytes: int) -> Door:
        """Who may come in. Raises UsageError where that would be anybody, and nobody has said so."""
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.strip()):
            raise UsageError("--api-key can not be used", why="it is empty, or not plain ASCII")
        if not self.loopback and not self.api_key and not self.no_auth:
            why = f"whoever reaches {self.host} could use the model, and read what others are told"
            raise UsageError("No key is asked for", why=why, fix="DSV2_API_KEY=... dsv2 serve, or --no-auth")
        for origin in self.allow_origin or []:
            if not origin.startswith(("http://", "https://")) or origin.rstrip("/").count("/") != 2:
                fix = "--allow-origin https://chat.example.org"
                raise UsageError(f"--allow-origin {origin[:80]} is no origin", fix=fix)
        origins = tuple(origin.rstrip("/") for origin in self.allow_origin or [])
        hosts = LOCAL if self.loopback and not self.api_key else ()
        return Door((self.api_key,) if self.api_key else (), hosts, origins, most_bytes)


@dataclass(frozen=True)
class Limits:
    """How much is done at once, and for how long."""

    heading = "Limits"

    concurrency: Annotated[int, typer.Option(min=1, help="Answers that are made at once.")] = 16
    queue: Annotated[int, typer.Option(min=0, help="Requests that may wait; more are answered with 429.")] = (
        64
    )
    max_seconds: Annotated[
        float | None, typer.Option(min=0.1, help="Longest that an answer may take. Default: no limit.")
    ] = None
    max_body_mb: Annotated[int, typer.Option(min=1, help="Largest request, in MB.")] = 32
    grace: Annotated[
        int, typer.Option(min=0, help="Seconds that open answers get when the server is to end.")
    ] = 20


@opt.unfolded
def serve(place: Place, limits: Limits, wish: CompleteWish) -> None:
    """Serve a model to other programs, by OpenAI's API.

    Listens on this machine alone unless it is told otherwise. Ctrl-C or SIGTERM ends it when open answers are
    done.
    """
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        fix = 'pip install "dsv2cli[serve]"'
        raise Dsv2Error("Serving needs some more packages", why=str(error), fix=fix) from None

    door = place.door(limits.max_body_mb * 2**20)
    checkpoint = offer.find(place.model, place.yes)
    tokenizer = checkpoint.tokenizer()  # says what is missing before the model is loaded
    listening = listen(place.host, place.port)
    with listening:
        opened = opt.open_model(place.model, wish, found=checkpoint)
        server = server_of(place, limits, opened, tokenizer, door)
        host = f"[{place.host}]" if ":" in place.host else place.host
        address = f"http://{host}:{listening.getsockname()[1]}"
        ui.stderr().print(f"listening on {address} (Ctrl-C ends it)")
        asyncio.run(run(server, listening, limits.grace))
        opt.close_store(opened)


def server_of(place: Place, limits: Limits, opened: Opened, tokenizer: Tokenizer, door: Door) -> Server:
    """What answers, with a thread that runs the model."""
    from dsv2cli.engine.scheduler import Scheduler
    from dsv2cli.serve.app import Server
    from dsv2cli.serve.desk import Desk
    from dsv2cli.serve.openai import Model

    request = opt.Sampling(max_new_tokens=1).request(opened)
    short = os.path.basename(opened.name.rstrip("/")) or opened.name
    names = list(dict.fromkeys([place.name or short, short, opened.name]))

    def make() -> Scheduler:
        return Scheduler(opened.runner, tokenizer, limits.concurrency, store=opened.store)

    return Server(
        Model(opened, tokenizer, request, names), Desk(make, limits.queue), door, limits.max_seconds
    )


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises UsageError where that can not be."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen(128)
        except OSError:
            listening.close()
            raise
    except (OSError, UnicodeError) as error:
        why, fix = reason(error), "another --port, or --port 0 for a free one"
        raise UsageError(f"Nothing can listen at {host}:{port}", why=why, fix=fix) from None
    return listening


async def run(
    server: Server, listening: socket.socket, grace: int, stop: asyncio.Event | None = None
) -> None:
    """Answer until a signal comes, or `stop`, and then for `grace` seconds what is open."""
    import uvicorn

    class Quiet(uvicorn.Server):
        """Signals are ours to take."""

        def capture_signals(self) -> Any:
            return contextlib.nullcontext()

    settings = uvicorn.Config(
        server.app(),
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=grace,
    )
    web = Quiet(settings)

    def end() -> None:
        web.force_exit = web.should_exit  # the second time at once
        web.should_exit = True

    async def end_with(stop: asyncio.Event) -> None:
        await stop.wait()
        end()

    loop = asyncio.get_running_loop()
    numbers = () if stop is not None else (signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        loop.add_signal_handler(number, end)
    ending = None if stop is None else asyncio.create_task(end_with(stop))
    try:
        await web.serve(sockets=[listening])
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
        if ending is not None:
            ending.cancel()
        await asyncio.to_thread(server.desk.close)
