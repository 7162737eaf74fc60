"""A picture of scores with their standard errors, one run or two: SVG, drawn by hand."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

NAME, WIDE, HIGH, GAP = 150, 460, 18, 14  # of the column of names, the longest bar, a bar; between two tasks
COLOURS = ("#1f77b4", "#a6a6a6")  # of this run and of the other
TEXT = 'font-family="sans-serif" font-size="13"'


@dataclass(frozen=True)
class Bar:
    """A share of 1, its standard error, and what it says beside it."""

    value: float
    error: float | None
    label: str


@dataclass(frozen=True)
class Group:
    """The bars of one task: this run's, and the other's; and a remark below them."""

    name: str
    bars: tuple[Bar, ...]
    remark: str = ""


def chart(title: str, legend: list[str], groups: list[Group]) -> str:
    """The picture as the text of a file. A bar as long as the picture is wide stands for 100%."""
    y, parts = 34, [text(10, 22, title, "bold")]
    for number, name in enumerate(legend):
        parts.append(rectangle(10, y, 12, 12, COLOURS[number]))
        parts.append(text(28, y + 11, name))
        y += 20
    y += GAP
    for group in groups:
        parts.append(text(10, y + 13, group.name, "bold"))
        for number, bar in enumerate(group.bars):
            parts += drawn(bar, y, COLOURS[number])
            y += HIGH + 2
        if group.remark:
            parts.append(text(NAME, y + 12, group.remark))
            y += HIGH
        y += GAP
    wide = NAME + WIDE + 160
    body = "\n".join(parts)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{wide}" height="{y}" viewBox="0 0 {wide} {y}">'
    return f'{head}\n<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'


def drawn(bar: Bar, y: float, colour: str) -> list[str]:
    """A bar, the range of its standard error, and its label."""
    value = min(max(bar.value, 0.0), 1.0)
    parts = [rectangle(NAME, y, WIDE * value, HIGH - 2, colour)]
    reach = value
    if bar.error:
        least, reach = max(0.0, value - bar.error), min(1.0, value + bar.error)
        middle = y + HIGH / 2 - 1
        ends = f'x1="{NAME + WIDE * least:.1f}" x2="{NAME + WIDE * reach:.1f}"'
        parts.append(f'<line {ends} y1="{middle:.1f}" y2="{middle:.1f}" stroke="black" stroke-width="1.5"/>')
    return [*parts, text(NAME + WIDE * reach + 6, y + 13, bar.label)]


def rectangle(x: float, y: float, wide: float, high: float, colour: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{high:.1f}" fill="{colour}"/>'


def text(x: float, y: float, words: str, weight: str = "normal") -> str:
    shown = "".join(letter if letter.isprintable() else "\ufffd" for letter in words)
    return f'<text x="{x:.1f}" y="{y:.1f}" {TEXT} font-weight="{weight}">{escape(shown)}</text>'
