"""Several judges that grade the same response."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Sequence
from typing import Literal, Self, get_args

from rolltune.config.components import instantiate
from rolltune.config.schema import Component
from rolltune.errors import ConfigError
from rolltune.rewards.judges.judge import Answer, Judge, JudgeStopped, Question

Combine = Literal["mean", "majority"]


class Panel:
    """Judges that are asked the same questions, and the rule that combines their grades.

    Example:
        >>> panel = Panel([small_judge, other_judge, third_judge], combine="majority")  # doctest: +SKIP
        >>> answers = await panel.ask(question)  # one from each judge  # doctest: +SKIP
        >>> panel.combined([read_grades([answer], 5, one_call=True) for answer in answers])  # doctest: +SKIP

    Args:
        judges: at least one. Judges of different vendors share fewer blind spots.
        combine: "mean", or "majority": the grade that more than half of the judges with a grade agree on.
        quorum: judges that must have graded a criterion; with fewer it is unscored. None: more than half of all.

    Raises:
        ValueError: no judge, two judges of one name, an unknown rule, or a quorum that cannot be met.
    """

    def __init__(self, judges: Sequence[Judge], *, combine: Combine = "mean", quorum: int | None = None) -> None:
        if not judges:
            raise ValueError("judges: the list is empty; give at least one judge")
        names = [judge.name for judge in judges]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"judges: {repeated[0]} is listed twice, so it would vote twice; remove one")
        if combine not in get_args(Combine):
            raise ValueError(f"combine: {combine!r} is unknown; use one of {', '.join(get_args(Combine))}")
        quorum = len(judges) // 2 + 1 if quorum is None else quorum
        if not 1 <= quorum <= len(judges):
            raise ValueError(f"quorum: {quorum}; must be in 1 .. {len(judges)}, the number of judges")
        self.judges = tuple(judges)
        self.combine: Combine = combine
        self.quorum = quorum

    @classmethod
    def from_nodes(cls, nodes: Sequence[Component], *, combine: Combine, quorum: int | None) -> Self:
        """Build the judges that a config names.

        Raises:
            ValueError: as for the class; or a judge refuses its arguments, which the message names as
                ``judges[0].temperature``.
        """
        judges = []
        for i, node in enumerate(nodes):
            try:
                judges.append(instantiate(node))
            except ConfigError as error:
                problem = error.problems[0].removeprefix(node["_component_"]).removeprefix(": ")
                raise ValueError(f"judges[{i}].{problem}") from error
        return cls(judges, combine=combine, quorum=quorum)

    @property
    def stop_reason(self) -> str | None:
        """Why a quorum cannot be met any more; None while it can."""
        reasons = [judge.stop_reason for judge in self.judges if judge.stop_reason is not None]
        return "; ".join(reasons) if len(self.judges) - len(reasons) < self.quorum else None

    async def ask(self, question: Question) -> tuple[Answer, ...]:
        """Return each judge's answer, in the judges' order.

        Raises:
            JudgeStopped: a judge refuses every question, whatever the quorum: somebody has to fix its key or model.
        """
        return tuple(await asyncio.gather(*(_ask(judge, question) for judge in self.judges)))

    def combined(self, grades: Sequence[Sequence[float | None]]) -> list[float | None]:
        """Combine the judges' grades; see :func:`combine_grades`."""
        return combine_grades(grades, combine=self.combine, quorum=self.quorum)


async def _ask(judge: Judge, question: Question) -> Answer:
    try:
        return await judge.ask(question)
    except ValueError as error:
        raise JudgeStopped(str(error)) from error


def combine_grades(grades: Sequence[Sequence[float | None]], *, combine: Combine, quorum: int) -> list[float | None]:
    """Combine several judges' grades into one grade for each criterion.

    A missing grade is ignored, and never counts as a low one. The result is None, which leaves the criterion out of the
    weighted mean, when fewer than ``quorum`` judges gave a grade, or when "majority" finds no grade that more than half
    of the judges with a grade agree on (a tie, for example).

    Example:
        >>> combine_grades([[1.0, 0.0], [1.0, None], [0.0, 1.0]], combine="majority", quorum=2)
        [1.0, None]

    Args:
        grades: [judges][criteria].
        combine: as for :class:`Panel`.
        quorum: as for :class:`Panel`.
    """
    combined: list[float | None] = []
    for given in zip(*grades, strict=True):
        known = [grade for grade in given if grade is not None]
        if len(known) < quorum:
            combined.append(None)
        elif combine == "mean":
            combined.append(statistics.fmean(known))
        else:
            grade = statistics.mode(known)
            combined.append(grade if 2 * known.count(grade) > len(known) else None)
    return combined
