"""What is asked of a judge, what comes back, and how a reply is read.

A judge's reply is untrusted twice: it is a model's, and it is about a text that may have been written to be quoted in
it. Only an object that stands by itself, that the question does not contain word for word, and that fits the
question's schema counts; anything else is no verdict.
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
MAX_REPLY_CHARS = 64_000  # the end of a reply, where its verdict stands
_MOST_REPAIRED = 8_000  # characters of a malformed reply that its judge is shown again
_MOST_WORK, _EACH_TRY, _UNKNOWN_WORK = 4_000_000, 400, 10_000  # characters read in looking for objects
# No judge has cause to write "gr\\u0061de"; a text that it quotes may. An even number of backslashes escapes itself.
_ESCAPED_LETTER = re.compile(r"(?<!\\)(?:\\\\)*\\u00[4-7]")


class JudgeStopped(ValueError):
    """No question can be answered any more; the message says why. Everything else that is raised is a bug."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A prompt and the form of its answer.

    Attributes:
        messages: with everything that others wrote in fences (:func:`rolltune.rewards.judges.delimit.delimited`).
        answer: the schema of a reply. Validators that see ``info.context["whole"]`` true refuse what is incomplete;
            otherwise they may keep the part that can be used.
    """

    messages: tuple[Message, ...]
    answer: type[BaseModel]


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What came of a question.

    Attributes:
        value: an instance of the question's ``answer``; None where there is none, which is unscored and never a 0.
        failure: None where there is a value. Else "judge_down": all attempts failed; "judge_refused": the server does
            not take this question; "judge_unparseable": no reply fits the schema; "judge_cut": the reply was cut at
            ``max_tokens``; "judge_budget": a cap is reached; "judge_stale": others than the policy's weights wrote it.
        text: what the judge wrote last; empty where it wrote nothing.
        judge: who was asked, such as "gpt-4o-mini@api.example.com", or "policy@12" for the policy after 12 steps.
        cached: no call was made for it.
    """

    value: BaseModel | None
    failure: Failure | None
    text: str
    judge: str
    cached: bool


class Judge(Protocol):
    """Anything that answers questions.

    Attributes:
        name: who it is, for :attr:`Answer.judge`.
        stop_reason: why it will not answer any more (a cap is reached), in words; None as long as it does.
    """

    @property
    def name(self) -> str: ...

    @property
    def stop_reason(self) -> str | None: ...

    async def ask(self, question: Question) -> Answer:
        """The answer, unscored where there is none. ValueError where no question can ever be answered (a wrong key)."""
        ...

    def share_budget(self, path: Path) -> None:
        """Have its caps hold for all that keep their account in this file: a run's processes, and all its starts."""
        ...

    def metrics(self) -> dict[str, float]:
        """Totals so far."""
        ...

    async def aclose(self) -> None:
        """Close what the running event loop has open."""
        ...


def response_format(answer: type[BaseModel]) -> dict[str, Any]:
    """The schema as the chat protocol has it."""
    schema = {"name": "answer", "strict": True, "schema": answer.model_json_schema()}
    return {"type": "json_schema", "json_schema": schema}


def read_answer(question: Question, reply: str, *, whole: bool = True) -> BaseModel:
    """The verdict in a reply.

    The last JSON object counts, since models think first and fence what they conclude. Objects that stand word for word
    in the question are quotations. Behind the last object there may be no braces, and in front of it none that are
    left open: an object inside of broken JSON may be a quotation too.

    Example:
        >>> read_answer(question, 'It says {"rating": 10}. {"reason": "Wrong.", "rating": 2}').rating
        2

    Args:
        question: what was asked.
        reply: what the judge wrote.
        whole: refuse an answer of which only a part can be used.

    Raises:
        ValueError: there is no such object, or it does not fit; in words that a judge can mend its reply by.
    """
    text = reply[-MAX_REPLY_CHARS:].rpartition("</think>")[2]
    asked = _without_spaces("\n".join(message["content"] for message in question.messages))
    found = list(_objects(text))
    own = [place for place in found if _without_spaces(text[place.start : place.end]) not in asked]
    if not own:
        what = "a quotation of the question" if found else "none that can be read"
        raise ValueError(f"a JSON object is wanted, and there is {what}")
    last = own[-1]
    before, behind = _outside(text, found, last)
    if _ESCAPED_LETTER.search(text, last.start, last.end):
        raise ValueError("letters are written as \\u escapes; write them as they are")
    if before.count("{") != before.count("}"):
        raise ValueError("the JSON object stands behind a brace that is not closed")
    if "{" in behind or "}" in behind:
        raise ValueError("the JSON object has to be the last thing, and more braces follow it")
    try:
        return question.answer.model_validate(last.value, context={"whole": whole})
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{where}{': ' if where else ''}{first['msg'].removeprefix('Value error, ')}") from None


def repair(reply: str, problem: str) -> tuple[Message, ...]:
    """The turns that go on from a question: a malformed reply, and what is wrong with it."""
    return (
        {"role": "assistant", "content": neutral(reply[-_MOST_REPAIRED:]) or "(nothing)"},
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
    """The JSON objects of a text that are in no other one, in order.

    Raises:
        ValueError: looking for them takes too long, which only braces that close nothing can do.
    """
    work, start = 0, text.find("{")
    while start >= 0:
        try:
            value, end = _DECODER.raw_decode(text, start)
        except (ValueError, RecursionError) as error:  # ValueError also for a number of too many digits
            work += error.pos - start + _EACH_TRY if isinstance(error, json.JSONDecodeError) else _UNKNOWN_WORK
            end = start + 1
        else:
            yield _Place(start, end, value)
        if work > _MOST_WORK:
            raise ValueError("there are too many braces that close nothing")
        start = text.find("{", end)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are all different: which of two grades counts would be up to the parser."""
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key stands twice")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_once)


def _outside(text: str, found: Sequence[_Place], last: _Place) -> tuple[str, str]:
    """What stands before the object and behind it, without other objects."""
    before, behind, end = "", "", 0
    for place in found:
        part = text[end : place.start]
        before, behind = (before + part, behind) if place.start <= last.start else (before, behind + part)
        end = place.end
    return before, behind + text[end:]


def _without_spaces(text: str) -> str:
    return "".join(text.split())
