"""Each correction by hand, and what has to hold for all of them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rolltune.corrections import (
    Correction,
    GeometricRejection,
    K3Rejection,
    SequenceMIS,
    SequenceTIS,
    TokenMask,
    TokenTIS,
)

# Completions of 2, 1 and 3 tokens with ratios (1/2, 3 | 2 | 1/2, 2, 1/4); their products 3/2, 2, 1/4.
RATIOS = (0.5, 3.0, 2.0, 0.5, 2.0, 0.25)
IDS = torch.tensor([0, 0, 1, 2, 2, 2])

CORRECTIONS: list[tuple[Correction, float, float]] = [  # with the least and the largest weight, 0 aside
    (TokenTIS(max_ratio=1.5), 0.0, 1.5),
    (TokenMask(low=0.6, high=1.4), 0.6, 1.4),
    (SequenceTIS(max_ratio=1.5), 0.0, 1.5),
    (SequenceMIS(max_ratio=1.5), 0.0, 1.5),
    (GeometricRejection(low=0.8, high=1.2), 1.0, 1.0),
    (K3Rejection(max_k3=0.1), 1.0, 1.0),
]
every_correction = pytest.mark.parametrize(
    ("correction", "least", "largest"), CORRECTIONS, ids=lambda value: repr(value) if callable(value) else ""
)


def weights(correction: Correction, ratios=RATIOS, ids=IDS) -> list[float]:
    sampler = torch.full((len(ratios),), 0.1)
    return correction((sampler * torch.tensor(ratios)).log(), sampler.log(), ids, int(ids.max()) + 1).tolist()


def approx(*values: float):
    return pytest.approx(values, rel=1e-5)


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_token_tis():
    assert weights(TokenTIS(max_ratio=1.5)) == approx(0.5, 1.5, 1.5, 0.5, 1.5, 0.25)
    assert weights(TokenTIS(max_ratio=10.0)) == approx(*RATIOS)


def test_token_mask():
    assert weights(TokenMask(low=0.4, high=2.5)) == approx(0.5, 0, 2, 0.5, 2, 0)
    assert weights(TokenMask(low=0.0, high=10.0)) == approx(*RATIOS)


def test_token_mask_keeps_its_bounds():
    old, sampler = torch.tensor([-1.0, -2.0]), torch.tensor([-2.0, -1.0])
    low, high = (old - sampler).exp().min().item(), (old - sampler).exp().max().item()
    assert TokenMask(low=low, high=high)(old, sampler, torch.tensor([0, 0]), 1).tolist() == [high, low]


def test_sequence_tis():
    assert weights(SequenceTIS(max_ratio=1.75)) == approx(1.5, 1.5, 1.75, 0.25, 0.25, 0.25)


def test_sequence_mis():
    assert weights(SequenceMIS(max_ratio=1.75)) == approx(1.5, 1.5, 0, 0.25, 0.25, 0.25)


def test_geometric_rejection():
    # sqrt(3/2) = 1.2247, 2, cbrt(1/4) = 0.6300
    assert weights(GeometricRejection(low=0.63, high=1.2)) == [0, 0, 0, 0, 0, 0]
    assert weights(GeometricRejection(low=0.62, high=1.2)) == [0, 0, 0, 1, 1, 1]
    assert weights(GeometricRejection(low=0.64, high=1.3)) == [1, 1, 0, 0, 0, 0]
    assert weights(GeometricRejection(low=0.0, high=2.1)) == [1, 1, 1, 1, 1, 1]


def test_geometric_rejection_looks_at_the_mean_and_lets_differences_cancel_where_k3_does_not():
    ratios, ids = (4.0, 0.25), torch.tensor([0, 0])
    assert weights(GeometricRejection(), ratios, ids) == [1, 1]
    assert weights(K3Rejection(max_k3=0.1), ratios, ids) == [0, 0]


def test_k3_rejection():
    # rho - 1 - log rho: (1/2: 0.1931, 3: 0.9014 | 2: 0.3069 | 0.1931, 0.3069, 1/4: 0.6363);
    # means 0.5473, 0.3069, 0.3788
    assert weights(K3Rejection(max_k3=0.3)) == [0, 0, 0, 0, 0, 0]
    assert weights(K3Rejection(max_k3=0.31)) == [0, 0, 1, 0, 0, 0]
    assert weights(K3Rejection(max_k3=0.38)) == [0, 0, 1, 1, 1, 1]
    assert weights(K3Rejection(max_k3=0.55)) == [1, 1, 1, 1, 1, 1]


# What verl 0.9.1 gives for these log-ratios (compute_rollout_correction_weights with rollout_is and its threshold, or
# compute_rollout_rejection_mask with rollout_rs; seq_mean_k1's bounds are on the inverse).
VERL_LOG_RATIOS = (0.4, -0.9, 0.05, 1.2, -0.3, 0.2, 0.15, -0.02)
VERL_IDS = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2])
VERL = {
    "token, 1.2": (
        TokenTIS(max_ratio=1.2),
        (1.2, 0.40657, 1.051271, 1.2, 0.740818, 1.2, 1.161834, 0.980199),
    ),
    "token, 0.5_1.2": (TokenMask(low=0.5, high=1.2), (0, 0, 1.051271, 0, 0.740818, 0, 1.161834, 0.980199)),
    "sequence, 1.5": (SequenceTIS(max_ratio=1.5), (0.637628,) * 3 + (1.5,) + (1.030455,) * 4),
    "seq_mean_k1, 0.8_1.25": (GeometricRejection(low=1 / 1.25, high=1 / 0.8), (1, 1, 1, 0, 1, 1, 1, 1)),
    "seq_mean_k3, 0.1": (K3Rejection(max_k3=0.1), (0, 0, 0, 0, 1, 1, 1, 1)),
    "seq_mean_k3, 0.2": (K3Rejection(max_k3=0.2), (1, 1, 1, 0, 1, 1, 1, 1)),
}


@pytest.mark.parametrize("name", VERL)
def test_weights_are_verls(name):
    correction, expected = VERL[name]
    sampler = torch.full((len(VERL_LOG_RATIOS),), -1.0)
    found = correction(sampler + torch.tensor(VERL_LOG_RATIOS), sampler, VERL_IDS, 3)
    assert found.tolist() == approx(*expected)


def test_log_ratios_are_bounded_and_the_sum_of_a_completion_is_as_a_whole():
    """Token by token, +30 and -30 would become +20 and -20; a completion's sum is 25, and 15, before it is bounded."""
    old, ids = torch.tensor([30.0, -5.0, 30.0, -15.0]), torch.tensor([0, 0, 1, 1])
    sampler = torch.zeros(4)
    bound = math.exp(20)
    kept = SequenceMIS(max_ratio=1e30)(old, sampler, ids, 2)
    assert kept.tolist() == approx(bound, bound, math.exp(15), math.exp(15))
    kept = TokenTIS(max_ratio=1e30)(old, sampler, ids, 2)
    assert kept.tolist() == approx(bound, math.exp(-5), bound, math.exp(-15))
    impossible = torch.tensor([-math.inf, -1.0])  # the sampler says that it cannot have written the first token
    assert TokenTIS()(torch.tensor([-1.0, -1.0]), impossible, torch.tensor([0, 0]), 1).tolist() == [2.0, 1.0]


