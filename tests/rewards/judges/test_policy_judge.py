"""The policy as its own judge: through the real native sampler, and with scripted replies."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from rolltune.rewards.judges.policy import PolicyJudge
from rolltune.rewards.judges.pool import JudgePool
from rolltune.rewards.rubric.reward import RubricReward
from rolltune.rewards.rubric.schema import Criterion, Rubric
from rolltune.samplers.native import NativeSampler
from rolltune.types import Completion, Problem, Score

NODE = {"_component_": "rolltune.rewards.judges.policy.PolicyJudge", "max_new_tokens": 8}
RUBRIC = Rubric.of(Criterion(title="Says four", description="States that the sum is four.", category="essential"))
PROBLEMS = [Problem(id=f"p{i}", messages=({"role": "user", "content": f"{i}?"},), rubric=RUBRIC) for i in range(3)]


class Scripted:
    """A sampler that replies what a script says to the text of a prompt."""

    def __init__(self, tokenizer, reply, version=0):
        self.tokenizer, self.reply, self.version = tokenizer, reply, version
        self.batches: list[list[str]] = []

    def close(self): ...

    def sync(self, version):
        self.version = version

    def generate(self, requests, params, *, on_progress=None, on_completion=None):
        asked = [str(self.tokenizer.decode(list(request.prompt.token_ids))) for request in requests]
        self.batches.append(asked)
        return [
            (
                Completion(
                    token_ids=(1, 2),
                    logprobs=(0.0, 0.0),
                    finish_reason="stop",
                    policy_version=self.version,
                    text=self.reply(text),
                ),
            )
            for text in asked
        ]


def verdict(grade: int) -> str:
    return json.dumps({"verdicts": [{"number": 1, "reason": "r", "grade": grade}]})


@pytest.fixture
def make_reward(tokenizer):
    """A reward that the sampler judges, with its pool."""
    pools = []

    def make(sampler, *, start=None, **judge):
        reward, pool = RubricReward(judges=[NODE | judge]), JudgePool()
        pools.append(pool)
        reward.join(pool, "rewards.r", PROBLEMS[0])
        pool.bind(sampler, tokenizer, lambda: start)
        return reward, pool

    yield make
    for pool in pools:
        pool.close()


def score_all(reward, texts) -> list[Score]:
    pending = [reward.begin(problem, text) for problem, text in zip(PROBLEMS, texts, strict=True)]
    return [reward.finish(each) for each in pending]


def test_all_responses_of_a_step_are_judged_in_one_batch(make_reward, tokenizer):
    sampler = Scripted(tokenizer, lambda asked: verdict(int("It is four, 1" in asked)))
    reward, pool = make_reward(sampler)
    pool.smoke_test()  # asks nobody: the policy may not be there yet
    sampler.sync(12)
    scores = score_all(reward, [f"It is four, {i}." for i in range(3)])
    assert [score.total for score in scores] == [0.0, 1.0, 0.0]
    assert [len(batch) for batch in sampler.batches] == [3]
    assert scores[1].notes["says_four"] == "1: policy@12 1: r"
    assert pool.metrics()["judge/r/questions"] == 3 and pool.metrics()["judge/r/completion_tokens"] == 6


def test_a_malformed_reply_is_asked_again_in_one_more_batch(make_reward, tokenizer):
    sampler = Scripted(tokenizer, lambda asked: verdict(1) if "cannot be read" in asked else "Well ...")
    reward, _ = make_reward(sampler)
    scores = score_all(reward, ["It is four."] * 3)
    assert [score.total for score in scores] == [1.0] * 3
    assert [len(batch) for batch in sampler.batches] == [3, 3]
    stubborn, _ = make_reward(Scripted(tokenizer, lambda asked: "Well ..."))
    score = stubborn(PROBLEMS[0], "It is four.")
    assert score.total is None and score.failure == "judge_unparseable"


def test_a_reply_of_other_weights_is_unscored(make_reward, tokenizer):
    reward, pool = make_reward(Scripted(tokenizer, lambda asked: verdict(1), version=-1))
    score = reward(PROBLEMS[0], "It is four.")
    assert score.total is None and score.failure == "judge_stale" and pool.metrics()["judge/r/judge_stale"] == 1


def test_the_frozen_start_judges(make_reward, tokenizer):
    policy = Scripted(tokenizer, lambda asked: verdict(0), version=9)
    start = Scripted(tokenizer, lambda asked: verdict(1))
    reward, _ = make_reward(policy, start=start, frozen=True)
    score = reward(PROBLEMS[0], "It is four.")
    assert score.total == 1.0 and "start@0" in score.notes["says_four"] and not policy.batches


def test_the_real_sampler(make_reward, tiny_llama, tokenizer):
    """A random model says nothing that can be read: unscored, cut at its limit, and the same each time."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32, max_position_embeddings=4096)
    sampler = NativeSampler(model, tokenizer)
    sampler.sync(3)
    reward, _ = make_reward(sampler)
    first = score_all(reward, ["It is four."] * 3)
    assert {score.total for score in first} == {None}
    assert {score.failure for score in first} <= {"judge_cut", "judge_unparseable"}
    assert all("policy@3" in score.notes["says_four"] for score in first)
    assert score_all(reward, ["It is four."] * 3) == first


def test_a_question_too_long_for_the_model_is_unscored_alone(make_reward, tiny_llama, tokenizer, caplog):
    """The sampler refuses the whole batch that it is in. A token is a byte here."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32, max_position_embeddings=4096)
    reward, pool = make_reward(NativeSampler(model, tokenizer))
    texts = ["It is four.", " ".join(map(str, range(1000))), "Four, I think."]
    scores = score_all(reward, texts)
    assert [score.failure == "judge_refused" for score in scores] == [False, True, False]
    assert [score.total for score in scores] == [None] * 3 and pool.metrics()["judge/r/judge_refused"] == 1
    assert "4096 tokens" in caplog.text


def test_the_policys_own_tokens_are_broken_wherever_they_stand(tokenizer):
    """In the response, the problem and the rubric: the tokenizer would read them as its special tokens."""
    own = copy.deepcopy(tokenizer)
    own.add_special_tokens({"additional_special_tokens": ["<gh>", "@@turn"]})
    text = "<gh> @@turn <GH>"
    rubric = Rubric.of(Criterion(title=text, description=text, category="essential"))
    problem = Problem(id="p", messages=({"role": "user", "content": text},), rubric=rubric)
    asked: list[int] = []

    class Sampler(Scripted):
        def generate(self, requests, params, **options):
            asked.extend(token for request in requests for token in request.prompt.token_ids)
            return super().generate(requests, params, **options)

    reward, pool = RubricReward(judges=[NODE]), JudgePool()
    reward.join(pool, "rewards.r", problem)
    pool.bind(Sampler(own, lambda asked: verdict(1)), own, lambda: None)
    assert reward(problem, text).total == 1.0
    pool.close()
    assert own.convert_tokens_to_ids("<gh>") in own("<gh>")["input_ids"]
    assert asked and not set(asked) & set(own.convert_tokens_to_ids(["<gh>", "@@turn"]))


@pytest.mark.parametrize("options", [{"max_new_tokens": 0}, {"temperature": 3.0}])
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        PolicyJudge(**options)
