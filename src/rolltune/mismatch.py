"""How far sampler and trainer are apart on the tokens that are trained on, and when that stops a run.

With d = log pi_old - log mu of a token (the trainer's log-prob at the weights that were sampled with, less the
sampler's; kept in [-20, 20]) and means over the tokens of all ranks' rows, a step's metrics have:

====================================  ================================================================================
mismatch/mean_abs                     mean of ``abs(d)``
mismatch/max_abs                      the largest ``abs(d)``, which is not kept in bounds
mismatch/k3                           mean of ``exp(d) - 1 - d``: Schulman's k3, an estimate of KL(mu || pi_old)
mismatch/mean_ratio                   mean of ``exp(d)``, which is 1 in expectation wherever mu covers pi_old
mismatch/outside                      share of tokens whose ``exp(d)`` is not in [0.9, 1.1]
mismatch/position/quarter_1 .. 4      mean of ``abs(d)`` in a quarter of the completion's tokens
mismatch/probability/0_to_0.01 ..     mean of ``abs(d)`` where the sampler gave the token such a probability
====================================  ================================================================================

A quarter or a bucket without tokens has no value. Errors that grow with the position come from keys and values of other
weights (a prefix cache that was not reset), those of unlikely tokens alone from precision, a mean ratio off 1 from
another distribution. Where there is more than one update a step, the trainer's log-probs are those from before the
first, so that what the policy has learnt since is not in here; with :class:`rolltune.corrections.Bypass` there are none
of these, and the policy's own are taken.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rolltune.corrections import MAX_LOG_RATIO, log_ratios
from rolltune.distributed import World
from rolltune.losses.terms import sequence_sums
from rolltune.types import Microbatch

QUARTERS = 4
EDGES = (0.01, 0.1, 0.5, 0.9)  # of the sampler's probability, between its buckets
BUCKETS = ("0_to_0.01", "0.01_to_0.1", "0.1_to_0.5", "0.5_to_0.9", "0.9_to_1")
NEAR = (0.9, 1.1)

CAUSES = (
    "stale weights: a sync that was skipped, came late or missed a tensor (tied embeddings, an adapter not merged)",
    "keys and values of older weights: a prefix cache that was not reset after a sync (grows with the position)",
    "another distribution: a temperature, top-p, top-k, min-p or penalty that the trainer does not mirror, or "
    "log-probs from before these are applied (mean ratio off 1)",
    "precision: bf16 or fp8 on one side, a quantised cache, another attention kernel (unlikely tokens first)",
    "LoRA: another scaling, dropout that is on, weights merged in low precision",
    "other tokens: another tokenizer, chat template or prefill, or completions that were encoded again from text",
)


class MismatchError(RuntimeError):
    """Sampler and trainer are too far apart to train on; nothing was stepped."""


@dataclass(frozen=True, kw_only=True)
class Mismatch:
    """One optimizer step's, over all ranks; means over tokens as in the module's table.

    Attributes:
        by_position: of each quarter, None where it has no tokens.
        by_probability: of each bucket, likewise.
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
    """Adds up micro-batches, then ranks: nothing is averaged before the end."""

    def __init__(self) -> None:
        self._sums = [0.0] * (5 + 2 * QUARTERS + 2 * len(BUCKETS))
        self._largest = 0.0

    def add(self, old_logprobs: Tensor, row: Microbatch) -> None:
        """Count a micro-batch.

        Args:
            old_logprobs: [N], the trainer's at the weights that were sampled with; a gradient is not followed.
            row: has the sampler's.
        """
        exact = log_ratios(old_logprobs, row.sampler_logprobs)
        d = exact.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        ratios, ones = d.exp(), torch.ones_like(d)
        quarters = completion_quarters(row)
        edges = torch.tensor(EDGES, device=d.device).log()
        buckets = torch.bucketize(row.sampler_logprobs, edges, right=True)  # a probability of an edge is above it
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
        """Over all ranks, the same on each; None where none has counted a token. All ranks call this."""
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


def completion_quarters(row: Microbatch) -> Tensor:
    """Which quarter of its completion each trained token is in, int64 [N], 0 .. 3: ``4 t // T`` of token t of T."""
    positions = row.position_ids[row.predictor_index]  # of what predicts a token: its own, less one
    first = positions.new_full((row.num_sequences,), torch.iinfo(positions.dtype).max)
    first = first.scatter_reduce(0, row.target_sequence_index, positions, "amin")
    lengths = torch.bincount(row.target_sequence_index, minlength=row.num_sequences)
    return QUARTERS * (positions - first[row.target_sequence_index]) // lengths[row.target_sequence_index]


@dataclass(frozen=True, kw_only=True)
class MismatchLimit:
    """When sampler and trainer are too far apart to train on: ``mismatch`` of a config.

    It is looked at in each step's first update, before the weights are stepped. The run then stops with a checkpoint
    of the step before. A limit may be changed when the run is resumed.

    Example:
        >>> limit = MismatchLimit(max_k3=0.015)

    Attributes:
        max_k3: the most that ``mismatch/k3`` may be; None: not looked at. prime-rl accepts a model below 0.015, and
            1e-3 is called normal for vLLM in bf16 ("When Speed Kills Stability").
        max_ratio_gap: the most that ``mismatch/mean_ratio`` may be off 1; None: not looked at. A temperature or top-p
            that is not mirrored gives 0.1 and more (TRL's issues 4159 and 6789).
        max_outside: the most that ``mismatch/outside`` may be; None: not looked at. bf16 has 0.04 to 0.08 there.

    Raises:
        ValueError: a value out of its range, or nothing to look at.
    """

    max_k3: float | None = 0.015
    max_ratio_gap: float | None = 0.1
    max_outside: float | None = None

    def __post_init__(self) -> None:
        limits = {name: getattr(self, name) for name in ("max_k3", "max_ratio_gap", "max_outside")}
        for name, limit in limits.items():
            if limit is not None and not limit > 0:
                raise ValueError(f"{name}: {limit}; must be > 0 (null: not looked at)")
        if not any(limits.values()):
            raise ValueError("max_k3, max_ratio_gap and max_outside are null: nothing would be looked at")

    def check(self, seen: Mismatch) -> None:
        """Raise where a limit is exceeded, or where a value is not a number.

        Raises:
            MismatchError: what was seen, and what may be behind it.
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