def test_defaults_are_the_published_settings():
    assert TokenTIS() == TokenTIS(max_ratio=2.0) and SequenceTIS() == SequenceTIS(max_ratio=2.0)
    assert TokenMask() == TokenMask(low=0.5, high=5.0)
    assert SequenceMIS() == SequenceMIS(max_ratio=3.0)
    assert GeometricRejection() == GeometricRejection(low=0.999, high=1.001)
    assert K3Rejection() == K3Rejection(max_k3=0.01)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TokenTIS(max_ratio=0.9), "max_ratio: 0.9; must be >= 1"),
        (lambda: SequenceTIS(max_ratio=math.nan), "max_ratio: nan; must be >= 1"),
        (lambda: SequenceMIS(max_ratio=0), "max_ratio: 0; must be >= 1"),
        (lambda: TokenMask(low=-0.1), "low: -0.1; must be in"),
        (lambda: TokenMask(high=0.5), "high: 0.5; must be >= 1"),
        (lambda: GeometricRejection(low=1.1), "low: 1.1; must be in"),
        (lambda: K3Rejection(max_k3=0), "max_k3: 0; must be > 0"),
    ],
)
def test_values_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- what holds for all -----------------------------------------------------------------------------------------------

LENGTHS = st.lists(st.integers(1, 6), min_size=1, max_size=5)


def random_case(lengths: list[int], seed: int, spread: float):
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    sampler = -3 * torch.rand(tokens, generator=generator)
    return sampler + spread * torch.randn(tokens, generator=generator), sampler, ids


@every_correction
@given(lengths=LENGTHS, seed=st.integers(0, 2**16), spread=st.sampled_from([0.01, 0.3, 3.0, 30.0]))
def test_weights_are_in_range_float32_and_without_a_gradient(correction, least, largest, lengths, seed, spread):
    old, sampler, ids = random_case(lengths, seed, spread)
    found = correction(old.requires_grad_(), sampler, ids, len(lengths))
    assert found.shape == ids.shape and found.dtype == torch.float32 and not found.requires_grad
    assert ((found == 0) | ((found >= least) & (found <= largest))).all()


@every_correction
@given(lengths=LENGTHS, seed=st.integers(0, 2**16))
def test_where_both_agree_weights_are_exactly_one(correction, least, largest, lengths, seed):
    _, sampler, ids = random_case(lengths, seed, 0.0)
    assert (correction(sampler, sampler, ids, len(lengths)) == 1).all()


@every_correction
@given(lengths=LENGTHS, seed=st.integers(0, 2**16), data=st.data())
def test_completions_do_not_look_at_each_other(correction, least, largest, lengths, seed, data):
    """Neither their order in a row nor what else is in it changes a weight."""
    old, sampler, ids = random_case(lengths, seed, 0.3)
    whole = correction(old, sampler, ids, len(lengths))
    order = data.draw(st.permutations(range(len(lengths))))
    picked = torch.cat([(ids == i).nonzero().squeeze(1) for i in order])
    numbers = torch.tensor([order.index(int(i)) for i in ids[picked]])
    torch.testing.assert_close(correction(old[picked], sampler[picked], numbers, len(order)), whole[picked])
    for i in order:
        mine = ids == i
        alone = correction(old[mine], sampler[mine], torch.zeros_like(ids[mine]), 1)
        torch.testing.assert_close(alone, whole[mine])


@every_correction
def test_bf16_log_probs_are_subtracted_in_float32(correction, least, largest):
    old, sampler = torch.tensor([-1.0, -2.0]).bfloat16(), torch.tensor([-1.0078125, -2.015625]).bfloat16()
    ids = torch.tensor([0, 0])
    assert torch.equal(correction(old, sampler, ids, 1), correction(old.float(), sampler.float(), ids, 1))
    assert correction(old, sampler, ids, 1).dtype == torch.float32
