"""Held-out accuracy of completions written by hand."""

import pytest
import torch
from thread_world import on_ranks

from rolltune.distributed import World
from rolltune.eval.heldout import sample_greedy, score_heldout
from rolltune.rewards.answer import answer_reward, lenient_answer_reward
from rolltune.rewards.combine import WeightedReward
from rolltune.stats import accuracy_interval
from rolltune.types import Completion, Problem, Prompt, SamplingParams, Score

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=9)
# answer, response, tokens, finish reason; strict, lenient, format
CASES = [
    ("4", "<think>2 + 2</think>\n<answer>4</answer>", 7, "stop", True, True, True),
    ("4", "<think>2 + 2</think>\n<answer>$4.00</answer>", 8, "stop", True, True, True),
    ("4", "<answer>4</answer>", 3, "stop", True, True, False),  # right, without the thinking
    ("4", "<answer>4</answer> and not 5", 5, "stop", True, False, False),  # the last number is another one
    ("4", "So it is 4.", 2, "stop", False, True, False),
    ("4", "<think>2 + 2 = 4</think>\n<answer>5</answer>", 6, "stop", False, False, True),
    ("4", "<think>4, 5, 4</think>\n<answer>4 or 5</answer>", 9, "stop", False, False, True),
    ("1800", "<think>that makes 1,8", 9, "length", False, False, False),
    ("1800", "that makes $1,800", 4, "length", False, True, False),
    ("-3", "", 1, "stop", False, False, False),
]


class Written:
    """A sampler that returns prepared completions."""

    def __init__(self, completions):
        self.completions = completions
        self.requests = []

    def sync(self, version): ...

    def generate(self, requests, params, *, on_progress=None):
        assert params is GREEDY
        self.requests += requests
        return [(self.completions[request.prompt.token_ids[0]],) for request in requests]


def evaluate(cases, world=None, sampler=None, correct=answer_reward, lenient=lenient_answer_reward):
    problems = [Problem(id=str(i), messages=(), answer=case[0]) for i, case in enumerate(cases)]
    completions = [
        Completion(token_ids=(0,) * tokens, logprobs=(0.0,) * tokens, finish_reason=end, policy_version=0, text=text)
        for _, text, tokens, end, *_ in cases
    ]
    world = world or World(rank=0, size=1, device=torch.device("cpu"))
    responses = sample_greedy(
        problems,
        render=lambda problem: Prompt(token_ids=(int(problem.id),)),
        sampler=sampler or Written(completions),
        params=GREEDY,
        world=world,
    )
    measures = {"correct": (correct, 1.0)} | ({"lenient": (lenient, 0.0)} if lenient else {})
    return score_heldout(responses, reward=WeightedReward(rewards=measures), world=world)


@pytest.mark.parametrize("case", CASES, ids=[case[1] or "empty" for case in CASES])
def test_one_response(case):
    *_, strict, lenient, formatted = case
    metrics = evaluate([case])
    seen = [
        metrics[f"heldout/{name}"] for name in ("accuracy", "lenient_accuracy", "format", "length_mean", "truncated")
    ]
    assert seen == [float(strict), float(lenient), float(formatted), case[2], float(case[3] == "length")]


def test_shares_of_all(tokens=7 + 8 + 3 + 5 + 2 + 6 + 9 + 9 + 4 + 1):
    low, high = accuracy_interval(4, 10)
    assert evaluate(CASES) == {
        "heldout/score": 0.4,
        "heldout/accuracy": 0.4,
        "heldout/accuracy_low": low,
        "heldout/accuracy_high": high,
        "heldout/lenient_accuracy": 0.5,
        "heldout/format": 0.4,
        "heldout/length_mean": tokens / 10,
        "heldout/truncated": 0.2,
        "heldout/unscored": 0.0,
    }


def test_the_two_measures_decide_what_is_right():
    """A response is right only if the measure gives 1. An unscored one is not wrong."""
    totals = {"4": 1.0, "1800": 0.9, "-3": None}
    seen = []

    def correct(problem, text):
        seen.append((problem.answer, text))
        return Score(total=totals[problem.answer])

    metrics = evaluate(CASES, correct=correct, lenient=lambda problem, text: Score(total=float("2 + 2" in text)))
    assert metrics["heldout/accuracy"] == 7 / 9 and metrics["heldout/unscored"] == pytest.approx(0.1)
    assert metrics["heldout/score"] == pytest.approx((7 + 2 * 0.9) / 9)
    assert (metrics["heldout/accuracy_low"], metrics["heldout/accuracy_high"]) == accuracy_interval(7, 9)
    assert metrics["heldout/lenient_accuracy"] == 0.3
    assert seen == [(case[0], case[1]) for case in CASES]
    assert "heldout/lenient_accuracy" not in evaluate(CASES, correct=correct, lenient=None)


def test_one_completion_a_problem():
    sampler = Written(
        [Completion(token_ids=(1,), logprobs=(0.0,), finish_reason="stop", policy_version=0, text="")] * 2
    )
    evaluate(CASES[:2], sampler=sampler)
    assert [(r.prompt.token_ids, len(r.seeds)) for r in sampler.requests] == [((0,), 1), ((1,), 1)]


def test_each_rank_samples_its_share():
    sampler = Written(
        [
            Completion(token_ids=(1,), logprobs=(0.0,), finish_reason="stop", policy_version=0, text=f"response {i}")
            for i in range(3)
        ]
    )
    problems = [Problem(id=str(i), messages=()) for i in range(3)]

    def sample(world: World):
        responses = sample_greedy(
            problems,
            render=lambda problem: Prompt(token_ids=(int(problem.id),)),
            sampler=sampler,
            params=GREEDY,
            world=world,
        )
        return [(problem.id, completion.text) for problem, completion in responses]

    assert on_ranks(2, sample) == [[("0", "response 0"), ("2", "response 2")], [("1", "response 1")]]


def test_ranks_share_the_problems_and_know_the_whole():
    whole = evaluate(CASES)
    for size in (3, len(CASES) + 1):  # with 11 ranks the last has no problem
        assert on_ranks(size, lambda world: evaluate(CASES, world)) == [whole] * size


def test_where_nothing_is_scored_there_is_no_accuracy():
    metrics = evaluate(CASES, correct=lambda problem, text: Score(total=None))
    assert metrics["heldout/unscored"] == 1.0 and "heldout/accuracy" not in metrics
    assert metrics["heldout/lenient_accuracy"] == 0.5
