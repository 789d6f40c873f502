"""A sampler that runs the model under training itself, so its weights are always current.

Each prompt is prefilled once, and its completions share its keys and values (:mod:`rolltune.model.kv_cache`).
Completions of all prompts are decoded together, one token each a step. A completion that ends leaves the batch at once
and a waiting one takes its place (continuous batching).

All randomness of a completion comes from its seed. With the same weights a completion is the same whatever else is in
the batch, up to the rounding of matrix products of different sizes, and to the last bit if the model is batch-invariant
(:mod:`rolltune.model.batch_invariant`).

Models that the shared prompt cache does not reproduce are sampled with their own cache, one prompt at a time
(:mod:`rolltune.samplers.caches`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, islice

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rolltune.samplers.caches import choose_caches
from rolltune.samplers.decoder import Decoder, OwnCache
from rolltune.samplers.distribution import sample
from rolltune.samplers.generation import Results, check_lengths, eos_token_ids, split_stop
from rolltune.samplers.sequences import DecodeBatch, PromptState, SequenceState, StopCondition
from rolltune.types import Completion, SampleRequest, SamplingParams


class NativeSampler:
    """Samples from a transformers causal LM, also while it is trained or wrapped by peft.

    Attributes:
        policy_version: number of optimizer steps behind the model's weights, recorded in each completion.
        notes: lines for the user about how the model is sampled from; empty if there is nothing unusual.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_num_seqs: int = 64,
        prefill_tokens: int = 8192,
        pack_weights: bool = True,
    ):
        """
        Args:
            model: the policy. Sampling restores its training mode and attention implementation.
            tokenizer: decodes completions. Its EOS token ends them, as do those of the model's generation config.
            max_num_seqs: completions decoded at the same time.
            prefill_tokens: prompt tokens in one forward pass (a longer prompt has its own pass).
            pack_weights: on a CPU, multiply by packed copies of the weights. At least a quarter faster, and takes the
                memory of the weights once more while sampling.

        Raises:
            ValueError: an option is out of range, or the model's attention is not supported.
        """
        for name, value in (("max_num_seqs", max_num_seqs), ("prefill_tokens", prefill_tokens)):
            if value < 1:
                raise ValueError(f"sampler.{name}: {value}; must be >= 1")
        self.policy_version = 0
        self._decoder = Decoder(model, pack_weights=pack_weights)
        self._tokenizer = tokenizer
        self._max_num_seqs = max_num_seqs
        self._prefill_tokens = prefill_tokens
        self._eos = eos_token_ids(self._decoder.causal_lm, tokenizer)
        self._caches = choose_caches(self._decoder, tokenizer)
        self.notes = [self._caches.note] if self._caches.note else []

    def sync(self, version: int) -> None:
        """Record the policy's version. The weights are the policy's own."""
        self.policy_version = version

    def close(self) -> None:
        """Do nothing: the sampler holds no resources."""

    def generate(
        self,
        requests: Sequence[SampleRequest],
        params: SamplingParams,
        *,
        on_progress: Callable[[int, int], None] | None = None,
        on_completion: Callable[[int, int, Completion], None] | None = None,
    ) -> list[tuple[Completion, ...]]:
        """See :class:`rolltune.samplers.Sampler`.

        Raises:
            ValueError: a prompt is empty, or too long for the model, or a stop string is not supported.
            FloatingPointError: the model's logits are NaN or +inf.
        """
        check_lengths(requests, params.max_new_tokens, self._caches.limit, type(self._decoder.causal_lm).__name__)
        results = Results(requests, on_progress, on_completion)
        waiting: deque[SequenceState] = deque()
        # The longest prompts first, so that neighbours have similar lengths and later ones fit into their slots.
        for i in sorted(range(len(requests)), key=lambda i: -len(requests[i].prompt.token_ids)):
            request = requests[i]
            prompt = PromptState(i, request.prompt.token_ids, unfinished=len(request.seeds))
            waiting.extend(
                SequenceState(prompt, sample=j, uniforms=_uniforms(seed, params.max_new_tokens))
                for j, seed in enumerate(request.seeds)
            )

        def on_finished(sequence: SequenceState) -> None:
            i = sequence.prompt.request
            results.add(i, sequence.sample, self._completion(sequence, requests[i].prompt.prefill))

        longest = len(waiting[0].prompt.token_ids) if waiting else 0
        if self._caches.fits_shared(longest + params.max_new_tokens):
            self._decode_together(waiting, params, on_finished)
        else:
            self._decode_by_prompt(waiting, params, on_finished)
        return results.by_request()

    def _decode_together(
        self, waiting: deque[SequenceState], params: SamplingParams, on_finished: Callable[[SequenceState], None]
    ) -> None:
        """Decode all sequences to their ends, and pass on each one as soon as it is finished."""
        batch = DecodeBatch(self._decoder.causal_lm.device)
        stop = self._stop_condition(params)
        with self._decoder.sampling_mode():
            while waiting or batch.sequences:
                free = self._max_num_seqs - len(batch.sequences)
                # Prefill of only a few prompts is slow, so wait until an eighth of the places is free.
                if waiting and 8 * free >= self._max_num_seqs:
                    new = batch.admit([waiting.popleft() for _ in range(min(free, len(waiting)))])
                    self._decoder.prefill(new, batch, max_tokens=self._prefill_tokens)
                self._append_tokens(self._decoder.decode(batch), batch.sequences, params, stop)
                for sequence in batch.remove_finished():
                    on_finished(sequence)

    def _decode_by_prompt(
        self, waiting: deque[SequenceState], params: SamplingParams, on_finished: Callable[[SequenceState], None]
    ) -> None:
        """Decode the completions of one prompt after another, on the model's own cache."""
        stop = self._stop_condition(params)
        with self._decoder.sampling_mode(self._caches.own_attention):
            for prompt, sequences in groupby(waiting, key=lambda sequence: sequence.prompt):
                for group in _chunks(sequences, self._max_num_seqs):
                    cache = OwnCache(self._decoder.causal_lm)
                    logits = cache.prefill(prompt.token_ids, len(group))
                    while True:
                        unfinished = [i for i, sequence in enumerate(group) if sequence.finish_reason is None]
                        self._append_tokens(logits[unfinished], [group[i] for i in unfinished], params, stop)
                        if all(sequence.finish_reason for sequence in group):
                            break
                        # Finished ones stay in the batch, with any token, until all are.
                        logits = cache.decode([sequence.token_ids[-1] for sequence in group])
                    for sequence in group:
                        on_finished(sequence)

    def _stop_condition(self, params: SamplingParams) -> StopCondition:
        strings, ids = split_stop(params.stop, self._tokenizer)
        return StopCondition(self._tokenizer, self._eos | ids, strings, params.max_new_tokens)

    def _append_tokens(
        self, logits: Tensor, sequences: Sequence[SequenceState], params: SamplingParams, stop: StopCondition
    ) -> None:
        """Sample one more token of each sequence from its logits [B, V]."""
        uniforms = np.array([sequence.uniforms[len(sequence.token_ids)] for sequence in sequences])
        uniforms = torch.from_numpy(uniforms).to(logits.device)
        sampled = _to_host(*sample(logits, uniforms, params, batch_invariant=self._decoder.batch_invariant))
        for sequence, (token, logprob, support) in zip(sequences, sampled, strict=True):
            if math.isnan(logprob):
                raise FloatingPointError("the model's logits are not finite: its weights have diverged")
            sequence.token_ids.append(token)
            sequence.logprobs.append(logprob)
            if support is not None:
                sequence.support.append(support)
            sequence.finish_reason = stop.finish_reason(sequence.token_ids)

    def _completion(self, sequence: SequenceState, prefill: str) -> Completion:
        assert sequence.finish_reason is not None
        return Completion(
            token_ids=tuple(sequence.token_ids),
            logprobs=tuple(sequence.logprobs),
            finish_reason=sequence.finish_reason,
            policy_version=self.policy_version,
            text=f"{prefill}{self._tokenizer.decode(sequence.token_ids, skip_special_tokens=True)}",
            support=tuple(sequence.support) or None,
        )


