"""`dsv2 serve` within the tests' own process, and who asks it."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import threading

from dsv2cli.checkpoint.found import find
from dsv2cli.cli.options import Sampling
from dsv2cli.cli.serve import listen, run
from dsv2cli.engine.scheduler import Scheduler
from dsv2cli.serve.app import Server
from dsv2cli.serve.desk import Desk
from dsv2cli.serve.door import Door
from dsv2cli.serve.openai import Model

HELLO = [{"role": "user", "content": "Hello"}]
GREEDY = {"temperature": 0, "max_tokens": 12}


class Client:
    """Asks one server."""

    def __init__(self, port, **headers):
        self.port, self.headers = port, headers

    def open(self, method, path, body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        given = {name.replace("_", "-"): value for name, value in (self.headers | headers).items()}
        connection.request(method, path, data, {"content-type": "application/json"} | given)
        return connection, connection.getresponse()

    def ask(self, method, path, body=None, **headers):
        """Status, headers and what the body holds."""
        connection, response = self.open(method, path, body, **headers)
        text = response.read()
        connection.close()
        is_json = (response.headers.get("content-type") or "").startswith("application/json")
        return response.status, response.headers, json.loads(text) if is_json else text.decode()

    def post(self, path, status=200, **body):
        found, _, content = self.ask("POST", path, body)
        assert found == status, content
        return content

    def chat(self, **body):
        return self.post("/v1/chat/completions", **({"messages": HELLO} | GREEDY | body))

    def complete(self, **body):
        return self.post("/v1/completions", **({"prompt": "Once upon a time"} | GREEDY | body))

    def lines(self, path, **body):
        """The events of a stream."""
        connection, response = self.open("POST", path, {"stream": True} | body)
        assert response.status == 200 and response.headers["content-type"].startswith("text/event-stream")
        text = response.read().decode()
        connection.close()
        return [line for line in text.split("\n\n") if line]

    def named(self, path, **body):
        """The objects of a stream whose events have names, which they say inside, too."""
        out = []
        for line in self.lines(path, **body):
            name, data = line.split("\n")
            out.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {out[-1]['type']}"
        return out

    def events(self, path, **body):
        """All objects of a stream, which ends as it should."""
        lines = self.lines(path, **(GREEDY | body))
        assert all(line.startswith("data: ") for line in lines) and lines.pop() == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines]


@contextlib.contextmanager
def servers(runner, tokenizer):
    """Starts servers of the embedded model; gives each with its client."""
    ends = []

    def start_server(door=None, width=4, waiting=8, seconds=None):
        checkpoint = find(None)
        model = Model(checkpoint, tokenizer, Sampling().request(checkpoint), ["embedded", "other-name"])
        desk = Desk(lambda: Scheduler(runner, tokenizer, width), waiting)
        server = Server(model, desk, door or Door(), seconds)
        listening, loop = listen("127.0.0.1", 0), asyncio.new_event_loop()
        ready, stop = threading.Event(), asyncio.Event()

        async def serve():
            ready.set()
            task = asyncio.create_task(run(server, listening, 1, stop))
            await task

        thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
        thread.start()
        ready.wait()
        ends.append((loop, stop, thread, listening))
        return server, Client(listening.getsockname()[1])

    yield start_server
    for loop, stop, thread, listening in ends:
        loop.call_soon_threadsafe(stop.set)
        thread.join(30)
        assert not thread.is_alive()
        listening.close()
        loop.close()
