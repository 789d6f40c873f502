"""An alarm for a judge that is being hacked: its scores of held-out turns beside those of a measure it does not train.

A policy that is trained on a judge learns what the judge gives marks for, and that need not be what was meant: in
"Rubric Dropout" (arXiv 2608.11669) the judge that is trained on goes on rising while a gold judge falls by 3 to 22
points. Here the same held-out greedy turns are scored by both at each evaluation: by the reward that is trained on, and
by a gold measure, which is another judge or, better, a check of the answer. Where the two part, the run says so.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from rolltune.config.components import component_or_object
from rolltune.config.schema import Component
from rolltune.metrics.log import Record, read_metrics
from rolltune.rewards.combine import WeightedReward
from rolltune.types import Completion, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rolltune.distributed import World
    from rolltune.samplers import Sampler

SHOWN_CHARACTERS = 160  # of the turn that the two differ most about


@dataclass(frozen=True, kw_only=True)
class OveroptimizationCheck:
    """What is compared, and when that is an alarm: ``eval.overoptimization`` of a config.

    Example:
        >>> from rolltune.rewards.answer import answer_reward
        >>> from rolltune.rewards.format import format_reward
        >>> check = OveroptimizationCheck(reward="style", gold={"_component_": "rolltune.rewards.answer.answer_reward"})
        >>> training = WeightedReward(rewards={"style": (format_reward, 1.0), "answer": (answer_reward, 0.0)})
        >>> watch = check.start(training, [Problem(id=str(i), messages=(), answer="4") for i in range(200)])

    Attributes:
        reward: which of the config's ``rewards`` is checked, by its name; its score counts before its weight.
        gold: a node as those of ``rewards``, without a weight: what the policy is not trained on.
        max_problems: the first so many of the held-out problems are scored, over all processes.
        min_problems: with fewer turns that both have scored there is no comparison.
        alarm_gap: the most that the reward's mean may gain on the gold mean since the first evaluation. Both should be
            on one scale, such as 0 to 1.
        alarm_correlation: the least correlation over turns, once it has been higher.

    Raises:
        ValueError: a value that cannot be, or ``gold`` is no node.
    """

    reward: str
    gold: Component
    max_problems: int = 100
    min_problems: int = 20
    alarm_gap: float = 0.1
    alarm_correlation: float = 0.3

    def __post_init__(self) -> None:
        if not self.reward:
            raise ValueError("reward is empty; give the name of one of rewards")
        if "_component_" not in self.gold:
            raise ValueError("gold: has no _component_; give a node such as those of rewards")
        if self.min_problems < 4:
            raise ValueError(f"min_problems: {self.min_problems}; a correlation of fewer than 4 says nothing")
        if self.max_problems < self.min_problems:
            raise ValueError(f"max_problems: {self.max_problems}; must be >= min_problems, {self.min_problems}")
        if self.alarm_gap <= 0:
            raise ValueError(f"alarm_gap: {self.alarm_gap}; must be > 0")
        if not 0 <= self.alarm_correlation < 1:
            raise ValueError(f"alarm_correlation: {self.alarm_correlation}; must be in [0, 1)")

    def start(self, training: WeightedReward, problems: Sequence[Problem]) -> OveroptimizationMonitor:
        """Build the gold measure, and look at what both will be asked for.

        Args:
            training: the run's reward.
            problems: held out; all of them, on every process.

        Raises:
            ValueError: the run has no such reward, there are too few problems, or one of them cannot be judged.
        """
        if self.reward not in training.rewards:
            raise ValueError(
                f"eval.overoptimization.reward: {self.reward}; one of {', '.join(training.rewards)} is wanted"
            )
        if len(problems) < self.min_problems:
            raise ValueError(
                f"eval.overoptimization.min_problems: {self.min_problems}; {len(problems)} problems are held out, "
                f"so nothing would "
                "ever be compared: hold out more, or lower it"
            )
        watch = OveroptimizationMonitor(
            check=self,
            training=WeightedReward(rewards={self.reward: training.rewards[self.reward]}),
            gold=WeightedReward(rewards={"gold": (component_or_object(self.gold), 1.0)}),
        )
        for reward in (watch.training, watch.gold):
            reward.check(problems[: self.max_problems])
        return watch


@dataclass(frozen=True, kw_only=True, slots=True)
class OveroptimizationReading:
    """One evaluation.

    Attributes:
        metrics: ``overoptimization/...``, see :meth:`OveroptimizationMonitor.measure`; the same on all ranks.
        warning: for people: what was seen and what to do; None where all is well.
    """

    metrics: dict[str, float]
    warning: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Turn:
    """One held-out turn, scored by both; None for unscored."""

    number: int
    problem: str
    text: str
    training: float | None
    gold: float | None
    failure: str | None


@dataclass(frozen=True, kw_only=True)
class OveroptimizationMonitor:
    """A check under way.

    Attributes:
        check: its settings.
        training: of what is trained on, the one reward that is checked. The object is the run's own, which closes it.
        gold: the gold measure.
    """

    check: OveroptimizationCheck
    training: WeightedReward
    gold: WeightedReward

    def measure(
        self, turns: Sequence[tuple[Problem, Completion]], *, output_dir: Path, world: World
    ) -> OveroptimizationReading:
        """Score held-out turns by both measures and compare the scores; all ranks call this.

        A turn that either of them leaves unscored leaves the comparison; it counts as 0 in neither. What earlier
        evaluations saw is read back from ``metrics.jsonl``, so there is no state to save, and a resumed run has the
        numbers of an unbroken one.

        Args:
            turns: this rank's share of the held-out problems with a greedy completion each, as ``world.shard`` deals
                them out.
            output_dir: of the run; rank 0 reads there.
            world: all ranks.

        Returns:
            Metrics named ``overoptimization/...``: ``scored``, the number of responses that both measures scored. Where
            that is at least ``min_problems``, also ``train_mean``, ``mean``, ``gap`` (the first minus the second) with
            its standard error ``gap_error``, ``gap_change`` (since the first evaluation), ``alarm`` (1 or 0), and,
            where they are defined, ``correlation`` and ``agreement`` (see :class:`Comparison`). ``judge/...`` is the
            cost of a gold judge since the start of the process.
        """
        scored = self._score(turns, world)
        pairs = [(t.training, t.gold) for t in scored if t.training is not None and t.gold is not None]
        earlier = world.gather(read_back(read_metrics(output_dir)) if world.is_main else [])
        costs = self.gold.metrics()
        names = [name.replace("judge/gold/", "overoptimization/judge/", 1) for name in costs]
        metrics = dict(zip(names, world.sum(list(costs.values())), strict=True)) | {
            "overoptimization/scored": float(len(pairs))
        }
        if len(pairs) < self.check.min_problems:
            return OveroptimizationReading(metrics=metrics, warning=self._too_few(scored, len(pairs)))
        now = compare(pairs)
        first = earlier[0] if earlier else now
        found = alarms(now, earlier, check=self.check)
        metrics |= now.metrics() | {
            "overoptimization/gap_change": now.gap - first.gap,
            "overoptimization/alarm": float(bool(found)),
        }
        return OveroptimizationReading(metrics=metrics, warning=self._warning(found, scored) if found else None)

    def share_budget(self, path: Path) -> None:
        self.gold.share_budget(path)

    def smoke_test(self, problem: Problem) -> None:
        self.gold.smoke_test(problem)

    def bind(self, sampler: Sampler, tokenizer: PreTrainedTokenizerBase, frozen: Callable[[], Sampler]) -> None:
        self.gold.bind(sampler, tokenizer, frozen)

    def close(self) -> None:
        """The gold measure is asked no more."""
        self.gold.close()

    def _score(self, turns: Sequence[tuple[Problem, Completion]], world: World) -> list[_Turn]:
        """All ranks' turns, in the order of the problems."""
        numbered = [(i * world.size + world.rank, *turn) for i, turn in enumerate(turns)]
        mine = [turn for turn in numbered if turn[0] < self.check.max_problems]
        # Both are asked of every turn before an answer is waited for.
        begun = [(self.training.begin(p, c), self.gold.begin(p, c)) for _, p, c in mine]
        scores = [(training(), gold()) for training, gold in begun]
        scored = [
            _Turn(
                number=number,
                problem=problem.id,
                text=completion.text[:SHOWN_CHARACTERS],
                training=training.parts[self.check.reward],
                gold=gold.parts["gold"],
                failure=training.failure or gold.failure,
            )
            for (number, problem, completion), (training, gold) in zip(mine, scores, strict=True)
        ]
        return sorted(world.gather(scored), key=lambda turn: turn.number)

    def _too_few(self, scored: Sequence[_Turn], num_pairs: int) -> str:
        failures = Counter(
            turn.failure or "no reason given" for turn in scored if turn.training is None or turn.gold is None
        )
        listed = ", ".join(f"{failure} {count}" for failure, count in failures.most_common())
        reason = self.training.stop_reason or (self.gold.stop_reason or "").replace(
            "rewards.gold", "eval.overoptimization.gold", 1
        )
        stopped = f"; {reason}" if reason else ""
        return (
            f"eval.overoptimization: {num_pairs} of {len(scored)} held-out turns have both scores ({listed}), fewer "
            f"than "
            f"min_problems, {self.check.min_problems}: nothing was compared{stopped}"
        )

    def _warning(self, found: Sequence[str], scored: Sequence[_Turn]) -> str:
        both = [(t.training - t.gold, t) for t in scored if t.training is not None and t.gold is not None]
        _, worst = max(both, key=lambda pair: pair[0])
        name = self.check.reward
        # The text is the model's: as a literal it cannot steer the terminal.
        return (
            f"eval.overoptimization: ALARM: {'; '.join(found)}. The policy may be learning what {name} gives marks "
            f"for instead of "
            f"what was meant. They differ most about {worst.problem}: {name} {worst.training:.3f}, gold "
            f"{worst.gold:.3f}: {worst.text!r}. Read turns that {name} marks high in samples/; if they do not earn it, "
            "stop, mend the rubric or the judge, and start again from a checkpoint before the two parted"
        )


