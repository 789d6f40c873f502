"""The program that solves Countdown: its sums are right, and it shows the requested behaviours."""

from __future__ import annotations

import asyncio
import re

import pytest

from rolltune.data.countdown import countdown, given
from rolltune.rewards.countdown import NotAnExpression, countdown_reward, parse_expression
from rolltune.rewards.format import format_reward
from rolltune.traces.conditions import CONDITIONS
from rolltune.traces.countdown import CountdownTraceWriter
from rolltune.types import Problem

EASY = countdown(count=120, seed=0, sizes=[3], low=1, high=12, min_target=5, max_target=40, operations="+-*")
HARD = countdown(count=20, seed=0, sizes=[4], high=30)
EQUATION = re.compile(r"([0-9(][-+*/() 0-9]*?) ?= ?([0-9]+)")


def equations(text: str) -> list[tuple[str, int]]:
    return [(left, int(right)) for left, right in EQUATION.findall(text)]


def is_true(equation: tuple[str, int]) -> bool:
    try:
        return parse_expression(equation[0]).value == equation[1]
    except NotAnExpression:
        raise AssertionError(f"{equation} is not arithmetic") from None


@pytest.mark.parametrize("wording", ["varied", "terse"])
@pytest.mark.parametrize("condition", CONDITIONS)
def test_every_sum_is_right_and_so_is_every_answer(condition, wording):
    writer = CountdownTraceWriter(condition=condition, wording=wording)
    for problems in (EASY, HARD):
        for seed, problem in enumerate(problems):
            response = writer.compose(problem, seed=seed)
            found = equations(response)
            assert found and all(map(is_true, found)), response
            assert countdown_reward(problem, response).total == 1.0, response
            assert format_reward(problem, response).total == 1.0, response


@pytest.mark.parametrize("wording", ["varied", "terse"])
@pytest.mark.parametrize("condition", CONDITIONS)
def test_where_wrong_answers_are_asked_for_all_are_wrong(condition, wording):
    writer = CountdownTraceWriter(condition=condition, correct=False, wording=wording)
    assert writer.condition == f"{condition}_incorrect"
    for seed, problem in enumerate(EASY):
        response = writer.compose(problem, seed=seed)
        score = countdown_reward(problem, response)
        assert (score.total, score.failure) == (0.0, None), response  # a well-formed expression over the right numbers
        assert not all(map(is_true, equations(response))), response  # and a sum that was done wrong to get there


def traces(condition: str, **options) -> list[str]:
    writer = CountdownTraceWriter(condition=condition, **options)
    return [writer.compose(problem, seed=seed) for seed, problem in enumerate(EASY)]


def test_the_negative_control_goes_straight_to_the_solution():
    for response in traces("negative_control", wording="terse"):
        assert not re.search(r"Go back|Not |Check|First|need", response)
        assert len(equations(response)) == 2  # three numbers: two steps


@pytest.mark.parametrize(
    "condition, shown, not_shown",
    [
        ("backtracking", ["Go back"], ["Check", "Not ", "First make", "so I need"]),
        ("backtracking_verification", ["Go back", "Check", "Not "], ["First make", "so I need"]),
        ("backtracking_subgoals", ["Go back", "First make"], ["Check", "Not ", "so I need"]),
        ("backtracking_backward", ["Go back", "so I need"], ["Check", "Not ", "First make"]),
        ("all_strategies", ["Go back", "Check", "Not ", "First make", "so I need"], []),
    ],
)
def test_a_condition_shows_its_behaviours_and_no_others(condition, shown, not_shown):
    text = "\n".join(traces(condition, wording="terse"))
    assert [phrase for phrase in shown if phrase not in text] == []
    assert [phrase for phrase in not_shown if phrase in text] == []


def test_dead_ends_do_not_reach_the_target_and_there_are_at_most_so_many():
    counts = set()
    for problem, response in zip(EASY, traces("backtracking", wording="terse", max_dead_ends=2), strict=True):
        *dead_ends, last = response.split("</think>")[0].split("\n")
        target = given(problem)[1]
        counts.add(len(dead_ends))
        for line in dead_ends:
            assert line.endswith("Go back.") and target not in [right for _, right in equations(line)[1:]]
        assert equations(last)[-1][1] == target
    assert counts == {0, 1, 2}


def test_varied_wording_is_varied():
    responses = traces("all_strategies")
    openings = {re.sub(r"[0-9].*", "", response) for response in responses}
    assert len(openings) > 6


def test_the_seed_decides():
    writer = CountdownTraceWriter(condition="all_strategies")
    assert asyncio.run(writer.write(EASY[0], seed=5)) == writer.compose(EASY[0], seed=5)
    assert len({writer.compose(EASY[0], seed=seed) for seed in range(20)}) > 10


def test_the_trace_does_not_lean_on_the_order_in_which_the_gold_answer_names_the_numbers():
    writer = CountdownTraceWriter(condition="backtracking_verification", wording="terse", operations="+-*")
    first = [equations(writer.compose(problem, seed=seed))[0][0] for seed, problem in enumerate(EASY)]
    gold = [problem.solution.split(" = ")[0].replace(" ", "") for problem in EASY]
    assert sum(a == b for a, b in zip(first, gold, strict=True)) < len(EASY) / 2


@pytest.mark.parametrize(
    "options, message",
    [
        ({"condition": "backtraking"}, "condition='backtraking' .*did you mean 'backtracking'"),
        ({"max_dead_ends": 0}, "max_dead_ends=0"),
        ({"operations": "%"}, "operations='%'"),
        ({"wording": "long"}, "wording='long'"),
    ],
)
def test_options(options, message):
    with pytest.raises(ValueError, match=message):
        CountdownTraceWriter(**options)


def test_problems_that_cannot_be_worked():
    writer = CountdownTraceWriter(operations="+")
    hopeless = Problem(id="p", messages=(), answer="3 * 5", solution="3 * 5 = 15.")
    with pytest.raises(ValueError, match="p: .*no solution"):
        writer.compose(hopeless, seed=0)
    five = Problem(id="q", messages=(), answer="1 + 2 + 3 + 4 + 5", solution="... 15.")
    with pytest.raises(ValueError, match="q: .*5 numbers"):
        writer.compose(five, seed=0)