def _chunks(sequences: Iterator[SequenceState], size: int) -> Iterator[list[SequenceState]]:
    while chunk := list(islice(sequences, size)):
        yield chunk


def _to_host(
    tokens: Tensor, logprobs: Tensor, support: Tensor | None
) -> Iterator[tuple[int, float, tuple[int, ...] | None]]:
    """Yield token, log-prob and support of each sequence, after a single transfer from the device."""
    batch = len(tokens)
    columns = [tokens, logprobs]
    if support is not None:
        # Where each sequence's ids end, then the ids of all sequences.
        columns += [support.sum(-1).cumsum(-1), support.nonzero()[:, 1]]
    flat = torch.cat([column.double() for column in columns]).cpu().numpy()  # float64 holds ids exactly
    ends = [0, *flat[2 * batch : 3 * batch].astype(np.int64)]
    ids = flat[3 * batch :].astype(np.int64)
    for i in range(batch):
        kept = None if support is None else tuple(ids[ends[i] : ends[i + 1]].tolist())
        yield int(flat[i]), float(flat[batch + i]), kept


def _uniforms(seed: int, count: int) -> np.ndarray:
    """Return the random numbers in [0, 1) behind a completion. The first n do not depend on ``count``."""
    return np.random.Generator(np.random.Philox(key=seed)).random(count)
