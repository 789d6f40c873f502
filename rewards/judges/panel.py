"""Several judges for one verdict."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Sequence
from typing import Literal, get_args

from rolltune.rewards.judges.judge import Answer, Judge, JudgeStopped, Question

Combine = Literal["mean", "majority"]


class Panel:
    """Judges that are asked the same, and the rule by which their grades become one.

    Example:
        >>> panel = Panel([small_judge, other_judge, third_judge], combine="majority")
        >>> answers = await panel.ask(question)  # one of each judge
        >>> panel.combined([read_grades([answer], 5, one_call=True) for answer in answers])

    Args:
        judges: at least one; judges of different makers share fewer blind spots.
        combine: "mean", or "majority" for the grade that more than half of those that graded agree on.
        quorum: judges that have to have graded a criterion; fewer leave it unscored. None: more than half of them.

    Raises:
        ValueError: no judge, two of the same name, an unknown rule, or a quorum that cannot be met.
    """

    def __init__(self, judges: Sequence[Judge], *, combine: Combine = "mean", quorum: int | None = None) -> None:
        if not judges:
            raise ValueError("judges: there is none; give one at least")
        names = [judge.name for judge in judges]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"judges: {twice[0]} stands there twice, and would vote twice; leave one out")
        if combine not in get_args(Combine):
            raise ValueError(f"combine: {combine!r} is unknown; there are {', '.join(get_args(Combine))}")
        quorum = len(judges) // 2 + 1 if quorum is None else quorum
        if not 1 <= quorum <= len(judges):
            raise ValueError(f"quorum: {quorum}; must be in 1 .. {len(judges)}, the number of judges")
        self.judges = tuple(judges)
        self.combine: Combine = combine
        self.quorum = quorum

    @property
    def name(self) -> str:
        return f"{self.combine} of {', '.join(judge.name for judge in self.judges)}"

    @property
    def stop_reason(self) -> str | None:
        """Why there can be no quorum any more; None as long as there can."""
        reasons = [judge.stop_reason for judge in self.judges if judge.stop_reason is not None]
        return "; ".join(reasons) if len(self.judges) - len(reasons) < self.quorum else None

    async def ask(self, question: Question) -> tuple[Answer, ...]:
        """Each judge's answer, in the judges' order.

        Raises:
            JudgeStopped: one of them can answer no question any more, whatever the quorum: what it lacks (a key, a
                model) is for people to mend.
        """
        return tuple(await asyncio.gather(*(_ask(judge, question) for judge in self.judges)))

    def combined(self, grades: Sequence[Sequence[float | None]]) -> list[float | None]:
        """One grade for each criterion; see :func:`combine_grades`."""
        return combine_grades(grades, combine=self.combine, quorum=self.quorum)

    def metrics(self) -> dict[str, float]:
        """The judges' totals, summed."""
        total: dict[str, float] = {}
        for judge in self.judges:
            for name, value in judge.metrics().items():
                total[name] = total.get(name, 0.0) + value
        return total

    async def aclose(self) -> None:
        for judge in self.judges:
            await judge.aclose()


async def _ask(judge: Judge, question: Question) -> Answer:
    try:
        return await judge.ask(question)
    except ValueError as error:
        raise JudgeStopped(str(error)) from error


def combine_grades(grades: Sequence[Sequence[float | None]], *, combine: Combine, quorum: int) -> list[float | None]:
    """One grade for each criterion from the grades of several judges.

    A judge without a grade is left out, never counted as a low one. Where fewer than ``quorum`` have one, and for
    "majority" where no grade is given by more than half of those that have one (a tie above all), there is none: the
    panel does not know, and an unscored criterion leaves the mean.

    Example:
        >>> combine_grades([[1.0, 0.0], [1.0, None], [0.0, 1.0]], combine="majority", quorum=2)
        [1.0, None]

    Args:
        grades: of each judge, for each criterion.
        combine: as for :class:`Panel`.
        quorum: the same.
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
