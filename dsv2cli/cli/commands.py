"""What a line that begins with / does inside `dsv2 chat`."""

from __future__ import annotations

import base64
import difflib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from dsv2cli import places
from dsv2cli.cli import options as opt
from dsv2cli.cli import ui
from dsv2cli.engine import store
from dsv2cli.engine.request import Request, Result, SamplingParams
from dsv2cli.engine.session import Session
from dsv2cli.errors import Dsv2Error, UsageError
from dsv2cli.outside import pasted_path, path_of, read_text, reason
from dsv2cli.run.open import Opened

SETTINGS: dict[str, Callable[[str], float]] = {
    each.name: int if each.type == "int" else float for each in fields(SamplingParams)
}
LARGEST_FILE = 2**20


class Leave(Exception):
    """The person wants to go."""


@dataclass
class Talk:
    """A conversation at a prompt: the session, how it is sampled, and where it is kept."""

    session: Session
    opened: Opened
    request: Request
    name: str = ""
    saving: bool = True
    plain: bool = False  # Markdown is shown as it is written
    result: Result | None = None  # of the last answer
    attached: str = ""  # files to put before the next message
    draft: str = ""  # what the next prompt begins with
    told: set[str] = field(default_factory=set)  # reasons for not saving that have been shown

    def save(self, pending: str = "") -> None:
        """Write the conversation; a reason why that failed is shown once and ends nothing."""
        if not self.saving:
            return
        session = self.session
        if not pending and not session.asked() and not session.branches:
            return
        branches = session.branches | {session.branch: session.messages}
        talk = store.Conversation(branches, session.branch, pending, self.opened.name)
        try:
            if self.name:
                store.save(store.path_of(self.name), talk)
            else:
                self.name = saved_under_new_name(talk)
        except Dsv2Error as error:
            if error.why not in self.told:
                self.told.add(error.why)
                ui.show_error(error)

    def save_cache(self) -> None:
        """Keep the latents too, when leaving; not where the text itself could not be kept."""
        if (
            not self.saving
            or not self.name
            or not self.session.cached_ids
            or self.name not in places.session_names()
        ):
            return
        try:
            model = store.identity(self.opened.folder, self.session)
            store.save_cache(cache_path(self.name), self.session, model)
        except Dsv2Error as error:
            ui.show_error(error)

    def resume(self, path: Path) -> None:
        """Go on with a saved conversation, with its cache where it fits.

        Raises Dsv2Error where it can not be read.
        """
        saved, session = store.load(path), self.session
        session.take_over(saved.branches, saved.branch)
        inside = path.parent == places.sessions()
        self.name, self.draft = path.stem if inside else "", saved.pending
        reason = "none was saved"
        if inside:
            reason = store.load_cache(
                cache_path(path.stem), session, store.identity(self.opened.folder, session)
            )
        kept = f"{len(session.cached_ids):,} cached tokens" if not reason else f"no cache ({reason})"
        ui.note(f"{path.stem}: {len(session.asked())} turns, {kept}")


def saved_under_new_name(talk: store.Conversation) -> str:
    """The time of day names it; another that begins within the same second gets another name. Raises
    Dsv2Error as store.save.
    """
    name = time.strftime("%Y-%m-%d-%H%M%S")
    while True:
        try:
            store.save(store.path_of(name), talk, fresh=True)
        except FileExistsError:
            name += "b"
        else:
            return name


def cache_path(name: str) -> Path:
    return store.path_of(name).with_suffix(".safetensors")


def find(name: str) -> Path:
    """A saved session by name, the latest for `last`, or a file. Raises UsageError for anything else."""
    known = places.session_names()
    if name == "last" and (latest := latest_readable(known)) is not None:
        return latest
    if name in known:
        return store.path_of(name)
    if (path := pasted_path(name)).is_file():
        return path
    if name == "last":
        raise UsageError("There is no saved session that can be read", fix="/sessions lists what there is")
    near = difflib.get_close_matches(name, known, 1)
    fix = f"did you mean {near[0]!r}?" if near else "/sessions lists what there is"
    raise UsageError(f"There is no saved session {name!r}", why="it is no file either", fix=fix)


def latest_readable(names: list[str]) -> Path | None:
    """The first of the saved sessions that can be read; those before it are passed over with a word."""
    for name in names:
        try:
            path = store.path_of(name)
            store.load(path)
        except Dsv2Error as error:
            ui.note(f"passed over {name}: {error.sentence}")
        else:
            return path
    return None


