"""Check strictly whether the answer is right: one block that states exactly the gold answer.

A lenient checker invites reward hacking: taking the last number of the response, or searching it for the gold answer,
pays for lists of guesses and for answers never given. The strict reward reads only the last ``<answer>...</answer>``
block, and that block must state exactly one thing.

What the block must state depends on the kind of the gold answer: a number, a multiple-choice letter, an expression, a
list, a set or a text. :mod:`rolltune.rewards.answers.kind` says how it is decided, ``kind`` overrides it, and a dry run
shows the counts.

Markup, a lead-in ("The answer is ...") and a final full stop do not count, and neither does the spelling of signs:
``**18**``, ``$18$``, ``\\boxed{18}``, ``1\u2009800``, ``\u22123``.

These state a number:

- ``18``, ``-3``, ``18.00``, ``.5``, ``1,800``, ``1 800``, ``1'800``, ``1{,}800``, ``18,5`` (a decimal comma),
  ``1.8e3``, ``1.8 \\times 10^3``, ``3/4``, ``\\frac{3}{4}``, ``1 1/2``, ``x = 18``, ``m + n = 18``,
  ``The remainder is 18``;
- an exact value with its rounding: ``\\frac{7}{12} \\approx 0.58`` states 7/12;
- with a currency or a unit of up to four words: ``$18``, ``CHF 18``, ``18%``, ``18 m^2``, ``18th``, ``60 miles per
  hour``. Any words are accepted except those that hedge, deny or join (``maybe``, ``not``, ``or``) and those that
  change the number (``thousand``, ``half``, ``below``). A word missing from these lists can never introduce a second
  number. If the gold answer has a unit, another well-known unit is wrong: ``5 feet`` for ``5 inches``.

These do not:

- lists and guesses (``17, 18``, ``18 or 19``), hedges (``about 18``, ``18?``), denials (``not 18``);
- unfinished or shown work: ``12 + 6``, ``12 + 6 = 18``, ``\\sqrt{324}``, and ``36/2``, a fraction that is an integer;
- ambiguous spellings: ``1 8``, ``0x12``, ``(18)``.

The percent sign is a unit: ``18%`` states 18, never 0.18, because accepting both would accept two guesses.

Everything is compared exactly, without any tolerance. An expression may be written in any way that has the same value,
but a decimal never earns a surd or a fraction that it only approximates: not ``1.414214`` for ``\\sqrt{2}``, and not
``0.333`` for ``1/3``. Lists, tuples and intervals are compared part by part (:mod:`rolltune.rewards.answers.compare`).
A letter may come with the text of its choice: ``(B) 12 m/s``.
Text is compared without case, leading article, and spaces around punctuation.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from rolltune.rewards.answers.compare import same
from rolltune.rewards.answers.evaluate import NoValue, OutOfTime, evaluate
from rolltune.rewards.answers.expression import BRACKET, SEPARATED, UNORDERED
from rolltune.rewards.answers.kind import (
    MAX_ANSWER_CHARS,
    Gold,
    Kind,
    read_answer_number,
    read_choice,
    read_expression,
    read_gold,
    read_stated_choice,
    read_statement,
    split_unit,
    unread,
)
from rolltune.rewards.answers.normalise import fold, normalise, spell
from rolltune.rewards.answers.numbers import Number, plain_number, read_number
from rolltune.rewards.tags import parse_tags
from rolltune.types import Problem, Score

TIMEOUT_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Grade:
    """Verdict on one response.

    Attributes:
        correct: whether the answer is right.
        failure: reason why the response states no answer: "no_answer" (no block), "empty", "too_long", "ambiguous" (a
            list or a hedge), "unparseable", "no_value" (undefined, or too large) or "timeout". None if it states one,
            right or wrong.
    """

    correct: bool
    failure: str | None = None


def answer_reward(problem: Problem, text: str, *, kind: Kind = "auto", timeout: float = TIMEOUT_SECONDS) -> Score:
    """Return 1 if the answer of the response is right, else 0.

    Example:
        >>> answer_reward(problem, "<think>9 * $2 = $18</think> <answer>$18</answer>").total
        1.0

    Args:
        kind: what the gold answers are; "auto" decides for each.
        timeout: seconds of CPU time for comparing expressions. An answer that takes longer is wrong.

    Raises:
        ValueError: the problem has no gold answer, or not one of this kind.
    """
    verdict = grade(gold_answer(problem), text, kind=kind, timeout=timeout)
    return Score(total=float(verdict.correct), failure=verdict.failure)


def gold_answer(problem: Problem) -> str:
    """Return the problem's gold answer; ValueError if it has none."""
    if problem.answer is None or not problem.answer.strip():
        raise ValueError(f"problem {problem.id!r} has no gold answer, but a correctness reward needs one")
    return problem.answer


