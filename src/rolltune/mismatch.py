"""The mismatch between sampler and trainer on the tokens that are trained on, and the limit that stops a run.

Let d = log pi_old - log mu for a token: the trainer's log-prob at the weights that were sampled with, minus the
sampler's, clamped to [-20, 20]. With means over the tokens of all ranks' microbatches, the metrics of a step are:

====================================  =============================================================================
mismatch/mean_abs                     mean of ``abs(d)``
mismatch/max_abs                      largest ``abs(d)``, not clamped
mismatch/k3                           mean of ``exp(d) - 1 - d``: Schulman's k3, an estimate of KL(mu || pi_old)
mismatch/mean_ratio                   mean of ``exp(d)``; its expectation is 1 wherever mu covers pi_old
mismatch/outside                      share of tokens whose ``exp(d)`` is outside [0.9, 1.1]
mismatch/position/quarter_1 .. 4      mean of ``abs(d)`` within a quarter of the completion's tokens
mismatch/probability/0_to_0.01 ..     mean of ``abs(d)`` where the sampler gave the token such a probability
====================================  =============================================================================

A quarter or bucket without tokens has no value. Errors that grow with the position point to keys and values of older
weights (a prefix cache that was not reset), errors on unlikely tokens only to precision, and a mean ratio other than
1 to another distribution. With several updates a step the trainer's log-probs are those before the first update, so
what the policy has learnt since does not count. With ``old_policy: sampler`` no such log-probs are computed, and
those of the policy under training are compared instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rolltune.corrections import MAX_LOG_RATIO, log_ratios
from rolltune.distributed import World
from rolltune.losses.terms import sequence_sums
from rolltune.types import Completion, Microbatch, RolloutMicrobatch

QUARTERS = 4
EDGES = (0.01, 0.1, 0.5, 0.9)  # between the buckets of the sampler's probability
BUCKETS = ("0_to_0.01", "0.01_to_0.1", "0.1_to_0.5", "0.5_to_0.9", "0.9_to_1")
NEAR = (0.9, 1.1)

CAUSES = (
    "stale weights: a sync that was skipped, came late or missed a tensor (tied embeddings, an unmerged adapter)",
    "keys and values of older weights: a prefix cache that was not reset after a sync (grows with the position)",
    "another distribution: a temperature, top-p, top-k, min-p or penalty that the trainer does not apply, or log-probs "
    "taken before they were applied (the mean ratio is not 1)",
    "precision: bf16 or fp8 on one side, a quantised cache, another attention kernel (unlikely tokens first)",
    "LoRA: another scaling, active dropout, weights merged in low precision",
    "other tokens: another tokenizer, chat template or prefill, or completions that were re-encoded from text",
)


class MismatchError(RuntimeError):
    """Sampler and trainer differ too much to train; no step was taken."""


@dataclass(frozen=True, kw_only=True)
class Mismatch:
    """The mismatch of one optimizer step over all ranks; the fields are those of the module's table.

    Attributes:
        by_position: mean of ``abs(d)`` per quarter; None for a quarter without tokens.
        by_probability: mean of ``abs(d)`` per bucket; None for a bucket without tokens.
    """

    tokens: int
    mean_abs: float
    max_abs: float
    k3: float
    mean_ratio: float
    outside: float
    by_position: tuple[float | None, ...]
    by_probability: tuple[float | None, ...]

    def metrics(self) -> dict[str, float]:
        names = ("mean_abs", "max_abs", "k3", "mean_ratio", "outside")
        split = {f"position/quarter_{i}": value for i, value in enumerate(self.by_position, start=1)}
        split |= {f"probability/{name}": value for name, value in zip(BUCKETS, self.by_probability, strict=True)}
        found = {name: value for name, value in split.items() if value is not None}
        return {f"mismatch/{name}": value for name, value in ({n: getattr(self, n) for n in names} | found).items()}


class MismatchMeter:
    """Sums over microbatches, then over ranks; nothing is averaged before the end."""

    def __init__(self) -> None:
        self._sums = [0.0] * (5 + 2 * QUARTERS + 2 * len(BUCKETS))
        self._largest = 0.0

    def add(self, old_logprobs: Tensor, microbatch: RolloutMicrobatch) -> None:
        """Add the tokens of a microbatch.

        Args:
            old_logprobs: [N], the trainer's at the weights that were sampled with; its gradient is ignored.
            microbatch: holds the sampler's log-probs.
        """
        exact = log_ratios(old_logprobs, microbatch.sampler_logprobs)
        d = exact.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        ratios, ones = d.exp(), torch.ones_like(d)
        quarters = completion_quarters(microbatch)
        edges = torch.tensor(EDGES, device=d.device).log()
        buckets = torch.bucketize(microbatch.sampler_logprobs, edges, right=True)  # an edge belongs to the bucket above
        sums = [
            torch.stack(
                [
                    ones.sum(),
                    d.abs().sum(),
                    (torch.expm1(d) - d).sum(),
                    ratios.sum(),
                    ((ratios < NEAR[0]) | (ratios > NEAR[1])).float().sum(),
                ]
            ),
            sequence_sums(d.abs(), quarters, QUARTERS),
            sequence_sums(ones, quarters, QUARTERS),
            sequence_sums(d.abs(), buckets, len(BUCKETS)),
            sequence_sums(ones, buckets, len(BUCKETS)),
        ]
        self._sums = [a + b for a, b in zip(self._sums, torch.cat(sums).tolist(), strict=True)]
        largest = exact.abs().max().item()
        self._largest = largest if math.isnan(largest) else max(self._largest, largest)

    def read(self, world: World) -> Mismatch | None:
        """Return the mismatch over all ranks; None if no rank has added a token. All ranks call this."""
        sums = world.sum(self._sums)
        (largest,) = world.max([self._largest])
        tokens, mean_abs, k3, ratio, outside = sums[:5]
        if tokens == 0:
            return None
        split, start = [], 5
        for size in (QUARTERS, len(BUCKETS)):
            pairs = zip(sums[start : start + size], sums[start + size : start + 2 * size], strict=True)
            split.append(tuple(total / count if count else None for total, count in pairs))
            start += 2 * size
        return Mismatch(
            tokens=int(tokens),
            mean_abs=mean_abs / tokens,
            max_abs=largest,
            k3=k3 / tokens,
            mean_ratio=ratio / tokens,
            outside=outside / tokens,
            by_position=split[0],
            by_probability=split[1],
        )


class TokenGaps:
    """Trainer's minus sampler's log-prob of each token, of the completions that this rank has trained on."""

    def __init__(self) -> None:
        self._gaps: dict[tuple[tuple[int, ...], tuple[float, ...]], list[float]] = {}

    def add(self, old_logprobs: Tensor, microbatch: RolloutMicrobatch) -> None:
        """Add the completions of a microbatch; arguments as in :meth:`MismatchMeter.add`."""
        sizes = torch.bincount(microbatch.target_sequence_index, minlength=microbatch.num_sequences).tolist()
        sampler = microbatch.sampler_logprobs
        columns = (microbatch.target_ids, sampler, old_logprobs.detach() - sampler)
        for token_ids, logprobs, gaps in zip(*(column.split(sizes) for column in columns), strict=True):
            self._gaps[tuple(token_ids.tolist()), tuple(logprobs.tolist())] = gaps.tolist()

    def of(self, completion: Completion) -> list[float] | None:
        """Return one number per token; None for a completion that was not trained on here."""
        logprobs = torch.tensor(completion.logprobs, dtype=torch.float32).tolist()
        return self._gaps.get((completion.token_ids, tuple(logprobs)))


def completion_quarters(microbatch: Microbatch) -> Tensor:
    """Return the quarter of its completion that each trained token is in, int64 [N]: ``4 t // T`` for token t of T."""
    sequences, count = microbatch.target_sequence_index, microbatch.num_sequences
    positions = microbatch.position_ids[microbatch.predictor_index]  # of the predicting token: the target's minus 1
    first = positions.new_full((count,), torch.iinfo(positions.dtype).max)
    first = first.scatter_reduce(0, sequences, positions, "amin")
    lengths = torch.bincount(sequences, minlength=count)
    return QUARTERS * (positions - first[sequences]) // lengths[sequences]


