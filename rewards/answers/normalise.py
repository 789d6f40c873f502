"""Bring the text of an answer to one spelling: no markup, no lead-in, ASCII signs, one command per LaTeX meaning.

Nothing here decides what an answer is worth. Both sides of a comparison, the gold answer and the model's, go through
the same steps.
"""

from __future__ import annotations

import html
import re
import unicodedata
from functools import lru_cache

_BLANKS = ("FILLER", " BLANK", "NULL NOTEHEAD", "OBJECT REPLACEMENT CHARACTER")  # ends of names


def is_visible(character: str) -> bool:
    """Return whether a character shows something: a letter, digit, punctuation or symbol that is not a blank filler."""
    is_blank = unicodedata.name(character, "").endswith(_BLANKS)
    return unicodedata.category(character)[0] in "LNPS" and not is_blank


def has_content(text: str) -> bool:
    """Return whether a text shows anything at all."""
    return any(map(is_visible, text))


# --- characters -------------------------------------------------------------------------------------------------------

_SIGNS = {
    "\u2212": "-", "\u00d7": "*", "\u00b7": "*", "\u22c5": "*", "\u2217": "*", "\u2219": "*",
    "\u2715": "*", "\u2716": "*", "\u2a2f": "*", "\u2022": "*", "\u00f7": "/", "\u00b5": "\u00b5",
    "\u2044": "/", "\u2215": "/", "\u2236": ":", "\u221a": r"\sqrt ", "\u221b": r"\sqrt[3] ",
    "\u221e": r"\infty ", "\u2264": r"\le ",
    "\u2265": r"\ge ", "\u2a7d": r"\le ", "\u2a7e": r"\ge ", "\u2260": r"\ne ", "\u222a": r"\cup ", "\u2208": r"\in ",
    "\u00b1": r"\pm ", "\u2205": r"\emptyset ", "\u2018": "'", "\u2019": "'", "\u2032": "'", "\u02b9": "'",
    "\u02bc": "'", "\u00b4": "'", "\u201c": '"', "\u201d": '"', "\u2033": '"', "\u3002": ".", "\u3001": ",",
    "\u066c": ",",
    "\u00b0": "\u00b0", "\u00ba": "\u00b0", "\u02da": "\u00b0",
}  # fmt: skip
_SUPER, _SUB = "\x02", "\x03"  # end a raised or lowered character, so that runs of them can be joined
_FRACTION = "\x04"  # starts a fraction in one character, which may follow a whole number


@lru_cache(maxsize=4096)
def _spell(character: str) -> str:
    """Return one character in ASCII and LaTeX, as far as it has such a spelling; invisible ones become empty.

    A space other than U+0020 becomes U+00A0, because it may separate groups of digits.
    """
    if character in _SIGNS or (character.isascii() and character.isprintable()):
        return _SIGNS.get(character, character)
    category, name = unicodedata.category(character), unicodedata.name(character, "")
    if character in "\n\r\t":
        return "\n"
    if category in ("Cc", "Cf") or "VARIATION SELECTOR" in name or name.endswith(_BLANKS):
        return ""
    if category == "Zs":
        return "\u00a0"
    tag, *parts = unicodedata.decomposition(character).split() or [""]
    simple = unicodedata.normalize("NFKC", character)
    if tag in ("<super>", "<sub>"):
        opening, mark = ("^{", _SUPER) if tag == "<super>" else ("_{", _SUB)
        return opening + "".join(map(_spell, simple)) + mark + "}"
    if tag == "<fraction>":
        return _FRACTION + "".join(map(_spell, simple))
    if tag in ("<wide>", "<narrow>", "<small>", "<font>", "<compat>", "<square>") and parts:
        return "".join(map(_spell, simple))
    if category == "Pd":
        return "-"
    if category == "Sc":
        return "\u00a4"
    if letter := re.fullmatch(r"GREEK SMALL LETTER (\w+)", name):
        return "\\" + letter[1].lower().replace("lamda", "lambda") + " "
    return character if tag.startswith("<") else simple  # the ohm sign is an omega


_GROUPS = re.compile(  # between a digit and exactly three more
    r"(?<=[0-9])\s*(?:\u00a0|'|(?:,|\{\s*,\s*\})?(?:\s*\\[,;:!])+\s*(?:,\s*(?:\\[,;:!]\s*)*)?|\{\s*,\s*\})"
    r"(?=[0-9]{3}(?![0-9]))"
)


def _characters(text: str) -> str:
    text = "".join(map(_spell, text)).replace(f"{_SUPER}}}^{{", "").replace(f"{_SUB}}}_{{", "")
    text = text.replace(_SUPER, "").replace(_SUB, "")
    text = re.sub(rf"(?<=[0-9])\s*{_FRACTION}", " ", text).replace(_FRACTION, "")
    text = _GROUPS.sub(",", text).replace("\u00a0", " ")
    return re.sub(r"(?<=[0-9])[ ]*\n\s*(?=[-0-9.])", ", ", text)  # two lines are two answers


