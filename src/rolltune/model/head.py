"""Log-probs of models whose head is more than ``hidden @ weight.T``: a bias, a scale, a softcap, multipliers.

Logits then come from the model's own forward pass, with its decoder replaced by the hidden states that are already
there. As in :mod:`rolltune.model.logprobs`, chunks of tokens are recomputed in the backward pass, so the full
[tokens, vocab] logits never exist.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from rolltune.model.logprobs import check_support, chunk_size, restrict
from rolltune.model.parts import decoder
from rolltune.types import Support

ROUNDING = 1e-4  # relative error of float32 logits that are summed in another order


@torch.no_grad()
def is_plain_head(model: PreTrainedModel) -> bool:
    """Whether the model's logits are ``hidden @ weight.T``, tried on made-up hidden states in float32.

    Zeros show a bias. Hidden states with logits around 50 show a scale, and a softcap at any usual height.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        return False
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, head.weight.shape[1], generator=generator).to(head.weight.device)
    plain = hidden @ head.weight.T
    hidden = torch.cat([torch.zeros_like(hidden[:1]), hidden * (50 / plain.std())])
    plain = hidden @ head.weight.T
    own = own_logits(model, hidden)
    error = (own - plain).norm() / plain.norm()
    return own.shape == plain.shape and not own[0].any() and error.item() <= ROUNDING


def own_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Compute logits float32 [N, V] of hidden states [N, H] by the model's own forward pass."""
    with _decoder_replaced(model, hidden[None]):
        ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
        return model(input_ids=ids, use_cache=False).logits[0].float()


def own_logprobs(
    model: PreTrainedModel, hidden: Tensor, targets: Tensor, temperature: float, support: Support | None
) -> tuple[Tensor, Tensor]:
    """Compute log-probs of ``targets`` and the entropy under the model's own logits.

    Arguments, result and errors are those of :func:`rolltune.model.logprobs.selected_logprobs`, but for the head.
    """

    def of_chunk(hidden: Tensor, start: int) -> tuple[Tensor, Tensor]:
        z = own_logits(model, hidden) / temperature
        restrict(z, support, start)
        logprobs = torch.log_softmax(z, dim=-1)
        entropy = torch.special.entr(logprobs.detach().exp()).sum(-1)
        return logprobs.gather(-1, targets[start : start + len(hidden), None]).squeeze(-1), entropy

    size = chunk_size(model.config.get_text_config().vocab_size, hidden.device.type)
    parts = [
        checkpoint(of_chunk, hidden[start : start + size], start, use_reentrant=False)
        for start in range(0, len(hidden), size)
    ]
    logprobs, entropy = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    check_support(logprobs, targets, support)
    return logprobs, entropy


class _Output(BaseModelOutputWithPast):
    """A decoder's output; whatever else a family's forward pass hands on is None."""

    def __getattr__(self, name: str) -> None:
        return None


class _Hidden(nn.Module):
    """Stands in for a decoder and its parts: returns given hidden states, and has the decoder's other attributes."""

    def __init__(self, hidden: Tensor, original: nn.Module):
        super().__init__()
        self.__dict__.update(hidden=hidden, original=original)  # not as a submodule

    def __getattr__(self, name: str):
        value = getattr(self.__dict__["original"], name)
        return self if isinstance(value, nn.Module) else value  # OPT's forward pass calls its decoder's decoder

    def forward(self, *_args, **_kwargs) -> _Output:
        return _Output(last_hidden_state=self.__dict__["hidden"])


@contextmanager
def _decoder_replaced(model: PreTrainedModel, hidden: Tensor) -> Iterator[None]:
    original = decoder(model)
    name = next(name for name, child in model.named_children() if child is original)
    model._modules[name] = _Hidden(hidden, original)  # in its place, so that the order of the modules stays
    try:
        yield
    finally:
        model._modules[name] = original
