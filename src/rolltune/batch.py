"""Groups of completions to packed microbatches. Python lists end here and tensors begin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from rolltune.types import Group, LossTotals, Microbatch, Prompt, RolloutMicrobatch, Support


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenSequence:
    """The tokens of one completion, all of them trained."""

    token_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSequence(TokenSequence):
    """A sampled completion: token ids, the sampler's log-probs and supports, the advantage."""

    logprobs: tuple[float, ...]
    advantage: float
    support: tuple[tuple[int, ...], ...] | None = None


S = TypeVar("S", bound=TokenSequence, covariant=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainGroup(Generic[S]):
    """A prompt and the completions of it that are trained."""

    prompt: Prompt
    sequences: tuple[S, ...]


def train_group(
    group: Group, advantages: Sequence[float], *, mask_truncated: bool = False
) -> TrainGroup[TrainSequence]:
    """Pair the completions of a group with their advantages, one each.

    Args:
        group: everything in it is scored.
        advantages: in the order of the completions.
        mask_truncated: leave out completions that were cut at the length limit: DAPO's overlong filtering (arXiv
            2503.14476, section 3.4). They count in the baseline of the others, but neither in the loss nor in its
            denominators, as if they had not been sampled.
    """
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
            if not (mask_truncated and completion.finish_reason == "length")
        ),
    )


def count_totals(groups: Sequence[TrainGroup[TokenSequence]]) -> LossTotals:
    """Count the trained tokens and completions of this rank, for the loss denominators."""
    return LossTotals(
        tokens=sum(len(sequence.token_ids) for group in groups for sequence in group.sequences),
        sequences=sum(len(group.sequences) for group in groups),
    )


def without_zero_advantages(groups: Sequence[TrainGroup[TrainSequence]]) -> list[TrainGroup[TrainSequence]]:
    """Leave out completions that add nothing to the gradient of a loss without a KL term."""
    kept = [
        TrainGroup(prompt=group.prompt, sequences=tuple(s for s in group.sequences if s.advantage != 0.0))
        for group in groups
    ]
    return [group for group in kept if group.sequences]


@dataclass
class _Packed(Generic[S]):
    """A microbatch under construction, as Python lists; the fields are those of :class:`rolltune.types.Microbatch`."""

    sequences: list[S] = field(default_factory=list)
    num_segments: int = 0
    input_ids: list[int] = field(default_factory=list)
    position_ids: list[int] = field(default_factory=list)
    segment_index: list[int] = field(default_factory=list)
    sequence_index: list[int] = field(default_factory=list)
    predictor_index: list[int] = field(default_factory=list)
    target_ids: list[int] = field(default_factory=list)
    target_sequence_index: list[int] = field(default_factory=list)

    def add_prompt(self, prompt: Prompt) -> int:
        """Return the index of the prompt's last token, which predicts the first token of every completion."""
        self.num_segments += 1
        self._append(prompt.token_ids, 0, -1)
        return len(self.input_ids) - 1

    def add_sequence(self, sequence: S, prompt: Prompt, prompt_end: int) -> None:  # pyright: ignore[reportGeneralTypeIssues]
        start, length, number = len(self.input_ids), len(sequence.token_ids), len(self.sequences)
        # The last token predicts nothing, so it need not be in the input.
        self._append(sequence.token_ids[:-1], len(prompt.token_ids), number)
        self.predictor_index += [prompt_end, *range(start, start + length - 1)]
        self.target_ids += sequence.token_ids
        self.target_sequence_index += [number] * length
        self.sequences.append(sequence)

    def _append(self, token_ids: Sequence[int], start: int, sequence: int) -> None:
        self.input_ids += token_ids
        self.position_ids += range(start, start + len(token_ids))
        self.segment_index += [self.num_segments - 1] * len(token_ids)
        self.sequence_index += [sequence] * len(token_ids)

    def tensors(self, device: torch.device | str) -> dict[str, Any]:
        names = (
            *("input_ids", "position_ids", "segment_index", "sequence_index"),
            *("predictor_index", "target_ids", "target_sequence_index"),
        )
        tensors = {name: torch.tensor(getattr(self, name), dtype=torch.int64, device=device) for name in names}
        return {**tensors, "num_sequences": len(self.sequences)}


