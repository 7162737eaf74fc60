"""`dsv2 chat`: a conversation, at a prompt or line by line from a pipe."""

from __future__ import annotations

import functools
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsv2cli.cli import offer, ui
from dsv2cli.cli import options as opt
from dsv2cli.cli.config import PresetOption
from dsv2cli.errors import Dsv2Error, UsageError
from dsv2cli.outside import path_of, read_text, reason
from dsv2cli.run.wish import KeepingWish, Wish

if TYPE_CHECKING:
    from dsv2cli.checkpoint.found import Checkpoint
    from dsv2cli.cli.talk import Model, Screen, Talk
    from dsv2cli.engine.request import Request


@dataclass(frozen=True)
class Conversation:
    """With which model, and how it begins and ends."""

    heading = opt.TO_RUN

    first: Annotated[
        str | None, typer.Argument(metavar="MESSAGE", help="The first message; then the prompt.")
    ] = None
    model: opt.ModelOption = None
    yes: opt.YesOption = False
    api: opt.ApiOption = None
    system: Annotated[str | None, typer.Option(help="System prompt for the whole conversation.")] = None
    system_file: Annotated[Path | None, typer.Option(help="File that holds the system prompt.")] = None
    resume: Annotated[
        str | None,
        typer.Option(
            autocompletion=opt.sessions, help="Go on with a saved session, or with a JSON list of messages."
        ),
    ] = None
    go_on: Annotated[
        bool,
        typer.Option("--continue", "-c", envvar="DSV2_CHAT_CONTINUE", help="Go on with the latest session."),
    ] = False
    no_save: Annotated[
        bool, typer.Option("--no-save", help="Keep neither the conversation nor what is typed.")
    ] = False
    on_overflow: Annotated[
        opt.Overflow,
        typer.Option(
            help="When the context is full: drop or summarise the oldest turns, or stop. From a pipe, ask is "
            "stop."
        ),
    ] = "ask"
    preset: PresetOption = None

    def system_prompt(self) -> str | None:
        """As it is given, or what the file holds. Raises UsageError for both, or a file
        that can not be read.
        """
        if self.system_file is None:
            return self.system
        return read_system(self.system_file, self.system)


@dataclass(frozen=True)
class Sampling(opt.Sampling):
    """The same with longer answers."""

    max_new_tokens: opt.MaxTokensOption = 2048


@dataclass(frozen=True)
class Output:
    """How answers are shown."""

    heading = opt.OUTPUT

    plain: Annotated[
        bool, typer.Option("--plain", help="Show Markdown as it is written. NO_COLOR does so, too.")
    ] = False
    json: Annotated[
        bool,
        typer.Option(
            "--json", help="Each line of stdin is a JSON list of messages, each answer a JSON object."
        ),
    ] = False


@opt.unfolded
def chat(conversation: Conversation, sampling: Sampling, output: Output, wish: KeepingWish) -> None:
    """Talk with the model, at a prompt or line by line.

    From a pipe, each line is a turn and only the answers are printed.
    """
    from dsv2cli.cli.commands import find as find_talk

    # What is wrong is said before anything is loaded.
    system = conversation.system_prompt()
    at_terminal = sys.stdin is not None and sys.stdin.isatty()
    screen, run = at_prompt(output.plain, not conversation.no_save) if at_terminal else (None, None)
    model, request = answering(conversation, sampling, wish, screen)
    path = None
    if conversation.resume is not None:
        path = find_talk(conversation.resume)
    elif conversation.go_on:
        path = latest()
    if screen is None or run is None:
        from_pipe(conversation, output, model, request, system, path)
        return
    keep = not conversation.no_save
    talk = begun(model, request, screen, conversation.on_overflow, keep)
    if path is not None:
        go_on(talk, path, keep)
    if system is not None:
        talk.set_system(system)
    code = run(talk, conversation.first)
    if code:
        raise typer.Exit(code)


def answering(
    conversation: Conversation, sampling: Sampling, wish: KeepingWish, screen: Screen | None
) -> tuple[Model, Request]:
    """What is to answer, which nobody waits for yet, and how it is asked. `screen` shows how it loads, where
    that is a terminal's. Raises Dsv2Error.
    """
    if conversation.api is not None:
        from dsv2cli.cli import far

        far.refuse_what_is_here(wish)
        server = far.connect(conversation.api, conversation.model, ui.note if screen is None else screen.note)
        return far.ServerModel(server), far.request_of(sampling)

    from dsv2cli.cli.talk import LoadedModel

    checkpoint = offer.find(conversation.model, conversation.yes)
    request = sampling.request(checkpoint)
    glance(checkpoint, wish)
    shown = ui if screen is None else screen
    load = functools.partial(opt.open_model, conversation.model, wish, found=checkpoint, screen=shown)
    return LoadedModel(checkpoint, load), request


def read_system(path: Path, system: str | None) -> str:
    """The system prompt in a file. Raises UsageError where one is given besides, or the
    file can not be read.
    """
    if system is not None:
        raise UsageError("Both --system and --system-file are given", fix="leave one of them out")
    try:
        return read_text(path_of(path), pipes=True).strip()
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} can not be read", why=reason(error), fix="--system-file PATH") from None


