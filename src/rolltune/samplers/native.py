"""A sampler that runs the very model that is trained, so its weights are always current.

Each prompt is read once, its keys and values are shared by its completions (:mod:`rolltune.model.kv_cache`), and
completions of all prompts are written side by side, one token of each a step. A completion that ends leaves the
batch at once and waiting ones take the free places (continuous batching).

All noise of a completion comes from its seed: with the same weights it is the same whatever else is in the batch,
up to the rounding of matrix products of different sizes, and to the last bit if the model is batch-invariant
(:mod:`rolltune.model.batch_invariant`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rolltune.model.batch_invariant import SHARED_PROMPT_ATTENTION, is_batch_invariant
from rolltune.model.cpu.onednn_linear import onednn_linears
from rolltune.model.kv_cache import ATTENTION
from rolltune.model.load import unwrapped
from rolltune.samplers.distribution import sample
from rolltune.samplers.sequences import Batch, EndOfText, PromptState, SequenceState
from rolltune.types import Completion, SampleRequest, SamplingParams

# Relative error of a few logits against the model's own: far above rounding, far below attention that went wrong.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.1 / 8, torch.bfloat16: 0.1}


class NativeSampler:
    """Samples from a transformers causal LM, be it under training or wrapped by peft.

    Attributes:
        policy_version: number of optimizer steps behind the model's weights; completions carry it.
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
            model: always left as it is found, training mode and attention implementation included.
            tokenizer: decodes completions. Its EOS token ends them, as do those of the model's generation config.
            max_num_seqs: completions written at the same time.
            prefill_tokens: prompt tokens in one forward pass (a longer prompt has one of its own).
            pack_weights: on a CPU, multiply by a rearranged copy of the weights: faster by a quarter and more, for as
                much memory again while sampling.

        Raises:
            ValueError: an option is out of range, or the model's attention is of a kind that is not supported.
        """
        for name, value in (("max_num_seqs", max_num_seqs), ("prefill_tokens", prefill_tokens)):
            if value < 1:
                raise ValueError(f"sampler.{name}: {value}; must be >= 1")
        self.policy_version = 0
        self._model = model
        self._causal_lm = unwrapped(model)
        self._tokenizer = tokenizer
        self._max_num_seqs = max_num_seqs
        self._prefill_tokens = prefill_tokens
        self._pack_weights = pack_weights
        self._batch_invariant = is_batch_invariant(self._causal_lm)
        self._eos = eos_token_ids(self._causal_lm, tokenizer)
        self._max_length = self._check_model()

    def sync(self, version: int) -> None:
        """Note the policy's version; the weights themselves are the policy's own."""
        self.policy_version = version

    def close(self) -> None:
        """Nothing is held but the policy's own weights."""

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
            ValueError: an empty prompt, or one too long for the model.
        """
        self._check_lengths(requests, params.max_new_tokens)
        prompts = [PromptState(i, r.prompt.token_ids, len(r.seeds)) for i, r in enumerate(requests)]
        rows = [
            [SequenceState(prompt, _uniforms(seed, params.max_new_tokens)) for seed in request.seeds]
            for prompt, request in zip(prompts, requests, strict=True)
        ]
        places = {id(row): (i, j) for i, group in enumerate(rows) for j, row in enumerate(group)}
        written: dict[tuple[int, int], Completion] = {}

        def keep(finished: Sequence[SequenceState]) -> None:
            for row in finished:
                i, j = places[id(row)]
                written[i, j] = self._completion(row, requests[i].prompt.prefill)
                if on_completion is not None:
                    on_completion(i, j, written[i, j])
            if on_progress is not None:
                on_progress(len(written), len(places))

        # The longest prompts first, so that those side by side are of like length and later ones fit into their slots.
        order = sorted(range(len(rows)), key=lambda i: -len(prompts[i].token_ids))
        self._write(deque(row for i in order for row in rows[i]), params, keep)
        return [tuple(written[i, j] for j in range(len(group))) for i, group in enumerate(rows)]

    def _write(
        self,
        waiting: deque[SequenceState],
        params: SamplingParams,
        on_finished: Callable[[Sequence[SequenceState]], None],
    ) -> None:
        """Write all rows to their ends; those that reach theirs are handed over at once."""
        batch = Batch(self._causal_lm.device)
        end = EndOfText(self._tokenizer, self._eos, params.stop, params.max_new_tokens)
        with self._sampling():
            while waiting or batch.rows:
                free = self._max_num_seqs - len(batch.rows)
                # A few prompts at a time are read slowly, so some places are left to come free first.
                if waiting and 8 * free >= self._max_num_seqs:
                    new = batch.admit([waiting.popleft() for _ in range(min(free, len(waiting)))])
                    self._read(new, batch)
                self._step(batch, params, end)
                finished = batch.remove_finished()
                if finished:
                    on_finished(finished)

    def _read(self, prompts: Sequence[PromptState], batch: Batch) -> None:
        """Compute the keys and values of new prompts, packed in rows [1, T]."""
        for pack in _packs(prompts, self._prefill_tokens):
            batch.cache.plan = batch.prefill_plan(pack)
            ids = [token for prompt in pack for token in prompt.token_ids[:-1]]
            positions = [position for prompt in pack for position in range(len(prompt.token_ids) - 1)]
            self._forward([ids], [positions], past_key_values=batch.cache, use_cache=True)

    def _step(self, batch: Batch, params: SamplingParams, end: EndOfText) -> None:
        """Write one more token of each row."""
        logits = self._decode(batch)
        uniforms = np.array([row.uniforms[len(row.token_ids)] for row in batch.rows])
        uniforms = torch.from_numpy(uniforms).to(logits.device)
        drawn = _fetch(*sample(logits, uniforms, params, batch_invariant=self._batch_invariant))
        for row, (token, logprob, support) in zip(batch.rows, drawn, strict=True):
            if math.isnan(logprob):
                raise FloatingPointError("the model's logits are not finite: its weights have diverged")
            row.token_ids.append(token)
            row.logprobs.append(logprob)
            if support is not None:
                row.support.append(support)
            row.finish_reason = end.reason(row.token_ids)

    def _decode(self, batch: Batch) -> Tensor:
        """Logits of each row's next token: [R, V]."""
        batch.cache.plan = batch.decode_plan()
        return self._forward(
            [[row.next_input] for row in batch.rows],
            [[row.next_position] for row in batch.rows],
            past_key_values=batch.cache,
            use_cache=True,
        )

    def _forward(self, token_ids: list[list[int]], positions: list[list[int]], **kwargs) -> Tensor:
        """[B, T] tokens to the logits of the last one of each row: [B, V]."""
        device = self._causal_lm.device
        output = self._model(
            input_ids=torch.tensor(token_ids, device=device),
            position_ids=torch.tensor(positions, device=device),
            logits_to_keep=1,
            **kwargs,
        )
        return output.logits[:, -1]

    @contextmanager
    def _sampling(self, attention: str | None = None) -> Iterator[None]:
        """The model in eval mode, with ``attention`` (None: the shared prompt cache's), without gradients; and all as
        it was afterwards.

        Not ``torch.inference_mode``: it saves nothing here, and what a model caches under it could not be trained with.
        """
        attention = attention or (SHARED_PROMPT_ATTENTION if self._batch_invariant else ATTENTION)
        training = [module for module in self._model.modules() if module.training]
        # Parts of a composite model have configs of their own; setting the one of the whole would set them all.
        configs = {id(m.config): m.config for m in self._causal_lm.modules() if isinstance(m, PreTrainedModel)}.values()
        implementations = [config._attn_implementation for config in configs]
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            try:
                self._model.eval()
                for config in configs:
                    config._attn_implementation = attention
                stack.enter_context(
                    onednn_linears(self._model, pack=self._pack_weights, batch_invariant=self._batch_invariant)
                )
                yield
            finally:
                for config, implementation in zip(configs, implementations, strict=True):
                    config._attn_implementation = implementation
                for module in training:
                    module.training = True

    def _completion(self, row: SequenceState, prefill: str) -> Completion:
        assert row.finish_reason is not None
        return Completion(
            token_ids=tuple(row.token_ids),
            logprobs=tuple(row.logprobs),
            finish_reason=row.finish_reason,
            policy_version=self.policy_version,
            text=f"{prefill}{self._tokenizer.decode(row.token_ids, skip_special_tokens=True)}",
            support=tuple(row.support) or None,
        )

    def _check_lengths(self, requests: Sequence[SampleRequest], max_new_tokens: int) -> None:
        lengths = [len(request.prompt.token_ids) for request in requests]
        if 0 in lengths:
            raise ValueError(f"prompt: request {lengths.index(0)} has no tokens; a prompt needs one at least")
        longest = max(lengths, default=0) + max_new_tokens
        if self._max_length is not None and longest > self._max_length:
            raise ValueError(
                f"sampling.max_new_tokens: {max_new_tokens}; with a prompt of {max(lengths)} tokens that is more than "
                f"the {self._max_length} tokens that {type(self._causal_lm).__name__} can be sampled to"
            )

    def _check_model(self) -> int | None:
        """Compare the logits of a few tokens with those of the model's own eager attention.

        Returns:
            The most tokens that a sequence may have, None if there is no limit.
        """
        name = type(self._causal_lm).__name__
        config = self._causal_lm.config.get_text_config()
        if self._causal_lm.config.is_encoder_decoder:
            raise ValueError(f"sampler: {name} is an encoder-decoder, not a causal LM")
        # Common words: in bf16 the logits of rare tokens can be mostly rounding error.
        ids = self._tokenizer.encode("one and one is two, two and two is four", add_special_tokens=False)[:12]
        row = SequenceState(PromptState(0, tuple(ids[:-2]), 1), np.empty(0))
        batch = Batch(self._causal_lm.device)
        try:
            with self._sampling():
                self._read(batch.admit([row]), batch)
                for token in ids[-2:]:
                    self._decode(batch)
                    row.token_ids.append(token)
                logits = self._decode(batch).float()
            if len(batch.cache.layers) != config.num_hidden_layers:
                raise ValueError("it has layers without attention, or whose keys and values are not their own")
            with self._sampling("eager"):
                expected = self._forward([ids], [list(range(len(ids)))], use_cache=False).float()
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"sampler: {name} cannot be sampled from with a shared prompt cache: {error}") from error
        tolerance = TOLERANCE[self._causal_lm.dtype]
        error = ((logits - expected).norm() / expected.norm()).item()
        if not error <= tolerance:
            raise ValueError(
                f"sampler: {name} cannot be sampled from with a shared prompt cache: its logits come out different "
                f"(relative error {error:.2g}), so its attention or its layers must be of an unusual kind"
            )
        limits = (batch.cache.window, getattr(config, "attention_chunk_size", None), _context_length(config))
        return min((limit for limit in limits if limit is not None), default=None)


