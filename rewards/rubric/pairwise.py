"""A rubric as a reward by comparison: each turn against the others of its group (Kimi K2, arXiv 2507.20534, 3.2.2)."""

from __future__ import annotations

import asyncio
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rolltune.config.schema import Component
from rolltune.rewards.judges.delimit import MAX_CHARS
from rolltune.rewards.judges.judge import Answer, Question
from rolltune.rewards.judges.panel import Combine
from rolltune.rewards.judges.pool import JudgePool
from rolltune.rewards.rubric.degenerate import DEGENERATE, is_degenerate
from rolltune.rewards.rubric.questions import Preference, pairwise_question
from rolltune.rewards.rubric.schema import check_category_weights
from rolltune.rewards.rubric.templates import load_prompt
from rolltune.samplers import Sampler
from rolltune.types import Problem, Score


@dataclass(frozen=True, slots=True)
class _Match:
    """What came of one comparison.

    Attributes:
        result: of the first turn: 1 won, 0.5 drawn, 0 lost; None undecided.
        note: the judges' reasons, or why it is undecided.
    """

    result: float | None
    note: str


@dataclass(eq=False)
class _Turn:
    """A turn of a group, with its comparisons: each with whether the turn is the second one there."""

    text: str
    matches: list[tuple[Future[_Match], bool]] = field(default_factory=list)


class PairwiseReward:
    """The share of its group's other turns that a turn beats, in [0, 1], by the problem's rubric.

    Each pair is shown to the judges in both orders; a judge that changes its mind with the order has drawn, which
    takes its liking for the first place out of the reward. A pair without a verdict in both orders is left out; a
    turn of which less than ``min_scored`` of the pairs are decided is unscored. A turn that says nothing loses to every
    other without anybody being asked.

    K2 compares with its own policy as the critic: give it a
    :class:`~rolltune.rewards.judges.policy.PolicyJudge`. The reward is relative: it says nothing of whether the
    policy gets better, so hold out a measure that does (``eval``).

    A group of G turns costs G (G - 1) questions for each judge.

    Args:
        judges: nodes of judges, one or more.
        combine: of several judges: "mean" or "majority".
        quorum: judges that have to have decided; None: more than half.
        category_weights: shown to the judge in place of the paper's.
        min_scored: share of a turn's pairs that have to be decided, in (0, 1].
        template: a file in place of the packaged prompt.
        wait_seconds: how long answers are waited for after the step's last turn was sampled.
        max_chars: of a turn, and of each other text that the judge is shown.

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
            raise ValueError(f"min_scored: {min_scored}; a share in (0, 1] is wanted")
        if max_chars < 100:
            raise ValueError(f"max_chars: {max_chars}; must be >= 100")
        self._weights = check_category_weights(category_weights or {})
        self._min_scored = min_scored
        self._template = None if template is None else load_prompt(template, "pairwise")
        self._max_chars = max_chars
        self._bench = JudgePool(judges, combine=combine, quorum=quorum, wait_seconds=wait_seconds)
        self._groups: dict[str, list[_Turn]] = {}

    def check(self, problems: Sequence[Problem]) -> None:
        """Raises ValueError where a problem has no rubric."""
        for problem in problems:
            if problem.rubric is None:
                raise ValueError(f"data: {problem.id} has no rubric, which turns are compared by")

    def smoke_test(self, problem: Problem) -> None:
        """Ask each judge about two poor turns; raises ValueError where one cannot be reached, or refuses."""
        self._bench.smoke_test(self._question(problem, "I do not know.", "No idea."))

    def begin(self, problem: Problem, text: str) -> Callable[[], Score]:
        """Start comparing a turn with those of its group that are there; what is returned waits for all the others too.

        The turns that are begun before the first is waited for are a group.
        """
        turn, group = _Turn(text), self._groups.setdefault(problem.id, [])
        for other in group:
            match = self._bench.submit(self._compare(problem, other.text, turn.text))
            other.matches.append((match, False))
            turn.matches.append((match, True))
        group.append(turn)

        def finish() -> Score:
            self._groups.pop(problem.id, None)  # the next turn of this problem begins another group
            return self._score(turn)

        return finish

    def __call__(self, problem: Problem, text: str) -> Score:
        """A turn alone has nothing to be compared with: unscored."""
        return self.begin(problem, text)()

    def _score(self, turn: _Turn) -> Score:
        results: list[float] = []
        failures: Counter[str] = Counter()
        notes: dict[str, str] = {}
        for number, (future, is_second) in enumerate(turn.matches, start=1):
            match = self._bench.wait(future, lambda failure: _Match(None, failure))
            if match.result is None:
                failures[match.note] += 1
            else:
                results.append(1 - match.result if is_second else match.result)
            notes[f"match_{number}"] = f"{'undecided' if match.result is None else results[-1]}: {match.note}"
        share = len(results) / len(turn.matches) if turn.matches else 0.0
        is_scored = bool(results) and share >= self._min_scored
        return Score(
            total=statistics.fmean(results) if is_scored else None,
            parts={"scored_share": share},
            failure=None if is_scored else (failures.most_common(1)[0][0] if failures else "alone"),
            notes=notes,
        )

    async def _compare(self, problem: Problem, first: str, second: str) -> _Match:
        said_nothing = (is_degenerate(first), is_degenerate(second))
        if any(said_nothing):
            return _Match(0.5 if all(said_nothing) else float(said_nothing[1]), DEGENERATE)
        panel = self._bench.panel
        forth, back = await asyncio.gather(
            panel.ask(self._question(problem, first, second)), panel.ask(self._question(problem, second, first))
        )
        by_judge = [_both_orders(*answers) for answers in zip(forth, back, strict=True)]
        (result,) = panel.combined([[match.result] for match in by_judge])
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

    def bind(self, sampler: Sampler, tokenizer: PreTrainedTokenizerBase, frozen: Callable[[], Sampler]) -> None:
        self._bench.bind(sampler, tokenizer, frozen)

    def share_budget(self, path: Path) -> None:
        """Have the judges' caps hold for all that keep their account in this file."""
        self._bench.share_budget(path)

    @property
    def stop_reason(self) -> str | None:
        return self._bench.stop_reason

    def metrics(self) -> dict[str, float]:
        return self._bench.metrics()

    def close(self) -> None:
        self._bench.close()


def _both_orders(forth: Answer, back: Answer) -> _Match:
    """One judge's verdict of the first turn, from the questions with it first and with it second."""
    for answer in (forth, back):
        if not isinstance(answer.value, Preference):
            return _Match(None, answer.failure or "judge_unparseable")
    assert isinstance(forth.value, Preference) and isinstance(back.value, Preference)
    points = {"first": 1.0, "neither": 0.5, "second": 0.0}
    result = (points[forth.value.better] + 1 - points[back.value.better]) / 2
    # Won in one order and lost in the other: it is the place that was liked.
    return _Match(result, f"{forth.value.reason} / {back.value.reason}")
