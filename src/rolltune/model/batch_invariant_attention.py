"""Attention whose result for a query does not depend on the batch: of the trainer and of the sampler (CPU, float32).

Products run in tiles of ``TILE_QUERIES`` queries by blocks of ``BLOCK_KEYS`` keys, so that the order of summation is
always the same:

  - the keys of a prompt, without its last token, fill blocks of their own. The prompt's last token begins the blocks of
    each completion, in the sampler and in the trainer alike;
  - one softmax runs over all keys of a query. Masked keys have weights of exactly 0;
  - the products of weights and values are added block by block, in order.

The trainer's entry is :func:`batch_invariant_packed_attention`, the sampler's is
:func:`batch_invariant_shared_prompt_attention`. :mod:`rolltune.model.batch_invariant` has the rest of the model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from rolltune.model.kv_cache import MASKED, CacheUpdate, DecodePlan, PrefillPlan, resolve_scaling
from rolltune.model.packed_attention import (
    CHANGES_SCORES,
    PackedLayout,
    PackedMask,
    packed_attention,
    packed_mask,
    take_tokens,
)

BATCH_INVARIANT_PACKED_ATTENTION = "rolltune_batch_invariant_packed"
BATCH_INVARIANT_SHARED_PROMPT_ATTENTION = "rolltune_batch_invariant_shared_prompt"
TILE_QUERIES, BLOCK_KEYS = 16, 64


# --- tiles ------------------------------------------------------------------------------------------------------------


def _pad_to_tiles(x: Tensor) -> Tensor:
    """Pad M of [N, M, ...] to whole tiles."""
    return F.pad(x, (0, 0, 0, -x.shape[1] % TILE_QUERIES))


def _round_up_to_blocks(length: int) -> int:
    return length + -length % BLOCK_KEYS


def _scores(queries: Tensor, keys: Tensor) -> Tensor:
    """Multiply queries [N, M, D] by keys [N, D, S] into [N, M, S]; M in whole tiles, S in whole blocks."""
    tiles = [
        torch.cat([torch.bmm(tile, block) for block in keys.split(BLOCK_KEYS, -1)], -1)
        for tile in queries.split(TILE_QUERIES, 1)
    ]
    return torch.cat(tiles, 1)


def _weighted_values(weights: Tensor, values: Tensor) -> Tensor:
    """Multiply weights [N, M, S] by values [N, S, D] into [N, M, D], adding the blocks of S in order."""
    tiles = []
    for tile in weights.split(TILE_QUERIES, 1):
        blocks = zip(tile.split(BLOCK_KEYS, -1), values.split(BLOCK_KEYS, 1), strict=True)
        total, *rest = (torch.bmm(*block) for block in blocks)
        for block in rest:
            total += block
        tiles.append(total)
    return torch.cat(tiles, 1)


def _attend(queries: Tensor, parts: Sequence[tuple[Tensor, Tensor]], visible: Tensor, scaling: float) -> Tensor:
    """Attend from queries to keys and values in several parts, such as the prompt's and the completion's.

    Args:
        queries: [B, kv_heads, M, D]; each query head that shares a key head has its own M.
        parts: (keys [B, kv_heads, D, S], values [B, kv_heads, S, D]) of each part, S in whole blocks.
        visible: bool [B, M, S of all parts]. The result for a query that sees nothing is arbitrary.
        scaling: factor of the scores.

    Returns:
        [B, kv_heads, M, D].
    """
    batch, heads, count, _ = queries.shape
    flat = _pad_to_tiles(queries.flatten(0, 1))
    hidden = ~_pad_to_tiles(visible)[:, None]
    keys = [part.flatten(0, 1) for part, _ in parts]
    values = [part.flatten(0, 1) for _, part in parts]
    outputs = []
    for start in range(0, flat.shape[1], TILE_QUERIES):  # one tile at a time: scores are the largest tensor here
        tile = slice(start, start + TILE_QUERIES)
        scores = torch.cat([_scores(flat[:, tile], part) for part in keys], -1).mul_(scaling)
        scores = scores.unflatten(0, (batch, heads)).masked_fill_(hidden[:, :, tile], MASKED)
        weights = scores.softmax(-1).flatten(0, 1).split([part.shape[1] for part in values], -1)
        outputs.append(sum(_weighted_values(*pair) for pair in zip(weights, values, strict=True)))
    return torch.cat(outputs, 1)[:, :count].unflatten(0, (batch, heads))


def _share_key_heads(query: Tensor, kv_heads: int) -> Tensor:
    """Put the query heads of a key head behind one another: [B, H, L, D] -> [B, kv_heads, L * share, D]."""
    return query.unflatten(1, (kv_heads, -1)).transpose(2, 3).flatten(2, 3)


def _split_key_heads(x: Tensor, share: int) -> Tensor:
    """Undo :func:`_share_key_heads` and put heads last: [B, kv_heads, L * share, D] -> [B, L, H, D]."""
    return x.unflatten(2, (-1, share)).transpose(1, 2).flatten(2, 3)


# --- trainer ----------------------------------------------------------------------------------------------------------


def batch_invariant_packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: PackedMask | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attend within a microbatch; arguments and result as in :func:`rolltune.model.packed_attention.packed_attention`.

    Raises:
        ValueError: also where attention is not plain: a window shorter than a sequence, a softcap, sinks, dropout.
    """
    if not isinstance(attention_mask, PackedMask):
        return packed_attention(module, query, key, value, attention_mask, scaling, dropout, **kwargs)
    if not attention_mask.is_causal:
        raise ValueError(
            "model.batch_invariant: true; the model has a sliding window shorter than a sequence of "
            f"{attention_mask.layout.length} tokens; shorten prompts or sampling.max_new_tokens"
        )
    for name in CHANGES_SCORES:
        if kwargs.get(name) is not None:
            raise ValueError(f"model.batch_invariant: true; the model's attention uses {name}, which is not supported")
    if dropout:
        raise ValueError(f"model.batch_invariant: true; the model has a dropout of {dropout} in its attention")
    scaling = float(query.shape[-1] ** -0.5 if scaling is None else scaling)
    return _PackedAttention.apply(query, key, value, attention_mask, scaling), None  # pyright: ignore[reportReturnType]


