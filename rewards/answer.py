"""Check strictly whether the answer is right: one block with one number that equals the gold answer.

A lenient checker invites reward hacking: taking the last number of the response, or searching it for the gold answer,
pays for lists of guesses and for answers never given. The strict reward reads only the last ``<answer>...</answer>``
block, and that block must state exactly one thing.

These state a number:

- ``18``, ``-3``, ``18.``, ``18.00``, ``.5``, ``1,800`` (groups of three only), ``3/4``, ``\\frac{3}{4}``;
- with decoration: ``$18``, ``18%``, ``**18**``, ``$18$``, ``\\boxed{18}``, ``x = 18``, ``The answer is 18.``;
- with a unit of up to four words after it: ``18 dollars``, ``60 miles per hour``. Any words are accepted except those
  that hedge, deny or join (``maybe``, ``not``, ``or``) and those that change the number (``thousand``, ``half``). A
  word missing from these lists can never introduce a second number.

These do not:

- lists and guesses (``17, 18``, ``18 or 19``), hedges (``about 18``, ``18?``), denials (``not 18``);
- unfinished or shown work: ``12 + 6``, ``12 + 6 = 18``, ``\\sqrt{324}``, and ``36/2``, a fraction that is an integer;
- ambiguous spellings: ``1 8``, ``1,8``, ``18,00``, ``018``, ``1.8e1``, ``1 1/2``;
- digits other than ASCII ones, ``nan``, ``inf``.

The percent sign is a unit: ``18%`` states 18, never 0.18, because accepting both would accept two guesses. Numbers are
compared exactly, as fractions, without sympy.

If the gold answer is an expression (``2\\sqrt{3}``, ``x^2+1``), math-verify compares it in a process that can be killed
(:mod:`rolltune.rewards.symbolic`), and only with answers of a small grammar without nested powers. Any other gold
answer (``Monday``, ``0110``, ``(1, 2)``) is text, which the answer must repeat exactly, including case.
"""

from __future__ import annotations

import math
import re
from collections import deque
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from rolltune.rewards import symbolic
from rolltune.rewards.tags import parse_tags
from rolltune.types import Problem, Score

# Far above any honest final answer; bounds the time of everything below.
MAX_ANSWER_CHARS = 256
TIMEOUT_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Grade:
    """Verdict on one response.

    Attributes:
        correct: whether the answer is right; None if the checker ran out of time.
        failure: reason why the response states no answer: "no_answer" (no block), "empty", "too_long", "ambiguous" (a
            list or a hedge), "unparseable" or "timeout". None if it states one, right or wrong.
    """

    correct: bool | None
    failure: str | None = None


def answer_reward(problem: Problem, text: str, *, timeout: float = TIMEOUT_SECONDS) -> Score:
    """Return 1 if the answer of the response is right, else 0; None only if the checker ran out of time.

    Example:
        >>> answer_reward(problem, "<think>9 * $2 = $18</think> <answer>$18</answer>").total
        1.0

    Args:
        timeout: seconds for comparing expressions; numbers are not affected.

    Raises:
        ValueError: the problem has no gold answer.
    """
    verdict = grade(gold_answer(problem), text, timeout=timeout)
    return Score(total=None if verdict.correct is None else float(verdict.correct), failure=verdict.failure)


def gold_answer(problem: Problem) -> str:
    """Return the problem's gold answer; ValueError if it has none."""
    if problem.answer is None or not problem.answer.strip():
        raise ValueError(f"problem {problem.id!r} has no gold answer, but a correctness reward needs one")
    return problem.answer


def is_correct(gold: str, text: str) -> bool:
    """Return whether the answer of the response is right; a check that ran out of time counts as wrong."""
    return grade(gold, text).correct is True


def grade(gold: str, text: str, *, timeout: float = TIMEOUT_SECONDS) -> Grade:
    """Check the last answer block of a whole response, by the rules in the module's docstring.

    Raises:
        ValueError: no response could ever match the gold answer.
    """
    target = _gold(gold)
    block = parse_tags(text).answer
    if block is None:
        return Grade(correct=False, failure="no_answer")
    block = block.strip()
    if not block:
        return Grade(correct=False, failure="empty")
    if len(block) > MAX_ANSWER_CHARS:
        return Grade(correct=False, failure="too_long")
    stated = _undress(block)
    if target.number is not None:
        number = _number(stated)
        return _unread(stated) if number is None else Grade(correct=number == target.number)
    if stated.removesuffix(".") == target.text.removesuffix("."):
        return Grade(correct=True)
    if target.expression is None:
        return Grade(correct=False)
    answer = _expression(stated)
    return _unread(stated) if answer is None else _compare(target.expression, answer, timeout)


