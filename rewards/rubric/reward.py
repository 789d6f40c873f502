"""A rubric as a reward: judges grade a turn by its problem's criteria, and the grades become a number in [0, 1]."""

from __future__ import annotations

import asyncio
import inspect
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from rolltune.config.components import component_or_object
from rolltune.config.schema import Component
from rolltune.rewards.combine import JudgedReward
from rolltune.rewards.judges.delimit import MAX_CHARS
from rolltune.rewards.judges.judge import Answer, Question
from rolltune.rewards.judges.panel import Combine
from rolltune.rewards.judges.pool import JudgePool
from rolltune.rewards.rubric.degenerate import DEGENERATE, is_degenerate
from rolltune.rewards.rubric.questions import (
    Rating,
    check_levels,
    explicit_questions,
    implicit_question,
    likert_question,
    read_grades,
)
from rolltune.rewards.rubric.schema import Criterion, check_category_weights, slugs
from rolltune.rewards.rubric.scoring import explicit_score, gate, rating_score
from rolltune.rewards.rubric.templates import Kind, load_prompt
from rolltune.rewards.tags import parse_tags
from rolltune.samplers import Sampler
from rolltune.types import Problem, Score

Aggregation = Literal["explicit", "implicit", "likert", "reference_likert"]
_TRIAL = "I do not know."


