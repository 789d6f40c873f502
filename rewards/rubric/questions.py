"""Questions to judges about a response, and the grades in their answers.

Explicit questions (Rubrics as Rewards, arXiv 2507.17746v2, section 4) have the judge grade each criterion, all in one
call or each in its own. The implicit question has it weigh the whole rubric in one rating from 1 to 10. The pairwise
question has it compare two responses.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from rolltune.rewards.judges.delimit import MAX_CHARS, delimited
from rolltune.rewards.judges.judge import PROVOKED, Answer, Question
from rolltune.rewards.rubric.schema import CATEGORY_WEIGHTS, Category, Criterion
from rolltune.rewards.rubric.scoring import HIGHEST_RATING, LOWEST_RATING
from rolltune.rewards.rubric.templates import JudgePrompt, Kind, packaged_prompt
from rolltune.seeding import derive_seed
from rolltune.types import Problem

_MAX_REASON_CHARS = 1000
_Reason = Annotated[
    str,
    BeforeValidator(lambda reason: "" if reason is None else reason),
    AfterValidator(lambda text: text[:_MAX_REASON_CHARS]),
]
_GRADES: Mapping[str, float] = {"0": 0.0, "0.0": 0.0, "false": 0.0, "1": 1.0, "1.0": 1.0, "true": 1.0}
_TITLE_KEYS = ("title", "criterion", "name", "id", "number")  # where judges name the criterion


class Verdict(BaseModel):
    """A judge's grade of one criterion.

    Attributes:
        number: of the criterion, from 1.
        reason: the first 1,000 characters of it.
        grade: 1 if the response satisfies the criterion, else 0.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="ignore",
        json_schema_extra=lambda schema: _replace(schema, _VERDICT_SCHEMA),
    )

    number: int = 1
    reason: _Reason = ""
    grade: float

    @field_validator("grade", mode="before")
    @classmethod
    def _check(cls, value: object) -> float:
        # True and False are a pass and a fail, 1.0 and 0.0 too, also in quotes.
        grade = _GRADES.get(str(value).strip().casefold()) if isinstance(value, str | int | float) else None
        if grade is None:
            raise ValueError("must be 0 or 1")
        return grade


class Verdicts(BaseModel):
    """A judge's grades of all criteria of a question."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    verdicts: list[Verdict]


class Rating(BaseModel):
    """A judge's rating of a whole response."""

    model_config = ConfigDict(
        frozen=True,
        extra="ignore",
        json_schema_extra=lambda schema: _replace(schema, _RATING_SCHEMA),
    )

    reason: _Reason = ""
    rating: Annotated[int, Field(ge=LOWEST_RATING, le=HIGHEST_RATING)]

    @field_validator("rating", mode="before")
    @classmethod
    def _check(cls, value: object) -> object:
        if isinstance(value, bool):
            raise ValueError(f"must be a whole number from {LOWEST_RATING} to {HIGHEST_RATING}")
        return value


class Preference(BaseModel):
    """Which of two responses a judge prefers."""

    model_config = ConfigDict(
        frozen=True,
        extra="ignore",
        json_schema_extra=lambda schema: _replace(schema, _PREFERENCE_SCHEMA),
    )

    reason: _Reason = ""
    better: Literal["first", "second", "neither"]


# --- what is asked ----------------------------------------------------------------------------------------------------


