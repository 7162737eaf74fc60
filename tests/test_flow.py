"""Markdown as it streams: drawn by CommonMark's rules, the same however it arrives, and no letter lost.

The property tests run over the CommonMark Spec's own examples: tests/data/commonmark.NOTICE has their
author.
"""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path

import pytest
from rich.cells import cell_len

from dsv2cli.cli import ui
from dsv2cli.cli.flow import Flow, terminal_flow

EXAMPLES = [
    entry["markdown"]
    for entry in json.loads((Path(__file__).parent / "data" / "commonmark.json").read_text(encoding="utf-8"))
]
CODE = "def f(x):\n    '''Two\n\n    lines'''\n    return x\n\n\n"
# What a model may say, cut anywhere: long lists, long code, things that only later lines decide.
TALK = [
    "- one\n- two\n\n  more of two\n1. a\n   > b\n   lazy\n\n\n2. c\n\ntext\n",
    "Intro:\n```python\n" + CODE * 12 + "```\n```\n```\n\nDone\n\n# \n\nx\n",
    "```c\n/* a comment\n\n" + "that goes on\n\n" * 30 + "*/ int x = 1;\n\nint main() {\n" + "  x++;\n" * 50,
    "~~~\n" + "no blank line\n" * 70 + "~~~~ \nafter",
    '[a]: /u\n"title\nin two lines"\n[b]: /v\n"no title" here\n\n[c]: /w\n===\n',
    "## a |\n|---|\n- a | b\n---|---\n\n[<http://y> z](/u)\n",
    "a | b\n--|--\n1 | 2\n\n| x |\n|---|\n| y | z |\nlazy\n",
    "Title\nof two\n===\n\n***\nx\n***\n    code\n\n    more\n<!-- a\n\nb -->\n> q\n\n> r\nlazy\n",
    "\u00a0\n\nx\n\u3000\ny\n- a\n\u00a0\n- b\n\n",
    "中文的字，没有空格。\n" * 5 + "- 👨‍👩‍👧‍👦 e\u0301\n\n\n\n" + "word " * 60,
]


def drawn(text, columns=40, pieces=None):
    flow = Flow(columns, True)
    return "".join(map(flow.feed, pieces if pieces is not None else [text])) + flow.end()


def bare(text):
    """Without styles and links."""
    return re.sub(r"\x1b\]8;;[^\x1b]*\x1b\\|\x1b\[[0-9;]*m", "", text)


def ink(style, text):
    return f"\x1b[{style}m{text}\x1b[0m"


def to(url, text):
    return f"\x1b]8;;{url}\x1b\\{text}\x1b]8;;\x1b\\"


def cut(text, dice):
    """Random pieces."""
    places = sorted(dice.choices(range(len(text) + 1), k=dice.randint(0, 12)))
    return [text[start:stop] for start, stop in zip([0, *places], [*places, len(text)], strict=True)]


def only(text, left_out):
    return "".join(letter for letter in text if not letter.isspace() and letter not in left_out)


# However it arrives


@pytest.mark.parametrize("columns", [80, 33])
def test_each_example_is_drawn_the_same_letter_by_letter(columns):
    for text in EXAMPLES + TALK:
        assert drawn(text, columns, pieces=text) == drawn(text, columns), text


@pytest.mark.parametrize("seed", range(3))
def test_examples_in_a_row_are_drawn_the_same_in_random_pieces(seed):
    dice = random.Random(seed)
    for _ in range(150):
        text = "".join(dice.sample(EXAMPLES + TALK, dice.randint(1, 5)))
        assert drawn(text, pieces=cut(text, dice)) == drawn(text), text


def test_what_was_given_out_and_the_living_rest_are_the_text_so_far():
    for text in TALK:
        flow, given = Flow(40, True), ""
        for stop in range(1, len(text) + 1):
            given += flow.feed(text[stop - 1])
            if stop % 7 == 0:
                assert (given + flow.live()).rstrip("\n") == drawn(text[:stop]).rstrip("\n")
            assert given == "" or given.endswith("\n")


def test_a_block_is_given_out_when_nothing_can_change_it_and_not_before():
    flow = Flow(40, True)
    assert flow.feed("# Now\n") == ink("1;4", "Now") + "\n"
    assert flow.feed("Title?\n") == "" and flow.live() == "Title?"
    assert flow.feed("===") == "" and flow.live() == ink("1;4", "Title?")
    assert flow.feed("x\n\n") == "Title?\n===x\n"
    assert flow.feed("- one\n") == "" and flow.live() == "\n• one"
    assert flow.feed("- two\n") == "\n• one\n" and flow.live() == "• two"
    assert flow.feed("```\nx = 1\n") == "• two\n" and flow.live() == ink("36", "x = 1")
    assert flow.feed("```\n") == ink("36", "x = 1") + "\n" and flow.live() == flow.end() == ""


