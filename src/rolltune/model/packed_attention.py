"""Attention of packed rows: a prompt's keys and values serve all of its completions, and nothing else is looked at.

A dense [T, T] mask would spend most of its work on pairs that see nothing: siblings and other segments. Here a row
is taken apart into its prompts and its completions, each padded to the longest, and attended to in two calls:
prompts causally to themselves, completions to their prompt and causally to themselves.

Models reach it through transformers' attention interface, under the name that :func:`rolltune.model.load.load_model`
loads
them with. A call without a layout (plain forward, generate) is transformers' own sdpa attention.
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
    """Where the prompts and completions of a row of T tokens are; S prompts of at most P, C completions of at most L.

    Attributes:
        prompts: int64 [S, P]; index into the row, 0 in the padding.
        completions: int64 [C, L]; likewise.
        prompt_of: int64 [C]; which prompt a completion follows.
        visible: bool [C, 1, L, P + L]; what a completion's tokens see of its prompt and of itself.
        restore: int64 [T]; where each token of the row is among the S*P prompt slots and C*L completion slots.
        length: longest prompt and completion together.
    """

    prompts: Tensor
    completions: Tensor
    prompt_of: Tensor
    visible: Tensor
    restore: Tensor
    length: int


def packed_layout(microbatch: Microbatch) -> PackedLayout:
    segments, completions = microbatch.segment_index, microbatch.sequence_index
    device, count = segments.device, len(segments)
    is_prompt = completions == -1
    # Tokens of a segment's prompt stand together, and so do those of a completion: runs are what is between two
    # changes.
    starts = torch.ones(count, dtype=torch.bool, device=device)
    starts[1:] = (segments[1:] != segments[:-1]) | (completions[1:] != completions[:-1])
    run = starts.cumsum(0) - 1  # [T], number of each token's run
    first = starts.nonzero().squeeze(-1)
    lengths = torch.diff(first, append=torch.tensor([count], device=device))
    offset = torch.arange(count, device=device) - first[run]
    prompt_runs = is_prompt[first]
    number = torch.where(prompt_runs, prompt_runs.cumsum(0), (~prompt_runs).cumsum(0)) - 1  # within its kind
    longest_prompt = int(lengths[prompt_runs].max())
    longest_completion = int(lengths[~prompt_runs].max()) if (~prompt_runs).any() else 0

    def index(kind: Tensor, longest: int) -> Tensor:
        table = torch.zeros(int(kind.sum()), longest, dtype=torch.int64, device=device)
        tokens = kind[run].nonzero().squeeze(-1)
        table[number[run[tokens]], offset[tokens]] = tokens
        return table

    prompts = index(prompt_runs, longest_prompt)
    table = index(~prompt_runs, longest_completion)
    # The prompt of a completion is the last prompt run before it.
    prompt_of = (prompt_runs.cumsum(0) - 1)[~prompt_runs]
    columns = torch.arange(longest_prompt, device=device)
    sees_prompt = columns[None, :] < lengths[prompt_runs][prompt_of][:, None]  # [C, P]
    causal = torch.ones(longest_completion, longest_completion, dtype=torch.bool, device=device).tril()
    visible = torch.cat(
        [
            sees_prompt[:, None, :].expand(-1, longest_completion, -1),
            causal[None].expand(len(table), -1, -1),
        ],
        dim=-1,
    )
    slot = number[run] * torch.where(is_prompt, longest_prompt, longest_completion) + offset
    return PackedLayout(
        prompts=prompts,
        completions=table,
        prompt_of=prompt_of,
        visible=visible[:, None],
        restore=torch.where(is_prompt, slot, slot + prompts.numel()),
        length=longest_prompt + longest_completion,
    )


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
    """transformers' attention interface: query [1, H, T, d], key and value [1, H_kv, T, d] -> [1, T, H, d]."""
    if layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    refuse_unsupported(layout, kwargs)
    repeats = query.shape[1] // key.shape[1]
    q, k, v = query[0], key[0].repeat_interleave(repeats, 0), value[0].repeat_interleave(repeats, 0)  # [H, T, d]

    def rows(x: Tensor, index: Tensor) -> Tensor:  # [H, T, d] -> [rows, H, length, d]
        return x.index_select(1, index.flatten()).unflatten(1, index.shape).transpose(0, 1)

    prompt_k, prompt_v = rows(k, layout.prompts), rows(v, layout.prompts)
    parts = [
        F.scaled_dot_product_attention(
            rows(q, layout.prompts), prompt_k, prompt_v, is_causal=True, scale=scaling, dropout_p=dropout
        )
    ]
    if layout.completions.numel():
        parts.append(
            F.scaled_dot_product_attention(
                rows(q, layout.completions),
                torch.cat([prompt_k[layout.prompt_of], rows(k, layout.completions)], dim=2),
                torch.cat([prompt_v[layout.prompt_of], rows(v, layout.completions)], dim=2),
                attn_mask=layout.visible,
                scale=scaling,
                dropout_p=dropout,
            )
        )
    slots = torch.cat([part.transpose(1, 2).flatten(0, 1) for part in parts])  # [S*P + C*L, H, d]
    return slots.index_select(0, layout.restore)[None], None  # indexing's own backward pass is ten times slower


def refuse_unsupported(layout: PackedLayout, kwargs: dict) -> None:
    """Raise ValueError where a layer asks for more than packed attention does."""
    window = kwargs.get("sliding_window")
    if window is not None and window < layout.length:
        raise ValueError(f"model.path: sliding window of {window} tokens, shorter than a sequence of {layout.length}")
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise ValueError(f"model.path: attention with {name} is not supported by packed rows")


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)
