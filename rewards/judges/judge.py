"""Questions to a judge, its answers, and how a reply is parsed.

A judge's reply is untrusted: a model wrote it, about a text that may be designed to be quoted in it. A verdict counts
only if it is a JSON object on its own, is not a quotation of the question, fits the question's schema, and is not
contradicted by another verdict in the reply.
"""

from __future__ import annotations

import dataclasses
import functools
import html
import re
import unicodedata
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ValidationError

from rolltune.rewards.judges.delimit import neutral
from rolltune.rewards.judges.lenient_json import ObjectSearch, Place
from rolltune.types import Message

Failure = Literal["judge_down", "judge_refused", "judge_unparseable", "judge_cut", "judge_budget", "judge_stale"]
# Failures that the judged response can provoke, by what it makes the judge write. The others do not depend on it.
PROVOKED: frozenset[Failure] = frozenset({"judge_refused", "judge_unparseable", "judge_cut"})
MAX_REPLY_CHARS = 64_000  # the end of a reply, where its verdict is
_MAX_REPAIRED_CHARS = 8_000  # of a malformed reply that the judge is shown again
_MAX_OBJECTS = 1000  # in a reply
# A judge has no reason to write "gr\\u0061de", but a quoted text may. An even number of backslashes escapes itself.
_ESCAPED_LETTER = re.compile(r"(?<!\\)(?:\\\\)*\\u00[4-7]")
_THOUGHT, _END_OF_THOUGHT = re.compile(r"\s*(?:<think(?:ing)?>|\[THINK\])"), re.compile(r"</think(?:ing)?>|\[/THINK\]")
# Keys under which models wrap an answer. Not among them: keys under which they quote, such as "response".
_WRAPPERS = frozenset(
    "answer final_answer result output verdict verdicts evaluation assessment judgement judgment json rating".split()
)
# Braces around a field that decides: what looks like a verdict, whether or not it can be read.
_DECISION = re.compile(r"\{[^{}]{0,5000}\b(?:rating|grade|better)\b[^\w{}]{0,5}[:=]", re.IGNORECASE)
_HEX = "[0-9a-fA-F]"
_UNICODE_ESCAPE = re.compile(rf"\\+(?:u({_HEX}{{4}})|U({_HEX}{{8}})|u\{{({_HEX}{{1,6}})\}}|x\{{?({_HEX}{{2}})\}}?)")
_NOT_PLAIN = re.compile(r"[^\w{}\[\]:,.+-]|_")


class JudgeStopped(ValueError):
    """A judge refuses every question; the message says why. Any other exception is a bug."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A prompt, and the schema of its answer.

    Attributes:
        messages: with all untrusted text in delimiters (:func:`rolltune.rewards.judges.delimit.delimited`).
        answer: schema of the reply. It refuses an incomplete answer.
    """

    messages: tuple[Message, ...]
    answer: type[BaseModel]


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """The outcome of a question.

    Attributes:
        value: an instance of the question's ``answer``; None if unscored, which never counts as 0.
        failure: None if there is a value. Otherwise "judge_down": all attempts failed; "judge_refused": the server
            refuses this question; "judge_unparseable": no reply fits the schema; "judge_cut": the reply was cut at
            ``max_tokens``; "judge_budget": a cap is reached; "judge_stale": not written by the policy's weights.
        text: the judge's last reply; empty if there was none.
        judge: who was asked, such as "gpt-4o-mini@api.example.com", or "policy@12" for the policy after 12 steps.
        cached: whether no call was made for it.
    """

    value: BaseModel | None
    failure: Failure | None
    text: str
    judge: str
    cached: bool


class Judge(Protocol):
    """Anything that answers questions. :class:`rolltune.rewards.judges.pool.JudgePool` calls all but ``ask``.

    Attributes:
        name: for :attr:`Answer.judge`.
        stop_reason: why it answers no more questions (a cap is reached); None while it does.
    """

    @property
    def name(self) -> str: ...

    @property
    def stop_reason(self) -> str | None: ...

    async def ask(self, question: Question) -> Answer:
        """Answer a question, without a value if that fails. Raise ValueError if every question would fail (a wrong
        key)."""
        ...

    def share_budget(self, path: Path) -> None:
        """Apply caps to all processes that count their usage in this file: a run's processes and restarts."""
        ...

    def metrics(self) -> dict[str, float]:
        """Return this process's totals so far."""
        ...

    async def aclose(self) -> None:
        """Close everything that the running event loop has open."""
        ...


