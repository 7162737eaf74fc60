"""A talk where nothing can be drawn twice: from a pipe, and at a terminal that can not move its cursor."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager

from dsv2cli.cli import commands, ui
from dsv2cli.cli import options as opt
from dsv2cli.cli.talk import Talk
from dsv2cli.errors import Dsv2Error
from dsv2cli.outside import mended


class Typewriter:
    """The screen of a talk, a line after the other, with nothing going on beside."""

    def __init__(self) -> None:
        self.written = False  # whether an answer has begun
        self.draft = ""  # what came back, and is not sent again

    def loading(self, name: str) -> AbstractContextManager[Callable[[int, int], None] | None]:
        return ui.loading(name)

    def note(self, text: str) -> None:
        ui.note(text)

    def show_error(self, error: Dsv2Error) -> None:
        ui.show_error(error)

    def last_words(self, error: Dsv2Error) -> None:
        ui.show_error(error)

    def piece(self, text: str) -> None:
        ui.write(text)
        self.written = True

    def end(self) -> None:
        if self.written:
            ui.emit("\n")
        self.written = False

    def exchange(self, *texts: str) -> None:
        for text in texts:
            ui.note(text)

    def status(self, text: str) -> None:
        """What goes on is not shown."""

    def ask_overflow(self, limit: int) -> opt.Overflow:
        answers: dict[str, opt.Overflow] = {"d": "drop", "s": "summarise"}
        print(
            f"The context of {limit:,} tokens is full. "
            "Drop the oldest turns, summarise them, or stop? [d/s/N] ",
            end="",
            file=sys.stderr,
            flush=True,
        )
        return answers.get(sys.stdin.readline().strip().lower()[:1], "stop")

    def run(self, talk: Talk, first: str | None) -> int:
        """Talk until the person leaves; gives the exit code. Raises what went wrong with the model."""
        talk.model.run()
        if talk.model.failure is not None:
            raise talk.model.failure
        line, again = first, False
        while True:
            try:
                line = self.typed(talk) if line is None else line
                if line is None:
                    break
                self.take(talk, line)
                again = False
            except commands.Leave:
                break
            except Dsv2Error as error:
                ui.show_error(error)
            except KeyboardInterrupt:
                if again:
                    break
                again = True
                ui.note("Ctrl-C again, Ctrl-D or /quit leaves.")
            line = None
        talk.journal.keep_draft(self.draft)
        talk.save_cache()
        return 0

    def typed(self, talk: Talk) -> str | None:
        """The next line; None where there are no more. What came back is shown, and sent by an empty line."""
        self.draft, talk.draft = talk.draft, ""
        draft = self.draft
        print(f"{ui.harmless(draft)} > " if draft else "> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        return mended(line.rstrip("\n") or draft) if line else None

    def take(self, talk: Talk, line: str) -> None:
        """Carry out a command, or send a message. Raises Dsv2Error, Leave."""
        if not line.strip():
            return
        result, self.draft = talk.result, ""
        talk.stop.clear()
        if commands.is_command(line):
            commands.carry_out(talk, line)
        else:
            talk.say(commands.message_of(line))
        if talk.result is not None and talk.result is not result:
            ui.note(opt.stats_line(talk.result))