def carry_out(talk: Talk, line: str) -> str | None:
    """Carry out a command; gives a message to send, if that is what it comes to. Raises Dsv2Error, Leave."""
    name, _, rest = line[1:].partition(" ")
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        raise UsageError(f"There is no command /{name}", fix=f"/{near[0]}?" if near else "/help lists them")
    return COMMANDS[name].run(talk, rest.strip())


def help_(talk: Talk, rest: str) -> None:
    width = max(len(command.usage) for command in COMMANDS.values())
    ui.note("\n".join(f"{command.usage:{width}}  {command.help}" for command in COMMANDS.values()))
    ui.note(
        'Alt-Enter or """ writes several lines, Ctrl-R searches what you typed, Ctrl-G opens your editor.'
    )


def system(talk: Talk, rest: str) -> None:
    if rest:
        talk.session.set_system("" if rest == "off" else rest)
        talk.save()
    prompt = next(
        (message["content"] for message in talk.session.messages if message["role"] == "system"), "none"
    )
    ui.note(f"system prompt: {prompt}")


def set_(talk: Talk, rest: str) -> None:
    """Change a setting and show them all. Raises UsageError."""
    name, _, value = rest.partition(" ")
    name, sampling = name.replace("-", "_"), talk.request.sampling
    try:
        if name in SETTINGS:
            changed: dict[str, Any] = {name: SETTINGS[name](value)}
            talk.request = replace(talk.request, sampling=replace(sampling, **changed))
        elif name == "seed" and int(value) >= 0:
            talk.request = replace(talk.request, seed=int(value))
        elif name == "max_new_tokens" and int(value) > 0:
            talk.request = replace(talk.request, max_new_tokens=int(value))
        else:
            raise UsageError(
                f"/set {rest} makes no sense",
                why=f"settings are {', '.join([*SETTINGS, 'seed', 'max_new_tokens'])}",
            )
    except (ValueError, OverflowError):
        number = "0.3" if SETTINGS.get(name) is float else "40"
        raise UsageError(f"{value[:80]!r} is no value for {name}", fix=f"/set {name} {number}") from None
    show(talk, "")


def show(talk: Talk, rest: str) -> None:
    settings = vars(talk.request.sampling) | {
        "max_new_tokens": talk.request.max_new_tokens,
        "seed": talk.request.seed,
    }
    place = f"{talk.opened.runner.device}, {str(talk.opened.runner.dtype).removeprefix('torch.')}"
    kept = f"session {talk.name or '(new)'}" if talk.saving else "not saved"
    ui.note(f"{talk.opened.name} on {place} · {kept} · branch {talk.session.branch}")
    ui.note(" · ".join(f"{name} {value}" for name, value in settings.items()))


def retry(talk: Talk, rest: str) -> str:
    """A new answer to the last message, with another seed."""
    text = talk.session.cut(-1)
    talk.request = replace(talk.request, seed=talk.request.seed + 1)
    return text


def undo(talk: Talk, rest: str) -> None:
    ui.note(f"taken back: {shortened(talk.session.cut(-1))}")
    talk.save()


def edit(talk: Talk, rest: str) -> None:
    talk.draft = talk.session.cut(int(rest) if rest.isdecimal() else -1)
    talk.save(talk.draft)


def branch(talk: Talk, rest: str) -> None:
    session = talk.session
    if rest and rest != session.branch:
        known = session.switch(rest)
        ui.note(f"back on branch {rest}" if known else f"new branch {rest}; the other stays as it is")
        talk.save()
    for name in sorted([*session.branches, session.branch]):
        here = name == session.branch
        messages = session.messages if here else session.branches[name]
        turns = sum(message["role"] == "user" for message in messages)
        ui.note(f"{'*' if here else ' '} {name}: {turns} turns")


def history(talk: Talk, rest: str) -> None:
    turn = 0
    for message in talk.session.messages:
        turn += message["role"] == "user"
        mark = {"user": f"{turn}>", "assistant": "  ", "system": "system:"}[message["role"]]
        ui.note(f"{mark} {message['content']}")


def clear(talk: Talk, rest: str) -> None:
    talk.save()
    talk.save_cache()
    session, talk.name, talk.result, talk.attached = talk.session, "", None, ""
    session.start_over([message for message in session.messages if message["role"] == "system"])
    ui.note("a new conversation; the old one is in /sessions" if talk.saving else "a new conversation")


