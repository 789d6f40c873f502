"""Rubrics: lists of criteria, each with a weight and a direction."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

Category = Literal["essential", "important", "optional", "pitfall"]
CATEGORIES: tuple[Category, ...] = get_args(Category)
# Rubrics as Rewards (arXiv 2507.17746v2), section 4: explicit aggregation.
CATEGORY_WEIGHTS: Mapping[Category, float] = {"essential": 1.0, "important": 0.7, "optional": 0.3, "pitfall": 0.9}

_Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
_LARGEST_WEIGHT = 1e6


class Criterion(BaseModel):
    """One thing that a response does or does not do.

    The weight says how much it matters, the direction whether doing it is good. A negative weight is the same as its
    absolute value with ``satisfied_is_good: false``. Both at once would be a double negation and are refused.

    Example:
        >>> Criterion(title="Unit", description="States the result in metres.", category="essential").is_good
        True

    Attributes:
        title: two to four words; part of the name of the criterion's curve.
        description: one sentence to judge by, understandable without the other criteria.
        category: gives the weight if there is no number; otherwise it only groups curves.
        weight: a number other than 0, negative if satisfying the criterion is bad; None: by category.
        satisfied_is_good: the direction. A pitfall must state it, here or by a negative weight, since data sets have
            both kinds: "Does not mention x" is good when satisfied, "Recommends x" is not.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: _Text
    description: _Text
    category: Category | None = None
    weight: Annotated[float, Field(ge=-_LARGEST_WEIGHT, le=_LARGEST_WEIGHT, allow_inf_nan=False)] | None = None
    satisfied_is_good: bool | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.weight is None and self.category is None:
            raise ValueError(f"{self.title!r} has neither a category nor a weight; give one of them")
        if self.weight == 0:
            raise ValueError(f"{self.title!r} has weight 0, so judging it has no effect; remove it")
        if self.weight is not None and self.weight < 0 and self.satisfied_is_good is not None:
            raise ValueError(
                f"{self.title!r} has the weight {self.weight:g} and satisfied_is_good "
                f"{str(self.satisfied_is_good).lower()}; a negative weight already means that: give one of them"
            )
        if self.category not in (None, "pitfall") and self.weight is not None and self.weight < 0:
            raise ValueError(
                f"{self.title!r} is {self.category} and has the weight {self.weight:g}, which makes it bad to satisfy; "
                "give it a weight above 0, or category: pitfall"
            )
        if self.category == "pitfall" and (self.weight or 0) >= 0 and self.satisfied_is_good is None:
            raise ValueError(
                f"{self.title!r} is a pitfall without satisfied_is_good: true for 'Avoids ...', false for 'Does ...'"
            )
        return self

    @property
    def is_good(self) -> bool:
        """Whether satisfying it raises the reward."""
        if self.weight is not None and self.weight < 0:
            return False
        return self.satisfied_is_good is not False

    def magnitude(self, category_weights: Mapping[Category, float] = CATEGORY_WEIGHTS) -> float:
        """The absolute weight, > 0 for both directions."""
        if self.weight is not None:
            return abs(self.weight)
        assert self.category is not None
        return category_weights[self.category]

    @property
    def key(self) -> str:
        """The description without differences in spaces, character width and the punctuation at its end.

        Case, signs and symbols stay: "x > 3" and "x < 3", or "5 mW" and "5 MW", are different criteria.
        """
        text = unicodedata.normalize("NFC", self.description)
        text = "".join(unicodedata.normalize("NFKC", c) if unicodedata.east_asian_width(c) in "FH" else c for c in text)
        return " ".join(text.split()).rstrip(" .\u3002")


class Rubric(BaseModel):
    """The criteria that one problem's responses are judged by.

    Attributes:
        criteria: at least one. Their number does not affect the reward, which is a weighted mean.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    criteria: Annotated[tuple[Criterion, ...], Field(min_length=1, max_length=100)]

    @classmethod
    def of(cls, *criteria: Criterion) -> Self:
        return cls(criteria=criteria)

    @property
    def rewards_silence(self) -> bool:
        """Whether it lists pitfalls only, so that a response that does nothing earns full marks."""
        return all(criterion.category == "pitfall" or not criterion.is_good for criterion in self.criteria)

    def merged(self, category_weights: Mapping[Category, float] = CATEGORY_WEIGHTS) -> Self:
        """Merge repeated criteria: of those with the same text and direction, keep the heaviest, in the first one's
        place.

        A repeated criterion would count twice in the weighted mean.
        """
        heaviest: dict[tuple[str, bool], Criterion] = {}
        for criterion in self.criteria:
            name = (criterion.key, criterion.is_good)
            kept = heaviest.get(name)
            if kept is None or criterion.magnitude(category_weights) > kept.magnitude(category_weights):
                heaviest[name] = criterion  # a dict keeps the first one's place
        return type(self)(criteria=tuple(heaviest.values()))


def check_category_weights(weights: Mapping[str, float]) -> dict[Category, float]:
    """Return the paper's weights, replaced by those in ``weights``.

    Raises:
        ValueError: an unknown category, or a weight that is not > 0.
    """
    for name, weight in weights.items():
        if name not in CATEGORIES:
            raise ValueError(f"category_weights.{name}: unknown; use {', '.join(CATEGORIES)}")
        if not 0 < weight < math.inf:
            raise ValueError(f"category_weights.{name}: {weight}; must be > 0 (each criterion has its own direction)")
    return {name: weights.get(name, default) for name, default in CATEGORY_WEIGHTS.items()}


def slugs(criteria: Sequence[Criterion]) -> list[str]:
    """Name each criterion's curve: its title in snake_case, with a number if the rubric has the title already.

    Two titles never share a name. A title that snake_case does not keep whole ("x > 3", a long one) gets a hash of it.

    Example:
        >>> slugs([Criterion(title=title, description="d", category="optional") for title in ("Right Unit", "x > 3")])
        ['right_unit', 'x_3.58760d16']
    """
    names: list[str] = []
    for criterion in criteria:
        title = " ".join(unicodedata.normalize("NFC", criterion.title).casefold().split())
        words = re.findall(r"[^\W_]+", title)
        stem = "_".join(words)[:40] or "criterion"
        if stem.replace("_", " ") != title:
            stem += f".{hashlib.sha256(title.encode(errors='replace')).hexdigest()[:8]}"
        numbered = (stem if i == 1 else f"{stem}.{i}" for i in itertools.count(1))
        names.append(next(name for name in numbered if name not in names))
    return names
