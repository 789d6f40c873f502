"""Traces: worked responses that demonstrate reasoning behaviours, for priming a model by SFT before RL.

A writer is either a program that solves real problems (:mod:`rolltune.traces.countdown`,
:mod:`rolltune.traces.gsm_symbolic`) or a model behind an endpoint (:mod:`rolltune.traces.endpoint`). The recipe
``write_traces`` asks a writer for traces of each problem, and :func:`rolltune.data.traces.traces` reads them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from rolltune.types import Problem


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """One response written for a problem, right or wrong.

    Attributes:
        problem: the problem.
        sample: 0 .. traces_per_problem - 1; identifies the trace together with the problem's id.
        response: the whole response: ``<think>...</think>\\n<answer>...</answer>``.
        correct: the verifier's verdict; None if it had none. Wrong traces are kept, so that the reader of the file can
            choose whether to train on them.
        condition: the requested behaviours, such as "backtracking_verification".
        provenance: the source of the response: program or model, hash of the prompt, temperature.
    """

    problem: Problem
    sample: int
    response: str
    correct: bool | None
    condition: str
    provenance: dict[str, str] = field(default_factory=dict)


class TraceWriter(Protocol):
    """Writes a response to a problem. A config builds the writer with its options."""

    @property
    def condition(self) -> str: ...

    @property
    def provenance(self) -> dict[str, str]: ...

    async def write(self, problem: Problem, *, seed: int) -> str:
        """Write the whole response, including tags. The same seed gives the same response if the writer can do so.

        Raises:
            ValueError: the writer cannot solve this kind of problem.
        """
        ...