def test_long_code_is_given_out_in_parts_but_a_string_of_many_lines_is_not_cut():
    flow = Flow(40, True)
    flow.feed("```python\n")
    assert flow.feed(CODE * 5).count("def") >= 3
    text = "'''" + "A line.\n\n" * 40
    flow = Flow(40, True)
    assert flow.feed(f"```python\ny = 1\n\nx = {text}").count("A line") == 0
    rest = flow.feed("'''\n```\n")
    assert rest.count(ink("32", "A line.")) == 39 and ink("32", "'''A line.") in rest


def test_a_long_answer_costs_no_more_than_its_length(monkeypatch):
    parsed = 0

    def counted(source):
        nonlocal parsed
        parsed += len(source)
        return real(source)

    from dsv2cli.cli import flow as module

    real = module.parsed
    monkeypatch.setattr(module, "parsed", counted)
    for text in ("some words in a line\n" * 600, "- an item in a list\n" * 600, "x\n\n" * 1000):
        parsed = 0
        drawn(text, pieces=text)
        assert parsed < 40 * len(text)


# Nothing is lost


def test_of_each_example_all_but_markdowns_marks_is_shown_in_order_and_nothing_else():
    """Left out on both sides: space, and the characters that can be a mark, `[text](url)` among them.

    So each letter, digit, other punctuation, symbol and control (made visible) of the source appears, HTML,
    entities, addresses, titles and names of languages too. No example has a link whose text is its address.
    """
    marks = "#>-+*_~`|=\\<[]()!"
    for text in EXAMPLES + TALK:
        for columns in (80, 12):
            assert only(bare(drawn(text, columns)), marks + "•│─┼") == only(ui.harmless(text), marks), text


@pytest.mark.parametrize(
    "text",
    [
        "> " * 300 + "deep",
        "- " * 300 + "deep",
        "![" * 300 + "deep" + "](x)" * 300,
        "*" * 999 + "deep" + "*" * 999,
    ],
    ids=["quotes", "lists", "images", "stars"],
)
def test_nothing_is_lost_however_deep_it_lies(text):
    assert "deep" in bare(drawn(text)) and drawn(text, pieces=text) == drawn(text)


def test_cells_beyond_the_last_column_are_shown():
    assert bare(drawn("|a|b|\n|-|-|\n|1|2|3|4|\n")).split("\n")[2] == "1   │ 2   │ 3   │ 4"


def test_code_that_a_lexer_would_change_is_shown_as_it_is():
    assert bare(drawn("```python\n\ufeffx = 1\n\n\n```\n")) == "python\n\ufeffx = 1\n\n\n"


# By construct


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb  \nc\\\nd", "a\nb\nc\nd\n"),
        ("**b** *i* ***bi*** ~~s~~", f"{ink('1', 'b')} {ink('3', 'i')} {ink('3;1', 'bi')} {ink('9', 's')}\n"),
        ("**one\ntwo** x", f"{ink('1', 'one')}\n{ink('1', 'two')} x\n"),
        ("`a` ``b`c`` **`d`** `", f"{ink('36', 'a')} {ink('36', 'b`c')} {ink('1;36', 'd')} `\n"),
        ("2**3 ** *** snake_case_name * x", "2**3 ** *** snake_case_name * x\n"),
        (r"\*a\* \# \\ \a", "*a* # \\ \\a\n"),
        (r"\( x \) \[ y \] \{z\}", "\\( x \\) \\[ y \\] \\{z\\}\n"),
        ("&amp; &#65; <b>x</b> <br/>", "&amp; &#65; <b>x</b> <br/>\n"),
        ("<div>\n *a* &lt;\n</div>", "<div>\n *a* &lt;\n</div>\n"),
        ("# 1\n## 2 #\n### 3\n#### 4\n##### 5\n###### 6", None),
        ("Big\n===\nSmall\n---", f"{ink('1;4', 'Big')}\n{ink('1', 'Small')}\n"),
        ("# A *b*", f"{ink('1;4', 'A ')}{ink('1;4;3', 'b')}\n"),
        ("a\n\n\n\nb\n***\n", f"a\n\nb\n{ink('2', '─' * 40)}\n"),
        ("text\n- a\n* b\n+ c\n\n\n- d", "text\n• a\n• b\n• c\n\n• d\n"),
        ("7. a\n7. b\n\n03) c", "7. a\n7. b\n\n03) c\n"),
        ("- a\n  - b\n    1. c\n\n       d\n  - [ ] e", "• a\n  • b\n    1. c\n\n       d\n  • [ ] e\n"),
        ("-\n- - a", "•\n• • a\n"),
        ("    a  b\n\n    c", f"{ink('36', 'a  b')}\n\n{ink('36', 'c')}\n"),
        ("~~~nix-like x=1\n<y>\n~~~\nz", f"{ink('2', 'nix-like x=1')}\n{ink('36', '<y>')}\nz\n"),
        ('[a]: http://x "T"\n\n[a] [b][a]', ink("2", '[a]: http://x "T"') + "\n\n[a] [b][a]\n"),
        ("![An *image*](p.png 'T')", "An " + ink("3", "image") + ink("2", " (p.png 'T')") + "\n"),
        ("a\tb", "a    b\n"),
        ("", ""),
        ("\n\n", ""),
    ],
)
def test_each_construct_looks_like_this(text, shown):
    if shown is None:
        styles = re.findall(r"\x1b\[([0-9;]+)m(\d)\x1b\[0m\n", drawn(text))
        assert [number for _, number in styles] == list("123456") and len(set(dict(styles))) == 6
    else:
        assert drawn(text) == shown