def explicit_questions(
    problem: Problem,
    text: str,
    criteria: Sequence[Criterion],
    *,
    one_call: bool,
    with_reference: bool = False,
    shuffle: bool = False,
    template: JudgePrompt | None = None,
    max_chars: int = MAX_CHARS,
) -> list[Question]:
    """Ask a judge to grade each criterion of a response.

    Neither weights nor directions are shown: the judge says whether a criterion is satisfied, not what that is worth.

    Example:
        >>> len(explicit_questions(problem, "4", rubric.criteria, one_call=True))
        1

    Args:
        problem: its messages are shown, and its answer if ``with_reference``.
        text: the response.
        criteria: what is graded.
        one_call: ask about all criteria in one question; otherwise one question for each, in order.
        with_reference: show the problem's solution and answer as a reference.
        shuffle: list the criteria in an order drawn from the response, so that no criterion is always first. They keep
            their numbers. Has no effect without ``one_call``.
        template: replaces the packaged prompt; of kind "explicit" with ``one_call``, else "explicit_one".
        max_chars: limit on the characters of the response and of each other text. A longer text is cut in the middle,
            which the prompt says.

    Raises:
        ValueError: ``with_reference``, and the problem has no reference or the prompt has no place for it.
    """
    assert criteria
    prompt = _prompt(template, "explicit" if one_call else "explicit_one", with_reference)
    values = _shown(problem, text, with_reference, max_chars)
    numbered = [f"{number}. {_item(criterion)}" for number, criterion in enumerate(criteria, start=1)]
    if not one_call:
        asked = [_delimited_list([_item(criterion)], "criterion", max_chars) for criterion in criteria]
        return [
            Question(messages=prompt.messages(**values, criteria=shown, count="1"), answer=Verdict) for shown in asked
        ]
    if shuffle:
        _by(problem, text).shuffle(numbered)
    shown = _delimited_list(numbered, "criteria", max_chars)
    messages = prompt.messages(**values, criteria=shown, count=str(len(criteria)))
    return [Question(messages=messages, answer=verdicts_schema(tuple(criterion.title for criterion in criteria)))]


def implicit_question(
    problem: Problem,
    text: str,
    criteria: Sequence[Criterion],
    *,
    with_reference: bool = False,
    shuffle: bool = False,
    category_weights: Mapping[Category, float] = CATEGORY_WEIGHTS,
    template: JudgePrompt | None = None,
    max_chars: int = MAX_CHARS,
) -> Question:
    """Ask a judge to weigh the whole rubric and rate the response from 1 to 10. The answer is a :class:`Rating`.

    Each criterion is shown with its category or weight, and with its direction. Arguments and errors as for
    :func:`explicit_questions`.
    """
    assert criteria
    prompt = _prompt(template, "implicit", with_reference)
    items = [f"{_item(criterion)} ({_stakes(criterion, category_weights)})" for criterion in criteria]
    if shuffle:
        _by(problem, text).shuffle(items)
    numbered = [f"{number}. {item}" for number, item in enumerate(items, start=1)]
    values = _shown(problem, text, with_reference, max_chars)
    shown = _delimited_list(numbered, "criteria", max_chars)
    return Question(messages=prompt.messages(**values, criteria=shown, count=str(len(criteria))), answer=Rating)


def pairwise_question(
    problem: Problem,
    first: str,
    second: str,
    criteria: Sequence[Criterion],
    *,
    category_weights: Mapping[Category, float] = CATEGORY_WEIGHTS,
    template: JudgePrompt | None = None,
    max_chars: int = MAX_CHARS,
) -> Question:
    """Ask a judge which of two responses is better by the whole rubric. The answer is a :class:`Preference`.

    Judges tend to prefer one place, so ask again with the two swapped. Arguments as for :func:`implicit_question`.
    """
    assert criteria
    prompt = _prompt(template, "pairwise", False)
    items = [
        f"{number}. {_item(criterion)} ({_stakes(criterion, category_weights)})"
        for number, criterion in enumerate(criteria, start=1)
    ]
    values = _shown(problem, "", False, max_chars)
    shown = prompt.messages(
        problem=values["problem"],
        criteria=_delimited_list(items, "criteria", max_chars),
        count=str(len(criteria)),
        first=delimited(first, name="first response", max_chars=max_chars),
        second=delimited(second, name="second response", max_chars=max_chars),
    )
    return Question(messages=shown, answer=Preference)


def _by(problem: Problem, text: str) -> random.Random:
    """A generator for the order of the criteria, seeded by the response."""
    whole = text.encode(errors="backslashreplace").decode()  # a lone surrogate cannot be hashed
    return random.Random(derive_seed("criteria", problem.id, whole))


def _prompt(template: JudgePrompt | None, kind: Kind, with_reference: bool) -> JudgePrompt:
    prompt = template or packaged_prompt(kind)
    assert prompt.kind == kind, (prompt.kind, kind)
    if with_reference and not prompt.has_reference:
        raise ValueError("with_reference: true; the prompt has no ${reference}, where it would be shown; add it")
    return prompt


