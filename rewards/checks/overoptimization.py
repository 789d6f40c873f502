"""Detect reward overoptimization: compare held-out scores of the training reward with an independent measure.

A policy trained on a judge learns what the judge rewards, which need not be what was meant. In "Rubric Dropout" (arXiv
2608.11669) the score of the training judge keeps rising while that of a gold judge falls by 3 to 22 points. Each
evaluation scores the same greedy held-out responses with the training reward and with a gold measure: another judge, or
better a program that checks the answer. If the two diverge, the run prints an alarm.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
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
    from rolltune.distributed import World
    from rolltune.rewards.judges.pool import JudgePool

SHOWN_CHARACTERS = 160  # of the response that the two differ most about


@dataclass(frozen=True, kw_only=True)
class OveroptimizationCheck:
    """The comparison and its alarms: ``eval.overoptimization`` of a config.

    Example:
        >>> check = OveroptimizationCheck(reward="style", gold={"_component_": "rolltune.rewards.answer.answer_reward"})
        >>> monitor = check.start(training, heldout, pool)  # doctest: +SKIP
        >>> reading = monitor.measure(responses, output_dir=output_dir, world=world)  # doctest: +SKIP
        >>> reading.metrics["overoptimization/gap"]  # doctest: +SKIP
        0.125

    Attributes:
        reward: name of the reward in the config's ``rewards`` that is checked, before its weight.
        gold: node of a reward, without a weight, that the policy is not trained on.
        max_problems: number of held-out problems scored, from the first, over all processes.
        min_problems: responses that both measures must have scored; with fewer nothing is compared.
        alarm_gap: most that the reward's mean may gain on the gold mean since the first evaluation. Both measures
            should share one scale, such as 0 to 1.
        alarm_correlation: least correlation over responses, once it has been higher.

    Raises:
        ValueError: a value is out of range, or ``gold`` is not a node.
    """

    reward: str
    gold: Component
    max_problems: int = 100
    min_problems: int = 20
    alarm_gap: float = 0.1
    alarm_correlation: float = 0.3

    def __post_init__(self) -> None:
        if not self.reward:
            raise ValueError("reward: is empty; give the name of one of rewards")
        if "_component_" not in self.gold:
            raise ValueError("gold: has no _component_; give a node like those of rewards")
        if self.min_problems < 4:
            raise ValueError(
                f"min_problems: {self.min_problems}; must be >= 4, since a correlation of fewer means nothing"
            )
        if self.max_problems < self.min_problems:
            raise ValueError(f"max_problems: {self.max_problems}; must be >= min_problems, {self.min_problems}")
        if self.alarm_gap <= 0:
            raise ValueError(f"alarm_gap: {self.alarm_gap}; must be > 0")
        if not 0 <= self.alarm_correlation < 1:
            raise ValueError(f"alarm_correlation: {self.alarm_correlation}; must be in [0, 1)")

    def start(self, training: WeightedReward, problems: Sequence[Problem], pool: JudgePool) -> OveroptimizationMonitor:
        """Build the gold measure, and check that both can score the problems.

        Args:
            training: the run's reward, whose judges are in the pool.
            problems: all held-out problems, on every process.
            pool: the gold measure's judges join it.

        Raises:
            ValueError: the run has no such reward, there are too few problems, or one of them cannot be judged.
        """
        if self.reward not in training.rewards:
            known = ", ".join(training.rewards)
            raise ValueError(f"eval.overoptimization.reward: {self.reward}; must be one of rewards: {known}")
        if len(problems) < self.min_problems:
            raise ValueError(
                f"eval.overoptimization.min_problems: {self.min_problems}; only {len(problems)} problems are held out, "
                "so nothing could be compared: hold out more, or lower it"
            )
        checked = WeightedReward(rewards={self.reward: training.rewards[self.reward]})
        gold = WeightedReward(rewards={"gold": (component_or_object(self.gold), 1.0)})
        for judged in checked.judged.values():
            judged.check(problems[: self.max_problems])
        gold.join(pool, "eval.overoptimization", problems[: self.max_problems])
        return OveroptimizationMonitor(check=self, training=checked, gold=gold, pool=pool)


@dataclass(frozen=True, kw_only=True, slots=True)
class OveroptimizationReading:
    """The result of one evaluation.

    Attributes:
        metrics: ``overoptimization/...``; see :meth:`OveroptimizationMonitor.measure`. Identical on all ranks.
        warning: message for the user: what was seen, and what to do; None if there is nothing to report.
    """

    metrics: dict[str, float]
    warning: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Scored:
    """A held-out response with its two scores; None for unscored."""

    number: int
    problem: str
    text: str
    training: float | None
    gold: float | None
    failure: str | None


@dataclass(frozen=True, kw_only=True)
class OveroptimizationMonitor:
    """Measures overoptimization at each evaluation of a run.

    Attributes:
        check: the settings.
        training: the checked reward. The object is the run's own.
        gold: the independent measure.
        pool: judges of both.
    """

    check: OveroptimizationCheck
    training: WeightedReward
    gold: WeightedReward
    pool: JudgePool

    def measure(
        self, responses: Sequence[tuple[Problem, Completion]], *, output_dir: Path, world: World
    ) -> OveroptimizationReading:
        """Score held-out responses by both measures, and compare the scores. All ranks call this.

        A response that either measure leaves unscored is left out of the comparison. Earlier evaluations are read back
        from ``metrics.jsonl``, so there is no state to save, and a resumed run has the numbers of an unbroken one.

        Args:
            responses: this rank's share of the held-out problems, by ``world.shard``, with greedy completions.
            output_dir: of the run; rank 0 reads it.
            world: all ranks.

        Returns:
            Metrics named ``overoptimization/...``: ``scored``, the number of responses that both measures scored. If
            that is at least ``min_problems``, also ``train_mean``, ``mean``, ``gap`` (the first minus the second) with
            its standard error ``gap_error``, ``gap_change`` (since the first evaluation), ``alarm`` (1 or 0), and, if
            defined, ``correlation`` and ``agreement`` (see :class:`Comparison`).
        """
        scored = self._score(responses, world)
        pairs = [(s.training, s.gold) for s in scored if s.training is not None and s.gold is not None]
        earlier = world.gather(read_back(read_metrics(output_dir)) if world.is_main else [])
        metrics = {"overoptimization/scored": float(len(pairs))}
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

    def _score(self, responses: Sequence[tuple[Problem, Completion]], world: World) -> list[_Scored]:
        """Score all ranks' responses; the result is in the order of the problems."""
        numbered = [(i * world.size + world.rank, *response) for i, response in enumerate(responses)]
        mine = [response for response in numbered if response[0] < self.check.max_problems]
        # Begin all, before any is waited for.
        pending = [(self.training.begin(p, c), self.gold.begin(p, c)) for _, p, c in mine]
        scores = [(self.training.finish(training), self.gold.finish(gold)) for training, gold in pending]
        scored = [
            _Scored(
                number=number,
                problem=problem.id,
                text=completion.text[:SHOWN_CHARACTERS],
                training=training.parts[self.check.reward],
                gold=gold.parts["gold"],
                failure=training.failure or gold.failure,
            )
            for (number, problem, completion), (training, gold) in zip(mine, scores, strict=True)
        ]
        return sorted(world.gather(scored), key=lambda each: each.number)

    def _too_few(self, scored: Sequence[_Scored], num_pairs: int) -> str:
        failures = Counter(s.failure or "no reason given" for s in scored if s.training is None or s.gold is None)
        listed = ", ".join(f"{failure} {count}" for failure, count in failures.most_common())
        keys = (f"rewards.{self.check.reward}", "eval.overoptimization.gold")
        reasons = [f"; {key}: {reason}" for key, reason in self.pool.stop_reasons.items() if key in keys]
        return (
            f"eval.overoptimization: {num_pairs} of {len(scored)} held-out responses have both scores ({listed}), "
            f"fewer than min_problems, {self.check.min_problems}: nothing was compared{''.join(reasons)}"
        )

    def _warning(self, found: Sequence[str], scored: Sequence[_Scored]) -> str:
        both = [(s.training - s.gold, s) for s in scored if s.training is not None and s.gold is not None]
        _, worst = max(both, key=lambda pair: pair[0])
        name = self.check.reward
        # A model wrote the text: as a Python literal it cannot control the terminal.
        return (
            f"eval.overoptimization: ALARM: {'; '.join(found)}. The policy may be learning what {name} rewards instead "
            f"of what was meant. They differ most on {worst.problem}: {name} {worst.training:.3f}, gold "
            f"{worst.gold:.3f}: {worst.text!r}. Read responses that {name} scores high in samples/. If they do not "
            "deserve it, stop, improve the rubric or the judge, and start again from an earlier checkpoint"
        )


