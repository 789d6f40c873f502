"""Traces: worked turns that demonstrate reasoning behaviours, to prime a model with before RL.

A writer is either a program that works real problems (:mod:`rolltune.traces.countdown`,
:mod:`rolltune.traces.gsm_symbolic`) or a model behind an endpoint (:mod:`rolltune.traces.endpoint`). The recipe
``write_traces`` asks one for a trace of each problem, and :func:`rolltune.data.traces.traces` reads what it wrote.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from rolltune.types import Problem


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """One assistant turn written for a problem, right or wrong.

    Attributes:
        problem: what it answers.
        sample: 0 .. traces_per_problem - 1; with the problem's id, what names the trace.
        response: the whole turn: ``<think>...</think>\\n<answer>...</answer>``.
        correct: the verifier's verdict; None where it had none. Wrong traces are kept: whether to train on them is
            for whoever reads them to say.
        condition: which behaviours were asked for ("backtracking_verification" ...).
        provenance: what wrote it: the program or the model, the prompt's hash, temperature.
    """

    problem: Problem
    sample: int
    response: str
    correct: bool | None
    condition: str
    provenance: dict[str, str] = field(default_factory=dict)


class TraceWriter(Protocol):
    """Writes the assistant's turn for a problem. A config builds one with its options."""

    @property
    def condition(self) -> str: ...

    @property
    def provenance(self) -> dict[str, str]: ...

    async def write(self, problem: Problem, *, seed: int) -> str:
        """The whole turn, tags included; the same seed gives the same turn where that can be had.

        Raises:
            ValueError: this problem is not of the kind that the writer knows.
        """
        ...