def _shown(problem: Problem, text: str, with_reference: bool, max_chars: int) -> dict[str, str]:
    messages = problem.messages
    if len(messages) == 1 and messages[0]["role"] == "user":
        asked = [delimited(messages[0]["content"], name="question", max_chars=max_chars)]
    else:
        asked = [
            delimited(message["content"], name=f"turn {number} ({message['role']})", max_chars=max_chars)
            for number, message in enumerate(messages, start=1)
        ]
    return {
        "problem": "\n\n".join(asked),
        "response": delimited(text, name="response", max_chars=max_chars),
        "reference": _reference(problem, max_chars) if with_reference else "",
    }


def _reference(problem: Problem, max_chars: int) -> str:
    known = [part for part in (problem.solution, problem.answer) if part]
    if not known:
        raise ValueError(f"with_reference: true; {problem.id} has neither an answer nor a solution to show")
    shown = delimited("\n\n".join(known), name="reference", max_chars=max_chars)
    return f"\nA reference answer, for what is right; it is not the only way to say it:\n\n{shown}\n"


def _item(criterion: Criterion) -> str:
    """Title and description on one line, so that one criterion cannot look like two."""
    return " ".join(f"{criterion.title}: {criterion.description}".split())


def _delimited_list(items: Sequence[str], name: str, max_chars: int) -> str:
    # Never cut: each criterion has to be graded by its number.
    text = "\n".join(items)
    return delimited(text, name=name, max_chars=max(max_chars, len(text)))


def _stakes(criterion: Criterion, category_weights: Mapping[Category, float]) -> str:
    named = criterion.weight is None
    says = criterion.category if named else f"weight {criterion.magnitude(category_weights):g}"
    return f"{says}" if criterion.is_good else f"{says}, bad where the response does it"


# --- how it is answered -----------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1024)
def verdicts_schema(titles: tuple[str, ...]) -> type[Verdicts]:
    """Return the schema of the verdicts on criteria with these titles, exactly one for each.

    A verdict belongs to the criterion whose number or title it states, never to one by its place in the list. If each
    verdict states a title, titles decide. Otherwise the numbers must be 1 .. n, all of them: a reply that counts from 0
    or leaves one out does not say which verdict belongs where, and is refused as a whole.
    """
    count = len(titles)

    class Listed(Verdicts):
        model_config = ConfigDict(json_schema_extra=lambda schema: _replace(schema, _verdicts_schema(count)))

        @field_validator("verdicts", mode="before")
        @classmethod
        def _readable(cls, value: object) -> list[Verdict]:
            if not isinstance(value, list):
                raise ValueError("must be a list")
            found: dict[int, Verdict] = {}
            problems: list[str] = []
            for number, item in _bound(value[: 4 * count], titles, problems):
                verdict = _one_of(item, number, problems)
                if verdict is not None and found.setdefault(number, verdict).grade != verdict.grade:
                    problems.append(f"criterion {number} has two grades")
            if not problems:
                missing = [number for number in range(1, count + 1) if number not in found]
                problems = [f"criterion {number} has no verdict" for number in missing]
            if problems:
                raise ValueError("; ".join(problems[:5]))
            return [found[number] for number in sorted(found)]

    return Listed


def _bound(
    items: Sequence[object], titles: Sequence[str], problems: list[str]
) -> list[tuple[int, Mapping[str, object]]]:
    """Pair each verdict with the number of its criterion; none, and a line in ``problems``, if that is unclear."""
    verdicts = [item for item in items if isinstance(item, Mapping)]
    numbers = [_number(item.get("number"), len(titles)) for item in verdicts]
    named = [_titled(item, titles) for item in verdicts]
    is_numbered = set(numbers) == set(range(1, len(titles) + 1))
    is_named = bool(verdicts) and len(verdicts) == len(items) and None not in named
    if len(verdicts) < len(items) or not (is_named or None not in numbers):
        problems.append(f"a verdict has no number from 1 to {len(titles)}")
    elif (is_numbered or not is_named) and any(name not in (None, at) for name, at in zip(named, numbers, strict=True)):
        problems.append("the number of a verdict is not that of its title")
    else:
        places = named if is_named else numbers
        return [(place, item) for place, item in zip(places, verdicts, strict=True) if place is not None]
    return []


