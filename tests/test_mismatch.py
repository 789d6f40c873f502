"""How far two policies are apart: by hand, over micro-batches and ranks, and when it stops a run."""

import math
from dataclasses import replace

import pytest
import torch
from thread_world import on_ranks

from rolltune.batch import TrainGroup, TrainSequence, pack
from rolltune.distributed import World
from rolltune.mismatch import (
    BUCKETS,
    Mismatch,
    MismatchError,
    MismatchLimit,
    MismatchMeter,
    TokenGaps,
    completion_quarters,
)
from rolltune.types import Completion, Prompt

ALONE = World(rank=0, size=1, device=torch.device("cpu"))


def make_row(*logprobs: tuple[float, ...], prompt: int = 3):
    """One prompt and a completion for each tuple of the sampler's log-probs."""
    sequences = tuple(TrainSequence(token_ids=(7,) * len(each), logprobs=each, advantage=1.0) for each in logprobs)
    (row,) = pack([TrainGroup(prompt=Prompt(token_ids=(5,) * prompt), sequences=sequences)], max_tokens=1000)
    return row


def read(*parts, world=ALONE) -> Mismatch:
    meter = MismatchMeter()
    for old, row in parts:
        meter.add(old, row)
    seen = meter.read(world)
    assert seen is not None
    return seen


def test_by_hand():
    # Differences log(2), -log(2), 0 | log(1.05), of tokens that the sampler gave 0.005, 0.4, 0.6 | 0.92.
    row = make_row((math.log(0.005), math.log(0.4), math.log(0.6)), (math.log(0.92),))
    old = torch.tensor([math.log(0.01), math.log(0.2), math.log(0.6), math.log(0.966)])
    seen = read((old, row))
    two, near = math.log(2), math.log(1.05)
    assert seen.tokens == 4
    assert seen.mean_abs == pytest.approx((2 * two + near) / 4, rel=1e-5)
    assert seen.max_abs == pytest.approx(two, rel=1e-6)
    assert seen.k3 == pytest.approx((2 - 1 - two + 0.5 - 1 + two + 0.05 - near) / 4, rel=1e-4)
    assert seen.mean_ratio == pytest.approx((2 + 0.5 + 1 + 1.05) / 4, rel=1e-6)
    assert seen.outside == 0.5
    # Of three tokens, one each is in quarters 1, 2 and 3; the only one of a completion is in quarter 1.
    assert seen.by_position[:2] == (pytest.approx((two + near) / 2, rel=1e-5), pytest.approx(two, rel=1e-6))
    assert seen.by_position[2:] == (pytest.approx(0, abs=1e-6), None)
    assert seen.by_probability[0] == pytest.approx(two, rel=1e-5) and seen.by_probability[1] is None
    assert seen.by_probability[2:] == (
        pytest.approx(two, rel=1e-6),
        pytest.approx(0, abs=1e-6),
        pytest.approx(near, rel=1e-5),
    )
    metrics = seen.metrics()
    assert metrics["mismatch/k3"] == seen.k3 and metrics["mismatch/position/quarter_2"] == seen.by_position[1]
    assert metrics["mismatch/probability/0.9_to_1"] == seen.by_probability[4]
    assert "mismatch/position/quarter_4" not in metrics and "mismatch/probability/0.01_to_0.1" not in metrics


def test_gaps_of_tokens_are_found_by_completion():
    row = make_row((-0.1, -0.2, -3.0), (-0.7,))
    gaps = TokenGaps()
    gaps.add(row.sampler_logprobs + torch.tensor([0.5, -0.25, 0.0, 1.0]), row)

    def completion(*logprobs: float, token: int = 7) -> Completion:
        return Completion(
            token_ids=(token,) * len(logprobs), logprobs=logprobs, finish_reason="stop", policy_version=0, text=""
        )

    assert gaps.of(completion(-0.1, -0.2, -3.0)) == pytest.approx([0.5, -0.25, 0.0], abs=1e-6)
    assert gaps.of(completion(-0.7)) == pytest.approx([1.0], abs=1e-6)
    assert gaps.of(completion(-0.7, token=8)) is gaps.of(completion(-0.1)) is None


def test_policies_that_agree_are_apart_by_exactly_nothing():
    row = make_row((-0.5, -1.0), (-2.0,))
    seen = read((row.sampler_logprobs, row))
    assert (seen.mean_abs, seen.max_abs, seen.k3, seen.mean_ratio, seen.outside) == (0, 0, 0, 1, 0)


