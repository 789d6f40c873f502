"""Wrap untrusted text in prompt delimiters that it cannot forge, and neutralise it.

A response is data to its judge, but its writer is a model that is rewarded for good grades. The two delimiter lines
carry a hash of the text between them, which the text would have to contain to close the block. Invisible characters are
removed, and anything that a chat template or tokenizer would read as the start or end of a message gets a backslash.
The same text gives the same block, so a cache can find the question again.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_CHARS = 16_000  # of a text that the judge is shown
_EMPTY = "(nothing: the text is empty)"
_HASH_CHARS = 16

# Invisible characters besides the format characters (category Cf: zero width, bidi, tags, soft hyphen): fillers and
# variation selectors, which can carry a message bit by bit.
_UNSEEN = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0000-\U000e0fff]")
_LINE_ENDS = re.compile("\r\n|[\r\v\f\x1c-\x1e\x85\u2028\u2029]")

_LT, _GT, _BAR = "[<\uff1c\ufe64\u2039]", "[>\uff1e\ufe65\u203a]", "[|\uff5c\uffe8\u2502]"
_TAGS = (
    r"s|bos|eos|pad|unk|mask|sep|cls|sop|eop|eod|eot|eom|think|thinking|thought|tool_calls?|tool_responses?|tools?|"
    r"function_calls?|function_results?|system|user|assistant|human|model|developer|(?:start|end)_of_\w{1,20}|"
    r"(?:im|turn|start|end)_?(?:start|end|turn)?|unused\d{1,4}|image\w{0,20}|video|audio|"
    r"filename|reponame|bot|sys|observation|ipython|toolcalls?|tooloutputs?|eoh|eoa|boh|boa|eoc|0x[0-9a-f]{2}|role|usr|inst|ai|"
    r"(?:start|end|begin)of\w{4,10}|boi|eoi|img|ref|box|quad|(?:ctrl|dummy|madeupword)\d{1,4}|"
    r"gmask|smask|ep|nl|stop"
)
_BRACKETS = (
    r"inst|sys|system|user|assistant|human|system_prompt|available_tools|tool_calls|tool_results|tool_content|args|"
    r"call_id|think|model_settings|prefix|suffix|middle|img|img_break|img_end|audio|begin_audio|gmask|smask|mask|cls|"
    r"sep|pad|unk|bos|eos|(?:control|unused|extra_id)_?\d{1,4}|round \d{1,4}"
)
_ROLES = (
    r"(?:gpt-?4?\s{1,3}correct\s{1,3})?(?:user|assistant)|"
    r"system(?:\s{1,3}(?:prompt|message|instructions?))?|user|assistant|human|developer|ai|instructions?|input|response|"
    r"\u7cfb\u7edf|\u7528\u6237|\u52a9\u624b|\u95ee|\u7b54"  # system, user, assistant, question, answer in Chinese
)
# Each match gets a backslash after its first group.
_SPECIAL = (
    re.compile(rf"({_LT}|\[)(?={_BAR})"),  # <|im_start|>, <|eot_id|>, [|system|], and with full-width bars
    # <file_sep>, <turn|>, <CLS|LM>, <extra_id_0>: no tag of HTML contains an underscore or a bar
    re.compile(rf"({_LT})(?=/?[^\s<>\\]{{0,40}}(?:[_\u2581]|{_BAR})[^\s<>]{{0,60}}{_GT})"),
    # <ctrl99>, <reserved102>, <PRE>: tags of HTML have one digit at most, and <pre> is one
    re.compile(rf"({_LT})(?=/?(?:[A-Za-z]{{2,20}}-?\d{{2,6}}|PRE|SUF|MID){_GT})"),
    re.compile(rf"({_LT})(?=/?(?:function|parameter|tool|invoke)=[^<>\n]{{0,80}}{_GT})", re.IGNORECASE),
    re.compile(r"(\[)(?=/?[A-Z]{1,20}(?:_[A-Z0-9]{1,20}){1,4}\])"),  # [TOOL_CALLS], [UNUSED_TOKEN_145]
    re.compile(r"(>)(?=>[A-Z]{2,20}<<)"),  # >>QUESTION<<
    re.compile(r"(\[)(?=e~\[)"),  # [e~[
    re.compile(
        rf"({_LT})(?=\s{{0,3}}/?\s{{0,3}}(?:\w{{1,20}}:)?(?:{_TAGS})\s{{0,3}}/?{_GT})", re.IGNORECASE
    ),  # <s>, </think>
    re.compile(rf"({_LT})(?={_LT}\s{{0,3}}/?\s{{0,3}}sys)", re.IGNORECASE),  # <<SYS>>
    re.compile(rf"(\[)(?=\s{{0,3}}/?\s{{0,3}}(?:{_BRACKETS})\s{{0,3}}\])", re.IGNORECASE),  # [INST]
    re.compile(r"(\])(?=[~<]!?[a-z]{0,12}[\[\]])", re.IGNORECASE),  # ]~b]
    # "### System:", "**Assistant**:", "Human:" at the beginning of a line
    re.compile(
        rf"^([ \t]{{0,8}})(?=(?:#{{1,6}}[ \t]{{0,3}})?[*_]{{0,3}}(?:{_ROLES})[*_]{{0,3}}[ \t]{{0,3}}[:\uff1a])",
        re.IGNORECASE | re.MULTILINE,
    ),
    re.compile(r"(\s)(?=(?:USER|ASSISTANT|SYSTEM|HUMAN|BOT)\s{0,3}:)"),  # Vicuna's turns may stand within a line
    re.compile(rf"^([ \t]{{0,8}})(?=#{{1,6}}[ \t]{{0,3}}(?:{_ROLES})[ \t]{{0,3}}$)", re.IGNORECASE | re.MULTILINE),
    # "grade": 1 as a judge writes it; quoted unescaped it would end the judge's reason and be taken for its grade
    re.compile(r"""(["'])(?=(?:grade|rating|verdicts|better)["']\s*:)""", re.IGNORECASE),
    re.compile(r"()(?<![=\\])(?====[^\n]{0,200}\b(?:begins|ends)\b)", re.IGNORECASE),  # the delimiter lines themselves
)


def delimited(text: str, *, name: str = "text", max_chars: int = MAX_CHARS) -> str:
    """Put a text between two lines that it cannot contain.

    ::

        === text 9b74c9897bac770f begins ===
        What was written.
        === text 9b74c9897bac770f ends ===

    A text longer than ``max_chars`` is shown as its first three quarters and its last quarter of them, with the number
    of characters left out in between. A text without visible characters is said to be empty.

    Example:
        >>> delimited("4").splitlines()[1]
        '4'

    Args:
        text: anything; :func:`neutral` is applied to it.
        name: of letters, digits, spaces and brackets: "response", "turn 2 (user)".
        max_chars: at least 100.
    """
    assert re.fullmatch(r"[\w ()]+", name) and max_chars >= 100, (name, max_chars)
    body = _shortened(text, max_chars)
    mark = _mark(name, body)
    return f"=== {name} {mark} begins ===\n{body}\n=== {name} {mark} ends ==="


def neutral(text: str) -> str:
    """Remove what cannot be seen, and break what a chat template would interpret.

    - All kinds of line ends become newlines; other control characters and lone surrogates become U+FFFD.
    - Format characters (zero width, bidi, tags), fillers and variation selectors are removed: what people cannot see,
      the judge does not see either.
    - Special tokens, role headings, lines that look like delimiters and the keys of a verdict get a backslash:
      ``<|im_start|>`` is shown as ``<\\|im_start|>``, ``[INST]`` as ``[\\INST]``, ``### System:`` as
      ``\\### System:``, ``"grade": 1`` as ``"\\grade": 1``.

    Takes time linear in the length.
    """
    text = _LINE_ENDS.sub("\n", text)
    text = _UNSEEN.sub("", text.translate({ord(char): _shown(char) for char in set(text)}))
    for pattern in _SPECIAL:
        text = pattern.sub(r"\1\\", text)
    return text


def token_breaker(tokens: Iterable[str]) -> Callable[[str], str]:
    """Return a function that breaks these tokens with a backslash, in whatever case, and leaves all else.

    For a judge whose tokenizer is known: its special tokens may look like nothing that :func:`neutral` knows. White
    space and single characters are not broken.

    Example:
        >>> print(token_breaker(["<end>"])("a <END> b"))
        a <\\END> b
    """
    spellings = (spelling for token in tokens for spelling in (token, token.replace("\u2581", " ")))
    known = frozenset(spelling.casefold() for spelling in spellings if len(spelling.strip()) > 1)
    if not known:
        return lambda text: text
    lengths = sorted({len(token) for token in known})
    first = re.compile("[" + "".join(re.escape(char) for char in sorted({token[0] for token in known})) + "]", re.I)

    def broken(text: str) -> str:
        parts, end = [], 0
        for match in first.finditer(text):
            at = match.start()
            if any(text[at : at + length].casefold() in known for length in lengths):
                parts += [text[end : at + 1], "\\"]
                end = at + 1
        return "".join([*parts, text[end:]])

    return broken


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """All tokens that a tokenizer finds in a text before it splits it: special tokens and other added ones.

    Added words without any sign, such as "Canberra", are left out: they are text.
    """
    special = set(tokenizer.all_special_tokens)
    added: list[str] = list(tokenizer.get_added_vocab())  # pyright: ignore[reportCallIssue, reportOptionalCall]
    return sorted(special | {token for token in added if not token.strip().isalnum()})


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
    """A hash of both that the body does not contain. If it should, the next attempt is used."""
    seen, attempt = body.casefold(), 0
    while True:
        mark = hashlib.sha256(f"{attempt}\n{name}\n{body}".encode()).hexdigest()[:_HASH_CHARS]
        if mark not in seen:
            return mark
        attempt += 1
