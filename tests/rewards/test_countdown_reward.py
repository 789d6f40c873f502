"""Countdown answers: what counts, and what a flood of other text does."""

from __future__ import annotations

import ast
import random
import re
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rolltune.rewards.answers.kind import MAX_ANSWER_CHARS
from rolltune.rewards.countdown import (
    NotAnExpression,
    countdown_reward,
    lenient_countdown_reward,
    parse_expression,
)
from rolltune.types import Problem

PROBLEM = Problem(id="p", messages=({"role": "user", "content": "Make 16 from 3, 5 and 2."},), answer="(3 + 5) * 2")


def response(answer: str) -> str:
    return f"<think>hm</think>\n<answer>{answer}</answer>"


@pytest.mark.parametrize(
    "text, value",
    [
        ("7", 7),
        ("1 + 2 * 3", 7),
        ("(1 + 2) * 3", 9),
        ("10 - 4 - 3", 3),
        ("24 / 4 / 3", 2),
        ("2 / 3", Fraction(2, 3)),
        ("8 / (3 - 8 / 3)", 24),
        ("((5))", 5),
        ("6 \N{MULTIPLICATION SIGN} 4 \N{DIVISION SIGN} 3 \N{MINUS SIGN} 2", 6),
        ("0", 0),
        ("2*(3+(4-1))", 12),
        ("-1", -1),
        ("(-19 + 95) / 4", 19),
        ("3 * -2", -6),
        ("03 + 5", 8),
        ("3(5 + 2)", 21),
        ("(3)(5)", 15),
        ("3 x 5 X 2", 30),
        ("[(95 - 19)] / 4", 19),
        (r"\left(3 + 5\right) \times 2 \cdot 1", 16),
        (r"\frac{95 - 19}{4} \div 1", 19),
        (r"2 \cdot \dfrac34", Fraction(3, 2)),
    ],
)
def test_values(text, value):
    assert parse_expression(text).value == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "+",
        "1 +",
        "* 2",
        "1 2",
        "(1",
        "1)",
        ")1(",
        "()",
        "1 ++ 2",
        "2 - -1",
        "1.5",
        "1e3",
        "2 ** 3",
        "2^3",
        "1 = 1",
        "a",
        "1 / 0",
        "1 / (2 - 2)",
        "\u0663 + 1",
        "\u00b2",
        "1,000",
        "3x",
        "x3",
        "3 + 5, 2",
        "3 + 5 and 2",
        "3!",
        "3%",
        "\\sqrt{4}",
        "3 1/2",
        "2\n3",
        "1 // 2",
    ],
)
def test_what_is_no_expression(text):
    with pytest.raises(NotAnExpression):
        parse_expression(text)


