"""Greedy accuracy on held-out problems: the measure that no training reward enters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rolltune.distributed import World
from rolltune.metrics import accuracy_interval
from rolltune.rewards.answer import answer_reward, lenient_number
from rolltune.rewards.format import format_reward
from rolltune.samplers import Sampler
from rolltune.types import Problem, Prompt, SampleRequest, SamplingParams


def evaluate_greedy(
    problems: Sequence[Problem],
    *,
    render: Callable[[Problem], Prompt],
    sampler: Sampler,
    params: SamplingParams,
    world: World,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """One greedy completion a problem, judged strictly and leniently.

    Strict: the last ``<answer>`` block states the gold answer and nothing else. Lenient: the last number anywhere in
    the turn equals it. Both are reported because most of an early gain in the strict measure is format.

    Returns:
        ``heldout/...`` metrics over all ranks: accuracy with its Wilson 95 % interval, lenient accuracy, share of turns
        in the exact format, mean length in tokens, share of completions that were cut.
    """
    mine = world.shard(problems)
    requests = [SampleRequest(prompt=render(problem), seeds=(0,)) for problem in mine]
    completions = [c for (c,) in sampler.generate(requests, params, on_progress=on_progress)]
    pairs = list(zip(mine, completions, strict=True))
    correct, lenient, formatted, tokens, cut, total = world.sum(
        [
            sum(answer_reward(problem, c.text).total == 1.0 for problem, c in pairs),
            sum(_lenient(problem, c.text) for problem, c in pairs),
            sum(format_reward(problem, c.text).total == 1.0 for problem, c in pairs),
            sum(len(c.token_ids) for c in completions),
            sum(c.finish_reason == "length" for c in completions),
            len(completions),
        ]
    )
    low, high = accuracy_interval(int(correct), int(total))
    return {
        "heldout/accuracy": correct / total,
        "heldout/accuracy_low": low,
        "heldout/accuracy_high": high,
        "heldout/lenient_accuracy": lenient / total,
        "heldout/format": formatted / total,
        "heldout/length_mean": tokens / total,
        "heldout/truncated": cut / total,
    }


def _lenient(problem: Problem, text: str) -> bool:
    number = lenient_number(text)
    return number is not None and answer_reward(problem, f"<answer>{number}</answer>").total == 1.0
