"""Text of others inside a prompt: a block that it cannot close, and in which it looks like what it is.

What a model wrote is data to its judge, and it is written by a model that is paid for being found good. A fence's
two lines carry a hash of the text between them, which the text would have to contain to close the block. What a reader
cannot see is taken out, and what a chat template or tokenizer would read as a turn's beginning or end is broken by a
backslash. The same text makes the same block, so that a question can be found again in a cache.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata

MAX_CHARS = 16_000  # of a text; the judge is shown no more
_EMPTY = "(nothing: the text is empty)"
_HASH_CHARS = 16

# What has no look of its own besides the format characters (category Cf: zero width, bidi, tags, soft hyphen):
# fillers and variation selectors, which can carry a message bit by bit.
_UNSEEN = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0000-\U000e0fff]")
_LINE_ENDS = re.compile("\r\n|[\r\v\f\x1c-\x1e\x85\u2028\u2029]")

_LT, _GT, _BAR = "[<\uff1c\ufe64\u2039]", "[>\uff1e\ufe65\u203a]", "[|\uff5c\uffe8\u2502]"
_TAGS = (
    r"s|bos|eos|pad|unk|mask|sep|cls|sop|eop|eod|eot|eom|think|thinking|thought|tool_calls?|tool_responses?|tools?|"
    r"function_calls?|function_results?|system|user|assistant|human|model|developer|(?:start|end)_of_\w{1,20}|"
    r"(?:im|turn|start|end)_?(?:start|end|turn)?|fim_\w{1,12}|unused\d{1,4}|extra_id_\d{1,4}|image\w{0,20}|video|audio"
)
_BRACKETS = (
    r"inst|sys|system|user|assistant|human|system_prompt|available_tools|tool_calls|tool_results|tool_content|args|"
    r"call_id|think|model_settings|prefix|suffix|middle|img|img_break|img_end|audio|begin_audio|gmask|smask|mask|cls|"
    r"sep|pad|unk|bos|eos"
)
_ROLES = (
    r"system(?:\s{1,3}(?:prompt|message|instructions?))?|user|assistant|human|developer|ai|instructions?|input|response|"
    r"\u7cfb\u7edf|\u7528\u6237|\u52a9\u624b"  # system, user, assistant in Chinese
)
# Each takes a backslash behind its first group.
_SPECIAL = (
    re.compile(rf"({_LT})(?={_BAR})"),  # <|im_start|>, <|eot_id|>, and with full-width bars
    re.compile(rf"({_LT})(?=\s{{0,3}}/?\s{{0,3}}(?:{_TAGS})\s{{0,3}}/?{_GT})", re.IGNORECASE),  # <s>, </think>
    re.compile(rf"({_LT})(?={_LT}\s{{0,3}}/?\s{{0,3}}sys)", re.IGNORECASE),  # <<SYS>>
    re.compile(rf"(\[)(?=\s{{0,3}}/?\s{{0,3}}(?:{_BRACKETS})\s{{0,3}}\])", re.IGNORECASE),  # [INST]
    re.compile(r"(\])(?=[~<]!?[a-z]{0,12}[\[\]])", re.IGNORECASE),  # ]~b]
    # "### System:", "**Assistant**:", "Human:" at the beginning of a line
    re.compile(
        rf"^([ \t]{{0,8}})(?=(?:#{{1,6}}[ \t]{{0,3}})?[*_]{{0,3}}(?:{_ROLES})[*_]{{0,3}}[ \t]{{0,3}}[:\uff1a])",
        re.IGNORECASE | re.MULTILINE,
    ),
    re.compile(rf"^([ \t]{{0,8}})(?=#{{1,6}}[ \t]{{0,3}}(?:{_ROLES})[ \t]{{0,3}}$)", re.IGNORECASE | re.MULTILINE),
    # "grade": 1 as a judge writes it; quoted without escapes it would end the judge's own reason and grade the text
    re.compile(r'(")(?=(?:grade|rating|verdicts)"\s*:)', re.IGNORECASE),
    re.compile(r"()(?<![=\\])(?====[^\n]{0,200}\b(?:begins|ends)\b)", re.IGNORECASE),  # a fence's own lines
)


def delimited(text: str, *, name: str = "text", max_chars: int = MAX_CHARS) -> str:
    """A text between two lines that it cannot contain.

    ::

        === text 9b74c9897bac770f begins ===
        What was written.
        === text 9b74c9897bac770f ends ===

    Of a text longer than ``max_chars`` the first three quarters and the last one are shown, and between them how much
    is left out. A text without anything to see is said to be empty.

    Example:
        >>> delimited("4").splitlines()[1]
        '4'

    Args:
        text: anything; see :func:`neutral` for what becomes of it.
        name: what it is, in letters, digits, spaces and brackets: "response", "turn 2 (user)".
        max_chars: at least 100.
    """
    assert re.fullmatch(r"[\w ()]+", name) and max_chars >= 100, (name, max_chars)
    body = _shortened(text, max_chars)
    mark = _mark(name, body)
    return f"=== {name} {mark} begins ===\n{body}\n=== {name} {mark} ends ==="


def neutral(text: str) -> str:
    """The text without what cannot be seen, and with nothing in it that a chat template takes for its own.

    - Line ends of any kind are newlines; other control characters and lone surrogates become U+FFFD.
    - Format characters (zero width, bidi, tags), fillers and variation selectors are taken out: what is hidden from
      people is hidden from the judge.
    - Special tokens, role headings, lines that look like a fence's and the keys of a verdict get a backslash:
      ``<|im_start|>`` is shown as ``<\\|im_start|>``, ``[INST]`` as ``[\\INST]``, ``### System:`` as
      ``\\### System:``, ``"grade": 1`` as ``"\\grade": 1``.

    Time linear in the length.
    """
    text = _LINE_ENDS.sub("\n", text)
    text = _UNSEEN.sub("", text.translate({ord(char): _shown(char) for char in set(text)}))
    for pattern in _SPECIAL:
        text = pattern.sub(r"\1\\", text)
    return text


def _shown(char: str) -> str:
    category = unicodedata.category(char)
    if category == "Cf":
        return ""
    return "\ufffd" if category == "Cs" or (category == "Cc" and char not in "\n\t") else char


def _shortened(text: str, max_chars: int) -> str:
    if len(text) <= max_chars:
        return neutral(text).strip("\n") if any(_is_seen(char) for char in set(text)) else _EMPTY
    head, tail = max_chars * 3 // 4, max_chars // 4
    left_out = f"[... {len(text) - head - tail:,} characters are left out here ...]"
    return f"{neutral(text[:head])}\n{left_out}\n{neutral(text[len(text) - tail :])}"


def _is_seen(char: str) -> bool:
    return not (char.isspace() or _shown(char) == "" or _UNSEEN.match(char))


def _mark(name: str, body: str) -> str:
    """A hash of both that is not in the body. No text is known that has its own; should there be one, the next."""
    seen, attempt = body.casefold(), 0
    while True:
        mark = hashlib.sha256(f"{attempt}\n{name}\n{body}".encode()).hexdigest()[:_HASH_CHARS]
        if mark not in seen:
            return mark
        attempt += 1
