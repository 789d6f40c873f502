"""All judges of a run. They grade responses while others are still being sampled."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from concurrent import futures
from concurrent.futures import Future
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from rolltune.endpoints.background import BackgroundLoop
from rolltune.rewards.judges.judge import Judge, JudgeStopped, Question
from rolltune.rewards.judges.panel import Panel
from rolltune.rewards.judges.policy import PolicyJudge
from rolltune.samplers import Sampler

T = TypeVar("T")
LATE, STOPPED = "judge_late", "judge_stopped"
_METRICS = {"rewards.": "judge/", "eval.overoptimization.gold": "overoptimization/judge", "eval.": "heldout/judge/"}
_POLL_SECONDS = 0.01  # between two looks for questions to a policy judge
_SECONDS_TO_CLOSE = 5.0
_CANNOT_JUDGE = ("judge_down", "judge_refused")
_log = logging.getLogger(__name__)


@dataclass(eq=False, kw_only=True)
class _Member:
    """The judges of one reward.

    Attributes:
        panel: the judges.
        smoke_question: a question that each of them can be asked before the run starts.
        wait_seconds: time after the last question within which an answer has to come.
        late: answers that did not.
        refusal: why a judge refuses every question; None while none does.
    """

    panel: Panel
    smoke_question: Question
    wait_seconds: float
    late: int = 0
    refusal: str | None = None

    @property
    def stop_reason(self) -> str | None:
        return self.refusal or self.panel.stop_reason

    def metrics(self) -> dict[str, float]:
        total: dict[str, float] = {}
        for judge in self.panel.judges:
            for name, value in judge.metrics().items():
                total[name] = total.get(name, 0.0) + value
        return total | {"late": float(self.late)}


class JudgePool:
    """The judges of a run, and everything that the run asks of them other than verdicts.

    A reward with judges registers them under its config key, such as ``rewards.rubric``, when the run starts
    (:meth:`rolltune.rewards.combine.JudgedReward.join`). The run then owns budgets, smoke test, costs and closing
    through this one object. Its event loop runs in a background thread that starts with the first question.

    Example:
        >>> pool = JudgePool()
        >>> reward.join(pool, "rewards.rubric", problem)  # doctest: +SKIP
        >>> pool.smoke_test()  # doctest: +SKIP
        >>> score = reward.finish(reward.begin(problem, text))  # doctest: +SKIP
        >>> pool.metrics()["judge/rubric/calls"]  # doctest: +SKIP
        2.0
        >>> pool.close()
    """

    def __init__(self) -> None:
        self._members: dict[str, _Member] = {}
        self._loop = BackgroundLoop("judge")
        self._last_submitted = 0.0
        self._exits = ExitStack()

    # --- for rewards --------------------------------------------------------------------------------------------------

    def add(self, key: str, panel: Panel, *, smoke_question: Question, wait_seconds: float) -> None:
        """Register the judges of a reward.

        Args:
            key: the reward's config key: ``rewards.<name>``, ``eval.<name>`` or ``eval.overoptimization.gold``.
            panel: the judges.
            smoke_question: a question for :meth:`smoke_test`.
            wait_seconds: seconds that :meth:`wait` waits after the last :meth:`submit`. A policy judge is always
                waited for.
        """
        assert key not in self._members, key
        self._members[key] = _Member(panel=panel, smoke_question=smoke_question, wait_seconds=wait_seconds)

    def submit(self, judging: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine beside the sampling; returns at once."""
        self._last_submitted = time.monotonic()
        return self._loop.submit(judging)

    def wait(self, key: str, future: Future[T], otherwise: Callable[[str], T]) -> T:
        """Return the result of ``future``.

        Args:
            key: the reward that waits.
            future: from :meth:`submit`.
            otherwise: makes the result from a failure word: "judge_late" when the answer is late, "judge_stopped" when
                a judge refuses every question.
        """
        member = self._members[key]
        policies = [judge for judge in member.panel.judges if isinstance(judge, PolicyJudge)]
        while True:
            self._ask_policy(policies)
            left = max(0.0, self._last_submitted + member.wait_seconds - time.monotonic())
            futures.wait([future], timeout=min(left, _POLL_SECONDS) if policies else left)
            if not future.done() and left > 0:
                continue
            if not future.done() and future.cancel():
                member.late += 1
            if future.cancelled():  # now, or by an earlier wait for the same future
                return otherwise(LATE)
            try:
                return future.result()
            except JudgeStopped as stopped:  # any other exception is a bug and is raised
                member.refusal = str(stopped)
                return otherwise(STOPPED)

    def _ask_policy(self, judges: list[PolicyJudge]) -> None:
        """Have the policy answer all waiting questions in one batch. Other judges get this time on top."""
        for judge in judges:
            self._loop.settle()  # coroutines submitted so far have queued their questions
            if judge.answer_waiting():
                self._last_submitted = time.monotonic()

    # --- for the run --------------------------------------------------------------------------------------------------

    def keep_budgets(self, folder: Path) -> None:
        """Make caps hold for the whole run, over all its processes and restarts.

        Args:
            folder: one SQLite file for each section (``rewards``, ``eval``) counts calls and tokens here. Judges of one
                section with the same model and address share one cap.
        """
        for key, member in self._members.items():
            for judge in member.panel.judges:
                judge.share_budget(folder / f"{key.rpartition('.')[0]}.sqlite")

    def smoke_test(self) -> None:
        """Ask each judge but the policy a question, so that a missing server shows before weights are loaded.

        An answer that cannot be parsed passes.

        Raises:
            ValueError: a judge cannot be reached, refuses, or has reached a cap.
        """
        for key, member in self._members.items():
            for judge in member.panel.judges:
                if isinstance(judge, PolicyJudge):
                    continue
                answer = self._loop.submit(judge.ask(member.smoke_question)).result()
                if judge.stop_reason is not None:
                    raise ValueError(f"{key}: {judge.stop_reason}")
                if answer.failure in _CANNOT_JUDGE:
                    said = f" ({answer.text[:200]})" if answer.text else ""
                    raise ValueError(
                        f"{key}: judge {judge.name} failed its smoke test: {answer.failure}{said}; is its server "
                        "running at endpoint.base_url?"
                    )

    def bind(
        self, sampler: Sampler, tokenizer: PreTrainedTokenizerBase, starting_sampler: Callable[[], Sampler]
    ) -> None:
        """Give the policy to the judges that are the policy.

        Args:
            sampler: the policy's. The pool does not close it.
            tokenizer: its chat template renders the questions.
            starting_sampler: makes a sampler of the weights that the run started from. It is called at most once, and
                its sampler is closed with the pool.
        """
        shared = cache(lambda: self._exits.enter_context(closing(starting_sampler())))
        for judge in self._judges():
            if isinstance(judge, PolicyJudge):
                judge.bind(sampler, tokenizer, shared)

    @property
    def stop_reasons(self) -> dict[str, str]:
        """Why judges can grade no more (a cap, a refused key), by the reward's key; empty while all can."""
        return {key: member.stop_reason for key, member in self._members.items() if member.stop_reason}

    @property
    def stop_reason(self) -> str | None:
        """Why the run has to stop: the first of :attr:`stop_reasons` in ``rewards``, with its key."""
        reasons = self.stop_reasons.items()
        return next((f"{key}: {reason}" for key, reason in reasons if key.startswith("rewards.")), None)

    def metrics(self) -> dict[str, float]:
        """Return this process's totals so far, which may be summed over processes.

        ``judge/<reward>/...`` for ``rewards``, ``heldout/judge/<name>/...`` for ``eval.correct`` and ``eval.lenient``,
        ``overoptimization/judge/...`` for ``eval.overoptimization.gold``; ``late`` counts answers that came too late,
        and the judge documents the other names.
        """
        return {
            f"{_metrics_prefix(key)}/{name}": value
            for key, member in self._members.items()
            for name, value in member.metrics().items()
        }

    def close(self) -> None:
        """End all running questions within seconds. Raises nothing, since another exception may be propagating."""
        with self._exits:
            if not self._members:
                return
            ending = self._loop.submit(self._close_judges())
            futures.wait([ending], timeout=_SECONDS_TO_CLOSE)
            self._loop.close()
            if ending.cancelled() or ending.exception() is not None:
                _log.warning("judges of %s could not be closed properly", ", ".join(self._members))

    async def _close_judges(self) -> None:
        await asyncio.gather(*(judge.aclose() for judge in self._judges()))

    def _judges(self) -> list[Judge]:
        return [judge for member in self._members.values() for judge in member.panel.judges]


def _metrics_prefix(key: str) -> str:
    section = next(section for section in _METRICS if key.startswith(section))
    return _METRICS[section] + key.removeprefix(section)