def without_tokens(question: Question, broken: Callable[[str], str]) -> Question:
    """A question in whose texts a judge's own special tokens are broken (:func:`.delimit.token_breaker`)."""
    messages: tuple[Message, ...] = tuple(
        {"role": message["role"], "content": broken(message["content"])} for message in question.messages
    )
    return dataclasses.replace(question, messages=messages)


def response_format(answer: type[BaseModel]) -> dict[str, Any]:
    """The schema in the form of the chat protocol."""
    schema = {"name": "answer", "strict": True, "schema": answer.model_json_schema()}
    return {"type": "json_schema", "json_schema": schema}


def read_answer(question: Question, reply: str) -> BaseModel:
    """Parse the verdict in a reply.

    The last JSON object counts. Objects that quote the question are skipped; they are compared as parsed values and as
    text, in whatever escaping. Any other object with a grade must say the same, and so it must be readable. Thoughts
    before ``</think>`` are skipped. No braces may follow the last object, and none may be open before it: an object
    inside broken JSON may be a quotation, too. Slips of form are accepted
    (:mod:`rolltune.rewards.judges.lenient_json`), and so are a list in place of an object with one list, and an object
    wrapped as ``{"answer": ...}``.

    Example:
        >>> read_answer(question, 'It says {"rating": 10}. {"reason": "Wrong.", "rating": 2}').rating
        2

    Args:
        question: the question, which contains ``{"rating": 10}``.
        reply: the judge's text.

    Raises:
        ValueError: the reply holds no such object, one that does not fit the schema, or two verdicts that differ.
            The message tells the judge what to repair.
    """
    text, found, problem = _find_objects(reply[-MAX_REPLY_CHARS:])
    own = [place for place in found if not _is_quotation(place.value, text[place.start : place.end], question)]
    if not own:
        raise ValueError(f"a JSON object is wanted, and there is {_what_instead(reply, found, problem)}")
    last = own[-1]
    before, behind = _outside(text, found, last)
    if _ESCAPED_LETTER.search(text, last.start, last.end):
        raise ValueError("letters are written as \\u escapes; write them plainly")
    if before.count("{") != before.count("}"):
        cause = f" ({problem})" if problem else ""
        raise ValueError(f"the JSON object follows a brace that is not closed{cause}")
    if "{" in behind or "}" in behind:
        raise ValueError("the JSON object must come last, and more braces follow it")
    answer = _validated(question, last.value)
    if any(_decision(other) != _decision(answer) for other in _valid(question, own[:-1])):
        raise ValueError("it contains two different verdicts; write the final one only")
    # The other one may be the judge's own, and this one a paraphrase of what the response wants.
    invalid = [text[place.start : place.end] for place in own[:-1] if not list(_valid(question, [place]))]
    if any(_DECISION.search(part) for part in (before, *invalid)):
        raise ValueError("it contains another verdict that cannot be read; write the final one only")
    return answer


def _find_objects(reply: str) -> tuple[str, list[Place], str | None]:
    """Return a reply without its thoughts, the objects in it, and why an unreadable part is not one."""
    search = ObjectSearch(reply)
    found = list(search)
    thinks = _THOUGHT.match(reply) is not None
    is_verdict_first = bool(found) and not reply[: found[0].start].strip("\ufeff \t\r\n`json")
    ends = [] if is_verdict_first else [match.end() for match in _END_OF_THOUGHT.finditer(reply)]
    # A tag inside an object stands in one of its strings. The first other one ends the thoughts: behind a later one a
    # quotation could pass for the verdict.
    start = next((end for end in ends if not any(place.start < end <= place.end for place in found)), 0)
    if thinks and not start:
        raise ValueError("it ends within its thoughts; think less, and write the JSON object")
    if start:
        reply = reply[start:]
        search = ObjectSearch(reply)
        found = list(search)
    if search.is_cut or len(found) > _MAX_OBJECTS:
        raise ValueError("there are too many braces")
    return reply, found, search.problem


def _what_instead(reply: str, found: Sequence[Place], problem: str | None) -> str:
    if found:
        return "a quotation of the question"
    if not reply.strip():
        return "none that can be read: the reply is empty"
    return "none that can be read" + (f": {problem}" if problem else "")


def _valid(question: Question, places: Sequence[Place]) -> Iterator[BaseModel]:
    """The answers among a reply's objects."""
    for place in places:
        try:
            yield _validated(question, place.value)
        except ValueError:
            continue