class _PackedAttention(torch.autograd.Function):
    """Forward in tiles; backward recomputes :func:`packed_attention` and goes through its usual kernels."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, mask: PackedMask, scaling: float):
        ctx.save_for_backward(query, key, value)
        ctx.mask, ctx.scaling = mask, scaling
        return _packed(query, key, value, mask.layout, scaling)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        q, k, v = (tensor.detach().requires_grad_() for tensor in ctx.saved_tensors)
        with torch.enable_grad():
            out, _ = packed_attention(nn.Module(), q, k, v, ctx.mask, scaling=ctx.scaling)
        return *torch.autograd.grad(out, (q, k, v), grads), None, None


def _packed(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scaling: float) -> Tensor:
    """query [1, H, T, D], key and value [1, H_kv, T, D] -> [1, T, H, D].

    Three calls: all prompt tokens (the result for a prompt's last token is not used), the last token of each prompt as
    the first token of its completions' blocks, and the completions.
    """
    kv_heads, share = key.shape[1], query.shape[1] // key.shape[1]
    num_prompts, longest = layout.prompts.shape

    def attend(index: Tensor, parts: Sequence[tuple[Tensor, Tensor]], visible: Tensor) -> Tensor:  # -> [B * L, H, D]
        queries = _share_key_heads(take_tokens(query[0], index), kv_heads)
        out = _attend(queries, parts, visible.repeat_interleave(share, 1), scaling)
        return _split_key_heads(out, share).flatten(0, 1)

    def keys_and_values(index: Tensor) -> tuple[Tensor, Tensor]:
        index = F.pad(index, (0, -index.shape[1] % BLOCK_KEYS))
        return take_tokens(key[0], index).mT.contiguous(), take_tokens(value[0], index).contiguous()

    in_prompt = layout.restore < layout.prompts.numel()
    lengths = torch.bincount(layout.restore[in_prompt] // longest, minlength=num_prompts) - 1  # without the last token
    last = layout.prompts.gather(1, lengths[:, None])  # [S, 1]
    prompt_keys, prompt_values = keys_and_values(layout.prompts)
    columns = torch.arange(prompt_keys.shape[-1])
    in_length = (columns < lengths[:, None])[:, None]  # [S, 1, keys]
    causal = columns <= torch.arange(longest)[:, None]
    only_first = (torch.arange(BLOCK_KEYS) == 0).expand(num_prompts, 1, -1)
    outputs = [
        attend(layout.prompts, [(prompt_keys, prompt_values)], in_length & causal),
        attend(last, [(prompt_keys, prompt_values), keys_and_values(last)], torch.cat([in_length, only_first], -1)),
    ]
    if layout.completions.numel():
        prompt_of, length = layout.prompt_of, layout.completions.shape[1]
        own_keys, own_values = keys_and_values(torch.cat([last[prompt_of], layout.completions], 1))
        own_visible = torch.arange(own_keys.shape[-1]) <= torch.arange(1, length + 1)[:, None]
        visible = [in_length[prompt_of].expand(-1, length, -1), own_visible.expand(len(prompt_of), -1, -1)]
        parts = [(prompt_keys[prompt_of], prompt_values[prompt_of]), (own_keys, own_values)]
        outputs.append(attend(layout.completions, parts, torch.cat(visible, -1)))
    # The layout's slots are prompts, then completions; the S last tokens were computed in between.
    is_last = torch.zeros_like(layout.restore, dtype=torch.bool).index_fill_(0, last.flatten(), True)
    last_slots = layout.prompts.numel() + layout.restore // longest
    restore = torch.where(in_prompt, layout.restore, layout.restore + num_prompts)
    restore = torch.where(is_last, last_slots, restore)
    return torch.cat(outputs).index_select(0, restore)[None]


# --- sampler ----------------------------------------------------------------------------------------------------------


def batch_invariant_shared_prompt_attention(
    module: nn.Module, query: Tensor, key: CacheUpdate, value: CacheUpdate, attention_mask: Tensor | None, **kwargs
) -> tuple[Tensor, None]:
    """Attend to the KV cache, as :func:`rolltune.model.kv_cache.shared_prompt_attention` does."""
    scaling = resolve_scaling(query, key, attention_mask, **kwargs)
    if isinstance(key.cache.plan, PrefillPlan):
        return _prefill(query, key, key.cache.plan, scaling), None
    assert isinstance(key.cache.plan, DecodePlan)
    return _decode(query, key, key.cache.plan, scaling), None


def _prefill(query: Tensor, update: CacheUpdate, plan: PrefillPlan, scaling: float) -> Tensor:
    """Attend causally within each prompt and store its keys and values. query [1, H, T, D] -> [1, T, H, D]."""
    kv_heads, prompts = update.keys.shape[1], update.layer.prompts
    share = query.shape[1] // kv_heads
    prompts.reserve(plan.num_prompts, _round_up_to_blocks(plan.prompt_length))
    outputs = []
    for span in plan.spans:
        update.write_prompt(span)
        length = span.end - span.start
        room = _round_up_to_blocks(length)
        queries = _share_key_heads(query[:, :, span.start : span.end], kv_heads)
        visible = (torch.arange(room) <= torch.arange(length)[:, None]).repeat_interleave(share, 0)[None]
        slot = slice(span.slot, span.slot + 1)
        parts = [(prompts.keys[slot, :, :, :room], prompts.values[slot, :, :room])]
        outputs.append(_split_key_heads(_attend(queries, parts, visible, scaling), share))
    return torch.cat(outputs, 1)


def _decode(query: Tensor, update: CacheUpdate, plan: DecodePlan, scaling: float) -> Tensor:
    """Attend from each sequence's new token to its prompt and its own tokens. query [B, H, 1, D] -> [B, 1, H, D].

    The scores of a prompt's keys are computed for all of its sequences at once; the softmax runs over each sequence.
    """
    batch, heads, _, dim = query.shape
    kv_heads, num_prompts = update.keys.shape[1], plan.num_prompts
    share = heads // kv_heads
    group = len(plan.group_index) // num_prompts  # G
    prompt_room, own_room = _round_up_to_blocks(plan.prompt_length), _round_up_to_blocks(plan.own_length)
    prompts, own = update.layer.prompts, update.layer.own
    prompts.reserve(num_prompts, prompt_room)
    own.reserve(batch, own_room)
    update.write_new_tokens(plan)

    def by_prompt(x: Tensor) -> Tensor:  # [B, kv_heads, share, X] -> [P * kv_heads, G * share in whole tiles, X]
        x = x.index_select(0, plan.group_index).unflatten(0, (num_prompts, -1)).transpose(1, 2)
        return _pad_to_tiles(x.flatten(2, 3).flatten(0, 1))

    def from_prompts(x: Tensor) -> Tensor:  # undoes by_prompt
        x = x[:, : group * share].unflatten(1, (group, share)).unflatten(0, (num_prompts, kv_heads))
        return x.transpose(1, 2).flatten(0, 1).index_select(0, plan.ungroup_index)

    def by_sequence(x: Tensor) -> Tensor:  # [B, kv_heads, share, X] -> [B * kv_heads, share in whole tiles, X]
        return _pad_to_tiles(x.flatten(0, 1))

    def from_sequences(x: Tensor) -> Tensor:  # undoes by_sequence
        return x[:, :share].unflatten(0, (batch, kv_heads))

    def masked(scores: Tensor, bias: Tensor | None, length: int) -> Tensor:
        bias = scores.new_zeros(1, 1, 1, length) if bias is None else bias
        return scores.mul_(scaling).add_(F.pad(bias, (0, scores.shape[-1] - length), value=MASKED))

    queries = query.reshape(batch, kv_heads, share, dim)
    prompt_scores = _scores(by_prompt(queries), prompts.keys[:num_prompts, :, :, :prompt_room].flatten(0, 1))
    own_scores = _scores(by_sequence(queries), own.keys[:batch, :, :, :own_room].flatten(0, 1))
    prompt_bias = plan.prompt_bias.index_select(0, plan.ungroup_index // group)  # [B, 1, 1, prompt_length]
    scores = torch.cat(
        [
            masked(from_prompts(prompt_scores), prompt_bias, plan.prompt_length),
            masked(from_sequences(own_scores), plan.own_bias, plan.own_length),
        ],
        -1,
    )
    prompt_weights, own_weights = scores.softmax(-1).split([prompt_room, own_room], -1)
    prompt_out = _weighted_values(
        by_prompt(prompt_weights), prompts.values[:num_prompts, :, :prompt_room].flatten(0, 1)
    )
    own_out = _weighted_values(by_sequence(own_weights), own.values[:batch, :, :own_room].flatten(0, 1))
    return (from_prompts(prompt_out) + from_sequences(own_out)).reshape(batch, 1, heads, dim)


AttentionInterface.register(BATCH_INVARIANT_PACKED_ATTENTION, batch_invariant_packed_attention)
AttentionMaskInterface.register(BATCH_INVARIANT_PACKED_ATTENTION, packed_mask)
AttentionInterface.register(BATCH_INVARIANT_SHARED_PROMPT_ATTENTION, batch_invariant_shared_prompt_attention)
