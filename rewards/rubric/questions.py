"""Questions about a response, and the grades in what comes back.

Explicit questions (Rubrics as Rewards, arXiv 2507.17746v2, section 4) have each criterion graded by itself, all of them
in one call or each in a call of its own. The implicit one has the whole rubric weighed by the judge, in a rating from 1
to 10; Likert questions are the paper's baselines without a rubric.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from rolltune.rewards.judges.delimit import MAX_CHARS, delimited
from rolltune.rewards.judges.judge import Answer, Question
from rolltune.rewards.rubric.schema import CATEGORY_WEIGHTS, Category, Criterion
from rolltune.rewards.rubric.templates import JudgePrompt, Kind, packaged_prompt
from rolltune.seeding import derive_seed
from rolltune.types import Problem

LOWEST_RATING, HIGHEST_RATING = 1, 10
_MAX_REASON_CHARS = 1000
_MAX_LEVELS = 11
_Reason = Annotated[str, AfterValidator(lambda text: text[:_MAX_REASON_CHARS])]


class Verdict(BaseModel):
    """A judge's grade of one criterion.

    Attributes:
        number: of the criterion, from 1.
        reason: at most 1,000 characters of it.
        grade: 0 .. 1. What a judge writes is a whole number of levels, see :func:`verdict_schema`.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    number: int = 1
    reason: _Reason = ""
    grade: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class Verdicts(BaseModel):
    """A judge's grades of the criteria of one question."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    verdicts: list[Verdict]


class Rating(BaseModel):
    """A judge's rating of a response as a whole."""

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
    """Which of two responses a judge finds better."""

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
    levels: int = 2,
    with_reference: bool = False,
    shuffle: bool = False,
    template: JudgePrompt | None = None,
    max_chars: int = MAX_CHARS,
) -> list[Question]:
    """What has a judge grade each criterion of a response.

    Example:
        >>> len(explicit_questions(problem, "4", rubric.criteria, one_call=True))
        1

    Args:
        problem: whose messages are shown, and with ``with_reference`` its answer.
        text: the response.
        criteria: those that are graded. Neither weights nor directions are shown: a judge says what is, not what it
            is worth.
        one_call: all criteria in one question; else a question for each, in their order.
        levels: 2 for pass and fail; n for whole grades 0 .. n - 1, which are read as k / (n - 1). At most 11.
        with_reference: show the problem's answer (and its solution where there is one) as a reference.
        shuffle: list the criteria in an order drawn from the response, so that no criterion always stands first.
            They keep their numbers. Of no effect where each has its own question.
        template: in the packaged one's place, of kind "explicit" for ``one_call``, else "explicit_one".
        max_chars: of the response, and of each other text; what is longer is cut in its middle, and says so.

    Raises:
        ValueError: ``levels`` is out of range; ``with_reference`` without a reference, or with a prompt that does not
            show it.
    """
    assert criteria
    check_levels(levels)
    prompt = _prompt(template, "explicit" if one_call else "explicit_one", with_reference)
    values = _shown(problem, text, with_reference, max_chars) | {"grades": _grades(levels)}
    numbered = [f"{number}. {_item(criterion)}" for number, criterion in enumerate(criteria, start=1)]
    if not one_call:
        answer = verdict_schema(levels)
        asked = [_delimited_list([_item(criterion)], "criterion", max_chars) for criterion in criteria]
        return [
            Question(messages=prompt.messages(**values, criteria=shown, count="1"), answer=answer) for shown in asked
        ]
    if shuffle:
        _by(problem, text).shuffle(numbered)
    shown = _delimited_list(numbered, "criteria", max_chars)
    messages = prompt.messages(**values, criteria=shown, count=str(len(criteria)))
    return [Question(messages=messages, answer=verdicts_schema(len(criteria), levels))]


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
    """What has a judge weigh the whole rubric and rate the response from 1 to 10; the answer is a :class:`Rating`.

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


def likert_question(
    problem: Problem,
    text: str,
    *,
    with_reference: bool,
    template: JudgePrompt | None = None,
    max_chars: int = MAX_CHARS,
) -> Question:
    """What has a judge rate a response from 1 to 10 without a rubric; the answer is a :class:`Rating`.

    Arguments and errors as for :func:`explicit_questions`; the prompt is of kind "likert", or "reference_likert" where
    the reference is shown.
    """
    prompt = _prompt(template, "reference_likert" if with_reference else "likert", with_reference)
    return Question(messages=prompt.messages(**_shown(problem, text, with_reference, max_chars)), answer=Rating)


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
    """What has a judge say which of two responses is better by the whole rubric; the answer is a :class:`Preference`.

    Judges prefer what stands first, or last; ask again with the two changed about. Arguments as for
    :func:`implicit_question`.
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
    """Draws the order of the criteria."""
    whole = text.encode(errors="backslashreplace").decode()  # of half a surrogate pair there is no hash
    return random.Random(derive_seed("criteria", problem.id, whole))


