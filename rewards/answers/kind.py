"""Decide what kind of answer a gold answer is, once, before any response is compared with it.

The kinds, in the order in which they are tried:

- ``number``: one number, with or without currency or unit, as :func:`rolltune.rewards.answers.numbers.read_number`
  reads it. Leading zeros do not count: ``016`` is 16.
- ``choice``: one capital letter, with or without brackets: ``B``, ``(B)``.
- ``expression``: algebra (``2\\sqrt{3}``, ``x^2+1``), an equation, an inequality or a matrix.
- ``list``: a list, tuple or interval of numbers and expressions, whose order counts.
- ``set``: the same where the order does not count: in braces, joined by "and" or "or", with ``\\pm``, or a union of
  intervals.
- ``text``: everything else, compared as text after :func:`rolltune.rewards.answers.normalise.fold`.

Many texts could be evaluated as algebra but are none: a date (``12/25/2024``), a range (``7-11``), a score (``3:4``), a
sequence (``W-L-W``, ``a b c``), a name (``AB``). Only what is certainly algebra is an expression: it has an operator
other than ``-`` and ``/``, a power, a function or a command, a number in front of a letter, or exactly two terms with
a letter among them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, get_args

from rolltune.rewards.answers.compare import is_name
from rolltune.rewards.answers.evaluate import NoValue, evaluate
from rolltune.rewards.answers.expression import (
    BRACKET,
    MATRIX,
    RELATION,
    SEPARATED,
    SET,
    UNION,
    UNORDERED,
    Node,
    ParseError,
    parse,
)
from rolltune.rewards.answers.normalise import has_content, normalise
from rolltune.rewards.answers.numbers import HEDGES, Number, canonical_unit, is_unit, read_number

Kind = Literal["auto", "number", "choice", "expression", "list", "set", "text"]
MAX_ANSWER_CHARS = 256  # far above any honest final answer; bounds the time of everything
GOLD_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Gold:
    """A gold answer that has been read.

    Attributes:
        kind: never "auto".
        text: normalised text.
        number: the value, of the kind number.
        node: the parsed text, of the kinds expression, list and set.
        unit: the unit behind the expression, in one spelling; empty if it has none.
    """

    kind: Kind
    text: str
    number: Number | None = None
    node: Node | None = None
    unit: str = ""


@lru_cache(maxsize=8192)
def read_gold(answer: str, kind: Kind = "auto") -> Gold:
    """Read a gold answer.

    Args:
        answer: as in the data.
        kind: what it must be; "auto" decides by the rules above.

    Raises:
        ValueError: it is not of this kind, or no response could earn it.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind: {kind!r}; must be one of {', '.join(get_args(Kind))}")
    if not 0 < len(answer.strip()) <= MAX_ANSWER_CHARS:
        raise ValueError(f"gold answer {answer[:80]!r} has {len(answer)} characters; must have 1 to {MAX_ANSWER_CHARS}")
    text = normalise(answer)
    if not has_content(text):
        raise ValueError(f"gold answer {answer!r} shows nothing; it must state something")
    gold = _of_kind(text, kind)
    if gold is None:
        raise ValueError(
            f"gold answer {answer!r} is not of the kind {kind!r}; kind: auto reads it as {_auto(text).kind}"
        )
    return gold


def _of_kind(text: str, kind: Kind) -> Gold | None:
    if kind == "auto":
        return _auto(text)
    if kind == "text":
        return Gold(kind="text", text=text)
    if kind == "choice":
        return Gold(kind="choice", text=text) if read_choice(text) else None
    if kind == "number":
        number = read_stated_number(text)
        return Gold(kind="number", text=text, number=number) if number else None
    gold = _mathematics(text, certain=False)
    if gold and gold.node and kind == "set" and gold.node.op == SEPARATED:
        return replace(gold, kind="set", node=Node(SET, gold.node.args))
    return gold if gold and gold.kind == kind else None


def _auto(text: str) -> Gold:
    number = read_stated_number(text)
    if number is not None and number.is_certain:
        return Gold(kind="number", text=text, number=number)
    if read_choice(text):
        return Gold(kind="choice", text=text)
    return _mathematics(text, certain=True) or Gold(kind="text", text=text)


def _mathematics(text: str, *, certain: bool) -> Gold | None:
    """Read an expression, a list or a set; None if it is none, or, with ``certain``, if it could be something else."""
    body, unit = split_unit(text)
    node = read_expression(body) if unit else None
    if node is None or node.op == "symbol" or not _is_mathematics(node):
        node, unit = read_expression(text), ""
    if node is None or (certain and not _is_mathematics(node)) or not _is_computable(node):
        return None
    has_no_order = node.op in (SET, UNORDERED, UNION) or any(part.op == "pm" for part in node.walk())
    kind = "set" if has_no_order else "list" if node.op in (SEPARATED, BRACKET) else "expression"
    return Gold(kind=kind, text=text, node=node, unit=unit)