def begun(model: Model, request: Request, screen: Screen, on_overflow: opt.Overflow, keep: bool) -> Talk:
    """A talk in which nothing has been said."""
    from dsv2cli.cli.talk import Talk
    from dsv2cli.engine import journal

    talk = Talk(model, request, screen, journal.new(None, screen.show_error), on_overflow)
    talk.at_first = request
    talk.begin(keep)
    return talk


def glance(checkpoint: Checkpoint, wish: Wish) -> None:
    """Raises UsageError for what was asked and is not there, as far as that is known without looking long."""
    from dsv2cli import device

    if wish != type(wish)() and not device.may_be_there():
        from dsv2cli.run import machine
        from dsv2cli.run.plan import make_plan

        kernels_may_be_there = replace(machine.look_around(), cpu_kernels=lambda target: (target, ""))
        if not wish.placed:
            make_plan(checkpoint.config, wish, kernels_may_be_there)


def latest() -> Path | None:
    """The talk to go on with, where there is one."""
    from dsv2cli.cli import commands

    path = commands.latest(ui.note)
    if path is None:
        ui.note("there is no saved session yet: this is a new one")
    return path


def go_on(talk: Talk, path: Path, keep: bool) -> None:
    """Resume a talk; one that is open elsewhere on a branch of its own, or only read, as the person says.

    Raises typer.Exit where it was only to be read, Locked where the person wants neither.
    """
    from dsv2cli.cli import commands
    from dsv2cli.engine.journal import Locked

    try:
        talk.resume(path, keep)
    except Locked as error:
        ui.show_error(error)
        sys.stderr.write("Go on here on a branch of it, or read it, or neither? [b/r/N] ")
        sys.stderr.flush()
        answer = sys.stdin.readline().strip().lower()[:1]
        if answer == "b":
            talk.resume(path, keep, shared=True)
        elif answer == "r":
            talk.resume(path, keep=False)
            commands.history(talk, "")
            raise typer.Exit from None
        else:
            raise


def at_prompt(plain: bool, keep: bool) -> tuple[Screen, Callable[[Talk, str | None], int]]:
    """The screen of a terminal, and what runs a talk on it; line by line where it can not move its cursor."""
    if os.environ.get("TERM", "dumb") in ("dumb", "unknown", "") or not sys.stderr.isatty():
        from dsv2cli.cli.typewriter import Typewriter

        typewriter = Typewriter()
        return typewriter, typewriter.run
    from dsv2cli.cli.prompt import Terminal

    terminal = Terminal(plain, keep_history=keep)
    return terminal, terminal.run


def from_pipe(
    conversation: Conversation,
    output: Output,
    model: Model,
    request: Request,
    system: str | None,
    path: Path | None,
) -> None:
    """A line, a turn; or with --json a list of messages, and its answer. Raises typer.Exit where one of these
    had none.
    """
    from dsv2cli.cli.typewriter import Typewriter

    screen = Typewriter()
    on_overflow = "stop" if conversation.on_overflow == "ask" else conversation.on_overflow
    talk = begun(model, request, screen, on_overflow, keep=False)
    if path is not None:
        talk.resume(path, keep=False)
        talk.cache_of = path.stem
    if system is not None:
        talk.set_system(system)
    # No template, no model, or no server: said before the first word.
    if conversation.api is None:
        talk.count([{"role": "user", "content": ""}])
    talk.model.run()
    talk.model.session(talk.stop)
    lines = ui.stdin_lines()
    if output.json:
        answer_json(talk, lines)
        return
    for line in itertools.chain([conversation.first] if conversation.first else [], lines):
        if line.strip():
            talk.say(line)
            if talk.result is not None and talk.result.finish_reason == "interrupted":
                raise KeyboardInterrupt
            if talk.draft:  # no word of an answer, but its line
                ui.emit("\n")
                talk.draft = ""


def answer_json(talk: Talk, lines: Iterator[str]) -> None:
    """Conversations in, the next message of the assistant out; a line that is none gets an object with its
    error.

    Raises typer.Exit with the code of the first error, at the end.
    """
    code = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            ui.write_json(next_message(talk, line))
        except Dsv2Error as error:
            ui.write_json({"line": number, "error": error.sentence})
            code = code or error.exit_code
    if code:
        raise typer.Exit(code)


def next_message(talk: Talk, line: str) -> dict[str, Any]:
    """The answer to a JSON list of messages, which stand behind the talk so far where they begin with no
    system prompt.

    Raises UsageError.
    """
    from dsv2cli.engine import store

    messages = store.parse_messages(line)
    if messages[-1]["role"] != "user":
        raise UsageError("The last message is not the user's", why="there is nothing to answer")
    start = [] if messages[0]["role"] == "system" else talk.journal.messages()
    result = talk.model.result()
    whole = talk.fitting([*start, *messages])
    request = replace(talk.request, seed=talk.seed_of(sum(each["role"] == "assistant" for each in whole)))
    session = talk.model.session(talk.stop)
    talk.remember()
    answer = "".join(session.reply(whole, request, result))
    usage = {
        "prompt_tokens": result.prompt_length,
        "generated_tokens": result.length,
        "reused_tokens": result.cached,
    }
    return {"role": "assistant", "content": answer, "finish_reason": result.finish_reason, "usage": usage}
