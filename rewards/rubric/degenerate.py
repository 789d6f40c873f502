"""Detect responses that say nothing, which judges have been seen to reward.

One token to fool LLM-as-a-judge (arXiv 2507.08794): many judges accept a colon, "Solution", "Thought process:" or
"Let's solve this problem step by step." alone as a right answer. No judge needs to be asked about them.
"""

from __future__ import annotations

import re
import unicodedata
import zlib

from rolltune.rewards.judges.delimit import neutral

DEGENERATE = "degenerate"  # failure of a response that says nothing; it is worth 0, not unscored

_TAG = re.compile(r"</?(?:think|answer|response|solution|reasoning)>", re.IGNORECASE)
# Ends of sentences, and what rules are drawn with. Other punctuation may be an answer: "[]", "->", ";", "===", "&&".
_STOPS = frozenset(".,:\u2026\u3001\u3002\uff0c\uff1a\u00b7\u2022")
_RULES = _STOPS | frozenset("-_=*~#`")
_MORSE = frozenset(".-")
_OPERATORS = frozenset(["::", "..", "===", "\\", "\\\\"])  # answers of coding questions that look like the former
# Openers of an answer: those of the paper, and similar ones in other languages. None is an answer by itself.
_OPENERS = (
    "solution|the solution|solution process|thought process|thinking process|my thought process|reasoning|analysis",
    "explanation|answer|the answer|the answer is|final answer|the final answer|the final answer is|my answer|response",
    "here is the solution|here is the answer|here is my answer|here is my response|heres the solution|heres the answer",
    "let me think|let me think about it|let me think about this|lets think|lets begin|lets start|lets see",
    "first of all|to begin with|to solve this problem|to answer this question|to solve this|to answer this",
    "solución|la solución|respuesta|la respuesta|la respuesta es|proceso de pensamiento|lösung|die lösung|antwort",
    "die antwort|die antwort lautet|denkprozess|solution finale|réponse|la réponse|la réponse est|soluzione|risposta",
    "solução|resposta|решение|ответ|解|解答|解説|解决方案|答案|答|思考过程|思考過程|かいせつ|こたえ|答え|풀이|해설|답|정답",
    "الحل|الجواب|हल|उत्तर",
)
_STEP_BY_STEP = re.compile(
    r"(?:ok |okay |well |now |so |alright )?(?:lets|let us|let me|i will|ill|we will) (?:\w+ ){1,10}step by step"
)
_MIN_WORDS = 20  # repetitions of one word
_MIN_BYTES, _COMPRESSES_TO = 600, 0.04  # English compresses to 0.3 .. 0.5, a table to 0.1 .. 0.2
_MAX_CHARS = 100_000


def is_degenerate(text: str) -> bool:
    """Whether a response is empty, dots and rules, openers only, or one thing repeated.

    Short responses that may be right are not degenerate: "42", "No", "-3", "x", "+", "[]", "::", one emoji. Do not use
    this check for a task that asks for a full stop or a colon, or for the same line a hundred times.

    Example:
        >>> [is_degenerate(text) for text in (":", "Thought process:", "<think></think>", "42")]
        [True, True, True, False]
    """
    text = _TAG.sub(" ", text[:_MAX_CHARS])
    if text.strip() in _OPERATORS:
        return False
    text = unicodedata.normalize("NFKC", neutral(text)).replace("\ufffd", " ").replace("\\", " ").strip()
    if not any(unicodedata.category(char)[0] in "LNPS" for char in text) or _is_punctuation(text):
        return True
    return _is_opening(text) or _is_repetition(text)


def _is_punctuation(text: str) -> bool:
    """Only dots, commas and colons, or a rule: at least three signs that lines are drawn with."""
    chars = set("".join(text.split()))
    return chars <= _STOPS or (len(text) >= 3 and chars <= _RULES and chars != _MORSE)


def _is_opening(text: str) -> bool:
    """Only openers, one or several."""
    if len(text) > 400:
        return False
    parts = [words for part in re.split(r"[\n.:;!?\u3002\uff1a]+", text) if (words := _words(part))]
    return bool(parts) and all(part in _KNOWN or _STEP_BY_STEP.fullmatch(part) for part in parts)


def _words(text: str) -> str:
    """Lower case, without punctuation, one space between words."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.findall(r"[^\W_]+", text.replace("'", "").replace("\u2019", "")))


_KNOWN = frozenset(_words(opener) for line in _OPENERS for opener in line.split("|"))


def _is_repetition(text: str) -> bool:
    words = text.split()
    if len(words) >= _MIN_WORDS and len(set(words)) == 1:
        return True
    if len(words) == 1 and len(text) >= _MIN_WORDS and len(set(text)) == 1 and not text.isdigit():
        return True
    data = text.encode()
    return len(data) >= _MIN_BYTES and len(zlib.compress(data, 9)) < _COMPRESSES_TO * len(data)
