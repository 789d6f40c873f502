"""Evaluate parsed expressions at points, with bounded work.

A point gives every symbol, and every unknown function of known arguments, a value derived from its name. Rational
numbers are Fractions; all other values are numbers of mpmath. The work depends on the length of the text and not on the
size of what it stands for: ``(a+b+c+d)^{99}`` is one power, never a sum of 171,700 terms.
"""

from __future__ import annotations

import hashlib
import math
import threading
import time
from fractions import Fraction
from typing import Any

from mpmath import MPContext
from mpmath.libmp import NoConvergence, libelefun

from rolltune.rewards.answers.expression import STRUCTURES, Node

MAX_EXPONENT = 10_000  # of a power
MAX_DIGITS = 4_000  # of an exact rational number; Python prints integers of up to 4,300
MAX_MAGNITUDE = 1_000_000  # binary exponent of any value
MAX_FACTORIAL = 1_000
# mpmath's caches of constants are not thread-safe while they grow, so they are filled beyond what is needed here.
for _constant in (libelefun.pi_fixed, libelefun.e_fixed, libelefun.ln2_fixed, libelefun.ln10_fixed):
    _constant(8192)  # bits
POINTS = ("positive", "negative", "mixed")  # signs of the symbols


class NoValue(ValueError):
    """A value is undefined, or too large to compute."""


class OutOfTime(NoValue):
    """The comparison took more than its time."""


def evaluate(node: Node, *, timeout: float) -> Any:
    """Return the value of a parsed text at one point: a Fraction if it is a rational number, else a number of mpmath.

    Args:
        node: parsed text; the value of a structure stands only for the fact that its parts have values.
        timeout: seconds of CPU time of this thread.

    Raises:
        NoValue: it has no value within the limits.
    """
    return Point(POINTS[0], 60, time.thread_time() + timeout).value(node)


_contexts = threading.local()


def _context(digits: int) -> MPContext:
    """Return this thread's context of mpmath for a precision; making one takes longer than a comparison."""
    context = getattr(_contexts, f"of_{digits}", None)
    if context is None:
        context = MPContext()
        context.dps = digits
        setattr(_contexts, f"of_{digits}", context)
    return context