def test_length_is_bounded():
    assert parse_expression("(" * 20 + "1" + ")" * 20).value == 1
    assert parse_expression("1" + "+1" * (MAX_ANSWER_CHARS // 2 - 1)).value == MAX_ANSWER_CHARS // 2
    with pytest.raises(NotAnExpression, match="longer"):
        parse_expression("1" + "+1" * MAX_ANSWER_CHARS)
    with pytest.raises(NotAnExpression, match="nested"):
        parse_expression("(" * 100 + "1" + ")" * 100)


@pytest.mark.parametrize(
    "answer, total, failure",
    [
        ("(3 + 5) * 2", 1.0, None),
        (" 2*(5+3) ", 1.0, None),
        ("3 * 5 + 2", 0.0, None),  # 17
        ("16", 0.0, "wrong_numbers"),
        ("(3 + 5) + (5 + 3)", 0.0, "wrong_numbers"),
        ("8 * 2", 0.0, "wrong_numbers"),
        ("(3 + 5) * 2 * 1", 0.0, "wrong_numbers"),
        ("(3 + 5) * 2 = 16", 1.0, None),
        ("(3 + 5) * 2 = 16.0", 1.0, None),
        (r"\((3 + 5) \times 2 = \boxed{16}\)", 1.0, None),
        (r"$$\boxed{(3+5) \cdot 2 = 16}$$", 1.0, None),
        ("**(3 + 5) \N{MULTIPLICATION SIGN} 2** = **16**.", 1.0, None),
        ("```\n(3 + 5) * 2\n```", 1.0, None),
        ("The equation is: (3 + 5) * 2 = 16.", 1.0, None),
        ("2 \N{MIDDLE DOT} 5 + 2 \N{MIDDLE DOT} 3", 0.0, "wrong_numbers"),
        ("16 = (3 + 5) * 2", 1.0, None),
        (r"(3 + 5) \* 2", 1.0, None),
        ("(3 + 5)\N{BULLET}2", 1.0, None),
        ("17 = (3 + 5) * 2", 0.0, None),
        ("8 * 2 = (3 + 5) * 2", 0.0, "unparseable"),
        ("(3 + 5) * 2 = 17", 0.0, None),
        ("3 * 5 + 2 = 16", 0.0, None),
        ("16 = 16", 0.0, "wrong_numbers"),
        ("(3 + 5) * 2 = 8 * 2", 0.0, "unparseable"),
        ("3 + 5 = 8 * 2 = 16", 0.0, "unparseable"),
        ("3 + 5 = 8\n8 * 2 = 16", 0.0, "unparseable"),
        ("(3 + 5) * 2 =", 0.0, "unparseable"),
        ("(3 + 5) * 2 = 16 or 17", 0.0, "unparseable"),
        ("(3 + 5) * 2 = 16 dollars", 0.0, "unparseable"),
        ("3" + " " * 300 + "5", 0.0, "too_long"),
        ("(3 + 5) * 2 or 16", 0.0, "unparseable"),
        ("__import__('os').getcwd()", 0.0, "unparseable"),
        ("3 + 5 / 0", 0.0, "unparseable"),
        ("  ", 0.0, "empty"),
    ],
)
def test_reward(answer, total, failure):
    score = countdown_reward(PROBLEM, response(answer))
    assert (score.total, score.failure) == (total, failure)


def test_a_response_without_an_answer():
    assert countdown_reward(PROBLEM, "(3 + 5) * 2").failure == "no_answer"
    assert countdown_reward(PROBLEM, "<answer>(3 + 5) * 2</answer></think>").total == 0.0


def test_fewer_numbers_count_only_where_that_is_allowed():
    problem = Problem(id="q", messages=(), answer="4 * 2 + 4 - 4")  # 8 from 4, 2, 4, 4
    assert countdown_reward(problem, response("4 * 2")).failure == "wrong_numbers"
    assert countdown_reward(problem, response("4 * 2"), use_all=False).total == 1.0
    assert countdown_reward(problem, response("2 * 2 * 2"), use_all=False).failure == "wrong_numbers"


@pytest.mark.parametrize(
    "text, total",
    [
        ("So (3 + 5) * 2 = 16.", 1.0),
        ("Try 3 * 5 = 15. No. The answer is (3+5)*2.", 1.0),
        ("<answer>2 * (3 + 5)</answer>", 1.0),
        ("(3 + 5) * 2 = 16, or 3 * 5 + 2 = 17", 0.0),  # the last one counts
        ("The answer is 5 * 2 + 3 + 3 (no: (3 + 5) * 2 (uses all)).", 1.0),
        ("(I get (3 + 5) * 2)", 1.0),
        ("<answer>(3 + 5) * 2</answer> and not 3 * 5 + 2", 1.0),  # the strict reward pays for it too
        (r"So \((3 + 5) \times 2 = 16\).", 1.0),
        ("It is 16.", 0.0),
        ("", 0.0),
    ],
)
def test_lenient_reward(text, total):
    assert lenient_countdown_reward(PROBLEM, text).total == total


def test_a_gold_answer_that_is_no_expression_is_the_data_sets_mistake():
    with pytest.raises(ValueError, match="gsm8k/0: .*'Monday'"):
        countdown_reward(Problem(id="gsm8k/0", messages=(), answer="Monday"), response("1"))


# --- against an independent reading ----------------------------------------------------------------------------------


def by_python(text: str) -> tuple[Fraction, Counter[int]] | None:
    """Python's own parser, with a walk over its tree that allows only the four operations, signs and integers."""

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.BinOp):
            left, right = value(node.left), value(node.right)
            match node.op:
                case ast.Add():
                    return left + right
                case ast.Sub():
                    return left - right
                case ast.Mult():
                    return left * right
                case ast.Div():
                    return left / right
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
            return value(node.operand) * (-1 if isinstance(node.op, ast.USub) else 1)
        if isinstance(node, ast.Constant) and type(node.value) is int:
            numbers[node.value] += 1
            return Fraction(node.value)
        raise ValueError

    numbers: Counter[int] = Counter()
    try:
        return value(ast.parse(text.strip(" "), mode="eval").body), numbers
    except (SyntaxError, ValueError, ZeroDivisionError, MemoryError):
        return None


def random_strings(count: int, seed: int) -> list[str]:
    """Half noise over the grammar and its neighbours, half well-formed expressions with a character changed or not."""
    rng = random.Random(seed)
    strings = []
    for _ in range(count // 2):
        strings.append("".join(rng.choice("3520+-*/() =.x_e\n") for _ in range(rng.randint(0, 14))))
    for _ in range(count - count // 2):
        numbers = [3, 5, 2] if rng.random() < 0.7 else [rng.randint(0, 12) for _ in range(3)]
        rng.shuffle(numbers)
        a, b, c = numbers
        p, q = rng.choice("+-*/"), rng.choice("+-*/")
        text = rng.choice([f"({a} {p} {b}) {q} {c}", f"{a} {p} {b} {q} {c}", f"{a}{p}({b}{q}{c})"])
        if rng.random() < 0.4:
            at = rng.randrange(len(text))
            text = text[:at] + rng.choice("0123456789+-*/() ") + text[at + 1 :]
        strings.append(text)
    return strings


# Where the two grammars differ: Python reads line breaks, 3_5, _3, 5. and two signs in a row, but no leading zeros, and
# no product or equation without a sign. Stars around a text are emphasis.
DIFFERENT = re.compile(r"[\n_.x=]|(?<![0-9])0[0-9]|[-+]\s*[-+]|[*/]\s*\+|(?<=[0-9)])\s*\(|\)\s*[0-9]|\*\*|//|^\*.*\*$")


def test_ten_thousand_random_strings_crash_nothing_and_earn_nothing_falsely():
    right = parsed = refused = 0
    for text in random_strings(10_000, seed=0):
        try:
            found = parse_expression(text)
        except NotAnExpression:
            found = None
        score = countdown_reward(PROBLEM, response(text))
        if DIFFERENT.search(text):
            continue
        expected = by_python(text)
        assert (found and (found.value, Counter(found.numbers))) == expected, text
        assert score.total == (expected == (Fraction(16), Counter([2, 3, 5]))), text
        parsed += expected is not None
        refused += expected is None
        right += score.total == 1.0
    assert parsed > 3000 and refused > 1000 and right > 20  # enough of the strings are of each sort


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=200))
def test_any_text_gets_a_score(text):
    assert countdown_reward(PROBLEM, text).total in (0.0, 1.0)
    assert lenient_countdown_reward(PROBLEM, text).total in (0.0, 1.0)
    assert countdown_reward(PROBLEM, response(text)).total in (0.0, 1.0)
