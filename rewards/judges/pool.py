"""The judges of a reward at work: turns are judged while others are still being sampled, and waited for at the end."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent import futures
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from rolltune.config.components import instantiate
from rolltune.config.schema import Component
from rolltune.endpoints.background import BackgroundLoop
from rolltune.rewards.judges.judge import Judge, JudgeStopped, Question
from rolltune.rewards.judges.panel import Combine, Panel
from rolltune.rewards.judges.policy import PolicyJudge
from rolltune.samplers import Sampler

T = TypeVar("T")
LATE, STOPPED = "judge_late", "judge_stopped"
_BETWEEN_LOOKS = 0.01  # seconds, while a policy judge may be asked more
_SECONDS_TO_CLOSE = 5.0
_CANNOT_JUDGE = ("judge_down", "judge_refused")
_log = logging.getLogger(__name__)


class JudgePool:
    """Judges, the loop that they answer in, and what a run has to know of them.

    Args:
        judges: nodes of :class:`rolltune.rewards.judges.judge.Judge` classes.
        combine: as for :class:`rolltune.rewards.judges.panel.Panel`.
        quorum: the same.
        wait_seconds: how long after the last question was begun answers are waited for. What comes later is unscored.
            A policy that judges itself is always waited for.

    Raises:
        ValueError: an argument is out of range, or a judge refuses its own.
    """

    def __init__(
        self, judges: Sequence[Component], *, combine: Combine, quorum: int | None, wait_seconds: float
    ) -> None:
        if not wait_seconds > 0:
            raise ValueError(f"wait_seconds: {wait_seconds}; must be > 0")
        built: list[Judge] = [instantiate(node) for node in judges]
        self.panel = Panel(built, combine=combine, quorum=quorum)
        self._policy_judges = [judge for judge in built if isinstance(judge, PolicyJudge)]
        self._loop = BackgroundLoop("judge")
        self._wait_seconds = wait_seconds
        self._last_begun = 0.0
        self._refusal: str | None = None
        self._late = 0

    def bind(self, sampler: Sampler, tokenizer: Any, frozen: Callable[[], Sampler]) -> None:
        """Give the policy to the judges that are the policy; see :meth:`PolicyJudge.bind`."""
        for judge in self._policy_judges:
            judge.bind(sampler, tokenizer, frozen)

    def smoke_test(self, question: Question) -> None:
        """Ask the judges that are not the policy once, so that a server that is not there shows before weights are
        loaded.

        Raises:
            ValueError: one of them cannot judge at all. An answer that cannot be read is no such thing.
        """
        for judge in self.panel.judges:
            if judge in self._policy_judges:
                continue
            answer = self._loop.submit(judge.ask(question)).result()
            if judge.stop_reason is not None:
                raise ValueError(judge.stop_reason)
            if answer.failure in _CANNOT_JUDGE:
                raise ValueError(
                    f"judge {judge.name}: {answer.failure.replace('_', ' ')} when it was tried out"
                    f"{f' ({answer.text[:200]})' if answer.text else ''}; is its server running, at this address?"
                )

    def submit(self, judging: Coroutine[Any, Any, T]) -> Future[T]:
        """Have it run beside the sampling; returns at once."""
        self._last_begun = time.monotonic()
        return self._loop.submit(judging)

    def wait(self, future: Future[T], otherwise: Callable[[str], T]) -> T:
        """The result; or what ``otherwise`` makes of the failure word, where none came in time or none ever will."""
        while True:
            self._ask_policy()
            left = max(0.0, self._last_begun + self._wait_seconds - time.monotonic())
            futures.wait([future], timeout=min(left, _BETWEEN_LOOKS) if self._policy_judges else left)
            if not future.done() and left > 0:
                continue
            if not future.done() and future.cancel():
                self._late += 1
            if future.cancelled():  # now, or when somebody else waited for it
                return otherwise(LATE)
            try:
                return future.result()
            except JudgeStopped as stopped:  # any other exception is a bug, and goes through
                self._refusal = str(stopped)
                return otherwise(STOPPED)

    def _ask_policy(self) -> None:
        """Let the policy answer all that waits for it, in one batch; its time is not counted against the others."""
        for judge in self._policy_judges:
            self._loop.settle()  # turns that were begun have put their questions by now
            if judge.answer_waiting():
                self._last_begun = time.monotonic()

    def share_budget(self, path: Path) -> None:
        """Where the judges keep what the run has spent."""
        for judge in self.panel.judges:
            judge.share_budget(path)

    @property
    def stop_reason(self) -> str | None:
        return self._refusal or self.panel.stop_reason

    def metrics(self) -> dict[str, float]:
        """The judges' totals, and the turns that were not waited for."""
        return {**self.panel.metrics(), "late": float(self._late)}

    def close(self) -> None:
        """End what still runs, within seconds. Raises nothing: it may be called while an exception is on its way."""
        closing = self._loop.submit(self.panel.aclose())
        futures.wait([closing], timeout=_SECONDS_TO_CLOSE)
        self._loop.close()
        if closing.cancelled() or closing.exception() is not None:
            _log.warning("%s: could not be closed properly", self.panel.name)
