"""What a model wrote gives the answer that the benchmarks' own scripts take from it."""

from __future__ import annotations

import random
import time

import pytest

from dsv2cli.evaluation.answers import (
    bbh_of,
    code_of,
    completion_of,
    direct_of,
    math_of,
    mbpp_of,
    number_of,
    same_bbh,
    same_math,
    same_number,
)

NUMBERS = [
    # the data set's own
    ("She makes 9 * 2 = $<<9*2=18>>18 every day.\n#### 18", "18"),
    ("#### 1,080", "1080"),
    ("#### -10", "-10"),
    ("####42", "42"),
    ("#### $1,234.50", "1234.50"),
    ("#### **42** apples", "42"),
    ("so 3\n#### 42.\n\nQuestion: 5 eggs?\n#### 7", "42"),
    ("#### 42\nThe answer is 7.", "42"),
    ("#### unknown, perhaps 3", "3"),
    ("#### 1. Eggs a day\n16 - 3 = 13\n\n#### 2. Dollars\nThe answer is 26.", "26"),
    ("#### Step 1: count\n16 - 3 = 13", "13"),
    ("The answer is found by adding 3 and 4. The answer is 7.", "7"),
    # a sentence
    ("The answer is $1,234.50.", "1234.50"),
    ("So the answer is 5.\n\nQ: There are 3 cars.\nA: The answer is 8.", "5"),
    ("The answer is 5. Then 7 more come.", "5"),
    ("Therefore, the final answer is: **42**.", "42"),
    ("THE ANSWER IS 42", "42"),
    ("The answer is 16 - 3 - 4 = 9 eggs.", "9"),
    ("The answer is 18 dollars, not 20.", "18"),
    ("The answer is 42 apples in 3 boxes.", "42"),
    ("The answer is −7.", "-7"),
    ("The answer is -$7.", "-7"),
    ("The answer is $-7.", "-7"),
    ("The answer is 50%.", "50"),
    ("The answer is £3.20, she says.", "3.20"),
    ("The answer is €1,000", "1000"),
    ("The answer is 1/2.", "1/2"),
    ("The answer is .5.", ".5"),
    ("The answer is \\(\\frac{3}{4}\\).", "3/4"),
    ("The answer is unknown. But 4 + 4 = 8.", "8"),
    ("The answer is:\n\n\\[\\boxed{42}\\]\n\nfor 7 days", "42"),
    ("The answer is $\\boxed{42}$ in 7 days", "42"),
    # a box
    ("thus $\\boxed{42}$ in 7 days", "42"),
    ("first \\boxed{41}, no, \\boxed{42}; 7", "42"),
    ("\\boxed{\\$1{,}080\\text{ a year of 12 months}}", "1080"),
    ("\\boxed{x = 5}, 7", "5"),
    ("\\boxed{none} but 7", "7"),
    # the last number
    ("She had 16, ate 3 and sold 13.", "13"),
    ("It is **42**.", "42"),
    ("It is 1,000,000.", "1000000"),
    ("In India that is 1,00,000.", "100000"),
    ("The numbers are 1,2,3", "3"),
    ("It is 16-3", "3"),
    ("It is (-3)", "-3"),
    ("pages 3–5", "5"),
    ("42 apples", "42"),
    ("5kg", "5"),
    # none
    ("", None),
    ("none at all.", None),
    ("The answer is twelve.", None),
    ("#### ", None),
    ("$ , . - / %", None),
    ("9" * 101, None),
    ("7 and " + "9" * 101, "7"),
]


@pytest.mark.parametrize("text, number", NUMBERS)
def test_the_number_of_a_text(text, number):
    assert number_of(text) == number


