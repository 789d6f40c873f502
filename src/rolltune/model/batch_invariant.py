"""Log-probs that do not depend on the batch, so that sampler and trainer agree to the last bit: on a CPU, in fp32.

The order in which a product or a reduction is summed follows from its shape, and so a token's log-prob changes in its
last bits with the rows that are computed beside it: the sampler's one token of each completion, the trainer's packed
rows (He et al., Thinking Machines, "Defeating Nondeterminism in LLM Inference", 2025). Here nothing depends on them:

  - products with a weight are cut into tiles of ``ROWS`` rows, the last one padded: always the same oneDNN kernel;
  - attention is cut into tiles of ``QUERIES`` rows by ``KEYS`` keys. The keys of a prompt (but for its last token)
    fill blocks of their own, and the prompt's last token begins those of the completion, in the sampler as in the
    trainer. One softmax goes over all of a query's keys, where masked ones have weights of exactly 0, and its blocks
    are added in order;
  - element-wise activations are cut into pieces that vector instructions divide, as PyTorch computes what is left over
    with scalar ones, which round differently;
  - log-probs are ``log_softmax`` of the logits, in the sampler those that it draws from.

Norms, rotary embeddings, softmax and log_softmax are left to PyTorch, whose CPU kernels treat each row alike whatever
their number, the position and the threads. All of that is a property of this build's kernels and not promised by them:
tests compare bits over shapes and threads, and the self-test before a run's first step allows no difference.

Gradients are those of the usual kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.activations import ACT2CLS
from transformers.masking_utils import sdpa_mask

from rolltune.model.cpu import onednn
from rolltune.model.kv_cache import NOTHING, BoundLayer, DecodePlan, PrefillPlan, scaling_of
from rolltune.model.packed_attention import PackedLayout, packed_attention, refuse_unsupported

PACKED_ATTENTION = "rolltune_batch_invariant_packed"
SHARED_PROMPT_ATTENTION = "rolltune_batch_invariant_shared_prompt"
ROWS = 32
QUERIES, KEYS = 16, 64
# Every vector length divides it, and it is too little for PyTorch to be shared among threads (GELU is, from 24576 on).
PIECE = 16384
_ACTIVATIONS = tuple(entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values())


def check_usable(dtype: str, device: torch.device | str) -> None:
    """Raise ValueError where there are no kernels with a fixed order of summation."""
    if dtype != "float32":
        raise ValueError(f"model.dtype: {dtype}; model.batch_invariant needs float32")
    if torch.device(device).type != "cpu":
        raise ValueError(
            f"model.batch_invariant: true; works on a CPU alone, device is {device}: there, matrix products and "
            "attention choose their order of summation by the size of the batch, and kernels of their own would be "
            "needed; leave it out (in float32 sampler and trainer differ by rounding alone: see mismatch/max_abs)"
        )
    if not torch.backends.mkldnn.is_available():
        raise ValueError("model.batch_invariant: true; this build of torch has no oneDNN, whose products it takes")


def make_batch_invariant(model: nn.Module) -> None:
    """Let the linear layers and activations of ``model`` treat each row alike; again after adapters were added.

    Raises:
        ValueError: it has weights whose products are not those of a linear layer.
    """
    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = partial(onednn.linear, module, multiply=product)  # pyright: ignore[reportAttributeAccessIssue]
        elif isinstance(module, _ACTIVATIONS):
            module.forward = partial(elementwise, module)  # pyright: ignore[reportAttributeAccessIssue]
        elif not isinstance(module, nn.Embedding) and any(p.ndim > 1 for p in module.parameters(recurse=False)):
            raise ValueError(
                f"model.batch_invariant: true; the model has weights in {type(module).__name__}, whose products may "
                "depend on the batch; only those of torch.nn.Linear are known not to"
            )


def is_batch_invariant(model: PreTrainedModel) -> bool:
    """Whether :func:`rolltune.model.load.load_model` made the model so."""
    return model.config._attn_implementation == PACKED_ATTENTION


# --- rows -------------------------------------------------------------------------------------------------------------


def product(a: Tensor, weight: Tensor) -> Tensor:
    """``a @ weight.T`` for float32 [M, K] and [N, K], without a gradient. Rows of ``a`` do not touch each other.

    Args:
        a: any number of rows.
        weight: as it is, or rearranged by oneDNN beforehand.
    """
    weight = weight if weight.is_mkldnn else torch.ops.mkldnn._reorder_linear_weight(weight.detach())
    tiles = F.pad(a, (0, 0, 0, -len(a) % ROWS)).split(ROWS)
    return torch.cat([torch.ops.mkldnn._linear_pointwise(tile, weight, None, "none", [], "") for tile in tiles])[
        : len(a)
    ]


def sampling_linear(x: Tensor, *, weight: Tensor, bias: Tensor | None) -> Tensor:
    """:func:`product` as a linear layer, [..., K] -> [..., N], without a gradient."""
    y = product(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])
    return y if bias is None else y + bias


def elementwise(module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)`` for a module that treats each element alike, of any shape."""
    pieces = F.pad(x.flatten(), (0, -x.numel() % 64)).split(PIECE)
    y = torch.cat([type(module).forward(module, piece) for piece in pieces])
    return y[: x.numel()].view(x.shape)


