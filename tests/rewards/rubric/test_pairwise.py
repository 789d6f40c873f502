"""Responses compared with each other, by judges behind real sockets."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import pytest
from fault_server import FaultServer, Response, error, ok
from judge_server import read_prompt

from rolltune.rewards.combine import JudgedReward
from rolltune.rewards.judges.pool import JudgePool
from rolltune.rewards.rubric.pairwise import PairwiseReward
from rolltune.rewards.rubric.schema import Criterion, Rubric
from rolltune.types import Problem

RUBRIC = Rubric.of(Criterion(title="High", description="Names a high number.", category="essential"))
PROBLEM = Problem(id="p", messages=({"role": "user", "content": "A number?"},), rubric=RUBRIC)


def better(name: str) -> Response:
    return ok(json.dumps({"reason": "r", "better": name}))


def highest(call: int, request: dict[str, Any]) -> Response:
    """Prefers the higher number, whatever its place."""
    prompt = read_prompt(request["messages"][-1]["content"])
    first, second = (int(prompt.block(f"{place} response")) for place in ("first", "second"))
    return better("neither" if first == second else "first" if first > second else "second")


@pytest.fixture
def pool() -> Iterator[JudgePool]:
    made = JudgePool()
    yield made
    made.close()


@pytest.fixture
def make_reward(pool):
    keys = (f"rewards.r{i}" for i in itertools.count())

    def make(server: FaultServer, **options: Any) -> PairwiseReward:
        node = {
            "_component_": "rolltune.rewards.judges.endpoint.EndpointJudge",
            "endpoint": {"base_url": server.base_url, "model": "m", "max_attempts": 1},
        }
        reward = PairwiseReward(judges=[node], **options)
        reward.join(pool, next(keys), PROBLEM)
        return reward

    return make


def totals(reward: PairwiseReward, *texts: str, problem: Problem = PROBLEM) -> list[float | None]:
    return [reward.finish(each).total for each in [reward.begin(problem, text) for text in texts]]


def test_shares_of_wins(make_reward, pool):
    """2 < 5 = 5 < 9, each against three others."""
    with FaultServer(highest) as server:
        reward = make_reward(server)
        assert isinstance(reward, JudgedReward)
        assert totals(reward, "5", "9", "2", "5") == pytest.approx([1.5 / 3, 1.0, 0.0, 1.5 / 3])
        assert pool.metrics()["judge/r0/questions"] == 12


def test_groups_are_of_one_problem_and_one_step(make_reward):
    other = Problem(id="q", messages=PROBLEM.messages, rubric=RUBRIC)
    with FaultServer(highest) as server:
        reward = make_reward(server)
        pending = [reward.begin(p, text) for p, text in ((PROBLEM, "1"), (other, "9"), (PROBLEM, "2"), (other, "8"))]
        assert [reward.finish(each).total for each in pending] == [0.0, 1.0, 1.0, 0.0]
        assert totals(reward, "1", "0") == [1.0, 0.0]  # the next step has nothing of the last one in it


def test_a_liking_for_the_first_place_is_a_draw(make_reward):
    with FaultServer(lambda call, request: better("first")) as server:
        assert totals(make_reward(server), "5", "9") == [0.5, 0.5]


def test_what_says_nothing_loses_for_free(make_reward):
    with FaultServer(highest) as server:
        assert totals(make_reward(server), ":", "9", "") == [0.25, 1.0, 0.25]
        assert server.calls == []


def test_undecided_pairs_are_left_out(make_reward):
    def judge(call: int, request: dict[str, Any]) -> Response:
        prompt = read_prompt(request["messages"][-1]["content"])
        return error(500) if "7" in {body for _, body in prompt.blocks} else highest(call, request)

    with FaultServer(judge) as server:
        assert totals(make_reward(server), "5", "9", "7", "3") == [0.5, 1.0, None, 0.0]
        reward = make_reward(server, min_scored=0.9)
        pending = [reward.begin(PROBLEM, text) for text in ("5", "9", "7", "3")]
        assert {reward.finish(each).failure for each in pending} == {"judge_down"}


def test_a_single_response_is_unscored(make_reward):
    with FaultServer(highest) as server:
        score = make_reward(server)(PROBLEM, "5")
    assert score.total is None and score.failure == "alone"


def test_bad_options_and_problems(make_reward):
    with FaultServer(highest) as server:
        with pytest.raises(ValueError, match="min_scored: 0"):
            make_reward(server, min_scored=0.0)
        with pytest.raises(ValueError, match="data: bare has no rubric"):
            make_reward(server).check([Problem(id="bare", messages=PROBLEM.messages)])