@pytest.mark.parametrize(
    "a, b, same",
    [
        ("18", "18.00", True),
        ("18", "$18", True),
        ("18", " **18.** ", True),
        ("18", "18%", True),
        ("1,080", "1080", True),
        ("0.5", ".5", True),
        ("0.5", "1/2", True),
        ("-1/2", "−0.50", True),
        ("36/2", "18", True),
        ("-0", "0", True),
        ("007", "7", True),
        ("0.1", "0.10000000000000000000001", False),
        ("9007199254740993", "9007199254740992", False),  # the same float
        ("0.33", "1/3", False),
        ("18", "-18", False),
        ("18", "18.5", False),
        ("1080", "10,80", False),
        ("1080", "1.080", False),
        ("18", "", False),
        ("", "", False),
        ("abc", "abc", False),
        ("1/0", "1/0", False),
        ("nan", "nan", False),
        ("inf", "inf", False),
        ("1e3", "1000", False),
        ("1_000", "1000", False),
        ("9" * 5000, "9" * 5000, False),
    ],
)
def test_numbers_are_the_same_by_value(a, b, same):
    assert same_number(a, b) is same_number(b, a) is same


MATH_ANSWERS = [
    # boxes
    ("so $x = \\boxed{5}$.", "5"),
    ("$\\boxed{\\frac{1}{\\sqrt{2}}}$", "\\frac{1}{\\sqrt{2}}"),
    ("\\boxed{1}, or rather \\boxed{2}", "2"),
    ("\\fbox{7}", "7"),
    ("\\boxed {7}", "7"),
    ("\\\\boxed{7}", "7"),
    ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
    ("\\boxed{\\left\\{ 1 \\right.}", "\\left\\{ 1 \\right."),
    ("\\boxed{\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}"),
    ("\\boxed{\\boxed{5}}", "5"),
    ("{ unclosed, \\boxed{5}", "5"),
    ("} stray, \\boxed{5}", "5"),
    ("\\boxed{5} and then \\boxed{6", "5"),
    ("$\\boxed 5$ is it", "5"),
    ("$\\boxed \\frac 12$ is it", "\\frac 12"),
    ("\\boxed 5 is it", "5"),
    ("\\boxed 5.", "5"),
    ("\\boxed{5}. The answer is 6.", "5"),
    # Minerva's sentence
    ("Final Answer: The final answer is $5$. I hope it is correct.", "5"),
    ("Final Answer: The final answer is $\\$5.50$. I hope it is correct.", "\\$5.50"),
    ("Final Answer: The final answer is $0.5$. I hope it is correct.", "0.5"),
    ("Final Answer: The final answer is 10 a.m. on May 5. I hope it is correct.", "10 a.m. on May 5"),
    ("Final Answer: The final answer is $3$ and $4$. I hope it is correct.", "$3$ and $4$"),
    (
        "Final Answer: The final answer is $5$. I hope it is correct.\n\nProblem:\nTwo? \\boxed{6}\n"
        "Final Answer: The final answer is $6$. I hope it is correct.",
        "5",
    ),
    ("\\boxed{5}\nFinal Answer: The final answer is $5.0$. I hope it is correct.", "5.0"),
    ("\\boxed{3} first.\nFinal Answer: The final answer is $5$. I hope it is correct.", "5"),
    # any other sentence
    ("The answer is 5.", "5"),
    ("Therefore the answer is $x^2 + 0.5$, because 7.", "x^2 + 0.5"),
    ("The answer is 0.5. Next", "0.5"),
    ("The final answer is:\n\n\\[ \\frac{1}{2} \\]", "\\frac{1}{2}"),
    ("The answer is $$5$$.", "5"),
    ("The answer is **(C)**.\nThe answer is (D).", "(C)"),
    # none
    ("", None),
    ("It is 5.", None),
    ("\\boxed{", None),
    ("\\boxed{}", None),
    ("\\boxed", None),
    ("the answer is", None),
    ("\\boxed{{5}", None),
]


@pytest.mark.parametrize("text, answer", MATH_ANSWERS)
def test_the_mathematical_answer_of_a_text(text, answer):
    assert math_of(text) == answer