def test_quarters_are_of_each_completion():
    row = make_row((-1.0,) * 8, (-1.0,) * 5, (-1.0,), (-1.0,) * 2)
    of_each = [completion_quarters(row)[row.target_sequence_index == i].tolist() for i in range(4)]
    assert of_each == [[0, 0, 1, 1, 2, 2, 3, 3], [0, 0, 1, 2, 3], [0], [0, 2]]


@pytest.mark.parametrize(("probability", "bucket"), [(0.0, 0), (0.0099, 0), (0.0101, 1), (0.3, 2), (0.7, 3), (1.0, 4)])
def test_buckets_of_the_samplers_probability(probability, bucket):
    row = make_row((math.log(probability) if probability else -math.inf,))
    found = read((torch.tensor([-1.0]), row)).by_probability
    assert [i for i, value in enumerate(found) if value is not None] == [bucket] and len(found) == len(BUCKETS)


def random_parts(count: int):
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(count):
        lengths = torch.randint(1, 9, (3,), generator=generator).tolist()
        row = make_row(*(tuple((-6 * torch.rand(n, generator=generator)).tolist()) for n in lengths))
        rows.append((row.sampler_logprobs + 0.2 * torch.randn(sum(lengths), generator=generator), row))
    return rows


def test_ranks_and_micro_batches_add_up_to_one():
    parts = random_parts(6)
    whole = read(*parts)
    for seen in on_ranks(3, lambda world: read(*parts[2 * world.rank : 2 * world.rank + 2], world=world)):
        assert seen.metrics() == pytest.approx(whole.metrics(), rel=1e-9)
    # A mean of the micro-batches' means is something else.
    assert sum(read(part).mean_abs for part in parts) / 6 != pytest.approx(whole.mean_abs, rel=1e-3)


def test_a_rank_without_rows_counts_for_nothing_and_none_with_any_is_none():
    parts = random_parts(1)
    for seen in on_ranks(2, lambda world: read(*parts[: 1 - world.rank], world=world)):
        assert seen.metrics() == read(*parts).metrics()
    assert on_ranks(2, lambda world: MismatchMeter().read(world)) == [None, None]


# --- limits -----------------------------------------------------------------------------------------------------------

FINE = Mismatch(
    tokens=4,
    mean_abs=0.01,
    max_abs=0.2,
    k3=1e-3,
    mean_ratio=1.01,
    outside=0.05,
    by_position=(0.01, 0.01, 0.01, None),
    by_probability=(0.1, 0.01, 0.01, 0.001, 0.0),
)


def test_within_the_limits():
    MismatchLimit().check(FINE)
    MismatchLimit(max_k3=1e-3, max_ratio_gap=0.0101, max_outside=0.05).check(FINE)


@pytest.mark.parametrize(
    ("limit", "changes", "fragment"),
    [
        (MismatchLimit(), {"k3": 0.02}, "mismatch.max_k3: k3 of sampler and trainer is 0.02, more than 0.015"),
        (
            MismatchLimit(),
            {"mean_ratio": 2.0},
            "mismatch.max_ratio_gap: the mean ratio's distance from 1 .* is 1, more",
        ),
        (MismatchLimit(), {"mean_ratio": 0.89}, "mismatch.max_ratio_gap: .* is 0.11, more than 0.1"),
        (
            MismatchLimit(max_outside=0.1),
            {"outside": 0.5},
            r"mismatch.max_outside: the share of ratios .* is 0.5, more",
        ),
        (MismatchLimit(), {"k3": math.nan}, "mismatch.max_k3: k3 of sampler and trainer is nan"),
    ],
)
def test_beyond_a_limit(limit, changes, fragment):
    with pytest.raises(MismatchError, match=fragment) as raised:
        limit.check(replace(FINE, **changes))
    said = str(raised.value)
    assert "mean by quarter of the completion: 0.01, 0.01, 0.01, -;" in said
    for cause in ("stale weights", "prefix cache", "temperature, top-p", "precision", "LoRA", "chat template"):
        assert cause in said


def test_what_is_not_looked_at_stops_nothing():
    MismatchLimit(max_k3=None).check(replace(FINE, k3=1.0))
    MismatchLimit(max_ratio_gap=None).check(replace(FINE, mean_ratio=2.0))


def test_limits_out_of_range():
    with pytest.raises(ValueError, match="max_outside: -1"):
        MismatchLimit(max_outside=-1)
    with pytest.raises(ValueError, match="all are null"):
        MismatchLimit(max_k3=None, max_ratio_gap=None)
