"""Countdown: check whether the answer reaches the target with the given numbers.

A problem's gold answer is an expression, ``(3 + 5) * 2``: its numbers are the given numbers, and its value is the
target. Any other expression over the same numbers with the same value is right too. It may be an equation with the
target on one side, ``(3 + 5) * 2 = 16``, because that is what the question asks for.

Markup and signs are those of :mod:`rolltune.rewards.answer`: ``\\boxed{}``, ``$...$``, ``\\times``, ``\\frac{3}{4}``,
``\u00d7``, ``\u00f7``. The grammar has whole numbers, ``+ - * /`` (also ``x`` between numbers), brackets and signs, but
no power, decimal point or function. Values are exact fractions; nothing is passed to ``eval``.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from rolltune.rewards.answers.expression import BRACKET, Node, ParseError, parse
from rolltune.rewards.answers.kind import MAX_ANSWER_CHARS
from rolltune.rewards.answers.normalise import normalise, spell
from rolltune.rewards.answers.numbers import read_number
from rolltune.rewards.tags import parse_tags
from rolltune.types import Problem, Score

_TIMES = re.compile(r"(?<=[0-9)\]])\s*[xX]\s*(?=[0-9(\[])")  # no symbol can stand between two numbers
_LENIENT = re.compile(r"[-0-9+*/() ]{3,256}")  # an expression and characters that may surround it


class NotAnExpression(ValueError):
    """The text is not in the grammar, or divides by zero."""


@dataclass(frozen=True, slots=True)
class Expression:
    """An expression's value and numbers.

    Attributes:
        value: exact value.
        numbers: numbers in ascending order, each as often as it occurs.
    """

    value: Fraction
    numbers: tuple[int, ...]


def parse_expression(text: str) -> Expression:
    """Parse an expression.

    Example:
        >>> parse_expression("(3 + 5) * 2")
        Expression(value=Fraction(16, 1), numbers=(2, 3, 5))

    Raises:
        NotAnExpression: the text is not in the grammar, or divides by zero.
    """
    if len(text) > MAX_ANSWER_CHARS:
        raise NotAnExpression(f"longer than {MAX_ANSWER_CHARS} characters")
    try:
        node = parse(_TIMES.sub("*", normalise(text)))
        value = _value(node)
    except (ParseError, ZeroDivisionError) as error:
        raise NotAnExpression(str(error)) from None
    numbers = sorted(int(part.value) for part in node.walk() if part.op == "number")
    return Expression(value=value, numbers=tuple(numbers))


def _value(node: Node) -> Fraction:
    if node.op == "number":
        if node.value.denominator != 1:
            raise NotAnExpression("a number is not whole")
        return node.value
    values = [_value(arg) for arg in node.args]
    match node.op, values:
        case "+", [left, right]:
            return left + right
        case "-", [left, right]:
            return left - right
        case "*" | "juxtaposed", [left, right]:
            return left * right
        case "/" | "frac", [left, right]:
            return left / right
        case "neg", [value]:
            return -value
        case op, [value] if op == BRACKET and node.name == "[]":
            return value
    raise NotAnExpression(f"{node.name or node.op} is not in the grammar")


def countdown_reward(problem: Problem, text: str, *, use_all: bool = True) -> Score:
    """Return 1 if the last ``<answer>`` block is an expression that reaches the target with the given numbers, else 0.

    An equation must have the target, and nothing else, on one side.

    Example:
        >>> problem = Problem(id="c/0", messages=({"role": "user", "content": "Reach 13."},), answer="2 * 5 + 3")
        >>> countdown_reward(problem, "<think>5 * 2 = 10, 10 + 3 = 13.</think> <answer>3 + 5 * 2</answer>").total
        1.0

    Args:
        use_all: True requires every number exactly once; False allows each at most once.

    Raises:
        ValueError: the problem's gold answer is not an expression.
    """
    answer = parse_tags(text).answer
    if answer is None:
        return Score(total=0.0, failure="no_answer")
    return _check(problem, answer, use_all=use_all)


def lenient_countdown_reward(problem: Problem, text: str, *, use_all: bool = True) -> Score:
    """Return 1 if the last expression anywhere in the response reaches the target, with or without tags or ``= 24``.

    What the strict reward pays for is right here too. For evaluation beside it. Never train on this, because it pays
    for answers that were not given.
    """
    strict = countdown_reward(problem, text, use_all=use_all)
    if strict.total == 1.0:
        return strict
    for candidate in reversed(_LENIENT.findall(spell(text))):
        candidate = _without_loose_brackets(candidate)
        # Without an operator it is the right-hand side of an equation.
        if any(operator in candidate for operator in "+-*/"):
            return _check(problem, candidate, use_all=use_all)
    return Score(total=0.0, failure="no_answer")


def _without_loose_brackets(text: str) -> str:
    """Strip what a sentence leaves around the expression: the bracket of "4 + 3 + 6 (uses all)"."""
    text = text.strip(" +-*/")
    while True:
        extra = text.count("(") - text.count(")")
        if extra > 0 and text.endswith("("):
            text = text[:-1]
        elif extra > 0 and text.startswith("("):
            text = text[1:]
        elif extra < 0 and text.endswith(")"):
            text = text[:-1]
        else:
            return text
        text = text.strip(" +-*/")


def _check(problem: Problem, answer: str, *, use_all: bool) -> Score:
    given = _gold(problem.id, problem.answer)
    if not answer.strip():
        return Score(total=0.0, failure="empty")
    if len(answer) > MAX_ANSWER_CHARS:
        return Score(total=0.0, failure="too_long")
    left, equals, right = normalise(answer).rpartition("=")
    if equals and read_number(right.strip()) is None:
        left, right = right, left
    if equals:
        stated = read_number(right.strip())
        if stated is None or stated.unit:
            return Score(total=0.0, failure="unparseable")
        if stated.value != given.value:
            return Score(total=0.0)
    try:
        found = parse_expression(left if equals else answer)
    except NotAnExpression:
        return Score(total=0.0, failure="unparseable")
    used, available = Counter(found.numbers), Counter(given.numbers)
    if not (used == available if use_all else used <= available):
        return Score(total=0.0, failure="wrong_numbers")
    return Score(total=float(found.value == given.value))


@lru_cache(maxsize=4096)
def _gold(problem_id: str, answer: str | None) -> Expression:
    try:
        return parse_expression(answer or "")
    except NotAnExpression as error:
        raise ValueError(
            f"{problem_id}: the gold answer {answer!r:.60} is not an expression ({error}); use countdown rewards with "
            "rolltune.data.countdown"
        ) from None