@pytest.mark.parametrize(
    "a, b, same",
    [
        # as MATH's own script sees it
        ("5", " 5 ", True),
        ("10, 4, -2", "10,4,-2", True),
        ("10, 4, -2", "4, 10, -2", False),
        ("\\left(x-2\\right)\\left(x+2\\right)", "(x-2)(x+2)", True),
        ("(x-2)(x+2)", "(x+2)(x-2)", False),
        ("(0,1]", "(0,1)", False),
        ("\\tfrac{1}{2} +\\! \\frac1{72}", "\\\\dfrac{1}{2} +\\frac{1}{72}", True),
        ("\\tfrac{1}{2} + \\frac1{72}", "\\\\frac{1}{2} + 2/3", False),
        ("\\frac12", "\\frac{1}{2}", True),
        ("\\frac{1}2", "\\frac 1 2", True),
        ("\\frac34i", "\\frac{3}{4}i", True),
        ("\\frac{\\pi}2", "\\frac\\pi2", True),
        ("\\frac12", "\\frac{2}{1}", False),
        ("\\frac{1}{2}", "1/2", True),
        ("-\\frac{1}{2}", "-1/2", True),
        ("-\\frac{1}{2}", "\\frac{-1}{2}", True),
        ("x/2", "\\frac{x}{2}", False),
        ("\\frac{1}{2}", "0.5", True),
        ("0.5", ".5", True),
        ("0.25", "\\frac{1}{4}", False),
        ("0.50", "\\frac{1}{2}", False),
        ("5.0", "5", False),
        ("(.5, .25)", "(0.5,0.25)", True),
        ("0.1", ".1", True),
        ("0.1", "1", False),
        ("10\\sqrt{3} + \\sqrt4", "10\\sqrt3 + \\sqrt{4}", True),
        ("\\sqrt\\pi", "\\sqrt{\\pi}", True),
        ("\\sqrt[3]{2}", "\\sqrt{2}", False),
        ("10\\%", "10", True),
        ("10%", "10\\%", True),
        ("\\$10", "10", True),
        ("90^\\circ", "90", True),
        ("90^{\\circ}", "90°", True),
        ("10\\text{ units}", "10 ", True),
        ("10\\text{ units}", "100 ", False),
        ("10\\text{ cubic feet of sand}", "10", True),
        ("10 \\mbox{ cm}^3", "10", True),
        ("10 \\textrm{ m}", "10", True),
        ("10 \\text{apples}", "10", False),
        ("1\\text{ and }2", "1", False),
        ("x=5", "5", True),
        ("x_1 = 5", "5", False),
        ("f(x)=5", "5", False),
        ("x = 5", "y = 5", True),
        ("x+y=5", "x-y=5", False),
        ("5x - 7y + 11z + 4 = 0", "x + y - z + 2 = 0", False),
        ("x=1, y=2", "1, y=2", False),
        ("5.", "5", True),
        ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}", True),
        ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix} 12 \\end{pmatrix}", False),
        # as Minerva's sees it
        ("5 square units", "5", True),
        ("5 \\text{ square units}", "$5$", True),
        ("12\\text{cm}^2", "12 cm", True),
        ("12 \\mathrm{ft}", "12", True),
        ("12 miles", "12", False),
        ("45 degrees", "45", True),
        ("5 dollars", "\\$5.00", False),
        ("\\text{even}", "even", True),
        ("\\textbf{(B)}", "(B)", True),
        ("\\text{(B)}", "(C)", False),
        ("\\text{Even}", "even", False),
        ("\\overline{AB}", "AB", True),
        ("\\mathrm{B}", "B", True),
        ("1,080", "1080", True),
        ("1{,}080", "1,\\!080", True),
        ("\\$1,080.50", "1080.50", True),
        ("(1,080)", "(1080)", False),
        ("1,2", "12", False),
        ("1 \\text{ and } 2", "1, 2", True),
        ("1 \\ 2", "12", True),
        ("\\boxed{5}", "5", True),
        ("the value $5$", "5", True),
        ("$x$, $y$", "x,y", True),
        ("a square", "\\text{square}", True),
        ("square", "degrees", False),
        ("5", "6", False),
        ("", "", False),
        ("\\%", "\\$", False),
        ("x=", "y=", False),
        ("7" * 3000, "7" * 3000, True),
        ("7" * 3000, "7" * 3000 + "\\%", False),
    ],
)
def test_mathematical_answers_are_the_same_as_they_are_written(a, b, same):
    assert same_math(a, b) is same_math(b, a) is same


