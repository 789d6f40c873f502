"""How well one count of behaviours agrees with another, and traces counted by hand to compare with."""

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
    """Agreement on one behaviour over many texts. A text shows a behaviour where its count is above 0.

    None stands for 0 / 0: no text shows it by one side, or (kappa) both sides say the same of every text.

    Attributes:
        precision: of the texts that show it by the prediction, the share that do by the label.
        recall: of the texts that show it by the label, the share that do by the prediction.
        kappa: Cohen's: agreement on which texts show it, 0 for what chance gives and 1 for all.
        count_precision: the same of single occurrences; of each text the smaller count is taken as agreed on.
        count_recall: the same.
    """

    precision: float | None
    recall: float | None
    kappa: float | None
    count_precision: float | None
    count_recall: float | None


def agreement(predicted: Sequence[BehaviourCounts], labelled: Sequence[BehaviourCounts]) -> dict[str, Agreement]:
    """Agreement on each behaviour, by name.

    Example:
        >>> found = agreement([BehaviourCounts(verification=4)], [BehaviourCounts(verification=3)])
        >>> found["verification"].count_precision
        0.75

    Args:
        predicted: of some texts.
        labelled: of the same texts in the same order.

    Raises:
        ValueError: no texts, or not as many on both sides.
    """
    if len(predicted) != len(labelled) or not predicted:
        raise ValueError(
            f"agreement: {len(predicted)} predicted and {len(labelled)} labelled counts; as many of both are wanted"
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
        id: unique; begins with what is worked on, such as "countdown", or with "prose" where nothing is.
        split: "test" texts took no part in the making of :func:`rolltune.behaviours.count_behaviours`.
        text: in the wording of some model, written for this file.
        counts: each occurrence once, however many sentences it takes; an announced check and its result are one.
        note: why the counts are what they are, where one may wonder.
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


class _Row(_Strict):
    id: str = Field(min_length=1)
    split: Literal["dev", "test"]
    text: str = Field(min_length=1)
    counts: _Counts
    note: str = ""


def labelled_traces(split: Literal["dev", "test"] | None = None, *, path: Path = LABELLED) -> list[LabelledTrace]:
    """The packaged traces that were counted by hand, to try a counter or a classifier on.

    Args:
        split: None for both.
        path: a file of one's own, with the same keys.

    Raises:
        ValueError: a line is not one labelled trace, or an id stands twice.
    """
    traces: dict[str, LabelledTrace] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            row = _Row.model_validate_json(line)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            key = ".".join(map(str, first["loc"])) or "the line"
            raise ValueError(f"{path}:{number}: {key}: {first['msg']}") from error
        if row.id in traces:
            raise ValueError(f"{path}:{number}: the id {row.id!r} stands twice")
        counts = BehaviourCounts(**row.counts.model_dump())
        traces[row.id] = LabelledTrace(id=row.id, split=row.split, text=row.text, counts=counts, note=row.note)
    return [trace for trace in traces.values() if split in (None, trace.split)]
