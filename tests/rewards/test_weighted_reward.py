from __future__ import annotations

import math
from dataclasses import FrozenInstanceError
from decimal import Decimal
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from rolltune.rewards.answer import answer_reward
from rolltune.rewards.combine import WeightedReward, format_counts
from rolltune.rewards.format import format_reward
from rolltune.rewards.judges.pool import JudgePool
from rolltune.rewards.length import cosine_length_reward, soft_overlong_reward
from rolltune.types import Completion, Problem, Score

PROBLEM = Problem(id="p", messages=({"role": "user", "content": "9 * 2?"},), answer="18")


def completion(text: str, tokens: int = 3) -> Completion:
    return Completion(
        token_ids=(5,) * tokens, logprobs=(0.0,) * tokens, finish_reason="stop", policy_version=0, text=text
    )


def gives(**score: Any) -> Any:
    return lambda problem, text: Score(**score)


def test_total_is_the_weighted_sum_and_parts_are_unweighted() -> None:
    reward = WeightedReward(
        rewards={
            "answer": (answer_reward, 1.0),
            "format": (format_reward, 0.25),
            "overlong": (partial(soft_overlong_reward, max_tokens=10, cache_tokens=4), 2.0),
        }
    )
    score = reward(PROBLEM, completion("<think>w</think><answer>18</answer>", tokens=8))
    assert score.total == pytest.approx(1.0 + 0.25 - 2 * 0.5)
    assert score.parts == {"answer": 1.0, "format": 1.0, "overlong": -0.5}
    assert score.failure is None


def test_sub_parts_and_failures_are_prefixed_with_the_rewards_name() -> None:
    form = gives(total=7 / 8, parts={"answer_not_empty": 0.0, "in_order": 1.0})
    reward = WeightedReward(rewards={"format": (form, 1.0), "right": (answer_reward, 1.0)})
    score = reward(PROBLEM, completion("<think>w</think><answer></answer>"))
    assert score.total == pytest.approx(7 / 8)
    assert score.parts["format/answer_not_empty"] == 0.0
    assert score.parts["format/in_order"] == 1.0
    assert score.parts["right"] == 0.0
    assert score.parts["right/failure/empty"] == 1.0
    assert [key for key in score.parts if "/failure/" in key] == ["right/failure/empty"]
    assert score.failure == "empty"


def test_the_first_failure_in_order_is_the_scores_own() -> None:
    rewards = {
        "a": (gives(total=1.0), 1.0),
        "b": (gives(total=0.0, failure="x"), 1.0),
        "c": (gives(total=0.0, failure="y"), 1.0),
    }
    score = WeightedReward(rewards=rewards)(PROBLEM, completion(""))
    assert score.failure == "x"
    assert score.parts == {"a": 1.0, "b": 0.0, "b/failure/x": 1.0, "c": 0.0, "c/failure/y": 1.0}


@pytest.mark.parametrize("weight", [1.0, -1.0, 1e-9])
def test_an_unscored_part_with_a_weight_leaves_the_whole_unscored(weight: float) -> None:
    rewards = {"judge": (gives(total=None, failure="down"), weight), "ok": (gives(total=1.0), 1.0)}
    score = WeightedReward(rewards=rewards)(PROBLEM, completion(""))
    assert score.total is None
    assert score.parts == {"judge": None, "judge/failure/down": 1.0, "ok": 1.0}


def test_weight_zero_is_logged_only() -> None:
    rewards = {"judge": (gives(total=None), 0.0), "seen": (gives(total=7.0), 0), "ok": (gives(total=2.0), 0.5)}
    score = WeightedReward(rewards=rewards)(PROBLEM, completion(""))
    assert score.total == 1.0
    assert score.parts == {"judge": None, "seen": 7.0, "ok": 2.0}


def test_the_completion_goes_only_to_rewards_that_name_it() -> None:
    seen: dict[str, Any] = {}

    def plain(problem: Problem, text: str, **options: Any) -> Score:
        seen["plain"] = options
        return Score(total=0.0)

    def named(problem: Problem, text: str, *, completion: Completion, scale: float = 1.0) -> Score:
        seen["named"] = (completion, scale)
        return Score(total=0.0)

    class Judge:
        def __call__(self, problem: Problem, text: str, *, completion: Completion) -> Score:
            seen["judge"] = completion
            return Score(total=0.0)

    one = completion("text")
    WeightedReward(rewards={"a": (plain, 1.0), "b": (partial(named, scale=3.0), 1.0), "c": (Judge(), 1.0)})(
        PROBLEM, one
    )
    assert seen == {"plain": {}, "named": (one, 3.0), "judge": one}


