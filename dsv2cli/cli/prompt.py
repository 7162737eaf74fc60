"""The prompt that is always there: keys, history on disk, completion, and above it what the model says.

One prompt_toolkit application runs from the first moment to the last, in the main thread. What is typed and
sent goes to a thread that carries it out, one line after the other; what that thread has to show comes back
to be printed above the prompt. While the model works its answer grows there: blocks that are finished are
printed once and never again, the one in the making is part of the window. Keys are this program's all the
while, so that Ctrl-C is a key, and nothing that is typed lands in an answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import queue
import re
import signal
import struct
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition, is_searching
from prompt_toolkit.formatted_text import ANSI
from prompt_toolkit.history import FileHistory, InMemoryHistory
from prompt_toolkit.input.ansi_escape_sequences import ANSI_SEQUENCES
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.keys import Keys
from prompt_toolkit.output import create_output

from dsv2cli import places
from dsv2cli.cli import commands, ui
from dsv2cli.cli import options as opt
from dsv2cli.cli.commands import COMMANDS, SETTINGS
from dsv2cli.cli.talk import Talk, clear_lost_caches
from dsv2cli.errors import Dsv2Error
from dsv2cli.outside import mended, require_file

if TYPE_CHECKING:
    from dsv2cli.cli.flow import Flow

QUOTES = '"""'
LONG_ECHO = 1000  # characters of an old message that are shown again
LONG_PASTE = 20  # lines; longer ones stand as one word until they are sent
TWICE = 1.0  # seconds between two presses of Ctrl-C that mean one wish
AROUND = 8  # lines of the window that are not the answer's
MENU = 10  # lines
PATIENCE = 5.0  # seconds for what runs to end by itself, when the person leaves
HINT = "Enter sends, Ctrl-C stops an answer, /help shows more, Ctrl-D leaves"
LINK = re.compile(r"\x1b\]8;;[^\x1b]*\x1b\\")
# Shift-Enter, as kitty and xterm send it where they are told to: a new line, as Alt-Enter.
for code in ("\x1b[13;2u", "\x1b[27;2;13~"):
    ANSI_SEQUENCES[code] = (Keys.Escape, Keys.ControlM)


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
    """Commands after a slash with what they do, what belongs behind each, and files after an @."""

    def __init__(self, talk: Talk) -> None:
        self.talk = talk

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
        line = document.text_before_cursor
        if line.startswith("/") and "\n" not in line:
            name, space, rest = line[1:].partition(" ")
            if not space:
                yield from entries({each: COMMANDS[each].help for each in COMMANDS}, name)
            else:
                yield from self.arguments(name, rest, event)
            return
        word = re.search(r"(?:^|[\s(\[])@([^\s\"]*)$", line)
        if word is not None:
            yield from PathCompleter(expanduser=True).get_completions(Document(word[1]), event)

    def arguments(self, name: str, rest: str, event: CompleteEvent) -> Iterable[Completion]:
        """What belongs behind a command."""
        journal = self.talk.journal
        words: dict[str, Callable[[], dict[str, str]]] = {
            "load": lambda: {each: commands.about(each) for each in places.session_names()[:50]},
            "delete": lambda: {each: commands.about(each) for each in places.session_names()[:50]},
            "set": lambda: setting_words(self.talk),
            "branch": lambda: dict.fromkeys(sorted(journal.branches), ""),
            "answers": lambda: answer_words(self.talk),
        }
        if name in words:
            yield from entries(words[name](), rest)
        setting, blank, value = rest.partition(" ")
        if name == "set" and blank and not value and setting in SETTINGS:
            yield Completion(commands.values_of(self.talk).get(setting, ""), display_meta=SETTINGS[setting])
        if name in ("file", "load", "save"):
            yield from PathCompleter(expanduser=True).get_completions(Document(rest), event)


def entries(words: dict[str, str], start: str) -> Iterator[Completion]:
    """Those words that begin with what is typed, each with what it means."""
    for word, meaning in words.items():
        if word.startswith(start):
            yield Completion(word, -len(start), display_meta=ui.harmless(meaning))