class RubricReward:
    """Judges say how far a turn satisfies its problem's rubric (Rubrics as Rewards, arXiv 2507.17746v2, section 4).

    - ``explicit``: each criterion is graded, and the reward is the weighted mean of what the criteria earn,
      :func:`rolltune.rewards.rubric.scoring.explicit_score`;
    - ``implicit``: one rating of the whole, 1 .. 10, by a judge that sees the rubric;
    - ``likert``, ``reference_likert``: the paper's baselines: a rating without a rubric, the second one with a
      reference answer.

    A criterion without a grade leaves the mean; a turn of which less than ``min_scored`` of the weight is graded is
    unscored, which is never a 0, and leaves its group. A turn that says nothing (empty, a lone "Solution:", one word
    again and again) is worth 0 without anybody being asked.

    Example of a node::

        rewards:
          rubric:
            _component_: rolltune.rewards.rubric.reward.RubricReward
            judges:
              - {_component_: rolltune.rewards.judges.endpoint.EndpointJudge, model: gpt-4o-mini,
                 base_url: https://api.openai.com/v1, cache: outputs/judge.sqlite}

    What a score holds:

    - ``parts["scored_share"]``: of the rubric's weight;
    - ``parts["category/<category>"]``: weighted mean of what that category's criteria earn;
    - ``parts["criterion/<title>"]``, with ``criterion_curves``: what a criterion earns. Meant for rubrics that many
      problems share: every title becomes a curve.
    - ``notes``: each criterion's grade with the judges' reasons.

    Args:
        judges: nodes of judges, one or more: a :class:`~rolltune.rewards.judges.endpoint.EndpointJudge`, or a
            :class:`~rolltune.rewards.judges.policy.PolicyJudge`.
        aggregation: as above.
        one_call: explicit: all criteria in one question, or one for each.
        levels: explicit: 2 for pass and fail; n for grades 0 .. n - 1.
        with_reference: explicit, implicit: show the judge the problem's answer.
        shuffle: list the criteria in an order drawn from the turn.
        combine: of several judges: "mean" or "majority".
        quorum: judges that have to have graded; None: more than half.
        category_weights: in place of the paper's 1.0, 0.7, 0.3 and 0.9 for essential, important, optional and pitfall.
        min_scored: share of the weight that has to be graded, in (0, 1].
        judged: "turn" for all of it, "answer" for what stands in its answer block (nothing, where there is none).
        gate: the node of a reward that has to give 1.0; a turn that does not pass is worth 0, and no judge is asked.
        template: a file in place of the packaged prompt.
        criterion_curves: see above.
        wait_seconds: how long answers are waited for after the step's last turn was sampled.
        max_chars: of a turn, and of each other text that the judge is shown.

    Raises:
        ValueError: an argument is out of range, or does nothing with this ``aggregation``.
    """

    full_marks = None  # no written turn is known to satisfy a rubric

    def __init__(
        self,
        *,
        judges: list[Component],
        aggregation: Aggregation = "explicit",
        one_call: bool = True,
        levels: int = 2,
        with_reference: bool = False,
        shuffle: bool = False,
        combine: Combine = "mean",
        quorum: int | None = None,
        category_weights: dict[str, float] | None = None,
        min_scored: float = 0.7,
        judged: Literal["turn", "answer"] = "turn",
        gate: Component | None = None,
        template: str | None = None,
        criterion_curves: bool = False,
        wait_seconds: float = 300.0,
        max_chars: int = MAX_CHARS,
    ) -> None:
        if aggregation not in get_args(Aggregation):
            raise ValueError(f"aggregation: {aggregation!r} is unknown; there are {', '.join(get_args(Aggregation))}")
        check_levels(levels)
        for name, is_set in (
            ("one_call", not one_call),
            ("levels", levels != 2),
            ("criterion_curves", criterion_curves),
        ):
            if is_set and aggregation != "explicit":
                raise ValueError(f"{name}: does nothing with aggregation {aggregation}; leave it out")
        if "likert" in aggregation and (with_reference or shuffle):
            raise ValueError(f"with_reference, shuffle: do nothing with aggregation {aggregation}; leave them out")
        if not 0 < min_scored <= 1:
            raise ValueError(f"min_scored: {min_scored}; a share in (0, 1] is wanted")
        if max_chars < 100:
            raise ValueError(f"max_chars: {max_chars}; must be >= 100")
        self._aggregation: Aggregation = aggregation
        self._one_call = one_call
        self._levels = levels
        self._with_reference = with_reference or aggregation == "reference_likert"
        self._shuffle = shuffle
        self._weights = check_category_weights(category_weights or {})
        self._min_scored = min_scored
        self._judged = judged
        self._gate = None if gate is None else _gate(gate)
        kind: Kind = "explicit_one" if aggregation == "explicit" and not one_call else aggregation
        self._template = None if template is None else load_prompt(template, kind)
        self._criterion_curves = criterion_curves
        self._max_chars = max_chars
        self._bench = JudgePool(judges, combine=combine, quorum=quorum, wait_seconds=wait_seconds)

    def check(self, problems: Sequence[Problem]) -> None:
        """See that every problem has what it is judged by.

        Raises:
            ValueError: one lacks its rubric or reference.
        """
        for problem in problems:
            if "likert" not in self._aggregation and problem.rubric is None:
                raise ValueError(f"data: {problem.id} has no rubric, which aggregation {self._aggregation} judges by")
            if self._with_reference and not (problem.answer or problem.solution):
                raise ValueError(f"data: {problem.id} has no answer that a judge could be shown as the reference")

    def smoke_test(self, problem: Problem) -> None:
        """Ask each judge about a poor turn.

        Raises:
            ValueError: one cannot be reached, or refuses.
        """
        self._bench.smoke_test(self._questions(problem, _TRIAL, self._criteria(problem))[0])

    def __call__(self, problem: Problem, text: str) -> Score:
        """Judge one turn, and wait for it."""
        return self.begin(problem, text)()

    def begin(self, problem: Problem, text: str) -> Callable[[], Score]:
        """Start judging a turn; what is returned waits for the score. For one thread."""
        if self._gate is not None:
            passed = self._gate(problem, text).total
            if passed != 1.0:
                total = gate(0.0, None if passed is None else False)
                return lambda: Score(total=total, failure="gate_unscored" if passed is None else None)
        shown = text if self._judged == "turn" else parse_tags(text).answer or ""
        if is_degenerate(shown):
            return lambda: Score(total=0.0, failure=DEGENERATE)
        judging = self._bench.submit(self._judge(problem, shown))
        return lambda: self._bench.wait(judging, lambda failure: Score(total=None, failure=failure))

    def _criteria(self, problem: Problem) -> tuple[Criterion, ...]:
        return () if problem.rubric is None else problem.rubric.merged(self._weights).criteria

    def _questions(self, problem: Problem, text: str, criteria: Sequence[Criterion]) -> list[Question]:
        shown: dict[str, Any] = {"template": self._template, "max_chars": self._max_chars}
        if "likert" in self._aggregation:
            return [likert_question(problem, text, with_reference=self._with_reference, **shown)]
        shown |= {"with_reference": self._with_reference, "shuffle": self._shuffle}
        if self._aggregation == "implicit":
            return [implicit_question(problem, text, criteria, category_weights=self._weights, **shown)]
        return explicit_questions(problem, text, criteria, one_call=self._one_call, levels=self._levels, **shown)

    async def _judge(self, problem: Problem, text: str) -> Score:
        criteria = self._criteria(problem)
        questions = self._questions(problem, text, criteria)
        answers = await asyncio.gather(*(self._bench.panel.ask(question) for question in questions))
        by_judge = list(zip(*answers, strict=True))  # [judges][questions]
        explicit = self._aggregation == "explicit"
        return self._graded(criteria, by_judge) if explicit else self._rated([of_judge[0] for of_judge in by_judge])

    def _graded(self, criteria: Sequence[Criterion], answers: Sequence[Sequence[Answer]]) -> Score:
        """The score of explicit aggregation; ``answers`` of each judge to each question."""
        read = [read_grades(of_judge, len(criteria), one_call=self._one_call) for of_judge in answers]
        grades = self._bench.panel.combined([[grade for grade, _ in of_judge] for of_judge in read])
        score = explicit_score(criteria, grades, category_weights=self._weights, min_scored=self._min_scored)
        names = slugs(criteria)
        parts: dict[str, float | None] = {"scored_share": score.scored_share}
        parts |= {f"category/{name}": value for name, value in score.by_category.items()}
        if self._criterion_curves:
            parts |= {f"criterion/{name}": credit for name, credit in zip(names, score.credits, strict=True)}
        judges = [of_judge[0].judge for of_judge in answers]
        notes = {
            name: _note(grades[i], [(judge, *of_judge[i]) for judge, of_judge in zip(judges, read, strict=True)])
            for i, name in enumerate(names)
        }
        failures = [reason for of_judge in read for grade, reason in of_judge if grade is None]
        return Score(total=score.total, parts=parts, failure=_failure(score.total, failures), notes=notes)

    def _rated(self, answers: Sequence[Answer]) -> Score:
        """The score of a rating; ``answers`` of each judge."""
        rated = [
            (a.judge, rating_score(a.value.rating), f"{a.value.rating} of 10. {a.value.reason}")
            if isinstance(a.value, Rating)
            else (a.judge, None, a.failure or "judge_unparseable")
            for a in answers
        ]
        (total,) = self._bench.panel.combined([[grade] for _, grade, _ in rated])
        return Score(
            total=total,
            parts={"scored_share": statistics.fmean(grade is not None for _, grade, _ in rated)},
            failure=_failure(total, [why for _, grade, why in rated if grade is None]),
            notes={"rating": _note(total, rated)},
        )

    def bind(self, sampler: Sampler, tokenizer: Any, frozen: Callable[[], Sampler]) -> None:
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


def _gate(node: Component) -> Callable[[Problem, str], Score]:
    """A reward that is called with a turn's text alone, and answers at once."""
    reward, name = component_or_object(node), node["_component_"]
    if isinstance(reward, JudgedReward):
        raise ValueError(f"gate: {name} is judged itself, and sampling would wait for it; give it to rewards by weight")
    if "completion" in inspect.signature(reward).parameters:
        raise ValueError(f"gate: {name} takes the completion; a gate is called with the turn's text alone")
    return reward


def _note(grade: float | None, given: Sequence[tuple[str, float | None, str]]) -> str:
    """``0.5: judge-a 1: reason | judge-b 0: reason``"""
    said = " | ".join(f"{judge} {_number(of_judge)}: {reason}" for judge, of_judge, reason in given)
    return f"{_number(grade)}: {said}"


def _number(grade: float | None) -> str:
    return "unscored" if grade is None else f"{grade:g}"


def _failure(total: float | None, failures: Sequence[str]) -> str | None:
    """Why there is no total: what most often kept a judge from grading. Where all have graded, they disagree."""
    if total is not None:
        return None
    return Counter(failures).most_common(1)[0][0] if failures else "judge_disagrees"