def chosen_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probs of ``targets`` [N] under softmax(logits [N, V]), float32 [N]: for the sampler as for the trainer."""
    return torch.log_softmax(logits, dim=-1).gather(-1, targets[:, None]).squeeze(-1)


# --- attention --------------------------------------------------------------------------------------------------------


def _scores(queries: Tensor, keys: Tensor) -> Tensor:
    """[N, M, D] x [N, D, S] -> [N, M, S], M in whole tiles and S in whole blocks."""
    return torch.cat(
        [
            torch.cat([torch.bmm(tile, block) for block in keys.split(KEYS, -1)], -1)
            for tile in queries.split(QUERIES, 1)
        ],
        1,
    )


def _mixed(weights: Tensor, values: Tensor) -> Tensor:
    """[N, M, S] x [N, S, D] -> [N, M, D], the blocks of S added in order."""
    tiles = []
    for tile in weights.split(QUERIES, 1):
        first, *rest = (torch.bmm(*pair) for pair in zip(tile.split(KEYS, -1), values.split(KEYS, 1), strict=True))
        for part in rest:
            first += part
        tiles.append(first)
    return torch.cat(tiles, 1)


def _whole_tiles(x: Tensor) -> Tensor:
    """[N, M, ...] with M padded."""
    return F.pad(x, (0, 0, 0, -x.shape[1] % QUERIES))


def _whole_blocks(length: int) -> int:
    return length + -length % KEYS


def _attend(queries: Tensor, parts: Sequence[tuple[Tensor, Tensor]], visible: Tensor, scaling: float) -> Tensor:
    """Attention of rows to keys in several parts: of the prompt, of the completion.

    Args:
        queries: [B, heads, M, D], one row for each query and each of the query heads that share a key head.
        parts: keys [B, heads, D, S] and values [B, heads, S, D] of each, S in whole blocks.
        visible: bool [B, M, S of all parts]; what comes out for a row that sees nothing does not matter.
        scaling: of the scores.

    Returns:
        [B, heads, M, D].
    """
    batch, heads, count, _ = queries.shape
    flat = _whole_tiles(queries.flatten(0, 1))
    hidden = ~_whole_tiles(visible)[:, None]
    keys = [part.flatten(0, 1) for part, _ in parts]
    values = [part.flatten(0, 1) for _, part in parts]
    outputs = []
    for start in range(0, flat.shape[1], QUERIES):  # a tile at a time, as scores are the largest tensor around
        rows = slice(start, start + QUERIES)
        scores = torch.cat([_scores(flat[:, rows], part) for part in keys], -1).mul_(scaling)
        scores = scores.unflatten(0, (batch, heads)).masked_fill_(hidden[:, :, rows], NOTHING)
        weights = scores.softmax(-1).flatten(0, 1).split([part.shape[1] for part in values], -1)
        outputs.append(sum(_mixed(*pair) for pair in zip(weights, values, strict=True)))
    return torch.cat(outputs, 1)[:, :count].unflatten(0, (batch, heads))


class _PackedAttention(torch.autograd.Function):
    """Backward goes through the usual kernels: :func:`rolltune.model.packed_attention.packed_attention`, computed
    again."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scaling: float):
        ctx.save_for_backward(query, key, value)
        ctx.layout, ctx.scaling = layout, scaling
        return _packed(query, key, value, layout, scaling)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        q, k, v = (tensor.detach().requires_grad_() for tensor in ctx.saved_tensors)
        with torch.enable_grad():
            out, _ = packed_attention(nn.Module(), q, k, v, None, scaling=ctx.scaling, layout=ctx.layout)
        return *torch.autograd.grad(out, (q, k, v), grads), None, None