def check_levels(levels: int) -> None:
    """Raises ValueError where a grade cannot have so many levels."""
    if not 2 <= levels <= _MAX_LEVELS:
        raise ValueError(f"levels: {levels}; must be 2 (pass or fail) .. {_MAX_LEVELS}")


def _prompt(template: JudgePrompt | None, kind: Kind, with_reference: bool) -> JudgePrompt:
    prompt = template or packaged_prompt(kind)
    assert prompt.kind == kind, f"a prompt of kind {prompt.kind!r} where {kind!r} is asked"
    if with_reference and not prompt.has_reference:
        raise ValueError("with_reference: true; the prompt has no ${reference} to show it in")
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
        raise ValueError(f"with_reference: true; {problem.id} has neither answer nor solution to show")
    shown = delimited("\n\n".join(known), name="reference", max_chars=max_chars)
    return f"\nA reference answer, for what is right; it is not the only way to say it:\n\n{shown}\n"


def _item(criterion: Criterion) -> str:
    """Title and description on one line, so that no criterion can look like two."""
    return " ".join(f"{criterion.title}: {criterion.description}".split())


def _delimited_list(items: Sequence[str], name: str, max_chars: int) -> str:
    # A rubric is never cut: each criterion is graded by its number.
    text = "\n".join(items)
    return delimited(text, name=name, max_chars=max(max_chars, len(text)))


def _grades(levels: int) -> str:
    if levels == 2:
        return (
            "The grade is 1 where the response satisfies the criterion and 0 where it does not. A criterion that is "
            "satisfied in part only, or perhaps, is not satisfied."
        )
    return (
        f"The grade is a whole number from 0 to {levels - 1}: 0 where the response does nothing of what the criterion "
        f"says, {levels - 1} where it does all of it, and in between by how much of it."
    )


def _stakes(criterion: Criterion, category_weights: Mapping[Category, float]) -> str:
    named = criterion.weight is None
    says = criterion.category if named else f"weight {criterion.magnitude(category_weights):g}"
    return f"{says}" if criterion.is_good else f"{says}, bad where the response does it"


# --- how it is answered -----------------------------------------------------------------------------------------------


@functools.cache
def verdict_schema(levels: int) -> type[Verdict]:
    """The form of one verdict: reason, then a whole grade 0 .. levels - 1, read as a share of the highest."""

    class Graded(Verdict):
        model_config = ConfigDict(json_schema_extra=lambda schema: _replace(schema, _verdict_schema(levels)))

        @field_validator("grade", mode="before")
        @classmethod
        def _share(cls, value: object) -> float:
            # A float that equals a whole number is one; NaN equals nothing. True and False are a pass and a fail.
            if (isinstance(value, bool) and levels > 2) or not isinstance(value, int | float):
                value = None
            if value is None or value not in range(levels):
                raise ValueError(f"must be a whole number from 0 to {levels - 1}")
            return value / (levels - 1)

    return Graded


