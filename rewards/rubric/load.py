"""Rubrics from rows: those of one's own files, and those of the data sets of Rubrics as Rewards (arXiv 2507.17746)."""

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

_SHOWN = 20  # mistakes of a file that are told one by one
_PREFIX = re.compile(r"\s*(\w+)\s+criteri(?:a|on)\s*:\s*", re.IGNORECASE)

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

# --- rows of one's own ------------------------------------------------------------------------------------------------

_Text = Annotated[str, StringConstraints(min_length=1, pattern=r"\S")]


class _Turn(BaseModel):
    role: Literal["system", "user", "assistant"]
    content: _Text


class RubricRecord(BaseModel):
    """A rubric and what it is for; columns beside these are passed over.

    Attributes:
        id: of the problem.
        criteria: of the rubric; or ``rubric: {criteria: [...]}``.
    """

    id: Annotated[_Text | StrictInt, Field(union_mode="left_to_right")] | None = None
    criteria: Annotated[tuple[Criterion, ...], Field(min_length=1, max_length=100)] | None = None
    rubric: Rubric | None = None

    @model_validator(mode="after")
    def _check_rubric(self) -> Self:
        if (self.criteria is None) == (self.rubric is None):
            raise ValueError("either 'criteria', a list, or 'rubric', {\"criteria\": [...]}, is wanted")
        return self

    def to_rubric(self) -> Rubric:
        if self.rubric is not None:
            return self.rubric
        assert self.criteria is not None
        return Rubric(criteria=self.criteria)


class ProblemRecord(RubricRecord):
    """A problem with its rubric.

    Attributes:
        question: the one user turn; or ``messages``.
        messages: the conversation, ending with a user turn.
        answer: the reference answer.
        solution: a worked solution.
    """

    question: _Text | None = None
    messages: Annotated[tuple[_Turn, ...], Field(min_length=1)] | None = None
    answer: str | StrictInt | StrictFloat | None = None
    solution: str | None = None

    @field_validator("messages")
    @classmethod
    def _check_messages(cls, turns: tuple[_Turn, ...] | None) -> tuple[_Turn, ...] | None:
        if turns is not None and turns[-1].role != "user":
            raise ValueError("must end with a user turn")
        return turns

    @model_validator(mode="after")
    def _check_question(self) -> Self:
        if (self.question is None) == (self.messages is None):
            raise ValueError("either 'question', a string, or 'messages', a list of turns, is wanted")
        return self

    def to_problem(self, default_id: str) -> Problem:
        turns = self.messages or (_Turn(role="user", content=self.question or ""),)
        messages: list[Message] = [{"role": turn.role, "content": turn.content} for turn in turns]
        return Problem(
            id=default_id if self.id is None else str(self.id),
            messages=tuple(messages),
            answer=_canonical(self.answer),
            solution=(self.solution or "").strip() or None,
            rubric=self.to_rubric(),
        )


def _canonical(answer: str | int | float | None) -> str | None:
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    return None if answer is None else str(answer).strip() or None


def problem_record(row: dict[str, Any]) -> ProblemRecord:
    """A problem with its rubric, as ``write_rubrics`` writes it or flat.

    Example:
        >>> criteria = [{"title": "Cause", "description": "Names scattering.", "category": "essential"}]
        >>> problem_record({"question": "Why is the sky blue?", "criteria": criteria}).to_problem("sky").id
        'sky'

    Args:
        row: ``{"problem": {id, messages, answer, solution}, "rubric": {"criteria": [...]}}``, or the fields of
            :class:`ProblemRecord`.

    Raises:
        ValueError: a field is missing or wrong; one line names them all.
    """
    return parse(ProblemRecord, _flat(row))


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    problem = row.get("problem")
    if problem is None:
        return row
    if not isinstance(problem, dict):
        raise ValueError(f"'problem' must be an object, not {problem!r:.60}")
    return {name: value for name, value in row.items() if name != "problem"} | problem