def _is_computable(node: Node) -> bool:
    try:
        evaluate(node, timeout=GOLD_SECONDS)
    except NoValue:
        return False
    return True


# --- reading, for gold answers and responses alike --------------------------------------------------------------------

_CHOICE = re.compile(r"(?:(?:option|choice)\s+)?[(\[]?\s*([A-Z])\s*[)\].:]?", re.IGNORECASE)
_NAME = re.compile(r"(?:[^\W\d_]+(?:_(?:\w|\{\w+\}))? ){0,3}[^\W\d_]+(?:_(?:\w|\{\w+\}))?")


def read_choice(text: str) -> str | None:
    """Return the letter of a multiple-choice answer, such as ``B``, ``(B)``, ``B.`` or ``option B``."""
    match = _CHOICE.fullmatch(text)
    return match[1] if match and match[1].isupper() else None


_STATED_CHOICE = re.compile(
    r"""(?:(?i:option|choice)\ )?(?:[(\[]\ ?(?P<bracketed>[A-Z])\ ?[)\]]
      |(?P<letter>[A-Z])(?:[).:,]|\ -(?=\ )|(?=\ \()|(?=\ is\ (?:the\ )?(?:correct|right|best)\b)))
    [.:,]?\ ?(?P<text>.*)""",
    re.VERBOSE,
)
_OTHER_CHOICE = re.compile(r"(?<![^\W_])(?<![0-9\u00b0] )[A-Z](?![^\W_])")  # but "60 J" is a quantity
_DOUBTED = re.compile(
    r"[?]|n't\b|\b(?:or|either|neither|maybe|perhaps|probably|possibly|guess|wait|wrong|incorrect|false|unsure)\b"
    r"|\bnot (?:correct|right|true|the|it|my|sure)\b",
    re.IGNORECASE,
)


def read_stated_choice(text: str) -> str | None:
    """Return the letter that a normalised answer chooses, with or without the text of the choice.

    Example:
        >>> read_stated_choice("(B) 12 m/s")
        'B'
    """
    if letter := read_choice(text):
        return letter
    match = _STATED_CHOICE.fullmatch(text)
    if match is None or _OTHER_CHOICE.search(match["text"]) or _DOUBTED.search(match["text"]):
        return None
    return match["bracketed"] or match["letter"]


def read_stated_number(text: str) -> Number | None:
    """Read a normalised text that states a number, with or without a name: ``18 cm``, ``x = 18``, ``total = $18``."""
    number = read_number(text)
    if number is not None or text.count("=") != 1:
        return number
    name, _, value = (part.strip() for part in text.partition("="))
    words = {word.lower() for word in re.findall(r"[^\W\d_]+", name)}
    if not words or not is_unit(words):
        return None
    if not _NAME.fullmatch(name):
        node = read_expression(name)
        if node is None or not is_name(node):
            return None
    return read_number(value)


_SENTENCE = re.compile(
    r"(?:there (?:is|are)|(?:the|its|his|her|their|our) (?P<what>(?:[^\W\d_]+[ -]){1,8}?)(?:is|are|equals)) "
    r"(?P<value>.*)",
    re.IGNORECASE,
)
_APPROXIMATELY = re.compile(r"\\approx|\\simeq|\u2248")


def read_statement(text: str) -> str:
    """Return the value that a normalised answer states, without the sentence and the rounding around it.

    Example:
        >>> read_statement(r"The longest side is 2\\sqrt{3} \\approx 3.46")
        '2\\\\sqrt{3}'
    """
    sentence = _SENTENCE.fullmatch(text)
    if sentence and is_unit(re.findall(r"[^\W\d_]+", (sentence["what"] or "").lower())):
        text = sentence["value"]
    exact, *roundings = _APPROXIMATELY.split(text)
    if len(roundings) == 1 and _is_rounded(exact.rpartition("=")[2].strip(), roundings[0].strip()):
        return exact.strip()
    return text


def _is_rounded(exact: str, rounded: str) -> bool:
    """Return whether a number is the other one, without symbols, rounded or cut off: ``2\\sqrt{3}`` and ``3.46``."""
    node, number = read_expression(exact), read_number(rounded)
    if node is None or number is None or not _is_constant(node):
        return False
    try:
        value = float(evaluate(node, timeout=GOLD_SECONDS))
    except (NoValue, TypeError, OverflowError):  # none, a complex number, a large one
        return False
    decimals = re.search(r"(?<=\.)[0-9]+", rounded)
    return abs(value - number.value) < 10.0 ** -len(decimals[0] if decimals else "")


def _is_constant(node: Node | None) -> bool:
    return node is not None and all(part.op != "symbol" or part.name in ("e", r"\pi") for part in node.walk())


