"""Chat templates, which are programs of whoever made a checkpoint: found in its files, and run within limits.

A template that is not known here runs in a process of its own, with little time and memory, and in jinja's
sandbox. What transformers gives to templates besides (tojson, raise_exception, strftime_now, loop controls)
is here in a few lines, because importing transformers takes a second.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import resource
import select
import subprocess
import sys
import threading
import time
import traceback
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from dsv2cli.errors import Dsv2Error
from dsv2cli.outside import AGAIN, read_json, reason, text_of

SECONDS = 5
SECONDS_TO_START = 60  # of a process for templates, on a busy machine
SPARE = 512 * 2**20  # bytes that a template may take
LONGEST = 64 * 2**20  # bytes of what it may give
# What the process for templates runs; the folder of the package is its last argument.
START = (
    "import sys; sys.path.append(sys.argv.pop()); "
    "from dsv2cli.checkpoint.template import answer_requests; answer_requests()"
)
# SHA-256 of templates that are known to be harmless: DeepSeek-V2-Lite-Chat's, which the embedded model has
# too.
KNOWN = frozenset(["8aeba567270fa9a8d5372caf4b04affea947c4421d96adc01e3ff94021b0ae8e"])


def find_template(folder: Path, settings: dict[str, Any]) -> str | None:
    """The template in any of the places and forms that are in use, or None.

    A file of its own (.jinja or .json) comes before the entry of tokenizer_config.json; of several named ones
    `default` or else the first is taken. Raises Dsv2Error for what is no text.
    """
    file = folder / "chat_template.jinja"
    if os.path.lexists(file):
        return text_of(file)
    source = folder / "chat_template.json"
    template = read_json(source, dict).get("chat_template")
    if template is None:
        source, template = folder / "tokenizer_config.json", settings.get("chat_template")
    if isinstance(template, list):
        entries = [each for each in template if isinstance(each, dict)]
        template = {
            each.get("name"): each.get("template") for each in entries if isinstance(each.get("name"), str)
        }
    if isinstance(template, dict):
        template = template.get("default", next(iter(template.values()), None))
    if template is not None and not isinstance(template, str):
        raise Dsv2Error(f"{source}: chat_template is no text", why="nor a list of named ones", fix=AGAIN)
    return template or None


def render(template: str, messages: list[dict[str, str]], bos: str, eos: str) -> str:
    """The conversation as the template writes it, ending where the answer begins. Raises Dsv2Error."""
    values = {"messages": messages, "bos_token": bos, "eos_token": eos, "add_generation_prompt": True}
    if hashlib.sha256(template.encode()).hexdigest() in KNOWN:
        return compiled(template).render(values)
    said = renderer().render(template, values)
    if "text" not in said:
        raise Dsv2Error("The chat template rejected this conversation", why=said["error"])
    return str(said["text"])


@functools.cache
def compiled(template: str) -> Any:
    """The template in a sandbox, with what transformers gives to templates. Raises jinja2.TemplateError."""
    from jinja2.exceptions import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: object) -> NoReturn:
        raise TemplateError(str(message))

    def tojson(value: object, ensure_ascii: bool = False, **layout: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **layout)

    world = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    world.filters["tojson"] = tojson
    world.globals["raise_exception"] = raise_exception
    world.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return world.from_string(template)


def attempt(template: str, values: dict[str, Any]) -> dict[str, str]:
    """What comes of a template: its text, or why there is none, with the line where it went wrong."""
    try:
        return {"text": compiled(template).render(values)}
    except Exception as error:  # a template may do whatever a program may
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == "<template>"]
        line = getattr(error, "lineno", None) or (lines[-1] if lines else None)
        what = reason(error) if str(error) else type(error).__name__
        return {"error": what if line is None else f"{what} (line {line} of the template)"}


class Renderer:
    """A process that runs templates within limits, for as long as this one asks it to.

    It is started afresh and not forked: this process may have many threads, and more memory than a fork of it
    could have. It ends with its input. One that gave an error, or nothing in time, is replaced.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None

    def render(self, template: str, values: dict[str, Any]) -> dict[str, str]:
        """What `attempt` gives there, or why it was stopped. Raises Dsv2Error where no process starts."""
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                self.process = self.start()
            said: dict[str, str] = {"error": "it took too much memory or time"}
            try:
                assert self.process.stdin is not None and self.process.stdout is not None
                self.process.stdin.write(json.dumps([template, values]).encode() + b"\n")
                self.process.stdin.flush()
                said = line_within(self.process.stdout.fileno(), SECONDS) or said
            except BrokenPipeError:
                pass
            finally:  # also where Ctrl-C came between
                if "text" not in said:
                    self.end()
            return said

    def start(self) -> subprocess.Popen[bytes]:
        program = [sys.executable, "-P", "-c", START, str(Path(__file__).parents[2])]
        try:
            process = subprocess.Popen(
                program,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is not for it
            )
        except OSError as error:
            raise Dsv2Error("The chat template could not be run", why=reason(error)) from None
        assert process.stdout is not None
        greeting: object = None
        try:
            greeting = line_within(process.stdout.fileno(), SECONDS_TO_START)
        finally:  # also where Ctrl-C came between
            if greeting != {}:
                process.kill()
                process.communicate()
        if greeting != {}:
            raise Dsv2Error("The chat template could not be run", why="its process does not start")
        return process

    def end(self) -> None:
        """Without the process, until there is a template to render."""
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.communicate()


@functools.cache
def renderer() -> Renderer:
    return Renderer()


os.register_at_fork(after_in_child=renderer.cache_clear)  # else two would talk to one process


def line_within(pipe: int, seconds: float) -> dict[str, str] | None:
    """The object in one line from a process, None if it ends before, or an error in words."""
    limit, told, ready = time.monotonic() + seconds, bytearray(), select.poll()
    ready.register(pipe, select.POLLIN)
    while ready.poll(1000 * max(0.0, limit - time.monotonic())):
        block = os.read(pipe, 2**20)
        told += block
        if len(told) > LONGEST:
            return {"error": f"what it gives is longer than {LONGEST:,} bytes"}
        if not block:
            return None
        if block.endswith(b"\n"):
            answer: dict[str, str] = json.loads(told)
            return answer
    return {"error": f"it takes longer than {seconds} seconds"}


def answer_requests() -> None:
    """The life of the process for templates: a line with a template and its values comes, a line goes."""
    import jinja2.sandbox  # noqa: F401  # which takes longer than most templates

    print("{}", flush=True)
    for line in sys.stdin.buffer:
        template, values = json.loads(line)
        # The clock of whoever waits comes first, and says so; this is for a process that nobody waits for.
        limit(resource.RLIMIT_CPU, int(time.process_time()) + SECONDS + 2)
        if os.path.exists("/proc/self/statm"):  # where it does not, time is the only limit
            held = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            limit(resource.RLIMIT_AS, held + SPARE)
        print(json.dumps(attempt(template, values)), flush=True)
        limit(resource.RLIMIT_AS, resource.RLIM_INFINITY)  # the next conversation is read without it


def limit(which: int, amount: int) -> None:
    """At most `amount`, or what this process is allowed at all."""
    hard = resource.getrlimit(which)[1]
    capped = amount if hard == resource.RLIM_INFINITY else hard if amount < 0 else min(amount, hard)
    resource.setrlimit(which, (capped, hard))
