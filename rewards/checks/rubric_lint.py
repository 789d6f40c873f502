"""Lint rubrics before training on them, by their words and weights only: no model is asked.

An error is a rubric that would reward the wrong thing; a warning is one that may be weaker than it could be.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rolltune.rewards.rubric.schema import CATEGORY_WEIGHTS, Category, Criterion, Rubric
from rolltune.rewards.rubric.wording import holds_for_silence, is_doubly_negated, wording

Severity = Literal["error", "warning"]

# Rubrics as Rewards (arXiv 2507.17746v2): its writers were asked for 7 to 20 items.
FEWEST, MOST = 7, 20

_LONG_DESCRIPTION, _LONG_TITLE = 400, 80  # characters; the paper asks for one sentence and for 2-4 words
_NEAR = 0.8  # Jaccard index of two descriptions' words above which they probably say the same
_MIN_WORDS, _MIN_CHARS = 8, 40  # a criterion may contain a reference answer that is shorter than both
_COPIED_WORDS = 16
_NEGATIONS = frozenset(
    "not no never avoid avoids avoiding refrain refrains without fails fail omits does doesn".split()
)
_FILLERS = frozenset("a an the of to in on for and or that this it its is are be as by with from t s".split())
_LEFT_OUT = _NEGATIONS | _FILLERS
_ELSEWHERE = re.compile(
    r"\b(?:as|see|listed|described|mentioned|stated|noted|explained) (?:above|below)\b(?! \d)"
    r"|\babove-mentioned\b|\baforementioned\b"
    r"|\b(?:criterion|criteria|rubric item) (?:no\.? ?|#)?\d+\b"
    r"|\b(?:previous|preceding) (?:criterion|criteria)\b"
)
_REFERENCE = re.compile(r"\b(?:(?:reference|gold) (?:answer|solution|response)|(?:ideal|model) answer)\b")


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One problem of a rubric.

    Attributes:
        severity: "error" or "warning".
        rule: name of the check, in snake_case.
        rubric: id of the rubric's problem; may be empty.
        criterion: its number in the rubric, from 1; None for the rubric as a whole.
        message: the problem, with the criterion's number and title.
        mend: how to fix it.
    """

    severity: Severity
    rule: str
    rubric: str
    criterion: int | None
    message: str
    mend: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.rubric}{': ' if self.rubric else ''}{self.message}; {self.mend}"


def lint(
    rubric: Rubric,
    *,
    answer: str | None = None,
    name: str = "",
    category_weights: Mapping[Category, float] = CATEGORY_WEIGHTS,
    fewest: int = FEWEST,
    most: int = MOST,
) -> list[Finding]:
    """Return all findings of a rubric, those of single criteria first.

    Example:
        >>> rubric = Rubric.of(
        ...     Criterion(title="Tone", description="Is polite.", category="essential"),
        ...     Criterion(title="Excuse", description="Avoids an invented excuse.", weight=-1),
        ... )
        >>> print(lint(rubric, fewest=2)[0])  # doctest: +ELLIPSIS
        error: criterion 2, 'Excuse': reads as good to satisfy and is marked bad: 'Avoids an invented excuse.'; ...

    Args:
        rubric: as written, not merged.
        answer: the reference answer, to find what is copied from it.
        name: the problem's id, for the findings.
        category_weights: weights of criteria without a number.
        fewest: least number of criteria that a rubric should have.
        most: greatest number.
    """
    found: list[_Raw] = []
    for number, criterion in enumerate(rubric.criteria, start=1):
        found += _criterion_findings(criterion, number, answer)
    found += _repetitions(rubric.criteria)
    found += _counts(len(rubric.criteria), fewest, most)
    found += _weights(rubric.criteria, category_weights)
    return [
        Finding(
            severity=raw.severity,
            rule=raw.rule,
            rubric=name,
            criterion=raw.number,
            message=f"{_called(rubric.criteria, raw.number)}{raw.message}",
            mend=raw.mend,
        )
        for raw in found
    ]