def save(talk: Talk, rest: str) -> None:
    """Under a name, or as Markdown or JSON into a file.

    Raises UsageError for a name that is taken, Dsv2Error as store.write.
    """
    if rest.endswith((".md", ".json")):
        path, messages = path_of(rest), talk.session.messages
        text = store.as_markdown(messages) if rest.endswith(".md") else store.as_json(messages)
        store.write(path, text)
        ui.note(f"written to {path}")
        return
    if rest and rest != talk.name:
        if rest in places.session_names():
            raise UsageError(
                f"There is a session {rest!r} already",
                why="it would be written over",
                fix="choose another name",
            )
        path = store.path_of(rest)
        if talk.name in places.session_names():
            try:
                store.path_of(talk.name).rename(path)
            except OSError as error:
                raise Dsv2Error(f"{talk.name} could not be renamed", why=reason(error)) from None
        talk.name = rest
    talk.saving = True
    talk.save()
    ui.note(f"saved as {talk.name}" if talk.name else "there is nothing to save yet")


def load(talk: Talk, rest: str) -> None:
    path = find(rest or "last")
    talk.save()
    talk.resume(path)


def sessions(talk: Talk, rest: str) -> None:
    for name in places.session_names()[:20]:
        ui.note(f"{'*' if name == talk.name else ' '} {name}")
    ui.note(f"in {places.sessions()}")


def file(talk: Talk, rest: str) -> None:
    """Put a file's text before the next message.

    Raises UsageError for one that can not be read, or is too large.
    """
    path = pasted_path(rest)
    try:
        text = read_text(path, LARGEST_FILE)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{rest or 'no file'} can not be read", why=reason(error), fix="/file PATH"
        ) from None
    talk.attached += f"{path.name}:\n\n{text}\n\n"
    tokens = len(talk.session.tokenizer.encode(text, add_bos=False))
    ui.note(f"{path.name}: {len(text.encode()):,} bytes, {tokens:,} tokens; it goes before your next message")


def copy(talk: Talk, rest: str) -> None:
    """The last answer to the terminal's clipboard (OSC 52), which also works over ssh.

    Raises UsageError where there is none.
    """
    answers = [message["content"] for message in talk.session.messages if message["role"] == "assistant"]
    if not answers:
        raise UsageError("There is no answer to copy yet")
    with open(os.ctermid(), "w") as terminal:
        terminal.write(f"\x1b]52;c;{base64.b64encode(answers[-1].encode()).decode()}\x07")
    ui.note("the last answer is in the clipboard, if this terminal allows it")


def stats(talk: Talk, rest: str) -> None:
    ui.note(opt.stats_line(talk.result) if talk.result else "no answer yet")
    tokens(talk, "")


def tokens(talk: Talk, rest: str) -> None:
    if rest:
        ids = talk.session.tokenizer.encode(rest, add_bos=False)
        ui.note(f"{len(ids)} tokens: {ids}")
        return
    limit = talk.opened.runner.config.max_position_embeddings
    used = talk.session.prompt_tokens()
    held = len(talk.session.cached_ids) * talk.session.cache.bytes_per_token()
    ui.note(f"context {used:,} of {limit:,} tokens ({used / limit:.0%}) · cache {held / 1e6:.1f} MB")


def quit_(talk: Talk, rest: str) -> None:
    """Raises Leave."""
    raise Leave


def shortened(text: str, most: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "\u2026"


@dataclass(frozen=True)
class Command:
    usage: str
    help: str
    run: Callable[[Talk, str], str | None]


COMMANDS = {
    command.usage[1:].split()[0]: command
    for command in (
        Command("/help", "this list", help_),
        Command("/system [TEXT|off]", "show or change the system prompt", system),
        Command("/set NAME VALUE", "change a setting, such as temperature 0.3", set_),
        Command("/show", "model, session and settings", show),
        Command("/retry", "another answer to the last message", retry),
        Command("/undo", "take back the last turn", undo),
        Command("/edit [N]", "change message N (the last) and go on from there", edit),
        Command("/branch [NAME]", "list branches; begin one here, or go back to one", branch),
        Command("/history", "the conversation so far", history),
        Command("/clear", "begin a new conversation", clear),
        Command("/save [NAME|FILE.md|FILE.json]", "name this session, or write it into a file", save),
        Command("/load [NAME|FILE]", "go on with a saved session or a list of messages", load),
        Command("/sessions", "what is saved", sessions),
        Command("/file PATH", "put a file before the next message", file),
        Command("/copy", "the last answer to the clipboard", copy),
        Command("/stats", "how the last answer went", stats),
        Command("/tokens [TEXT]", "context used, or the tokens of a text", tokens),
        Command("/quit", "leave (also Ctrl-D)", quit_),
    )
}
