import math

import pytest
import torch

from rolltune.model import logprobs
from rolltune.model.logprobs import selected_logprobs
from rolltune.types import Support


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_hidden_states_make_the_products_fp32(inputs, chunks, dtype):
    """Forward and backward are to the last bit those of an fp32 weight; only its gradient is rounded, at the end."""
    hidden, weight, targets = inputs
    low, exact = (weight.to(dtype).to(kind).requires_grad_() for kind in (dtype, torch.float32))
    seen = []
    for head in (low, exact):
        h = hidden.clone().requires_grad_()
        logp, entropy = selected_logprobs(h, head, targets, 0.8)
        logp.sum().backward()
        seen.append((logp.detach(), entropy, h.grad))
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    assert low.grad is not None and exact.grad is not None
    assert low.grad.dtype == dtype and torch.equal(low.grad, exact.grad.to(dtype))


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


# --- restricted to a support ------------------------------------------------------------------------------------------


def support_of(*sets: list[int]) -> Support:
    ids = [token for kept in sets for token in kept]
    ends = [sum(map(len, sets[:i])) for i in range(len(sets) + 1)]
    return Support(token_ids=torch.tensor(ids, dtype=torch.int32), offsets=torch.tensor(ends))


def plain_restricted(hidden, weight, targets, temperature, sets):
    """In float64, with every token that was left out at -inf."""
    z = hidden.double() @ weight.double().T / temperature
    outside = torch.ones_like(z, dtype=torch.bool)
    for i, kept in enumerate(sets):
        outside[i, kept or slice(None)] = False
    z = torch.log_softmax(z.masked_fill(outside, -torch.inf), -1)
    entropy = -(z.exp() * z.masked_fill(outside, 0.0)).sum(-1)
    return z.gather(-1, targets[:, None]).squeeze(-1), entropy


@pytest.fixture
def sets(inputs) -> list[list[int]]:
    """1 to 53 ids a token, the target included; two tokens have the full vocabulary."""
    targets, generator = inputs[2], torch.Generator().manual_seed(2)
    sizes = torch.randint(0, 53, (37,), generator=generator).tolist()
    others = [torch.randperm(53, generator=generator)[:size].tolist() for size in sizes]
    kept = [sorted({*more, target}) for more, target in zip(others, targets.tolist(), strict=True)]
    kept[3] = kept[20] = []
    kept[0], kept[36] = [targets[0].item()], list(range(53))
    return kept


def test_restricted_hand_computed():
    # Probabilities 1/8, 3/8, 4/8 in full; of the first two alone 1/4 and 3/4.
    weight = torch.tensor([[0.0], [math.log(3)], [math.log(4)]])
    support = support_of([0, 1], [0, 1], [0, 2], [])
    logp, entropy = selected_logprobs(torch.ones(4, 1), weight, torch.tensor([0, 1, 2, 2]), 1.0, support)
    assert logp.exp().tolist() == pytest.approx([1 / 4, 3 / 4, 4 / 5, 1 / 2])
    two = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    five = -(0.2 * math.log(0.2) + 0.8 * math.log(0.8))
    assert entropy[:3].tolist() == pytest.approx([two, two, five])


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_restricted_values_and_gradients_equal_the_plain_computation(inputs, sets, chunks, temperature):
    hidden, weight, targets = inputs
    upstream = torch.randn(37, generator=torch.Generator().manual_seed(1))
    ours = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    theirs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    logp, entropy = selected_logprobs(*ours, targets, temperature, support_of(*sets))
    expected, expected_entropy = plain_restricted(*theirs, targets, temperature, sets)
    torch.testing.assert_close(logp.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy.double(), expected_entropy, atol=1e-5, rtol=1e-5)
    (logp @ upstream).backward()
    (expected @ upstream.double()).backward()
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, reference.grad, atol=1e-5, rtol=1e-5)


def test_restricted_to_every_id_is_the_full_softmax(inputs, chunks):
    hidden, weight, targets = inputs
    full = selected_logprobs(hidden, weight, targets, 0.8)
    for sets in ([list(range(53))] * 37, [[]] * 37):
        restricted = selected_logprobs(hidden, weight, targets, 0.8, support_of(*sets))
        for ours, theirs in zip(restricted, full, strict=True):
            assert torch.equal(ours, theirs)


def test_a_token_without_alternatives_has_logprob_zero_and_no_gradient(inputs, chunks):
    hidden, weight, targets = inputs[0].clone().requires_grad_(), inputs[1].clone().requires_grad_(), inputs[2]
    logp, entropy = selected_logprobs(hidden, weight, targets, 0.7, support_of(*targets[:, None].tolist()))
    assert logp.tolist() == entropy.tolist() == [0.0] * 37
    logp.sum().backward()
    assert not hidden.grad.any() and not weight.grad.any()


def test_a_token_in_no_support_gets_no_gradient(inputs, chunks):
    hidden, weight, targets = inputs[0], inputs[1].clone().requires_grad_(), inputs[2] % 10
    selected_logprobs(hidden, weight, targets, 1.0, support_of(*[list(range(10))] * 37))[0].sum().backward()
    assert weight.grad[:10].all() and not weight.grad[10:].any()


def test_a_target_outside_its_support_is_refused(inputs, chunks):
    hidden, weight, targets = inputs
    sets = [[target] for target in targets.tolist()]
    sets[9] = [token for token in range(53) if token != targets[9]]
    with pytest.raises(ValueError, match=f"support: token {targets[9]}, number 9 of 37"):
        selected_logprobs(hidden, weight, targets, 1.0, support_of(*sets))
