"""The model's words as they come onto a terminal: Markdown by CommonMark's rules, drawn while it streams.

A block is given out as soon as nothing that follows can change how it looks, so what has been printed is
never touched again; the rest can be asked for at any time, drawn as if the text ended there. All that the
model wrote is shown, apart from Markdown's own marks, and no escape sequence of its own reaches the terminal.
It knows no screen: whoever prints it asks for pieces, and says how wide the window is.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, lru_cache
from itertools import groupby, zip_longest
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple
from unicodedata import category
from urllib.parse import quote

from rich.cells import cell_len

from dsv2cli.cli import ui

# markdown-it and pygments are imported where they are first needed: a prompt does not wait for them.
if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.rules_block import StateBlock
    from markdown_it.token import Token
    from markdown_it.tree import SyntaxTreeNode

USUAL_COLUMNS = 80  # of a terminal that does not say
LEAST_COLUMNS = 10  # left for a text within quotes and lists, however deep
LEAST_CELL = 3  # columns of a table's cell, however many there are
DEEPEST = 60  # levels of blocks; what lies deeper is shown as it was written
HELD_CODE = 20  # lines of code to see before the first go out: later ones may change their colours

BOLD, DIM, CODE = "1", "2", "36"
MARKS = {"strong": BOLD, "em": "3", "s": "9"}
HEADINGS = {"h1": "1;4", "h2": BOLD, "h3": "1;3", "h4": "4", "h5": "3", "h6": DIM}
COLOURS = {
    "Comment": DIM,
    "Keyword": "35",
    "Name.Builtin": CODE,
    "Name.Class": "34",
    "Name.Function": "34",
    "Name.Decorator": "34",
    "Name.Tag": "34",
    "Name.Attribute": CODE,
    "Literal.String": "32",
    "Literal.Number": "33",
    "Generic.Deleted": "31",
    "Generic.Inserted": "32",
    "Generic.Heading": BOLD,
    "Generic.Subheading": BOLD,
}
TAB = "    "
MATHEMATICS = "()[]{}"  # a backslash before one of these is shown: \( x \)
FENCE = re.compile(r" {0,3}(?:`{3,}|~{3,})[ \t]*")  # that ends code
JOINER = "\u200d"
TONES = range(0x1F3FB, 0x1F400)  # skins of the emoji before
FLAGS = range(0x1F1E6, 0x1F200)  # two make one
NO_LINE_BEGINS_WITH = "、。，．：；？！）］｝」』】》〉’”…ー々"
NO_LINE_ENDS_WITH = "（［｛「『【《〈‘“"


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


class Piece(NamedTuple):
    """Letters that look the same."""

    text: str
    style: str = ""  # numbers of an SGR sequence
    url: str = ""  # where a click leads


Line = list[Piece]


class Flow:
    """A text as it streams onto a terminal.

    `columns` 0 changes nothing at all, and may otherwise be changed at any time: what comes next follows.
    `drawn` renders Markdown; otherwise lines are only broken between words.
    """

    def __init__(self, columns: int, drawn: bool) -> None:
        self.columns, self.drawn = columns, drawn
        self.rest = ""  # what was not given out yet
        self.begun = False  # whether a block was given out
        self.opened = False  # whether lines of the code with which the rest begins were
        self.due = 1  # whole lines of the rest that are worth another look

    def feed(self, text: str) -> str:
        """What is finished now and will never change: whole lines."""
        if not self.columns:
            return text
        self.rest += ui.harmless(text)
        if "\n" not in text:
            return ""
        if self.drawn:
            return self.finished() if self.worth_a_look() else ""
        done, _, self.rest = self.rest.rpartition("\n")
        return plain(done, self.columns) + "\n"

    def live(self) -> str:
        """What is not finished, as it would look if the text ended here; without the last line's end."""
        if not self.columns or not self.rest:
            return ""
        if not self.drawn:
            return plain(self.rest, self.columns)
        page = self.page(self.rest.removesuffix("\n").split("\n"))
        return ansi(page.draw(page.blocks)).removesuffix("\n")

    def end(self) -> str:
        """What is left, finished."""
        left = self.live()
        self.rest, self.begun, self.opened, self.due = "", False, False, 1
        return left and left + "\n"

    def worth_a_look(self) -> bool:
        """Whether a block may have ended with the last whole line, as code does at a fence."""
        if self.rest.count("\n") >= self.due:
            return True
        stop = self.rest.rindex("\n")
        return bool(FENCE.fullmatch(self.rest, self.rest.rfind("\n", 0, stop) + 1, stop))

    def finished(self) -> str:
        """The blocks that no further text can change; the others remain."""
        *lines, last = self.rest.split("\n")
        page = self.page(lines)
        shown, lines, self.opened = page.settle()
        self.begun = self.begun or bool(shown)
        # A long block is looked at less often, so that a text of n lines does not cost n² of them.
        self.due = len(lines) + max(1, len(lines) // 8)
        self.rest = "\n".join([*lines, last])
        return ansi(shown)

    def page(self, lines: list[str]) -> Page:
        return Page(lines, self.columns, self.begun, self.opened)


class Page:
    """Lines of Markdown, and the outermost blocks in them, where each item of a list counts for itself.

    `begun`: something stands above. `opened`: the first block is code, and its first lines stand above.
    """

    def __init__(self, lines: list[str], columns: int, begun: bool, opened: bool) -> None:
        self.lines, self.columns, self.begun, self.opened = lines, columns, begun, opened
        self.blocks = [part for block in parsed("\n".join(lines) + "\n") for part in items(block)]

    def settle(self) -> tuple[list[Line], list[str], bool]:
        """What no further line can change, the source of the rest, and whether that begins within code."""
        count = self.settled()
        shown = self.draw(self.blocks[:count])
        if count == len(self.blocks) - 1 and (code := self.blocks[-1]).type == "fence":
            *runs, _ = self.runs(code)
            if runs:
                shown += self.gap(code, shown) + self.fence(code, runs, self.columns)
                first = span(code)[0]
                return shown, [self.lines[first], *self.lines[first + 1 + sum(map(len, runs)) :]], True
        return shown, self.lines[self.start(count) :], self.opened and not count

    def settled(self) -> int:
        """How many blocks no further line can change: all before the last, since a new one has begun."""
        count = len(self.blocks)
        if not count or self.ended(self.blocks[-1]):
            return count
        count -= 1
        # A title in the next lines would still belong to the definition of a link.
        while count and self.defines(self.blocks[count - 1], self.blocks[count]):
            count -= 1
        return count

    def defines(self, block: SyntaxTreeNode, below: SyntaxTreeNode) -> bool:
        return block.type == "definition" and not self.blank_above(below)

    def ended(self, block: SyntaxTreeNode) -> bool:
        """Whether the last block is complete even though no other has begun."""
        start, stop = span(block)
        if block.type == "fence":
            mark = f"{block.markup}{re.escape(block.markup[0])}*"
            return stop - start > 1 and bool(re.fullmatch(f" {{0,3}}{mark}[ \t]*", self.lines[stop - 1]))
        if block.type in ("paragraph", "table", "blockquote"):
            return any(map(blank, self.lines[stop - 1 : stop + 1]))
        return block.type in ("heading", "hr")

    def start(self, count: int) -> int:
        """The line at which what follows the first blocks starts, with the blank line before it."""
        if count < len(self.blocks):
            line = span(self.blocks[count])[0]
        else:
            line = span(self.blocks[-1])[1] if self.blocks else 0
        return line - 1 if line and blank(self.lines[line - 1]) else line

    def draw(self, blocks: Sequence[SyntaxTreeNode]) -> list[Line]:
        shown: list[Line] = []
        for block in blocks:
            shown += self.gap(block, shown)
            if any(node.level >= DEEPEST - 1 for node in block.walk()):
                shown += wrapped([Piece("\n".join(self.lines[slice(*span(block))]))], self.columns)
            else:
                shown += self.block(block, self.columns)
        return shown

    def gap(self, block: SyntaxTreeNode, above: list[Line]) -> list[Line]:
        """The blank line between a block and what stands above, where the source has one."""
        return [[]] if (above or self.begun) and self.blank_above(block) else []

    def blank_above(self, block: SyntaxTreeNode, bar: str = " ") -> bool:
        line, _ = span(block)
        return line > 0 and blank(self.lines[line - 1].replace(bar, ""))

    def block(self, node: SyntaxTreeNode, width: int) -> list[Line]:
        match node.type:
            case "paragraph" | "heading":
                return wrapped(spans(inline(node.children[0].content), HEADINGS.get(node.tag, "")), width)
            case "bullet_list" | "ordered_list":
                return self.inside(node, width)
            case "list_item":
                return self.item(node, width)
            case "blockquote":
                bar = Piece("│ ", DIM)
                return hung(self.inside(node, max(width - 2, LEAST_COLUMNS)), bar, bar)
            case "fence":
                return self.fence(node, self.runs(node), width)
            case "code_block":
                return coloured(node.content.removesuffix("\n"), "")
            case "table":
                return table(node, width)
            case "hr":
                return [[Piece("─" * width, DIM)]]
        # HTML, and definitions of links: as they were written
        style = DIM if node.type == "definition" else ""
        return wrapped([Piece(node.content.removesuffix("\n"), style)], width)

    def inside(self, node: SyntaxTreeNode, width: int) -> list[Line]:
        """The blocks within a block."""
        lines: list[Line] = []
        for child in node.children:
            if child is not node.children[0] and self.blank_above(child, ">"):
                lines.append([])
            lines += self.block(child, width)
        return lines

    def item(self, node: SyntaxTreeNode, width: int) -> list[Line]:
        mark = f"{node.info}{node.markup} " if node.info else "• "
        lines = self.inside(node, max(width - len(mark), LEAST_COLUMNS))
        return hung(lines, Piece(mark), Piece(" " * len(mark)))

    def fence(self, node: SyntaxTreeNode, runs: Iterable[list[str]], width: int) -> list[Line]:
        """Runs of lines of code under the name of its language."""
        name = "" if self.opened and node is self.blocks[0] else node.info.strip()
        lines = wrapped([Piece(name, DIM)], width) if name else []
        return lines + [line for run in runs if run for line in coloured("\n".join(run), language(node))]

    def runs(self, node: SyntaxTreeNode) -> Iterator[list[str]]:
        """Lines of code that are coloured together. All but the last run do not depend on what follows."""
        lines, held = node.content.split("\n")[:-1], HELD_CODE
        while held <= len(lines):
            if stop := end_of_run("\n".join(lines[:held]), language(node)):
                yield lines[:stop]
                lines, held = lines[stop:], HELD_CODE
            else:
                held *= 2
        yield lines


def span(block: SyntaxTreeNode) -> tuple[int, int]:
    """The lines at which it starts and stops."""
    assert block.map
    return block.map


def blank(line: str) -> bool:
    return not line.strip(" \t")  # other spaces are letters to CommonMark


def language(fence: SyntaxTreeNode) -> str:
    return next(iter(fence.info.split()), "")


def items(block: SyntaxTreeNode) -> list[SyntaxTreeNode]:
    return block.children if block.type.endswith("_list") else [block]


def hung(lines: list[Line], first: Piece, others: Piece) -> list[Line]:
    """Lines behind something: `first` before the first of them, `others` before each of the others."""
    heads = [first] + [others] * (len(lines) - 1)
    return [behind(head, line) for head, line in zip(heads, lines or [[]], strict=True)]


def behind(head: Piece, line: Line) -> Line:
    if line:
        return [head, *line]
    mark = head.text.rstrip()
    return [head._replace(text=mark)] if mark else []


# Markdown to pieces


@cache
def parser() -> MarkdownIt:
    """CommonMark, tables and strikethrough. What it would leave out or decode stays as it was written."""
    from markdown_it import MarkdownIt, helpers

    class AsWritten(MarkdownIt):
        def normalizeLink(self, url: str) -> str:
            return url

        def normalizeLinkText(self, link: str) -> str:
            return link

    markdown = AsWritten("commonmark", {"maxNesting": DEEPEST, "inline_definitions": True})
    markdown.enable("strikethrough").disable("entity")
    # Inlines are parsed when their block is drawn, and without the definitions: those mostly come too late.
    markdown.core.ruler.disable(["inline", "text_join"])
    # Its own rule for tables would come first, and make tables of headings and lists.
    markdown.block.ruler.before("lheading", "whole_table", whole_table, {"alt": ["paragraph", "reference"]})
    markdown.block.ruler.at("reference", whole_definition)
    rules: Any = SimpleNamespace(
        parseLinkLabel=helpers.parseLinkLabel, parseLinkDestination=whole_address, parseLinkTitle=whole_title
    )
    markdown.helpers = rules
    return markdown


def whole_table(state: StateBlock, start: int, stop: int, silent: bool) -> bool:
    """The rule for tables, which leaves out cells beyond the last column: each row keeps all of them."""
    from markdown_it.rules_block.table import escapedSplit, getLine, table

    before = len(state.tokens)
    if not table(state, start, stop, silent):
        return False
    for token in state.tokens[before:]:
        if token.type == "tr_open" and token.map:
            cells = [cell.strip() for cell in escapedSplit(getLine(state, token.map[0]).strip())]
            token.meta["cells"] = cells[not cells[0] : -1 if len(cells) > 1 and not cells[-1] else None]
    return True


def whole_definition(state: StateBlock, start: int, stop: int, silent: bool) -> bool:
    """The rule for definitions of links, which shows nothing: its lines are kept."""
    from markdown_it.rules_block.reference import reference

    before = len(state.tokens)
    found = reference(state, start, stop, silent)
    for token in state.tokens[before:]:
        token.content = state.getLines(start, state.line, state.blkIndent, False)
    return found


def whole_address(text: str, start: int, stop: int) -> Any:
    """The rule for a link's address, which decodes it."""
    from markdown_it.helpers import parseLinkDestination

    found = parseLinkDestination(text, start, stop)
    if found.ok:
        written = text[start : found.pos]
        found.str = written[1:-1] if written.startswith("<") else written
    return found


def whole_title(text: str, start: int, stop: int, before: Any = None) -> Any:
    """The rule for a link's title, which decodes it and leaves out its quotes."""
    from markdown_it.helpers import parseLinkTitle

    found = parseLinkTitle(text, start, stop, before)
    if found.ok:
        found.str = text[start : found.pos]
    return found


def parsed(source: str) -> Sequence[SyntaxTreeNode]:
    """The outermost blocks."""
    from markdown_it.tree import SyntaxTreeNode

    return SyntaxTreeNode(parser().parse(source)).children


def inline(source: str) -> list[Token]:
    return parser().inline.parse(source.replace("\t", TAB), parser(), {}, [])


def spans(tokens: Sequence[Token], style: str = "", url: str = "") -> Line:
    """Inline tokens within a `style`, and within a link to `url`."""
    line: Line = []
    styles, urls = [style], [url]
    links: list[tuple[Token, int]] = []  # and where their text starts; <http://x> may lie in another link
    for token in tokens:
        now, url = ";".join(filter(None, dict.fromkeys(styles))), urls[-1]
        if token.tag in MARKS:
            styles = [*styles, MARKS[token.tag]] if token.nesting == 1 else styles[:-1]
        elif token.type == "link_open":
            links.append((token, len(line)))
            urls.append(target(str(token.attrs["href"])))
        elif token.type == "link_close":
            link, start = links.pop()
            line += mention(link, line[start:])
            urls.pop()
        elif token.type == "image":
            alternative = spans(token.children or [], now, url)
            line += alternative + mention(token, alternative)
        elif token.type == "code_inline":
            line.append(Piece(token.content, f"{now};{CODE}" if now else CODE, url))
        else:
            line.append(Piece(written(token), now, url))
    return line


def written(token: Token) -> str:
    """What a token without structure shows."""
    if token.type in ("softbreak", "hardbreak"):
        return "\n"
    if token.info == "escape" and token.content in MATHEMATICS:
        return token.markup
    return token.content


def mention(token: Token, shown: Line) -> Line:
    """The address and title of a link or an image, unless they are what is shown."""
    text = "".join(piece.text for piece in shown)
    address = str(token.attrs.get("href", token.attrs.get("src", "")))
    if address == text or (token.markup == "autolink" and address == f"mailto:{text}"):
        address = ""
    words = " ".join(filter(None, [address, str(token.attrs.get("title", ""))]))
    return [Piece(f" ({words})" if text else f"({words})", DIM)] if words else []


def target(address: str) -> str:
    """Where a click leads: to the web only, and in letters that cannot steer a terminal."""
    from markdown_it.common.utils import unescapeAll

    address = unescapeAll(address)
    if not re.match("https?://", address, re.IGNORECASE):
        return ""
    return quote(address, safe="!#$%&'()*+,/:;=?@[]", errors="replace")


def table(node: SyntaxTreeNode, width: int) -> list[Line]:
    """Aligned columns; where they are too wide, the widest are broken."""
    rows = [
        [spans(inline(cell), BOLD if part.type == "thead" else "") for cell in row.meta["cells"]]
        for part in node.children
        for row in part.children
    ]
    heads = node.children[0].children[0].children
    sides = [str(head.attrs.get("style", "")).removeprefix("text-align:") for head in heads]
    columns = list(zip_longest(*rows, fillvalue=[]))
    natural = [max(LEAST_CELL, *map(wide, column)) for column in columns]
    room = width - 3 * (len(columns) - 1)
    most = next(
        (most for most in range(room, LEAST_CELL, -1) if sum(fitted(natural, most)) <= room), LEAST_CELL
    )
    widths = fitted(natural, most)
    ruler = [Piece("─┼─".join("─" * cells for cells in widths), DIM)]
    drawn = [table_row(row, widths, sides) for row in rows]
    return [*drawn[0], ruler, *(line for row in drawn[1:] for line in row)]


def fitted(widths: list[int], most: int) -> list[int]:
    return [min(width, most) for width in widths]


def table_row(row: list[Line], widths: list[int], sides: list[str]) -> list[Line]:
    """A row of cells, as many lines high as the highest."""
    cells = [*row, *[[]] * (len(widths) - len(row))]
    columns = [wrapped(cell, width, fold=True) for cell, width in zip(cells, widths, strict=True)]
    sides = [*sides, *[""] * (len(widths) - len(sides))]
    lines = []
    for parts in zip_longest(*columns, fillvalue=[]):
        line: Line = []
        for part, width, side in zip(parts, widths, sides, strict=True):
            line += [Piece(" │ ", DIM)] if line else []
            line += aligned(part, width, side)
        lines.append(line if line[-1].text.strip() else line[:-1])
    return lines


def aligned(line: Line, width: int, side: str) -> Line:
    spare = width - wide(line)
    left = {"right": spare, "center": spare // 2}.get(side, 0)
    return [Piece(" " * left), *line, Piece(" " * (spare - left))]


# Code


@lru_cache(maxsize=64)
def coloured(code: str, language: str) -> list[Line]:
    """Lines of code in the colours of a language, or in one colour where we do not know it."""
    from pygments.lexers import get_lexer_by_name
    from pygments.util import ClassNotFound

    plain = [Piece(code, CODE)]
    try:
        lexer = get_lexer_by_name(language, stripnl=False, ensurenl=False)
    except ClassNotFound:
        return lines_of(plain)
    pieces = [Piece(text, colour(str(kind))) for kind, text in lexer.get_tokens(code + "\n")]
    if "".join(piece.text for piece in pieces) != code + "\n":
        return lines_of(plain)  # a lexer that leaves something out
    return lines_of(pieces)[:-1]


@cache
def colour(kind: str) -> str:
    """Of a token such as Token.Literal.String.Doc, or of the kind it belongs to."""
    kind = kind.removeprefix("Token").removeprefix(".")
    return COLOURS.get(kind) or (colour(kind.rpartition(".")[0]) if kind else "")


@lru_cache(maxsize=64)
def end_of_run(code: str, language: str) -> int:
    """After how many lines colouring can start anew without a difference; 0 for nowhere.

    Looks at the last few lines with which a part of a program may begin.
    """
    lines = code.split("\n")
    starts = [at for at in range(1, len(lines)) if lines[at].strip() and begins(lines[at - 1], lines[at])]
    for at in starts[:-4:-1]:
        parts = [coloured("\n".join(part), language) for part in (lines[:at], lines[at:])]
        if parts[0] + parts[1] == coloured(code, language):
            return at
    return 0


def begins(above: str, line: str) -> bool:
    return not above.strip() or not line[0].isspace()


# Pieces to lines, and lines to what a terminal shows


def plain(text: str, columns: int) -> str:
    """Text with its lines broken between words."""
    return "\n".join(
        line[start:stop]
        for line in text.replace("\t", TAB).split("\n")
        for start, stop in breaks(line, columns)
    )


def wrapped(pieces: Line, width: int, fold: bool = False) -> list[Line]:
    """Pieces as lines, broken between words where they are too wide; `fold` breaks long words, too."""
    lines = []
    for line in lines_of(pieces):
        text = "".join(piece.text for piece in line)
        if cell_len(text) <= width:
            lines.append(line)
        else:
            lines += [cut(line, *span) for span in breaks(text, width, fold)]
    return lines


def lines_of(pieces: Line) -> list[Line]:
    """Pieces as lines, broken where they have line ends."""
    lines: list[Line] = [[]]
    for text, style, url in pieces:
        first, *others = text.replace("\t", TAB).split("\n")
        if first:
            lines[-1].append(Piece(first, style, url))
        lines += [[Piece(other, style, url)] if other else [] for other in others]
    return lines


def cut(line: Line, start: int, stop: int) -> Line:
    """The letters from `start` to `stop`."""
    part: Line = []
    for piece in line:
        if start < len(piece.text) and stop > 0:
            part.append(piece._replace(text=piece.text[max(start, 0) : stop]))
        start, stop = start - len(piece.text), stop - len(piece.text)
    return part


def wide(line: Line) -> int:
    return cell_len("".join(piece.text for piece in line))


def breaks(text: str, width: int, fold: bool = False) -> list[tuple[int, int]]:
    """Where each line of a text starts and stops. A word that is too long stays whole, unless `fold`."""
    spans = []
    start = stop = used = 0
    for first, last in words(text, width if fold else sys.maxsize):
        cells = cell_len(text[stop:last])
        if stop > start and used + cells > width:
            spans.append((start, stop))
            start, used, cells = first, 0, cell_len(text[first:last])
        stop, used = last, used + cells
    return [*spans, (start, len(text))]


def words(text: str, width: int) -> Iterator[tuple[int, int]]:
    """Where the parts that stay whole start and stop: words, Chinese letters, letters of what is wider."""
    for word in re.finditer("[^ ]+", text):
        start, stop = word.span()
        long = cell_len(word.group()) > width
        if word.group().isascii() and not long:
            yield start, stop
            continue
        before, stop = "", start
        for letter in letters(word.group()):
            if before and (long or between(before, letter)):
                yield start, stop
                start = stop
            before, stop = letter, stop + len(letter)
        yield start, stop


def between(before: str, letter: str) -> bool:
    """Whether a line may end between two letters: Chinese has no spaces, and emoji need none."""
    if letter in NO_LINE_BEGINS_WITH or before in NO_LINE_ENDS_WITH:
        return False
    return cell_len(before) > 1 or cell_len(letter) > 1


def letters(word: str) -> Iterator[str]:
    """What is seen as one letter: with its accents, joined emoji, flags."""
    start = 0
    for at in range(1, len(word)):
        if not joined(word[at - 1], word[at], at - start):
            yield word[start:at]
            start = at
    yield word[start:]


def joined(before: str, letter: str, length: int) -> bool:
    """Whether a letter belongs to the one before, which has `length` code points."""
    if JOINER in (before, letter) or ord(letter) in TONES or category(letter).startswith("M"):
        return True
    return cell_len(letter) == 0 or (length == 1 and ord(before) in FLAGS and ord(letter) in FLAGS)


def ansi(lines: list[Line]) -> str:
    """Lines with their styles, each of which ends with its line."""
    return "".join("".join(map(looks, same(line))) + "\n" for line in lines)


def same(line: Line) -> Iterator[Piece]:
    """Neighbours that look the same, as one piece."""
    for (style, url), pieces in groupby(line, lambda piece: piece[1:]):
        yield Piece("".join(piece.text for piece in pieces), style, url)


def looks(piece: Piece) -> str:
    """A piece in a terminal's own language. Whatever came here, its text steers nothing."""
    text, style, url = piece
    text = ui.harmless(text)
    if style and text:
        text = f"\x1b[{style}m{text}\x1b[0m"
    return f"\x1b]8;;{url}\x1b\\{text}\x1b]8;;\x1b\\" if url else text
