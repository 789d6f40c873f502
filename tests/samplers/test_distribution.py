"""Draws, against cumulative distributions computed by hand or in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rolltune.samplers import distribution
from rolltune.samplers.distribution import draw, sample, truncate
from rolltune.types import SamplingParams

LARGEST = 1.0 - 2.0**-53  # of the numbers that a generator of float64 in [0, 1) gives


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_draw_by_hand():
    p = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]])
    uniforms = [0.0, 0.2499999, 0.25, 0.7499999, 0.75, LARGEST]
    tokens = [draw(p, f64(u)).item() for u in uniforms]
    assert tokens == [1, 1, 3, 3, 4, 4]


@pytest.mark.parametrize("vocab", [1, 2, 127, 128, 129, 1000, 49152])
def test_draw_inverts_the_cumulative_distribution(vocab: int):
    generator = torch.Generator().manual_seed(vocab)
    p = torch.softmax(2 * torch.randn(16, vocab, generator=generator), -1)
    u = torch.rand(16, dtype=torch.float64, generator=generator)
    tokens = draw(p, u)
    cumulative = torch.cat((torch.zeros(16, 1, dtype=torch.float64), p.double().cumsum(-1)), -1)
    sequences = torch.arange(16)
    target = u * cumulative[:, -1]
    # Sums of blocks are fp32: near a border the neighbour may be taken, off by no more than such a sum's rounding.
    assert (cumulative[sequences, tokens] <= target + 1e-6).all()
    assert (cumulative[sequences, tokens + 1] >= target - 1e-6).all()


def test_each_token_is_drawn_by_the_share_of_uniforms_that_is_its_probability():
    p = torch.tensor([[0.1, 0.0, 0.2, 0.3, 0.4]])
    n = 10_000
    grid = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    counts = draw(p.expand(n, -1), grid).bincount(minlength=5)
    assert counts.tolist() == [1000, 0, 2000, 3000, 4000]


@given(
    st.lists(st.sampled_from([0.0, 0.0, 1e-45, 1e-30, 1e-7, 0.1, 1.0]), min_size=1, max_size=300),
    st.sampled_from([0.0, 5e-324, 2.0**-53, 0.1, 0.5, 1 - 2.0**-24, 1 - 2.0**-52, LARGEST]) | st.floats(0, LARGEST),
)
@settings(max_examples=300, deadline=None)
def test_a_token_of_probability_zero_is_never_drawn(weights: list[float], u: float):
    p = torch.tensor([weights])
    if p.sum() > 0:
        assert p[0, draw(p, f64(u))].item() > 0


@given(st.floats(min_value=1e-45, max_value=1e9))
def test_the_largest_uniform_times_a_total_is_below_the_total(total: float):
    """So there always is a cumulative weight above the target, as :func:`draw` assumes."""
    assert LARGEST * total < total


def test_the_last_uniform_falls_on_the_last_possible_token_of_a_large_vocabulary():
    p = torch.full((2, 49152), 1 / 49152)
    p[0, 40000:] = 0
    p[1, 0] = 0
    assert draw(p, f64(LARGEST, LARGEST)).tolist() == [39999, 49151]
    assert draw(p, f64(0.0, 0.0)).tolist() == [0, 1]


def test_chi_square_over_philox_uniforms():
    p = torch.softmax(torch.randn(1, 200, generator=torch.Generator().manual_seed(3)), -1)
    n = 40_000
    uniforms = torch.from_numpy(np.random.Generator(np.random.Philox(key=5)).random(n))
    counts = draw(p.expand(n, -1), uniforms).bincount(minlength=200).double()
    expected = n * p[0].double()
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    # 199 degrees of freedom: mean 199, standard deviation 20.
    assert 199 - 4 * 20 < chi_square < 199 + 4 * 20


P = [0.1, 0.3, 0.2, 0.3, 0.1]


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [
        (1, 1.0, [1]),  # of the equal 1 and 3 the lower id
        (2, 1.0, [1, 3]),
        (4, 1.0, [0, 1, 2, 3]),  # of 0 and 4 the lower id
        (5, 1.0, [0, 1, 2, 3, 4]),
        (9, 1.0, [0, 1, 2, 3, 4]),
        (0, 0.29, [1]),
        (0, 0.31, [1, 3]),
        (0, 0.61, [1, 2, 3]),
        (0, 0.81, [0, 1, 2, 3]),
        (0, 0.91, [0, 1, 2, 3, 4]),
        (2, 0.51, [1, 3]),  # 1 has 0.5 of the mass of the two
        (2, 0.49, [1]),
        (3, 0.74, [1, 3]),  # 0.3, 0.3, 0.2 renormalised: 0.375, 0.375, 0.25
        (3, 0.76, [1, 2, 3]),
    ],
)
def test_support_by_hand(top_k: int, top_p: float, kept: list[int]):
    q = truncate(torch.tensor([P]), top_k=top_k, top_p=top_p)[0]
    assert q.nonzero().flatten().tolist() == kept
    mass = sum(P[i] for i in kept)
    assert q[kept].tolist() == pytest.approx([P[i] / mass for i in kept], rel=1e-6)


@pytest.mark.parametrize(("top_k", "top_p", "kept"), [(2, 1.0, [1, 3]), (0, 0.81, [0, 1, 2, 3]), (3, 0.74, [1, 3])])
def test_a_sample_has_its_support(top_k: int, top_p: float, kept: list[int]):
    params = SamplingParams(temperature=2.0, top_k=top_k, top_p=top_p)
    logits = torch.tensor([P, [1.0, 0.0, 0.0, 0.0, 0.0]]).log().mul(2.0)
    tokens, logprobs, support = sample(logits, f64(LARGEST, LARGEST), params)
    assert support is not None
    assert [mask.nonzero().flatten().tolist() for mask in support] == [kept, [0]]
    assert tokens.tolist() == [3, 0]
    assert logprobs.exp().tolist() == pytest.approx([0.3 / sum(P[i] for i in kept), 1.0])


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=0.0, top_k=2, top_p=0.5)])
def test_without_truncation_there_is_no_support(params: SamplingParams):
    assert not params.truncates
    assert sample(torch.tensor([P]), f64(0.5), params)[2] is None


def test_top_p_keeps_a_set_whose_mass_is_exactly_enough():
    q = truncate(torch.tensor([[0.5, 0.25, 0.125, 0.125]]), top_k=0, top_p=0.75)
    assert q[0].nonzero().flatten().tolist() == [0, 1]


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("spread", [0.0, 0.5, 5.0])
def test_nucleus_equals_the_one_found_by_sorting(monkeypatch, top_p: float, spread: float):
    monkeypatch.setattr(distribution, "NUCLEUS_CANDIDATES", 4)  # to need a wider search
    p = torch.softmax(spread * torch.randn(8, 300, generator=torch.Generator().manual_seed(1)), -1)
    q = truncate(p, top_k=0, top_p=top_p)
    for exact, got in zip(p.double(), q, strict=True):
        values, order = exact.sort(descending=True, stable=True)
        count = int((values.cumsum(-1) < top_p).sum()) + 1
        expected = torch.zeros_like(exact)
        expected[order[:count]] = values[:count] / values[:count].sum()
        assert torch.equal(got.nonzero(), expected.nonzero())
        torch.testing.assert_close(got.double(), expected, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_logprobs_are_those_of_the_tempered_softmax(temperature: float, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(64, 1000, generator=generator)).to(dtype)
    expected = torch.log_softmax(logits.double() / temperature, -1)
    u = torch.rand(64, dtype=torch.float64, generator=generator)
    tokens, logprobs, _ = sample(logits.clone(), u, SamplingParams(temperature=temperature))
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs.double(), expected[torch.arange(64), tokens], atol=2e-6, rtol=0)


def test_greedy_takes_the_most_probable_token_with_certainty():
    logits = torch.tensor([[0.0, 3.0, 2.0], [5.0, 1.0, -1.0]])
    tokens, logprobs, _ = sample(logits, f64(0.99, 0.99), SamplingParams(temperature=0.0))
    assert tokens.tolist() == [1, 0]
    assert logprobs.tolist() == [0.0, 0.0]


def test_a_low_temperature_neither_overflows_nor_leaves_the_best_token():
    tokens, logprobs, _ = sample(torch.tensor([[1e4, 0.0, -1e4]]), f64(LARGEST), SamplingParams(temperature=1e-3))
    assert tokens.tolist() == [0]
    assert logprobs.tolist() == [0.0]


def test_nan_logits_show_in_the_logprob():
    _, logprobs, _ = sample(torch.full((1, 300), math.nan), f64(0.5), SamplingParams())
    assert math.isnan(logprobs.item())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_logits_that_are_not_finite_have_no_log_prob(temperature, wrong):
    logits = torch.zeros(3, 10)
    logits[1, 4] = wrong
    logits[2, 4] = -math.inf  # a token that is ruled out is no fault
    params = SamplingParams(temperature=temperature)
    _, logprobs, _ = sample(logits, torch.full((3,), 0.5, dtype=torch.float64), params)
    assert logprobs.isnan().tolist() == [False, True, False]
