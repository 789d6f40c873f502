"""Metrics of one training step, over all ranks."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence

from rolltune.distributed import World
from rolltune.rollout import Rollout, has_signal, is_trainable


def rollout_metrics(rollout: Rollout, world: World) -> dict[str, float]:
    """Compute the metrics of the sampled completions: rewards and their parts, failures, lengths, groups."""
    values: dict[str, list[float]] = defaultdict(list)
    failures: dict[str, float] = defaultdict(float)
    for group in rollout.sampled:
        values["groups/zero_variance"].append(float(is_trainable(group) and not has_signal(group)))
        values["groups/skipped"].append(float(not is_trainable(group)))
        for completion, score in zip(group.completions, group.scores, strict=True):
            values["completions/length"].append(float(len(completion.token_ids)))
            values["completions/truncated"].append(float(completion.finish_reason == "length"))
            values["reward/unscored"].append(float(score.total is None))
            if score.total is not None:
                values["reward"].append(score.total)
            for name, part in score.parts.items():
                if "/failure/" in name:
                    failures[f"failures/{name.replace('/failure/', '/')}"] += 1.0
                elif part is not None:
                    values[f"reward/{name}"].append(part)
    completions = len(values["reward/unscored"])
    moments = {name: (len(v), sum(v), sum(x * x for x in v)) for name, v in values.items()}
    moments |= {name: (completions, count, 0.0) for name, count in failures.items()}
    names = sorted(set(world.gather(moments)))  # other ranks may have seen other failures
    absent = {name: (completions if name.startswith("failures/") else 0, 0.0, 0.0) for name in names}
    sums = world.sum([x for name in names for x in (absent | moments)[name]])
    metrics = _length_correlation(rollout, world)
    for i, name in enumerate(names):
        count, total, squares = sums[3 * i : 3 * i + 3]
        if name.startswith(("groups/", "failures/")) or name in ("completions/truncated", "reward/unscored"):
            metrics[name] = total / count
        else:
            metrics[f"{name}/mean" if name.startswith("reward") else f"{name}_mean"] = total / count
            if name.startswith("reward"):
                metrics[f"{name}/std"] = max(0.0, squares / count - (total / count) ** 2) ** 0.5
    return metrics


def _length_correlation(rollout: Rollout, world: World) -> dict[str, float]:
    """Compute Pearson's correlation of reward and completion length within groups.

    Both are centred by the mean of their group's scored completions. So long completions with low rewards on hard
    problems do not count. Near 1 the reward favours length. Missing if rewards or lengths do not vary in any group.
    """
    products, rewards, lengths = 0.0, 0.0, 0.0
    for group in (group.scored() for group in rollout.sampled):
        centred_rewards = _centred(group.rewards)
        centred_lengths = _centred([float(len(completion.token_ids)) for completion in group.completions])
        products += math.fsum(x * y for x, y in zip(centred_rewards, centred_lengths, strict=True))
        rewards += math.fsum(x * x for x in centred_rewards)
        lengths += math.fsum(y * y for y in centred_lengths)
    products, rewards, lengths = world.sum([products, rewards, lengths])
    scale = math.sqrt(rewards) * math.sqrt(lengths)
    return {"reward/length_correlation": max(-1.0, min(1.0, products / scale))} if scale > 0 else {}


def _centred(values: Sequence[float]) -> list[float]:
    if not values or min(values) == max(values):
        return [0.0] * len(values)  # a rounded mean would leave a variance of 1e-34
    mean = statistics.fmean(values)
    return [value - mean for value in values]


def update_metrics(updates: Sequence[dict[str, float]]) -> dict[str, float]:
    """Merge the metrics of one step's updates: extremes of extremes, the last lr and loss scale, means of the rest.

    The metric "updates" counts the updates that stepped the weights.
    """
    metrics = {"updates": sum(1.0 - update["skipped_step"] for update in updates)}
    for name in sorted({name for update in updates for name in update}):
        seen = [update[name] for update in updates if name in update]
        if name.endswith(("/max", "/max_abs")):
            metrics[name] = max(seen)
        elif name.endswith("/min"):
            metrics[name] = min(seen)
        else:
            metrics[name] = seen[-1] if name in ("lr", "loss_scale") else statistics.fmean(seen)
    return metrics
