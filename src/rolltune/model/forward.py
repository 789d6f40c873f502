"""Log-probs of a microbatch's trained tokens: the forward pass that is trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rolltune.model.batch_invariant import is_batch_invariant
from rolltune.model.fp32_head import FP32Head
from rolltune.model.head import own_logprobs
from rolltune.model.logprobs import selected_logprobs
from rolltune.model.packed_attention import PackedLayout, packed_layout, packed_rows
from rolltune.model.parts import decoder
from rolltune.model.unpacked import sequence_tokens, unpacked_hidden
from rolltune.types import Microbatch


@dataclass(frozen=True, kw_only=True)
class Forward:
    """How a model's log-probs are computed; :func:`rolltune.model.choose.choose_forward` decides.

    Attributes:
        packed: whether all sequences of a microbatch share one row, by packed attention.
        plain_head: whether logits are ``hidden @ weight.T``.
        rope_limit: sequences on different sides of this length may not share a pass, because RoPE's frequencies follow
            from the longest; None: no such limit.
        max_length: longest sequence, since RoPE's frequencies depend on it beyond; None: no such limit.
        note: one line for the user; empty if there is nothing unusual.
    """

    packed: bool = True
    plain_head: bool = True
    rope_limit: int | None = None
    max_length: int | None = None
    note: str = ""


def forward_of(model: PreTrainedModel) -> Forward:
    """Return how the model's log-probs are computed: what :func:`set_forward` set, or the fast way."""
    return getattr(model, "rolltune_forward", Forward())


def set_forward(model: PreTrainedModel, forward: Forward) -> None:
    object.__setattr__(model, "rolltune_forward", forward)


def packed_logprobs(model: PreTrainedModel, microbatch: Microbatch, *, temperature: float) -> tuple[Tensor, Tensor]:
    """Compute log-probs and entropy of a microbatch's trained tokens. The LM head runs on these tokens only.

    Args:
        model: a causal LM loaded by :func:`rolltune.model.load.load_model`.
        microbatch: T tokens, N of them trained.
        temperature: the sampling temperature, by which logits are divided.

    Returns:
        (log-probs, entropy), both float32 [N], under the softmax over the microbatch's support if it has one.
    """
    forward = forward_of(model)
    hidden = _hidden(model, microbatch, forward)
    head = model.get_output_embeddings()
    if isinstance(head, FP32Head):
        hidden = hidden.float()
    if not forward.plain_head:
        return own_logprobs(model, hidden, microbatch.target_ids, temperature, microbatch.support)
    assert isinstance(head, nn.Linear)
    return selected_logprobs(
        hidden,
        head.weight,
        microbatch.target_ids,
        temperature,
        microbatch.support,
        batch_invariant=is_batch_invariant(model),
    )


def _hidden(model: PreTrainedModel, microbatch: Microbatch, forward: Forward) -> Tensor:
    """Return the hidden states [N, H] that predict the trained tokens."""
    layout = packed_layout(microbatch)
    packed = forward.packed
    limit = forward.max_length or forward.rope_limit
    if limit is not None and layout.length > limit:
        beyond = [len(tokens) > limit for tokens in sequence_tokens(microbatch)]
        if any(beyond) and forward.max_length is not None:
            raise ValueError(
                f"model.path: RoPE of {type(model).__name__} changes with every length beyond {limit} tokens; shorten "
                "prompts or responses"
            )
        packed = packed and all(beyond) == any(beyond)
    if packed:
        return packed_hidden(model, microbatch, layout)
    return unpacked_hidden(model, microbatch, rope_limit=forward.rope_limit)


def packed_hidden(model: PreTrainedModel, microbatch: Microbatch, layout: PackedLayout) -> Tensor:
    """Return the hidden states [N, H] that predict the trained tokens, from one row of all T tokens."""
    ids = microbatch.input_ids[None]
    with packed_rows(layout):
        output = decoder(model)(
            input_ids=ids,
            position_ids=microbatch.position_ids[None],
            # Without a mask, transformers would look for the sequences in the positions.
            attention_mask=torch.ones_like(ids, dtype=torch.bool),
            use_cache=False,
        )
    return output[0][0, microbatch.predictor_index]
