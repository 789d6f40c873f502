"""A rubric as a reward by comparison with the other responses of the group (Kimi K2, arXiv 2507.20534, 3.2.2)."""

from __future__ import annotations

import asyncio
import statistics
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from rolltune.config.schema import Component
from rolltune.rewards.judges.delimit import MAX_CHARS
from rolltune.rewards.judges.judge import Answer, Question
from rolltune.rewards.judges.panel import Combine, Panel
from rolltune.rewards.judges.pool import JudgePool
from rolltune.rewards.rubric.degenerate import DEGENERATE, is_degenerate
from rolltune.rewards.rubric.questions import Preference, pairwise_question
from rolltune.rewards.rubric.schema import check_category_weights
from rolltune.rewards.rubric.templates import load_prompt
from rolltune.types import Problem, Score


@dataclass(frozen=True, slots=True)
class _Match:
    """The outcome of one comparison.

    Attributes:
        result: the first response's: 1 won, 0.5 drawn, 0 lost; None undecided.
        note: the judges' reasons, or why it is undecided.
    """

    result: float | None
    note: str


@dataclass(eq=False)
class _Contender:
    """A response of a group with its comparisons.

    Attributes:
        problem_id: whose group.
        text: the response.
        matches: (comparison, whether the response is the second one in it).
    """

    problem_id: str
    text: str
    matches: list[tuple[Future[_Match], bool]] = field(default_factory=list)


