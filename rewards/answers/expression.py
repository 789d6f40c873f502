"""Parse the mathematics of an answer: expressions, lists, tuples, sets, intervals, matrices, equations, inequalities.

The parser is a recursive descent over normalised text (:mod:`rolltune.rewards.answers.normalise`), LaTeX and plain
spelling alike. It takes time linear in the length of the text, and it refuses what can be read in two ways: ``2 3``,
``x2``, ``9^9^9``, a word that names no known function.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

MAX_DEPTH = 24

SEPARATED, UNORDERED, SET = "list", "any", "set"  # 1, 2; 1 and 2; {1, 2}
BRACKET, UNION, MATRIX, RELATION = "bracket", "union", "matrix", "relation"  # (1, 2], [0, 1] or [2, 3], ..., 1 < x < 2
STRUCTURES = frozenset((SEPARATED, UNORDERED, SET, BRACKET, UNION, MATRIX, RELATION))
TURNED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", "=": "=", r"\ne": r"\ne"}


class ParseError(ValueError):
    """The text is not in the grammar."""


@dataclass(frozen=True, slots=True)
class Node:
    """A parsed text.

    Attributes:
        op: a structure (:data:`STRUCTURES`); ``number`` or ``symbol``; an operation, ``+ - * / ^ ! neg pm ratio``, with
            ``juxtaposed`` for a product without a sign and ``frac`` for ``\\frac``; or ``call``.
        args: the parts.
        name: name of a symbol or function; the two brackets of a bracket; the signs of a relation, in order; "or" of a
            list joined only by that.
        value: value of a number.
    """

    op: str
    args: tuple[Node, ...] = ()
    name: str = ""
    value: Fraction = Fraction(0)

    def walk(self) -> Iterator[Node]:
        """Yield the node and everything below it."""
        yield self
        for arg in self.args:
            yield from arg.walk()


_TOKEN = re.compile(
    r"\s*(?:(?P<number>[0-9]+(?:\.[0-9]+)?|\.[0-9]+)|(?P<command>\\[A-Za-z]+|\\[{}|\\])|(?P<word>[A-Za-z]+)"
    r"|(?P<sign>[-+*/^_(){}\[\]|<>=,;:!%&\u00b0'\u00a4$]))"
)
_FUNCTIONS = frozenset(
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp abs floor ceil lg max min gcd lcm".split()
)
_BIG = frozenset(r"\sum \prod \int \lim".split())
_ACCENTS = frozenset(
    r"\overline \overrightarrow \vec \hat \bar \tilde \angle \triangle \measuredangle \det \arg".split()
)
_GREEK = frozenset(
    "\\" + name
    for name in "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho "
    "sigma tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell infty pi "
    "imath jmath hbar".split()
)
_CALLED = frozenset("fghFGHP") | {r"\phi", r"\varphi", r"\sigma", r"\tau"}
_RELATIONS = frozenset(r"= < > \le \ge \ne \in".split())
# Commands that start no factor.
_SEPARATING = _RELATIONS | frozenset(r"\cup \pm \mp \} \\ \end \| \rfloor \rceil \rvert \rangle".split())
_SPLIT = {",": SEPARATED, ";": SEPARATED, "and": UNORDERED, "or": UNORDERED}
_ENVIRONMENTS = ("pmatrix", "bmatrix", "Bmatrix", "vmatrix", "smallmatrix", "matrix", "array")
_SUCH_THAT = ([("sign", "|")], [("sign", ":")], [("command", r"\mid")])  # {x | x > 2}
_CLOSING = {"(": ")]", "[": ")]"}


def parse(text: str) -> Node:
    """Parse a normalised text.

    Raises:
        ParseError: it is not in the grammar.
    """
    return _Parser(text).whole()


class _Parser:
    def __init__(self, text: str) -> None:
        self.tokens: list[tuple[str, str]] = []
        position = 0
        text = text.strip()
        while position < len(text):
            match = _TOKEN.match(text, position)
            if match is None:
                raise ParseError(f"{text[position : position + 10]!r} is not mathematics")
            kind = match.lastgroup or ""
            word = match["word"] or (match["command"] or "")[1:]
            if kind == "word" or word in _FUNCTIONS:
                self.tokens += _words(word)
            else:
                self.tokens.append((kind, match[kind]))
            position = match.end()
        self.at = 0
        self.depth = 0
        self.in_bars = False
        self.in_function = False

    # --- tokens ---

    def peek(self) -> str:
        return self.tokens[self.at][1] if self.at < len(self.tokens) else ""

    def kind(self) -> str:
        return self.tokens[self.at][0] if self.at < len(self.tokens) else "end"

    def take(self) -> str:
        token = self.peek()
        self.at += 1
        return token

    def accept(self, *tokens: str) -> str:
        return self.take() if self.peek() in tokens else ""

    def expect(self, token: str) -> None:
        if not self.accept(token):
            raise ParseError(f"expected {token!r} before {self.peek() or 'the end'!r}")

    # --- structures ---

    def whole(self) -> Node:
        node = self.items()
        if self.kind() != "end":
            raise ParseError(f"unexpected {self.peek()!r}")
        return node

    def items(self) -> Node:
        """Items between commas, semicolons, ``and`` and ``or``; a single item stands for itself."""
        items, how, joined = [self.relation()], "", "or"
        while separator := self.accept(*_SPLIT):
            while more := self.accept(*_SPLIT):
                separator = more
            joined = joined if separator == "or" else ""
            how = UNORDERED if UNORDERED in (how, _SPLIT[separator]) else SEPARATED
            items.append(self.relation())
        return Node(how, tuple(items), name=joined) if how else items[0]

    def relation(self) -> Node:
        sides, signs = [self.ratio()], []
        while sign := self.accept(*_RELATIONS):
            signs.append(sign)
            sides.append(self.ratio())
        if signs == [r"\in"]:
            return sides[1]
        if r"\in" in signs:
            raise ParseError(r"\in in a chain")
        return Node(RELATION, tuple(sides), name=" ".join(signs)) if signs else sides[0]

    def ratio(self) -> Node:
        parts = [self.union()]
        while self.accept(":"):
            parts.append(self.union())
        return Node("ratio", tuple(parts)) if len(parts) > 1 else parts[0]

    def union(self) -> Node:
        parts = [self.sum()]
        while self.accept(r"\cup"):
            parts.append(self.sum())
        return Node(UNION, tuple(parts)) if len(parts) > 1 else parts[0]

    # --- expressions ---

    def sum(self) -> Node:
        sign = self.accept("-", "+", r"\pm", r"\mp")
        node = _signed(sign, self.term())
        while sign := self.accept("+", "-", r"\pm", r"\mp"):
            right = self.term()
            node = Node(sign, (node, right)) if sign in "+-" else Node("+", (node, _signed(sign, right)))
        return node

    def term(self) -> Node:
        node = self.factor()
        while True:
            if sign := self.accept("*", "/"):
                right = _signed(self.accept("-"), self.factor())
                node = Node(sign, (node, right))
            elif self.starts_factor():
                is_number = self.kind() == "number"
                right = self.factor()
                if (is_number and node.op != "!") or (right.op == "frac" and node.op == "number"):
                    node = _mixed(node, right)
                else:
                    node = Node("juxtaposed", (node, right))
            else:
                return node

    def starts_factor(self) -> bool:
        token, kind = self.peek(), self.kind()
        if kind == "command":
            return token not in _SEPARATING
        return kind in ("number", "symbol", "function") or token in ("(", "{") or (token == "|" and not self.in_bars)

    def factor(self) -> Node:
        node = self.base()
        for _ in range(MAX_DEPTH):
            if self.accept("^"):
                node = Node("^", (node, self.exponent()))
                if self.peek() == "^":
                    raise ParseError("a power of a power needs brackets")
            elif self.accept("!"):
                node = Node("!", (node,))
            elif self.accept("%"):
                node = Node("juxtaposed", (node, Node("symbol", name="%")))
            elif self.accept("\u00b0"):
                node = Node("*", (node, _DEGREE)) if self.in_function else node  # else compared by its number
            else:
                return node
        raise ParseError("too many signs follow each other")

    def exponent(self) -> Node:
        if self.peek() in ("{", "("):
            return self.base()
        sign = self.accept("-", "+")
        if self.kind() not in ("number", "symbol") and self.peek() not in _GREEK and self.peek() != r"\frac":
            raise ParseError("an exponent is missing")
        return _signed(sign, self.base())

    def base(self) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ParseError("brackets are nested too deeply")
        node = self.unbounded_base()
        self.depth -= 1
        return node

    def unbounded_base(self) -> Node:
        kind, token = self.kind(), self.take()
        if kind == "number":
            if self.peek() == "_":  # a number in another base
                return Node("symbol", name=f"{token}_{self.subscript()}")
            return Node("number", value=Fraction(token))
        if kind == "symbol" or token in _GREEK:
            return self.symbol(token)
        if kind == "function":
            return self.function(token)
        if token == "|" and not self.in_bars:
            self.in_bars = True
            inside = self.sum()
            self.expect("|")
            self.in_bars = False
            return Node("call", (inside,), name="abs")
        if token in _CLOSING:
            return self.bracket(token)
        if token == "{":
            inside = self.items()
            self.expect("}")
            return inside
        if kind == "command":
            return self.command(token)
        raise ParseError(f"unexpected {token or 'end'!r}")

    def symbol(self, name: str) -> Node:
        if self.peek() == "_":
            name = f"{name}_{self.subscript()}"
        while self.accept("'"):
            name += "'"
        if name.partition("_")[0].rstrip("'") in _CALLED and self.peek() == "(":
            self.take()
            arguments = self.items()
            self.expect(")")
            return Node("call", (arguments,), name=name)
        return Node("symbol", name=name)

    def subscript(self) -> str:
        self.expect("_")
        if not self.accept("{"):
            return self.take()
        inside, depth = [], 1
        while self.kind() != "end":
            depth += {"{": 1, "}": -1}.get(self.peek(), 0)
            token = self.take()
            if depth == 0:
                return "".join(inside)
            inside.append(token)
        raise ParseError("a subscript is not closed")

    def function(self, name: str) -> Node:
        """A function and its argument: a bracket, or the factors up to the next sign."""
        if self.peek() == "_":
            name = f"{name}_{self.subscript()}"
        power = self.exponent() if self.accept("^") else None
        if power == _INVERSE and name in ("sin", "cos", "tan"):
            name, power = "arc" + name, None
        has_bracket = self.peek() in ("(", "{", "|")
        outer, self.in_function = self.in_function, True
        argument = self.base() if has_bracket else self.factor()
        while not has_bracket and self.kind() in ("number", "symbol"):
            argument = Node("juxtaposed", (argument, self.factor()))
        self.in_function = outer
        node = Node("call", argument.args if argument.op == BRACKET else (argument,), name=name)
        return Node("^", (node, power)) if power else node

    def bracket(self, opening: str) -> Node:
        inside = self.items()
        closing = self.take()
        if not closing or closing not in _CLOSING[opening]:
            raise ParseError(f"{opening!r} is not closed")
        if inside.op in (SEPARATED, UNORDERED):
            return Node(BRACKET, inside.args, name=opening + closing)
        if opening + closing == "()" or (opening + closing == "[]" and inside.op == MATRIX):
            return inside
        return Node(BRACKET, (inside,), name=opening + closing)

    def command(self, name: str) -> Node:
        if name == r"\{":
            if self.accept(r"\}"):
                return Node(SET)
            if self.kind() == "symbol" and self.tokens[self.at + 1 : self.at + 2] in _SUCH_THAT:
                self.at += 2
                condition = self.relation()
                self.expect(r"\}")
                if condition.op != RELATION:
                    raise ParseError("a set needs a condition after the bar")
                return condition
            inside = self.items()
            self.expect(r"\}")
            return Node(SET, inside.args if inside.op in (SEPARATED, UNORDERED) else (inside,))
        if name == r"\langle":
            inside = self.items()
            self.expect(r"\rangle")
            return Node(BRACKET, inside.args if inside.op == SEPARATED else (inside,), name="()")
        if name == r"\emptyset":
            return Node(SET)
        if name == r"\frac":
            return Node("frac", (self.argument(), self.argument()))
        if name == r"\binom":
            return Node("call", (self.argument(), self.argument()), name="binom")
        if name == r"\sqrt":
            index = None
            if self.accept("["):
                index = self.sum()
                self.expect("]")
            radicand = self.base()
            return Node("call", (radicand, index) if index else (radicand,), name="sqrt")
        if name == r"\begin":
            return self.matrix()
        if name in (r"\lfloor", r"\lceil", r"\lvert"):
            inside = self.sum()
            self.expect({r"\lfloor": r"\rfloor", r"\lceil": r"\rceil", r"\lvert": r"\rvert"}[name])
            return Node("call", (inside,), name={r"\lfloor": "floor", r"\lceil": "ceil", r"\lvert": "abs"}[name])
        if name in _BIG:
            return self.big_operator(name)
        if name in _ACCENTS:
            inside = self.base()
            while self.kind() == "symbol":
                inside = Node("juxtaposed", (inside, self.base()))
            return Node("call", (inside,), name=name)
        raise ParseError(f"unknown command {name}")

    def argument(self) -> Node:
        """An argument of a command: a group, or one digit, letter or command."""
        if self.kind() == "number" and len(self.peek()) > 1 and self.peek().isdigit():
            digits = self.peek()
            self.tokens[self.at : self.at + 1] = [("number", digits[0]), ("number", digits[1:])]
        return self.base()

    def big_operator(self, name: str) -> Node:
        limits = []
        while sign := self.accept("_", "^"):
            if self.accept("{"):
                limits.append(Node("call", (self.items(),), name=sign))
                self.expect("}")
            else:
                limits.append(Node("call", (self.base(),), name=sign))
        limits.sort(key=lambda limit: limit.name)
        return Node("call", (*limits, self.term()), name=name)

    def matrix(self) -> Node:
        name = self.environment()
        if name not in _ENVIRONMENTS:
            raise ParseError(f"unknown environment {name}")
        if name == "array":
            self.environment()  # the alignment of its columns
        rows = [[self.sum()]]
        while separator := self.accept("&", r"\\"):
            if separator == "&":
                rows[-1].append(self.sum())
            elif self.peek() != r"\end":
                rows.append([self.sum()])
        self.expect(r"\end")
        if self.environment() != name:
            raise ParseError(f"{name} is not closed")
        kind = "det" if name == "vmatrix" else ""
        return Node(MATRIX, tuple(Node("row", tuple(row)) for row in rows), name=kind)

    def environment(self) -> str:
        self.expect("{")
        name = ""
        while self.kind() in ("symbol", "word"):
            name += self.take()
        self.expect("}")
        return name


_DEGREE = Node("/", (Node("symbol", name=r"\pi"), Node("number", value=Fraction(180))))
_INVERSE = Node("neg", (Node("number", value=Fraction(1)),))


def _words(word: str) -> list[tuple[str, str]]:
    """Split a run of letters into the symbols of a product, unless it is a name."""
    if word in ("and", "or"):
        return [("separator", word)]
    if word in ("sqrt", "pi", "infty"):
        return [("command", "\\" + word)]
    if word in ("inf", "infinity", "oo"):
        return [("command", r"\infty")]
    if word in _FUNCTIONS:
        return [("function", word)]
    if word in _ENVIRONMENTS:
        return [("word", word)]
    if len(word) > 4:
        raise ParseError(f"{word!r} is a word")
    return [("symbol", letter) for letter in word]


def _signed(sign: str, node: Node) -> Node:
    if sign == "-":
        return Node("neg", (node,))
    return Node("pm", (node,), name=sign) if sign in (r"\pm", r"\mp") else node


def _mixed(whole: Node, fraction: Node) -> Node:
    """Read ``4\\frac{4}{9}`` as a mixed number. ``2 3`` and ``x2`` can be read in two ways."""
    if fraction.op != "frac":
        raise ParseError("a number after a factor")
    if not all(part.op == "number" for part in fraction.args):
        return Node("juxtaposed", (whole, fraction))
    top, bottom = fraction.args
    if not 0 < top.value < bottom.value:
        raise ParseError("a mixed number needs a proper fraction")
    return Node("+", (whole, fraction))
