"""The load-balancing loss of mixture-of-experts models (Switch Transformer, arXiv 2101.03961, equations 4 to 6)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def routers(model: PreTrainedModel) -> list[tuple[nn.Module, int]]:
    """Return the routers of a model, each with the place of the logits in its output; empty for a dense model.

    Models name the class of their routers for transformers' recording of outputs.
    """
    for part in model.modules():
        recorders = getattr(part, "_can_record_outputs", None) or {}
        if (recorder := recorders.get("router_logits")) is not None:
            kind, index = getattr(recorder, "target_class", recorder), getattr(recorder, "index", 0)
            return [(m, index) for m in part.modules() if isinstance(kind, type) and isinstance(m, kind)]
    return []


@contextmanager
def recorded_router_logits(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Yield a list that the forward passes within the context fill with each layer's logits, [T, experts]."""
    logits: list[Tensor] = []

    def record(index: int):
        def hook(_module, _inputs, output) -> None:
            found = output[index] if isinstance(output, tuple) else output
            logits.append(found.flatten(0, -2))

        return hook

    hooks = [router.register_forward_hook(record(index)) for router, index in routers(model)]
    try:
        yield logits
    finally:
        for hook in hooks:
            hook.remove()


def load_balancing_loss(logits: Sequence[Tensor], top_k: int) -> Tensor:
    """Compute the number of experts times the sum over experts of (share of tokens) x (mean router probability).

    The shares and means run over the tokens of all layers, as in transformers. Perfect balance gives ``top_k``.

    Args:
        logits: [T, experts] of each layer.
        top_k: experts of each token.
    """
    probabilities = torch.cat([torch.softmax(layer.float(), dim=-1) for layer in logits])  # [layers * T, experts]
    count, experts = probabilities.shape
    chosen = probabilities.topk(top_k, dim=-1).indices.flatten()
    share = torch.bincount(chosen, minlength=experts) / count
    return experts * (share * probabilities.mean(0)).sum()