# --- markup -----------------------------------------------------------------------------------------------------------

_TAGS = re.compile(r"</?(?:b|i|u|em|strong|code|span|p|div|br|font|mark|center|tt|pre|big|small|h[1-6])\b[^<>]*>", re.I)
_WRAPPER = re.compile(
    r"\\(boxed|fbox|framebox|mbox|text(?:bf|it|rm|sf|tt|normal)?|math(?:bf|rm|it|sf|bb)|emph|underline|operatorname\*?)"
    r"\s*\{"
)
_STYLE = re.compile(  # changes the look of what follows
    r"\\(?:(?:text)?color|colorbox)\s*\{[^{}]*\}|\\(?:begin|end)\s*\{(?:equation|align|aligned|gather|gathered|center)\*?\}"
    r"|\\(?:bf|rm|it|tt|em|tiny|small|normalsize|[lL]arge|LARGE|[hH]uge)(?![A-Za-z])|```[a-z]*\n"
)
_BOLD = re.compile(r"(?<![\w)}\]])(\*\*|__)(?=\S)(.+?)(?<=\S)\1(?![\w({\\])")
_BOX_OPEN, _BOX_CLOSE = "\x00", "\x01"


def _markup(text: str) -> str:
    text = re.sub(r"<sup>(.*?)</sup>", r"^{\1}", html.unescape(text))
    text = _STYLE.sub(" ", _TAGS.sub(" ", text)).replace("`", " ").replace(r"\$", "\u00a4").replace("$$", "$")
    text = re.sub(r"\\?#{2,}", " ", text)
    text = re.sub(r"(?<!\\)\\[()\[\]]", " ", text)
    text = _BOLD.sub(r" \2 ", text)
    text = re.sub(r"\$([^$]*)\$", r" \1 ", text)
    while wrapper := _WRAPPER.search(text):
        text = _unwrap(text, wrapper)
    text = re.sub(rf"{_BOX_CLOSE}\s*,?\s*{_BOX_OPEN}", ", ", text)
    return text.replace(_BOX_OPEN, " ").replace(_BOX_CLOSE, " ")


def _unwrap(text: str, wrapper: re.Match[str]) -> str:
    """Remove one command around braces. Boxes leave a mark, because two boxes are two answers."""
    depth, end = 1, wrapper.end()
    while end < len(text) and depth:
        depth += {"{": 1, "}": -1}.get(text[end], 0) * (text[end - 1] != "\\")
        end += 1
    before, after = (_BOX_OPEN, _BOX_CLOSE) if wrapper[1] in ("boxed", "fbox") else (" ", " ")
    content = text[wrapper.end() : end - 1] if depth == 0 else text[wrapper.end() :]
    return text[: wrapper.start()] + before + content + after + text[end:]


_COMMANDS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\(?:left|right|[bB]ig+[lr]?|displaystyle|limits|mathopen|mathclose)(?![A-Za-z])\.?", " "),
        (r"\\!", ""),
        (r"(?<!\\)\\(?:[,;: ]|q?quad(?![A-Za-z]))|~(?=\s*\\|\s*[A-Za-z])|(?<=[0-9}])~", " "),
        (r"\\(?:[dtcs]|nice)(frac|binom)(?![A-Za-z])", r"\\\1"),
        (r"\{([^{}]*)\\over(?![A-Za-z])([^{}]*)\}", r"\\frac{\1}{\2}"),
        (r"\^\{?([0-9]+)\}?\s*/\s*_\{?([0-9]+)\}?", r"\\frac{\1}{\2}"),
        (r"(?<=[-/])\s*\{\s*([0-9.]+)\s*\}|\{\s*(-)\s*\}", r"\1\2"),
        (r"(?<=[0-9])\s*\^\s*\{?\s*(st|nd|rd|th)\s*\}?(?![A-Za-z])", r"\1"),
        (r"\^\s*(?:\{\s*(?:\\circ|\\degree|\u00b0|o)\s*\}|\\circ|\\degree|\u00b0)|\\degree(?![A-Za-z])", "\u00b0"),
        (r"(?<=[0-9])\s*deg(?:rees?)?(?!\s*[A-Za-z])", "\u00b0"),
        (r"\\(?:cdot|times|ast)(?![A-Za-z])", "*"),
        (r"\\div(?![A-Za-z])", "/"),
        (r"\\(?:lt)(?![A-Za-z])", "<"),
        (r"\\(?:gt)(?![A-Za-z])", ">"),
        (r"\\leq(?:slant)?(?![A-Za-z])|<=", r"\\le "),
        (r"\\geq(?:slant)?(?![A-Za-z])|>=", r"\\ge "),
        (r"\\neq(?![A-Za-z])|!=", r"\\ne "),
        (r"\\colon(?![A-Za-z])", ":"),
        (r"\\varnothing", r"\\emptyset "),
        (r"\\([%#&*])", r"\1"),
        (r"\\lbrace(?![A-Za-z])", r"\\{"),
        (r"\\rbrace(?![A-Za-z])", r"\\}"),
        (r"(?<=\\\\)\[[0-9.]+[a-z]{2}\]", ""),  # the space behind a row of a matrix
        (r"(?<=[)\]}])\s*U\s*(?=[(\[{\\])", r"\\cup "),
        (r"(?<=[\w)}\]])\s*\*\*\s*(?=[-\w({\\])", "^"),
    )
]


