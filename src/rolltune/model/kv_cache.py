"""Keys and values of prompts, shared by their completions, and attention over both.

A prompt's keys and values are held once however many completions it has (cascade attention): a completion attends to
its prompt's and to its own, and the two results are merged into what one softmax over all of them would give. The
queries of all of a prompt's completions are multiplied by its keys in one matrix product.

transformers calls :meth:`SharedPromptCache.update` in each attention layer, and then the attention function that is
registered here as ``rolltune_shared_prompt``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

ATTENTION = "rolltune_shared_prompt"
# Added to the scores of slots that hold nothing. Not -inf, as a row may have an empty prompt: softmax would give NaN.
NOTHING = -1e30
# Arguments that some models hand to their attention function, and that change its result.
REFUSED = {"softcap": "a softcap on attention scores", "s_aux": "attention sinks", "position_bias": "a position bias"}


class Segment(NamedTuple):
    """Tokens ``start`` to ``end`` of a packed row are the prompt of ``slot``."""

    slot: int
    start: int
    end: int


@dataclass(frozen=True, kw_only=True)
class PrefillPlan:
    """One forward pass over prompts, packed behind one another in one row [1, T]."""

    segments: tuple[Segment, ...]
    prompts: int
    longest: int


@dataclass(frozen=True, kw_only=True)
class DecodePlan:
    """One forward pass over one new token of each of R rows [R, 1].

    Attributes:
        rows: int64 [R]; 0 .. R - 1.
        lengths: int64 [R]; tokens that a row has in its own slots, the new one not counted.
        own_length: the longest of ``lengths``, the new token counted.
        own_bias: float32 [R, 1, 1, own_length], 0 or NOTHING; None where all rows are equally long.
        prompts: number of prompt slots P.
        prompt_length: the longest prompt in them.
        prompt_bias: float32 [P, 1, 1, prompt_length], 0 or NOTHING.
        cells: int64 [P * G]; the rows of each prompt, G cells a prompt. What stands in a spare cell does not matter.
        cell_of_row: int64 [R]; each row's cell.
    """

    rows: Tensor
    lengths: Tensor
    own_length: int
    own_bias: Tensor | None
    prompts: int
    prompt_length: int
    prompt_bias: Tensor
    cells: Tensor
    cell_of_row: Tensor


class KVSlots:
    """One layer's keys [slots, heads, D, length] and values [slots, heads, length, D].

    Keys lie transposed, which is the faster layout for the product with a few queries.
    """

    def __init__(self, keys: Tensor, values: Tensor, dtype: torch.dtype):
        """Empty, for keys and values like these [B, heads, T, D]."""
        self.keys = keys.new_zeros((0, keys.shape[1], keys.shape[3], 0), dtype=dtype)
        self.values = values.new_zeros((0, values.shape[1], 0, values.shape[3]), dtype=dtype)

    def reserve(self, slots: int, length: int) -> None:
        """Make room, keeping what is there. New room is zero: it is multiplied, though by 0, before it is written."""
        have, had = self.values.shape[0], self.values.shape[2]
        if slots > have or length > had:
            slots = max(slots, have * 3 // 2) if slots > have else have
            length = max(length, 2 * had, 64) if length > had else had
            heads, dim = self.values.shape[1], self.values.shape[3]
            self.keys = _enlarged(self.keys, (slots, heads, self.keys.shape[2], length))
            self.values = _enlarged(self.values, (slots, heads, length, dim))

    def move(self, sources: list[int], targets: list[int]) -> None:
        self.keys[targets] = self.keys[sources]
        self.values[targets] = self.values[sources]

    def attend(
        self, queries: Tensor, slots: int, length: int, bias: Tensor | None, scaling: float
    ) -> tuple[Tensor, Tensor]:
        """Attention of ``queries`` [slots, heads, M, D] to the slots' first ``length`` keys.

        Returns:
            (output [slots, heads, M, D], log-sum-exp of the scores [slots, heads, M, 1]), both float32.
        """
        scores = _product(queries, self.keys[:slots, :, :, :length])
        scores = scores.mul_(scaling) if bias is None else torch.add(bias, scores, alpha=scaling)
        weights = scores.softmax(-1)
        # The largest weight is exp(0) / sum.
        lse = scores.amax(-1, keepdim=True) - weights.amax(-1, keepdim=True).log_()
        return _product(weights.to(self.values.dtype), self.values[:slots, :, :length]), lse


@dataclass
class LayerCache:
    """One layer's slots: of prompts, and of each row's own tokens (of which the first is the prompt's last)."""

    prompt: KVSlots
    own: KVSlots


class SharedPromptCache:
    """Stands in for a transformers cache: ``past_key_values`` of a forward pass whose ``plan`` was set before it.

    Attributes:
        layers: by layer number, made by the first forward pass.
        plan: what the tokens of the coming forward pass are.
        window: the shortest sliding window that a layer asked for; sequences must not be longer.
    """

    def __init__(self) -> None:
        self.layers: dict[int, LayerCache] = {}
        self.plan: PrefillPlan | DecodePlan | None = None
        self.window: int | None = None

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_args, **_kwargs) -> tuple[BoundLayer, BoundLayer]:
        """Called by an attention layer between RoPE and attention. It hands on what it gets back, in place of keys
        and values, to the attention function, which therefore finds all it needs in it."""
        if layer_idx not in self.layers:
            # The CPU multiplies fp32 as fast as bf16 at these sizes, and scores keep their last bits.
            dtype = torch.float32 if keys.device.type == "cpu" else keys.dtype
            self.layers[layer_idx] = LayerCache(KVSlots(keys, values, dtype), KVSlots(keys, values, dtype))
        bound = BoundLayer(self, self.layers[layer_idx], keys, values)
        return bound, bound

    def get_seq_length(self, _layer_idx: int = 0) -> int:
        return 0  # only asked for positions, which are given