def _fetch(
    tokens: Tensor, logprobs: Tensor, support: Tensor | None
) -> Iterator[tuple[int, float, tuple[int, ...] | None]]:
    """Token, log-prob and support of each row; in one transfer, as each waits for the device."""
    rows = len(tokens)
    columns = [tokens, logprobs]
    if support is not None:
        columns += [support.sum(-1).cumsum(-1), support.nonzero()[:, 1]]  # where each row's ids end; ids row by row
    flat = torch.cat([column.double() for column in columns]).cpu().numpy()  # ids are exact in float64
    ends = [0, *flat[2 * rows : 3 * rows].astype(np.int64)]
    ids = flat[3 * rows :].astype(np.int64)
    for i in range(rows):
        kept = None if support is None else tuple(ids[ends[i] : ends[i + 1]].tolist())
        yield int(flat[i]), float(flat[rows + i]), kept


def _uniforms(seed: int, count: int) -> np.ndarray:
    """The numbers in [0, 1) behind a completion. The first n do not depend on ``count``."""
    return np.random.Generator(np.random.Philox(key=seed)).random(count)


def _packs(prompts: Sequence[PromptState], max_tokens: int) -> Iterator[list[PromptState]]:
    """Prompts in order, together as long as they have no more than ``max_tokens`` tokens to read."""
    pack: list[PromptState] = []
    tokens = 0
    for prompt in prompts:
        new = len(prompt.token_ids) - 1
        if new == 0:  # nothing to read: its one token is the first decoding step's input
            continue
        if pack and tokens + new > max_tokens:
            yield pack
            pack, tokens = [], 0
        pack.append(prompt)
        tokens += new
    if pack:
        yield pack


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every token that ends a text: chat models often have more of them than the tokenizer names."""
    sources = (getattr(model.generation_config, "eos_token_id", None), tokenizer.eos_token_id)
    return frozenset(int(i) for ids in sources if ids is not None for i in (ids if isinstance(ids, list) else [ids]))


def _context_length(config) -> int | None:
    """Positions that the model has. Where RoPE's frequencies change with the length of the longest row in a batch, only
    the lengths up to that change: beyond, a completion would depend on the others."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        original = rope.get("original_max_position_embeddings")
        return original or getattr(config, "original_max_position_embeddings", config.max_position_embeddings)
    return getattr(config, "max_position_embeddings", None)