def lenient_answer_reward(problem: Problem, text: str, *, timeout: float = TIMEOUT_SECONDS) -> Score:
    """Return 1 if the last number anywhere in the response equals the gold answer, with or without tags, else 0.

    For evaluation beside the strict reward: the gap between the two is the cost of the format. Never train on it,
    because it pays for answers that were not given.

    Example:
        >>> lenient_answer_reward(problem, "9 * $2 = $18, so she makes $18 a day.").total
        1.0

    Args:
        timeout: seconds, as in :func:`answer_reward`.

    Raises:
        ValueError: the problem has no gold answer.
    """
    gold_answer(problem)
    number = lenient_number(text)
    if number is None:
        return Score(total=0.0, failure="no_answer")
    return answer_reward(problem, f"<answer>{number}</answer>", timeout=timeout)


def lenient_number(text: str) -> str | None:
    """Return the last number anywhere in the text in plain form (``"1,800.50"`` gives ``"1800.5"``), or None."""
    last = next(iter(deque(_LENIENT.finditer(text), maxlen=1)), None)
    if last is None or len(last[0]) > MAX_ANSWER_CHARS:
        return None
    whole, _, decimals = last["digits"].replace(",", "").partition(".")
    digits = ".".join(filter(None, (whole.lstrip("0") or "0", decimals.rstrip("0"))))
    return f"-{digits}" if last["minus"] and digits != "0" else digits


def voted_answer(problem: Problem, text: str) -> str | None:
    """Return the answer of a response in one spelling, for a majority vote; None if the response has no answer.

    If the gold answer is a number, only numbers vote, and ``$1,800`` and ``1800.0`` are the same vote. Otherwise the
    text of the block votes, without markup and without spaces around operators: ``3+5`` and ``3 + 5`` are the same
    vote, but ``5 + 3`` is another.

    Raises:
        ValueError: the problem has no gold answer.
    """
    gold = gold_answer(problem)
    try:
        wants_number = _gold(gold).number is not None
    except ValueError:  # a gold answer that only another checker can read
        wants_number = False
    block = (parse_tags(text).answer or "").strip()
    if not block or len(block) > MAX_ANSWER_CHARS:
        return None
    stated = _undress(block)
    if wants_number:
        number = _number(stated)
        return None if number is None else str(number)
    joined = stated.translate(_OPERATOR_SPELLINGS).removesuffix(".")
    return re.sub(r" ?([-+*/^=()]) ?", r"\1", joined) or None


_OPERATOR_SPELLINGS = str.maketrans({"\u00d7": "*", "\u00f7": "/"})
_LENIENT = re.compile(r"(?P<minus>(?<![\w)])-\$?)?(?P<digits>[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?)")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Gold:
    """A gold answer, as a number if it is one, else as a LaTeX expression if it is one, else only as text."""

    text: str
    number: Fraction | None = None
    expression: str | None = None


@lru_cache(maxsize=4096)
def _gold(gold: str) -> _Gold:
    if not 0 < len(gold.strip()) <= MAX_ANSWER_CHARS:
        raise ValueError(f"gold answer {gold[:80]!r} has {len(gold)} characters; it must have 1 to {MAX_ANSWER_CHARS}")
    text = _undress(gold)
    number = _number(text, units=False)
    if number is not None:
        return _Gold(text=text, number=number)
    if " " in text and _number(text) is not None:
        raise ValueError(f"gold answer {gold!r} has a unit; it must be only the number")
    # "B", "no", "0110" and "1ba" are names and codes, whose order matters; only "2x" is certainly algebra.
    is_word = re.fullmatch(r"[A-Za-z0-9]+", text) and not re.fullmatch(r"[0-9]+[A-Za-z]", text)
    return _Gold(text=text, expression=None if is_word else _expression(text))


