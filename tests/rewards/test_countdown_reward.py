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

from rolltune.rewards.countdown import (
    MAX_CHARS,
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
        "-1",
        "+1",
        "2 - -1",
        "1.5",
        "1e3",
        "2 ** 3",
        "2^3",
        "1 = 1",
        "a",
        "3x5",
        "03 + 5",
        "1 / 0",
        "1 / (2 - 2)",
        "\u0663 + 1",
        "\u00b2",
        "1,000",
        "3(5)",
        "(3)(5)",
        "1 // 2",
    ],
)
def test_what_is_no_expression(text):
    with pytest.raises(NotAnExpression):
        parse_expression(text)


def test_length_is_bounded():
    assert parse_expression("(" * 60 + "1" + ")" * 60).value == 1
    with pytest.raises(NotAnExpression, match="longer"):
        parse_expression("1" + "+1" * MAX_CHARS)


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
        ("(3 + 5) * 2 = 16", 0.0, "unparseable"),
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
    """Python's own parser, with a walk over its tree that allows only the four operations and plain integers."""

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


def test_ten_thousand_random_strings_crash_nothing_and_earn_nothing_falsely():
    right = parsed = 0
    for text in random_strings(10_000, seed=0):
        # Python reads four things that the grammar does not have: line breaks, 3_5, 0x2 and 00 for 0.
        expected = None if re.search(r"\n|_|x|(?<![0-9])00", text) else by_python(text)
        try:
            found = parse_expression(text)
        except NotAnExpression:
            assert expected is None, text
            found = None
        if found is not None and "\n" not in text:
            assert expected is not None, text
            assert (found.value, Counter(found.numbers)) == expected, text
            parsed += 1
        credit = countdown_reward(PROBLEM, response(text)).total == 1.0
        deserved = expected is not None and expected == (Fraction(16), Counter([2, 3, 5]))
        assert credit == deserved or "\n" in text, text
        right += credit
    assert parsed > 3000 and right > 20  # enough of the strings are expressions and right answers


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=200))
def test_any_text_gets_a_score(text):
    assert countdown_reward(PROBLEM, text).total in (0.0, 1.0)
    assert lenient_countdown_reward(PROBLEM, text).total in (0.0, 1.0)
    assert countdown_reward(PROBLEM, response(text)).total in (0.0, 1.0)
