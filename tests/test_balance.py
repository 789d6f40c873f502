"""Groups that move between ranks, so that all train about as many tokens."""

import random
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st
from thread_world import on_ranks

from rolltune.balance import assign, balance, imbalance
from rolltune.batch import TokenSequence, TrainGroup
from rolltune.types import Prompt


def group(name: int, tokens: int) -> TrainGroup[TokenSequence]:
    return TrainGroup(prompt=Prompt(token_ids=(name,)), sequences=(TokenSequence(token_ids=(0,) * (tokens - 1)),))


def test_the_heaviest_group_goes_first_to_the_rank_with_the_fewest_tokens():
    # 9 and 8 take the ranks, 5 joins the 8 (8 < 9), 4 the 9; then 3 joins 13 of both: the first rank; 2 what has room.
    assert assign([9, 2, 5, 3, 8, 4], 2) == [0, 1, 1, 0, 1, 0]
    assert assign([7, 7, 7], 2) == [0, 1, 0]
    assert assign([], 2) == []


@given(st.lists(st.integers(1, 4096), max_size=40), st.integers(1, 8))
def test_ranks_get_equal_numbers_of_groups(tokens, size):
    counts = [assign(tokens, size).count(rank) for rank in range(size)]
    assert sum(counts) == len(tokens) and max(counts) - min(counts) <= 1


@pytest.mark.parametrize(("size", "per_rank", "limit"), [(2, 4, 1.05), (8, 8, 1.05), (64, 4, 1.25)])
def test_lengths_of_real_spread_are_balanced(size, per_rank, limit):
    """Groups of 8 completions with lognormal lengths: what one rank has over the mean, before and after."""
    rng, before, after = random.Random(0), [], []
    for _ in range(20):
        tokens = []
        for _ in range(size * per_rank):
            level = rng.gauss(0, 0.5)
            tokens.append(sum(min(4096, int(300 * 2.718 ** (level + rng.gauss(0, 0.6)))) + 1 for _ in range(8)))
        for ranks, ratios in (([i % size for i in range(len(tokens))], before), (assign(tokens, size), after)):
            loads = [sum(t for t, r in zip(tokens, ranks, strict=True) if r == rank) for rank in range(size)]
            ratios.append(max(loads) / mean(loads))
    assert mean(after) < limit < mean(before)


def test_groups_move_whole_and_none_is_lost():
    tokens = {0: 100, 1: 10, 2: 90, 3: 20, 4: 80}  # group: tokens; group i is sampled on rank i % 2

    def run(world):
        sampled = [group(i, tokens[i]) for i in range(world.rank, len(tokens), world.size)]
        trained = balance(sampled, world)
        total = sum(tokens[group.prompt.token_ids[0]] for group in trained)
        return [group.prompt.token_ids[0] for group in trained], imbalance(total, sum(tokens.values()), world)

    (first, ratio), (second, same_ratio) = on_ranks(2, run)
    assert (first, second) == ([0, 1, 3], [2, 4])  # 100 + 20 + 10, and 90 + 80
    assert ratio == same_ratio == 170 / 150


def test_a_rank_without_groups_gets_some():
    def run(world):
        return [g.prompt.token_ids[0] for g in balance([group(0, 5), group(1, 6)] if world.is_main else [], world)]

    assert on_ranks(2, run) == [[1], [0]]
    assert on_ranks(1, run) == [[0, 1]]