def _unread(stated: str) -> Grade:
    """Grade a block that states no value: "ambiguous" for a list or a hedge, else "unparseable"."""
    words = set(re.findall(r"[a-z]+", stated.lower()))
    several = len(re.findall(r"[0-9]+(?:[.,][0-9]+)*", stated)) > 1 and not re.search(r"[-+*/^=\\\u00d7\u00f7]", stated)
    ambiguous = several or words & _HEDGES or re.search(r"[?~≈±,;]", stated)
    return Grade(correct=False, failure="ambiguous" if ambiguous else "unparseable")


def _compare(gold: str, answer: str, timeout: float) -> Grade:
    try:
        return Grade(correct=_equal(gold, answer, timeout))
    except symbolic.UnparseableError:
        return Grade(correct=False, failure="unparseable")
    except TimeoutError:
        return Grade(correct=None, failure="timeout")


@lru_cache(maxsize=4096)
def _equal(gold: str, answer: str, timeout: float) -> bool:
    # lru_cache keeps verdicts but not exceptions, so a timeout on a busy machine is tried again.
    return symbolic.equal(gold, answer, timeout=timeout)


# --- from the text of a block to the one thing it states --------------------------------------------------------------

_WRAPPERS = (
    ("*", "*"),
    ("`", "`"),
    ("$", "$"),
    (r"\(", r"\)"),
    (r"\[", r"\]"),
    (r"\boxed{", "}"),
    (r"\textbf{", "}"),
    (r"\mathbf{", "}"),
)
_LEAD_IN = re.compile(
    r"(?:the\s+)?(?:final\s+)?answer\s*(?:is\s*:?|[:=])\s*|(?P<name>[a-z]++(?:_\{?\w\}?)?)\s*=\s*", re.IGNORECASE
)


@lru_cache(maxsize=4096)
def _undress(block: str) -> str:
    """Strip markup, ``x =`` and the like. The length of the block bounds the loop."""
    text = block.strip().replace("\u2212", "-").replace(r"\$", "$").replace(r"\%", "%").replace("{,}", ",")
    text = re.sub(r"(?<=[0-9])\\[,;!](?=[0-9]{3})", ",", text)  # LaTeX's thin space between groups of three
    text = re.sub(r"\\(?:text|mathrm)\{([^{}]*)\}|\\[,;!]", r" \1 ", text)
    while (peeled := _peel(text)) != text:
        text = peeled
    return " ".join(text.split())


def _peel(text: str) -> str:
    text = text.strip()
    for opening, closing in _WRAPPERS:
        body = text.removesuffix(".")
        if len(body) >= len(opening) + len(closing) and body.startswith(opening) and body.endswith(closing):
            return body[len(opening) : -len(closing)]
    lead_in = _LEAD_IN.match(text)
    if lead_in and (lead_in["name"] or "").lower() not in _NOT_UNITS:
        return text[lead_in.end() :]
    return text


# --- numbers ----------------------------------------------------------------------------------------------------------

# Possessive quantifiers where a run could be split in many ways, to prevent backtracking.
_NUMBER = re.compile(
    r"""(?P<sign>[-+]?)(?:[$€£¥₹]\ ?(?P<inner_sign>[-+]?))?
    (?:\\[dt]?frac\ ?(?:\{(?P<top>-?[0-9]++)\}\{(?P<bottom>[0-9]++)\}|(?P<digit_top>[0-9])(?P<digit_bottom>[0-9]))
      |(?P<numerator>[1-9][0-9]*+)\ ?/\ ?(?P<denominator>[1-9][0-9]*+)
      |(?P<whole>[1-9][0-9]{0,2}(?:,[0-9]{3})++|[1-9][0-9]*+|0)?(?P<decimals>\.[0-9]++)?)
    (?P<unit>\ ?[%$€£¥₹]|\ ?°[CF]?|\ ?/?\ ?(?:[A-Za-z]{2,}+|[ghlmsL])(?:\ ?[\ /]\ ?[A-Za-z]++){0,3}+)?
    \.?""",
    re.VERBOSE,
)
_HEDGES = frozenset(
    """
    about almost and approx approximately are aren around be been bet believe but can certain circa correct could
    else error est estimate estimated estimation exactly except false give given guess guessed guessing hardly hmm hope
    hopefully idk if incorrect invalid is ish isn it likely may maybe might mistake must nearly never no none nope nor
    not only or ought perhaps possibly presumably probably reckon right roughly say should so something suppose supposed
    supposedly sure suspect than then think true uncertain unknown unless unlikely unsure versus vs was were will would
    wrong you
    """.split()
)
# One of these words after a number changes its value.
_QUANTITIES = frozenset(
    """
    one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
    nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred hundreds thousand thousands million millions
    billion billions trillion trillions zero dozen dozens bn grand lakh crore mil mn half halves third thirds fourth
    fourths fifth fifths sixth sixths seventh eighth eighths ninth tenth tenths hundredth hundredths thousandth
    thousandths st nd rd th squared cubed factorial pi sqrt root mod plus minus log ln exp sin cos tan nan inf infinity
    infinite twice thrice double doubled triple tripled sevenths ninths
    """.split()
)
_NOT_UNITS = _HEDGES | _QUANTITIES