@dataclass(frozen=True, kw_only=True)
class MismatchLimit:
    """Limits on the mismatch, above which a run stops: ``mismatch`` in a config.

    They are checked before the first optimizer step that each step of the run takes. A run that exceeds one stops with
    a checkpoint of the previous step. Limits may change on resume.

    Example:
        >>> limit = MismatchLimit(max_k3=0.015)

    Attributes:
        max_k3: limit on ``mismatch/k3``; None: no limit. prime-rl accepts a model below 0.015, and 1e-3 is called
            normal for vLLM in bf16 ("When Speed Kills Stability").
        max_ratio_gap: limit on the distance of ``mismatch/mean_ratio`` from 1; None: no limit. A temperature or top-p
            that the trainer does not apply gives 0.1 or more (TRL's issues 4159 and 6789).
        max_outside: limit on ``mismatch/outside``; None: no limit. bf16 has 0.04 to 0.08.

    Raises:
        ValueError: a value is out of range, or all three are None.
    """

    max_k3: float | None = 0.015
    max_ratio_gap: float | None = 0.1
    max_outside: float | None = None

    def __post_init__(self) -> None:
        limits = {name: getattr(self, name) for name in ("max_k3", "max_ratio_gap", "max_outside")}
        for name, limit in limits.items():
            if limit is not None and not limit > 0:
                raise ValueError(f"{name}: {limit}; must be > 0 (null: no limit)")
        if not any(limits.values()):
            raise ValueError("max_k3, max_ratio_gap, max_outside: all are null, so there is no limit; set at least one")

    def check(self, seen: Mismatch) -> None:
        """Check the mismatch of an update against the limits.

        Raises:
            MismatchError: a limit is exceeded, or a value is NaN; the message lists what was seen and likely causes.
        """
        readings = (
            ("max_k3", self.max_k3, seen.k3, "k3"),
            ("max_ratio_gap", self.max_ratio_gap, abs(seen.mean_ratio - 1), "the mean ratio's distance from 1"),
            ("max_outside", self.max_outside, seen.outside, "the share of ratios not in [0.9, 1.1]"),
        )
        over = [
            f"mismatch.{name}: {what} of sampler and trainer is {value:.3g}, more than {limit:g}"
            for name, limit, value, what in readings
            if limit is not None and not value <= limit
        ]
        if over:
            raise MismatchError(
                "\n  ".join([*over, _describe(seen), "likely causes:", *(f"  - {cause}" for cause in CAUSES)])
            )


def _describe(seen: Mismatch) -> str:
    def listed(values: tuple[float | None, ...]) -> str:
        return ", ".join("-" if value is None else f"{value:.2g}" for value in values)

    return (
        f"|trainer - sampler| log-prob of {seen.tokens} tokens: mean {seen.mean_abs:.3g}, max {seen.max_abs:.3g}; "
        f"mean ratio {seen.mean_ratio:.4f}, {seen.outside:.1%} outside [0.9, 1.1]\n"
        f"  mean by quarter of the completion: {listed(seen.by_position)}; "
        f"by the sampler's probability from 0 to 1: {listed(seen.by_probability)}"
    )
