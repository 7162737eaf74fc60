"""The model's words as they come onto a terminal: lines broken between words, Markdown drawn, nothing drawn
twice.

What has been printed is never touched again, so nothing flickers and scrolling back shows the text once. A
word is held back until it is complete, a line of code until it ends. Whatever the model writes, its escape
sequences stay harmless.
"""

from __future__ import annotations

import os
import re
import sys

from rich.cells import cell_len

from dsv2cli.cli import ui

MARKS = re.compile(r"(\*\*|`)")
HEADING = re.compile(r"#{1,6}")
USUAL_COLUMNS = 80  # of a terminal that does not say
BOLD, CODE, DIM, PLAIN = "\x1b[1m", "\x1b[36m", "\x1b[2m", "\x1b[0m"


def terminal_flow(plain: bool) -> Flow:
    """For stdout: breaks and draws on a terminal, and passes everything on as it is elsewhere."""
    if not sys.stdout.isatty():
        return Flow(0, False)
    drawn = not plain and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    try:
        columns = os.get_terminal_size(sys.stdout.fileno()).columns
    except OSError:
        columns = 0
    return Flow(columns or USUAL_COLUMNS, drawn)


class Flow:
    """`columns` 0 changes nothing at all; `drawn` renders headings, bold, lists and code."""

    def __init__(self, columns: int, drawn: bool) -> None:
        self.columns, self.drawn = columns, drawn
        self.column, self.space, self.word, self.line = 0, "", "", ""
        self.language: str | None = None  # of the code block we are in
        self.heading = self.bold = self.code = False

    def feed(self, text: str) -> str:
        """What can be printed now that `text` has come."""
        return "".join(map(self.take, ui.harmless(text))) if self.columns else text

    def end(self) -> str:
        """What was held back."""
        if self.language is not None and self.line:
            return self.code_line(self.line)
        return self.place() + self.space

    def take(self, letter: str) -> str:
        if letter == "\n":
            return self.end_line() + "\n"
        self.line += letter
        if self.language is not None:
            return ""  # a line of code is shown whole
        if letter == " ":
            done = self.place()
            self.space += "" if self.heading and not self.column else letter
            return done
        self.word += letter
        return self.place() if cell_len(letter) > 1 else ""  # Chinese has no spaces: any place will do

    def end_line(self) -> str:
        line, fence = self.line, self.line.strip().startswith("```")
        if self.language is not None:
            done = self.styled(line, DIM) if fence else self.code_line(line)
            self.language = None if fence else self.language
        else:
            done = self.place() + self.space
            if fence:
                self.language = line.strip().removeprefix("```").strip() or "text"
        self.column, self.space, self.word, self.line = 0, "", "", ""
        self.heading = self.bold = self.code = False
        return done

    def code_line(self, line: str) -> str:
        if not self.drawn:
            return line
        from pygments import highlight
        from pygments.formatters import TerminalFormatter
        from pygments.lexers import get_lexer_by_name
        from pygments.util import ClassNotFound

        try:
            lexer = get_lexer_by_name(self.language or "text", stripnl=False, ensurenl=False)
        except ClassNotFound:
            return self.styled(line, CODE)
        coloured: str = highlight(line, lexer, TerminalFormatter())
        return coloured.rstrip("\n")

    def place(self) -> str:
        """The word held back, on this line or the next."""
        if not self.word:
            return ""
        first = not self.line.removesuffix(" ").removesuffix(self.word).strip()
        shown, width = self.draw(self.word, first)
        space, self.space, self.word = self.space, "", ""
        if not width:
            return ""
        if self.column and self.column + len(space) + width > self.columns:
            self.column = width
            return "\n" + shown
        self.column += len(space) + width
        return space + shown

    def draw(self, word: str, first: bool) -> tuple[str, int]:
        """A word with its marks turned into style, and how many columns it takes. `first` on its line."""
        if not self.drawn or word == "**":  # on its own it is no mark
            return word, cell_len(word)
        if word.startswith("```"):
            return self.styled(word, DIM), cell_len(word)
        if first and HEADING.fullmatch(word):
            self.heading = True
            return "", 0
        if first and word in ("-", "*", "+"):
            return "\u2022", 1
        shown, width = "", 0
        for part in MARKS.split(word):
            if part == "**" and not self.code:
                self.bold = not self.bold
            elif part == "`":
                self.code = not self.code
            elif part:
                style = CODE if self.code else BOLD if self.bold or self.heading else ""
                shown, width = shown + self.styled(part, style), width + cell_len(part)
        return shown, width

    def styled(self, text: str, style: str) -> str:
        return f"{style}{text}{PLAIN}" if self.drawn and style and text else text
