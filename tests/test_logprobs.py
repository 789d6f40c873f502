import math

import pytest
import torch

from rolltune import logprobs
from rolltune.logprobs import selected_logprobs


def plain(hidden, weight, targets, temperature):
    z = torch.log_softmax(hidden.float() @ weight.float().T / temperature, dim=-1)
    return z.gather(-1, targets[:, None]).squeeze(-1), -(z.exp() * z).sum(-1)


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 16, generator=generator)
    weight = torch.randn(53, 16, generator=generator)
    return hidden, weight, torch.randint(0, 53, (37,), generator=generator)


@pytest.fixture(params=[1, 7, 1000], ids="chunk={}".format)
def chunks(request, monkeypatch):
    monkeypatch.setattr(logprobs, "chunk_size", lambda *_: request.param)


def test_hand_computed():
    # One hidden unit, logits (0, ln 3) / T: at T = 1 the probabilities are 1/4 and 3/4.
    weight = torch.tensor([[0.0], [math.log(3)]])
    logp, entropy = selected_logprobs(torch.ones(2, 1), weight, torch.tensor([0, 1]), 1.0)
    torch.testing.assert_close(logp, torch.tensor([0.25, 0.75]).log())
    expected = -(0.25 * torch.tensor(0.25).log() + 0.75 * torch.tensor(0.75).log())
    torch.testing.assert_close(entropy, expected.expand(2))


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_values_and_gradients_equal_the_plain_computation(inputs, chunks, temperature):
    hidden, weight, targets = inputs
    upstream = torch.randn(37, generator=torch.Generator().manual_seed(1))
    ours = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    theirs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    logp, entropy = selected_logprobs(*ours, targets, temperature)
    expected, expected_entropy = plain(*theirs, targets, temperature)
    torch.testing.assert_close(logp, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, expected_entropy, atol=1e-5, rtol=1e-5)
    (logp @ upstream).backward()
    (expected @ upstream).backward()
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, reference.grad, atol=1e-5, rtol=1e-5)


def test_large_logits_do_not_overflow():
    logp, entropy = selected_logprobs(torch.tensor([[200.0]]), torch.tensor([[1.0], [-1.0]]), torch.tensor([0]), 0.5)
    assert logp.item() == 0.0 and entropy.item() == 0.0


def test_a_frozen_head_gets_no_gradient(inputs, chunks):
    hidden, weight, targets = inputs
    hidden = hidden.clone().requires_grad_()
    selected_logprobs(hidden, weight, targets, 1.0)[0].sum().backward()
    assert hidden.grad is not None and weight.grad is None


def test_bfloat16_gradient_of_the_head_is_summed_in_fp32(inputs, monkeypatch):
    """With one token a chunk, sums in bf16 would lose what is below 1/256 of them."""
    monkeypatch.setattr(logprobs, "chunk_size", lambda *_: 1)
    hidden, weight, targets = (inputs[0].bfloat16(), inputs[1].bfloat16(), inputs[2])
    ours = weight.clone().requires_grad_()
    logp, _ = selected_logprobs(hidden, ours, targets, 1.0)
    assert logp.dtype == torch.float32
    logp.sum().backward()
    exact = weight.float().clone().requires_grad_()
    plain(hidden.float(), exact, targets, 1.0)[0].sum().backward()
    assert ours.grad is not None and exact.grad is not None
    relative = (ours.grad.float() - exact.grad).norm() / exact.grad.norm()
    assert relative < 0.02


def test_logits_never_exist_whole():
    """The largest tensor on the way is a chunk: the size of the vocabulary does not change it."""
    for vocab in (1_000, 49_152, 128_256, 256_000):
        assert logprobs.chunk_size(vocab) * vocab * 4 <= max(logprobs.CHUNK_BYTES["cpu"], 16 * vocab * 4)


def test_gradcheck_in_float32_by_finite_differences(inputs):
    hidden, weight, targets = inputs
    hidden = hidden[:2].clone().requires_grad_()
    selected_logprobs(hidden, weight, targets[:2], 0.8)[0].sum().backward()
    step = torch.zeros_like(hidden)
    step[1, 3] = 1e-2
    up, down = (plain(hidden.detach() + s * step, weight, targets[:2], 0.8)[0].double().sum() for s in (1, -1))
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad[1, 3].double(), (up - down) / 2e-2, atol=2e-3, rtol=2e-3)
