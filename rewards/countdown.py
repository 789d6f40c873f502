"""Countdown: check whether the answer reaches the target with the given numbers.

A problem's gold answer is an expression, ``(3 + 5) * 2``: its numbers are the given numbers, and its value is the
target. Any other expression over the same numbers with the same value is right too.

The grammar has digits, ``+ - * /`` (also as typographic signs), round brackets and spaces, but no unary minus, power,
decimal point or equals sign. A stack machine parses it in one pass. Values are exact fractions; nothing is passed to
``eval``.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from rolltune.rewards.tags import parse_tags
from rolltune.types import Problem, Score

# Above any honest answer; bounds the time and the size of the numbers.
MAX_CHARS = 128

_SPELLINGS = str.maketrans({"\N{MULTIPLICATION SIGN}": "*", "\N{DIVISION SIGN}": "/", "\N{MINUS SIGN}": "-"})
_TOKEN = re.compile(r"\s*([0-9]+|[-+*/()])")
_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}
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
    values: list[Fraction] = []
    operators: list[str] = []
    numbers: list[int] = []
    wants_operand = True
    for token in _tokens(text):
        if token.isdigit() and wants_operand:
            numbers.append(int(token))
            values.append(Fraction(int(token)))
            wants_operand = False
        elif token == "(" and wants_operand:
            operators.append(token)
        elif token == ")" and not wants_operand:
            while operators and operators[-1] != "(":
                _apply(operators.pop(), values)
            if not operators:
                raise NotAnExpression("a bracket closes that was not opened")
            operators.pop()
        elif token in _PRECEDENCE and not wants_operand:
            while operators and operators[-1] != "(" and _PRECEDENCE[operators[-1]] >= _PRECEDENCE[token]:
                _apply(operators.pop(), values)
            operators.append(token)
            wants_operand = True
        else:
            raise NotAnExpression(f"{token!r} is misplaced")
    if wants_operand:
        raise NotAnExpression("ends early")
    while operators:
        if operators[-1] == "(":
            raise NotAnExpression("a bracket is not closed")
        _apply(operators.pop(), values)
    (value,) = values
    return Expression(value=value, numbers=tuple(sorted(numbers)))


def _tokens(text: str) -> list[str]:
    text = text.translate(_SPELLINGS).strip()
    if len(text) > MAX_CHARS:
        raise NotAnExpression(f"longer than {MAX_CHARS} characters")
    tokens, position = [], 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise NotAnExpression(f"{text[position]!r} is not in the grammar")
        token = match.group(1)
        if len(token) > 1 and token.startswith("0"):
            raise NotAnExpression(f"{token!r} has a leading zero")
        tokens.append(token)
        position = match.end()
    return tokens


def _apply(operator: str, values: list[Fraction]) -> None:
    right, left = values.pop(), values.pop()
    if operator == "+":
        values.append(left + right)
    elif operator == "-":
        values.append(left - right)
    elif operator == "*":
        values.append(left * right)
    elif right == 0:
        raise NotAnExpression("divides by zero")
    else:
        values.append(left / right)


def countdown_reward(problem: Problem, text: str, *, use_all: bool = True) -> Score:
    """Return 1 if the last ``<answer>`` block is an expression that reaches the target with the given numbers, else 0.

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

    For evaluation beside the strict reward. Never train on it, because it pays for answers that were not given.
    """
    for candidate in reversed(_LENIENT.findall(text.translate(_SPELLINGS))):
        candidate = _without_loose_brackets(candidate)
        # Without an operator it is the right-hand side of an equation.
        if any(operator in candidate for operator in _PRECEDENCE):
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
    try:
        found = parse_expression(answer)
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
