"""Linear layers with weights laid out for oneDNN, while a model writes on a CPU.

A step of decoding multiplies a few dozen rows by every weight. For such shapes ``torch.nn.functional.linear`` takes MKL
in fp32, and rearranges the weights in every call in bf16. A product with weights that were rearranged once is twice
as fast in fp32 (SmolLM2-135M, 32 rows, 2 cores of an AMD EPYC: 31 ms a step instead of 79) and 1.5 times in bf16.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn


@contextmanager
def packed_linears(model: nn.Module) -> Iterator[None]:
    """Let the linear layers of ``model`` multiply by rearranged copies of their weights.

    The copies are made of the weights as they stand on entry and need as much memory again. Does nothing on other
    devices or where torch was built without oneDNN. Gradients do not pass.
    """
    linears = [module for module in model.modules() if isinstance(module, nn.Linear) and _can_pack(module)]
    try:
        for linear in linears:
            weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
            setattr(linear, "forward", partial(_forward, weight=weight, bias=linear.bias))  # noqa: B010 (for pyright)
        yield
    finally:
        for linear in linears:
            linear.__dict__.pop("forward", None)


def _can_pack(module: nn.Linear) -> bool:
    # A subclass, or an instance with a forward of its own (a hook of accelerate), may do more than a product.
    return (
        type(module) is nn.Linear
        and "forward" not in module.__dict__
        and module.weight.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and (
            module.weight.dtype == torch.float32
            or (module.weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
        )
    )


def _forward(x: Tensor, *, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
