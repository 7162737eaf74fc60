"""`dsv2 chat`: a conversation, at a prompt or line by line from a pipe."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dsv2cli.cli import options as opt
from dsv2cli.cli import ui
from dsv2cli.cli.config import PresetOption
from dsv2cli.errors import Dsv2Error, UsageError
from dsv2cli.outside import path_of, read_text, reason
from dsv2cli.run.wish import Wish

if TYPE_CHECKING:
    from dsv2cli.checkpoint.tokenizer import Message
    from dsv2cli.cli.commands import Talk

HINT = "Enter sends, Alt-Enter starts a new line, Ctrl-C stops an answer, /help shows more, Ctrl-D leaves."
SPARE = 256  # tokens kept free for an answer when old turns are dropped


@dataclass(frozen=True)
class Conversation:
    """With which model, and how it begins and ends."""

    heading = opt.TO_RUN

    model: opt.ModelOption = None
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
def chat(conversation: Conversation, sampling: Sampling, output: Output, wish: Wish) -> None:
    """Talk with the model, at a prompt or line by line.

    From a pipe, each line is a turn and only the answers are printed.
    """
    system = conversation.system_prompt()
    opened = opt.open_model(conversation.model, wish)
    request = sampling.request(opened)

    from dsv2cli.cli import commands
    from dsv2cli.engine.session import Session

    session = Session(opened.runner, opened.tokenizer(), system)
    # No template: say so before the first word.
    session.tokenizer.encode_chat([{"role": "user", "content": ""}])
    interactive, keep = sys.stdin is not None and sys.stdin.isatty(), not conversation.no_save
    talk = commands.Talk(session, opened, request, saving=interactive and keep, plain=output.plain)
    if conversation.resume or conversation.go_on:
        talk.resume(commands.find(conversation.resume or "last"))
        if system is not None:
            session.set_system(system)
    if interactive:
        converse(talk, conversation.on_overflow, keep_history=keep)
        return
    start = list(session.messages)
    for line in ui.stdin_lines():
        if line.strip() and output.json:
            answer_json(talk, start, line, conversation.on_overflow)
        elif line.strip():
            answer(talk, line, conversation.on_overflow, keep_going=False)


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


def converse(talk: Talk, on_overflow: opt.Overflow, keep_history: bool) -> None:
    """At a prompt: an error or Ctrl-C ends an answer or a command, never the conversation."""
    from dsv2cli.cli import commands
    from dsv2cli.cli.prompt import typed

    ui.note(f"{talk.opened.name} · {HINT}")
    try:
        for line in typed(talk, keep_history):
            message: str | None = line
            try:
                if line.startswith("/"):
                    message = commands.carry_out(talk, line.strip())
                    if message is not None:  # one that was typed is kept already
                        talk.save(pending=talk.attached + message)
                if message is not None:
                    answer(talk, talk.attached + message, on_overflow, keep_going=True)
            except Dsv2Error as error:
                ui.show_error(error)
            except KeyboardInterrupt:
                ui.note("stopped")
    except commands.Leave:
        pass
    finally:
        talk.save_cache()


def answer(talk: Talk, text: str, on_overflow: opt.Overflow, keep_going: bool) -> None:
    """Stream one answer.

    With `keep_going` Ctrl-C ends the answer only, and the conversation is saved around it.
    """
    from dsv2cli.cli.flow import terminal_flow
    from dsv2cli.engine.request import Result

    talk.session.tokenizer.refuse_too_long(text)
    make_room(talk, text, on_overflow)
    result, flow = Result(), terminal_flow(talk.plain)
    pieces = talk.session.reply(text, talk.request, result)
    try:
        for piece in pieces:
            ui.emit(flow.feed(piece))
    except KeyboardInterrupt:
        if not keep_going:
            raise
    finally:
        pieces.close()  # type: ignore[attr-defined]
        talk.save()
    ui.emit(flow.end() + "\n")
    talk.result, talk.attached = result, ""
    if not keep_going:
        return
    if not result.text.strip():
        ui.note("no answer; your message was taken back")
    limit = talk.opened.runner.config.max_position_embeddings
    if len(result.prompt_ids) + len(result.tokens) >= limit:
        ui.note(f"the context of {limit:,} tokens is full")
    ui.note(opt.stats_line(result))


def make_room(talk: Talk, text: str, on_overflow: opt.Overflow) -> None:
    """Where `text` leaves too little of the context for an answer, do what was chosen about the turns before
    it.
    """
    session, limit = talk.session, talk.opened.runner.config.max_position_embeddings
    spare = min(SPARE, limit // 4)
    if not session.asked() or session.prompt_tokens(text) + spare < limit:
        return
    if on_overflow == "ask" and sys.stdin.isatty():
        from dsv2cli.cli.prompt import ask_overflow

        on_overflow = ask_overflow(limit)
    if on_overflow == "summarise":
        ui.note(f"summary: {session.summarise(talk.request)}")
    if on_overflow in ("drop", "summarise") and (dropped := session.make_room(text, spare)):
        ui.note(f"the context is full: dropped the {dropped} oldest turns")


def answer_json(talk: Talk, start: list[Message], line: str, on_overflow: opt.Overflow) -> None:
    """One conversation in, the next message of the assistant out.

    `start` goes before one without a system prompt.

    Raises UsageError.
    """
    from dsv2cli.engine import store
    from dsv2cli.engine.request import Result

    messages = store.parse_messages(line)
    if messages[-1]["role"] != "user":
        raise UsageError("The last message is not the user's", why="there is nothing to answer")
    talk.session.start_over(([] if messages[0]["role"] == "system" else start) + messages[:-1])
    result = Result()
    text = messages[-1]["content"]
    make_room(talk, text, on_overflow)
    answer = "".join(talk.session.reply(text, talk.request, result))
    usage = {
        "prompt_tokens": len(result.prompt_ids),
        "generated_tokens": len(result.tokens),
        "reused_tokens": result.reused_tokens,
    }
    ui.write_json(
        {"role": "assistant", "content": answer, "finish_reason": result.finish_reason, "usage": usage}
    )
