"""Forward passes of the policy while it samples: prefill and decoding steps with the shared prompt cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rolltune.model import batch_invariant
from rolltune.model.batch_invariant_attention import BATCH_INVARIANT_SHARED_PROMPT_ATTENTION
from rolltune.model.cpu import onednn
from rolltune.model.kv_cache import SHARED_PROMPT_ATTENTION
from rolltune.model.load import unwrapped
from rolltune.samplers.sequences import DecodeBatch, PromptState, SequenceState

# Relative error of a few logits against the model's own: far above rounding, far below the error of wrong attention.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.1 / 8, torch.bfloat16: 0.1}


class Decoder:
    """Runs a causal LM over a :class:`DecodeBatch`.

    Attributes:
        causal_lm: the model, without peft's wrapper.
        batch_invariant: whether log-probs must not depend on the batch (:mod:`rolltune.model.batch_invariant`).
    """

    def __init__(self, model: PreTrainedModel | PeftModel, *, pack_weights: bool):
        """
        Args:
            model: the policy, wrapped by peft or not.
            pack_weights: whether to multiply by packed copies of the weights on a CPU.
        """
        self.causal_lm = unwrapped(model)
        self.batch_invariant = batch_invariant.is_batch_invariant(self.causal_lm)
        self._model = model
        self._pack_weights = pack_weights

    @contextmanager
    def sampling_mode(self, attention: str | None = None) -> Iterator[None]:
        """Put the model into eval mode without gradients, with another attention, and restore everything afterwards.

        Does not use ``torch.inference_mode``: it saves nothing here, and tensors that a model caches under it could not
        be trained with.

        Args:
            attention: name of the attention implementation; None: attention to the shared prompt cache.
        """
        if attention is None:
            attention = BATCH_INVARIANT_SHARED_PROMPT_ATTENTION if self.batch_invariant else SHARED_PROMPT_ATTENTION
        linear = batch_invariant.sampling_linear if self.batch_invariant else onednn.sampling_linear
        training = [module for module in self._model.modules() if module.training]
        # Parts of a composite model have their own configs; setting the attention of the whole would set it in all.
        configs = {id(m.config): m.config for m in self.causal_lm.modules() if isinstance(m, PreTrainedModel)}.values()
        implementations = [config._attn_implementation for config in configs]
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            try:
                self._model.eval()
                for config in configs:
                    config._attn_implementation = attention
                stack.enter_context(onednn.sampling_linears(self._model, pack=self._pack_weights, forward=linear))
                yield
            finally:
                for config, implementation in zip(configs, implementations, strict=True):
                    config._attn_implementation = implementation
                for module in training:
                    module.training = True

    def prefill(self, prompts: Sequence[PromptState], batch: DecodeBatch, *, max_tokens: int) -> None:
        """Compute keys and values of new prompts, in passes of at most ``max_tokens`` tokens."""
        for chunk in _prefill_chunks(prompts, max_tokens):
            batch.cache.plan = batch.prefill_plan(chunk)
            ids = [token for prompt in chunk for token in prompt.token_ids[:-1]]
            positions = [position for prompt in chunk for position in range(len(prompt.token_ids) - 1)]
            self.forward([ids], [positions], past_key_values=batch.cache, use_cache=True)

    def decode(self, batch: DecodeBatch) -> Tensor:
        """Return the logits [B, V] of each sequence's next token."""
        batch.cache.plan = batch.decode_plan()
        return self.forward(
            [[sequence.next_input] for sequence in batch.sequences],
            [[sequence.next_position] for sequence in batch.sequences],
            past_key_values=batch.cache,
            use_cache=True,
        )

    def forward(self, token_ids: list[list[int]], positions: list[list[int]], **kwargs) -> Tensor:
        """Return the logits [B, V] of the last of each sequence's [B, T] tokens."""
        device = self.causal_lm.device
        output = self._model(
            input_ids=torch.tensor(token_ids, device=device),
            position_ids=torch.tensor(positions, device=device),
            logits_to_keep=1,
            **kwargs,
        )
        return output.logits[:, -1]


def _prefill_chunks(prompts: Sequence[PromptState], max_tokens: int) -> Iterator[list[PromptState]]:
    """Split prompts, in order, into chunks of at most ``max_tokens`` tokens; a longer prompt has its own chunk."""
    chunk: list[PromptState] = []
    tokens = 0
    for prompt in prompts:
        new = len(prompt.token_ids) - 1
        if new == 0:  # its only token is the input of the first decoding step
            continue
        if chunk and tokens + new > max_tokens:
            yield chunk
            chunk, tokens = [], 0
        chunk.append(prompt)
        tokens += new
    if chunk:
        yield chunk


def check_decoder(decoder: Decoder, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Compare the logits of a few tokens with those of the model's own eager attention.

    Returns:
        The longest sequence that can be sampled, in tokens; None if there is no limit.

    Raises:
        ValueError: the model cannot run on the shared prompt cache, or its logits differ.
    """
    model = decoder.causal_lm
    name, config = type(model).__name__, model.config.get_text_config()
    if model.config.is_encoder_decoder:
        raise ValueError(f"sampler: {name} is an encoder-decoder; only causal LMs can be sampled from")
    # Common words: in bf16 the logits of rare tokens can be mostly rounding error.
    ids = tokenizer.encode("one and one is two, two and two is four", add_special_tokens=False)[:12]
    sequence = SequenceState(PromptState(0, tuple(ids[:-2]), 1), sample=0, uniforms=np.empty(0))
    batch = DecodeBatch(model.device)
    try:
        with decoder.sampling_mode():
            decoder.prefill(batch.admit([sequence]), batch, max_tokens=len(ids))
            for token in ids[-2:]:
                decoder.decode(batch)
                sequence.token_ids.append(token)
            logits = decoder.decode(batch).float()
        if len(batch.cache.layers) != config.num_hidden_layers:
            raise ValueError("it has layers without attention, or layers that share keys and values")
        with decoder.sampling_mode("eager"):
            expected = decoder.forward([ids], [list(range(len(ids)))], use_cache=False).float()
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"sampler: {name} cannot be sampled from with a shared prompt cache: {error}") from error
    error = ((logits - expected).norm() / expected.norm()).item()
    if not error <= TOLERANCE[model.dtype]:
        raise ValueError(
            f"sampler: {name} cannot be sampled from with a shared prompt cache: its logits differ from those of its "
            f"own attention (relative error {error:.2g}), so it has an unusual kind of attention or layer"
        )
    limits = (batch.cache.window, longest_sequence(config))
    return min((limit for limit in limits if limit is not None), default=None)


def longest_sequence(config) -> int | None:
    """Return the longest sequence that can be sampled by a text model's config, in tokens; None: no limit."""
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    window = getattr(config, "sliding_window", None) if slides and getattr(config, "use_sliding_window", True) else None
    limits = (window, getattr(config, "attention_chunk_size", None), _context_length(config))
    return min((limit for limit in limits if limit is not None), default=None)


def _context_length(config) -> int | None:
    """Return the number of positions of the model.

    If RoPE's frequencies change with the longest sequence of a batch, only the lengths up to that change count: beyond
    it, a completion would depend on the others in the batch.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        original = rope.get("original_max_position_embeddings")
        return original or getattr(config, "original_max_position_embeddings", config.max_position_embeddings)
    return getattr(config, "max_position_embeddings", None)
