"""KV cache in which the completions of a prompt share the prompt's keys and values, and attention over it.

Each prompt's keys and values are stored once, however many completions it has (cascade attention). A completion
attends to its prompt and to its own tokens in two products, and the two results are merged into the result of one
softmax over all keys. The queries of all completions of a prompt go into one matrix product with the prompt's keys.

transformers calls :meth:`SharedPromptCache.update` in each attention layer, then the attention function registered
here as :data:`SHARED_PROMPT_ATTENTION`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

SHARED_PROMPT_ATTENTION = "rolltune_shared_prompt"
# Added to the scores of masked keys. Not -inf: a prompt may have no cached keys at all, and softmax over -inf is NaN.
MASKED = -1e30
# Arguments that some models pass to their attention function and that change its result.
UNSUPPORTED = {
    "softcap": "a softcap on attention scores",
    "s_aux": "attention sinks",
    "position_bias": "a position bias",
}


class PromptSpan(NamedTuple):
    """Tokens ``start`` to ``end`` of a prefill pass belong to the prompt in ``slot``."""

    slot: int
    start: int
    end: int


@dataclass(frozen=True, kw_only=True)
class PrefillPlan:
    """One forward pass over several prompts, concatenated into a batch of one, [1, T].

    Attributes:
        spans: the prompts of this pass, in order.
        num_prompts: prompt slots in use, including those of earlier passes.
        prompt_length: longest prompt in any slot, in tokens.
    """

    spans: tuple[PromptSpan, ...]
    num_prompts: int
    prompt_length: int


@dataclass(frozen=True, kw_only=True)
class DecodePlan:
    """One forward pass over one new token of each of B sequences, [B, 1].

    Attributes:
        slots: int64 [B]; 0 .. B - 1.
        lengths: int64 [B]; tokens in each sequence's own slot, without the new one.
        own_length: the longest of ``lengths``, with the new token.
        own_bias: float32 [B, 1, 1, own_length], 0 or MASKED; None if all sequences are equally long.
        num_prompts: prompt slots in use, P.
        prompt_length: longest prompt in any slot, in tokens.
        prompt_bias: float32 [P, 1, 1, prompt_length], 0 or MASKED.
        group_index: int64 [P * G]; the sequences of each prompt, padded with any sequence to G a prompt. Gathers
            per-sequence tensors by prompt.
        ungroup_index: int64 [B]; the position of each sequence in ``group_index``. Undoes the gathering.
    """

    slots: Tensor
    lengths: Tensor
    own_length: int
    own_bias: Tensor | None
    num_prompts: int
    prompt_length: int
    prompt_bias: Tensor
    group_index: Tensor
    ungroup_index: Tensor


class KVSlots:
    """One layer's keys [slots, heads, D, length] and values [slots, heads, length, D].

    Keys are stored transposed, the faster layout for a product with few queries.
    """

    def __init__(self, keys: Tensor, values: Tensor, dtype: torch.dtype):
        """Create an empty store for keys and values shaped like these, [B, heads, T, D]."""
        self.keys = keys.new_zeros((0, keys.shape[1], keys.shape[3], 0), dtype=dtype)
        self.values = values.new_zeros((0, values.shape[1], 0, values.shape[3]), dtype=dtype)

    def reserve(self, slots: int, length: int) -> None:
        """Grow to at least ``slots`` x ``length``, keeping the contents.

        New room is zeroed: attention multiplies it by weights of 0 before anything is written to it.
        """
        old_slots, old_length = self.values.shape[0], self.values.shape[2]
        if slots > old_slots or length > old_length:
            slots = max(slots, old_slots * 3 // 2) if slots > old_slots else old_slots
            length = max(length, 2 * old_length, 64) if length > old_length else old_length
            heads, dim = self.values.shape[1], self.values.shape[3]
            self.keys = _enlarged(self.keys, (slots, heads, self.keys.shape[2], length))
            self.values = _enlarged(self.values, (slots, heads, length, dim))

    def move(self, sources: list[int], targets: list[int]) -> None:
        """Copy slots ``sources`` over slots ``targets``."""
        self.keys[targets] = self.keys[sources]
        self.values[targets] = self.values[sources]

    def attend(
        self, queries: Tensor, slots: int, length: int, bias: Tensor | None, scaling: float
    ) -> tuple[Tensor, Tensor]:
        """Attend from ``queries`` [slots, heads, M, D] to the first ``length`` keys of each slot.

        Returns:
            (output [slots, heads, M, D], log-sum-exp of the scores [slots, heads, M, 1]), both float32.
        """
        scores = _product(queries, self.keys[:slots, :, :, :length])
        scores = scores.mul_(scaling) if bias is None else torch.add(bias, scores, alpha=scaling)
        weights = scores.softmax(-1)
        # The largest weight is exp(0) / sum, so the log-sum-exp follows without another pass over the scores.
        lse = scores.amax(-1, keepdim=True) - weights.amax(-1, keepdim=True).log_()
        return _product(weights.to(self.values.dtype), self.values[:slots, :, :length]), lse


@dataclass
class LayerCache:
    """One layer's keys and values.

    Attributes:
        prompts: one slot a prompt, without the prompt's last token.
        own: one slot a sequence: the prompt's last token, then the completion.
    """

    prompts: KVSlots
    own: KVSlots


class SharedPromptCache:
    """Replaces a transformers cache as ``past_key_values``. Set ``plan`` before each forward pass.

    Attributes:
        layers: caches by layer number, created by the first forward pass.
        plan: the meaning of the tokens in the next forward pass.
        window: shortest sliding window that a layer asked for, in tokens; sequences must not be longer.
    """

    def __init__(self) -> None:
        self.layers: dict[int, LayerCache] = {}
        self.plan: PrefillPlan | DecodePlan | None = None
        self.window: int | None = None

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *_args, **_kwargs
    ) -> tuple[CacheUpdate, CacheUpdate]:
        """Return, in place of keys and values, an object that carries the layer's cache to the attention function.

        An attention layer calls this between RoPE and attention and passes the result on as keys and values.
        """
        if layer_idx not in self.layers:
            # The CPU multiplies fp32 as fast as bf16 at these sizes, and scores keep their last bits.
            dtype = torch.float32 if keys.device.type == "cpu" else keys.dtype
            self.layers[layer_idx] = LayerCache(KVSlots(keys, values, dtype), KVSlots(keys, values, dtype))
        update = CacheUpdate(self, self.layers[layer_idx], keys, values)
        return update, update

    def get_seq_length(self, _layer_idx: int = 0) -> int:
        return 0  # transformers derives positions from it, but the sampler passes positions


class CacheUpdate(NamedTuple):
    """A layer's cache and its new tokens' keys and values [B, kv_heads, T, D]."""

    cache: SharedPromptCache
    layer: LayerCache
    keys: Tensor
    values: Tensor

    def write_prompt(self, span: PromptSpan) -> None:
        slot, start, end = span
        prompts = self.layer.prompts
        prompts.keys[slot, :, :, : end - start] = self.keys[0, :, start:end].mT
        prompts.values[slot, :, : end - start] = self.values[0, :, start:end]

    def write_new_tokens(self, plan: DecodePlan) -> None:
        own = self.layer.own
        own.keys[plan.slots, :, :, plan.lengths] = self.keys[:, :, 0].to(own.keys.dtype)
        own.values[plan.slots, :, plan.lengths] = self.values[:, :, 0].to(own.values.dtype)


def shared_prompt_attention(
    module: nn.Module,
    query: Tensor,
    key: CacheUpdate,
    value: CacheUpdate,
    attention_mask: Tensor | None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attend to the cache, as transformers' ``AttentionInterface`` asks: query [B, H, T, D] -> [B, T, H, D]."""
    scaling = resolve_scaling(query, key, attention_mask, **kwargs)
    if isinstance(key.cache.plan, PrefillPlan):
        return _prefill(query, key, key.cache.plan, scaling), None
    assert isinstance(key.cache.plan, DecodePlan)
    return _decode(query, key, key.cache.plan, scaling), None