# --- comparing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Two measures of the same turns.

    Attributes:
        train_mean: of the reward that is trained on.
        gold_mean: of the gold measure.
        gap_error: standard error of the difference of the means, turn by turn.
        scored: number of turns.
        correlation: Pearson's, over turns; None where one of the two gives all turns the same.
        agreement: of the pairs of turns that both measures tell apart, the share that both put in the same order:
            0.5 is chance, 1 is one order. None where there is no such pair.
    """

    train_mean: float
    gold_mean: float
    gap_error: float
    scored: int
    correlation: float | None
    agreement: float | None

    @property
    def gap(self) -> float:
        return self.train_mean - self.gold_mean

    def metrics(self) -> dict[str, float]:
        known = {"correlation": self.correlation, "agreement": self.agreement}
        return {
            "overoptimization/train_mean": self.train_mean,
            "overoptimization/mean": self.gold_mean,
            "overoptimization/gap": self.gap,
            "overoptimization/gap_error": self.gap_error,
            "overoptimization/scored": float(self.scored),
        } | {f"overoptimization/{name}": value for name, value in known.items() if value is not None}


def compare(pairs: Sequence[tuple[float, float]]) -> Comparison:
    """Compare (training score, gold score) of each turn.

    Example:
        >>> compare([(1.0, 1.0), (0.5, 0.0), (0.25, 1.0)]).agreement
        0.5

    Args:
        pairs: of two turns at least.
    """
    training, gold = [t for t, _ in pairs], [g for _, g in pairs]
    return Comparison(
        train_mean=statistics.fmean(training),
        gold_mean=statistics.fmean(gold),
        gap_error=statistics.stdev(t - g for t, g in pairs) / math.sqrt(len(pairs)),
        scored=len(pairs),
        correlation=_correlation(training, gold),
        agreement=_agreement(pairs),
    )


def _correlation(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    if min(xs) == max(xs) or min(ys) == max(ys):
        return None
    try:
        return max(-1.0, min(1.0, statistics.correlation(xs, ys)))
    except statistics.StatisticsError:  # a difference so small that its square is 0
        return None


def _agreement(pairs: Sequence[tuple[float, float]]) -> float | None:
    signs = [(t1 > t2) == (g1 > g2) for (t1, g1), (t2, g2) in combinations(pairs, 2) if t1 != t2 and g1 != g2]
    return sum(signs) / len(signs) if signs else None


def read_back(rows: Sequence[Record]) -> list[Comparison]:
    """The comparisons in the rows of a run's ``metrics.jsonl``, in order."""
    return [
        Comparison(
            train_mean=row["overoptimization/train_mean"],
            gold_mean=row["overoptimization/mean"],
            gap_error=row["overoptimization/gap_error"],
            scored=int(row["overoptimization/scored"]),
            correlation=row.get("overoptimization/correlation"),
            agreement=row.get("overoptimization/agreement"),
        )
        for row in rows
        if row.get("overoptimization/mean") is not None
    ]