@lru_cache(maxsize=4096)
def _number(text: str, *, units: bool = True) -> Fraction | None:
    """Return the value of a text that states one number and nothing else, else None."""
    match = _NUMBER.fullmatch(text)
    if match is None or (match["sign"] and match["inner_sign"]):
        return None
    unit = match["unit"] or ""
    words = re.findall(r"[a-z]+", unit.lower())
    if (words and not units) or not _NOT_UNITS.isdisjoint(words):
        return None
    magnitude = _magnitude(match)
    if magnitude is None:
        return None
    return -magnitude if "-" in (match["sign"] + (match["inner_sign"] or "")) else magnitude


def _magnitude(match: re.Match[str]) -> Fraction | None:
    top = match["top"] or match["digit_top"] or match["numerator"]
    bottom = match["bottom"] or match["digit_bottom"] or match["denominator"]
    if top is not None and bottom is not None:
        # A fraction that is an integer is a division left undone.
        undone = int(bottom) == 0 or int(top) % int(bottom) == 0
        return None if undone else Fraction(int(top), int(bottom))
    digits = (match["whole"] or "").replace(",", "") + (match["decimals"] or "")
    return Fraction(digits) if digits else None


# --- expressions ------------------------------------------------------------------------------------------------------

_TOKENS = re.compile(
    r"""(?:\\(?:[dt]?frac|sqrt|pi|cdot|times|div|left|right)(?![A-Za-z])
    |[0-9]{1,20}+(?:\.[0-9]{1,20}+)?(?![0-9])|(?<![A-Za-z\\])[A-Za-z]{1,2}(?![A-Za-z])|[-+*/^(){}\[\]\ ])++""",
    re.VERBOSE,
)
_EXPONENT = r"-?(?:[0-9]{1,2}(?:/[0-9]{1,2})?[A-Za-z]?|[A-Za-z])"
# Does not match a power inside an exponent (9^9^9).
_POWER = re.compile(rf"\^ ?(?:\{{({_EXPONENT})\}}|\(({_EXPONENT})\)|([0-9]{{1,2}}(?![0-9.])|[A-Za-z]))(?! ?\^)")
# math-verify reads "2 3" and "{2}3" as a mixed number, 2 + 3, and "x2" as a product. A power without a base could
# attach to another power.
_MISREAD = re.compile(r"[0-9] [0-9]|[)\]}] ?[0-9]|(?:^|[^A-Za-z\\])[A-Za-z]{1,2} ?[0-9]|[(\[{] ?[\^)\]}]")
_MAX_BRACKETS = 16
_MAX_EXPONENT = 10_000


@lru_cache(maxsize=4096)
def _expression(text: str) -> str | None:
    """Return the text as LaTeX for sympy if it is in a grammar with bounded values, else None.

    The grammar has numbers of at most 20 digits, products of letters, ``\\pi``, ``\\frac``, ``\\sqrt``, ``+ - * /``
    and brackets. An exponent is one short number, fraction or letter. The product of all exponents, which bounds powers
    of powers, is at most 10,000.
    """
    text = text.replace("**", "^")
    if not _TOKENS.fullmatch(text) or _MISREAD.search(text) or sum(map(text.count, "([{")) > _MAX_BRACKETS:
        return None
    exponents = ["".join(groups) for groups in _POWER.findall(text)]
    if len(exponents) < text.count("^"):
        return None
    if math.prod(max(map(int, re.findall("[0-9]+", e)), default=1) or 1 for e in exponents) > _MAX_EXPONENT:
        return None
    latex = _POWER.sub(lambda power: f"^{{{power[1] or power[2] or power[3]}}}", text)
    return re.sub(r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi ", latex)
