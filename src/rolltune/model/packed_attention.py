"""Attention within a microbatch: each completion attends to its prompt and to itself, and to nothing else.

A microbatch holds each prompt once, in front of its completions (:func:`rolltune.batch.pack` shows one). A dense
[T, T] mask would spend most of its work on pairs that may not see each other. So the microbatch is split into its
prompts and its completions, each padded to the longest, and attention takes two calls: prompts to themselves, causally;
completions to their prompt and, causally, to themselves.

A model says what else its tokens may not see (a sliding window, chunks) by the mask functions that it hands to
transformers. :func:`packed_mask` evaluates them on the positions within each sequence. Its result takes the place of
the mask, so the layout reaches every attention layer that is given a mask.

:func:`rolltune.model.load.load_model` selects both functions through transformers' interfaces. Outside of
:func:`packed_rows` (a plain forward pass, ``generate``) they are transformers' own sdpa attention and mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from rolltune.types import Microbatch

PACKED_ATTENTION = "rolltune_packed"
# Arguments of the attention interface that a plain sdpa call would ignore.
CHANGES_SCORES = ("softcap", "s_aux", "position_bias")


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
        prompt_lengths: int64 [S].
        length: P + L, a bound on the longest sequence.
    """

    prompts: Tensor
    completions: Tensor
    prompt_of: Tensor
    visible: Tensor
    restore: Tensor
    prompt_lengths: Tensor
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
        prompt_lengths=lengths[prompt_spans],
        length=longest_prompt + longest_completion,
    )


@dataclass(frozen=True, kw_only=True)
class PackedMask:
    """Which tokens of their own sequence the tokens of a microbatch see, in layers of one kind.

    Attributes:
        layout: of the microbatch.
        prompts: bool [S or 1, 1, P, P]; None: causal.
        completions: bool [C, 1, L, P + L]; ``layout.visible`` if causal.
    """

    layout: PackedLayout
    prompts: Tensor | None
    completions: Tensor

    @classmethod
    def causal(cls, layout: PackedLayout) -> PackedMask:
        return cls(layout=layout, prompts=None, completions=layout.visible)

    @property
    def is_causal(self) -> bool:
        return self.prompts is None


_layout: ContextVar[PackedLayout | None] = ContextVar("layout", default=None)


@contextmanager
def packed_rows(layout: PackedLayout) -> Iterator[None]:
    """Make :func:`packed_mask` and :func:`packed_attention` treat the model's input as a microbatch."""
    token = _layout.set(layout)
    try:
        yield
    finally:
        _layout.reset(token)


def packed_mask(*args, mask_function: Callable = causal_mask_function, **kwargs) -> PackedMask | Tensor | None:
    """Build the mask of one kind of layers, as transformers' mask interface asks.

    Args:
        args: passed on to transformers' own function outside of :func:`packed_rows`.
        mask_function: the model's; called with tensors (batch, head, query position, key position).
        kwargs: likewise.
    """
    layout = _layout.get()
    if layout is None:
        return sdpa_mask(*args, mask_function=mask_function, **kwargs)
    causal = PackedMask.causal(layout)
    if mask_function is causal_mask_function:
        return causal
    device, longest_prompt, longest_completion = (
        layout.prompts.device,
        layout.prompts.shape[1],
        layout.completions.shape[1],
    )
    zero = torch.zeros((), dtype=torch.int64, device=device)
    prompt = torch.arange(longest_prompt, device=device)
    own = layout.prompt_lengths[layout.prompt_of][:, None] + torch.arange(longest_completion, device=device)  # [C, L]
    keys = torch.cat([prompt.expand(len(own), -1), own], dim=1)  # [C, P + L]
    prompts = mask_function(zero, zero, prompt[:, None], prompt[None, :])[None, None]
    completions = layout.visible & mask_function(zero, zero, own[:, :, None], keys[:, None, :])[:, None]
    if torch.equal(prompts[0, 0], torch.ones_like(prompts[0, 0]).tril()) and torch.equal(completions, layout.visible):
        return causal  # the sequences are shorter than the window
    return PackedMask(layout=layout, prompts=prompts, completions=completions)


def take_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Gather tokens into padded sequences: x [H, T, D] and index int64 [N, L] -> [N, H, L, D]."""
    # index_select because the backward pass of plain indexing is ten times slower.
    return x.index_select(1, index.flatten()).unflatten(1, index.shape).transpose(0, 1)


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: PackedMask | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attend within a microbatch, as transformers' attention interface asks.

    Args:
        module: the calling layer.
        query: [1, H, T, D].
        key: [1, H_kv, T, D].
        value: [1, H_kv, T, D'].
        attention_mask: of :func:`packed_mask`; anything else outside of :func:`packed_rows` only.
        scaling: factor of the scores; None: 1 / sqrt(D).
        dropout: probability with which an attention weight is dropped.
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        s_aux: [H]; attention sinks, one more score in each softmax, without a value.
        kwargs: further arguments of the model.

    Returns:
        ([1, T, H, D'], None).

    Raises:
        ValueError: the layer did not pass the mask on, or asks for something that is not supported.
    """
    if not isinstance(attention_mask, PackedMask):
        check_plain(module, kwargs | {"softcap": softcap, "s_aux": s_aux})
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if kwargs.get("position_bias") is not None:
        raise ValueError(f"{type(module).__name__} has a position bias, which packed attention does not support")
    layout = attention_mask.layout
    repeats = query.shape[1] // key.shape[1]
    q, k, v = query[0], key[0].repeat_interleave(repeats, 0), value[0].repeat_interleave(repeats, 0)  # [H, T, D]
    options = {"scaling": scaling, "dropout": dropout, "softcap": softcap, "sinks": s_aux}
    prompt_k, prompt_v = take_tokens(k, layout.prompts), take_tokens(v, layout.prompts)
    outputs = [_attend(take_tokens(q, layout.prompts), prompt_k, prompt_v, attention_mask.prompts, **options)]
    if layout.completions.numel():
        outputs.append(
            _attend(
                take_tokens(q, layout.completions),
                torch.cat([prompt_k[layout.prompt_of], take_tokens(k, layout.completions)], dim=2),
                torch.cat([prompt_v[layout.prompt_of], take_tokens(v, layout.completions)], dim=2),
                attention_mask.completions,
                **options,
            )
        )
    slots = torch.cat([output.transpose(1, 2).flatten(0, 1) for output in outputs])  # [S * P + C * L, H, D']
    return slots.index_select(0, layout.restore)[None], None


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None,
    *,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attend from q [N, H, M, D] to k [N, H, K, D]; ``visible`` is bool [N or 1, 1, M, K], or None for causal."""
    if softcap is None and sinks is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, is_causal=visible is None, scale=scaling, dropout_p=dropout
        )
    if visible is None:
        visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    scores = (q @ k.mT).float() * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    if sinks is not None:
        sink = sinks.float()[None, :, None, None].expand(len(q), -1, q.shape[2], 1)
        weights = torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return F.dropout(weights.to(v.dtype), dropout) @ v


def check_plain(module: torch.nn.Module, kwargs: dict) -> None:
    """Raise ValueError if a call without a :class:`PackedMask` would give wrong results.

    Args:
        module: the calling layer.
        kwargs: arguments of the attention interface.
    """
    name = type(module).__name__
    if _layout.get() is not None:
        raise ValueError(f"{name} does not hand the attention mask on, so packed sequences would see each other")
    for option in CHANGES_SCORES:
        if kwargs.get(option) is not None:
            raise ValueError(f"{name} asks for {option}, which plain sdpa attention does not know; use eager attention")


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, packed_mask)