@functools.cache
def verdicts_schema(count: int, levels: int) -> type[Verdicts]:
    """The form of the verdicts on ``count`` criteria, exactly one for each.

    Of an answer that is not whole, the verdicts that can be read stay: a criterion whose verdict is missing, does not
    fit, or is given twice with different grades has none, and the others are not touched by it. The context
    ``{"whole": True}`` refuses such an answer.
    """
    one = verdict_schema(levels)

    class Listed(Verdicts):
        model_config = ConfigDict(json_schema_extra=lambda schema: _replace(schema, _verdicts_schema(count, levels)))

        @field_validator("verdicts", mode="before")
        @classmethod
        def _readable(cls, value: object, info: ValidationInfo) -> list[Verdict]:
            if not isinstance(value, list):
                raise ValueError("must be a list")
            found: dict[int, Verdict] = {}
            problems: list[str] = []
            contradicted: set[int] = set()
            for item in value[: 4 * count]:
                verdict = _one_of(item, one, count, problems)
                if verdict is not None and found.setdefault(verdict.number, verdict).grade != verdict.grade:
                    problems.append(f"criterion {verdict.number} has two grades")
                    contradicted.add(verdict.number)
            problems += [f"criterion {number} has no verdict" for number in range(1, count + 1) if number not in found]
            kept = [found[number] for number in sorted(found) if number not in contradicted]
            if not kept or (problems and (info.context or {}).get("whole")):
                raise ValueError("; ".join(problems[:5]))
            return kept

    return Listed


def _one_of(item: object, schema: type[Verdict], count: int, problems: list[str]) -> Verdict | None:
    """A verdict on one of the criteria 1 .. count; None, and a line in ``problems``, where it is none."""
    number = item.get("number") if isinstance(item, Mapping) else None
    if isinstance(number, bool) or not isinstance(number, int | float) or number not in range(1, count + 1):
        problems.append(f"a verdict has no number from 1 to {count}")
        return None
    try:
        return schema.model_validate(item)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        said = first["msg"].removeprefix("Value error, ")
        problems.append(f"criterion {int(number)}: {'.'.join(map(str, first['loc']))}: {said}")
        return None


def read_grades(
    answers: Sequence[Answer], number_of_criteria: int, *, one_call: bool
) -> list[tuple[float | None, str]]:
    """The grade of each criterion, 0 .. 1, and the judge's reason.

    Args:
        answers: to the questions of :func:`explicit_questions`, in their order.
        number_of_criteria: that were asked about.
        one_call: as they were asked.

    Returns:
        For each criterion (grade, reason); None and why it is unscored where there is no grade. Never a 0 for a grade
        that is not there.
    """
    assert len(answers) == (1 if one_call else number_of_criteria), (len(answers), number_of_criteria, one_call)
    if not one_call:
        return [
            (answer.value.grade, answer.value.reason)
            if isinstance(answer.value, Verdict)
            else (None, answer.failure or "judge_unparseable")
            for answer in answers
        ]
    value = answers[0].value
    if not isinstance(value, Verdicts):
        return [(None, answers[0].failure or "judge_unparseable")] * number_of_criteria
    found = {verdict.number: verdict for verdict in value.verdicts}
    return [
        (found[number].grade, found[number].reason) if number in found else (None, "judge_unparseable")
        for number in range(1, number_of_criteria + 1)
    ]


def _replace(schema: dict[str, Any], by: dict[str, Any]) -> None:
    schema.clear()
    schema.update(by)


def _object(**properties: dict[str, Any]) -> dict[str, Any]:
    """A schema as strict servers want it: every key required, in order, and no other."""
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


def _verdict_schema(levels: int) -> dict[str, Any]:
    return _object(reason={"type": "string"}, grade={"type": "integer", "enum": list(range(levels))})


def _verdicts_schema(count: int, levels: int) -> dict[str, Any]:
    verdict = _object(
        number={"type": "integer", "enum": list(range(1, count + 1))},
        reason={"type": "string"},
        grade={"type": "integer", "enum": list(range(levels))},
    )
    return _object(verdicts={"type": "array", "items": verdict, "minItems": count, "maxItems": count})