def test_a_quote_has_a_bar_on_every_line():
    bar = ink("2", "│ ")
    text = "> a long line that does not fit\n> > inner\n>\n> ```\n> x\n> ```\n>\nout"
    lines = drawn(text, 20).split("\n")
    assert lines[:3] == [bar + "a long line that", bar + "does not fit", ink("2", "│ │ ") + "inner"]
    assert lines[3:] == [ink("2", "│"), bar + ink("36", "x"), "out", ""]


def test_lists_hang():
    text = "10. some words that wrap\n    - and **some words** more\n\n      ```\n      code\n      ```\n"
    assert bare(drawn(text, 16)) == (
        "10. some words\n    that wrap\n    • and some\n      words more\n\n      code\n"
    )


def test_tables_are_aligned_and_wide_cells_wrap():
    text = "| Name | Number |\n|:--|--:|\n| *pi* | 3.14159 |\n| 圆周率 | 3 |\n"
    bar = ink("2", " │ ")
    assert drawn(text) == (
        f"{ink('1', 'Name')}  {bar} {ink('1', 'Number')}\n"
        f"{ink('2', '─' * 6 + '─┼─' + '─' * 7)}\n"
        f"{ink('3', 'pi')}    {bar}3.14159\n"
        f"圆周率{bar}      3\n"
    )
    assert drawn("|a\tb|\n|-|\n|c|\n") == f"{ink('1', 'a    b')}\n{ink('2', '─' * 6)}\nc\n"
    wide = f"| a | b |\n|---|:-:|\n| {'word ' * 12} | {'x' * 30} |\n"
    shown = bare(drawn(wide, 40))
    assert max(map(cell_len, shown.split("\n"))) <= 40
    assert shown.count("word") == 12 and shown.count("x") == 30


@pytest.mark.parametrize("mark", ["```", "~~~~"])
def test_code_is_coloured_as_a_whole_and_never_broken(mark):
    line = "for i in range(10): print('a line that is far too long for the terminal')"
    text = f"{mark}python\n{line}\ns = '''a\n  if b'''\n{mark}\nDone **now**"
    shown = drawn(text)
    assert bare(shown) == f"python\n{line}\ns = '''a\n  if b'''\nDone now\n"
    assert ink("35", "for") in shown and ink("32", "  if b'''") in shown


def test_links_lead_to_the_web_and_say_where():
    assert (
        drawn("[a **b**](http://x.y/?q=1&amp;r 'T')")
        == (to("http://x.y/?q=1&r", "a ") + to("http://x.y/?q=1&r", ink("1", "b")))
        + ink("2", " (http://x.y/?q=1&amp;r 'T')")
        + "\n"
    )
    assert (
        drawn("<https://x.y>")
        == drawn("[https://x.y](https://x.y)")
        == to("https://x.y", "https://x.y") + "\n"
    )
    assert drawn("[a](<HTTPS://x.y/ü b>)") == (
        to("HTTPS://x.y/%C3%BC%20b", "a") + ink("2", " (HTTPS://x.y/ü b)") + "\n"
    )
    assert drawn("[a](b.md) <me@x.y>") == f"a{ink('2', ' (b.md)')} me@x.y\n"
    lines = drawn("[some words](http://x.y)", 8).split("\n")
    assert lines[:2] == [to("http://x.y", "some"), to("http://x.y", "words")]


