"""Attention within a microbatch: each completion attends to its prompt and to itself, and to nothing else.

A microbatch holds each prompt once, in front of its completions (:func:`rolltune.batch.pack` shows one). A dense
[T, T] mask would spend most of its work on pairs that may not see each other. So the microbatch is split into its
prompts and its completions, each padded to the longest, and attention takes two calls: prompts to themselves, causally;
completions to their prompt and, causally, to themselves.

:func:`rolltune.model.load.load_model` selects this function through transformers' attention interface. A call without a
layout (a plain forward pass, ``generate``) uses transformers' own sdpa attention.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rolltune.types import Microbatch

PACKED_ATTENTION = "rolltune_packed"


@dataclass(frozen=True, kw_only=True)
class PackedLayout:
    """The prompts and completions of a microbatch of T tokens.

    S prompts of at most P tokens, C completions of at most L tokens.

    Attributes:
        prompts: int64 [S, P]; indices into the microbatch, padded with 0.
        completions: int64 [C, L]; likewise.
        prompt_of: int64 [C]; each completion's prompt, 0 .. S - 1.
        visible: bool [C, 1, L, P + L]; the tokens of its prompt and of itself that each completion token sees.
        restore: int64 [T]; the place of each token among the S * P prompt slots followed by the C * L completion slots.
        length: P + L, a bound on the longest sequence.
    """

    prompts: Tensor
    completions: Tensor
    prompt_of: Tensor
    visible: Tensor
    restore: Tensor
    length: int


def packed_layout(microbatch: Microbatch) -> PackedLayout:
    """Find the prompts and completions of a microbatch."""
    segments, sequences = microbatch.segment_index, microbatch.sequence_index
    device, count = segments.device, len(segments)
    is_prompt = sequences == -1
    # The tokens of a prompt are consecutive, and so are those of a completion: each is a span between two changes.
    starts = torch.ones(count, dtype=torch.bool, device=device)
    starts[1:] = (segments[1:] != segments[:-1]) | (sequences[1:] != sequences[:-1])
    span = starts.cumsum(0) - 1  # [T], each token's span
    first = starts.nonzero().squeeze(-1)
    lengths = torch.diff(first, append=torch.tensor([count], device=device))
    offset = torch.arange(count, device=device) - first[span]  # [T], within the span
    prompt_spans = is_prompt[first]
    number = torch.where(prompt_spans, prompt_spans.cumsum(0), (~prompt_spans).cumsum(0)) - 1  # among its kind
    longest_prompt = int(lengths[prompt_spans].max())
    longest_completion = int(lengths[~prompt_spans].max()) if (~prompt_spans).any() else 0

    def token_table(spans: Tensor, longest: int) -> Tensor:  # [number of spans, longest]
        table = torch.zeros(int(spans.sum()), longest, dtype=torch.int64, device=device)
        tokens = spans[span].nonzero().squeeze(-1)
        table[number[span[tokens]], offset[tokens]] = tokens
        return table

    prompts = token_table(prompt_spans, longest_prompt)
    completions = token_table(~prompt_spans, longest_completion)
    prompt_of = (prompt_spans.cumsum(0) - 1)[~prompt_spans]  # the last prompt in front of the completion
    sees_prompt = torch.arange(longest_prompt, device=device) < lengths[prompt_spans][prompt_of][:, None]  # [C, P]
    causal = torch.ones(longest_completion, longest_completion, dtype=torch.bool, device=device).tril()
    visible = torch.cat(
        [
            sees_prompt[:, None, :].expand(-1, longest_completion, -1),
            causal.expand(len(completions), -1, -1),
        ],
        dim=-1,
    )
    slot = number[span] * torch.where(is_prompt, longest_prompt, longest_completion) + offset
    return PackedLayout(
        prompts=prompts,
        completions=completions,
        prompt_of=prompt_of,
        visible=visible[:, None],
        restore=torch.where(is_prompt, slot, slot + prompts.numel()),
        length=longest_prompt + longest_completion,
    )


def take_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Gather tokens into padded sequences: x [H, T, D] and index int64 [N, L] -> [N, H, L, D]."""
    # index_select because the backward pass of plain indexing is ten times slower.
    return x.index_select(1, index.flatten()).unflatten(1, index.shape).transpose(0, 1)


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: PackedLayout | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attend within a microbatch, as transformers' attention interface asks.

    Args:
        module: the calling layer.
        query: [1, H, T, D].
        key: [1, H_kv, T, D].
        value: [1, H_kv, T, D].
        attention_mask: used only without a layout.
        scaling: factor of the scores; None: 1 / sqrt(D).
        dropout: probability with which an attention weight is dropped.
        layout: of the microbatch; None: a plain batch.
        kwargs: further arguments of the model.

    Returns:
        ([1, T, H, D], None).

    Raises:
        ValueError: the layer asks for a kind of attention that is not supported, see :func:`check_supported`.
    """
    if layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    check_supported(layout, kwargs)
    repeats = query.shape[1] // key.shape[1]
    q, k, v = query[0], key[0].repeat_interleave(repeats, 0), value[0].repeat_interleave(repeats, 0)  # [H, T, D]
    prompt_k, prompt_v = take_tokens(k, layout.prompts), take_tokens(v, layout.prompts)
    outputs = [
        F.scaled_dot_product_attention(
            take_tokens(q, layout.prompts), prompt_k, prompt_v, is_causal=True, scale=scaling, dropout_p=dropout
        )
    ]
    if layout.completions.numel():
        outputs.append(
            F.scaled_dot_product_attention(
                take_tokens(q, layout.completions),
                torch.cat([prompt_k[layout.prompt_of], take_tokens(k, layout.completions)], dim=2),
                torch.cat([prompt_v[layout.prompt_of], take_tokens(v, layout.completions)], dim=2),
                attn_mask=layout.visible,
                scale=scaling,
                dropout_p=dropout,
            )
        )
    slots = torch.cat([output.transpose(1, 2).flatten(0, 1) for output in outputs])  # [S * P + C * L, H, D]
    return slots.index_select(0, layout.restore)[None], None


def check_supported(layout: PackedLayout, kwargs: dict) -> None:
    """Raise ValueError if a layer asks for a short sliding window, a softcap or attention sinks."""
    window = kwargs.get("sliding_window")
    if window is not None and window < layout.length:
        raise ValueError(
            f"model.path: the model has a sliding window of {window} tokens, shorter than a sequence of "
            f"{layout.length}; shorten prompts or sampling.max_new_tokens"
        )
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise ValueError(f"model.path: the model's attention uses {name}, which packed attention does not support")


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)