def pack(
    groups: Sequence[TrainGroup[TrainSequence]], *, max_tokens: int, device: torch.device | str = "cpu"
) -> list[RolloutMicrobatch]:
    """Pack sampled groups, in order, into microbatches of at most ``max_tokens`` tokens.

    A group that does not fit continues in the next microbatch behind its prompt, repeated. A completion is never cut:
    one that is longer than ``max_tokens`` with its prompt gets a microbatch of its own. A microbatch has a support if
    one of its completions has; the tokens of the others have the full vocabulary there.

    Example: the prompt ``A B C`` with the completions ``d e $`` and ``f $`` (``$`` is EOS) gives T = 6 and N = 5. The
    last token of a completion predicts nothing, so it is a target only::

        index                   0  1  2  3  4  5
        input_ids               A  B  C  d  e  f
        position_ids            0  1  2  3  4  3     completions continue from the prompt
        segment_index           0  0  0  0  0  0     the next prompt would be segment 1
        sequence_index         -1 -1 -1  0  0  1     f sees A, B, C and itself, but not d and e

        target_ids              d  e  $  f  $        the trained tokens
        predictor_index         2  3  4  2  5        C predicts the first token of both completions
        target_sequence_index   0  0  0  1  1
        advantages              a  a  a  b  b        one per completion
        sampler_logprobs        .  .  .  .  .        one per token

    Args:
        groups: the groups of this rank.
        max_tokens: T at most.
        device: where the tensors go.
    """
    microbatches = []
    for packed in _pack(groups, max_tokens):
        advantages = [s.advantage for s in packed.sequences for _ in s.token_ids]
        logprobs = list(chain.from_iterable(s.logprobs for s in packed.sequences))
        supports = [ids for s in packed.sequences for ids in s.support or [()] * len(s.token_ids)]
        microbatches.append(
            RolloutMicrobatch(
                **packed.tensors(device),
                advantages=torch.tensor(advantages, dtype=torch.float32, device=device),
                sampler_logprobs=torch.tensor(logprobs, dtype=torch.float32, device=device),
                support=_support(supports, device) if any(supports) else None,
            )
        )
    return microbatches


def pack_examples(
    groups: Sequence[TrainGroup[TokenSequence]], *, max_tokens: int, device: torch.device | str = "cpu"
) -> list[Microbatch]:
    """Pack written examples, which have no log-probs and no advantages, as :func:`pack` does."""
    return [Microbatch(**packed.tensors(device)) for packed in _pack(groups, max_tokens)]


def _pack(groups: Sequence[TrainGroup[S]], max_tokens: int) -> list[_Packed[S]]:
    microbatches: list[_Packed[S]] = [_Packed()]
    for group in groups:
        prompt_end = -1  # the prompt is not in the current microbatch yet
        for sequence in group.sequences:
            new = len(sequence.token_ids) - 1 + (len(group.prompt.token_ids) if prompt_end < 0 else 0)
            if microbatches[-1].input_ids and len(microbatches[-1].input_ids) + new > max_tokens:
                microbatches.append(_Packed())
                prompt_end = -1
            if prompt_end < 0:
                prompt_end = microbatches[-1].add_prompt(group.prompt)
            microbatches[-1].add_sequence(sequence, group.prompt, prompt_end)
    return [packed for packed in microbatches if packed.sequences]


def _support(supports: Sequence[tuple[int, ...]], device: torch.device | str) -> Support:
    token_ids = np.fromiter(chain.from_iterable(supports), dtype=np.int32)
    offsets = np.cumsum([0, *map(len, supports)])
    return Support(
        token_ids=torch.from_numpy(token_ids).to(device), offsets=torch.from_numpy(offsets).to(device, torch.int64)
    )
