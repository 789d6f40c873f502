"""Compare two parsed answers: structures part by part, expressions by their values.

Two expressions are the same if they have the same value. Rational numbers are compared exactly. Everything else is
evaluated at three points (:mod:`rolltune.rewards.answers.evaluate`), first to 60 digits, and to 1,000 if these agree.
An identity holds at any point, and expressions that differ agree at a point nobody chose with probability 0, so nothing
is ever expanded or simplified. Close is not equal: ``1.414214`` is not ``\\sqrt{2}``, and ``0.333`` is not ``1/3``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from fractions import Fraction
from functools import reduce

from rolltune.rewards.answers.evaluate import POINTS, Point
from rolltune.rewards.answers.expression import (
    BRACKET,
    MATRIX,
    RELATION,
    SEPARATED,
    SET,
    STRUCTURES,
    TURNED,
    UNION,
    UNORDERED,
    Node,
)

PRECISIONS = ((60, 40), (1_000, 500))  # (digits to compute, digits that must agree)


def same(gold: Node, answer: Node, *, timeout: float) -> bool:
    """Return whether the answer states what the gold answer states.

    Args:
        gold: parsed gold answer.
        answer: parsed answer.
        timeout: seconds of CPU time of this thread.

    Raises:
        NoValue: a value cannot be computed within the limits.
    """
    return _Comparison(time.thread_time() + timeout).same(_rewrite(gold), _rewrite(answer))


class _Comparison:
    def __init__(self, deadline: float) -> None:
        self.points = [[Point(signs, digits, deadline) for signs in POINTS] for digits, _ in PRECISIONS]

    # --- structures ---

    def same(self, gold: Node, answer: Node) -> bool:
        if gold == answer:
            return True
        if {gold.op, answer.op} & {SEPARATED, UNORDERED}:
            gold, answer = _as_equations(gold), _as_equations(answer)
        if answer.op == RELATION and gold.op != RELATION and set(answer.name.split()) == {"="}:
            # A name and its value, or a chain of equal ones: V = 6^2\\pi = 36\\pi.
            return all(self.same(gold, side) for side in answer.args[is_name(answer.args[0]) :])
        if gold.op == RELATION and answer.op != RELATION:
            gold = _named_value(gold)
        if RELATION in (gold.op, answer.op):
            if gold.op == answer.op:
                return self.same_relation(gold, answer)
            gold, answer = _as_interval(gold), _as_interval(answer)
            if RELATION in (gold.op, answer.op):
                return False
        if gold.op not in STRUCTURES and answer.op not in STRUCTURES:
            if gold.op == answer.op == "ratio":
                return self.same_in_order(gold.args, answer.args)
            return self.same_value(gold, answer)
        if MATRIX in (gold.op, answer.op):
            return self.same_matrix(gold, answer)
        if UNION in (gold.op, answer.op):
            gold, answer = _as_union(gold), _as_union(answer)
            return gold.op == answer.op and self.same_in_any_order(gold.args, answer.args)
        return self.same_collection(gold, answer)

    def same_in_order(self, gold: Sequence[Node], answer: Sequence[Node]) -> bool:
        return len(gold) == len(answer) and all(map(self.same, gold, answer))

    def same_in_any_order(self, gold: Sequence[Node], answer: Sequence[Node]) -> bool:
        return all(any(self.same(one, other) for other in answer) for one in gold) and all(
            any(self.same(other, one) for other in gold) for one in answer
        )

    def same_collection(self, gold: Node, answer: Node) -> bool:
        """Compare lists, tuples, sets and intervals.

        A list without brackets equals the tuple or the set of its items. The order counts, except in a set, in a list
        joined by "and" or "or", and in a list of tuples or equations, which is a set of solutions.
        """
        if gold.op not in STRUCTURES or answer.op not in STRUCTURES:
            one, several = (gold, answer) if answer.op in STRUCTURES else (answer, gold)
            return several.op == SET and len(several.args) == 1 and self.same(several.args[0], one)
        if gold.op == BRACKET and answer.op == BRACKET and gold.name != answer.name:
            return False
        for one, other in ((gold, answer), (answer, gold)):
            if one.op == BRACKET and other.op != BRACKET and not _is_listed_by(one, other):
                return False
        items_are_solutions = all(item.op in (BRACKET, RELATION) for item in gold.args + answer.args)
        is_set = gold.op == answer.op == SEPARATED and items_are_solutions
        has_order = {gold.op, answer.op} <= {SEPARATED, BRACKET} and not is_set
        return (self.same_in_order if has_order else self.same_in_any_order)(gold.args, answer.args)

    def same_matrix(self, gold: Node, answer: Node) -> bool:
        gold, answer = _as_vector(_as_matrix(gold)), _as_vector(_as_matrix(answer))
        if gold.op == answer.op == BRACKET and gold.name == answer.name:
            return self.same_in_order(gold.args, answer.args)
        if gold.op != answer.op or gold.name != answer.name or len(gold.args) != len(answer.args):
            return False
        return all(map(self.same_in_order, (row.args for row in gold.args), (row.args for row in answer.args)))

    def same_relation(self, gold: Node, answer: Node) -> bool:
        """Compare equations and inequalities: one relation up to a factor, a chain side by side."""
        signs = gold.name.split(), answer.name.split()
        if all(set(chain) == {"="} for chain in signs) and len(signs[0]) > 1 and len(signs[1]) > 1:
            # Shown work is accepted only for a gold answer that shows its own.
            return self.same(gold.args[0], answer.args[0]) and self.same(gold.args[-1], answer.args[-1])
        if len(signs[0]) != len(signs[1]):
            return False
        if len(signs[0]) > 1:
            turned = Node(RELATION, answer.args[::-1], name=" ".join(TURNED[sign] for sign in reversed(signs[1])))
            return any(gold.name == o.name and self.same_in_order(gold.args, o.args) for o in (answer, turned))
        sign, other = signs[0][0], signs[1][0]
        if sign in ("=", r"\ne"):
            if sign == other and self.same_in_order(gold.args, answer.args):
                return True
            return sign == other and self.is_multiple(gold, answer, (1, -1))
        if other in (sign, TURNED[sign]):
            return self.is_multiple(gold, answer, (1,) if sign == other else (-1,))
        return False

    # --- values ---

    def same_value(self, gold: Node, answer: Node) -> bool:
        for points, (_, digits) in zip(self.points, PRECISIONS, strict=True):
            for point in points:
                a, b = point.value(gold), point.value(answer)
                if isinstance(a, Fraction) and isinstance(b, Fraction):
                    return a == b
                if point.signs != "positive" and point.is_complex(a) and point.is_complex(b):
                    continue  # ln(a/b) and ln(a) - ln(b) need to agree only where they are real
                if not point.close(a, b, digits):
                    return False
        return True

    def is_multiple(self, gold: Node, answer: Node, signs: tuple[int, ...]) -> bool:
        """Return whether the differences of the two sides have a constant ratio, of one of these signs."""
        if any(side.op in STRUCTURES for side in gold.args + answer.args):
            return False
        for points, (_, digits) in zip(self.points, PRECISIONS, strict=True):
            ratios = []
            for point in points:
                a, b = (point.number(point.value(Node("-", node.args))) for node in (gold, answer))
                if point.close(b, 0, digits) or point.close(a, 0, digits):
                    return False
                ratios.append(a / b)
            is_constant = all(points[0].close(ratios[0], ratio, digits) for ratio in ratios[1:])
            if not is_constant or (1 if ratios[0].real > 0 else -1) not in signs:
                return False
        return True


def _is_listed_by(bracket: Node, other: Node) -> bool:
    """Return whether something without round or square brackets can stand for something with them.

    ``1, 2`` can for ``(1, 2)``, and ``1, 2, 3`` for ``[1, 2, 3]``, but a set, an interval and a list of equations
    cannot.
    """
    is_interval = bracket.name in ("(]", "[)") or (bracket.name == "[]" and len(bracket.args) == 2)
    return other.op in (SEPARATED, UNORDERED) and not is_interval and all(arg.op != RELATION for arg in other.args)


# --- rewriting --------------------------------------------------------------------------------------------------------


def _rewrite(node: Node) -> Node:
    return _plus_minus(_unite(_multiply(node)))


def _unite(node: Node) -> Node:
    """Write a union of sets as one set."""
    if node.op != UNION or any(arg.op != SET for arg in node.args):
        return node
    return Node(SET, tuple(item for arg in node.args for item in arg.args))


def _multiply(node: Node) -> Node:
    """Multiply matrices out."""
    args = tuple(map(_multiply, node.args))
    if node.op not in ("juxtaposed", "*") or not all(arg.op == MATRIX and not arg.name for arg in args):
        return Node(node.op, args, name=node.name, value=node.value)
    left, right = args
    columns = list(zip(*(row.args for row in right.args), strict=False))
    if any(len(row.args) != len(right.args) for row in left.args):
        return node
    rows = [[reduce(_add, map(_times, row.args, column)) for column in columns] for row in left.args]
    return Node(MATRIX, tuple(Node("row", tuple(row)) for row in rows))


def _add(a: Node, b: Node) -> Node:
    return Node("+", (a, b))


def _times(a: Node, b: Node) -> Node:
    return Node("*", (a, b))


def _plus_minus(node: Node) -> Node:
    """Write ``a \\pm b`` as the two values."""
    if not any(part.op == "pm" for part in node.walk()):
        return node
    if node.op in STRUCTURES:
        args = [_plus_minus(arg) for arg in node.args]
        if node.op in (SEPARATED, UNORDERED):
            args = [item for arg in args for item in (arg.args if arg.op == UNORDERED else (arg,))]
        return Node(UNORDERED if node.op == SEPARATED else node.op, tuple(args), name=node.name)
    return Node(UNORDERED, (_choose_sign(node, plus=True), _choose_sign(node, plus=False)))


def _choose_sign(node: Node, *, plus: bool) -> Node:
    args = tuple(_choose_sign(arg, plus=plus) for arg in node.args)
    if node.op == "pm":
        return args[0] if plus == (node.name == r"\pm") else Node("neg", args)
    return Node(node.op, args, name=node.name, value=node.value)


def _named_value(node: Node) -> Node:
    """Drop the name of a value: ``f(x) = 1``, ``(p, q) = (3, 2)``."""
    is_value = node.name == "=" and is_name(node.args[0])
    return node.args[1] if is_value else node


def is_name(node: Node) -> bool:
    """Return whether a node can be the name of a value: symbols, calls of functions, products and ratios of these."""
    if node.op == "call":
        return node.name not in ("sqrt", "sin", "cos", "tan", "log", "ln", "exp")
    if node.op in ("juxtaposed", "frac", "/", "ratio", BRACKET):
        return all(map(is_name, node.args))
    if node.op == "^":  # A^{-1}, f^{-1}
        base, exponent = node.args
        return exponent == _INVERSE and base.op == "symbol" and (base.name.isupper() or base.name in ("f", "g", "h"))
    return node.op == "symbol" and node.name not in ("%", "e", "i", r"\pi", r"\infty")


_INVERSE = Node("neg", (Node("number", value=Fraction(1)),))
_INFINITY = Node("symbol", name=r"\infty")


def _as_interval(node: Node) -> Node:
    """Write ``-2 \\le x < 7`` and ``x < 3`` as intervals of the one symbol."""
    if node.op != RELATION:
        return node
    signs, sides = node.name.split(), node.args
    if signs[0] in (">", r"\ge"):
        signs, sides = [TURNED[sign] for sign in reversed(signs)], sides[::-1]
    if not {*signs} <= {"<", r"\le"}:
        return node
    if len(sides) == 3 and sides[1].op == "symbol":
        return Node(
            BRACKET, (sides[0], sides[2]), name=("(" if signs[0] == "<" else "[") + (")" if signs[1] == "<" else "]")
        )
    if len(sides) == 2 and sides[0].op == "symbol":
        return Node(BRACKET, (Node("neg", (_INFINITY,)), sides[1]), name="(" + (")" if signs[0] == "<" else "]"))
    if len(sides) == 2 and sides[1].op == "symbol":
        return Node(BRACKET, (sides[0], _INFINITY), name=("(" if signs[0] == "<" else "[") + ")")
    return node


def _as_equations(node: Node) -> Node:
    """Write ``(x, y) = (2, 3)`` as ``x = 2, y = 3``."""
    if node.op != RELATION or node.name != "=" or {side.op for side in node.args} != {BRACKET}:
        return node
    names, values = (side.args for side in node.args)
    if len(names) != len(values) or not all(map(is_name, names)):
        return node
    return Node(UNORDERED, tuple(Node(RELATION, pair, name="=") for pair in zip(names, values, strict=True)))


def _as_vector(node: Node) -> Node:
    """Write a matrix of one column, or of one row, as a tuple."""
    if node.op != MATRIX or node.name:
        return node
    columns = tuple(entry for row in node.args for entry in row.args)
    is_column = all(len(row.args) == 1 for row in node.args)
    return Node(BRACKET, columns, name="()") if is_column or len(node.args) == 1 else node


def _as_matrix(node: Node) -> Node:
    """Write a list of lists in square brackets as a matrix."""
    is_list = node.op == BRACKET and all(arg.op == BRACKET for arg in node.args)
    if not is_list or any(part.name != "[]" for part in (node, *node.args)):
        return node
    return Node(MATRIX, tuple(Node("row", row.args) for row in node.args))


def _as_union(node: Node) -> Node:
    """Write ``x < 1 or x > 2`` as a union of intervals."""
    is_or = node.op == UNORDERED and node.name == "or" and all(arg.op == RELATION for arg in node.args)
    return Node(UNION, tuple(map(_as_interval, node.args))) if is_or else node