@pytest.mark.parametrize(
    "text, answer",
    [
        ("Let's think step by step.\nSo the answer is (A).", "(A)"),
        ("So the answer is (A).\n\nQ: And now?\nA: So the answer is (B).", "(A)"),
        ("so THE ANSWER IS True", "True"),
        ("The correct answer is: **No**.", "No"),
        ("**So the answer is -50.**", "-50"),
        ("So the answer is syndrome therefrom.  ", "syndrome therefrom"),
        ("So the answer is ] ) } >.", "] ) } >"),
        ("So the answer is (A) 12/11/1937.", "(A) 12/11/1937"),
        ("So the answer is\n(B)\nindeed", "(B)"),
        ("Answer: (B)", "(B)"),
        ("It is late.\n**Answer:** yes.\nWell", "yes"),
        ("### Final answer: 24", "24"),
        ("Answer: let us see. So the answer is 24.", "24"),
        ("My answers: 24", None),
        ("(A)", None),
        ("So the answer is ", None),
        ("So the answer isn't clear", None),
        ("", None),
    ],
)
def test_the_reasoned_answer_of_a_text(text, answer):
    assert bbh_of(text) == answer


@pytest.mark.parametrize(
    "text, answer",
    [
        (" (A)\n\nQ: What now?\nA: (B)", "(A)"),
        ("\nTrue.\n", "True"),
        ("**No**", "No"),
        ("The answer is (C).", "(C)"),
        ("Answer: valid", "valid"),
        ("barn damp dot", "barn damp dot"),
        (" \n ", None),
        ("", None),
    ],
)
def test_the_direct_answer_of_a_text(text, answer):
    assert direct_of(text) == answer


@pytest.mark.parametrize(
    "gold, answer, same",
    [
        ("(A)", "(A)", True),
        ("(A)", " (A). ", True),
        ("(A)", "A", True),
        ("(A)", "A.", True),
        ("(A)", "a", False),
        ("(A)", "(a)", False),
        ("(A)", "(B)", False),
        ("(A)", "B", False),
        ("(A)", "(A) 12/11/1937", False),
        ("(A)", "", False),
        ("A", "(A)", False),
        ("True", "true", True),
        ("no", "No.", True),
        ("Yes", "YES", True),
        ("valid", "Valid", True),
        ("valid", "invalid", False),
        ("yes", "no", False),
        ("yes", "yes, it is", False),
        ("24", "24.", True),
        ("24", "24.0", False),
        ("24", "-24", False),
        ("barn damp dot", "barn  damp\tdot", True),
        ("barn damp dot", "Barn damp dot", False),
        ("barn damp dot", "damp barn dot", False),
        ("barn damp dot", "barn, damp, dot", False),
        ("] )", "])", False),
    ],
)
def test_an_answer_of_bbh_is_the_gold_one(gold, answer, same):
    assert same_bbh(gold, answer) is same


BODY = "def f(x):\n    return x\n"