def parse(schema: type[M], row: Any) -> M:
    """``row`` as a ``schema``.

    Raises:
        ValueError: it is none; one line tells each wrong field, what would be right and the value.
    """
    try:
        return schema.model_validate(row)
    except ValidationError as error:
        details = [dict(detail) for detail in error.errors(include_url=False, include_context=False)]
        raise ValueError("; ".join(_told(detail) for detail in details if not _is_echo(detail, details))) from None


def _is_echo(detail: dict[str, Any], details: list[dict[str, Any]]) -> bool:
    """Whether it says that a list is too short only because its items are wrong."""
    inner = [other["loc"] for other in details if len(other["loc"]) > len(detail["loc"])]
    return detail["type"] == "too_short" and any(loc[: len(detail["loc"])] == detail["loc"] for loc in inner)


def _told(detail: dict[str, Any]) -> str:
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in detail["loc"]).lstrip(".")
    given = detail["input"]
    shown = "" if isinstance(given, dict | BaseModel) or detail["type"] == "missing" else f", not {given!r:.60}"
    message = detail["msg"].removeprefix("Value error, ").replace("tuple", "list").replace("Tuple", "List")
    return f"{where}{': ' if where else ''}{message}{shown}"


def collect(rows: Iterable[tuple[str, Any]], read: Callable[[str, Any], T]) -> list[T]:
    """``read`` of every row.

    Args:
        rows: each with the place that a message names, "rubrics.jsonl:3".
        read: called with place and row; raises ValueError for a wrong row.

    Raises:
        ValueError: the mistakes of all rows, a line each; beyond twenty their number.
    """
    found: list[T] = []
    wrong: list[str] = []
    for where, row in rows:
        try:
            found.append(read(where, row))
        except ValueError as error:
            wrong.append(f"{where}: {error}")
    if wrong:
        more = [f"... and {len(wrong) - _SHOWN} more rows"] if len(wrong) > _SHOWN else []
        raise ValueError("\n".join([*wrong[:_SHOWN], *more]))
    return found


# --- rows of Rubrics as Rewards ---------------------------------------------------------------------------------------


class _RarItem(BaseModel):
    title: _Text
    description: _Text
    weight: Annotated[int, Field(strict=True, ge=-1000, le=1000)]


class _RarRecord(BaseModel):
    question: _Text
    reference_answer: str | None = None  # empty in a tenth of RaR-Science
    rubric: Annotated[tuple[_RarItem, ...], Field(min_length=1, max_length=100)]


def rar_problem(
    row: Any, problem_id: str, *, weights: Weights = "categories", unsure: Unsure = "error"
) -> Problem | None:
    """A row of RaR-Medicine or RaR-Science.

    The category is the prefix of the description ("Essential Criteria: ..."), which is taken off; where there is none
    that is known, the published number gives it as the writers were told: 5 essential, 3 and 4 important, 1 and 2
    optional, below 0 a pitfall. A pitfall's number is negative whatever it says, so its direction comes from its
    wording alone (:mod:`rolltune.rewards.rubric.wording`).

    Args:
        row: question, reference_answer, and as rubric a list of {title, description, weight}.
        problem_id: its id.
        weights: "categories" for the paper's weights of categories; "numbers" keeps the published ones, without sign.
        unsure: what becomes of a pitfall whose wording does not say its direction. "error" names it; "drop" leaves it
            out; "bad" takes it for a failure ("Does not mention x", the rule in RaR-Medicine), "good" for one avoided.

    Returns:
        None where nothing of the rubric is left.

    Raises:
        ValueError: a field is missing or wrong, or a pitfall's direction is not known and ``unsure`` is "error".
    """
    parsed = parse(_RarRecord, row)
    criteria: list[Criterion] = []
    wrong: list[str] = []
    for number, item in enumerate(parsed.rubric):
        category, description = _category(item)
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
    """Category and description without its prefix."""
    prefix = _PREFIX.match(item.description)
    description = item.description[prefix.end() :].strip() if prefix else item.description.strip()
    for category in CATEGORIES:
        if prefix and category == prefix[1].casefold():
            return category, description or item.title
    return _by_number(item.weight), description or item.title


def _by_number(weight: int) -> Category:
    if weight < 0:
        return "pitfall"
    return "essential" if weight >= 5 else "important" if weight >= 3 else "optional"