def resolve_scaling(
    query: Tensor,
    key: CacheUpdate,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs,
) -> float:
    """Check a layer's attention arguments, record its sliding window, and return the factor of its scores.

    Raises:
        ValueError: the layer asks for a kind of attention in :data:`UNSUPPORTED`.
    """
    for name, meaning in UNSUPPORTED.items():
        if kwargs.get(name) is not None:
            raise ValueError(f"it has {meaning}")
    assert attention_mask is None and isinstance(key, CacheUpdate)
    if sliding_window is not None:
        key.cache.window = min(sliding_window, key.cache.window or sliding_window)
    return float(query.shape[-1] ** -0.5 if scaling is None else scaling)


AttentionInterface.register(SHARED_PROMPT_ATTENTION, shared_prompt_attention)


def _prefill(query: Tensor, update: CacheUpdate, plan: PrefillPlan, scaling: float) -> Tensor:
    """Attend causally within each prompt and store its keys and values. query [1, H, T, D] -> [1, T, H, D]."""
    update.layer.prompts.reserve(plan.num_prompts, plan.prompt_length)
    outputs = []
    for span in plan.spans:
        update.write_prompt(span)
        tokens = slice(span.start, span.end)
        queries, keys, values = query[:, :, tokens], update.keys[:, :, tokens], update.values[:, :, tokens]
        outputs.append(
            F.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scaling, enable_gqa=True)
        )
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _decode(query: Tensor, update: CacheUpdate, plan: DecodePlan, scaling: float) -> Tensor:
    """Attend from each sequence's new token to its prompt and its own tokens. query [B, H, 1, D] -> [B, 1, H, D]."""
    batch, heads, _, dim = query.shape
    kv_heads, dtype = update.keys.shape[1], update.layer.own.keys.dtype
    share = heads // kv_heads  # query heads that share a key head
    prompts, own = update.layer.prompts, update.layer.own
    prompts.reserve(plan.num_prompts, plan.prompt_length)
    own.reserve(batch, plan.own_length)
    update.write_new_tokens(plan)

    query = query.reshape(batch, kv_heads, share, dim).to(dtype)
    own_out, own_lse = own.attend(query, batch, plan.own_length, plan.own_bias, scaling)

    grouped = query.index_select(0, plan.group_index).view(plan.num_prompts, -1, kv_heads, share, dim).transpose(1, 2)
    group = grouped.shape[2]  # G
    prompt_out, prompt_lse = prompts.attend(
        grouped.reshape(plan.num_prompts, kv_heads, group * share, dim),
        plan.num_prompts,
        plan.prompt_length,
        plan.prompt_bias,
        scaling,
    )

    def ungroup(x: Tensor) -> Tensor:  # [P, kv_heads, G * share, D] -> [B, kv_heads, share, D]
        x = x.view(plan.num_prompts, kv_heads, group, share, -1).transpose(1, 2)
        return x.reshape(-1, kv_heads, share, x.shape[-1]).index_select(0, plan.ungroup_index)

    # A softmax over both sets of keys weights each part by its share of exp(lse).
    out = torch.lerp(own_out, ungroup(prompt_out), torch.sigmoid(ungroup(prompt_lse) - own_lse))
    return out.to(update.values.dtype).view(batch, 1, heads, -1)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply [N, heads, M, K] x [N, heads, K, L] into float32, whatever the precision of the factors."""
    shape = (*a.shape[:3], b.shape[3])
    a, b = a.flatten(0, 1), b.flatten(0, 1)
    # fp16 and bf16 occur only on CUDA; without out_dtype the scores would be rounded to them.
    product = torch.bmm(a, b) if a.dtype == torch.float32 else torch.bmm(a, b, out_dtype=torch.float32)
    return product.view(shape)


def _enlarged(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    larger = x.new_zeros(shape)
    larger[tuple(slice(n) for n in x.shape)] = x
    return larger