@pytest.mark.parametrize(
    "text, program",
    [
        (f"Here it is:\n```python\n{BODY}```\nIt returns x.\n```python\nprint(f(1))\n```", BODY),
        (f"```\n{BODY}```", BODY),
        (f"```py title='f.py'\r\n{BODY}```", BODY),
        (f"````python\n{BODY}````", BODY),
        (f"```python\n{BODY}", BODY),
        ("```python\n    return x\n```", "    return x\n"),
        ("1. So:\n   ```python\n   def f(x):\n       return x\n   ```\n", BODY),
        ("```python\ns = 'a ``` b'\n```", "s = 'a ``` b'\n"),
        ("Use ```x = 1``` here", "x = 1"),
        ("```", ""),
        (BODY, BODY),
        ("Use `f`.", "Use `f`."),
        ("", ""),
    ],
)
def test_the_program_of_a_chat_answer(text, program):
    assert code_of(text) == program


@pytest.mark.parametrize(
    "text, completion",
    [
        ("    return x\n\n\ndef g():\n    pass", "    return x\n\n"),
        ("    return x\nclass A:\n    pass\ndef g(): pass", "    return x"),
        ("    return x\n# that is it", "    return x"),
        ("    return x\nif __name__ == '__main__':", "    return x"),
        ("    return x\nprint(f(1))", "    return x"),
        ("    # x\n    if x:\n        print(x)\n", "    # x\n    if x:\n        print(x)\n"),
        ("\ndef g():", ""),
        ("", ""),
    ],
)
def test_a_completion_ends_where_something_else_begins(text, completion):
    assert completion_of(text) == completion


@pytest.mark.parametrize(
    "text, program",
    [
        (f"[BEGIN]\n{BODY}[DONE]\nmore", "\n" + BODY),
        (f"{BODY}[DONE]\n\nYou are an expert\n[BEGIN]\nx\n[DONE]", BODY),
        (f"Sure.\n[BEGIN]\n{BODY}", "\n" + BODY),
        (BODY, BODY),
        ("[DONE]", ""),
        ("", ""),
    ],
)
def test_the_program_between_the_marks_of_mbpp(text, program):
    assert mbpp_of(text) == program


LATEX = r"\boxed{ |\boxed |\fbox|\frac|\frac{1}{|\sqrt|\text{|\text{ |\|\\|{|}|$|\$|\(|\[".split("|")
WORDS = "#### |#### 1. a|the answer is |final answer is $|. I hope it is correct|answer:|and |a |x|é".split(
    "|"
)
MARKS = "**|####|```|```python\n|\n```|`|\ndef|[BEGIN]|[DONE]|\n| |\t|\r|(|)".split("|")
DIGITS = "1|1,|1,000|,000|12,|1/|/|.|-|−|=|%|99999999999999999999".split("|")
CONTROLS = "\x00|\x1b|\x7f|\u2028|\ud800|𝟙|²|İ".split("|")
PIECES = [*LATEX, *WORDS, *MARKS, *DIGITS, *CONTROLS]
SIZE = 100_000
ONE_OF = (number_of, math_of, bbh_of, direct_of, code_of, completion_of, mbpp_of)
TWO_OF = (same_number, same_math, same_bbh)


def garbage():
    """Each piece alone, again and again; two in turn; and any, long and short."""
    numbers = random.Random(0)
    for piece in PIECES:
        yield piece * (SIZE // len(piece))
    for _ in range(60):
        yield "".join(numbers.sample(PIECES, 2)) * (SIZE // 40)
        yield numbers.choice(PIECES) + numbers.choice(PIECES) * (SIZE // 40) + numbers.choice(PIECES)
    for size in [1, 2, 3, 5, 8, 20, 100, 400] * 20 + [SIZE // 10] * 10:
        yield "".join(numbers.choices(PIECES, k=size))


def test_any_text_whatever_is_answered_at_once():
    def timed(function, *texts):
        start = time.thread_time()
        function(*texts)
        assert time.thread_time() - start < 1, (function.__name__, texts[0][:60])

    before = ""
    for text in garbage():
        for function in ONE_OF:
            timed(function, text)
        for function in TWO_OF:
            for size in (SIZE, 1990, 150):  # too long for one form, and just not
                cut = f"x{text[:size]}x"
                timed(function, cut, cut)
                timed(function, cut, before[: size // 2])
        before = text