def test_letters_of_several_code_points_stay_whole():
    for letter in ("👨‍👩‍👧‍👦", "🇩🇪", "👍🏽", "e\u0301", "❤\ufe0f"):
        text = letter * 30
        for shown in (drawn(text, 12), drawn(f"|a|\n|-|\n|{text}|\n", 12), drawn(f"**{text}**", 12)):
            assert sum(line.count(letter) for line in bare(shown).split("\n")) == 30
            assert sum(map(len, bare(shown).split())) >= len(text)
    assert drawn("你好，" * 3, 7) == "你好，\n你好，\n你好，\n"


# Safety


@pytest.mark.parametrize(
    "text",
    [
        "a \x1b[2J b \x9b2J \x07 \u202e \u2066 \r \x00 \u2028 \ud800",
        "[a\x1b](http://x/\x1b]8;;\u202e) ![\x1b](\x1b) <http://x\u202e>",
        "[a](http://x/&#27;&#x202e;&#x9b;) [a](http://x '&#27;&#x202e;')",
        "```\x1b[2J\u202e x\ty\n\x1b[2J\n\u202e\n```\n",
        "[\u202e]: http://\x1b 'x\u202e'\n\n<b \x1b>\n\n|\x1b|\n|-|\n|\u202e|\n",
        "``\x1b]8;;http://x\x07`` # \x1b\n> \x1b\n- \x1b\n\n    \x1b",
    ],
    ids=ascii,
)
def test_nothing_in_a_text_steers_the_terminal(text):
    for shown in (drawn(text), drawn(text, 1), "".join(drawn(text, pieces=text))):
        ours = re.sub(r"\x1b\]8;;(https?://[!-~]+)?\x1b\\|\x1b\[[0-9;]+m", "", shown)
        assert ours.replace("\n", "").isprintable() and ui.harmless(ours) == ours
    plain = Flow(40, False)
    shown = plain.feed(text) + plain.end()
    assert ui.harmless(shown) == shown


@pytest.mark.parametrize(
    "address",
    ["javascript:alert(1)", "file:///etc/passwd", "data:text/html,x", "java&#115;cript:x", "mailto:a@b.c"],
)
def test_other_addresses_are_shown_and_lead_nowhere(address):
    shown = drawn(f"[x]({address}) ![y]({address})", 80)
    assert "\x1b]" not in shown and bare(shown).count(address) == 2


# Without drawing, and into a pipe


def test_a_pipe_gets_the_text_as_it_came():
    flow = Flow(0, False)
    text = "a \x1b[2J  **b**\r\n\ttail"
    assert "".join(map(flow.feed, text)) == text and flow.live() == flow.end() == ""


def test_undrawn_lines_break_between_words_and_wide_letters_count_twice():
    def broken(text, columns):
        flow = Flow(columns, False)
        return "".join(map(flow.feed, text)) + flow.end()

    assert broken("aaaa bbbb cccc\n  dd", 9) == "aaaa bbbb\ncccc\n  dd\n"
    assert broken("你好你好你好", 8) == "你好你好\n你好\n"
    assert broken("a" * 30, 8) == "a" * 30 + "\n"
    assert broken("# **x** \x1b\n\n", 9) == "# **x** ␛\n\n"


def test_undrawn_whole_lines_are_finished_and_the_last_one_lives():
    flow = Flow(9, False)
    assert flow.feed("aaaa bb") == "" and flow.live() == "aaaa bb"
    assert flow.feed("bb cc\nx") == "aaaa bbbb\ncc\n" and flow.live() == "x"
    assert flow.end() == "x\n" and flow.end() == ""


@pytest.mark.parametrize(
    ("terminal", "plain", "variable", "drawn"),
    [
        (True, False, ("TERM", "xterm"), True),
        (True, True, ("TERM", "xterm"), False),
        (True, False, ("NO_COLOR", "1"), False),
        (True, False, ("TERM", "dumb"), False),
        (False, False, ("TERM", "xterm"), False),
    ],
)
def test_only_a_terminal_with_colours_is_drawn_on(monkeypatch, terminal, plain, variable, drawn):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv(*variable)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    flow = terminal_flow(plain)
    assert flow.drawn is drawn and (flow.columns > 0) is terminal


# A window that is resized


@pytest.mark.parametrize("style", [True, False])
def test_what_comes_after_a_resize_follows_the_new_width(style):
    flow = Flow(10, style)
    words = "some words in a row\n\n"
    narrow, wide = "some words\nin a row\n", "some words in a row\n"
    assert flow.feed(words).rstrip("\n") + "\n" == narrow
    flow.feed(words.strip())
    assert flow.live().lstrip("\n") + "\n" == narrow
    flow.columns = 30
    assert flow.live().lstrip("\n") + "\n" == wide
    assert flow.end().lstrip("\n") == wide