@dataclass(frozen=True, slots=True)
class _Raw:
    severity: Severity
    rule: str
    number: int | None
    message: str
    mend: str


def _called(criteria: Sequence[Criterion], number: int | None) -> str:
    return "" if number is None else f"criterion {number}, {_short(criteria[number - 1].title, 40)!r}: "


def _short(text: str, chars: int = 100) -> str:
    return text if len(text) <= chars else f"{text[: chars - 3]}..."


# --- one criterion ----------------------------------------------------------------------------------------------------


def _criterion_findings(criterion: Criterion, number: int, answer: str | None) -> Iterator[_Raw]:
    text = criterion.description
    yield from _direction(criterion, number)
    if is_doubly_negated(text):
        yield _Raw(
            "warning",
            "double_negation",
            number,
            f"negates twice: {_short(text)!r}",
            "say what the response does, and give the direction by satisfied_is_good",
        )
    lowered = " ".join(text.casefold().split())
    if there := _ELSEWHERE.search(lowered):
        yield _Raw(
            "error",
            "not_self_contained",
            number,
            f"{there[0]!r} refers to something that the judge may not see",
            "repeat what is meant, since criteria are judged one by one",
        )
    if there := _REFERENCE.search(lowered):
        yield _Raw(
            "warning",
            "not_self_contained",
            number,
            f"asks for the {there[0]}, which a judge sees only if with_reference is true",
            "say which part of it the response must contain",
        )
    if answer is not None:
        yield from _copied(text, number, answer)
    if len(text) > _LONG_DESCRIPTION or len(criterion.title) > _LONG_TITLE:
        what, size = ("description", len(text)) if len(text) > _LONG_DESCRIPTION else ("title", len(criterion.title))
        yield _Raw(
            "warning",
            "long",
            number,
            f"the {what} has {size} characters",
            "one sentence that asks for one thing, under a title of two to four words",
        )


def _direction(criterion: Criterion, number: int) -> Iterator[_Raw]:
    reads = wording(criterion.description)
    stated = criterion.satisfied_is_good is not None or (criterion.weight is not None and criterion.weight < 0)
    shown = repr(_short(criterion.description))
    if reads == "good" and not criterion.is_good:
        mend = (
            f"give the weight {-criterion.weight:g}"
            if criterion.weight is not None and criterion.weight < 0
            else "give satisfied_is_good: true"
        )
        yield _Raw(
            "error",
            "polarity",
            number,
            f"reads as good to satisfy and is marked bad: {shown}",
            f"{mend}, or say what the response does wrong",
        )
    elif criterion.is_good and (reads == "bad" or (reads == "act" and criterion.category == "pitfall")):
        yield _Raw(
            "error",
            "polarity",
            number,
            f"reads as bad to satisfy and {'is marked' if stated else 'counts as'} good: {shown}",
            "give satisfied_is_good: false, or say what the response does right",
        )


def _copied(text: str, number: int, answer: str) -> Iterator[_Raw]:
    """Find copies of the reference: a criterion that repeats it asks for its words instead of its meaning."""
    words, reference = _words(text), _words(answer)
    whole = " ".join(reference)
    if len(reference) < _MIN_WORDS and len(whole) < _MIN_CHARS:
        return
    if f" {whole} " in f" {' '.join(words)} ":
        yield _Raw(
            "error",
            "answer_copied",
            number,
            "contains the whole reference answer, so it asks for these words",
            "ask for one fact of it, in other words",
        )
    elif runs := _runs(reference) & _runs(words):
        yield _Raw(
            "warning",
            "answer_copied",
            number,
            f"repeats the reference answer: {_short(' '.join(min(runs)))!r}",
            "ask for one fact of it, in other words",
        )


