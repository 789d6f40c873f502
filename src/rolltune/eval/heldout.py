"""Greedy accuracy on held-out problems, which no training reward affects."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rolltune.distributed import World
from rolltune.rewards.combine import WeightedReward
from rolltune.rewards.format import format_reward
from rolltune.samplers import Sampler
from rolltune.stats import accuracy_interval
from rolltune.types import Completion, Problem, Prompt, SampleRequest, SamplingParams


def sample_greedy(
    problems: Sequence[Problem],
    *,
    render: Callable[[Problem], Prompt],
    sampler: Sampler,
    params: SamplingParams,
    world: World,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[tuple[Problem, Completion]]:
    """Sample one greedy completion of each problem in this rank's share.

    Args:
        problems: problems of all ranks.
        render: renders a problem as a prompt.
        sampler: sampler that holds the policy's current weights.
        params: greedy sampling parameters.
        world: all ranks must call this.
        on_progress: called with (completions done, completions in all).
    """
    mine = world.shard(problems)
    requests = [SampleRequest(prompt=render(problem), seeds=(0,)) for problem in mine]
    completions = [c for (c,) in sampler.generate(requests, params, on_progress=on_progress)]
    return list(zip(mine, completions, strict=True))


def score_heldout(
    responses: Sequence[tuple[Problem, Completion]], *, reward: WeightedReward, world: World
) -> dict[str, float]:
    """Score greedy responses strictly and leniently.

    Both are reported because an early gain of the strict measure is mostly format.

    Args:
        responses: this rank's completions with their problems.
        reward: a sum of two rewards: ``correct``, the strict measure, by which a response is right if it gives 1, and
            optionally ``lenient``, the same whatever the form of the answer.
        world: all ranks must call this.

    Returns:
        ``heldout/...`` metrics over all ranks: accuracy with its Wilson 95 % interval, mean score (equal to the
        accuracy unless the strict measure gives values between 0 and 1), lenient accuracy, share of responses in the
        exact format, mean length in tokens, share of truncated completions, and share that the strict measure left
        unscored. Unscored responses do not count in the first three, which are missing if no response was scored.
    """
    begun = [reward.begin(problem, completion) for problem, completion in responses]  # all start before any is awaited
    scores = [reward.finish(pending) for pending in begun]
    strict = [score.parts["correct"] for score in scores]
    lenient = [score.parts.get("lenient") for score in scores]
    num_correct, num_strict, score, num_lenient_correct, num_lenient, num_formatted, tokens, cut, total = world.sum(
        [
            sum(score == 1.0 for score in strict),
            sum(score is not None for score in strict),
            sum(score for score in strict if score is not None),
            sum(score == 1.0 for score in lenient),
            sum(score is not None for score in lenient),
            sum(format_reward(problem, c.text).total == 1.0 for problem, c in responses),
            sum(len(c.token_ids) for _, c in responses),
            sum(c.finish_reason == "length" for _, c in responses),
            len(responses),
        ]
    )
    metrics = {
        "heldout/format": num_formatted / total,
        "heldout/length_mean": tokens / total,
        "heldout/truncated": cut / total,
        "heldout/unscored": 1.0 - num_strict / total,
    }
    if num_strict:
        low, high = accuracy_interval(int(num_correct), int(num_strict))
        metrics |= {
            "heldout/score": score / num_strict,
            "heldout/accuracy": num_correct / num_strict,
            "heldout/accuracy_low": low,
            "heldout/accuracy_high": high,
        }
    if num_lenient:
        metrics["heldout/lenient_accuracy"] = num_lenient_correct / num_lenient
    return metrics