def read_answer_number(text: str) -> Number | None:
    """Read a normalised answer that states a number; unlike a gold answer it may also be ``m + n = 22``."""
    number = read_stated_number(text)
    name, equals, value = (part.strip() for part in text.partition("="))
    if number is not None or not equals:
        return number
    node = read_expression(name) if is_unit(re.findall(r"[^\W\d_]+", name.lower())) else None
    return read_number(value) if node is not None and _is_sum_of_names(node) else None


def _is_sum_of_names(node: Node) -> bool:
    return all(map(_is_sum_of_names, node.args)) if node.op in ("+", "-") else is_name(node)


_UNIT = re.compile(r"(.*?\S) ((?:(?:[^\W\d_]{2,}|[ghlms](?![^\W\d_]))\.?[ /]?){1,4}(?: ?\^ ?\{?[23]\}?)?)", re.DOTALL)


def read_expression(text: str) -> Node | None:
    """Parse a normalised text; None if it is not mathematics. A number is read by the rules of numbers."""
    number = read_number(text)
    if number is not None and not number.is_undone and number.is_certain:
        return Node("number", value=number.value)
    try:
        return parse(text)
    except ParseError:
        return None


def split_unit(text: str) -> tuple[str, str]:
    """Split ``2\\sqrt{3} cm^2`` into the expression and its unit, which is empty if the text has none."""
    match = _UNIT.fullmatch(text)
    if match is None or not is_unit(re.findall(r"[^\W\d_]+", match[2].lower()), known=True):
        return text, ""
    if not re.search(r"[^\W\d_]{2}", match[2]) and not _is_constant(read_expression(match[1])):
        return text, ""  # 2\pi r h is a product
    return match[1], canonical_unit(match[2])


# --- what is certainly mathematics ------------------------------------------------------------------------------------


def _is_mathematics(node: Node) -> bool:
    """Return whether a parsed text is certainly meant as mathematics."""
    if node.op in (RELATION, MATRIX, UNION):
        return True
    if node.op in (SEPARATED, UNORDERED, SET, BRACKET):
        return all(_is_item(arg) for arg in node.args) and (
            node.op == SET
            or any(part.op == "number" for part in node.walk())
            or any(arg.op != "symbol" and _is_mathematics(arg) for arg in node.args)
        )
    if node.op == "symbol":
        return True
    parts = list(node.walk())
    spelled = {part.op for part in parts} - {"number", "symbol"}
    if spelled - {"-", "/", "juxtaposed", "neg", "!", "ratio"}:
        return True
    if "!" in spelled and not any(map(_is_word, parts)):
        return True
    if "ratio" in spelled or not any(part.op == "symbol" for part in parts):
        return False
    if node.op == "juxtaposed" and parts[-1].op == "symbol" and _first(node).value == 1:
        return False  # 1ba: algebra does not write a factor of 1
    inner = {id(arg) for part in parts if part.op == "juxtaposed" for arg in part.args}
    if any(_is_monomial(part) for part in parts if id(part) not in inner):
        return True
    atoms = [part for part in parts if part.op in ("number", "symbol")]
    if "juxtaposed" not in spelled:
        return len(atoms) == 2  # x-1 and n/2, but not W-L-W
    # ab/2, but neither DC/AB nor a word
    return "/" in spelled and any(atom.op == "number" for atom in atoms) and not any(map(_is_capital, atoms))


def _is_item(node: Node) -> bool:
    return node.op in ("number", "symbol") or (node.op == "neg" and _is_item(node.args[0])) or _is_mathematics(node)


def _first(node: Node) -> Node:
    return _first(node.args[0]) if node.args else node


def _is_word(node: Node) -> bool:
    return node.op == "juxtaposed" and all(part.op in ("symbol", "juxtaposed") for part in node.walk())


def _is_capital(node: Node) -> bool:
    return node.name[:1].isupper()


def _is_monomial(node: Node) -> bool:
    """Return whether a product is written as algebra writes it: a number, then letters in order."""
    if node.op != "juxtaposed":
        return False
    factors = [part for part in node.walk() if part.op in ("number", "symbol", "juxtaposed")]
    leaves = [part for part in factors if part.op != "juxtaposed"]
    if len(factors) < len(list(node.walk())) or leaves[0].op != "number":
        return False
    letters = [leaf.name for leaf in leaves[1:]]
    return all(letters) and letters == sorted(letters)


def unread(text: str) -> str:
    """Return why a text states no value: "ambiguous" for a list or a hedge, else "unparseable"."""
    words = set(re.findall(r"[a-z]+", text.lower()))
    several = len(re.findall(r"[0-9]+(?:[.,][0-9]+)*", text)) > 1 and not re.search(r"[-+*/^=\\]", text)
    return "ambiguous" if several or words & HEDGES or re.search(r"[?~\u2248,;]|\\pm|\\approx", text) else "unparseable"
