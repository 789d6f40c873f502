"""A rubric as a reward: judges grade a response by its problem's criteria, and the grades become a number in [0, 1]."""

from __future__ import annotations

import asyncio
import inspect
import logging
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Literal, get_args

from rolltune.config.components import component_or_object
from rolltune.config.schema import Component
from rolltune.rewards.combine import JudgedReward
from rolltune.rewards.judges.delimit import MAX_CHARS
from rolltune.rewards.judges.judge import PROVOKED, Answer, Question
from rolltune.rewards.judges.panel import Combine, Panel
from rolltune.rewards.judges.pool import JudgePool
from rolltune.rewards.rubric.degenerate import DEGENERATE, is_degenerate
from rolltune.rewards.rubric.notes import write_note
from rolltune.rewards.rubric.questions import Rating, explicit_questions, implicit_question, read_grades
from rolltune.rewards.rubric.schema import Criterion, check_category_weights, slugs
from rolltune.rewards.rubric.scoring import explicit_score, rating_score
from rolltune.rewards.rubric.templates import Kind, load_prompt
from rolltune.rewards.tags import parse_tags
from rolltune.types import Problem, Score

Aggregation = Literal["explicit", "implicit"]
_log = logging.getLogger(__name__)
_SMOKE_RESPONSE = "I do not know."