def gold_kind(problem: Problem, *, kind: Kind = "auto") -> Kind:
    """Return the kind of a problem's gold answer, after checking that writing it down earns it.

    Raises:
        ValueError: it cannot be read, or cannot be earned; the message names the problem.
    """
    answer = gold_answer(problem)
    try:
        gold = read_gold(answer, kind)
        if not grade(answer, f"<answer>{answer}</answer>", kind=kind).correct:
            raise ValueError(f"gold answer {answer!r} is read as {gold.kind}, but writing it down does not earn it")
    except ValueError as error:
        raise ValueError(f"problem {problem.id!r}: {error}") from None
    return gold.kind


answer_reward.gold_kind = gold_kind  # pyright: ignore[reportFunctionMemberAccess]


def grade(gold: str, text: str, *, kind: Kind = "auto", timeout: float = TIMEOUT_SECONDS) -> Grade:
    """Check the last answer block of a whole response, by the rules in the module's docstring.

    Raises:
        ValueError: no response could ever match the gold answer.
    """
    target = read_gold(gold, kind)
    block = parse_tags(text).answer
    if block is None:
        return Grade(correct=False, failure="no_answer")
    block = block.strip()
    if not block:
        return Grade(correct=False, failure="empty")
    if len(block) > MAX_ANSWER_CHARS:
        return Grade(correct=False, failure="too_long")
    stated = normalise(block)
    if target.number is not None:
        return _grade_number(target, target.number, read_statement(stated))
    if target.kind == "choice":
        letter = read_stated_choice(stated)
        return _failed(stated) if letter is None else Grade(correct=letter == read_choice(target.text))
    if target.node is None:
        return Grade(correct=fold(stated) == fold(target.text))
    return _grade_expression(target, read_statement(stated), timeout)


_DECIMAL_COMMA = re.compile(r"[0-9]+,[0-9]{1,2}")


def _failed(stated: str) -> Grade:
    return Grade(correct=False, failure=unread(stated))


def _grade_number(gold: Gold, wanted: Number, stated: str) -> Grade:
    if stated == gold.text:
        return Grade(correct=True)
    number = read_answer_number(stated)
    if number is None or number.is_undone:
        return _failed(stated)
    # 4 4/9 % could be read as 40/9 or as 40/900.
    is_clear = wanted.is_percentage or not (number.is_percentage and number.is_fraction)
    return Grade(correct=is_clear and number.value == wanted.value and not number.contradicts(wanted))


@lru_cache(maxsize=8192)
def _grade_expression(gold: Gold, stated: str, timeout: float) -> Grade:
    """Compare expressions; the verdicts are kept, those of answers that take too long among them."""
    assert gold.node is not None
    if _without_spaces(stated) == _without_spaces(gold.text):
        return Grade(correct=True)
    if _DECIMAL_COMMA.fullmatch(gold.text) and gold.kind == "list":  # can be read in two ways, and either earns it
        number, wanted = read_number(stated), read_number(gold.text)
        if number is not None and wanted is not None and number.value == wanted.value:
            return Grade(correct=True)
    body, unit = split_unit(stated)
    readings = [(read_expression(stated), ""), (read_expression(body) if unit else None, unit)]
    nodes = [node for node, unit in readings if node is not None and unit in ("", gold.unit or unit)]
    has_parts = gold.kind != "expression" or any(arg.op == BRACKET for arg in gold.node.args)
    is_list = any(node.op in (SEPARATED, UNORDERED) for node in nodes) and not has_parts
    if not nodes or is_list:
        return Grade(correct=False, failure="ambiguous" if is_list else unread(stated))
    try:
        return Grade(correct=any(same(gold.node, node, timeout=timeout / len(nodes)) for node in nodes))
    except OutOfTime:
        return Grade(correct=False, failure="timeout")
    except NoValue:
        return Grade(correct=False, failure="no_value")