def _packed(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scaling: float) -> Tensor:
    """query [1, H, T, D], key and value [1, H_kv, T, D] -> [1, T, H, D]."""
    heads, group = key.shape[1], query.shape[1] // key.shape[1]
    q = query[0].unflatten(0, (heads, group))

    def attend(index: Tensor, parts: Sequence[tuple[Tensor, Tensor]], visible: Tensor) -> Tensor:  # -> [B * L, H, D]
        rows = q[:, :, index].permute(2, 0, 3, 1, 4).flatten(2, 3)  # [B, heads, L * group, D]
        out = _attend(rows, parts, visible.repeat_interleave(group, 1), scaling)
        return out.unflatten(2, (-1, group)).transpose(1, 2).flatten(2, 3).flatten(0, 1)

    def keys_and_values(index: Tensor) -> tuple[Tensor, Tensor]:
        index = F.pad(index, (0, -index.shape[1] % KEYS))
        return key[0][:, index].permute(1, 0, 3, 2).contiguous(), value[0][:, index].transpose(0, 1).contiguous()

    count, longest = layout.prompts.shape
    in_prompt = layout.restore < layout.prompts.numel()
    slots = layout.restore[in_prompt]
    read = torch.bincount(slots // longest, minlength=count) - 1  # a prompt's tokens but for the last one
    last = layout.prompts.gather(1, read[:, None])
    keys, values = keys_and_values(layout.prompts)
    columns = torch.arange(keys.shape[-1])
    seen = (columns < read[:, None])[:, None]  # [S, 1, keys]
    causal = columns <= torch.arange(longest)[:, None]
    alone = (torch.arange(KEYS) == 0).expand(count, 1, -1)
    outputs = [
        attend(layout.prompts, [(keys, values)], seen & causal),
        attend(last, [(keys, values), keys_and_values(last)], torch.cat([seen, alone], -1)),
    ]
    if layout.completions.numel():
        prompt, completions = layout.prompt_of, layout.completions
        own = keys_and_values(torch.cat([last[prompt], completions], 1))
        length = completions.shape[1]
        own_visible = torch.arange(own[0].shape[-1]) <= torch.arange(1, length + 1)[:, None]
        visible = [seen[prompt].expand(-1, length, -1), own_visible.expand(len(prompt), -1, -1)]
        outputs.append(attend(completions, [(keys[prompt], values[prompt]), own], torch.cat(visible, -1)))
    is_last = torch.zeros_like(layout.restore, dtype=torch.bool).index_fill_(0, last.flatten(), True)
    after_prompts = torch.where(is_last, layout.prompts.numel() + layout.restore // longest, layout.restore + count)
    restore = torch.where(in_prompt & ~is_last, layout.restore, after_prompts)
    return torch.cat(outputs).index_select(0, restore)[None]


def batch_invariant_packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: PackedLayout | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """As :func:`rolltune.model.packed_attention.packed_attention`, for the trainer."""
    if layout is None:
        return packed_attention(module, query, key, value, attention_mask, scaling, dropout, **kwargs)
    refuse_unsupported(layout, kwargs)
    if dropout:
        raise ValueError(f"model.batch_invariant: true; the model has a dropout of {dropout} in its attention")
    scaling = float(query.shape[-1] ** -0.5 if scaling is None else scaling)
    return _PackedAttention.apply(query, key, value, layout, scaling), None  # pyright: ignore[reportReturnType]


def batch_invariant_shared_prompt_attention(
    module: nn.Module, query: Tensor, key: BoundLayer, value: BoundLayer, attention_mask: Tensor | None, **kwargs
) -> tuple[Tensor, None]:
    """As :func:`rolltune.model.kv_cache.shared_prompt_attention`, for the sampler."""
    scaling = scaling_of(query, key, attention_mask, **kwargs)
    if isinstance(key.cache.plan, PrefillPlan):
        return _prefill(query, key, key.cache.plan, scaling), None
    assert isinstance(key.cache.plan, DecodePlan)
    return _decode(query, key, key.cache.plan, scaling), None


def _prefill(query: Tensor, new: BoundLayer, plan: PrefillPlan, scaling: float) -> Tensor:
    """Causal attention within each prompt. query [1, H, T, D] to [1, T, H, D]."""
    heads, slots = new.keys.shape[1], new.layer.prompt
    slots.reserve(plan.prompts, _whole_blocks(plan.longest))
    outputs = []
    for segment in plan.segments:
        new.write_prompt(segment)
        length = segment.end - segment.start
        stored = slice(segment.slot, segment.slot + 1)
        room = _whole_blocks(length)
        rows = query[:, :, segment.start : segment.end].unflatten(1, (heads, -1)).transpose(2, 3)
        group = rows.shape[3]
        visible = (torch.arange(room) <= torch.arange(length)[:, None]).repeat_interleave(group, 0)[None]
        parts = [(slots.keys[stored, :, :, :room], slots.values[stored, :, :room])]
        out = _attend(rows.flatten(2, 3), parts, visible, scaling)
        outputs.append(out.unflatten(2, (-1, group)).transpose(1, 2).flatten(2, 3))
    return torch.cat(outputs, 1)


def _decode(query: Tensor, new: BoundLayer, plan: DecodePlan, scaling: float) -> Tensor:
    """Attention of one new token a row to its prompt and its own tokens. query [R, H, 1, D] to [R, 1, H, D].

    The rows of a prompt share its keys: their scores are computed by prompt, but go through one softmax by row.
    """
    rows, heads, _, dim = query.shape
    kv_heads = new.keys.shape[1]
    group = heads // kv_heads
    prompt_room, own_room = _whole_blocks(plan.prompt_length), _whole_blocks(plan.own_length)
    prompt, own = new.layer.prompt, new.layer.own
    prompt.reserve(plan.prompts, prompt_room)
    own.reserve(rows, own_room)
    new.write_rows(plan)
    queries = query.reshape(rows, kv_heads, group, dim)

    def by_prompt(x: Tensor) -> Tensor:  # [R, kv_heads, group, X] to [P * kv_heads, G * group in whole tiles, X]
        x = x.index_select(0, plan.cells).unflatten(0, (plan.prompts, -1)).transpose(1, 2)
        return _whole_tiles(x.flatten(2, 3).flatten(0, 1))

    def by_row(x: Tensor) -> Tensor:  # and back
        cells = len(plan.cells) // plan.prompts
        x = x[:, : cells * group].unflatten(1, (cells, group)).unflatten(0, (plan.prompts, kv_heads))
        return x.transpose(1, 2).flatten(0, 1).index_select(0, plan.cell_of_row)

    def of_rows(x: Tensor) -> Tensor:  # [R, kv_heads, group, X] to [R * kv_heads, group in whole tiles, X]
        return _whole_tiles(x.flatten(0, 1))

    def masked(scores: Tensor, bias: Tensor | None, length: int) -> Tensor:
        bias = scores.new_zeros(1, 1, 1, length) if bias is None else bias
        return scores.mul_(scaling).add_(F.pad(bias, (0, scores.shape[-1] - length), value=NOTHING))

    prompt_scores = _scores(by_prompt(queries), prompt.keys[: plan.prompts, :, :, :prompt_room].flatten(0, 1))
    prompt_of_row = plan.cell_of_row // (len(plan.cells) // plan.prompts)
    own_scores = _scores(of_rows(queries), own.keys[:rows, :, :, :own_room].flatten(0, 1))[:, :group]
    scores = torch.cat(
        [
            masked(by_row(prompt_scores), plan.prompt_bias.index_select(0, prompt_of_row), plan.prompt_length),
            masked(own_scores.unflatten(0, (rows, kv_heads)), plan.own_bias, plan.own_length),
        ],
        -1,
    )
    prompt_weights, own_weights = scores.softmax(-1).split([prompt_room, own_room], -1)
    out = by_row(_mixed(by_prompt(prompt_weights), prompt.values[: plan.prompts, :, :prompt_room].flatten(0, 1)))
    own_out = _mixed(of_rows(own_weights), own.values[:rows, :, :own_room].flatten(0, 1))[:, :group]
    return (out + own_out.unflatten(0, (rows, kv_heads))).reshape(rows, 1, heads, dim)


AttentionInterface.register(PACKED_ATTENTION, batch_invariant_packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)
AttentionInterface.register(SHARED_PROMPT_ATTENTION, batch_invariant_shared_prompt_attention)
