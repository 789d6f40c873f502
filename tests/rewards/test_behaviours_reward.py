from __future__ import annotations

from functools import partial

import pytest

from rolltune.behaviours import BEHAVIOURS
from rolltune.rewards.behaviours import behaviour_counts
from rolltune.rewards.combine import WeightedReward
from rolltune.run.selftest import full_marks
from rolltune.types import Completion, Problem, Score

PROBLEM = Problem(id="p", messages=({"role": "user", "content": "?"},), answer="24")
THINKING = "3 * 8 = 24, not 42. Go back. 6 * 7 = 42. Let me check: 42 / 7 = 6."
PARTS = {"verification": 2.0, "backtracking": 1.0, "subgoal_setting": 0.0, "backward_chaining": 0.0}


@pytest.mark.parametrize(
    "text",
    [
        f"<think>{THINKING}</think>\n<answer>24</answer>",
        f"<think>{THINKING}</think>\n<answer>24. Let me check: 24 / 8 = 3.</answer> Wait, no. Let me start over.",
        THINKING,
        f"<think>{THINKING}",  # cut
    ],
)
def test_counts_the_thinking(text):
    assert behaviour_counts(PROBLEM, text) == Score(total=3.0, parts=PARTS)


def test_a_turn_without_any():
    score = behaviour_counts(PROBLEM, "<think>3 * 8 = 24</think>\n<answer>24</answer>")
    assert score == Score(total=0.0, parts=dict.fromkeys(BEHAVIOURS, 0.0))


def test_with_weight_0_it_is_logged_and_not_paid():
    reward = WeightedReward(rewards={"behaviours": (behaviour_counts, 0.0), "one": (lambda *_: Score(total=1.0), 1.0)})
    completion = Completion(token_ids=(1,), logprobs=(0.0,), finish_reason="stop", policy_version=0, text=THINKING)
    score = reward(PROBLEM, completion)
    assert score.total == 1.0
    assert {name.removeprefix("behaviours/"): x for name, x in score.parts.items() if "/" in name} == PARTS
    assert score.parts["behaviours"] == 3.0


def test_the_self_test_does_not_ask_it():
    assert full_marks(behaviour_counts) is None
    assert full_marks(partial(behaviour_counts)) is None
