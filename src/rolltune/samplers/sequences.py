"""Completions under way, the batch that they form, and when they end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rolltune.model.kv_cache import NOTHING, DecodePlan, PrefillPlan, Segment, SharedPromptCache

T = TypeVar("T")


@dataclass(eq=False)
class PromptState:
    """A request under way.

    Attributes:
        request: its number.
        token_ids: the whole prompt. Its last token is not read with the others but is the input of the first decoding
            step of each completion, which thereby is a step like any other.
        unfinished: completions that wait or are being written.
        slot: where the cache has its keys and values; None before they are computed.
    """

    request: int
    token_ids: tuple[int, ...]
    unfinished: int
    slot: int | None = None


@dataclass(eq=False)
class SequenceState:
    """A completion under way.

    Attributes:
        uniforms: float64 [max_new_tokens]; the numbers in [0, 1) that pick its tokens.
        support: of each token where top-k or top-p truncate; else empty.
    """

    prompt: PromptState
    uniforms: np.ndarray
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    support: list[tuple[int, ...]] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None

    @property
    def next_input(self) -> int:
        return self.token_ids[-1] if self.token_ids else self.prompt.token_ids[-1]

    @property
    def next_position(self) -> int:
        return len(self.prompt.token_ids) - 1 + len(self.token_ids)


class Batch:
    """The rows that are written side by side; row i and prompt i have slot i of the cache.

    There are no holes: when a row or prompt leaves, the last one moves into its slot.
    """

    def __init__(self, device: torch.device) -> None:
        self.rows: list[SequenceState] = []
        self.prompts: list[PromptState] = []
        self.cache = SharedPromptCache()
        self._device = device

    def admit(self, rows: Sequence[SequenceState]) -> list[PromptState]:
        """Take in rows, and return those of their prompts that have to be read first."""
        new = []
        for row in rows:
            if row.prompt.slot is None:
                row.prompt.slot = len(self.prompts)
                self.prompts.append(row.prompt)
                new.append(row.prompt)
        self.rows += rows
        self._arrange()
        return new

    def remove_finished(self) -> list[SequenceState]:
        """Let finished rows leave, and prompts with their last row; returns the rows."""
        finished = [row for row in self.rows if row.finish_reason is not None]
        if not finished:
            return []
        for row in finished:
            row.prompt.unfinished -= 1
        self.rows, row_moves = _without_holes(self.rows, [row.finish_reason is None for row in self.rows])
        self.prompts, prompt_moves = _without_holes(self.prompts, [prompt.unfinished > 0 for prompt in self.prompts])
        for layer in self.cache.layers.values():
            layer.own.move(*row_moves)
            layer.prompt.move(*prompt_moves)
        for slot, prompt in enumerate(self.prompts):
            prompt.slot = slot
        self._arrange()
        return finished

    def _arrange(self) -> None:
        """What all steps have in common until rows come or go."""
        members: list[list[int]] = [[] for _ in self.prompts]
        for i, row in enumerate(self.rows):
            assert row.prompt.slot is not None
            members[row.prompt.slot].append(i)
        width = max(map(len, members), default=0)
        self._cells = self._tensor([i for rows in members for i in [*rows, *[0] * (width - len(rows))]])
        cell_of_row = {i: slot * width + place for slot, rows in enumerate(members) for place, i in enumerate(rows)}
        self._cell_of_row = self._tensor([cell_of_row[i] for i in range(len(self.rows))])
        self._row_numbers = torch.arange(len(self.rows), device=self._device)
        lengths = [len(prompt.token_ids) - 1 for prompt in self.prompts]
        self._prompt_length = max([1, *lengths])
        self._prompt_bias = _bias(self._tensor(lengths), self._prompt_length)

    def prefill_plan(self, prompts: Sequence[PromptState]) -> PrefillPlan:
        """For ``prompts``, packed in this order without their last tokens."""
        segments, start = [], 0
        for prompt in prompts:
            assert prompt.slot is not None
            end = start + len(prompt.token_ids) - 1
            segments.append(Segment(prompt.slot, start, end))
            start = end
        return PrefillPlan(segments=tuple(segments), prompts=len(self.prompts), longest=self._prompt_length)

    def decode_plan(self) -> DecodePlan:
        lengths = [len(row.token_ids) for row in self.rows]
        tensor = self._tensor(lengths)
        longest = max(lengths) + 1
        return DecodePlan(
            rows=self._row_numbers,
            lengths=tensor,
            own_length=longest,
            own_bias=None if min(lengths) == max(lengths) else _bias(tensor + 1, longest),
            prompts=len(self.prompts),
            prompt_length=self._prompt_length,
            prompt_bias=self._prompt_bias,
            cells=self._cells,
            cell_of_row=self._cell_of_row,
        )

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)


class EndOfText:
    """Whether a completion ends with its newest token."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, eos: frozenset[int], stop: tuple[str, ...], max_new_tokens: int
    ) -> None:
        self._tokenizer = tokenizer
        self._eos = eos
        self._stop = stop
        self._max_new_tokens = max_new_tokens
        # A token has one byte at least. The margin is for a first character that is cut in two, and for special tokens.
        self._tail = max((len(text.encode()) for text in stop), default=0) + 8

    def reason(self, token_ids: Sequence[int]) -> Literal["stop", "length"] | None:
        if token_ids[-1] in self._eos or (self._stop and self._has_stop_string(token_ids)):
            return "stop"
        return "length" if len(token_ids) >= self._max_new_tokens else None

    def _has_stop_string(self, token_ids: Sequence[int]) -> bool:
        # An earlier stop string would have ended the completion, so it can only be in the last few tokens.
        tail = str(self._tokenizer.decode(list(token_ids[-self._tail :]), skip_special_tokens=True))
        return any(text in tail for text in self._stop)


def _bias(lengths: Tensor, longest: int) -> Tensor:
    """[N] to [N, 1, 1, longest]: 0 at the first ``lengths`` places, NOTHING behind."""
    behind = torch.arange(longest, device=lengths.device) >= lengths[:, None]
    return torch.zeros(behind.shape, device=lengths.device).masked_fill_(behind, NOTHING)[:, None, None]


def _without_holes(items: list[T], keep: list[bool]) -> tuple[list[T], tuple[list[int], list[int]]]:
    """The kept items, the last ones moved into the holes; and the moves, as (sources, targets)."""
    kept = sum(keep)
    targets = [i for i in range(kept) if not keep[i]]
    sources = [i for i in range(kept, len(items)) if keep[i]]
    result = items[:kept]
    for source, target in zip(sources, targets, strict=True):
        result[target] = items[source]
    return result, (sources, targets)
