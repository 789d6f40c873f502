"""Greedy accuracy on held-out problems: the measure that no training reward enters."""

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
    """One greedy completion of each problem of this rank's share.

    Args:
        problems: of all ranks; each rank takes its share.
        render: problem to prompt.
        sampler: current with the policy.
        params: greedy.
        world: all ranks call this.
        on_progress: called with (completions done, completions in all).
    """
    mine = world.shard(problems)
    requests = [SampleRequest(prompt=render(problem), seeds=(0,)) for problem in mine]
    completions = [c for (c,) in sampler.generate(requests, params, on_progress=on_progress)]
    return list(zip(mine, completions, strict=True))


def score_heldout(
    turns: Sequence[tuple[Problem, Completion]], *, reward: WeightedReward, world: World
) -> dict[str, float]:
    """Greedy turns judged strictly and leniently.

    Both measures are reported because most of an early gain in the strict one is format.

    Args:
        turns: this rank's, with their problems.
        reward: of two: ``correct``, by which a turn is right where it gives 1, and, where it is there, ``lenient``, the
            same whatever the form of the answer.
        world: all ranks call this.

    Returns:
        ``heldout/...`` metrics over all ranks: accuracy with its Wilson 95 % interval, the mean score (which is the
        accuracy where nothing lies between 0 and 1), lenient accuracy, share of turns in the exact format, mean length
        in tokens, share of completions that were cut, and the share that the strict measure left unscored. Unscored
        turns count in none of the first three, which are missing where there is no other.
    """
    pending = [reward.begin(problem, completion) for problem, completion in turns]  # all, before any is waited for
    scores = [reward.finish(each) for each in pending]
    strict = [score.parts["correct"] for score in scores]
    loose = [score.parts.get("lenient") for score in scores]
    num_correct, num_scored, score, num_lenient, num_loose, num_formatted, tokens, cut, total = world.sum(
        [
            sum(score == 1.0 for score in strict),
            sum(score is not None for score in strict),
            sum(score for score in strict if score is not None),
            sum(score == 1.0 for score in loose),
            sum(score is not None for score in loose),
            sum(format_reward(problem, c.text).total == 1.0 for problem, c in turns),
            sum(len(c.token_ids) for _, c in turns),
            sum(c.finish_reason == "length" for _, c in turns),
            len(turns),
        ]
    )
    metrics = {
        "heldout/format": num_formatted / total,
        "heldout/length_mean": tokens / total,
        "heldout/truncated": cut / total,
        "heldout/unscored": 1.0 - num_scored / total,
    }
    if num_scored:
        low, high = accuracy_interval(int(num_correct), int(num_scored))
        metrics |= {
            "heldout/score": score / num_scored,
            "heldout/accuracy": num_correct / num_scored,
            "heldout/accuracy_low": low,
            "heldout/accuracy_high": high,
        }
    if num_loose:
        metrics["heldout/lenient_accuracy"] = num_lenient / num_loose
    return metrics
