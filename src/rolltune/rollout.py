"""Problems -> prompts -> completions -> scores -> Groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from rolltune.data.dataset import ProblemStream
from rolltune.distributed import World
from rolltune.errors import SyncError
from rolltune.samplers import Sampler
from rolltune.seeding import derive_seed
from rolltune.types import Completion, Group, Problem, Prompt, SampleRequest, SamplingParams, Score


def sample_groups(
    problems: Sequence[Problem],
    *,
    render: Callable[[Problem], Prompt],
    sampler: Sampler,
    begin_score: Callable[[Problem, Completion], Callable[[], Score]],
    params: SamplingParams,
    group_size: int,
    seed: tuple[int | str, ...],
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Group]:
    """``group_size`` completions of each problem, scored.

    Args:
        problems: this rank's.
        render: problem to prompt.
        sampler: current with the policy.
        begin_score: the weighted reward's :meth:`~rolltune.rewards.combine.WeightedReward.begin`: called with each
            completion as soon as it is there, so that judges read while others are still being written; what it returns
            is called when all are written.
        params: the distribution that is sampled from.
        group_size: completions a problem.
        seed: with the problem's id and the sample's number it seeds each completion, so that what is sampled
            depends neither on the other problems in the batch nor on the number of processes.
        on_progress: called with (completions done, completions in all).

    Raises:
        ValueError: ``params`` truncate, and the sampler does not say what it drew from.
    """
    requests = [
        SampleRequest(
            prompt=render(problem),
            seeds=tuple(derive_seed(*seed, "sample", problem.id, i) for i in range(group_size)),
        )
        for problem in problems
    ]
    finish: dict[tuple[int, int], Callable[[], Score]] = {}

    def begin(request: int, sample: int, completion: Completion) -> None:
        finish[request, sample] = begin_score(problems[request], completion)

    sampled = sampler.generate(requests, params, on_progress=on_progress, on_completion=begin)
    if params.truncates and not all(_has_support(completion) for each in sampled for completion in each):
        raise ValueError(
            f"sampling.top_p: {params.top_p}, sampling.top_k: {params.top_k}: {type(sampler).__name__} does not say "
            "what they left to draw from, so the trainer's log-probs would be of another distribution; set 1 and 0, or "
            "take another sampler"
        )
    return [
        Group(
            problem=problem,
            prompt=requests[i].prompt,
            completions=sampled[i],
            scores=tuple(finish[i, j]() for j in range(len(sampled[i]))),
        )
        for i, problem in enumerate(problems)
    ]


def _has_support(completion: Completion) -> bool:
    support = completion.support
    return support is not None and len(support) == len(completion.token_ids) and all(support)


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """What one step sampled on this rank.

    Attributes:
        sampled: every group, those left out by dynamic sampling included.
        kept: the groups to train on, by their number among all ranks' kept groups.
        num_kept: kept groups over all ranks.
        data_position: where the problem stream stands afterwards.
    """

    sampled: list[Group]
    kept: dict[int, Group]
    num_kept: int
    data_position: int


def collect(
    stream: ProblemStream,
    data_position: int,
    world: World,
    sample: Callable[[Sequence[Problem]], list[Group]],
    *,
    num_groups: int,
    dynamic_rounds: int = 0,
) -> Rollout:
    """Sample one step's groups; with dynamic sampling, draw again until enough of them can teach something.

    DAPO (arXiv 2503.14476, section 3.2) keeps the groups in which some but not all completions are right, and refills.
    Here a group counts if its rewards differ, which is the same for a 0/1 reward and is meant for every other.

    Args:
        stream: training problems.
        data_position: problems taken so far.
        world: which part of each draw this rank samples.
        sample: problems to groups.
        num_groups: over all ranks.
        dynamic_rounds: most draws of ``num_groups`` problems; 0 keeps every group of one draw.
    """
    sampled: list[Group] = []
    kept: dict[int, Group] = {}
    num_kept = 0
    for _ in range(max(1, dynamic_rounds)):
        groups = sample(world.shard(stream.take(data_position, num_groups)))
        data_position += num_groups
        sampled += groups
        flags = [not dynamic_rounds or has_signal(group) for group in groups]
        by_number = sorted(world.gather([(i * world.size + world.rank, flag) for i, flag in enumerate(flags)]))
        for number, flag in by_number:
            if flag and num_kept < num_groups:
                if number % world.size == world.rank:
                    kept[num_kept] = groups[number // world.size]
                num_kept += 1
        if num_kept == num_groups:
            break
    return Rollout(sampled=sampled, kept=kept, num_kept=num_kept, data_position=data_position)


def check_versions(written: Iterable[Completion], version: int, world: World) -> None:
    """Raise on all ranks where a completion was not written by the weights after ``version`` optimizer steps.

    Raises:
        SyncError: training on it would be off-policy, and its accuracy another model's, without anybody's knowing.
    """
    others = Counter(world.gather([c.policy_version for c in written if c.policy_version != version]))
    if others:
        listed = ", ".join(f"{count} by version {other}" for other, count in sorted(others.items()))
        raise SyncError(
            f"{others.total()} completions were not written by the policy's weights, which are of version {version}: "
            f"{listed} (-1: of another run, or of several versions)"
        )


def has_signal(group: Group) -> bool:
    """Whether a group can teach anything: two scores or more, not all the same."""
    rewards = group.scored().rewards
    return len(rewards) >= 2 and min(rewards) != max(rewards)


def is_trainable(group: Group) -> bool:
    """A group with fewer than two scored completions has no baseline."""
    return len(group.scored().completions) >= 2
