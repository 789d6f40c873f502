"""GSM-Symbolic solved by a program: the template's own steps, worded so that they show chosen behaviours.

A step is a line of the worked solution with one equation, ``2 * 52 = 104``, which is checked here. The program adds a
plan that numbers the steps (subgoal setting), the chain from the question back to the first step (backward chaining),
a check of each result by its inverse or by repetition (verification), and a step with a wrong operation that is
abandoned (backtracking). The conditions are those of :mod:`rolltune.traces.conditions`.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from fractions import Fraction

from rolltune.data.countdown import Term as Number
from rolltune.data.countdown import combine
from rolltune.rewards.countdown import NotAnExpression, parse_expression
from rolltune.traces.conditions import Condition, behaviours_of
from rolltune.types import Problem

_CURRENCY = re.compile(r"[$£€]|(?<=[0-9]),(?=[0-9]{3})")
_PER = re.compile(r"/ ?[A-Za-z]+")  # "6 days/week"
_TIMES = re.compile(r"(?<=[0-9]) ?x ?(?=[0-9(])")
_NOT_ARITHMETIC = re.compile(r"[^-0-9+*/(). ]+")
_OPERATION = re.compile(r" ?([-+*/]) ?")
_RESULT = re.compile(r"\s*([0-9]+)(?![0-9]*\.[0-9])")
_TWO = re.compile(r"([0-9]+) ?([-+*/]) ?([0-9]+)")

_NAMES = {"+": "Adding", "-": "Subtracting", "*": "Multiplying", "/": "Dividing"}
_INVERSE = {"+": "-", "-": "+", "*": "/", "/": "*"}

_PHRASES: dict[str, tuple[str, ...]] = {
    "plan": ("I will take this in {n} steps.", "My plan has {n} steps.", "Let me break this into {n} parts."),
    "step": ("Step {i}: {line}", "Step {i}. {line}", "Goal {i}: {line}"),
    "back_first": (
        "Working backwards from the question: the last thing to work out is {expression}.",
        "To answer the question, the last step must be {expression}.",
        "Start from the goal: what is asked for is {expression}.",
    ),
    "back": (
        "For that I need {value}, which is {expression}.",
        "To get there I first need {value}, from {expression}.",
    ),
    "forth": ("So, from the beginning:", "Now forwards:", "With that in mind:"),
    "wrong": (
        "{name} gives {equation}. Wait, that is not what the question says. Let me go back.",
        "{equation}? No, that does not fit what is told here. Let me try again.",
        "I could say {equation}, but that makes no sense here, so I drop it.",
    ),
    "check": (
        "Let me check: {equation}. Right.",
        "Check: {equation}, as it should be.",
        "To verify: {equation}. Good.",
    ),
    "answer": ("So the answer is {answer}.", "That is what was asked: {answer}.", "The answer is {answer}."),
}


@dataclass(frozen=True, slots=True)
class WorkedStep:
    """A line of a solution with its equation.

    Attributes:
        line: the line as the template writes it.
        expression: left-hand side of the equation without units: "2 * 52".
        value: its value.
    """

    line: str
    expression: str
    value: int


class GSMSymbolicTraceWriter:
    """Solves the problems of ``rolltune.data.gsm_symbolic`` whose steps are whole-number equations: two in three.

    Args:
        condition: the behaviours to show.
        correct: False uses a wrong operation in the last step, and its result as the answer.

    Raises:
        ValueError: an unknown condition.
    """

    def __init__(self, *, condition: Condition = "all_strategies", correct: bool = True) -> None:
        self._condition = condition
        self._behaviours = behaviours_of(condition)
        self._correct = correct

    @property
    def condition(self) -> str:
        return self._condition if self._correct else f"{self._condition}_incorrect"

    @property
    def provenance(self) -> dict[str, str]:
        return {"writer": "rolltune.traces.gsm_symbolic"}

    async def write(self, problem: Problem, *, seed: int) -> str:
        return self.compose(problem, seed=seed)

    def compose(self, problem: Problem, *, seed: int) -> str:
        """Write the response to a problem.

        Raises:
            ValueError: a step of the solution is not an equation between whole numbers, the last step does not give the
                answer, or a wrong step is wanted but no step can have a wrong operation.
        """
        rng = random.Random(seed)
        steps = worked_steps(problem)
        answer = problem.answer
        if not self._correct:
            mistaken = _with_wrong_operation(steps[-1].expression, rng)
            if mistaken is None:
                raise ValueError(f"{problem.id}: the last step, {steps[-1].expression}, cannot have a wrong operation")
            steps[-1] = WorkedStep(
                f"That makes {mistaken.expression} = {mistaken.value}.", mistaken.expression, mistaken.value
            )
            answer = str(mistaken.value)

        def say(phrase: str, **values: object) -> str:
            return rng.choice(_PHRASES[phrase]).format(**values)

        kinds = self._behaviours.kinds
        lines = []
        if "backward" in kinds and len(steps) > 1:
            lines.append(self._tell_backwards(steps, say))
        is_planned = "subgoal" in kinds and len(steps) > 1
        if is_planned:
            lines.append(say("plan", n=len(steps)))
        slip = self._draw_slip(problem, steps, rng)
        for index, step in enumerate(steps):
            told = []
            if slip is not None and slip[0] == index:
                wrong = slip[1]
                name = _NAMES[_operation(wrong.expression)]
                told.append(say("wrong", name=name, equation=f"{wrong.expression} = {wrong.value}"))
            told.append(step.line if step.line.endswith(".") else f"{step.line}.")
            if self._behaviours.verify:
                told.append(say("check", equation=_undone(step)))
            line = " ".join(told)
            lines.append(say("step", i=index + 1, line=line) if is_planned else line)
        lines.append(say("answer", answer=answer))
        return f"<think>{chr(10).join(lines)}</think>\n<answer>{answer}</answer>"

    def _draw_slip(
        self, problem: Problem, steps: list[WorkedStep], rng: random.Random
    ) -> tuple[int, WorkedStep] | None:
        """Draw the step that is first done wrongly: its index, and the wrong step. None without backtracking."""
        if not self._behaviours.backtrack:
            return None
        wrong = [(index, _with_wrong_operation(step.expression, rng)) for index, step in enumerate(steps)]
        slips = [(index, step) for index, step in wrong if step is not None]
        if not slips:
            raise ValueError(
                f"{problem.id}: no step of the solution can have a wrong operation, so it cannot show backtracking"
            )
        return rng.choice(slips)

    def _tell_backwards(self, steps: list[WorkedStep], say) -> str:
        """Chain from the last step back to the steps that it needs."""
        told = [say("back_first", expression=steps[-1].expression)]
        needed = _numbers(steps[-1].expression)
        for step in reversed(steps[:-1]):
            if step.value in needed:
                told.append(say("back", value=step.value, expression=step.expression))
                needed |= _numbers(step.expression)
        return " ".join([*told, say("forth")])


def worked_steps(problem: Problem) -> list[WorkedStep]:
    """Return the lines of a problem's solution with their equations.

    Raises:
        ValueError: as :meth:`GSMSymbolicTraceWriter.compose`.
    """
    steps = [_worked_step(line) for line in (problem.solution or "").splitlines() if line.strip()]
    found = [step for step in steps if step is not None]
    if not found or len(found) < len(steps) or str(found[-1].value) != problem.answer:
        raise ValueError(
            f"{problem.id}: the solution must be equations between whole numbers, of which the last gives the answer"
        )
    return found


def _worked_step(line: str) -> WorkedStep | None:
    """Find the longest expression before the last equals sign that has the value after it; None without one."""
    before, equals, after = line.rpartition("=")
    result = _RESULT.match(_CURRENCY.sub("", after))
    if not equals or result is None:
        return None
    left = _TIMES.sub(" * ", _CURRENCY.sub("", before.rpartition("=")[2]).replace("\N{MULTIPLICATION SIGN}", "*"))
    left = _OPERATION.sub(r" \1 ", left)
    words = _NOT_ARITHMETIC.sub(" ", _PER.sub(" ", left)).split()
    value = int(result.group(1))
    for start in range(len(words)):
        if words[start] in ("+", "-"):
            continue  # an operation on what stands before it, not a sign
        expression = " ".join(words[start:])
        try:
            parsed = parse_expression(expression)
        except NotAnExpression:
            continue
        if len(parsed.numbers) > 1 and parsed.value == Fraction(value):
            return WorkedStep(line.strip(), expression, value)
    return None


def _numbers(expression: str) -> set[int]:
    return {int(number) for number in re.findall(r"[0-9]+", expression)}


def _operation(expression: str) -> str:
    match = _TWO.fullmatch(expression)
    assert match is not None, expression
    return match.group(2)


def _with_wrong_operation(expression: str, rng: random.Random) -> WorkedStep | None:
    """Return ``a operation b`` with another operation and value, or None if the expression is not of two numbers."""
    match = _TWO.fullmatch(expression)
    if match is None:
        return None
    a, operation, b = int(match.group(1)), match.group(2), int(match.group(3))
    right = parse_expression(expression).value
    others = [combine(Number(a, str(a)), other, Number(b, str(b))) for other in "+-*/" if other != operation and b]
    wrong = [step.result for step in others if step is not None and step.result.value != right]
    if not wrong:
        return None
    chosen = rng.choice(wrong)
    return WorkedStep("", chosen.text, chosen.value)


def _undone(step: WorkedStep) -> str:
    """Return an equation that checks the step: its inverse for a step of two numbers, else the step again."""
    match = _TWO.fullmatch(step.expression)
    if match is None or int(match.group(3)) == 0:
        return f"{step.expression} = {step.value}"
    a, operation, b = match.groups()
    return f"{step.value} {_INVERSE[operation]} {b} = {a}"
