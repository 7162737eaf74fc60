"""Somebody at a terminal: types, and looks at what the screen shows."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import pexpect
import pyte

SECONDS = 60.0


class Person:
    """Reads what a program in a pseudo-terminal writes, and knows what is to be seen then."""

    def __init__(self, child: pexpect.spawn, columns: int, rows: int) -> None:
        self.child = child
        child.delaybeforesend = 0
        self.screen = pyte.HistoryScreen(columns, rows, history=10_000, ratio=0.5)
        self.screen.write_process_input = lambda data: child.send(data)  # where the cursor is
        self.stream = pyte.Stream(self.screen)
        self.raw = ""
        self.ended = False

    def look(self, seconds: float = 0.0) -> str:
        """All that has been shown: what has scrolled away, and the window."""
        try:
            while new := self.child.read_nonblocking(2**16, seconds):
                self.raw += new
                self.stream.feed(new)
                seconds = 0
        except pexpect.TIMEOUT:
            pass
        except (pexpect.EOF, OSError):
            self.ended = True
        gone = ["".join(line[x].data for x in range(self.screen.columns)) for line in self.screen.history.top]
        return "\n".join(line.rstrip() for line in [*gone, *self.screen.display])

    @property
    def window(self) -> str:
        """What the window shows now."""
        self.look()
        return "\n".join(line.rstrip() for line in self.screen.display).rstrip()

    def wait(self, wanted: str | Callable[[str], object], seconds: float = SECONDS) -> str:
        """Until a pattern, or what a function wants, is to be seen; gives all that is."""
        seen = wanted if callable(wanted) else (lambda text: re.search(wanted, text))
        limit = time.monotonic() + seconds
        while not seen(text := self.look(0.05)):
            assert time.monotonic() < limit and not self.ended, f"{wanted} is not there:\n{text}"
        whole = self.look(0.02)  # what was found may be the first half of a line
        return whole if seen(whole) else text

    def type(self, keys: str) -> None:
        """Press keys, one after the other."""
        self.child.send(keys)

    def say(self, message: str, answered: str = r"first after.*\n(.*\n)*> ") -> str:
        """Send a line, and wait for what is to follow it on the screen."""
        before = len(re.findall(answered, self.look()))
        self.type(message + "\r")
        return self.wait(lambda text: len(re.findall(answered, text)) > before)

    def answers(self) -> int:
        """How many have been given so far."""
        return self.look().count("first after")

    def ask(self, message: str) -> str:
        """Send a message and wait for its answer to end."""
        before = self.answers()
        self.type(message + "\r")
        return self.wait(lambda text: text.count("first after") > before)

    def interrupt(self) -> None:
        """Ctrl-C."""
        self.type("\x03")

    def leave(self, code: int = 0) -> str:
        """Ctrl-D, and look how it ends."""
        self.type("\x04")
        return self.end(code)

    def end(self, code: int = 0, seconds: float = SECONDS) -> str:
        """Until the program has ended, with this exit code."""
        limit = time.monotonic() + seconds
        while not self.ended:
            text = self.look(0.05)
            assert time.monotonic() < limit, f"it does not end:\n{text}"
        seen = self.look()
        self.child.close()
        status = self.child.exitstatus if self.child.exitstatus is not None else -self.child.signalstatus
        assert status == code, f"{status}:\n{seen}"
        return seen
