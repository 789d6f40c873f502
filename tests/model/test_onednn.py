import copy

import pytest
import torch
from torch import nn

from rolltune.model.cpu.onednn import linear, product, use_onednn
from rolltune.model.cpu.onednn_linear import onednn_linears


@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 1, 1), (33, 16, 65), (2, 128, 3)])
def test_product(shape):
    m, k, n = shape
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(m, k, generator=generator), torch.randn(n, k, generator=generator)
    torch.testing.assert_close(product(a, b), a @ b.T, atol=1e-5, rtol=1e-5)
    # The backward pass hands over transposed views.
    torch.testing.assert_close(product(a.T, (b @ a.T).T.T.contiguous()), a.T @ (b @ a.T).T, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(product(a.T, a.T), a.T @ a, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", [(6,), (2, 3), (1, 2, 3)])
def test_values_and_gradients_equal_torch(bias, leading):
    generator = torch.Generator().manual_seed(1)
    ours = nn.Linear(5, 4, bias=bias)
    theirs = copy.deepcopy(ours)
    x = torch.randn(*leading, 5, generator=generator)
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    y1, y2 = linear(ours, x1), theirs(x2)
    torch.testing.assert_close(y1, y2)
    upstream = torch.randn(y1.shape, generator=generator)
    y1.backward(upstream)
    y2.backward(upstream)
    torch.testing.assert_close(x1.grad, x2.grad)
    for p1, p2 in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p1.grad, p2.grad)


def test_frozen_weights_get_no_gradient():
    layer = nn.Linear(3, 2, bias=False).requires_grad_(False)
    x = torch.ones(1, 3, requires_grad=True)
    linear(layer, x).sum().backward()
    assert layer.weight.grad is None
    torch.testing.assert_close(x.grad, layer.weight.sum(0, keepdim=True))


def test_other_dtypes_and_empty_inputs_go_to_torch():
    layer = nn.Linear(3, 2).bfloat16()
    torch.testing.assert_close(linear(layer, torch.ones(1, 3).bfloat16()), layer(torch.ones(1, 3).bfloat16()))
    assert linear(nn.Linear(3, 2), torch.ones(0, 3)).shape == (0, 2)


def test_a_model_follows_its_weights_and_its_copies():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    use_onednn(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    x = torch.ones(1, 3)
    assert other(x).abs().sum() == 0 and model(x).abs().sum() > 0
    assert model.state_dict().keys() == other.state_dict().keys()


def test_sampling_packs_the_weights_of_a_model_in_training_and_gives_them_back():
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    use_onednn(model)
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    before = model(x)
    forward = model[0].__dict__["forward"]
    with torch.no_grad(), onednn_linears(model, pack=True):
        assert model[0].__dict__["forward"] is not forward
        torch.testing.assert_close(model(x), before)
    assert model[0].__dict__["forward"] is forward
    model(x).sum().backward()
    assert model[0].weight.grad is not None