def _without_spaces(text: str) -> str:
    return text.replace(" ", "")


def lenient_answer_reward(
    problem: Problem, text: str, *, kind: Kind = "auto", timeout: float = TIMEOUT_SECONDS
) -> Score:
    """Return 1 if the last number anywhere in the response equals the gold answer, with or without tags, else 0.

    For evaluation beside the strict reward: the gap between the two is the cost of the format. Never train on it,
    because it pays for answers that were not given.

    Example:
        >>> lenient_answer_reward(problem, "9 * $2 = $18, so she makes $18 a day.").total
        1.0

    Args:
        kind: as in :func:`answer_reward`.
        timeout: as in :func:`answer_reward`.

    Raises:
        ValueError: the problem has no gold answer.
    """
    gold_answer(problem)
    number = lenient_number(text)
    if number is None:
        return Score(total=0.0, failure="no_answer")
    return answer_reward(problem, f"<answer>{number}</answer>", kind=kind, timeout=timeout)


lenient_answer_reward.gold_kind = gold_kind  # pyright: ignore[reportFunctionMemberAccess]

# A number with its sign, fraction or power; digits that belong to a name, a unit or an exponent are passed over.
_LENIENT = re.compile(
    r"""(?P<number>(?:(?<![\w)}\]])-)?(?:[$\u00a4]\s?)?(?<![\w.^])
    (?:\\frac(?:\{-?[0-9]{1,99}\}|[0-9])(?:\{[0-9]{1,99}\}|[0-9])
      |[0-9]{1,9}\ [0-9]{1,9}/[0-9]+
      |(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[1-9][0-9]{0,2}(?:\ [0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?
       (?:[eE][-+]?[0-9]{1,3}(?![0-9])|\s?[*x]\s?10\s?\^\s?\{?[-+]?[0-9]{1,3}\}?)?
       (?:(?<!,[0-9])(?<!,[0-9][0-9]),[0-9]{1,2}(?![0-9,])|\s?/\s?[0-9]+|\^\{?-?[0-9]{1,3}\}?)?
      |\.[0-9]+))
    |[A-Za-z][0-9]+|[_^]\{?-?[0-9]+""",
    re.VERBOSE,
)


def lenient_number(text: str) -> str | None:
    """Return the last number anywhere in the text in plain form, or None.

    Example:
        >>> lenient_number("It costs $1,800.50 in all, or 3/4 of -.5 m^2")
        '-0.5'
    """
    last = next(iter(deque((m for m in _LENIENT.finditer(spell(text)) if m["number"]), maxlen=1)), None)
    if last is None or len(last[0]) > MAX_ANSWER_CHARS:
        return None
    stated = normalise(last["number"])
    number, power = read_number(stated), read_expression(stated)
    if number is not None:
        return plain_number(number.value)
    try:
        value = None if power is None else evaluate(power, timeout=TIMEOUT_SECONDS)
    except NoValue:
        return None
    return plain_number(value) if isinstance(value, Fraction) else None


def voted_answer(problem: Problem, text: str) -> str | None:
    """Return the answer of a response in one spelling, for a majority vote; None if the response has no answer.

    If the gold answer is a number, only numbers vote, and ``$1,800`` and ``1800.0`` are the same vote. Otherwise the
    text of the block votes, as it is compared with a text gold answer: ``3+5`` and ``3 + 5`` are the same vote, but
    ``5 + 3`` is another.

    Raises:
        ValueError: the problem has no gold answer.
    """
    gold = gold_answer(problem)
    block = (parse_tags(text).answer or "").strip()
    if not block or len(block) > MAX_ANSWER_CHARS:
        return None
    stated = normalise(block)
    target = read_gold(gold) if len(gold) <= MAX_ANSWER_CHARS else None
    if target is not None and target.number is not None:
        number = read_answer_number(read_statement(stated))
        return None if number is None or number.is_undone else str(number.value)
    if target is not None and target.kind == "choice":
        return read_stated_choice(stated)
    return fold(stated) or None
