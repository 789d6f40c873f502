"""Equal work for all ranks: groups move to the rank that has the fewest tokens to train."""

from __future__ import annotations

from collections.abc import Sequence

from rolltune.batch import S, TrainGroup
from rolltune.distributed import World


def balance(groups: Sequence[TrainGroup[S]], world: World) -> list[TrainGroup[S]]:
    """Exchange whole groups between ranks, so that all have about as many tokens to train; all ranks call this.

    The groups of all ranks stay the same, and so do sums over them. Only who computes them changes.

    Args:
        groups: the groups that this rank has sampled.
        world: all ranks.

    Returns:
        The groups that this rank trains, in an order that depends only on where groups were sampled.
    """
    if world.size == 1:
        return list(groups)
    sampled = sorted(world.gather([(i, world.rank, num_tokens(group)) for i, group in enumerate(groups)]))
    trained_by = assign([tokens for *_, tokens in sampled], world.size)
    kept, leaving = [], []
    for number, ((index, sampled_by, _), rank) in enumerate(zip(sampled, trained_by, strict=True)):
        if sampled_by == world.rank:
            (kept if rank == world.rank else leaving).append((number, rank, groups[index]))
    arrived = [moved for moved in world.gather(leaving) if moved[1] == world.rank]
    return [group for *_, group in sorted(kept + arrived, key=lambda placed: placed[0])]


def assign(tokens: Sequence[int], size: int) -> list[int]:
    """Return a rank for each group: the heaviest group goes first, to the rank with the fewest tokens so far.

    The ranks get equal numbers of groups, or numbers that differ by 1.

    Args:
        tokens: positive number of tokens of each group.
        size: number of ranks.
    """
    share, extra = divmod(len(tokens), size)
    loads, counts, ranks = [0] * size, [0] * size, [0] * len(tokens)
    for group in sorted(range(len(tokens)), key=lambda i: -tokens[i]):
        most = share + (extra > sum(count > share for count in counts))
        rank = min((r for r in range(size) if counts[r] < most), key=loads.__getitem__)
        ranks[group] = rank
        loads[rank] += tokens[group]
        counts[rank] += 1
    return ranks


def num_tokens(group: TrainGroup[S]) -> int:
    """Return the tokens that a group takes in a microbatch, each completion's last one included."""
    return len(group.prompt.token_ids) + sum(len(sequence.token_ids) for sequence in group.sequences)


def imbalance(tokens: float, total: float, world: World) -> float:
    """Return the most tokens of a rank, divided by the mean of all ranks: 1 if they have equal work.

    Args:
        tokens: tokens of this rank.
        total: tokens of all ranks.
        world: all ranks call this.
    """
    (most,) = world.max([tokens])
    return most * world.size / total if total else 1.0
