"""Forward passes of the policy while it samples: with the shared prompt cache, or with the model's own cache."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from rolltune.model import batch_invariant
from rolltune.model.batch_invariant_attention import BATCH_INVARIANT_SHARED_PROMPT_ATTENTION
from rolltune.model.cpu import onednn
from rolltune.model.kv_cache import SHARED_PROMPT_ATTENTION
from rolltune.model.load import unwrapped
from rolltune.model.parts import attention as use_attention
from rolltune.samplers.sequences import DecodeBatch, PromptState


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
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(use_attention(self.causal_lm, attention))
            try:
                self._model.eval()
                stack.enter_context(onednn.sampling_linears(self._model, pack=self._pack_weights, forward=linear))
                yield
            finally:
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


class OwnCache:
    """The completions of one prompt on the model's own cache, all equally long, so that there is no padding."""

    def __init__(self, model: PreTrainedModel):
        self._model = model
        self._parameters = inspect.signature(model.forward).parameters
        self._length = 0
        self._cache: dict[str, Any] = {}

    def prefill(self, prompt: Sequence[int], count: int) -> Tensor:
        """Return the logits [count, V] behind the prompt, the same for each of ``count`` completions."""
        return self._forward([list(prompt)] * count)

    def decode(self, tokens: Sequence[int]) -> Tensor:
        """Append one token to each completion; return the logits [count, V] of the next."""
        return self._forward([[token] for token in tokens])

    def _forward(self, token_ids: list[list[int]]) -> Tensor:
        ids = torch.tensor(token_ids, device=self._model.device)
        positions = torch.arange(self._length, self._length + ids.shape[1], device=ids.device).expand_as(ids)
        options = {"position_ids": positions, "logits_to_keep": 1}  # old and recurrent models lack the one or the other
        known = {name: value for name, value in options.items() if name in self._parameters}
        output = self._model(input_ids=ids, use_cache=True, **known, **self._cache)
        self._length += ids.shape[1]
        # Recurrent models have names of their own for it.
        names = ("past_key_values", "cache_params", "state")
        self._cache = {name: output[name] for name in names if output.get(name) is not None}
        if not self._cache:
            raise ValueError("it returns no cache")
        return output.logits[:, -1]
