"""Countdown solved by a program: traces with chosen behaviours and correct arithmetic, from any seed.

An attempt takes some steps and then tries every operation on the last two numbers:

  - forward: 3 + 5 = 8, and from 8 and 2: 8 + 2 = 10, 8 - 2 = 6, 8 * 2 = 16;
  - backward: to get 16 from something and 2 I need 16 / 2 = 8, so 8 from 3 and 5: 3 + 5 = 8;
  - subgoal: first I want 8, because 8 * 2 = 16.

A trace has some attempts that fail and one that succeeds. The condition selects the kinds of attempts, whether results
are checked explicitly against the target, and whether any attempt fails. The five behaviour sets and the negative
control are those of arXiv 2503.01307, where a large model wrote them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from rolltune.data.countdown import OPERATIONS, Step, Term, combine, given, steps
from rolltune.traces.conditions import Condition, Kind, behaviours_of
from rolltune.types import Problem


@dataclass(frozen=True, slots=True)
class Closing:
    """The last step, chosen before the one in front of it: ``left operation right = target``; None is the goal."""

    left: Term | None
    operation: str
    right: Term | None
    goal: int

    @property
    def other(self) -> Term:
        other = self.right if self.left is None else self.left
        assert other is not None
        return other

    def step(self, found: Term) -> Step:
        """Return the last step, once the goal is reached."""
        step = combine(self.left or found, self.operation, self.right or found)
        assert step is not None
        return step


@dataclass(frozen=True, slots=True)
class Attempt:
    """Some steps, then operations on the last two numbers until one reaches the goal or all have failed.

    Attributes:
        kind: kind of attempt, which decides its wording.
        opening: first steps.
        tries: steps tried on the last two numbers.
        hit: whether the last of ``tries`` reaches the goal.
        closing: last step; None in a forward attempt, whose goal is the target itself.
    """

    kind: Kind
    opening: tuple[Step, ...]
    tries: tuple[Step, ...]
    hit: bool
    closing: Closing | None = None


class CountdownTraceWriter:
    """Solves problems of 2 to 4 numbers.

    Args:
        condition: the behaviours to show.
        correct: False makes the last attempt end in a wrong sum, so that the answer misses the target.
        max_dead_ends: largest number of failed attempts, drawn from 0 on, in conditions that backtrack.
        operations: operations to try.
        wording: "varied" for whole sentences, each in several forms; "terse" for one short form without spaces, with a
            third of the tokens for a small model.

    Raises:
        ValueError: an option is out of range.
    """

    def __init__(
        self,
        *,
        condition: Condition = "backtracking_verification",
        correct: bool = True,
        max_dead_ends: int = 3,
        operations: str = OPERATIONS,
        wording: Literal["varied", "terse"] = "varied",
    ) -> None:
        if max_dead_ends < 1:
            raise ValueError(f"CountdownTraceWriter: max_dead_ends={max_dead_ends} must be at least 1")
        if not operations or not set(operations) <= set(OPERATIONS):
            raise ValueError(f"CountdownTraceWriter: operations={operations!r} must be a selection from {OPERATIONS}")
        if wording not in ("varied", "terse"):
            raise ValueError(f"CountdownTraceWriter: wording={wording!r} must be one of varied, terse")
        self._condition = condition
        self._behaviours = behaviours_of(condition)
        self._correct = correct
        self._max_dead_ends = max_dead_ends
        self._operations = operations
        self._phrases = _TERSE if wording == "terse" else _VARIED

    @property
    def condition(self) -> str:
        return self._condition if self._correct else f"{self._condition}_incorrect"

    @property
    def provenance(self) -> dict[str, str]:
        return {"writer": "rolltune.traces.countdown"}

    async def write(self, problem: Problem, *, seed: int) -> str:
        return self.compose(problem, seed=seed)

    def compose(self, problem: Problem, *, seed: int) -> str:
        """Write the response to a problem.

        Raises:
            ValueError: more than 4 numbers, or no solution with these operations over positive integers.
        """
        rng = random.Random(seed)
        numbers, target = given(problem)
        if not 2 <= len(numbers) <= 4:
            raise ValueError(f"{problem.id}: has {len(numbers)} numbers; CountdownTraceWriter accepts 2 to 4")
        terms = [Term(n, str(n)) for n in numbers]
        rng.shuffle(terms)
        kinds = self._behaviours.kinds if len(numbers) > 2 else ("forward",)
        attempts = [a for kind in kinds for a in _attempts(kind, terms, target, self._operations)]
        hits, misses = [a for a in attempts if a.hit], [a for a in attempts if not a.hit and a.tries]
        if not hits:
            raise ValueError(f"{problem.id}: has no solution with {self._operations} over positive integers")
        if not misses:  # every attempt solves it, so shorten some to make them fail
            misses = [replace(a, tries=a.tries[:-1], hit=False) for a in hits if len(a.tries) > 1]
        if not misses and not self._correct:
            raise ValueError(f"{problem.id}: every attempt solves it, so it has no wrong answer to show")
        rng.shuffle(misses)
        last = rng.choice(hits) if self._correct else misses.pop()
        dead_ends = misses[: rng.randint(0, self._max_dead_ends)] if self._behaviours.backtrack else []
        phrases = _Phrases(self._phrases, rng)
        lines = [self._tell_miss(attempt, target, phrases) for attempt in dead_ends]
        ending, answer = self._tell_end(last, target, phrases, rng)
        thinking = self._phrases["line"][0].join([*lines, ending])
        return f"<think>{thinking}</think>\n<answer>{answer}</answer>"

    def _tell_miss(self, attempt: Attempt, target: int, phrases: _Phrases) -> str:
        goal = attempt.closing.goal if attempt.closing else target
        told = [
            _tell_opening(attempt, target, phrases),
            phrases.say("tries", tries=phrases.listed(attempt.tries)),
            phrases.say("no_match", goal=goal) if self._behaviours.verify else "",
            phrases.say("go_back"),
        ]
        return phrases.join(told)

    def _tell_end(self, attempt: Attempt, target: int, phrases: _Phrases, rng: random.Random) -> tuple[str, str]:
        """Return the text of the last attempt, and its answer."""
        goal = attempt.closing.goal if attempt.closing else target
        tries = attempt.tries
        if not attempt.hit:  # a wrong answer is wanted: claim that one of the results is the goal
            tries = tries[: rng.randint(1, len(tries))]
        *before, final = tries if self._behaviours.backtrack else tries[-1:]
        claimed = Term(goal, final.result.text, final.result.rank)  # the same number if the attempt hits
        end = claimed
        told = [
            _tell_opening(attempt, target, phrases),
            phrases.say(
                "tries", tries=phrases.listed([*before, Step(final.left, final.operation, final.right, claimed)])
            ),
        ]
        if attempt.closing:
            closing = attempt.closing.step(claimed)
            told.append(phrases.say("then", step=phrases.step(closing)))
            end = closing.result
        assert end.value == target
        if self._behaviours.verify:
            told.append(phrases.say("check", equation=phrases.spaced(f"{end.text} = {target}"), target=target))
        return phrases.join(told), phrases.spaced(end.text)


def _attempts(kind: Kind, terms: Sequence[Term], target: int, operations: str) -> Iterator[Attempt]:
    """Yield every attempt of a kind."""
    for opening, left in _openings(terms, operations, until=2 if kind == "forward" else 3):
        if kind == "forward":
            tries, hit = _try_all(left, target, operations)
            yield Attempt(kind, opening, tries, hit)
            continue
        for closing in _closings(left, target, operations):
            pair = list(left)
            pair.remove(closing.other)
            tries, hit = _try_all(pair, closing.goal, operations)
            yield Attempt(kind, opening, tries, hit, closing)


def _openings(terms: Sequence[Term], operations: str, *, until: int) -> Iterator[tuple[tuple[Step, ...], list[Term]]]:
    """Yield the steps that leave ``until`` terms, with those terms, without repeating steps on the same values."""
    if len(terms) == until:
        yield (), list(terms)
        return
    for step, after in steps(terms, operations):
        for rest, left in _openings(after, operations, until=until):
            yield (step, *rest), left


def _closings(terms: Sequence[Term], target: int, operations: str) -> Iterator[Closing]:
    """Yield the last steps that can use one of the terms, with the number then needed from the others."""
    seen = set()
    for term in terms:
        r, t = term.value, target
        wanted = [
            Closing(None, "+", term, t - r),
            Closing(None, "-", term, t + r),
            Closing(term, "-", None, r - t),
            Closing(None, "*", term, t // r if t % r == 0 else 0),
            Closing(None, "/", term, t * r),
            Closing(term, "/", None, r // t if r % t == 0 else 0),
        ]
        for closing in wanted:
            key = (r, closing.operation, closing.left is None)
            if closing.operation in operations and closing.goal > 0 and key not in seen:
                seen.add(key)
                yield closing


def _try_all(pair: Sequence[Term], goal: int, operations: str) -> tuple[tuple[Step, ...], bool]:
    """Return the steps on two terms up to the first that reaches the goal, and whether one does.

    Steps far beyond the goal are left out: a person would not compute 90 * 8 to reach 24.
    """
    tried = []
    for step, _ in steps(pair, operations):
        if step.result.value > 2 * goal + 10:
            continue
        tried.append(step)
        if step.result.value == goal:
            return tuple(tried), True
    return tuple(tried), False


# --- wording ----------------------------------------------------------------------------------------------------------

_VARIED: dict[str, tuple[str, ...]] = {
    "step": ("{a} {op} {b} = {c}",),
    "comma": (", ",),
    "gap": (" ",),
    "line": ("\n",),
    "opening": ("Let me try {steps}.", "Take {steps} first.", "Suppose I start with {steps}.", "What about {steps}?"),
    "tries": ("I can make {tries}.", "That leaves {tries}.", "From here: {tries}.", "Now {tries}."),
    "backward": (
        "Working backwards from {target}: {inverse}, so I need {goal} from {pair}.",
        "To end at {target} with {other} in the last step, I need {inverse} from {pair}.",
        "The last step could be {closing}. Since {inverse}, I need {goal} out of {pair}.",
    ),
    "subgoal": (
        "First goal: make {goal} from {pair}, because then {closing}.",
        "My plan is to get {goal} out of {pair} first, since {closing}.",
        "Step 1 is to make {goal} from {pair}; step 2 is {closing}.",
    ),
    "no_match": (
        "Checking against {goal}: none of these matches.",
        "Is one of them {goal}? No.",
        "I check: not one of these is {goal}.",
    ),
    "go_back": (
        "That is a dead end, so I go back.",
        "This does not work. Let me try something else.",
        "So I drop this and start over another way.",
    ),
    "then": ("Then {step}.", "With that, {step}.", "And so {step}."),
    "check": (
        "Let me check: {equation}. It matches the target.",
        "To verify: {equation}, and every number is used once.",
        "Check: {equation}, which is what I want.",
    ),
}

_TERSE: dict[str, tuple[str, ...]] = {
    "step": ("{a}{op}{b}={c}",),
    "comma": (", ",),
    "gap": (" ",),
    "line": ("\n",),
    "opening": ("Try {steps}.",),
    "tries": ("{tries}.",),
    "backward": ("{inverse}, so I need {goal} from {pair}.",),
    "subgoal": ("First make {goal} from {pair}, then {closing}.",),
    "no_match": ("Not {goal}.",),
    "go_back": ("Go back.",),
    "then": ("{step}.",),
    "check": ("Check: {equation}.",),
}

_INVERSE = {"+": "-", "-": "+", "*": "/", "/": "*"}


def _tell_opening(attempt: Attempt, target: int, phrases: _Phrases) -> str:
    told = [phrases.say("opening", steps=phrases.listed(attempt.opening))] if attempt.opening else []
    if attempt.closing:
        closing, goal = attempt.closing, attempt.closing.goal
        other = closing.other.value
        if closing.left is None:
            inverse = phrases.equation(target, _INVERSE[closing.operation], other, goal)
            whole = phrases.equation(goal, closing.operation, other, target)
        else:
            inverse = phrases.equation(other, closing.operation, target, goal)
            whole = phrases.equation(other, closing.operation, goal, target)
        pair = f"{attempt.tries[0].left.value} and {attempt.tries[0].right.value}"
        told.append(
            phrases.say(attempt.kind, target=target, other=other, goal=goal, inverse=inverse, closing=whole, pair=pair)
        )
    return phrases.join(told)


class _Phrases:
    """Phrases by name, with the wording drawn at random if there are several."""

    def __init__(self, phrases: dict[str, tuple[str, ...]], rng: random.Random) -> None:
        self._phrases = phrases
        self._rng = rng

    def say(self, name: str, **values: object) -> str:
        return self._rng.choice(self._phrases[name]).format(**values)

    def equation(self, a: int, operation: str, b: int, c: int) -> str:
        return self._phrases["step"][0].format(a=a, op=operation, b=b, c=c)

    def step(self, step: Step) -> str:
        return self.equation(step.left.value, step.operation, step.right.value, step.result.value)

    def listed(self, listed: Sequence[Step]) -> str:
        return self._phrases["comma"][0].join(map(self.step, listed))

    def spaced(self, text: str) -> str:
        return text if " " in self._phrases["step"][0] else text.replace(" ", "")

    def join(self, told: Sequence[str]) -> str:
        return self._phrases["gap"][0].join(filter(None, told))