class RubricReward:
    """Judges say how far a response satisfies its problem's rubric (Rubrics as Rewards, arXiv 2507.17746v2, section 4).

    - ``explicit``: judges grade each criterion, and the reward is the weighted mean of the criteria's credits
      (:func:`rolltune.rewards.rubric.scoring.explicit_score`);
    - ``implicit``: judges see the whole rubric and give one rating from 1 to 10.

    A criterion whose judge is down leaves the mean. A response with less than ``min_scored`` of the weight graded is
    unscored, which never counts as 0. So is one whose reply is partial, unreadable, cut or refused, since a response
    can provoke that. A response that says nothing (empty, only "Solution:", one word repeated) is worth 0, and no judge
    is asked.

    Example of a node::

        rewards:
          rubric:
            _component_: rolltune.rewards.rubric.reward.RubricReward
            judges:
              - _component_: rolltune.rewards.judges.endpoint.EndpointJudge
                endpoint: {base_url: https://api.openai.com/v1, model: gpt-4o-mini}
                cache: outputs/judge.sqlite

    The score contains:

    - ``parts["scored_share"]``: share of the rubric's weight that was graded;
    - ``parts["category/<category>"]``: weighted mean of the credits of that category's criteria;
    - ``parts["criterion/<title>"]``, with ``criterion_curves``: a criterion's credit. Meant for rubrics that many
      problems share, since every title becomes a curve;
    - ``notes``: each criterion's grade with the judges' reasons.

    Args:
        judges: nodes of one or more judges: :class:`~rolltune.rewards.judges.endpoint.EndpointJudge` or
            :class:`~rolltune.rewards.judges.policy.PolicyJudge`.
        aggregation: as above.
        one_call: explicit: ask about all criteria in one question instead of one question for each.
        with_reference: show the judge the problem's answer.
        shuffle: list the criteria in an order drawn from the response.
        combine: how several judges' grades are combined: "mean" or "majority".
        quorum: judges that must have graded while others are down; None: more than half.
        category_weights: replace the paper's 1.0, 0.7, 0.3 and 0.9 for essential, important, optional and pitfall.
        min_scored: share of the weight that must be graded, in (0, 1].
        judged: "response" for the whole text, "answer" for the text of its answer block (empty if it has none).
        gate: node of a reward that must give 1.0. A response that fails it is worth 0, and no judge is asked.
        template: file that replaces the packaged prompt.
        criterion_curves: see above.
        wait_seconds: seconds that answers are waited for after the last response was sampled.
        max_chars: characters that the judge is shown of the response, and of each other text.

    Raises:
        ValueError: an argument is out of range, or has no effect with this ``aggregation``.
    """

    full_marks = None  # no written response is known to satisfy a rubric

    def __init__(
        self,
        *,
        judges: list[Component],
        aggregation: Aggregation = "explicit",
        one_call: bool = True,
        with_reference: bool = False,
        shuffle: bool = False,
        combine: Combine = "mean",
        quorum: int | None = None,
        category_weights: dict[str, float] | None = None,
        min_scored: float = 0.7,
        judged: Literal["response", "answer"] = "response",
        gate: Component | None = None,
        template: str | None = None,
        criterion_curves: bool = False,
        wait_seconds: float = 300.0,
        max_chars: int = MAX_CHARS,
    ) -> None:
        if aggregation not in get_args(Aggregation):
            raise ValueError(f"aggregation: {aggregation!r} is unknown; use one of {', '.join(get_args(Aggregation))}")
        for name, is_set in (("one_call", not one_call), ("criterion_curves", criterion_curves)):
            if is_set and aggregation != "explicit":
                raise ValueError(f"{name}: has no effect with aggregation {aggregation}; remove it")
        if not 0 < min_scored <= 1:
            raise ValueError(f"min_scored: {min_scored}; must be in (0, 1]")
        if max_chars < 100:
            raise ValueError(f"max_chars: {max_chars}; must be >= 100")
        if not wait_seconds > 0:
            raise ValueError(f"wait_seconds: {wait_seconds}; must be > 0")
        self._aggregation: Aggregation = aggregation
        self._one_call = one_call
        self._with_reference = with_reference
        self._shuffle = shuffle
        self._weights = check_category_weights(category_weights or {})
        self._min_scored = min_scored
        self._judged = judged
        self._gate = None if gate is None else _gate(gate)
        kind: Kind = "explicit_one" if aggregation == "explicit" and not one_call else aggregation
        self._template = None if template is None else load_prompt(template, kind)
        self._criterion_curves = criterion_curves
        self._wait_seconds = wait_seconds
        self._max_chars = max_chars
        self._panel = Panel.from_nodes(judges, combine=combine, quorum=quorum)
        self._pool: JudgePool | None = None
        self._key = ""

    def check(self, problems: Sequence[Problem]) -> None:
        """Raise ValueError if a problem has no rubric, or no reference that has to be shown."""
        for problem in problems:
            if problem.rubric is None:
                raise ValueError(f"data: {problem.id} has no rubric, which RubricReward judges by")
            if self._with_reference and not (problem.answer or problem.solution):
                raise ValueError(
                    f"data: {problem.id} has no answer to show as the reference; set with_reference: false"
                )

        silent = [problem.id for problem in problems if problem.rubric is not None and problem.rubric.rewards_silence]
        if silent:
            _log.warning(
                "data: %s rubrics, the first of %r, list pitfalls only, so a refusal to answer earns 1.0; add criteria "
                "that an answer has to satisfy",
                len(silent),
                silent[0],
            )

    def join(self, pool: JudgePool, key: str, problem: Problem) -> None:
        """Register the judges; see :class:`rolltune.rewards.combine.JudgedReward`."""
        question = self._questions(problem, _SMOKE_RESPONSE, self._criteria(problem))[0]
        pool.add(key, self._panel, smoke_question=question, wait_seconds=self._wait_seconds)
        self._pool, self._key = pool, key

    def __call__(self, problem: Problem, text: str) -> Score:
        """Judge one response, and wait for its score."""
        return self.finish(self.begin(problem, text))

    def begin(self, problem: Problem, text: str) -> Score | Future[Score]:
        """Start judging a response. The result is its score if no judge has to be asked."""
        assert self._pool is not None, "join() comes first"
        if self._gate is not None:
            passed = self._gate(problem, text).total
            if passed is None:
                return Score(total=None, failure="gate_unscored")
            if passed != 1.0:
                return Score(total=0.0)
        shown = text if self._judged == "response" else parse_tags(text).answer or ""
        if is_degenerate(shown):
            return Score(total=0.0, failure=DEGENERATE)
        return self._pool.submit(self._judge(problem, shown))

    def finish(self, pending: Score | Future[Score]) -> Score:
        """Wait for the score of what :meth:`begin` started."""
        if isinstance(pending, Score):
            return pending
        assert self._pool is not None
        return self._pool.wait(self._key, pending, lambda failure: Score(total=None, failure=failure))

    def _criteria(self, problem: Problem) -> tuple[Criterion, ...]:
        assert problem.rubric is not None, "check() comes first"
        return problem.rubric.merged(self._weights).criteria

    def _questions(self, problem: Problem, text: str, criteria: Sequence[Criterion]) -> list[Question]:
        shown: dict[str, Any] = {
            "with_reference": self._with_reference,
            "shuffle": self._shuffle,
            "template": self._template,
            "max_chars": self._max_chars,
        }
        if self._aggregation == "implicit":
            return [implicit_question(problem, text, criteria, category_weights=self._weights, **shown)]
        return explicit_questions(problem, text, criteria, one_call=self._one_call, **shown)

    async def _judge(self, problem: Problem, text: str) -> Score:
        criteria = self._criteria(problem)
        questions = self._questions(problem, text, criteria)
        answers = await asyncio.gather(*(self._panel.ask(question) for question in questions))
        by_judge = list(zip(*answers, strict=True))  # [judges][questions]
        if self._aggregation == "explicit":
            return self._graded(criteria, by_judge)
        return self._rated([of_judge[0] for of_judge in by_judge])

    def _graded(self, criteria: Sequence[Criterion], answers: Sequence[Sequence[Answer]]) -> Score:
        """Score explicit aggregation from ``answers``, [judges][questions]."""
        read = [read_grades(of_judge, len(criteria), one_call=self._one_call) for of_judge in answers]
        grades = self._panel.combined([[grade for grade, _ in of_judge] for of_judge in read])
        score = explicit_score(criteria, grades, category_weights=self._weights, min_scored=self._min_scored)
        names = slugs(criteria)
        parts: dict[str, float | None] = {"scored_share": score.scored_share}
        parts |= {f"category/{name}": value for name, value in score.by_category.items()}
        if self._criterion_curves:
            parts |= {f"criterion/{name}": credit for name, credit in zip(names, score.credits, strict=True)}
        judges = [of_judge[0].judge for of_judge in answers]
        notes = {
            name: write_note(grades[i], [(judge, *of_judge[i]) for judge, of_judge in zip(judges, read, strict=True)])
            for i, name in enumerate(names)
        }
        failures = [reason for of_judge in read for grade, reason in of_judge if grade is None]
        total = _unless_provoked(score.total, failures)
        return Score(total=total, parts=parts, failure=_failure(total, failures), notes=notes)

    def _rated(self, answers: Sequence[Answer]) -> Score:
        """Score implicit aggregation from each judge's answer."""
        rated = [
            (a.judge, rating_score(a.value.rating), f"{a.value.rating} of 10. {a.value.reason}")
            if isinstance(a.value, Rating)
            else (a.judge, None, a.failure or "judge_unparseable")
            for a in answers
        ]
        (combined,) = self._panel.combined([[grade] for _, grade, _ in rated])
        failures = [why for _, grade, why in rated if grade is None]
        total = _unless_provoked(combined, failures)
        return Score(
            total=total,
            parts={"scored_share": statistics.fmean(grade is not None for _, grade, _ in rated)},
            failure=_failure(total, failures),
            notes={"rating": write_note(total, rated)},
        )


def _gate(node: Component) -> Callable[[Problem, str], Score]:
    """Build a reward that is called with the response's text and answers at once."""
    reward, name = component_or_object(node), node["_component_"]
    if isinstance(reward, JudgedReward):
        raise ValueError(f"gate: {name} is judged itself, so sampling would wait for it; list it under rewards instead")
    if "completion" in inspect.signature(reward).parameters:
        raise ValueError(f"gate: {name} takes the completion; a gate gets only the response's text")
    return reward


def _unless_provoked(total: float | None, failures: Sequence[str]) -> float | None:
    """None if a response may have provoked a failure: it could gain by making its strictest judge unreadable."""
    return None if PROVOKED.intersection(failures) else total


def _failure(total: float | None, failures: Sequence[str]) -> str | None:
    """The most frequent reason for a missing grade; "judge_disagrees" if every judge gave one."""
    if total is not None:
        return None
    return Counter(failures).most_common(1)[0][0] if failures else "judge_disagrees"