def alarms(now: Comparison, earlier: Sequence[Comparison], *, check: OveroptimizationCheck) -> list[str]:
    """Why the two measures have parted, in words; empty where they have not.

    There are two reasons, each with a threshold that is the user's, and a second condition: what is seen has to be
    more than two standard errors, or a slice of a few dozen turns would give an alarm by chance every few evaluations.

    - The training score has gained more than ``alarm_gap`` on the gold score since the first evaluation.
    - The correlation is below ``alarm_correlation`` and was above it at an earlier evaluation; the fall is compared
      with its standard error on Fisher's scale, where that of one correlation is 1 / sqrt(n - 3) (Fisher 1921).

    Args:
        now: this evaluation's.
        earlier: those before it, the first one first.
        check: whose thresholds count.
    """
    if not earlier:
        return []
    found = []
    first = earlier[0]
    change = now.gap - first.gap
    if change > check.alarm_gap and change > 2 * math.hypot(first.gap_error, now.gap_error):
        found.append(
            f"since the first evaluation the mean of {check.reward} went from {first.train_mean:.3f} to "
            f"{now.train_mean:.3f} on held-out turns, and the gold mean from {first.gold_mean:.3f} to "
            f"{now.gold_mean:.3f}: the gap grew by {change:.3f}, more than alarm_gap, {check.alarm_gap:g}"
        )
    fallen = [c for c in earlier if _has_fallen(c, now, below=check.alarm_correlation)]
    if fallen:
        found.append(
            f"the correlation of {check.reward} with the gold measure fell from "
            f"{max(c.correlation or 0.0 for c in fallen):.3f} to {now.correlation:.3f}, below alarm_correlation, "
            f"{check.alarm_correlation:g}"
        )
    return found


def _has_fallen(before: Comparison, now: Comparison, *, below: float) -> bool:
    if before.correlation is None or now.correlation is None or not now.correlation < below < before.correlation:
        return False
    fall = _fisher(before.correlation) - _fisher(now.correlation)
    return fall > 2 * math.sqrt(1 / (before.scored - 3) + 1 / (now.scored - 3))


def _fisher(correlation: float) -> float:
    limit = 1 - 1e-9  # infinite at 1
    return math.atanh(max(-limit, min(limit, correlation)))
