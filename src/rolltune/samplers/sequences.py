"""Unfinished completions, the batch in which they are decoded, and the conditions that end them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rolltune.model.kv_cache import MASKED, DecodePlan, PrefillPlan, PromptSpan, SharedPromptCache

T = TypeVar("T")


@dataclass(eq=False)
class PromptState:
    """A prompt with unfinished completions.

    Attributes:
        request: index of its request.
        token_ids: the whole prompt. Prefill leaves out its last token, which is the input of the first decoding step of
            each completion, so that all decoding steps are alike.
        unfinished: number of completions that wait or are being decoded.
        slot: its slot in the cache; None before it is admitted to the batch.
    """

    request: int
    token_ids: tuple[int, ...]
    unfinished: int
    slot: int | None = None


@dataclass(eq=False)
class SequenceState:
    """An unfinished completion.

    Attributes:
        prompt: its prompt.
        sample: its number among the prompt's completions.
        uniforms: float64 [max_new_tokens]; the random numbers in [0, 1) that select its tokens.
        token_ids: sampled so far.
        logprobs: of each sampled token.
        support: of each sampled token if top-k or top-p truncate; else empty.
        finish_reason: None while unfinished.
    """

    prompt: PromptState
    sample: int
    uniforms: np.ndarray
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    support: list[tuple[int, ...]] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None

    @property
    def next_input(self) -> int:
        """Token id that the next decoding step reads."""
        return self.token_ids[-1] if self.token_ids else self.prompt.token_ids[-1]

    @property
    def next_position(self) -> int:
        """Position of that token."""
        return len(self.prompt.token_ids) - 1 + len(self.token_ids)


class DecodeBatch:
    """The sequences that are decoded together, and their cache. Sequence i and prompt i have slot i.

    Slots stay contiguous: when a sequence or prompt leaves, the last one moves into its slot.
    """

    def __init__(self, device: torch.device) -> None:
        self.sequences: list[SequenceState] = []
        self.prompts: list[PromptState] = []
        self.cache = SharedPromptCache()
        self._device = device

    def admit(self, sequences: Sequence[SequenceState]) -> list[PromptState]:
        """Add sequences, and return those of their prompts that are new and need prefill."""
        new = []
        for sequence in sequences:
            if sequence.prompt.slot is None:
                sequence.prompt.slot = len(self.prompts)
                self.prompts.append(sequence.prompt)
                new.append(sequence.prompt)
        self.sequences += sequences
        self._update_indices()
        return new

    def remove_finished(self) -> list[SequenceState]:
        """Remove and return finished sequences; prompts leave with their last sequence."""
        finished = [sequence for sequence in self.sequences if sequence.finish_reason is not None]
        if not finished:
            return []
        for sequence in finished:
            sequence.prompt.unfinished -= 1
        self.sequences, sequence_moves = _compact(self.sequences, [s.finish_reason is None for s in self.sequences])
        self.prompts, prompt_moves = _compact(self.prompts, [prompt.unfinished > 0 for prompt in self.prompts])
        for layer in self.cache.layers.values():
            layer.own.move(*sequence_moves)
            layer.prompts.move(*prompt_moves)
        for slot, prompt in enumerate(self.prompts):
            prompt.slot = slot
        self._update_indices()
        return finished

    def _update_indices(self) -> None:
        """Compute the parts of decode plans that change only when sequences come or go."""
        members: list[list[int]] = [[] for _ in self.prompts]
        for i, sequence in enumerate(self.sequences):
            assert sequence.prompt.slot is not None
            members[sequence.prompt.slot].append(i)
        size = max(map(len, members), default=0)
        self._group_index = self._tensor([i for group in members for i in [*group, *[0] * (size - len(group))]])
        position = {i: slot * size + j for slot, group in enumerate(members) for j, i in enumerate(group)}
        self._ungroup_index = self._tensor([position[i] for i in range(len(self.sequences))])
        self._slots = torch.arange(len(self.sequences), device=self._device)
        lengths = [len(prompt.token_ids) - 1 for prompt in self.prompts]
        self._prompt_length = max([1, *lengths])
        self._prompt_bias = _padding_bias(self._tensor(lengths), self._prompt_length)

    def prefill_plan(self, prompts: Sequence[PromptState]) -> PrefillPlan:
        """Return the plan of one pass over ``prompts``, concatenated in this order without their last tokens."""
        spans, start = [], 0
        for prompt in prompts:
            assert prompt.slot is not None
            end = start + len(prompt.token_ids) - 1
            spans.append(PromptSpan(prompt.slot, start, end))
            start = end
        return PrefillPlan(spans=tuple(spans), num_prompts=len(self.prompts), prompt_length=self._prompt_length)

    def decode_plan(self) -> DecodePlan:
        """Return the plan of one decoding step of all sequences."""
        lengths = [len(sequence.token_ids) for sequence in self.sequences]
        tensor = self._tensor(lengths)
        longest = max(lengths) + 1
        return DecodePlan(
            slots=self._slots,
            lengths=tensor,
            own_length=longest,
            own_bias=None if min(lengths) == max(lengths) else _padding_bias(tensor + 1, longest),
            num_prompts=len(self.prompts),
            prompt_length=self._prompt_length,
            prompt_bias=self._prompt_bias,
            group_index=self._group_index,
            ungroup_index=self._ungroup_index,
        )

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)


class StopCondition:
    """Decides whether a completion ends with its newest token: an EOS token, a stop string or the length limit."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, eos: frozenset[int], stop: tuple[str, ...], max_new_tokens: int
    ) -> None:
        self._tokenizer = tokenizer
        self._eos = eos
        self._stop = stop
        self._max_new_tokens = max_new_tokens
        # A token has at least one byte, so this many tokens hold the longest stop string. The margin is for a character
        # that is cut in two at the start, and for special tokens, which are not decoded.
        self._tail = max((len(text.encode()) for text in stop), default=0) + 8

    def finish_reason(self, token_ids: Sequence[int]) -> Literal["stop", "length"] | None:
        """Return why a completion with these tokens ends; None if it goes on."""
        if token_ids[-1] in self._eos or (self._stop and self._has_stop_string(token_ids)):
            return "stop"
        return "length" if len(token_ids) >= self._max_new_tokens else None

    def _has_stop_string(self, token_ids: Sequence[int]) -> bool:
        # An earlier stop string would have ended the completion, so it can only be in the last few tokens.
        tail = str(self._tokenizer.decode(list(token_ids[-self._tail :]), skip_special_tokens=True))
        return any(text in tail for text in self._stop)


def _padding_bias(lengths: Tensor, longest: int) -> Tensor:
    """Mask padding: lengths [N] -> [N, 1, 1, longest], 0 in the first ``lengths`` places and MASKED in the rest."""
    is_padding = torch.arange(longest, device=lengths.device) >= lengths[:, None]
    return torch.zeros(is_padding.shape, device=lengths.device).masked_fill_(is_padding, MASKED)[:, None, None]


def _compact(items: list[T], keep: list[bool]) -> tuple[list[T], tuple[list[int], list[int]]]:
    """Fill the places of removed items with the last ones.

    Returns:
        The kept items, and the moves as (sources, targets).
    """
    count = sum(keep)
    targets = [i for i in range(count) if not keep[i]]
    sources = [i for i in range(count, len(items)) if keep[i]]
    result = items[:count]
    for source, target in zip(sources, targets, strict=True):
        result[target] = items[source]
    return result, (sources, targets)