class Point:
    """Evaluates nodes at one point, with one precision. Values are Fractions only if they depend on no symbol."""

    def __init__(self, signs: str, digits: int, deadline: float) -> None:
        self.signs, self.digits, self.deadline = signs, digits, deadline
        self.mp = _context(digits)

    def close(self, a: Any, b: Any, digits: int) -> bool:
        a, b = self.number(a), self.number(b)
        largest, tiny = max(abs(a), abs(b)), self.mp.mpf(10) ** -(self.digits * 9 // 10)
        return largest < tiny or abs(a - b) <= largest * self.mp.mpf(10) ** -digits

    def number(self, value: Any) -> Any:
        """Convert to a number of mpmath."""
        if isinstance(value, Fraction):
            return self.mp.mpf(value.numerator) / value.denominator
        return self.mp.mpmathify(value)

    def is_complex(self, value: Any) -> bool:
        return isinstance(value, self.mp.mpc) and abs(value.imag) > abs(value) * self.mp.mpf(10) ** -(self.digits // 2)

    def value(self, node: Node) -> Any:
        if time.thread_time() > self.deadline:
            raise OutOfTime("the comparison takes too long")
        try:
            return self.checked(self.compute(node))
        except (ZeroDivisionError, OverflowError, NoConvergence, TypeError) as error:
            raise NoValue(str(error)) from None

    def checked(self, value: Any) -> Any:
        if isinstance(value, Fraction):
            if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_DIGITS * 3.32:
                raise NoValue("a number has too many digits")
        elif not self.mp.isfinite(value) or (value and abs(self.mp.mag(value)) > MAX_MAGNITUDE):
            raise NoValue("a value is not finite, or too large")
        return value

    def compute(self, node: Node) -> Any:
        if node.op == "number":
            return node.value
        if node.op == "symbol":
            return self.symbol(node.name)
        if node.op in STRUCTURES or node.op in ("ratio", "row", "pm"):
            return self.unknown(node.op + node.name, [self.value(arg) for arg in node.args])
        values = [self.value(arg) for arg in node.args]
        if node.op == "call":
            return self.call(node.name, values)
        if node.op == "^":
            return self.power(*values)
        if node.op == "!":
            return self.factorial(values[0])
        if node.op == "neg":
            return -values[0]
        a, b = values if all(isinstance(value, Fraction) for value in values) else map(self.number, values)
        if node.op in "+-":
            return a + b if node.op == "+" else a - b
        return a / b if node.op in ("/", "frac") else a * b

    def symbol(self, name: str) -> Any:
        if name in (r"\pi", "e", "i"):
            return {r"\pi": +self.mp.pi, "e": +self.mp.e, "i": self.mp.j}[name]
        return self.unknown(name, [])

    def unknown(self, name: str, values: list[Any]) -> Any:
        """Return the value of a symbol or an unknown function, derived from the name, the arguments and the point."""
        arguments = [self.mp.nstr(self.number(value), 30) for value in values]
        digest = hashlib.sha256(repr((self.signs, name, arguments)).encode()).digest()
        magnitude = self.mp.mpf(int.from_bytes(digest, "big")) / 2**255 + self.mp.mpf(1) / 3
        has_minus = self.signs == "negative" or (self.signs == "mixed" and digest[-1] % 2)
        return -magnitude if has_minus else magnitude

    def power(self, base: Any, exponent: Any) -> Any:
        if abs(exponent) > MAX_EXPONENT:
            raise NoValue("an exponent is too large")
        if isinstance(exponent, Fraction) and exponent.denominator == 1:
            if isinstance(base, Fraction):
                bits = max(base.numerator.bit_length(), base.denominator.bit_length())
                if bits * abs(exponent) > MAX_DIGITS * 3.32:
                    raise NoValue("a power has too many digits")
            return base ** int(exponent)
        base = self.number(base)
        if base and abs(self.mp.mag(base)) * abs(exponent) > MAX_MAGNITUDE:
            raise NoValue("a power is too large")
        if isinstance(exponent, Fraction) and exponent.denominator % 2 and isinstance(base, self.mp.mpf) and base < 0:
            # The real root, not the principal one.
            return self.mp.power(-base, self.number(exponent)) * (-1 if exponent.numerator % 2 else 1)
        return self.mp.power(base, self.number(exponent))

    def factorial(self, value: Any) -> Any:
        if not isinstance(value, Fraction):
            return self.unknown("!", [value])
        if value.denominator != 1 or not 0 <= value <= MAX_FACTORIAL:
            raise NoValue("a factorial is too large")
        return Fraction(math.factorial(int(value)))

    def binomial(self, n: Any, k: Fraction) -> Any:
        if k.denominator != 1 or not 0 <= k <= MAX_FACTORIAL:
            raise NoValue("a binomial coefficient is too large")
        top = Fraction(1) if isinstance(n, Fraction) else self.mp.mpf(1)
        for i in range(int(k)):
            top = self.checked(top * (n - i))
        return top / math.factorial(int(k))

    def call(self, name: str, values: list[Any]) -> Any:
        mp, x = self.mp, values[0]
        if name == "sqrt":
            return self.power(x, 1 / values[1] if len(values) > 1 else Fraction(1, 2))
        if name == "abs":
            return abs(x)
        if name in ("floor", "ceil"):
            return Fraction(getattr(math, name)(x)) if isinstance(x, Fraction) else getattr(mp, name)(x)
        if name in ("max", "min") and all(isinstance(value, Fraction) for value in values):
            return max(values) if name == "max" else min(values)
        if name == "binom" and isinstance(values[1], Fraction):
            return self.binomial(*values)
        if len(values) != 1:
            return self.unknown(name, values)
        if name == "exp":
            return self.power(self.symbol("e"), x)
        if name in _ELEMENTARY:
            x = self.number(x)
            if x and mp.mag(x) > 64:
                raise NoValue("an argument is too large")
            return getattr(mp, _ELEMENTARY[name])(x)
        if name in ("log", "ln", "lg") or name.startswith("log_"):
            value = mp.log(self.number(x))
            base = name[4:]
            if name == "lg" or base.isdigit():
                return value / mp.log(int(base or 10))
            return value / mp.log(self.symbol(base)) if base else value
        return self.unknown(name, values)


_ELEMENTARY = {name: name for name in ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh")} | {
    "arcsin": "asin",
    "arccos": "acos",
    "arctan": "atan",
}
