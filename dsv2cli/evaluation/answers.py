"""How the answer is taken from what a model wrote, and when two answers are the same.

Texts in, texts and verdicts out: nothing here knows a model, a file or a prompt. Every function takes any
text whatever, in time that grows with its length.

An answer that is announced ("The answer is 42.") is the first one that is: a model that was shown examples
often goes on and writes, and answers, a question of its own.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from fractions import Fraction
from itertools import islice

LONGEST_NUMBER = 100  # characters; what is longer is no number
MOST_SENTENCES = 100  # that announce an answer
LONGEST_SENTENCE = 200  # characters after "the answer is" in which its number is
LONGEST = 2000  # characters of an answer of MATH that are put into one form

ANNOUNCED = re.compile(r"\banswer is\b:?", re.IGNORECASE)
BARE_ANSWER = re.compile(r"[ \t*:=~(]*(?:about|exactly|only)?[ \t*:=~(\\{-]*[$£€¥]?-?\.?[0-9]")
SENTENCE_END = re.compile(r"\.(?![0-9])|\n")

# GSM8K

MINUSES = str.maketrans("−–﹣－", "----")
NUMBER = re.compile(
    r"""(?: (?<![0-9A-Za-z)\]}%]) (?P<minus>-) )?   # otherwise it stands between two numbers
        [$£€¥]? (?P<second_minus>(?<=[$£€¥])-)?
        (?P<digits> (?: [0-9]{1,3}(?:,[0-9]{3})+ (?![0-9])
                      | [0-9]{1,2}(?:,[0-9]{2}){1,6},[0-9]{3} (?![0-9])   # as in India
                      | [0-9]+ ) (?:\.[0-9]+)?
                  | \.[0-9]+ )
        (?: [ ]?/[ ]? (?P<under>[0-9]+) )?""",
    re.VERBOSE,
)
NUMBER_FRACTION = re.compile(r"\\[dtc]?frac\{([0-9]+)\}\{([0-9]+)\}")
HASHES = re.compile(r"####[ \t*]*(?=[-$£€¥.0-9])")
HEADING = re.compile(r"[.):][ \t*]*[^\W0-9]")  # after a number: "#### 1. Eggs a day"


def number_of(text: str) -> str | None:
    """The number that answers a question of GSM8K: bare digits, "-1234.50" or "1/2".

    It stands after the first `####` that a number follows, as in the data set, or in the first sentence that
    announces one (where some do so at once, "the answer is 7", in the first of these): the number after its
    last "=", or else its first, so that "3 + 4 = 7 apples" is 7 and "18, not 20" is 18. Or it is the last
    `\\boxed` number, or the last number of all.
    """
    text = text.translate(MINUSES).replace("{,}", ",").replace("\\!", "").replace("\\$", "$")
    text = NUMBER_FRACTION.sub(r"\1/\2", text)
    for hashes in HASHES.finditer(text):
        match = NUMBER.match(text, hashes.end())
        if match and (number := _bare(match)) and not HEADING.match(text, match.end()):
            return number
    sentences = [
        SENTENCE_END.split(text[each.end() : each.end() + LONGEST_SENTENCE], maxsplit=1)[0]
        for each in islice(ANNOUNCED.finditer(text), MOST_SENTENCES)
    ]
    plain = [each for each in sentences if BARE_ANSWER.match(each)]
    for sentence in plain or sentences:
        for part in reversed(sentence.rsplit("=", 1)):
            if number := next(_numbers(part), None):
                return number
    boxed = _last_boxed(text)
    if boxed and (number := next(_numbers(boxed.rpartition("=")[2]), None)):
        return number
    return max(enumerate(_numbers(text)), default=(0, None))[1]


def same_number(a: str, b: str) -> bool:
    """Whether both are numbers, and of the same value: "18", "$18.00", "18%" and "36/2"."""
    value = _value(a)
    return value is not None and value == _value(b)


def _numbers(text: str) -> Iterator[str]:
    return (number for match in NUMBER.finditer(text) if (number := _bare(match)))


def _bare(match: re.Match[str]) -> str | None:
    """A match of NUMBER without commas and signs of money, or None where it is too long."""
    if len(match[0]) > LONGEST_NUMBER:
        return None
    minus = "-" if match["minus"] or match["second_minus"] else ""
    under = f"/{match['under']}" if match["under"] else ""
    return minus + match["digits"].replace(",", "") + under


def _value(text: str) -> Fraction | None:
    if len(text) > LONGEST_SENTENCE:
        return None
    match = NUMBER.fullmatch(text.translate(MINUSES).strip(" \t\n*").removesuffix(".").rstrip("%£€¥$* "))
    number = _bare(match) if match else None
    if number is None:
        return None
    over, _, under = number.partition("/")
    return Fraction(over) / int(under or 1) if int(under or 1) else None


# MATH

# A brace after a backslash groups nothing; the doubled backslash before `boxed` is JSON's.
BOX_OR_BRACE = re.compile(
    r"\\{1,2}(?:boxed|fbox)(?:[ \t]*(?P<brace>\{)|(?P<blank>[ \t]+))|\\.|[{}]", re.DOTALL
)
MINERVA_START = re.compile(r"\bfinal answer is\b:?", re.IGNORECASE)
MINERVA_END = re.compile(r"I hope it is correct", re.IGNORECASE)
FORMULA = re.compile(r"\$\$(.+?)\$\$|\$((?:\\.|[^$\\])+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
MATH_END = re.compile(r"\.(?=\s|$)|\n")


def math_of(text: str) -> str | None:
    """The answer to a problem of MATH: what the sentence of Minerva's prompt says ("Final Answer: The final
    answer is $X$. I hope it is correct."), the content of the last box whose braces close, or else what the
    first sentence that announces an answer says.
    """
    if end := MINERVA_END.search(text):
        starts = [start.end() for start in MINERVA_START.finditer(text, 0, end.start())]
        if starts and "\n" not in (line := text[starts[-1] : end.start()].strip()):
            if said := _formula(line.removesuffix(".")):
                return said
            text = text[: end.start()]
    if boxed := _last_boxed(text):
        return boxed
    for announced in ANNOUNCED.finditer(text):
        rest = text[announced.end() : announced.end() + LONGEST].lstrip(" \t\r\n*")
        formula = FORMULA.match(rest)
        if answer := _formula(formula[0] if formula else MATH_END.split(rest, maxsplit=1)[0]):
            return answer
    return None


def same_math(a: str, b: str) -> bool:
    """Whether two answers are written alike, as MATH's own script and Minerva's see it: no algebra is done,
    and "0.25" is not "1/4".

    Three of their gaps are closed. What stands before an equals sign is dropped only where it is a name of at
    most two characters, as in MATH's script: in Minerva's, all equations with "= 0" are the same. A comma is
    dropped only between thousands: there, "1,2" is 12. And a `\\text` that begins with a blank is a unit only
    at the end: in MATH's, "1\\text{ and }2" is 1.
    """
    a, b = a.strip(), b.strip()
    if a == b or max(len(a), len(b)) > LONGEST:
        return a == b != ""
    return _one_form(a) == _one_form(b) != ""


def _last_boxed(text: str) -> str | None:
    """What the last box holds that is closed. `\\boxed 5` reaches to the dollar sign, or else to a blank."""
    opened: list[tuple[int, bool]] = []  # braces that have not been closed: where each ends, whether of a box
    last, found = -1, None
    for match in BOX_OR_BRACE.finditer(text):
        if match["brace"] or match[0] == "{":
            opened.append((match.end(), match["brace"] is not None))
        elif match["blank"]:
            last, found = match.end(), None
        elif match[0] == "}" and opened:
            start, is_box = opened.pop()
            if is_box and start > last:
                last, found = start, text[start : match.start()]
    if last >= 0 and found is None:
        line = text[last : last + LONGEST].partition("\n")[0]
        found = line.partition("$")[0] if "$" in line else line.partition(" ")[0]
        found = found.strip().removesuffix(".")
    return found.strip() if found else None


def _formula(text: str) -> str:
    """What stands between the dollars, where a text is one formula, or the text itself."""
    text = text.strip(" \t\r\n*")
    match = FORMULA.fullmatch(text) if len(text) <= LONGEST else None
    return next(filter(None, match.groups())).strip() if match else text


UNIT_WORDS = (
    "square ways integers dollars mph inches ft hours km units points feet minutes digits cents degrees cm "
    "gm pounds meters meals edges students multiples th"
).split()
POWER = r"(?:\s*\^(?:[23]|\{[23]\}))?"
UNITS = re.compile(rf"(?<![A-Za-z\\])(?:children\s*tickets|{'|'.join(UNIT_WORDS)})(?![A-Za-z]){POWER}")
SHORT_UNITS = re.compile(rf"\\text\{{\s*[ms.]?\s*\}}{POWER}")
LAST_UNIT = re.compile(rf"(?<=.)\\text\{{\s[^{{}}]*\}}{POWER}$")
WRAPPED = re.compile(r"\\(?:text|textbf|textit|overline|mathrm|mathbf)\s*\{([^{}]*)\}")
TOKEN = r"([0-9A-Za-z]|\\[A-Za-z]+)"
THOUSANDS = re.compile(r"-?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?")


def _one_form(text: str) -> str:
    """An answer in the form in which those that are the same are equal."""
    text = _last_boxed(text) or text
    text = text.replace("\n", " ").replace("{,}", ",").replace('"', "")
    text = re.sub(r"\s*\\\\\s*", r"\\\\", text)  # rows of a matrix: a blank after one is not "\ "
    text = re.sub(r"(?<!\\)\\[ ,;:!]", " ", text).replace("\\\\", "\\").replace("\\$", "")
    text = re.sub(r"\\[dtc]frac", r"\\frac", text)
    text = re.sub(r"\\(?:left|right)(?![A-Za-z])|\\l?dots(?![A-Za-z])|\^\s*\{?\\circ\}?|°|\\?%", "", text)
    text = text.replace("\\mbox", "\\text").replace("\\textrm", "\\text")
    text = _inside_dollars(text).strip().removesuffix(".").strip()
    text = _without_units(text).strip()
    text = re.sub(r"(?<![0-9])\.(?=[0-9])", "0.", text)
    before, equals, after = text.partition("=")
    if equals and "=" not in after and len(before.strip()) <= 2 and after.strip():
        text = after
    text = re.sub(rf"\\sqrt\s*{TOKEN}", r"\\sqrt{\1}", text)
    text = re.sub(rf"\\frac\s*{TOKEN}", r"\\frac{\1}", text)
    text = re.sub(rf"\\frac\s*(\{{[^{{}}]*\}})\s*{TOKEN}", r"\\frac\1{\2}", text)
    text = "".join(text.split())
    if THOUSANDS.fullmatch(text):
        return text.replace(",", "")
    if text == "0.5":
        return "\\frac{1}{2}"
    text = re.sub(r"^(-?)([0-9]+)/([0-9]+)$", r"\1\\frac{\2}{\3}", text)
    return re.sub(r"^\\frac\{-([0-9]+)\}(\{[0-9]+\})$", r"-\\frac{\1}\2", text)


def _inside_dollars(text: str) -> str:
    """What stands between the two dollar signs of a text, or a text that has more or fewer without them."""
    parts = text.split("$")
    return parts[1] if len(parts) == 3 and parts[1].strip() else "".join(parts)


def _without_units(text: str) -> str:
    """An answer without units and words around it, unless it is nothing else: a square may be the answer."""
    text = LAST_UNIT.sub("", SHORT_UNITS.sub("", re.sub(r",?\s*\\text\{\s*and\s*\}", ",", text)))
    while (inner := WRAPPED.sub(r" \1 ", text)) != text:
        text = inner
    text = re.sub(r",?\s+and\s+", ",", re.sub(r"\ban?\s+(?=[A-Za-z]{2})", "", text))
    bare = re.sub(r"\^\s*\{\s*\}", "", UNITS.sub("", text))
    return bare if bare.strip() else text


# BIG-Bench Hard

ANSWER_LINE = re.compile(r"^[ \t>#_]*(?:the |final |the final )?answer:", re.IGNORECASE | re.MULTILINE)
OPTION = re.compile(r"\([A-Z]\)")
CASELESS = {"yes", "no", "true", "false", "valid", "invalid"}


def bbh_of(text: str) -> str | None:
    """What follows the first "the answer is" to the end of its line, or else what follows a line's "Answer:".

    Where nothing follows on that line, it is the next one that has something.
    """
    text = text.replace("**", "")
    announced = ANNOUNCED.search(text) or ANSWER_LINE.search(text)
    return _first_line(text[announced.end() :]) if announced else None


def direct_of(text: str) -> str | None:
    """The answer of BBH that was given without reasoning: the first line, or what it announces."""
    line = _first_line(text.replace("**", ""))
    return line and (bbh_of(line) or line)


def same_bbh(gold: str, answer: str) -> bool:
    """Whether an answer is the gold one, as it is written but for blanks and a last period.

    Where the gold is an option, "A" is "(A)", too; where it is yes or no, true or false, valid or invalid,
    its case does not count.
    """
    gold, answer = (" ".join(text.split()).removesuffix(".").rstrip() for text in (gold, answer))
    if gold.lower() in CASELESS:
        return gold.lower() == answer.lower()
    return answer == gold or (OPTION.fullmatch(gold) is not None and answer == gold[1:-1])


def _first_line(text: str) -> str | None:
    line = text.lstrip().partition("\n")[0].rstrip()
    return line.removesuffix(".").rstrip() or None


# HumanEval and MBPP

FENCE = re.compile(r"`{3,}(?:[^\n`]*(?P<block>\n))?")
BLOCK_END = re.compile(r"^[ \t]*```", re.MULTILINE)
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")  # where HumanEval's own script ends a completion


def code_of(text: str, wanted: str = "") -> str:
    """The program in a chat answer: what the first fence holds, or the first in which something is `wanted`,
    to the end where it is not closed; the whole text where there is none.
    """
    programs, at = list[str](), 0
    while (fence := FENCE.search(text, at)) and len(programs) < MOST_SENTENCES:
        program, at = _fenced(text, fence)
        programs.append(program)
    return next((each for each in programs if wanted in each), programs[0] if programs else text)


def _fenced(text: str, fence: re.Match[str]) -> tuple[str, int]:
    """What stands in a fence, and where that ends."""
    start = fence.end()
    if not fence["block"]:
        program = text[start:].partition("```")[0]
        return program, start + len(program) + 3
    closed = BLOCK_END.search(text, start)
    program = text[start : closed.start() if closed else len(text)]
    is_indented = text[text.rfind("\n", 0, fence.start()) + 1 : fence.start()].isspace()
    return textwrap.dedent(program) if is_indented else program, closed.end() if closed else len(text)


def completion_of(text: str) -> str:
    """The body of HumanEval's function: a completion up to where something else begins."""
    return text[: min((at for stop in STOPS if (at := text.find(stop)) >= 0), default=len(text))]


def mbpp_of(text: str) -> str:
    """The program of MBPP: what stands between [BEGIN], or the start, and the first [DONE], or the end."""
    program = text.partition("[DONE]")[0]
    return program.partition("[BEGIN]")[2] if "[BEGIN]" in program else program
