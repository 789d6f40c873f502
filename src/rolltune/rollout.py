"""Problems -> prompts -> completions -> scores -> groups with advantages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from rolltune.data.dataset import ProblemStream
from rolltune.distributed import World
from rolltune.errors import SyncError
from rolltune.rewards.combine import PendingScore, WeightedReward
from rolltune.samplers import Sampler
from rolltune.seeding import derive_seed
from rolltune.types import Completion, Group, Problem, Prompt, SampleRequest, SamplingParams

Advantage = Callable[[Sequence[float]], list[float]]  # the rewards of a group to one number per completion


@dataclass(frozen=True, kw_only=True, slots=True)
class PendingGroup:
    """The completions of one problem, and their scores, on which judges may still be working."""

    problem: Problem
    prompt: Prompt
    completions: tuple[Completion, ...]
    scores: tuple[PendingScore, ...]


def sample_groups(
    problems: Sequence[Problem],
    *,
    render: Callable[[Problem], Prompt],
    sampler: Sampler,
    reward: WeightedReward,
    params: SamplingParams,
    group_size: int,
    seed: tuple[int | str, ...],
    on_progress: Callable[[int, int], None] | None = None,
) -> list[PendingGroup]:
    """Sample ``group_size`` completions of each problem.

    Scoring starts as soon as a completion is there, so that judges read while others are still being written;
    :func:`score_groups` waits for the scores.

    Args:
        problems: the problems of this rank.
        render: problem to prompt.
        sampler: a sampler that has the policy's current weights.
        reward: the training reward.
        params: the distribution to sample from.
        group_size: completions per problem.
        seed: start of every completion's seed; the problem's id and the sample's number follow. What is sampled
            therefore depends neither on the other problems in the batch nor on the number of processes.
        on_progress: called with (completions done, all completions).

    Raises:
        ValueError: ``params`` truncate the distribution and the sampler does not report which tokens it kept.
    """
    requests = [
        SampleRequest(
            prompt=render(problem),
            seeds=tuple(derive_seed(*seed, "sample", problem.id, i) for i in range(group_size)),
        )
        for problem in problems
    ]
    scores: dict[tuple[int, int], PendingScore] = {}

    def begin_score(request: int, sample: int, completion: Completion) -> None:
        scores[request, sample] = reward.begin(problems[request], completion)

    sampled = sampler.generate(requests, params, on_progress=on_progress, on_completion=begin_score)
    if params.truncates and not all(_has_support(completion) for each in sampled for completion in each):
        raise ValueError(
            f"sampling.top_p: {params.top_p}, sampling.top_k: {params.top_k}: {type(sampler).__name__} does not report "
            "which tokens they kept, so the trainer would compute log-probs of another distribution; set top_p to 1 "
            "and top_k to 0, or choose another sampler"
        )
    return [
        PendingGroup(
            problem=problem,
            prompt=requests[i].prompt,
            completions=sampled[i],
            scores=tuple(scores[i, j] for j in range(len(sampled[i]))),
        )
        for i, problem in enumerate(problems)
    ]


def score_groups(pending: Sequence[PendingGroup], reward: WeightedReward) -> list[Group]:
    """Wait for the scores of all completions."""
    return [
        Group(
            problem=group.problem,
            prompt=group.prompt,
            completions=group.completions,
            scores=tuple(reward.finish(score) for score in group.scores),
        )
        for group in pending
    ]


def _has_support(completion: Completion) -> bool:
    support = completion.support
    return support is not None and len(support) == len(completion.token_ids) and all(support)


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledGroup:
    """A group and what a step does with it.

    Attributes:
        group: everything that was sampled, unscored completions included.
        number: its number among the groups that all ranks keep; None if dynamic sampling left it out.
        advantages: one number per scored completion, in order; None if the group is not trained on: it was left out,
            or it has fewer than two scored completions and so no baseline.
    """

    group: Group
    number: int | None
    advantages: tuple[float, ...] | None


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """The completions of one step on this rank.

    Attributes:
        groups: all groups, in the order in which they were sampled.
        num_kept: groups that all ranks keep together.
        data_position: position of the problem stream after this step.
    """

    groups: list[SampledGroup]
    num_kept: int
    data_position: int

    @property
    def sampled(self) -> list[Group]:
        return [sampled.group for sampled in self.groups]

    def minibatch(self, index: int, count: int) -> list[tuple[Group, tuple[float, ...]]]:
        """Return the groups that this rank trains in minibatch ``index`` of ``count``, with their advantages.

        Minibatches consist of whole groups, by their number. The groups hold their scored completions only.
        """
        return [
            (sampled.group.scored(), sampled.advantages)
            for sampled in self.groups
            if sampled.advantages is not None
            and sampled.number is not None
            and sampled.number * count // self.num_kept == index
        ]


def collect(
    stream: ProblemStream,
    data_position: int,
    world: World,
    sample: Callable[[Sequence[Problem]], list[Group]],
    *,
    advantage: Advantage,
    num_groups: int,
    dynamic_rounds: int = 0,
) -> Rollout:
    """Sample the groups of one step; with dynamic sampling, draw again until enough of them have a signal.

    DAPO (arXiv 2503.14476, section 3.2) keeps the groups in which some but not all completions are right, and refills.
    Here a group is kept if its rewards differ, which is the same for a 0/1 reward and works for every other reward.

    Args:
        stream: training problems.
        data_position: problems taken so far.
        world: decides which part of each draw this rank samples.
        sample: problems to scored groups.
        advantage: rewards of a group to its advantages.
        num_groups: groups to keep, over all ranks.
        dynamic_rounds: draws of ``num_groups`` problems at most; 0 keeps every group of one draw.
    """
    groups: list[SampledGroup] = []
    num_kept = 0
    for _ in range(max(1, dynamic_rounds)):
        drawn = sample(world.shard(stream.take(data_position, num_groups)))
        data_position += num_groups
        flags = [not dynamic_rounds or has_signal(group) for group in drawn]
        by_number = sorted(world.gather([(i * world.size + world.rank, flag) for i, flag in enumerate(flags)]))
        numbers: dict[int, int] = {}  # of this rank's groups that are kept
        for number, flag in by_number:
            if flag and num_kept < num_groups:
                if number % world.size == world.rank:
                    numbers[number // world.size] = num_kept
                num_kept += 1
        for i, group in enumerate(drawn):
            is_trained = i in numbers and is_trainable(group)
            advantages = tuple(advantage(group.scored().rewards)) if is_trained else None
            groups.append(SampledGroup(group=group, number=numbers.get(i), advantages=advantages))
        if num_kept == num_groups:
            break
    return Rollout(groups=groups, num_kept=num_kept, data_position=data_position)


def check_versions(written: Iterable[Completion], version: int, world: World) -> None:
    """Check on all ranks that every completion was written by the weights after ``version`` optimizer steps.

    Raises:
        SyncError: a completion has another version. Training on it would be off-policy, and its held-out accuracy
            another model's, without a sign of either.
    """
    others = Counter(world.gather([c.policy_version for c in written if c.policy_version != version]))
    if others:
        listed = ", ".join(f"{count} by version {other}" for other, count in sorted(others.items()))
        raise SyncError(
            f"{others.total()} completions were not written by the policy's weights, which are version {version}: "
            f"{listed} (-1: another run, or several versions)"
        )


def has_signal(group: Group) -> bool:
    """Return whether a group has a gradient: at least two scores, not all the same."""
    rewards = group.scored().rewards
    return len(rewards) >= 2 and min(rewards) != max(rewards)


def is_trainable(group: Group) -> bool:
    """Return whether a group has a baseline: at least two scored completions."""
    return len(group.scored().completions) >= 2
