"""Questions to a judge, its answers, and how a reply is parsed.

A judge's reply is untrusted: a model wrote it, about a text that may be designed to be quoted in it. A verdict counts
only if it is a JSON object on its own, does not appear word for word in the question, and fits the question's schema.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ValidationError

from rolltune.rewards.judges.delimit import neutral
from rolltune.types import Message

Failure = Literal["judge_down", "judge_refused", "judge_unparseable", "judge_cut", "judge_budget", "judge_stale"]
MAX_REPLY_CHARS = 64_000  # the end of a reply, where its verdict is
_MAX_REPAIRED_CHARS = 8_000  # of a malformed reply that the judge is shown again
_MAX_WORK, _WORK_PER_TRY, _UNKNOWN_WORK = 4_000_000, 400, 10_000  # characters read while searching for objects
# A judge has no reason to write "gr\\u0061de", but a quoted text may. An even number of backslashes escapes itself.
_ESCAPED_LETTER = re.compile(r"(?<!\\)(?:\\\\)*\\u00[4-7]")


class JudgeStopped(ValueError):
    """A judge refuses every question; the message says why. Any other exception is a bug."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A prompt, and the schema of its answer.

    Attributes:
        messages: with all untrusted text in delimiters (:func:`rolltune.rewards.judges.delimit.delimited`).
        answer: schema of the reply. If ``info.context["whole"]`` is true its validators refuse an incomplete answer;
            otherwise they may keep the usable part.
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


def response_format(answer: type[BaseModel]) -> dict[str, Any]:
    """The schema in the form of the chat protocol."""
    schema = {"name": "answer", "strict": True, "schema": answer.model_json_schema()}
    return {"type": "json_schema", "json_schema": schema}


def read_answer(question: Question, reply: str, *, whole: bool = True) -> BaseModel:
    """Parse the verdict in a reply.

    The last JSON object counts, since models think first. Objects that appear word for word in the question are
    quotations. No braces may follow the last object, and none may be open before it: an object inside broken JSON may
    be a quotation, too.

    Example:
        >>> read_answer(question, 'It says {"rating": 10}. {"reason": "Wrong.", "rating": 2}').rating
        2

    Args:
        question: the question.
        reply: the judge's text.
        whole: refuse an answer of which only a part is usable.

    Raises:
        ValueError: there is no such object, or it does not fit the schema. The message tells the judge what to repair.
    """
    text = reply[-MAX_REPLY_CHARS:].rpartition("</think>")[2]
    asked = _without_spaces("\n".join(message["content"] for message in question.messages))
    found = list(_objects(text))
    own = [place for place in found if _without_spaces(text[place.start : place.end]) not in asked]
    if not own:
        found_only = "a quotation of the question" if found else "none that can be read"
        raise ValueError(f"a JSON object is wanted, and there is {found_only}")
    last = own[-1]
    before, behind = _outside(text, found, last)
    if _ESCAPED_LETTER.search(text, last.start, last.end):
        raise ValueError("letters are written as \\u escapes; write them plainly")
    if before.count("{") != before.count("}"):
        raise ValueError("the JSON object follows a brace that is not closed")
    if "{" in behind or "}" in behind:
        raise ValueError("the JSON object must come last, and more braces follow it")
    try:
        return question.answer.model_validate(last.value, context={"whole": whole})
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{where}{': ' if where else ''}{first['msg'].removeprefix('Value error, ')}") from None


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


@dataclass(frozen=True, slots=True)
class _Place:
    start: int
    end: int
    value: Any


def _objects(text: str) -> Iterator[_Place]:
    """Find a text's outermost JSON objects, in order.

    Raises:
        ValueError: the search takes too long, which happens only with many unclosed braces.
    """
    work, start = 0, text.find("{")
    while start >= 0:
        try:
            value, end = _DECODER.raw_decode(text, start)
        except (ValueError, RecursionError) as error:  # ValueError also for a number with too many digits
            work += error.pos - start + _WORK_PER_TRY if isinstance(error, json.JSONDecodeError) else _UNKNOWN_WORK
            end = start + 1
        else:
            yield _Place(start, end, value)
        if work > _MAX_WORK:
            raise ValueError("there are too many braces that close nothing")
        start = text.find("{", end)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse repeated keys: the parser would decide which of two grades counts."""
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key is repeated")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_once)


def _outside(text: str, found: Sequence[_Place], last: _Place) -> tuple[str, str]:
    """The text before the object and after it, without other objects."""
    before, behind, end = "", "", 0
    for place in found:
        part = text[end : place.start]
        before, behind = (before + part, behind) if place.start <= last.start else (before, behind + part)
        end = place.end
    return before, behind + text[end:]


def _without_spaces(text: str) -> str:
    return "".join(text.split())
