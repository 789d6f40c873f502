"""Linear layers through oneDNN, with weights laid out for it, while a model writes on a CPU.

A step of decoding multiplies a few dozen rows by every weight. ``torch.nn.functional.linear`` gives fp32 products to
MKL, which is slow on some CPUs, and rearranges the weights in every bf16 product. All weights of SmolLM2-135M by 32
rows on an AMD EPYC: in fp32 (one core) 129 ms, by oneDNN 68 ms, with weights rearranged beforehand 55 ms; in bf16 (two
cores) 29 ms, and 19 ms with weights rearranged beforehand.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from rolltune.model.batch_invariant import sampling_linear
from rolltune.model.cpu import onednn
from rolltune.model.fp32_head import FP32Head


@contextmanager
def onednn_linears(model: nn.Module, *, pack: bool, batch_invariant: bool = False) -> Iterator[None]:
    """Let the linear layers of ``model`` multiply by oneDNN. Gradients do not pass.

    Does nothing on other devices than the CPU, or where torch was built without oneDNN.

    Args:
        model: its weights must not change meanwhile if they are packed.
        pack: multiply by rearranged copies of the weights, which take as much memory again.
        batch_invariant: as the linear layers of :mod:`rolltune.model.batch_invariant` do, with and without ``pack``
        alike.
    """
    linears = [module for module in model.modules() if isinstance(module, nn.Linear) and _is_plain(module)]
    trained = [linear.__dict__.get("forward") for linear in linears]  # what use_onednn gave them to train with
    multiply = sampling_linear if batch_invariant else _forward
    try:
        for linear in linears:
            weight = linear.weight.detach()
            if isinstance(linear, FP32Head):
                weight = weight.float()  # once, not in every step
            if pack:
                weight = torch.ops.mkldnn._reorder_linear_weight(weight)
            # Not an assignment, which pyright forbids.
            setattr(linear, "forward", partial(multiply, weight=weight, bias=linear.bias))  # noqa: B010
        yield
    finally:
        for linear, forward in zip(linears, trained, strict=True):
            linear.__dict__.pop("forward", None)
            if forward is not None:
                setattr(linear, "forward", forward)  # noqa: B010


def _is_plain(linear: nn.Linear) -> bool:
    # A subclass, or an instance with a forward of its own (a hook of accelerate), may do more than a product.
    forward = linear.__dict__.get("forward")
    return (
        type(linear) in (nn.Linear, FP32Head)
        and (forward is None or getattr(forward, "func", None) is onednn.linear)
        and linear.weight.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and (
            isinstance(linear, FP32Head)
            or linear.weight.dtype == torch.float32
            or (linear.weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
        )
    )


def _forward(x: Tensor, *, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x.to(weight.dtype), weight, bias, "none", [], "")