def test_a_bug_in_a_reward_is_never_a_zero() -> None:
    def broken(problem: Problem, text: str) -> Score:
        raise KeyError("oops")

    with pytest.raises(KeyError, match="oops"):
        WeightedReward(rewards={"a": (broken, 0.0)})(PROBLEM, completion(""))


@pytest.mark.parametrize("total", [float("nan"), float("inf"), -float("inf"), "1", [1.0]])
@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_a_total_that_is_no_finite_number_names_the_reward(total: Any, weight: float) -> None:
    with pytest.raises(ValueError, match="reward 'odd' is"):
        WeightedReward(rewards={"odd": (gives(total=total), weight)})(PROBLEM, completion(""))


def test_a_part_is_checked_too_and_so_is_the_type_of_the_score() -> None:
    with pytest.raises(ValueError, match="reward 'odd/sub' is nan"):
        WeightedReward(rewards={"odd": (gives(total=1.0, parts={"sub": float("nan")}), 1.0)})(PROBLEM, completion(""))
    bare: Any = lambda problem, text: 1.0  # noqa: E731
    with pytest.raises(ValueError, match=r"reward 'odd' returned 1\.0"):
        WeightedReward(rewards={"odd": (bare, 1.0)})(PROBLEM, completion(""))


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ({}, "rewards: "),
        ({"": (format_reward, 1.0)}, "must be non-empty"),
        ({"a/b": (format_reward, 1.0)}, r"rewards\.a/b: .*no slash"),
        ({"a": (format_reward, float("nan"))}, r"rewards\.a\.weight: nan"),
        ({"a": (format_reward, "1")}, r"rewards\.a\.weight: '1'"),
        ({"a": (format_reward, True)}, r"rewards\.a\.weight: True"),
    ],
)
def test_refuses_bad_names_and_weights(rewards: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WeightedReward(rewards=rewards)


def test_is_frozen() -> None:
    reward = WeightedReward(rewards={"format": (format_reward, 1.0)})
    with pytest.raises(FrozenInstanceError):
        reward.rewards = {}  # type: ignore[misc]


@pytest.mark.parametrize(
    "value",
    [
        np.float32(0.5),
        np.float64(0.5),
        np.array(0.5),
        torch.tensor(0.5),
        torch.tensor(0.5, requires_grad=True),
        torch.tensor(0.5, dtype=torch.bfloat16),
        Decimal("0.5"),
        Fraction(1, 2),
    ],
    ids=str,
)
def test_numbers_of_every_kind_are_rewards(value):
    assert type(Score(total=value).total) is float, "also where no WeightedReward stands between"
    score = score_of(lambda problem, text: Score(total=value, parts={"part": value}))
    assert (score.total, score.parts["r"], score.parts["r/part"]) == (1.0, 0.5, 0.5)
    assert all(type(number) is float for number in (score.total, *score.parts.values()))


def test_a_bool_is_a_number_and_more_than_a_scalar_is_not():
    for value in (True, np.bool_(True), torch.tensor(True), np.int64(1), 1):
        assert score_of(lambda problem, text, value=value: Score(total=value)).total == 2.0
    for value in (np.array([0.5]), torch.ones(2), np.float32("nan"), math.inf, Decimal("NaN"), "1", 1j):
        with pytest.raises(ValueError, match="reward 'r' is"):
            score_of(lambda problem, text, value=value: Score(total=value))


def score_of(reward) -> Score:
    completion = Completion(token_ids=(1,), logprobs=(0.0,), finish_reason="stop", policy_version=0, text="x")
    return WeightedReward(rewards={"r": (reward, 2.0)})(Problem(id="p", messages=()), completion)


def test_every_gold_answer_is_read_before_anything_else() -> None:
    def problems(*answers: str) -> list[Problem]:
        return [Problem(id=f"rows/{i}", messages=(), answer=answer) for i, answer in enumerate(answers, start=1)]

    cosine = partial(cosine_length_reward, max_tokens=10, kind="number")
    reward = WeightedReward(
        rewards={"answer": (answer_reward, 1.0), "length": (cosine, 0.0), "format": (format_reward, 0.1)}
    )
    assert reward.gold_kinds("rewards", problems("18", "5 inches")) == {
        "answer": {"number": 2},
        "length": {"number": 2},
    }
    with pytest.raises(
        ValueError, match=r"rewards.answer: 1 of 2 gold answers .* problem 'rows/2': .* has 300 characters"
    ):
        reward.gold_kinds("rewards", problems("18", "1" * 300))
    with pytest.raises(ValueError, match=r"rewards.length: 1 of 2 .* problem 'rows/2': .*'Monday' is not .*'number'"):
        reward.join(JudgePool(), "rewards", problems("18", "Monday"))
    assert format_counts({"text": 2, "number": 7}) == "7 number, 2 text"