class PairwiseReward:
    """The share of its group's other responses that a response beats, in [0, 1], by the problem's rubric.

    Judges see each pair in both orders. A judge whose preference changes with the order has drawn, so a preference for
    the first place does not enter the reward. A pair without a verdict in both orders is left out. A response with less
    than ``min_scored`` of its pairs decided is unscored. A response that says nothing loses to every other response,
    and no judge is asked.

    K2 compares with its own policy as the critic; :class:`~rolltune.rewards.judges.policy.PolicyJudge` does that. The
    reward is relative, so it cannot show whether the policy improves: use another measure for ``eval``.

    A group of G responses costs G (G - 1) questions for each judge.

    Args:
        judges: nodes of one or more judges.
        combine: how several judges' results are combined: "mean" or "majority".
        quorum: judges that must have decided; None: more than half.
        category_weights: replace the paper's weights, which the judge is shown.
        min_scored: share of a response's pairs that must be decided, in (0, 1].
        template: file that replaces the packaged prompt.
        wait_seconds: seconds that answers are waited for after the last response was sampled.
        max_chars: characters that the judge is shown of each response, and of each other text.

    Raises:
        ValueError: an argument is out of range.
    """

    full_marks = None

    def __init__(
        self,
        *,
        judges: list[Component],
        combine: Combine = "mean",
        quorum: int | None = None,
        category_weights: dict[str, float] | None = None,
        min_scored: float = 0.5,
        template: str | None = None,
        wait_seconds: float = 300.0,
        max_chars: int = MAX_CHARS,
    ) -> None:
        if not 0 < min_scored <= 1:
            raise ValueError(f"min_scored: {min_scored}; must be in (0, 1]")
        if max_chars < 100:
            raise ValueError(f"max_chars: {max_chars}; must be >= 100")
        if not wait_seconds > 0:
            raise ValueError(f"wait_seconds: {wait_seconds}; must be > 0")
        self._weights = check_category_weights(category_weights or {})
        self._min_scored = min_scored
        self._template = None if template is None else load_prompt(template, "pairwise")
        self._wait_seconds = wait_seconds
        self._max_chars = max_chars
        self._panel = Panel.from_nodes(judges, combine=combine, quorum=quorum)
        self._groups: dict[str, list[_Contender]] = {}
        self._pool: JudgePool | None = None
        self._key = ""

    def check(self, problems: Sequence[Problem]) -> None:
        """Raise ValueError if a problem has no rubric."""
        for problem in problems:
            if problem.rubric is None:
                raise ValueError(f"data: {problem.id} has no rubric, which PairwiseReward compares responses by")

    def join(self, pool: JudgePool, key: str, problem: Problem) -> None:
        """Register the judges; see :class:`rolltune.rewards.combine.JudgedReward`."""
        question = self._question(problem, "I do not know.", "No idea.")
        pool.add(key, self._panel, smoke_question=question, wait_seconds=self._wait_seconds)
        self._pool, self._key = pool, key

    def __call__(self, problem: Problem, text: str) -> Score:
        """Return an unscored Score: a single response has nothing to be compared with."""
        return self.finish(self.begin(problem, text))

    def begin(self, problem: Problem, text: str) -> _Contender:
        """Start comparing a response with those of its group that are there.

        The responses to a problem that are begun before the first :meth:`finish` are a group.
        """
        assert self._pool is not None, "join() comes first"
        contender, group = _Contender(problem.id, text), self._groups.setdefault(problem.id, [])
        for other in group:
            match = self._pool.submit(self._compare(problem, other.text, text))
            other.matches.append((match, False))
            contender.matches.append((match, True))
        group.append(contender)
        return contender

    def finish(self, pending: _Contender) -> Score:
        """Wait for all comparisons of a response, including those with responses begun after it."""
        assert self._pool is not None
        self._groups.pop(pending.problem_id, None)  # the next response to this problem starts another group
        results: list[float] = []
        failures: Counter[str] = Counter()
        notes: dict[str, str] = {}
        for number, (future, is_second) in enumerate(pending.matches, start=1):
            match = self._pool.wait(self._key, future, lambda failure: _Match(None, failure))
            if match.result is None:
                failures[match.note] += 1
            else:
                results.append(1 - match.result if is_second else match.result)
            notes[f"match_{number}"] = f"{'undecided' if match.result is None else results[-1]}: {match.note}"
        share = len(results) / len(pending.matches) if pending.matches else 0.0
        is_scored = bool(results) and share >= self._min_scored
        return Score(
            total=statistics.fmean(results) if is_scored else None,
            parts={"scored_share": share},
            failure=None if is_scored else (failures.most_common(1)[0][0] if failures else "alone"),
            notes=notes,
        )

    async def _compare(self, problem: Problem, first: str, second: str) -> _Match:
        say_nothing = (is_degenerate(first), is_degenerate(second))
        if any(say_nothing):
            return _Match(0.5 if all(say_nothing) else float(say_nothing[1]), DEGENERATE)
        forth, back = await asyncio.gather(
            self._panel.ask(self._question(problem, first, second)),
            self._panel.ask(self._question(problem, second, first)),
        )
        by_judge = [_both_orders(*answers) for answers in zip(forth, back, strict=True)]
        (result,) = self._panel.combined([[match.result] for match in by_judge])
        judges = [answer.judge for answer in forth]
        if result is None:
            return _Match(None, next((m.note for m in by_judge if m.result is None), "judge_disagrees"))
        return _Match(result, " | ".join(f"{judge}: {m.note}" for judge, m in zip(judges, by_judge, strict=True)))

    def _question(self, problem: Problem, first: str, second: str) -> Question:
        assert problem.rubric is not None, "check() comes first"
        return pairwise_question(
            problem,
            first,
            second,
            problem.rubric.merged(self._weights).criteria,
            category_weights=self._weights,
            template=self._template,
            max_chars=self._max_chars,
        )


def _both_orders(forth: Answer, back: Answer) -> _Match:
    """One judge's result for the first response, from the questions with it first and with it second."""
    for answer in (forth, back):
        if not isinstance(answer.value, Preference):
            return _Match(None, answer.failure or "judge_unparseable")
    assert isinstance(forth.value, Preference) and isinstance(back.value, Preference)
    points = {"first": 1.0, "neither": 0.5, "second": 0.0}
    # Won in one order and lost in the other is a draw: the judge preferred a place, not a response.
    result = (points[forth.value.better] + 1 - points[back.value.better]) / 2
    return _Match(result, f"{forth.value.reason} / {back.value.reason}")