def _number(value: object, count: int) -> int | None:
    if isinstance(value, str):
        value = int(value) if value.strip().isdecimal() and len(value) < 10 else None
    if isinstance(value, bool) or not isinstance(value, int | float) or value not in range(1, count + 1):
        return None
    return int(value)


def _titled(item: Mapping[str, object], titles: Sequence[str]) -> int | None:
    """The number of the criterion whose title a verdict states; None without a title, or if several have it."""
    plain = [_plain_title(title) for title in titles]
    stated = [_plain_title(item[key]) for key in _TITLE_KEYS if isinstance(item.get(key), str)]
    found = {plain.index(title) + 1 for title in stated if plain.count(title) == 1}
    return found.pop() if len(found) == 1 else None


def _plain_title(title: object) -> str:
    return " ".join(str(title).split()).rstrip(".:").casefold()


def _one_of(item: Mapping[str, object], number: int, problems: list[str]) -> Verdict | None:
    """Read a verdict; None, and a line in ``problems``, if that fails."""
    try:
        return Verdict.model_validate({**item, "number": number})
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        said = first["msg"].removeprefix("Value error, ")
        problems.append(f"criterion {number}: {'.'.join(map(str, first['loc']))}: {said}")
        return None


def read_grades(
    answers: Sequence[Answer], number_of_criteria: int, *, one_call: bool
) -> list[tuple[float | None, str]]:
    """Read each criterion's grade, in [0, 1], and the judge's reason.

    Args:
        answers: to the questions of :func:`explicit_questions`, in their order.
        number_of_criteria: how many were asked about.
        one_call: as they were asked.

    Returns:
        (grade, reason) for each criterion, or (None, failure word) without a grade. A missing grade is never 0. A
        failure that a response can provoke (:data:`rolltune.rewards.judges.judge.PROVOKED`) leaves no grade at all: if
        only its criterion were left out, a response could gain by making a grade against it unreadable.
    """
    assert len(answers) == (1 if one_call else number_of_criteria), (len(answers), number_of_criteria, one_call)
    failures = [answer.failure or "judge_unparseable" for answer in answers if answer.value is None]
    if provoked := [failure for failure in failures if failure in PROVOKED]:
        return [(None, provoked[0])] * number_of_criteria
    if not one_call:
        return [
            (answer.value.grade, answer.value.reason)
            if isinstance(answer.value, Verdict)
            else (None, answer.failure or "judge_unparseable")
            for answer in answers
        ]
    value = answers[0].value
    if not isinstance(value, Verdicts) or len(value.verdicts) != number_of_criteria:
        return [(None, failures[0] if failures else "judge_unparseable")] * number_of_criteria
    return [(verdict.grade, verdict.reason) for verdict in value.verdicts]


def _replace(schema: dict[str, Any], by: dict[str, Any]) -> None:
    schema.clear()
    schema.update(by)


def _object(**properties: dict[str, Any]) -> dict[str, Any]:
    """A schema that strict servers accept: all keys required, in order, and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


_RATING_SCHEMA = _object(
    reason={"type": "string"},
    rating={"type": "integer", "enum": list(range(LOWEST_RATING, HIGHEST_RATING + 1))},
)


_PREFERENCE_SCHEMA = _object(
    reason={"type": "string"}, better={"type": "string", "enum": ["first", "second", "neither"]}
)


_VERDICT_SCHEMA = _object(reason={"type": "string"}, grade={"type": "integer", "enum": [0, 1]})


def _verdicts_schema(count: int) -> dict[str, Any]:
    verdict = _object(
        number={"type": "integer", "enum": list(range(1, count + 1))},
        reason={"type": "string"},
        grade={"type": "integer", "enum": [0, 1]},
    )
    return _object(verdicts={"type": "array", "items": verdict, "minItems": count, "maxItems": count})
