"""Linear layers through oneDNN equal torch's, in training and in sampling, and models are restored."""

import copy

import pytest
import torch
from torch import nn

from rolltune.model.cpu.onednn import linear, product, sampling_linears, use_onednn


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


# --- sampling ---------------------------------------------------------------------------------------------------------


def has_bf16_units() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


class Doubled(nn.Linear):
    """A subclass that does more than a product."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("shape", [(5, 7), (1, 1), (64, 130)])
def test_sampling_products(shape: tuple[int, int], dtype: torch.dtype, tolerance: float, bias: bool, pack: bool):
    torch.manual_seed(0)
    linear = nn.Linear(*shape, bias=bias).to(dtype)
    x = torch.randn(3, 4, shape[0]).to(dtype)
    with torch.no_grad():
        expected = nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double() if bias else None)
        with sampling_linears(nn.Sequential(linear), pack=pack):
            # bf16 goes to oneDNN only on CPUs with the instructions for it.
            assert ("forward" in linear.__dict__) == (dtype == torch.float32 or has_bf16_units())
            for part, wanted in ((x, expected), (x[:, -1:], expected[:, -1:]), (x[:0], expected[:0])):
                y = linear(part)
                assert y.dtype == dtype
                torch.testing.assert_close(y.double(), wanted, atol=tolerance, rtol=tolerance)
    assert "forward" not in linear.__dict__


def test_layers_that_do_more_than_a_product_are_not_replaced():
    hooked = nn.Linear(2, 2)
    hooked.__dict__["forward"] = forward = lambda x: x
    with sampling_linears(nn.Sequential(Doubled(2, 2), hooked, nn.Linear(2, 2).double()), pack=True) as _:
        assert hooked.forward is forward
    model = nn.Sequential(Doubled(2, 2), nn.Linear(2, 2).double())
    with sampling_linears(model, pack=True):
        assert not any("forward" in module.__dict__ for module in model)
    assert hooked.forward is forward


def test_layers_are_restored_after_an_error():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    with pytest.raises(KeyError), sampling_linears(model, pack=True):
        raise KeyError
    assert not any("forward" in module.__dict__ for module in model)
    model(torch.ones(1, 2)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_training_forward_is_restored_after_sampling():
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    use_onednn(model)
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    before = model(x)
    forward = model[0].__dict__["forward"]
    with torch.no_grad(), sampling_linears(model, pack=True):
        assert model[0].__dict__["forward"] is not forward
        torch.testing.assert_close(model(x), before)
    assert model[0].__dict__["forward"] is forward
    model(x).sum().backward()
    assert model[0].weight.grad is not None
