"""Agreement between two counts of behaviours, and traces counted by hand to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rolltune.behaviours.counter import BEHAVIOURS, BehaviourCounts

LABELLED = Path(__file__).parents[1] / "data" / "behaviours_labelled.jsonl"

# --- agreement --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """Agreement on one behaviour over many texts. A text shows a behaviour if its count is above 0.

    None stands for 0 / 0: one side finds the behaviour in no text or, for kappa, both sides give all texts the same
    verdict.

    Attributes:
        precision: share of the texts with a positive prediction whose label is positive.
        recall: share of the texts with a positive label whose prediction is positive.
        kappa: Cohen's kappa of which texts show the behaviour: 0 for agreement by chance, 1 for full agreement.
        count_precision: precision over single occurrences; the smaller count of each text counts as agreed.
        count_recall: recall over single occurrences, likewise.
    """

    precision: float | None
    recall: float | None
    kappa: float | None
    count_precision: float | None
    count_recall: float | None


def agreement(predicted: Sequence[BehaviourCounts], labelled: Sequence[BehaviourCounts]) -> dict[str, Agreement]:
    """Compute the agreement on each behaviour, by name.

    Example:
        >>> found = agreement([BehaviourCounts(verification=4)], [BehaviourCounts(verification=3)])
        >>> found["verification"].count_precision
        0.75

    Args:
        predicted: predicted counts of some texts.
        labelled: labelled counts of the same texts in the same order.

    Raises:
        ValueError: no texts, or different numbers of them.
    """
    if len(predicted) != len(labelled) or not predicted:
        raise ValueError(
            f"agreement: {len(predicted)} predicted and {len(labelled)} labelled counts; they must be equally many, "
            "and more than 0"
        )
    return {
        name: _agreement([getattr(p, name) for p in predicted], [getattr(label, name) for label in labelled])
        for name in BEHAVIOURS
    }


def _agreement(predicted: Sequence[int], labelled: Sequence[int]) -> Agreement:
    pairs = list(zip(predicted, labelled, strict=True))
    texts = len(pairs)
    shown_by_both = sum(p > 0 and label > 0 for p, label in pairs)
    shown_predicted = sum(p > 0 for p in predicted)
    shown_labelled = sum(label > 0 for label in labelled)
    same = sum((p > 0) == (label > 0) for p, label in pairs)
    by_chance = shown_predicted * shown_labelled + (texts - shown_predicted) * (texts - shown_labelled)
    agreed = sum(min(pair) for pair in pairs)
    return Agreement(
        precision=_share(shown_by_both, shown_predicted),
        recall=_share(shown_by_both, shown_labelled),
        kappa=_share(same * texts - by_chance, texts * texts - by_chance),
        count_precision=_share(agreed, sum(predicted)),
        count_recall=_share(agreed, sum(labelled)),
    )


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


# --- labelled traces --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledTrace:
    """A text counted by hand, by the definitions of :class:`rolltune.behaviours.BehaviourCounts`.

    Attributes:
        id: unique id that begins with the task, such as "countdown", or with "prose" for text without a task.
        split: "test" texts were not used to develop :func:`rolltune.behaviours.count_behaviours`.
        text: text written for this file in the style of a model.
        counts: number of occurrences, each counted once, whatever its length; an announced check and its result are
            one.
        note: reason for counts that are not obvious.
    """

    id: str
    split: Literal["dev", "test"]
    text: str
    counts: BehaviourCounts
    note: str = ""


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class _Counts(_Strict):
    verification: int = Field(ge=0)
    backtracking: int = Field(ge=0)
    subgoal_setting: int = Field(ge=0)
    backward_chaining: int = Field(ge=0)


class _Record(_Strict):
    id: str = Field(min_length=1)
    split: Literal["dev", "test"]
    text: str = Field(min_length=1)
    counts: _Counts
    note: str = ""


def labelled_traces(split: Literal["dev", "test"] | None = None, *, path: Path = LABELLED) -> list[LabelledTrace]:
    """Load the packaged traces that were counted by hand, to test a counter or a classifier.

    Args:
        split: None for both.
        path: your own file with the same keys.

    Raises:
        ValueError: a line is not a labelled trace, or an id is repeated.
    """
    traces: dict[str, LabelledTrace] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            record = _Record.model_validate_json(line)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            key = ".".join(map(str, first["loc"])) or "the line"
            raise ValueError(f"{path}:{number}: {key}: {first['msg']}") from error
        if record.id in traces:
            raise ValueError(f"{path}:{number}: the id {record.id!r} is repeated")
        counts = BehaviourCounts(**record.counts.model_dump())
        traces[record.id] = LabelledTrace(
            id=record.id, split=record.split, text=record.text, counts=counts, note=record.note
        )
    return [trace for trace in traces.values() if split in (None, trace.split)]