def setting_words(talk: Talk) -> dict[str, str]:
    """Settings with their values and what they may be."""
    now = commands.values_of(talk)
    return {name: f"{now[name]}; {may}" if name in now else may for name, may in SETTINGS.items()}


def answer_words(talk: Talk) -> dict[str, str]:
    """The numbers of the answers to the last message, with how they begin."""
    turns = talk.journal.turns()
    given = talk.journal.answers(turns[-1]) if turns else []
    return {str(place): commands.shortened(node.text) for place, node in enumerate(given, 1)}


def sent(text: str) -> str:
    """What was typed, without the quotes that make several lines one message; nothing for blanks alone."""
    stripped = text.strip()
    if stripped.startswith(QUOTES) and stripped.endswith(QUOTES) and len(stripped) >= 2 * len(QUOTES):
        stripped = text = stripped[len(QUOTES) : -len(QUOTES)].strip("\n")
    return mended(text) if stripped else ""


@dataclass(frozen=True)
class Line:
    """What was sent: a message, or a command."""

    text: str
    command: bool = False


class Terminal:
    """The screen of a talk, and the keys."""

    def __init__(self, plain: bool, keep_history: bool) -> None:
        self.plain, self.keep_history = plain, keep_history
        self.flow: Flow | None = None  # of the answer that is being written
        self.drawing = threading.Lock()  # of the flow, which two threads use
        self.line = ""  # what is going on
        self.loaded = ""  # how far the model is
        self.question: Callable[[str], None] | None = None  # takes the next key
        self.asking = ""
        self.waiting: list[Line] = []  # sent, and not begun
        self.lines: queue.SimpleQueue[Line | None] = queue.SimpleQueue()
        self.returned: list[str] = []  # on its way back to the prompt
        self.owed: list[str] = []  # back in the prompt: not sent again yet, and not taken away
        self.busy = self.editing = self.pasted = self.pasted_quotes = False
        self.pastes: dict[str, str] = {}  # what a long paste stands as -> what it is
        self.held: list[Callable[[], None]] = []  # to be printed above the prompt
        self.pressed = float("-inf")  # when an answer was stopped last
        self.crash: BaseException | None = None
        self.left = self.asked_to_leave = False
        self.counted: tuple[str, str] = ("", "")  # what the meter was asked for last
        self.meter = ""
        self.shown: tuple[int, Any] = (-1, None)  # what was drawn last, by its number
        self.counter = ThreadPoolExecutor(1)
        self.loop: asyncio.AbstractEventLoop | None = None

    # What a talk shows: called by any thread.

    def above(self, show: Callable[[], None]) -> None:
        """Print something above the prompt."""
        self.held.append(show)
        if not self.post(self.print_held):
            self.print_held()

    def print_held(self) -> None:
        """In the main thread: what waits to be printed, above a prompt that moves down."""
        if self.editing or not self.held:
            return
        app = self.prompt.app if self.loop is not None else None
        if app is not None and app.is_running:
            app.renderer.erase()
        try:
            while self.held:
                self.held.pop(0)()
        except BaseException as error:  # nobody reads the answers any more, Ctrl-C, or a bug
            if not hasattr(self, "prompt"):  # nothing is to be put in order yet
                raise
            self.crash = error
            self.leave()
        if app is not None and app.is_running:
            app.invalidate()

    def note(self, text: str) -> None:
        self.above(lambda: ui.note(text))

    def show_error(self, error: Dsv2Error) -> None:
        self.above(lambda: ui.show_error(error))

    def last_words(self, error: Dsv2Error) -> None:
        sys.stderr.write("\r\n\x1b[J")  # below the prompt, which nobody draws again
        ui.show_error(error)

    def status(self, text: str) -> None:
        self.line = text
        self.redraw()

    def redraw(self) -> None:
        """Draw the window again, some time soon."""
        self.post(self.invalidate)

    def invalidate(self) -> None:
        """In the main thread: draw the window again, unless it has just gone."""
        if self.prompt.app.is_running and not self.left:
            self.prompt.app.invalidate()

    def piece(self, text: str) -> None:
        from dsv2cli.cli.flow import terminal_flow

        with self.drawing:
            if self.flow is None:
                self.flow = terminal_flow(self.plain)
            self.flow.columns = self.flow.columns and self.columns()
            finished, to_a_file = self.flow.feed(text), not self.flow.columns
        if to_a_file:
            ui.emit(finished)
        elif finished:
            self.above(lambda: ui.emit(finished))
        self.redraw()

    def end(self) -> None:
        with self.drawing:
            flow, self.flow = self.flow, None
            rest = "" if flow is None else flow.end() if flow.columns else "\n"
        if rest:
            self.above(lambda: ui.emit(rest))

    def exchange(self, *texts: str) -> None:
        if len(texts) > 1:
            self.echo(texts[0] if len(texts[0]) < LONG_ECHO else commands.shortened(texts[0], LONG_ECHO))
        self.piece(texts[-1])
        self.end()

    def echo(self, text: str) -> None:
        """A message that is on its way."""
        count = text.count("\n") + 1
        shown = ui.harmless(text if count <= LONG_PASTE else f"[{count} lines, {len(text):,} characters]")
        lines = "\n  ".join(shown.split("\n"))
        self.above(lambda: print(f"\x1b[1m> {lines}\x1b[0m", file=sys.stderr, flush=True))

    def ask_overflow(self, limit: int) -> opt.Overflow:
        answers: dict[str, opt.Overflow] = {"d": "drop", "s": "summarise"}
        answered: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.asking = (
            f"The context of {limit:,} tokens is full. "
            "Drop the oldest turns, summarise them, or stop? [d/s/N]"
        )
        self.question = answered.put
        self.redraw()
        answer = answered.get()
        self.question, self.asking = None, ""
        return answers.get(answer.lower(), "stop")

    @contextmanager
    def loading(self, name: str) -> Iterator[Callable[[int, int], None]]:
        """Progress of loading, in the bar; the callback raises Leave where the person has left."""
        began = time.monotonic()

        def progress(done: int, total: int) -> None:
            if self.left:
                raise commands.Leave
            spent = time.monotonic() - began
            left = f" \u00b7 {spent * (total - done) / done:.0f} s left" if done and spent > 1 else ""
            unit, name = (1e9, "GB") if total >= 1e9 else (1e6, "MB")
            self.loaded = f"loading {done / unit:.1f} of {total / unit:.1f} {name}{left}"
            self.redraw()

        self.loaded = "loading"
        yield progress

    # The work: in a thread of its own.

    def work(self) -> None:
        """Carry out one line after the other, until there is None."""
        while (line := self.lines.get()) is not None:
            self.busy = True
            try:
                self.carry_out(line)
            except commands.Leave:
                self.post(self.leave)
            except Dsv2Error as error:
                self.show_error(error)
            except BaseException as error:  # a bug, and to look like one
                self.crash = error
                self.post(self.leave)
            self.busy = False
            self.line = ""
            if self.talk.draft:
                self.returned.append(self.talk.draft)
                self.talk.draft = ""
            self.talk.journal.keep_draft(self.unsent())
            self.post(self.give_back)
            self.recount()

    def carry_out(self, line: Line) -> None:
        """A command, or a message and its answer. Raises Dsv2Error, and Leave."""
        talk, result = self.talk, self.talk.result
        if line in self.waiting:
            self.waiting.remove(line)
        if self.left:
            return
        talk.stop.clear()
        self.echo(line.text)
        if line.command:
            commands.carry_out(talk, line.text)
        else:
            talk.say(line.text)
        if talk.result is not None and talk.result is not result:
            self.note(opt.stats_line(talk.result))
            limit = talk.model.limit
            if limit is not None and talk.result.prompt_length + talk.result.length >= limit:
                self.note(f"the context of {limit:,} tokens is full")

    def post(self, action: Callable[[], Any]) -> bool:
        """Have the main thread do something, while the prompt is there."""
        try:
            loop = self.loop
            if loop is not None:
                loop.call_soon_threadsafe(action)
        except RuntimeError:  # it has just gone
            return False
        return loop is not None

    def unsent(self) -> str:
        """Messages that wait for their turn, and those that came back."""
        waiting = [each.text for each in self.waiting if not each.command]
        return "\n".join([*self.returned, *self.owed, *waiting])

    # The prompt: in the main thread.

    def run(self, talk: Talk, first: str | None) -> int:
        """Talk until the person leaves, beginning with a first message where there is one; gives the exit
        code. Raises what went wrong.
        """
        self.talk = talk
        self.prompt = self.made()
        self.code = 0
        worker = threading.Thread(target=self.work, daemon=True)
        loader = threading.Thread(target=self.load, daemon=True)

        def begin() -> None:
            self.loop = asyncio.get_running_loop()
            self.loop.set_exception_handler(self.broken)
            for number in (signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self.loop.add_signal_handler(number, self.leave, 128 + number)
            worker.start()
            self.print_held()
            if first is not None and first.strip():
                self.send(first, False)
            draft = self.prompt.default_buffer.text
            for line in typed_before():
                self.prompt.default_buffer.text = line
                self.submit(self.prompt.default_buffer)
            self.prompt.default_buffer.text = draft

        def shown(_: object) -> None:
            """The prompt stands: now the model, whose libraries take all the time there is."""
            if not loader.ident:
                loader.start()

        self.prompt.app.after_render += shown
        presses: list[int] = []  # of Ctrl-C while the keys are not the prompt's
        before = signal.signal(signal.SIGINT, lambda number, frame: presses.append(number))
        try:
            with contextlib.suppress(EOFError, KeyboardInterrupt):
                draft, talk.draft = talk.draft, ""
                self.prompt.prompt(default=draft, pre_run=begin)
            return self.finish(worker, presses)
        finally:
            signal.signal(signal.SIGINT, before)

    def finish(self, worker: threading.Thread, presses: list[int]) -> int:
        """After the prompt: let what runs end, keep what there is. Raises what went wrong."""
        talk, self.loop = self.talk, None
        talk.stop.set()
        if self.question is not None:
            self.question("n")
        while not self.lines.empty():
            self.lines.get()
        self.lines.put(None)
        # A model that is still being loaded is not waited for.
        loaded = talk.model.ready.is_set()
        worker.join(PATIENCE if loaded else 0.2)
        self.counter.shutdown(wait=False, cancel_futures=True)
        self.print_held()
        waiting = [each.text for each in self.waiting if not each.command]
        talk.journal.keep_draft(
            "\n".join(filter(None, [*self.returned, talk.draft, self.left_over, *waiting]))
        )
        alive = worker.is_alive() or not loaded
        if not alive and not presses and self.code == 0:
            talk.save_cache()
        if self.crash is not None:
            raise self.crash
        if talk.name:
            ui.note(f"dsv2 chat --resume {talk.name} comes back here")
        if alive:  # in the middle of what can not be interrupted, such as a compiler
            end_now(self.code)
        return self.code

    def load(self) -> None:
        """The model, while the person types; where it can not be loaded the program ends with the reason."""
        clear_lost_caches()
        self.talk.model.run()
        self.loaded = ""
        failure = self.talk.model.failure
        if failure is not None and not isinstance(failure, commands.Leave):
            self.crash = failure
            self.post(self.leave)
        self.recount()
        self.redraw()
        # Processes that share the model were started by this thread, and would end with it.
        threading.Event().wait()

    def broken(self, loop: object, context: dict[str, Any]) -> None:
        """A bug of what runs in the main thread: it ends the program, and looks like one."""
        self.crash = context.get("exception") or RuntimeError(context["message"])
        self.leave()

    def leave(self, code: int = 0) -> None:
        """End the prompt; what stands in it is kept."""
        app = self.prompt.app
        self.code, self.left = self.code or code, True
        self.talk.stop.set()
        if app.is_running and not app.is_done:
            app.exit(result="")

    @property
    def left_over(self) -> str:
        """What stands in the prompt, not sent."""
        return self.expanded(self.prompt.default_buffer.text).strip()

    def columns(self) -> int:
        return self.prompt.app.output.get_size().columns if self.loop is not None else 80

    def made(self) -> PromptSession[str]:
        """The prompt, drawn on stderr, so that `dsv2 chat > answers.txt` holds answers only."""
        history = History(str(places.data_folder() / "history")) if self.keep_history else InMemoryHistory()
        prompt: PromptSession[str] = PromptSession(
            self.window,
            multiline=True,
            key_bindings=self.keys(),
            prompt_continuation="  ",
            output=create_output(stdout=sys.stderr),
            history=history,
            completer=Suggestions(self.talk),
            complete_while_typing=Condition(self.completes),
            complete_in_thread=True,
            reserve_space_for_menu=MENU,
            enable_open_in_editor=True,
            enable_suspend=True,
            erase_when_done=True,
            placeholder=self.placeholder,
        )
        prompt.app.min_redraw_interval = 0.03
        return prompt

    def completes(self) -> bool:
        """Whether the menu opens by itself."""
        text = self.prompt.default_buffer.document.text_before_cursor
        return (text.startswith("/") and "\n" not in text) or re.search(r"(^|\s)@\S*$", text) is not None

    def placeholder(self) -> Any:
        return [
            ("class:placeholder fg:ansibrightblack", "" if self.talk.journal.nodes or self.busy else HINT)
        ]

    def window(self) -> Any:
        """What is drawn this time: asked for more than once, and always to be the same."""
        number = self.prompt.app.render_counter
        if self.shown[0] != number:
            self.shown = number, ANSI(self.above_the_keys() + "> ")
        return self.shown[1]

    def above_the_keys(self) -> str:
        """The answer in the making, what is going on, what waits, and the bar."""
        lines: list[str] = []
        if self.flow is not None:
            room = max(1, self.prompt.app.output.get_size().rows - AROUND)
            live = LINK.sub("", self.drawn())
            lines += live.split("\n")[-room:] if live else []
        status = self.asking or self.line or (self.busy and (self.loaded or "working")) or ""
        if status:
            hint = "" if self.asking else " \u00b7 Ctrl-C stops"
            lines.append(f"\x1b[2m{ui.harmless(status)}{hint}\x1b[0m")
        lines += [
            f"\x1b[2mnext: {ui.harmless(commands.shortened(each.text))}\x1b[0m" for each in self.waiting
        ]
        lines.append(f"\x1b[2m{self.bar()[: self.columns() - 1]}\x1b[0m")
        return "".join(f"{line}\n" for line in lines)

    def drawn(self) -> str:
        """The answer in the making, as wide as the window is now."""
        with self.drawing:
            if self.flow is None:
                return ""
            self.flow.columns = self.flow.columns and self.columns()
            return self.flow.live()

    def bar(self) -> str:
        """Model, context used with what is typed and attached, and speed."""
        self.count()
        talk = self.talk
        parts = [ui.harmless(talk.model.name)]
        parts += [self.loaded] if self.loaded else []
        parts += [self.meter] if self.meter else []
        if len(talk.journal.branches) > 1:
            parts.append(talk.journal.branch)
        if talk.result and talk.result.decode_tokens_per_second:
            parts.append(f"{talk.result.decode_tokens_per_second:.0f} tok/s")
        if talk.files:
            parts.append(f"{len(talk.files)} attached")
        if talk.behind is not None:
            parts.append("an earlier message is edited")
        return " \u00b7 ".join(parts)

    def count(self) -> None:
        """Let the meter be brought up to date, where it is not: the person does not wait for it."""
        wanted = (self.talk.journal.head, self.expanded(self.prompt.default_buffer.text) + self.talk.attached)
        if wanted != self.counted and not self.busy:
            self.counted = wanted
            self.counter.submit(self.measure, wanted)

    def recount(self) -> None:
        """The talk has changed."""
        self.counted = ("?", "")
        self.redraw()

    def measure(self, wanted: tuple[str, str]) -> None:
        """In a thread of its own: how much of the context is used."""
        if wanted != self.counted:
            return
        try:
            used = self.talk.count(self.talk.journal.messages(wanted[0]))
            typed = self.talk.model.length(wanted[1]) if wanted[1] else 0
        except (Dsv2Error, KeyError):
            return
        limit = self.talk.model.limit
        if used is None or limit is None:
            return
        used += typed or 0
        self.meter = f"{used:,}/{limit:,} tokens ({used / limit:.0%})"
        self.redraw()

    # Keys.

    def submit(self, buffer: Any) -> None:
        """Send what stands in the prompt."""
        text = self.expanded(buffer.text)
        message = text if self.pasted_quotes else sent(text)
        if not message.strip():
            return
        pasted, self.pasted, self.pasted_quotes = self.pasted, False, False
        buffer.text = text  # for the history, which is to have all of it
        if is_command := commands.is_command(message, pasted):
            message = message.strip()
        self.send(message, is_command)
        buffer.append_to_history()
        buffer.reset()
        self.pastes = {}

    def send(self, message: str, is_command: bool) -> None:
        """Let a message, or a command, be carried out in its turn; those that leave do so at once."""
        if is_command and message.lower() in ("exit", "quit", "/exit", "/quit", "/bye"):
            self.leave()
            return
        self.asked_to_leave, self.pressed = False, float("-inf")
        line = Line(message if is_command else commands.message_of(message), is_command)
        self.owed = []
        self.waiting.append(line)
        if not is_command:
            # It is on the disk before the screen shows that it was sent.
            self.talk.journal.keep_draft(self.unsent())
        self.lines.put(line)

    def interrupt(self, buffer: Any) -> None:
        """Ctrl-C: stop what runs; else take away what is typed; else, the second time, leave."""
        again = time.monotonic() - self.pressed < TWICE
        if again:
            self.leave()
            return
        if self.busy or self.waiting:
            self.pressed = time.monotonic()
            self.talk.stop.set()
            self.line = "stopping"
            waiting, self.waiting = self.waiting, []
            while not self.lines.empty():
                self.lines.get()
            self.returned += [each.text for each in waiting if not each.command]
            self.give_back()
            return
        if buffer.text or self.talk.behind is not None:
            buffer.text = self.expanded(buffer.text)
            buffer.append_to_history()
            buffer.reset()
            self.talk.behind, self.pasted, self.pasted_quotes = None, False, False
            self.talk.kept_files, self.owed = "", []
            self.talk.journal.keep_draft(self.unsent())
            self.asked_to_leave = False
            return
        if self.asked_to_leave:
            self.leave()
            return
        self.asked_to_leave = True
        self.note("Ctrl-C again, Ctrl-D or /quit leaves.")

    def give_back(self) -> None:
        """Put messages that were not answered before what stands in the prompt."""
        if not self.returned:
            return
        self.owed += self.returned
        text, self.returned = "\n".join(self.returned), []
        buffer = self.prompt.default_buffer
        if text.count("\n") > LONG_PASTE:
            text = self.short_for(text)
        buffer.text = text + ("\n" + buffer.text if buffer.text else "")
        buffer.cursor_position = len(buffer.text)
        self.redraw()

    def as_placeholder(self, text: str) -> str:
        """What a long paste stands as."""
        lines = text.count("\n") + 1
        size = f"{len(text):,} characters"
        if self.talk.model.counts_at_once and (tokens := self.talk.model.length(text)) is not None:
            size = f"{tokens:,} tokens"
        return f"[pasted {lines} lines, {size}]"

    def expanded(self, text: str) -> str:
        """With every long paste as it is."""
        for short, whole in self.pastes.items():
            text = text.replace(short, whole)
        return text

    def paste(self, buffer: Any, data: str) -> None:
        """Put in what was pasted, as one word where it is long."""
        data = data.replace("\r\n", "\n").replace("\r", "\n")
        self.pasted = self.pasted or not buffer.text
        self.pasted_quotes = self.pasted_quotes or QUOTES in data
        if data.count("\n") <= LONG_PASTE:
            buffer.insert_text(data)
            return
        buffer.insert_text(self.short_for(data))

    def short_for(self, text: str) -> str:
        """What a long text stands as in the prompt; no two as the same."""
        short, number = self.as_placeholder(text), 1
        while self.pastes.get(short, text) != text:
            number += 1
            short = f"{short.split(' #')[0].rstrip(']')} #{number}]"
        self.pastes[short] = text
        return short

    def erase_before(self, buffer: Any) -> None:
        """Backspace: a letter, or a long paste as a whole."""
        before = buffer.document.text_before_cursor
        short = next((each for each in self.pastes if before.endswith(each)), "x")
        buffer.delete_before_cursor(len(short))

    def keys(self) -> KeyBindings:
        """What the keys do that prompt_toolkit does not know, or knows otherwise."""
        bindings = KeyBindings()
        asked = Condition(lambda: self.question is not None)

        @bindings.add("enter", filter=~is_searching & ~asked)  # in a search it takes what was found
        def _(event: KeyPressEvent) -> None:
            buffer = event.current_buffer
            text, before = buffer.text, buffer.document.text_before_cursor
            quoted = not self.pasted_quotes and text.lstrip().startswith(QUOTES) and text.count(QUOTES) % 2
            if quoted:
                buffer.insert_text("\n")
            elif before.endswith("\\") and not buffer.document.text_after_cursor:
                buffer.delete_before_cursor(1)
                buffer.insert_text("\n")
            else:
                self.submit(buffer)

        @bindings.add("escape", "enter")
        @bindings.add("c-j")
        def _(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        @bindings.add("c-@")
        def _(event: KeyPressEvent) -> None:
            """No mark is set: while there is one nothing can be typed. A terminal makes this key of a Ctrl-D
            that was pressed before the prompt stood.
            """

        @bindings.add("c-g")
        def _(event: KeyPressEvent) -> None:
            self.edit(event.current_buffer)

        @bindings.add("c-c")
        @bindings.add("<sigint>")
        def _(event: KeyPressEvent) -> None:
            self.interrupt(self.prompt.default_buffer)

        @bindings.add(Keys.BracketedPaste)
        def _(event: KeyPressEvent) -> None:
            self.paste(event.current_buffer, event.data)

        @bindings.add("backspace", filter=Condition(lambda: bool(self.pastes)) & ~is_searching)
        def _(event: KeyPressEvent) -> None:
            self.erase_before(event.current_buffer)

        def answer(event: KeyPressEvent) -> None:
            if self.question is not None:
                self.question(event.data)

        for key in ("d", "s", "n", "D", "S", "N", "enter"):
            bindings.add(key, filter=asked, eager=True)(answer)

        return bindings

    def edit(self, buffer: Any) -> None:
        """Let the person's editor have what is typed; what comes meanwhile is printed afterwards."""
        self.editing = True
        buffer.text = self.expanded(buffer.text)
        task = buffer.open_in_editor()

        def done(_: object) -> None:
            self.editing = False
            self.print_held()

        task.add_done_callback(done)


def typed_before() -> list[str]:
    """Lines that were sent before the keys were the prompt's: for Enter the terminal then gives Ctrl-J, which
    is to begin a new line.
    """
    typed = b""
    with contextlib.suppress(OSError, ValueError):
        number = sys.stdin.fileno()
        while struct.unpack("i", fcntl.ioctl(number, termios.FIONREAD, bytes(4)))[0]:
            typed += os.read(number, 2**16)  # a line each time
    return typed.decode(errors="replace").splitlines()


def end_now(code: int) -> None:
    """Leave while a thread is in the middle of something that can not be interrupted."""
    import atexit

    sys.stdout.flush()
    sys.stderr.flush()
    atexit._run_exitfuncs()
    os._exit(code)
