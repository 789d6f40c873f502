"""Groups -> TrainBatch: packed rows in which a prompt stands once in front of its completions. Tensors begin here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import chain

import numpy as np
import torch

from rolltune.types import Group, LossTotals, Microbatch, Prompt, Support


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSequence:
    """One completion with all that is trained on: ids, the sampler's log-probs and supports, the advantage."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    advantage: float
    support: tuple[tuple[int, ...], ...] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainGroup:
    """A prompt and the completions of it that are trained on."""

    prompt: Prompt
    sequences: tuple[TrainSequence, ...]


def train_group(group: Group, advantages: Sequence[float]) -> TrainGroup:
    """A scored group and its advantages, one for each completion."""
    return TrainGroup(
        prompt=group.prompt,
        sequences=tuple(
            TrainSequence(
                token_ids=completion.token_ids,
                logprobs=completion.logprobs,
                advantage=advantage,
                support=completion.support,
            )
            for completion, advantage in zip(group.completions, advantages, strict=True)
        ),
    )


def count_totals(groups: Sequence[TrainGroup]) -> LossTotals:
    """Trained tokens and completions of this rank, for the loss denominators."""
    return LossTotals(
        tokens=sum(len(sequence.token_ids) for group in groups for sequence in group.sequences),
        sequences=sum(len(group.sequences) for group in groups),
    )


def without_zero_advantages(groups: Sequence[TrainGroup]) -> list[TrainGroup]:
    """Leave out completions that would add nothing to the gradient of a loss without a KL term."""
    kept = [replace(g, sequences=tuple(s for s in g.sequences if s.advantage != 0.0)) for g in groups]
    return [group for group in kept if group.sequences]


@dataclass
class _Builder:
    """A row under construction, as Python lists."""

    input_ids: list[int] = field(default_factory=list)
    position_ids: list[int] = field(default_factory=list)
    segment_index: list[int] = field(default_factory=list)
    sequence_index: list[int] = field(default_factory=list)
    predictor_index: list[int] = field(default_factory=list)
    target_ids: list[int] = field(default_factory=list)
    target_sequence_index: list[int] = field(default_factory=list)
    advantages: list[float] = field(default_factory=list)
    sampler_logprobs: list[float] = field(default_factory=list)
    supports: list[tuple[int, ...]] = field(default_factory=list)
    num_segments: int = 0
    num_sequences: int = 0

    def _append(self, token_ids: Sequence[int], start: int, completion: int) -> None:
        self.input_ids += token_ids
        self.position_ids += range(start, start + len(token_ids))
        self.segment_index += [self.num_segments - 1] * len(token_ids)
        self.sequence_index += [completion] * len(token_ids)

    def add_prompt(self, prompt: Prompt) -> int:
        """Returns the index of the prompt's last token, which predicts the first token of every completion."""
        self.num_segments += 1
        self._append(prompt.token_ids, 0, -1)
        return len(self.input_ids) - 1

    def add_sequence(self, sequence: TrainSequence, prompt: Prompt, prompt_end: int) -> None:
        start, length = len(self.input_ids), len(sequence.token_ids)
        # Nothing is predicted from the last token, so it need not stand in the row.
        self._append(sequence.token_ids[:-1], len(prompt.token_ids), self.num_sequences)
        self.predictor_index += [prompt_end, *range(start, start + length - 1)]
        self.target_ids += sequence.token_ids
        self.target_sequence_index += [self.num_sequences] * length
        self.advantages += [sequence.advantage] * length
        self.sampler_logprobs += sequence.logprobs
        self.supports += sequence.support or [()] * length
        self.num_sequences += 1

    def tensors(self, device: torch.device | str) -> Microbatch:
        as_float = {"advantages", "sampler_logprobs"}
        return Microbatch(
            num_sequences=self.num_sequences,
            support=_support(self.supports, device) if any(self.supports) else None,
            **{
                f.name: torch.tensor(
                    getattr(self, f.name), dtype=torch.float32 if f.name in as_float else torch.int64, device=device
                )
                for f in fields(Microbatch)
                if f.name not in ("num_sequences", "support")
            },
        )


def _support(supports: Sequence[tuple[int, ...]], device: torch.device | str) -> Support:
    """An empty one stands for the full vocabulary."""
    token_ids = np.fromiter(chain.from_iterable(supports), dtype=np.int32)
    offsets = np.cumsum([0, *map(len, supports)])
    return Support(
        token_ids=torch.from_numpy(token_ids).to(device), offsets=torch.from_numpy(offsets).to(device, torch.int64)
    )


def pack(groups: Sequence[TrainGroup], *, max_tokens: int, device: torch.device | str = "cpu") -> list[Microbatch]:
    """Fill rows of at most ``max_tokens`` tokens with groups, in order.

    A group that does not fit goes on in the next row behind its prompt, repeated. A completion is never cut:
    one that is longer than ``max_tokens`` with its prompt gets a row of its own. A row has a support where one of its
    completions has; the tokens of the others have the full vocabulary there.
    """
    rows = [_Builder()]
    for group in groups:
        prompt_end = -1  # the prompt is not in the current row yet
        for sequence in group.sequences:
            new = len(sequence.token_ids) - 1 + (len(group.prompt.token_ids) if prompt_end < 0 else 0)
            if rows[-1].input_ids and len(rows[-1].input_ids) + new > max_tokens:
                rows.append(_Builder())
                prompt_end = -1
            if prompt_end < 0:
                prompt_end = rows[-1].add_prompt(group.prompt)
            rows[-1].add_sequence(sequence, group.prompt, prompt_end)
    return [row.tensors(device) for row in rows if row.num_sequences]