def _commands(text: str) -> str:
    for pattern, replacement in _COMMANDS:
        text = pattern.sub(replacement, text)
    return text


def spell(text: str) -> str:
    """Write a text's characters and commands in ASCII and plain LaTeX as far as possible; markup and words stay."""
    return _commands(_characters(text))


# --- what surrounds an answer -----------------------------------------------------------------------------------------

_NOUN = (
    r"(?:answer|ans\.?|result|total|sum|value|solution|number|amount|count|output|equation|expression|option|choice)"
)
_OF = r"(?:\s(?:to|of|for)\s(?:the|this)\s(?:question|problem|exercise|equation))?"
_LEAD_IN = re.compile(
    rf"""(?:(?:so|thus|hence|therefore|then|consequently|accordingly|finally|in\ conclusion|in\ total
      |overall|altogether)\b[\s,:]*|(?:\\(?:therefore|implies|[Rr]ightarrow|to)(?![A-Za-z])|=>|[\u2192\u21d2\u2234])\s*)?
    (?:(?:(?:the|my|our|your)\s+)?(?:(?:final|correct|exact|required)\s+)?{_NOUN}{_OF}\s*(?:'s\b|is|equals|:|=)\s*:?\s*
      |equals\s+|(?:it|this|that)(?:\s+is|'s|\s+equals)\s+|(?:we|i)\s+(?:get|have|find|obtain)\s+|=\s*|:\s*)?""",
    re.IGNORECASE | re.VERBOSE,
)
_BOILERPLATE = re.compile(r"\.? I hope (?:it|this) is correct\.?$", re.IGNORECASE)
# Symbols that are more than decoration, by their names: a unit, a denial, a doubt.
_MEANS_MORE = re.compile("DEGREE SIGN|CROSS MARK|BALLOT X|NO ENTRY|PROHIBITED|NO GOOD|THUMBS DOWN|QUESTION|THINKING")
_PAIRS = {"*": "*", "_": "_", '"': '"', "\u00ab": "\u00bb"}


def _surroundings(text: str) -> str:
    """Strip lead-ins, pairs of marks, outer braces and one full stop, until none is left."""
    while True:
        stripped = text.strip()
        while stripped and _is_decoration(stripped[0]):
            stripped = stripped[1:].lstrip()
        while stripped and _is_decoration(stripped[-1]):
            stripped = stripped[:-1].rstrip()
        stripped = stripped[_LEAD_IN.match(stripped).end() :]  # type: ignore[union-attr]  # it matches the empty text
        if len(stripped) > 2 and _PAIRS.get(stripped[0]) == stripped[-1] and stripped[0] not in stripped[1:-1]:
            stripped = stripped[1:-1]
        if stripped.startswith("{") and _closing(stripped) == len(stripped) - 1:
            stripped = stripped[1:-1]
        if stripped == text:
            return text
        text = stripped


def _is_decoration(character: str) -> bool:
    is_symbol = unicodedata.category(character) == "So"
    return is_symbol and not _MEANS_MORE.search(unicodedata.name(character, ""))


def _closing(text: str) -> int:
    """Return the index of the brace that closes the first one, or -1."""
    depth = 0
    for i, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return i
    return -1


@lru_cache(maxsize=8192)
def normalise(text: str) -> str:
    """Return a text without markup, lead-in and final full stop, in ASCII and plain LaTeX as far as possible.

    Example:
        >>> normalise("The answer is **$1\\\\,800$ dollars**.")
        '1,800 dollars'
    """
    plain = _surroundings(_BOILERPLATE.sub("", spell(_markup(text)).rstrip()))
    if plain.endswith(".") and not plain.endswith(".."):
        plain = _surroundings(plain[:-1])
    return " ".join((plain or text).split())  # what is nothing but markup stands for itself


_ARTICLE = re.compile(r"(?:an?|the) +(?=[^\W\d_]{2})", re.IGNORECASE)


def fold(text: str) -> str:
    """Return a normalised text as it is compared with a text: no case, no leading article, no spaces around signs."""
    text = _ARTICLE.sub("", text.casefold(), count=1) if _ARTICLE.match(text) else text.casefold()
    text = re.sub(r"(?<=[0-9]) ?([ap])\.?m\b\.?", r" \1m", text)  # 8 p.m.
    text = re.sub(r"(\\[a-z]+) *", r"\1 ", re.sub(r"[{}]", "", text))
    return re.sub(r" *([^\w ]) *", r"\1", text).strip()
