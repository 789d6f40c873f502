"""Properties of every loss."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rolltune.losses.cispo import CISPOLoss
from rolltune.losses.dapo import DAPOLoss
from rolltune.losses.dr_grpo import DrGRPOLoss
from rolltune.losses.grpo import GRPOLoss
from rolltune.losses.gspo import GSPOLoss
from rolltune.losses.reinforce import ReinforceLoss
from rolltune.types import Loss, LossInputs, LossTotals

MAX_TOKENS = 8


def all_losses(kl_coef: float) -> list[Loss]:
    return [
        GRPOLoss(kl_coef=kl_coef),
        DrGRPOLoss(max_completion_tokens=MAX_TOKENS, kl_coef=kl_coef),
        DAPOLoss(kl_coef=kl_coef),
        GSPOLoss(clip_low=0.1, clip_high=0.1, kl_coef=kl_coef),
        CISPOLoss(clip_high=1.2, kl_coef=kl_coef),
        ReinforceLoss(kl_coef=kl_coef),
    ]


def name(loss: Loss) -> str:
    return type(loss).__name__


def random_inputs(lengths: list[int], seed: int) -> LossInputs:
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    sequence_index = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    logprobs = -3 * torch.rand(tokens, generator=generator)
    return LossInputs(
        logprobs=logprobs.requires_grad_(),
        old_logprobs=logprobs.detach() + 0.4 * torch.randn(tokens, generator=generator),
        advantages=torch.randn(len(lengths), generator=generator)[sequence_index],
        sequence_index=sequence_index,
        num_sequences=len(lengths),
        reference_logprobs=logprobs.detach() + 0.4 * torch.randn(tokens, generator=generator),
        importance_weights=2 * torch.rand(tokens, generator=generator),
    )


def select(inputs: LossInputs, sequences: list[int]) -> LossInputs:
    """A microbatch of some of the completions, numbered from 0."""
    keep = torch.cat([(inputs.sequence_index == i).nonzero().squeeze(1) for i in sequences])
    tensors = ["logprobs", "old_logprobs", "advantages", "reference_logprobs", "importance_weights"]
    return LossInputs(
        **{field: getattr(inputs, field)[keep] for field in tensors},
        sequence_index=torch.tensor([sequences.index(int(i)) for i in inputs.sequence_index[keep]]),
        num_sequences=len(sequences),
    )


def totals_of(inputs: LossInputs) -> LossTotals:
    return LossTotals(tokens=len(inputs.logprobs), sequences=inputs.num_sequences)


def gradient(loss: Loss, inputs: LossInputs, totals: LossTotals) -> torch.Tensor:
    value, _ = loss(inputs, totals)
    return torch.autograd.grad(value, inputs.logprobs)[0]


def on_policy(inputs: LossInputs) -> LossInputs:
    return replace(inputs, old_logprobs=inputs.logprobs.detach())


def test_defaults_are_the_published_settings():
    # Sources are in the docstrings. A silent change would change every run that relies on a default.
    assert GRPOLoss() == GRPOLoss(clip_low=0.2, clip_high=0.2, kl_coef=0.04)
    assert DrGRPOLoss(max_completion_tokens=8) == DrGRPOLoss(
        max_completion_tokens=8, clip_low=0.2, clip_high=0.2, kl_coef=0.0
    )
    assert DAPOLoss() == DAPOLoss(clip_low=0.2, clip_high=0.28, kl_coef=0.0)
    assert GSPOLoss() == GSPOLoss(clip_low=3e-4, clip_high=4e-4, kl_coef=0.0)
    assert CISPOLoss() == CISPOLoss(clip_high=5.0, kl_coef=0.0)
    assert ReinforceLoss() == ReinforceLoss(kl_coef=0.0)


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (GRPOLoss, {"clip_low": -0.1}),
        (GRPOLoss, {"clip_low": 0.0}),
        (GRPOLoss, {"clip_low": 10.0}),
        (GRPOLoss, {"clip_high": 0.0}),
        (GRPOLoss, {"clip_high": math.nan}),
        (GRPOLoss, {"kl_coef": -0.04}),
        (GRPOLoss, {"kl_coef": math.inf}),
        (DrGRPOLoss, {"max_completion_tokens": 0}),
        (DrGRPOLoss, {"clip_low": -1.0, "max_completion_tokens": 8}),
        (DrGRPOLoss, {"kl_coef": -1.0, "max_completion_tokens": 8}),
        (DAPOLoss, {"clip_low": 1.5}),
        (DAPOLoss, {"clip_high": -0.28}),
        (DAPOLoss, {"kl_coef": -1.0}),
        (GSPOLoss, {"clip_low": 0.0}),
        (GSPOLoss, {"clip_high": -0.0004}),
        (GSPOLoss, {"kl_coef": -1.0}),
        (CISPOLoss, {"clip_high": 0.28}),
        (CISPOLoss, {"kl_coef": -1.0}),
        (ReinforceLoss, {"kl_coef": -1.0}),
    ],
)
def test_values_out_of_range_are_refused(loss, options):
    key, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"{key}: {value}"):
        loss(**options)


@pytest.mark.parametrize("loss", all_losses(0.04), ids=name)
@given(lengths=st.lists(st.integers(1, MAX_TOKENS), min_size=2, max_size=6), seed=st.integers(0, 2**16), data=st.data())
def test_microbatches_add_up_to_the_whole(loss, lengths, seed, data):
    inputs = random_inputs(lengths, seed)
    totals = totals_of(inputs)
    order = data.draw(st.permutations(range(len(lengths))))
    cut = data.draw(st.integers(1, len(lengths) - 1))
    whole, whole_metrics = loss(inputs, totals)
    parts = [loss(select(inputs, order[:cut]), totals), loss(select(inputs, order[cut:]), totals)]
    summed = parts[0][0] + parts[1][0]
    torch.testing.assert_close(summed, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        torch.autograd.grad(summed, inputs.logprobs)[0],
        torch.autograd.grad(whole, inputs.logprobs)[0],
        rtol=1e-5,
        atol=1e-6,
    )
    for metric, value in whole_metrics.items():
        torch.testing.assert_close(parts[0][1][metric] + parts[1][1][metric], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", all_losses(0.04), ids=name)
def test_the_order_of_tokens_does_not_matter(loss):
    inputs = random_inputs([3, 1, 5], seed=1)
    totals = totals_of(inputs)
    shuffle = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    tensors = ["logprobs", "old_logprobs", "advantages", "reference_logprobs", "importance_weights", "sequence_index"]
    shuffled = replace(inputs, **{field: getattr(inputs, field)[shuffle] for field in tensors})
    torch.testing.assert_close(loss(shuffled, totals)[0], loss(inputs, totals)[0])


@pytest.mark.parametrize("loss", all_losses(0.0), ids=name)
def test_on_policy_gradient_is_minus_the_advantage_times_the_weights(loss):
    lengths = [3, 1, 5]
    inputs = on_policy(random_inputs(lengths, seed=2))
    tokens, sequences = sum(lengths), len(lengths)
    own_length = torch.tensor(lengths)[inputs.sequence_index]
    denominator = {
        "GRPOLoss": sequences * own_length,
        "DrGRPOLoss": sequences * MAX_TOKENS,
        "DAPOLoss": tokens,
        "GSPOLoss": sequences * own_length,
        "CISPOLoss": tokens,
        "ReinforceLoss": sequences,
    }[name(loss)]
    assert inputs.importance_weights is not None
    weights = inputs.importance_weights
    if name(loss) == "GSPOLoss":  # the ratio is the completion's, and so is its weight
        weights = torch.cat([part.mean().expand(len(part)) for part in weights.split(lengths)])
    torch.testing.assert_close(
        gradient(loss, inputs, totals_of(inputs)), -inputs.advantages * weights / denominator, rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("loss", all_losses(0.0), ids=name)
def test_on_policy_nothing_is_clipped(loss):
    inputs = on_policy(random_inputs([3, 1, 5], seed=3))
    _, metrics = loss(inputs, totals_of(inputs))
    assert metrics.get("clip_fraction", torch.zeros(())).item() == 0


@pytest.mark.parametrize("loss", all_losses(0.0), ids=name)
def test_no_advantage_no_gradient(loss):
    inputs = random_inputs([3, 1, 5], seed=4)
    inputs = replace(inputs, advantages=torch.zeros_like(inputs.advantages))
    assert gradient(loss, inputs, totals_of(inputs)).abs().max().item() == 0.0


@pytest.mark.parametrize("loss", all_losses(0.04), ids=name)
def test_without_advantage_the_kl_term_pulls_towards_the_reference(loss):
    inputs = random_inputs([3, 1, 5], seed=5)
    inputs = replace(inputs, advantages=torch.zeros_like(inputs.advantages))
    assert inputs.reference_logprobs is not None
    step = -gradient(loss, inputs, totals_of(inputs))
    assert (step.sign() == (inputs.reference_logprobs - inputs.logprobs).sign()).all()


@pytest.mark.parametrize("loss", all_losses(0.0), ids=name)
def test_without_a_kl_term_no_reference_is_needed(loss):
    inputs = replace(random_inputs([3, 1, 5], seed=6), reference_logprobs=None)
    value, metrics = loss(inputs, totals_of(inputs))
    assert value.isfinite() and "kl" not in metrics


@pytest.mark.parametrize("loss", all_losses(0.04), ids=name)
def test_with_a_kl_term_a_missing_reference_is_an_error(loss):
    inputs = replace(random_inputs([3, 1, 5], seed=7), reference_logprobs=None)
    with pytest.raises(AssertionError, match="reference_logprobs"):
        loss(inputs, totals_of(inputs))


@pytest.mark.parametrize("loss", all_losses(0.04), ids=name)
def test_scalar_and_metrics_are_float32_and_metrics_are_detached(loss):
    inputs = random_inputs([3, 1, 5], seed=8)
    value, metrics = loss(inputs, totals_of(inputs))
    assert value.shape == () and value.dtype == torch.float32
    assert all(m.shape == () and m.dtype == torch.float32 and not m.requires_grad for m in metrics.values())
