"""The line where the person types: keys, history on disk, completion, and the bar below."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter, WordCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.filters import is_searching
from prompt_toolkit.history import FileHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output

from dsv2cli import places
from dsv2cli.cli import ui
from dsv2cli.cli.commands import COMMANDS, SETTINGS, Talk
from dsv2cli.cli.options import Overflow
from dsv2cli.outside import mended, require_file

QUOTES = '"""'


class History(FileHistory):
    """What was typed, whole messages, readable by the owner only.

    A disk that does not allow it stops nothing.
    """

    def store_string(self, string: str) -> None:
        try:
            places.private_folder(Path(os.fsdecode(self.filename)).parent)
            os.close(os.open(self.filename, os.O_CREAT | os.O_WRONLY | os.O_NONBLOCK, 0o600))
            require_file(Path(os.fsdecode(self.filename)))
            super().store_string(mended(string))
        except OSError:
            # The message itself is not lost by that, and saving the session says what is wrong with the disk.
            return

    def load_history_strings(self) -> Iterable[str]:
        try:
            require_file(Path(os.fsdecode(self.filename)))
            return list(super().load_history_strings())
        except (OSError, ValueError):
            return []


class Suggestions(Completer):
    """Commands after a slash, and what belongs behind each."""

    def __init__(self, talk: Talk) -> None:
        self.talk = talk

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
        line = document.text_before_cursor
        if not line.startswith("/") or "\n" in line:
            return
        name, space, rest = line[1:].partition(" ")
        if not space:
            yield from WordCompleter(list(COMMANDS)).get_completions(Document(name), event)
            return
        words = {
            "load": places.session_names,
            "set": lambda: [*SETTINGS, "seed", "max_new_tokens"],
            "branch": lambda: sorted([*self.talk.session.branches, self.talk.session.branch]),
        }.get(name, list)()
        yield from WordCompleter(words, sentence=True).get_completions(Document(rest), event)
        if name in ("file", "load", "save"):
            yield from PathCompleter(expanduser=True).get_completions(Document(rest), event)


def keys(keep: Callable[[str], None]) -> KeyBindings:
    """`keep` is given what is sent, before the screen shows that it was."""
    bindings = KeyBindings()

    @bindings.add("enter", filter=~is_searching)  # in a search it takes what was found
    def _(event: KeyPressEvent) -> None:
        text = event.current_buffer.text
        if text.lstrip().startswith(QUOTES) and text.count(QUOTES) % 2:
            event.current_buffer.insert_text("\n")
        else:
            keep(text)
            event.current_buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @bindings.add("c-g")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.open_in_editor()

    return bindings


def sent(text: str) -> str:
    """What was typed, without the quotes that make several lines one message; nothing for blanks alone."""
    stripped = text.strip()
    if stripped.startswith(QUOTES) and stripped.endswith(QUOTES) and len(stripped) >= 2 * len(QUOTES):
        stripped = text = stripped[len(QUOTES) : -len(QUOTES)].strip("\n")
    return mended(text) if stripped else ""


def typed(talk: Talk, keep_history: bool) -> Iterator[str]:
    """Messages and commands typed at a prompt, until Ctrl-D. What is sent is on disk before it is seen so."""

    def keep(text: str) -> None:
        if (message := sent(text)) and not message.startswith("/"):
            talk.save(pending=talk.attached + message)

    # The prompt is drawn on stderr, so that `dsv2 chat > answers.txt` holds answers only.
    prompt: PromptSession[str] = PromptSession(
        "> ",
        multiline=True,
        key_bindings=keys(keep),
        prompt_continuation="  ",
        output=create_output(stdout=sys.stderr),
        history=History(str(places.data_folder() / "history")) if keep_history else None,
        completer=Suggestions(talk),
        complete_while_typing=False,
        reserve_space_for_menu=4,
        enable_open_in_editor=True,
    )
    while True:
        draft, talk.draft = talk.draft, ""
        bar = toolbar(talk)
        try:
            text = prompt.prompt(default=draft, bottom_toolbar=bar)
        except KeyboardInterrupt:
            ui.note("Ctrl-D or /quit leaves.")
            continue
        except EOFError:
            return
        if message := sent(text):
            yield message


def ask_overflow(limit: int) -> Overflow:
    """What to do about a full context; stop, where the answer is none of the three."""
    question: PromptSession[str] = PromptSession(output=create_output(stdout=sys.stderr))
    try:
        text = question.prompt(
            f"The context of {limit:,} tokens is full. "
            "Drop the oldest turns, summarise them, or stop? [d/s/N] "
        )
    except (KeyboardInterrupt, EOFError):
        text = ""
    answers: dict[str, Overflow] = {"d": "drop", "s": "summarise"}
    return answers.get(text.strip().lower()[:1], "stop")


def toolbar(talk: Talk) -> str:
    """Model, context used and speed."""
    limit = talk.opened.runner.config.max_position_embeddings
    used = talk.session.prompt_tokens()
    parts = [ui.harmless(talk.opened.name), f"{used:,}/{limit:,} tokens ({used / limit:.0%})"]
    if talk.session.branches:
        parts.append(talk.session.branch)
    if talk.result and talk.result.decode_tokens_per_second:
        parts.append(f"{talk.result.decode_tokens_per_second:.0f} tok/s")
    if talk.attached:
        parts.append("a file is attached")
    return " · ".join(parts)