class BoundLayer(NamedTuple):
    """A layer's cache with the new tokens' keys [B, kv_heads, T, D] and values."""

    cache: SharedPromptCache
    layer: LayerCache
    keys: Tensor
    values: Tensor

    def write_prompt(self, segment: Segment) -> None:
        slot, start, end = segment
        slots = self.layer.prompt
        slots.keys[slot, :, :, : end - start] = self.keys[0, :, start:end].mT
        slots.values[slot, :, : end - start] = self.values[0, :, start:end]

    def write_rows(self, plan: DecodePlan) -> None:
        own = self.layer.own
        own.keys[plan.rows, :, :, plan.lengths] = self.keys[:, :, 0].to(own.keys.dtype)
        own.values[plan.rows, :, plan.lengths] = self.values[:, :, 0].to(own.values.dtype)


def shared_prompt_attention(
    module: nn.Module,
    query: Tensor,
    key: BoundLayer,
    value: BoundLayer,
    attention_mask: Tensor | None,
    **kwargs,
) -> tuple[Tensor, None]:
    """The attention function of transformers' ``AttentionInterface``: query [B, H, T, D] to [B, T, H, D]."""
    scale = scaling_of(query, key, attention_mask, **kwargs)
    if isinstance(key.cache.plan, PrefillPlan):
        return _prefill(query, key, key.cache.plan, scale), None
    assert isinstance(key.cache.plan, DecodePlan)
    return _decode(query, key, key.cache.plan, scale), None


def scaling_of(
    query: Tensor,
    key: BoundLayer,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs,
) -> float:
    """What a layer's scores are multiplied by; notes its window and raises ValueError where it asks for more."""
    for name, meaning in REFUSED.items():
        if kwargs.get(name) is not None:
            raise ValueError(f"it has {meaning}")
    assert attention_mask is None and isinstance(key, BoundLayer)
    if sliding_window is not None:
        key.cache.window = min(sliding_window, key.cache.window or sliding_window)
    return float(query.shape[-1] ** -0.5 if scaling is None else scaling)


AttentionInterface.register(ATTENTION, shared_prompt_attention)


def _prefill(query: Tensor, new: BoundLayer, plan: PrefillPlan, scaling: float) -> Tensor:
    """Causal attention within each prompt. query [1, H, T, D] to [1, T, H, D]."""
    slots = new.layer.prompt
    slots.reserve(plan.prompts, plan.longest)
    outputs = []
    for segment in plan.segments:
        new.write_prompt(segment)
        tokens = slice(segment.start, segment.end)
        queries, keys, values = query[:, :, tokens], new.keys[:, :, tokens], new.values[:, :, tokens]
        outputs.append(
            F.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scaling, enable_gqa=True)
        )
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _decode(query: Tensor, new: BoundLayer, plan: DecodePlan, scaling: float) -> Tensor:
    """Attention of one new token a row to its prompt and its own tokens. query [R, H, 1, D] to [R, 1, H, D]."""
    rows, heads, _, dim = query.shape
    kv_heads, dtype = new.keys.shape[1], new.layer.own.keys.dtype
    group = heads // kv_heads  # query heads that share a key head
    prompt, own = new.layer.prompt, new.layer.own
    prompt.reserve(plan.prompts, plan.prompt_length)
    own.reserve(rows, plan.own_length)
    new.write_rows(plan)

    query = query.reshape(rows, kv_heads, group, dim).to(dtype)
    own_out, own_lse = own.attend(query, rows, plan.own_length, plan.own_bias, scaling)

    by_prompt = query.index_select(0, plan.cells).view(plan.prompts, -1, kv_heads, group, dim).transpose(1, 2)
    cells = by_prompt.shape[2]
    out, lse = prompt.attend(
        by_prompt.reshape(plan.prompts, kv_heads, cells * group, dim),
        plan.prompts,
        plan.prompt_length,
        plan.prompt_bias,
        scaling,
    )

    def by_row(x: Tensor) -> Tensor:  # [P, kv_heads, G * group, D] to [R, kv_heads, group, D]
        x = x.view(plan.prompts, kv_heads, cells, group, -1).transpose(1, 2)
        return x.reshape(-1, kv_heads, group, x.shape[-1]).index_select(0, plan.cell_of_row)

    # softmax over both = each part weighted by its share of exp(lse)
    share = torch.sigmoid(by_row(lse) - own_lse)
    out = torch.lerp(own_out, by_row(out), share)
    return out.to(new.values.dtype).view(rows, 1, heads, -1)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Batched matrix product [N, heads, M, K] x [N, heads, K, L] in float32, of low-precision factors too."""
    shape = (*a.shape[:3], b.shape[3])
    a, b = a.flatten(0, 1), b.flatten(0, 1)
    # fp16/bf16 only comes here on CUDA; without out_dtype the scores would be rounded to it.
    product = torch.bmm(a, b) if a.dtype == torch.float32 else torch.bmm(a, b, out_dtype=torch.float32)
    return product.view(shape)


def _enlarged(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    larger = x.new_zeros(shape)
    larger[tuple(slice(n) for n in x.shape)] = x
    return larger