def _validated(question: Question, value: Any) -> BaseModel:
    """Fit a parsed value, or what it wraps, to the question's schema.

    Raises:
        ValueError: it does not fit; the message says why the outer value does not.
    """
    wrong: ValidationError | None = None
    for form in _forms(value, question):
        try:
            return question.answer.model_validate(form)
        except ValidationError as error:
            wrong = wrong or error
    assert wrong is not None
    first = wrong.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"]))
    raise ValueError(f"{where}{': ' if where else ''}{first['msg'].removeprefix('Value error, ')}") from None


def _forms(value: Any, question: Question) -> Iterator[Any]:
    """A value, and what it is a wrapper of."""
    fields = list(question.answer.model_fields)
    if isinstance(value, list):
        yield {fields[0]: value} if len(fields) == 1 else value[0] if len(value) == 1 else value
        return
    yield value
    if isinstance(value, Mapping) and len(value) == 1:
        (name, inner), *_ = value.items()
        is_wrapped = isinstance(inner, dict | list) and str(name).casefold() in _WRAPPERS
        if is_wrapped and not _is_quotation(inner, None, question):
            yield from _forms(inner, question)


def _decision(answer: BaseModel) -> Any:
    """An answer without its reasons, to compare two of them."""

    def without_reasons(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: without_reasons(inner) for name, inner in value.items() if name != "reason"}
        return [without_reasons(inner) for inner in value] if isinstance(value, list) else value

    return without_reasons(answer.model_dump())


# --- quotations -------------------------------------------------------------------------------------------------------


def _is_quotation(value: Any, text: str | None, question: Question) -> bool:
    """Whether a parsed value, or its text, also stands in the question."""
    plain, values = _asked(tuple(message["content"] for message in question.messages))
    return _canonical(value) in values or (text is not None and _plain(text) in plain)


@functools.lru_cache(maxsize=64)
def _asked(contents: tuple[str, ...]) -> tuple[str, frozenset[Any]]:
    """A question's text in plain form, and all the values in it."""
    text = "\n".join(contents)
    decoded = _decoded(text)
    values = frozenset(
        _canonical(inner)
        for readable in {text, text.replace("\\", ""), decoded, decoded.replace("\\", "")}
        for place in ObjectSearch(readable)
        for inner in _inner(place.value)
    )
    return f"{_plain(text)}\n{_plain(decoded)}", values


_MAX_ESCAPED = 3  # times that a text is escaped


def _decoded(text: str) -> str:
    """Undo the escapes in which a text can hide an object from a comparison: of HTML, URLs, JSON and Python."""
    for _ in range(_MAX_ESCAPED):
        text = urllib.parse.unquote(html.unescape(text), errors="replace")
    text = _UNICODE_ESCAPE.sub(lambda match: chr(min(int(match[match.lastindex or 0], 16), 0x10FFFF)), text)
    return unicodedata.normalize("NFKC", text)


def _plain(text: str) -> str:
    """A text without spaces, quotes, backslashes and case."""
    return _NOT_PLAIN.sub("", unicodedata.normalize("NFKC", text).casefold())


def _inner(value: Any) -> Iterator[Any]:
    """A value's objects and lists of objects, itself included."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if isinstance(value, dict) or any(isinstance(item, dict) for item in inner):
        yield value
    for item in inner:
        yield from _inner(item)


def _canonical(value: Any) -> Any:
    """A hashable form that does not depend on the order of keys, on spelling, and on 1 being written as "1" or true."""
    if isinstance(value, dict):
        return ("object", frozenset((_plain(key), _canonical(inner)) for key, inner in value.items()))
    if isinstance(value, list):
        return ("list", tuple(map(_canonical, value)))
    plain = _plain(str(value))
    if plain in ("true", "false"):
        return float(plain == "true")
    try:
        return float(plain)
    except ValueError:
        return plain


def repair(reply: str, problem: str) -> tuple[Message, ...]:
    """Messages that continue a question: the malformed reply, and what is wrong with it."""
    return (
        {"role": "assistant", "content": neutral(reply[-_MAX_REPAIRED_CHARS:]) or "(nothing)"},
        {
            "role": "user",
            "content": f"This reply cannot be read: {problem}. Judge again by the same rules, and reply with the JSON "
            "object alone, in the form that was asked for.",
        },
    )


def _outside(text: str, found: Sequence[Place], last: Place) -> tuple[str, str]:
    """The text before the object and after it, without other objects."""
    before, behind, end = "", "", 0
    for place in found:
        part = text[end : place.start]
        before, behind = (before + part, behind) if place.start <= last.start else (before, behind + part)
        end = place.end
    return before, behind + text[end:]