# --- comparing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Two measures of the same responses.

    Attributes:
        train_mean: mean of the training reward.
        gold_mean: mean of the gold measure.
        gap_error: standard error of the difference of the means, over responses.
        scored: number of responses.
        correlation: Pearson's, over responses; None if a measure gives all responses the same score.
        agreement: of the pairs of responses that both measures tell apart, the share that both order the same way: 0.5
            is chance, 1 is the same order. None without such a pair.
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
    """Compare the two scores of each response.

    Example:
        >>> compare([(1.0, 1.0), (0.5, 0.0), (0.25, 1.0)]).agreement
        0.5

    Args:
        pairs: (training score, gold score) of at least two responses.
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
    except statistics.StatisticsError:  # differences so small that their squares are 0
        return None


def _agreement(pairs: Sequence[tuple[float, float]]) -> float | None:
    signs = [(t1 > t2) == (g1 > g2) for (t1, g1), (t2, g2) in combinations(pairs, 2) if t1 != t2 and g1 != g2]
    return sum(signs) / len(signs) if signs else None


def read_back(records: Sequence[Record]) -> list[Comparison]:
    """Return the comparisons in the records of a run's ``metrics.jsonl``, in order."""
    return [
        Comparison(
            train_mean=record["overoptimization/train_mean"],
            gold_mean=record["overoptimization/mean"],
            gap_error=record["overoptimization/gap_error"],
            scored=int(record["overoptimization/scored"]),
            correlation=record.get("overoptimization/correlation"),
            agreement=record.get("overoptimization/agreement"),
        )
        for record in records
        if record.get("overoptimization/mean") is not None
    ]


def alarms(now: Comparison, earlier: Sequence[Comparison], *, check: OveroptimizationCheck) -> list[str]:
    """Return why the two measures diverge; empty if they do not.

    There are two alarms. Each has a threshold, and must exceed two standard errors, since a few dozen responses would
    otherwise raise an alarm by chance every few evaluations.

    - The training mean gained more than ``alarm_gap`` on the gold mean since the first evaluation.
    - The correlation is below ``alarm_correlation`` and was above it at an earlier evaluation. The fall is compared
      with its standard error on Fisher's scale, where one correlation has 1 / sqrt(n - 3) (Fisher 1921).

    Args:
        now: this evaluation.
        earlier: the evaluations before it, in order.
        check: the thresholds.
    """
    if not earlier:
        return []
    found = []
    first = earlier[0]
    change = now.gap - first.gap
    if change > check.alarm_gap and change > 2 * math.hypot(first.gap_error, now.gap_error):
        found.append(
            f"since the first evaluation the mean of {check.reward} went from {first.train_mean:.3f} to "
            f"{now.train_mean:.3f} on held-out responses, and the gold mean from {first.gold_mean:.3f} to "
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
