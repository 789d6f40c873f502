"""Choose the KV cache that the native sampler decodes on, by numbers.

The shared prompt cache (:mod:`rolltune.model.kv_cache`) is fast, and right for plain causal attention. Models that it
does not reproduce, and sequences longer than a sliding window, are decoded on the model's own cache, one prompt at a
time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rolltune.model.choose import depends_on_row, readable_errors
from rolltune.model.packed_attention import PACKED_ATTENTION
from rolltune.model.parts import is_mixture, rope_change
from rolltune.samplers.decoder import Decoder, OwnCache
from rolltune.samplers.sequences import DecodeBatch, PromptState, SequenceState

# Relative error of logits against the model's own: far above rounding, far below the error of wrong attention.
CHECK_TOKENS, CHECK_STEPS = 72, 4
TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.1 / 8, torch.bfloat16: 0.1}
MIXTURES = 10  # times as much for mixtures of experts, where rounding may choose between two equally good ones


@dataclass(frozen=True, kw_only=True)
class Caches:
    """The caches that a model can be sampled with.

    Attributes:
        shared_limit: longest sequence on the shared prompt cache, in tokens, 0 if it cannot be used; None: no limit.
        own_attention: attention implementation for the model's own cache; None if that cannot be used or is not needed.
        limit: longest sequence on either.
        note: one line for the user; empty if there is nothing unusual.
    """

    shared_limit: int | None
    own_attention: str | None
    limit: int | None
    note: str = ""

    def fits_shared(self, length: int) -> bool:
        """Whether sequences of this length can be sampled on the shared prompt cache."""
        return self.shared_limit is None or length <= self.shared_limit


def choose_caches(decoder: Decoder, tokenizer: PreTrainedTokenizerBase) -> Caches:
    """Try the shared prompt cache, and the model's own where that is not right or not for every length.

    Raises:
        ValueError: the model can be sampled with neither.
    """
    name, config = type(decoder.causal_lm).__name__, decoder.causal_lm.config.get_text_config()
    if decoder.causal_lm.config.is_encoder_decoder:
        raise ValueError(f"sampler: {name} is an encoder-decoder; only causal LMs can be sampled from")
    context, reason = context_length(config), None
    try:
        shared_limit = _check_shared_cache(decoder, tokenizer)
    except ValueError as error:
        shared_limit, reason = 0, str(error)
    if shared_limit == context:
        return Caches(shared_limit=shared_limit, own_attention=None, limit=context)
    problem = None
    for attention in (PACKED_ATTENTION, "eager"):  # the first is plain sdpa here
        try:
            _check_own_cache(decoder, tokenizer, attention)
        except ValueError as error:
            problem = str(error)
            continue
        which = f"{name}, which the shared prompt cache does not reproduce ({reason}), is sampled"
        if reason is None:
            which = f"sequences of {name} beyond {shared_limit} tokens, its sliding window, are sampled"
        note = f"{which} with its own cache, one prompt at a time, which is slower"
        return Caches(shared_limit=shared_limit, own_attention=attention, limit=context, note=note)
    if reason is not None:
        raise ValueError(
            f"sampler: {name} cannot be sampled from: with a shared prompt cache, {reason}; with its own cache, "
            f"{problem}; use a vLLM sampler"
        )
    return Caches(shared_limit=shared_limit, own_attention=None, limit=shared_limit)


def _check_shared_cache(decoder: Decoder, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Compare a few decoding steps on the shared prompt cache with the model's own eager attention.

    Returns:
        The longest sequence that can be sampled, in tokens; None if there is no limit.

    Raises:
        ValueError: the model cannot run on the shared prompt cache, or its logits differ.
    """
    model = decoder.causal_lm
    config = model.config.get_text_config()
    if depends_on_row(model):
        raise ValueError("its queries are scaled by the length of the cache")
    prompt, completion = _check_tokens(tokenizer, config)
    sequence = SequenceState(PromptState(0, prompt, 1), sample=0, uniforms=np.empty(0))
    batch = DecodeBatch(model.device)
    logits = []
    with readable_errors(), decoder.sampling_mode():
        decoder.prefill(batch.admit([sequence]), batch, max_tokens=len(prompt))
        for token in completion:
            logits.append(decoder.decode(batch)[0])
            sequence.token_ids.append(token)
    if len(batch.cache.layers) != config.num_hidden_layers:
        raise ValueError("it has layers without attention, or layers that share keys and values")
    _compare(decoder, prompt, completion, torch.stack(logits))
    limits = (batch.cache.window, shared_cache_limit(config))
    return min((limit for limit in limits if limit is not None), default=None)


def _check_own_cache(decoder: Decoder, tokenizer: PreTrainedTokenizerBase, attention: str) -> None:
    """Raise ValueError unless decoding on the model's own cache gives the logits of eager attention."""
    if decoder.batch_invariant:
        raise ValueError("model.batch_invariant: true; it needs the shared prompt cache")
    prompt, completion = _check_tokens(tokenizer, decoder.causal_lm.config.get_text_config())
    with readable_errors(), decoder.sampling_mode(attention):
        cache = OwnCache(decoder.causal_lm)
        logits = [cache.prefill(prompt, 2)] + [cache.decode([token] * 2) for token in completion[:-1]]
    for row in torch.stack(logits, dim=1):
        _compare(decoder, prompt, completion, row)


def _check_tokens(tokenizer: PreTrainedTokenizerBase, config) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return a prompt and its completion, longer than any sliding window below :data:`CHECK_TOKENS`.

    Common words: in bf16 the logits of rare tokens can be mostly rounding error.
    """
    text = " ".join(f"{n} and {n + 1} make {2 * n + 1}." for n in range(1, CHECK_TOKENS))
    context = context_length(config) or CHECK_TOKENS
    ids = tokenizer.encode(text, add_special_tokens=False)[: min(CHECK_TOKENS, context)]
    return tuple(ids[:-CHECK_STEPS]), tuple(ids[-CHECK_STEPS:])


def _compare(decoder: Decoder, prompt: Sequence[int], completion: Sequence[int], logits: Tensor) -> None:
    """Raise ValueError if logits [len(completion), V] are not those of the model's own eager attention."""
    model = decoder.causal_lm
    ids = torch.tensor([[*prompt, *completion[:-1]]], device=model.device)
    with decoder.sampling_mode("eager"):
        expected = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :].float()
    error = ((logits.float() - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()
    if not error <= TOLERANCE[model.dtype] * (MIXTURES if is_mixture(model) else 1):
        raise ValueError(f"its logits differ from those of a plain forward pass (relative error {error:.2g})")


def shared_cache_limit(config) -> int | None:
    """Return the longest sequence of the shared prompt cache by a text model's config, in tokens; None: no limit."""
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    window = getattr(config, "sliding_window", None) if slides and getattr(config, "use_sliding_window", True) else None
    limits = (window, getattr(config, "attention_chunk_size", None), context_length(config))
    return min((limit for limit in limits if limit is not None), default=None)


def context_length(config) -> int | None:
    """Return the number of positions of the model.

    If RoPE's frequencies change with the longest sequence of a batch, only the lengths up to that change count: beyond
    it, a completion would depend on the others in the batch.
    """
    limits = [rope_change(config, kind) for kind in ("dynamic", "longrope")]
    limits.append(getattr(config, "max_position_embeddings", None))
    return min((limit for limit in limits if limit is not None), default=None)
