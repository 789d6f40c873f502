"""The program that solves word problems by their template's steps."""

from __future__ import annotations

import asyncio
import re

import pytest

from rolltune.data.gsm_symbolic import gsm_symbolic
from rolltune.rewards.answer import answer_reward
from rolltune.rewards.countdown import parse_expression
from rolltune.rewards.format import format_reward
from rolltune.traces.conditions import CONDITIONS
from rolltune.traces.gsm_symbolic import GSMSymbolicTraceWriter, worked_steps
from rolltune.types import Problem

BARE = re.compile(r"([0-9]+(?: [-+*/] [0-9]+)+) = ([0-9]+)")


def workable() -> list[Problem]:
    problems = []
    for problem in gsm_symbolic(count=200, seed=0):
        try:
            worked_steps(problem)
        except ValueError:
            continue
        problems.append(problem)
    return problems


PROBLEMS = workable()


def can_slip(problem: Problem) -> bool:
    try:
        GSMSymbolicTraceWriter(condition="backtracking").compose(problem, seed=0)
    except ValueError:
        return False
    return True


SLIPPERY = [problem for problem in PROBLEMS if can_slip(problem)]


def test_most_problems_can_be_worked():
    assert len(PROBLEMS) > 110 and len(SLIPPERY) > 80


def test_steps_by_hand():
    problem = Problem(
        id="p",
        messages=(),
        answer="2340",
        solution="He works 6 days/week * 2 weeks/month = 12 days/month\nSo he gets $195 x 12 = $2,340 a month.",
    )
    first, second = worked_steps(problem)
    assert (first.expression, first.value) == ("6 * 2", 12)
    assert (second.expression, second.value) == ("195 * 12", 2340)


@pytest.mark.parametrize(
    "solution, answer",
    [
        ("6 * 2 = 13", "13"),  # wrong
        ("6 * 2 = 12", "13"),  # ends elsewhere
        ("6 * 0.5 = 3", "3"),  # not whole numbers
        ("It is plain that there are 12.", "12"),
        ("8 = 8", "8"),
        ("", "3"),
    ],
)
def test_solutions_that_are_no_chain_of_equations(solution, answer):
    with pytest.raises(ValueError, match="p: .*equations"):
        worked_steps(Problem(id="p", messages=(), answer=answer, solution=solution))


@pytest.mark.parametrize("condition", CONDITIONS)
def test_answers_and_sums_are_right(condition):
    writer = GSMSymbolicTraceWriter(condition=condition)
    checked = 0
    for seed, problem in enumerate(SLIPPERY):
        response = writer.compose(problem, seed=seed)
        assert answer_reward(problem, response).total == 1.0
        assert format_reward(problem, response).total == 1.0
        for step in worked_steps(problem):
            response = response.replace(step.line, "")  # checked by worked_steps; its units are not arithmetic
        for left, right in BARE.findall(response):
            assert parse_expression(left).value == int(right), response
            checked += 1
    assert checked > len(PROBLEMS) / 2 or condition == "negative_control"


@pytest.mark.parametrize("condition", CONDITIONS)
def test_where_wrong_answers_are_asked_for_all_are_wrong(condition):
    writer = GSMSymbolicTraceWriter(condition=condition, correct=False)
    written = 0
    for seed, problem in enumerate(PROBLEMS):
        try:
            response = writer.compose(problem, seed=seed)
        except ValueError as error:
            assert "wrong operation" in str(error)
            continue
        assert answer_reward(problem, response).total == 0.0, response
        assert format_reward(problem, response).total == 1.0
        written += 1
    assert written > len(PROBLEMS) / 2


CHECKED = re.compile(r"check|verify", re.IGNORECASE)
DROPPED = re.compile(r"go back|try again|drop it")
PLANNED = re.compile(r"(Step|Goal) 2")
BACKWARDS = re.compile(r"Working backwards|the last step must be|Start from the goal")


@pytest.mark.parametrize(
    "condition, shown",
    [
        ("all_strategies", {CHECKED, DROPPED, PLANNED, BACKWARDS}),
        ("backtracking", {DROPPED}),
        ("backtracking_verification", {DROPPED, CHECKED}),
        ("backtracking_subgoals", {DROPPED, PLANNED}),
        ("backtracking_backward", {DROPPED, BACKWARDS}),
        ("negative_control", set()),
    ],
)
def test_a_condition_shows_its_behaviours_and_no_others(condition, shown):
    writer = GSMSymbolicTraceWriter(condition=condition)
    text = "\n".join(writer.compose(problem, seed=seed) for seed, problem in enumerate(SLIPPERY))
    assert {pattern for pattern in (CHECKED, DROPPED, PLANNED, BACKWARDS) if pattern.search(text)} == shown


def test_every_trace_that_is_to_backtrack_does():
    writer = GSMSymbolicTraceWriter(condition="backtracking")
    for seed, problem in enumerate(PROBLEMS):
        try:
            response = writer.compose(problem, seed=seed)
        except ValueError as error:
            assert "backtracking" in str(error)
            continue
        assert DROPPED.search(response), response


def test_the_seed_decides():
    writer = GSMSymbolicTraceWriter()
    assert asyncio.run(writer.write(PROBLEMS[0], seed=1)) == writer.compose(PROBLEMS[0], seed=1)
    assert len({writer.compose(PROBLEMS[0], seed=seed) for seed in range(20)}) > 10


def test_an_unknown_condition():
    with pytest.raises(ValueError, match="did you mean 'negative_control'"):
        GSMSymbolicTraceWriter(condition="negative_contrl")
