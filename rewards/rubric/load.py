"""Read rubrics from records: a user's own, and the data sets of Rubrics as Rewards (arXiv 2507.17746)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    Field,
    StrictFloat,
    StrictInt,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from rolltune.rewards.rubric.schema import CATEGORIES, Category, Criterion, Rubric
from rolltune.rewards.rubric.wording import pitfall_direction
from rolltune.types import Message, Problem

Weights = Literal["categories", "numbers"]
Unsure = Literal["error", "drop", "bad", "good"]

_MAX_SHOWN = 20  # mistakes of a file that are listed
# "Essential Criteria: ", also in bold or brackets, with another sign than the colon, or without the second word.
_PREFIX = re.compile(
    rf"\W*(?:(\w+)\s+criteri(?:a|on)|({'|'.join(CATEGORIES)})s?)[*_]*(?:\s*[:\uff1a\]]|\s+[\u2013-]\s)[\s*_:]*",
    re.IGNORECASE,
)

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

# --- a user's own records ---------------------------------------------------------------------------------------------

_Text = Annotated[str, StringConstraints(min_length=1, pattern=r"\S")]


class _Message(BaseModel):
    role: Literal["system", "user", "assistant"]
    content: _Text


class ProblemRecord(BaseModel):
    """A problem with its rubric. Other fields are ignored.

    Attributes:
        id: of the problem.
        question: the user's only message; or ``messages``.
        messages: the conversation, ending with a user message.
        answer: the reference answer.
        solution: a worked solution.
        criteria: of the rubric; or ``rubric``.
        rubric: ``{"criteria": [...]}``.
    """

    id: Annotated[_Text | StrictInt, Field(union_mode="left_to_right")] | None = None
    question: _Text | None = None
    messages: Annotated[tuple[_Message, ...], Field(min_length=1)] | None = None
    answer: str | StrictInt | StrictFloat | None = None
    solution: str | None = None
    criteria: Annotated[tuple[Criterion, ...], Field(min_length=1, max_length=100)] | None = None
    rubric: Rubric | None = None

    @field_validator("messages")
    @classmethod
    def _check_messages(cls, messages: tuple[_Message, ...] | None) -> tuple[_Message, ...] | None:
        if messages is not None and messages[-1].role != "user":
            raise ValueError("must end with a user message")
        return messages

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.criteria is None) == (self.rubric is None):
            raise ValueError("must have either 'criteria', a list, or 'rubric', {\"criteria\": [...]}")
        if (self.question is None) == (self.messages is None):
            raise ValueError("must have either 'question', a string, or 'messages', a list of messages")
        return self

    def to_problem(self, default_id: str) -> Problem:
        given = self.messages or (_Message(role="user", content=self.question or ""),)
        messages: list[Message] = [{"role": message.role, "content": message.content} for message in given]
        return Problem(
            id=default_id if self.id is None else str(self.id),
            messages=tuple(messages),
            answer=_canonical(self.answer),
            solution=(self.solution or "").strip() or None,
            rubric=self.rubric or Rubric(criteria=self.criteria or ()),
        )


def _canonical(answer: str | int | float | None) -> str | None:
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    return None if answer is None else str(answer).strip() or None


def problem_record(record: dict[str, Any]) -> ProblemRecord:
    """Read a problem with its rubric, flat or as ``write_rubrics`` writes it.

    Example:
        >>> criteria = [{"title": "Cause", "description": "Names scattering.", "category": "essential"}]
        >>> problem_record({"question": "Why is the sky blue?", "criteria": criteria}).to_problem("sky").id
        'sky'

    Args:
        record: ``{"problem": {id, messages, answer, solution}, "rubric": {"criteria": [...]}}``, or the fields of
            :class:`ProblemRecord`.

    Raises:
        ValueError: a field is missing or wrong; one line names all such fields.
    """
    return parse(ProblemRecord, _flat(record))


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    problem = record.get("problem")
    if problem is None:
        return record
    if not isinstance(problem, dict):
        raise ValueError(f"'problem' must be an object, not {problem!r:.60}")
    return {name: value for name, value in record.items() if name != "problem"} | problem


def parse(schema: type[M], record: Any) -> M:
    """Validate a record.

    Raises:
        ValueError: it does not fit; one line says for each wrong field what is accepted, and the value.
    """
    try:
        return schema.model_validate(record)
    except ValidationError as error:
        details = [dict(detail) for detail in error.errors(include_url=False, include_context=False)]
        raise ValueError("; ".join(_describe(detail) for detail in details if not _is_echo(detail, details))) from None


def _is_echo(detail: dict[str, Any], details: list[dict[str, Any]]) -> bool:
    """Whether it reports a list as too short only because its items are wrong."""
    inner = [other["loc"] for other in details if len(other["loc"]) > len(detail["loc"])]
    return detail["type"] == "too_short" and any(loc[: len(detail["loc"])] == detail["loc"] for loc in inner)


def _describe(detail: dict[str, Any]) -> str:
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in detail["loc"]).lstrip(".")
    given = detail["input"]
    shown = "" if isinstance(given, dict | BaseModel) or detail["type"] == "missing" else f", not {given!r:.60}"
    message = detail["msg"].removeprefix("Value error, ").replace("tuple", "list").replace("Tuple", "List")
    return f"{where}{': ' if where else ''}{message}{shown}"


def collect(records: Iterable[tuple[str, Any]], read: Callable[[str, Any], T]) -> list[T]:
    """Call ``read`` for every record.

    Args:
        records: (place, record); messages name the place, such as "rubrics.jsonl:3".
        read: called with place and record; raises ValueError for a wrong record.

    Raises:
        ValueError: the mistakes of all records, one a line; beyond twenty only their number.
    """
    found: list[T] = []
    wrong: list[str] = []
    for where, record in records:
        try:
            found.append(read(where, record))
        except ValueError as error:
            wrong.append(f"{where}: {error}")
    if wrong:
        more = [f"... and {len(wrong) - _MAX_SHOWN} more records"] if len(wrong) > _MAX_SHOWN else []
        raise ValueError("\n".join([*wrong[:_MAX_SHOWN], *more]))
    return found


# --- records of Rubrics as Rewards ------------------------------------------------------------------------------------


class _RarItem(BaseModel):
    title: _Text
    description: _Text
    weight: Annotated[int, Field(strict=True, ge=-1000, le=1000)]


class _RarRecord(BaseModel):
    question: _Text
    reference_answer: str | None = None  # empty in a tenth of RaR-Science
    rubric: Annotated[tuple[_RarItem, ...], Field(min_length=1, max_length=100)]


def rar_problem(
    record: Any, problem_id: str, *, weights: Weights = "categories", unsure: Unsure = "error"
) -> Problem | None:
    """Read a record of RaR-Medicine or RaR-Science.

    The prefix of the description ("Essential Criteria: ...") gives the category and is removed. Without a known prefix
    the published number gives it, as the rubric writers were told: 5 essential, 3 and 4 important, 1 and 2 optional,
    below 0 a pitfall. All pitfalls have negative numbers, so the direction of a pitfall comes from its wording
    (:mod:`rolltune.rewards.rubric.wording`).

    Args:
        record: question, reference_answer, and rubric: a list of {title, description, weight}.
        problem_id: id of the problem.
        weights: "categories" for the paper's weights of categories; "numbers" keeps the published ones, without sign.
        unsure: how to treat a pitfall whose wording does not show its direction. "error" names it; "drop" leaves it
            out; "bad" treats satisfying it as a failure ("Does not mention x", as mostly in RaR-Medicine), "good" as
            an avoided one.

    Returns:
        None if no criterion of the rubric remains.

    Raises:
        ValueError: a field is missing or wrong; a number's sign contradicts the category; or ``unsure`` is "error" and
            a pitfall's direction is unknown.
    """
    parsed = parse(_RarRecord, record)
    criteria: list[Criterion] = []
    wrong: list[str] = []
    for number, item in enumerate(parsed.rubric):
        category, description = _category(item)
        if problem := _contradiction(item, category):
            wrong.append(f"rubric[{number}].weight: {problem}")
            continue
        direction = pitfall_direction(description) if category == "pitfall" else None
        if category == "pitfall" and direction is None:
            if unsure == "error":
                wrong.append(
                    f"rubric[{number}].description: {item.description!r:.160} does not say whether satisfying it is "
                    "good; choose unsure: drop, bad or good, or reword it ('Avoids ...', 'Fails to ...')"
                )
            if unsure in ("error", "drop"):
                continue
            direction = unsure == "good"
        fields = {"title": item.title, "description": description, "category": category}
        criteria.append(
            parse(
                Criterion,
                fields | {"satisfied_is_good": direction, "weight": abs(item.weight) if weights == "numbers" else None},
            )
        )
    if wrong:
        raise ValueError("; ".join(wrong))
    if not criteria:
        return None
    return Problem(
        id=problem_id,
        messages=({"role": "user", "content": parsed.question.strip()},),
        answer=(parsed.reference_answer or "").strip() or None,
        rubric=Rubric(criteria=tuple(criteria)),
    )


def _category(item: _RarItem) -> tuple[Category, str]:
    """Return the category, and the description without its prefix."""
    prefix = _PREFIX.match(item.description)
    description = item.description[prefix.end() :].strip() if prefix else item.description.strip()
    for category in CATEGORIES:
        if prefix and category == (prefix[1] or prefix[2]).casefold().removesuffix("s"):
            return category, description or item.title
    return _by_number(item.weight), description or item.title


def _contradiction(item: _RarItem, category: Category) -> str | None:
    """What the published number says against the category; None if it agrees."""
    if item.weight == 0:
        return f"{item.title!r:.80} has weight 0, so judging it has no effect; remove it"
    if (item.weight < 0) != (category == "pitfall"):
        wanted = "below" if category == "pitfall" else "above"
        return f"{item.title!r:.80} is {category} and has the weight {item.weight}; must be {wanted} 0"
    return None


def _by_number(weight: int) -> Category:
    if weight < 0:
        return "pitfall"
    return "essential" if weight >= 5 else "important" if weight >= 3 else "optional"
