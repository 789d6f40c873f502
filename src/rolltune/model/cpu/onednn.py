"""Linear layers through oneDNN on a CPU, in training and in sampling.

PyTorch hands fp32 products to MKL, which leaves the 512-bit units of other makers' CPUs idle. On 2 cores of an AMD EPYC
oneDNN is about twice as fast, forward and backward, for the shapes of a 135M model.

While sampling, each step multiplies a few dozen rows by every weight, and PyTorch repacks the weights in every bf16
product. Packing them once helps. All weights of SmolLM2-135M by 32 rows, on an AMD EPYC:

  - fp32, one core: MKL 129 ms, oneDNN 68 ms, oneDNN with packed weights 55 ms;
  - bf16, two cores: oneDNN 29 ms, with packed weights 19 ms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rolltune.model.fp32_head import FP32Head

# --- training ---------------------------------------------------------------------------------------------------------


def is_usable(tensor: Tensor) -> bool:
    """Whether products of this tensor go through oneDNN. PyTorch itself hands bf16 products to it."""
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32 and torch.backends.mkldnn.is_available()


def product(a: Tensor, b: Tensor) -> Tensor:
    """Compute ``a @ b.T`` for [M, K] and [N, K], without a gradient."""
    if is_usable(a) and len(a) > 0:
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return a @ b.T


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, multiply: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(x, weight)
        return multiply(x, weight)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        x, weight = ctx.saved_tensors
        (d_y,) = grads
        d_x = product(d_y, weight.T) if ctx.needs_input_grad[0] else None
        d_weight = product(d_y.T, x.T) if ctx.needs_input_grad[1] else None
        return d_x, d_weight, None


def linear(module: nn.Linear, x: Tensor, *, multiply: Callable[[Tensor, Tensor], Tensor] = product) -> Tensor:
    """Compute ``module(x)``, [..., K] -> [..., N].

    Args:
        module: the layer; its own forward runs where oneDNN is not usable.
        x: [..., K].
        multiply: the product of the forward pass, like :func:`product`.
    """
    if not (is_usable(x) and is_usable(module.weight)) or x.numel() == 0:
        return F.linear(x, module.weight, module.bias)
    y = _Linear.apply(x.flatten(0, -2), module.weight, multiply).unflatten(0, x.shape[:-1])  # pyright: ignore
    return y if module.bias is None else y + module.bias


def use_onednn(model: nn.Module) -> None:
    """Make every plain linear layer of ``model`` multiply through oneDNN where it is usable."""
    for module in model.modules():
        if type(module) is nn.Linear and "forward" not in module.__dict__:
            module.forward = partial(linear, module)  # pyright: ignore[reportAttributeAccessIssue]


# --- sampling ---------------------------------------------------------------------------------------------------------


def sampling_linear(x: Tensor, *, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply a linear layer, [..., K] -> [..., N], without a gradient; ``weight`` plain or packed by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(x.to(weight.dtype), weight, bias, "none", [], "")


@contextmanager
def sampling_linears(
    model: nn.Module, *, pack: bool, forward: Callable[..., Tensor] = sampling_linear
) -> Iterator[None]:
    """Make the linear layers of ``model`` multiply through oneDNN, without gradients, until the context ends.

    Has no effect on other devices than the CPU, or if torch was built without oneDNN.

    Args:
        model: if packed, its weights must not change meanwhile.
        pack: whether to multiply by packed copies of the weights, which take as much memory again.
        forward: the forward pass of a layer, like :func:`sampling_linear`.
    """
    linears = [module for module in model.modules() if isinstance(module, nn.Linear) and _is_replaceable(module)]
    replaced = [linear.__dict__.get("forward") for linear in linears]  # set by use_onednn
    try:
        for linear in linears:
            weight = linear.weight.detach()
            if isinstance(linear, FP32Head):
                weight = weight.float()  # once, not in every step
            if pack:
                weight = torch.ops.mkldnn._reorder_linear_weight(weight)
            # setattr, because pyright forbids to assign to a method.
            setattr(linear, "forward", partial(forward, weight=weight, bias=linear.bias))  # noqa: B010
        yield
    finally:
        for linear, old in zip(linears, replaced, strict=True):
            linear.__dict__.pop("forward", None)
            if old is not None:
                setattr(linear, "forward", old)  # noqa: B010


def _is_replaceable(layer: nn.Linear) -> bool:
    # A subclass, or an instance with a forward of its own (a hook of accelerate), may do more than a product.
    forward = layer.__dict__.get("forward")
    return (
        type(layer) in (nn.Linear, FP32Head)
        and (forward is None or getattr(forward, "func", None) is linear)
        and layer.weight.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and (
            isinstance(layer, FP32Head)
            or layer.weight.dtype == torch.float32
            or (layer.weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
        )
    )