def _runs(words: Sequence[str]) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + _COPIED_WORDS]) for i in range(len(words) - _COPIED_WORDS + 1)}


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())


# --- criteria together ------------------------------------------------------------------------------------------------


def _repetitions(criteria: Sequence[Criterion]) -> Iterator[_Raw]:
    first: dict[str, int] = {}
    for number, criterion in enumerate(criteria, start=1):
        before = first.setdefault(criterion.key, number)
        if before == number:
            continue
        if criteria[before - 1].is_good == criterion.is_good:
            yield _Raw(
                "error",
                "repeated",
                number,
                f"says the same as criterion {before}",
                "remove it, since it would count twice",
            )
        else:
            yield _Raw(
                "error",
                "polarity",
                number,
                f"says the same as criterion {before} in the other direction, so that they cancel out",
                "remove one of them",
            )
    senses = {number: _sense(criteria[number - 1].description) for number in first.values()}
    for number, sense in senses.items():
        near = [n for n, other in senses.items() if n < number and _alike(sense, other)]
        if near:
            yield _Raw(
                "warning",
                "near_duplicate",
                number,
                f"has nearly the words of criterion {near[0]}: {_short(criteria[near[0] - 1].description)!r}",
                "merge the two, or say how they differ: one fact would count twice",
            )


def _sense(description: str) -> frozenset[str]:
    """The content words, without negations: a pitfall often mirrors another criterion."""
    kept = [word for word in _words(description) if word not in _LEFT_OUT]
    return frozenset(word.removesuffix("s") or word for word in kept)  # treats "names" and "name" as one word


def _alike(one: frozenset[str], other: frozenset[str]) -> bool:
    if {word for word in one ^ other if word[0].isdigit()}:  # "names year 1914" and "names year 1918" differ
        return False
    return len(one & other) >= _NEAR * len(one | other) > 0


def _counts(count: int, fewest: int, most: int) -> Iterator[_Raw]:
    if count == 1:
        yield _Raw(
            "error",
            "count",
            None,
            "the rubric has 1 criterion, which makes the reward one yes or no",
            f"split it into what a good response does; {fewest} to {most} are usual",
        )
    elif count < fewest:
        yield _Raw("warning", "count", None, f"the rubric has {count} criteria", f"{fewest} to {most} are usual")
    elif count > most:
        yield _Raw(
            "warning",
            "count",
            None,
            f"the rubric has {count} criteria, each of them judged for every response",
            f"merge or leave out some; {fewest} to {most} are usual",
        )


def _weights(criteria: Sequence[Criterion], category_weights: Mapping[Category, float]) -> Iterator[_Raw]:
    weights = [criterion.magnitude(category_weights) for criterion in criteria]
    total = math.fsum(weights)
    heaviest = max(range(len(weights)), key=weights.__getitem__)
    if len(weights) > 1 and weights[heaviest] > total / 2:
        yield _Raw(
            "warning",
            "weight",
            heaviest + 1,
            f"carries {weights[heaviest] / total:.0%} of the weight",
            "give it at most half, or make it a reward of its own",
        )
    mass = {
        name: math.fsum(w for w, c in zip(weights, criteria, strict=True) if c.category == name)
        for name in ("essential", "pitfall")
    }
    if mass["pitfall"] > mass["essential"]:
        yield _Raw(
            "warning",
            "weight",
            None,
            f"pitfalls carry {mass['pitfall'] / total:.0%} of the weight, essential criteria "
            f"{mass['essential'] / total:.0%}",
            "give more weight to what a response must do than to what it must avoid",
        )
    free = math.fsum(w for w, c in zip(weights, criteria, strict=True) if holds_for_silence(c.description) == c.is_good)
    if free > total / 2:
        yield _Raw(
            "error" if free == total else "warning",
            "free_marks",
            None,
            f"an empty response earns about {free / total:.0%} of the score, since it does nothing wrong",
            "add criteria for what a response must do",
        )
