"""Products by oneDNN are those of torch.nn.functional.linear, and nothing stays behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rolltune.model.cpu.onednn_linear import onednn_linears


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
def test_products(shape: tuple[int, int], dtype: torch.dtype, tolerance: float, bias: bool, pack: bool):
    torch.manual_seed(0)
    linear = nn.Linear(*shape, bias=bias).to(dtype)
    x = torch.randn(3, 4, shape[0]).to(dtype)
    with torch.no_grad():
        expected = nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double() if bias else None)
        with onednn_linears(nn.Sequential(linear), pack=pack):
            # bf16 goes to oneDNN only on CPUs with the instructions for it.
            assert ("forward" in linear.__dict__) == (dtype == torch.float32 or has_bf16_units())
            for part, wanted in ((x, expected), (x[:, -1:], expected[:, -1:]), (x[:0], expected[:0])):
                y = linear(part)
                assert y.dtype == dtype
                torch.testing.assert_close(y.double(), wanted, atol=tolerance, rtol=tolerance)
    assert "forward" not in linear.__dict__


def test_layers_that_do_more_are_left_alone():
    hooked = nn.Linear(2, 2)
    hooked.__dict__["forward"] = forward = lambda x: x
    with onednn_linears(nn.Sequential(Doubled(2, 2), hooked, nn.Linear(2, 2).double()), pack=True) as _:
        assert hooked.forward is forward
    model = nn.Sequential(Doubled(2, 2), nn.Linear(2, 2).double())
    with onednn_linears(model, pack=True):
        assert not any("forward" in module.__dict__ for module in model)
    assert hooked.forward is forward


def test_layers_are_left_as_they_were_when_something_fails():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    with pytest.raises(KeyError), onednn_linears(model, pack=True):
        raise KeyError
    assert not any("forward" in module.__dict__ for module in model)
    model(torch.ones(1, 2)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
