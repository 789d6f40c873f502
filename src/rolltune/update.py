"""One optimizer step: micro-batches, backward, clip, step. Every number that is averaged is a sum until the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rolltune.corrections import Bypass, Correction
from rolltune.distributed import World
from rolltune.loss_scale import LossScale
from rolltune.mismatch import MismatchLimit, MismatchMeter
from rolltune.model.policy import Policy
from rolltune.types import Loss, LossInputs, LossTotals, Microbatch


class MasterWeights:
    """fp32 copies that the optimizer steps, for parameters held in bf16 or fp16.

    bf16 has 8 bits of mantissa: an update below 1/256 of a weight is rounded away (1/2048 in fp16). The copies keep it.
    Where it is not enabled this is a pass-through of the parameters themselves.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], *, enabled: bool):
        self.parameters = list(parameters)
        self.masters = (
            [torch.nn.Parameter(p.detach().float().clone()) for p in self.parameters] if enabled else self.parameters
        )

    def take_gradients(self) -> None:
        """Move gradients to the copies, in fp32."""
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            if master is not parameter:
                master.grad = None if parameter.grad is None else parameter.grad.float()
                parameter.grad = None

    @torch.no_grad()
    def write_back(self) -> None:
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            if master is not parameter:
                parameter.copy_(master)

    def state_dict(self) -> list[Tensor]:
        return [m.detach() for m, p in zip(self.masters, self.parameters, strict=True) if m is not p]

    @torch.no_grad()
    def load_state_dict(self, state: list[Tensor]) -> None:
        copies = [m for m, p in zip(self.masters, self.parameters, strict=True) if m is not p]
        for master, saved in zip(copies, state, strict=True):
            master.copy_(saved)


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """What a step steps with: the optimizer over the master weights, its schedule, the clip norm, the loss's scale."""

    weights: MasterWeights
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler | None
    max_grad_norm: float
    loss_scale: LossScale | None = None

    def __post_init__(self) -> None:
        if self.loss_scale is not None:
            # GradScaler creates its scale when it first scales. A rank without microbatches would step before that.
            self.loss_scale.scale(self.weights.masters[0].new_zeros(()))

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of the scaled loss to those that are there."""
        (loss if self.loss_scale is None else self.loss_scale.scale(loss)).backward()

    def step(self, world: World) -> dict[str, float]:
        """Sum gradients over ranks, unscale, clip, step.

        Where a gradient is not finite nothing is written. A loss scale above 1 is halved then, and the step skipped:
        optimizer and schedule stay as they were. Sums are the same on all ranks, and so is the verdict.

        Returns:
            "lr"; "grad_norm", before clipping, if the step was taken; with a loss scale "loss_scale", by which the
            gradients were scaled, and "skipped_step", 1 or 0.

        Raises:
            FloatingPointError: a gradient is not finite, and no scale is to blame.
        """
        self.weights.take_gradients()
        world.sum_gradients(self.weights.masters)  # in fp32, where the weights are held in less
        metrics = {"lr": self.optimizer.param_groups[0]["lr"]}
        if self.loss_scale is not None:
            metrics |= {"loss_scale": self.loss_scale.get_scale(), "skipped_step": 0.0}
            self.loss_scale.unscale_(self.optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(self.weights.masters, self.max_grad_norm).item()
        if not math.isfinite(grad_norm):
            if self.loss_scale is None or metrics["loss_scale"] == 1:
                raise FloatingPointError(
                    f"the gradient norm is {grad_norm}: the weights were left as they were; "
                    "lower optimizer.lr or look at the ratio curves"
                )
            self.loss_scale.update()
            self.optimizer.zero_grad(set_to_none=True)
            return metrics | {"skipped_step": 1.0}
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.scheduler is not None:
            self.scheduler.step()
        self.weights.write_back()
        if self.loss_scale is not None:
            self.loss_scale.update()
        return metrics | {"grad_norm": grad_norm}

    def state_dict(self) -> dict:
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler else None,
            "masters": self.weights.state_dict(),
            "loss_scale": self.loss_scale.state_dict() if self.loss_scale else None,
        }

    def load_state_dict(self, state: dict) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.weights.load_state_dict(state["masters"])
        if self.loss_scale is not None:
            self.loss_scale.load_state_dict(state["loss_scale"])


@dataclass(frozen=True, kw_only=True)
class PreparedMicrobatch:
    """A micro-batch with the log-probs that stay fixed while it is trained on.

    Attributes:
        old_logprobs: float32 [N], of the weights before the first update; None where there is one update only, whose
            old policy is the current one (the ratio is exactly 1 and no pass is spent on it), and in bypass mode, which
            has no old policy.
        reference_logprobs: float32 [N]; None where the loss has no KL term.
    """

    microbatch: Microbatch
    old_logprobs: Tensor | None
    reference_logprobs: Tensor | None


def prepare_microbatches(
    policy: Policy, microbatches: Iterable[Microbatch], *, temperature: float, with_old: bool, with_reference: bool
) -> list[PreparedMicrobatch]:
    prepared = []
    for microbatch in microbatches:
        old = None
        if with_old:
            with torch.no_grad():
                old = policy.logprobs(microbatch, temperature=temperature)[0]
        reference = policy.reference_logprobs(microbatch, temperature=temperature) if with_reference else None
        prepared.append(PreparedMicrobatch(microbatch=microbatch, old_logprobs=old, reference_logprobs=reference))
    return prepared


def update_policy(
    policy: Policy,
    microbatches: Sequence[PreparedMicrobatch],
    loss_fn: Loss,
    totals: LossTotals,
    optimization: Optimization,
    world: World,
    *,
    temperature: float,
    correction: Correction | None = None,
    limit: MismatchLimit | None = None,
    on_microbatch: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """One optimizer step on ``microbatches``.

    Args:
        policy: its ``version`` goes up by one, unless the step is skipped.
        microbatches: this rank's; may be empty where other ranks have some.
        loss_fn: called once a microbatch.
        totals: global denominators, the same on every rank.
        optimization: optimizer, schedule, clip norm and loss scale.
        world: gradients and metrics are summed over it.
        temperature: the one that was sampled with.
        correction: of sampler/trainer mismatch; None: the weights are 1.
        limit: on the mismatch, looked at before the step; None: it is measured alone.
        on_microbatch: called with (microbatches done, microbatches in all).

    Returns:
        Metrics averaged over the tokens of all ranks' microbatches (the loss is already normalised); identical on every
        rank. Empty, and no step is taken, if no rank has a microbatch. "mismatch/..." are those of
        :mod:`rolltune.mismatch`. With a correction, "correction/weight" is the mean weight and "correction/zeroed" the
        share of tokens with weight 0.

    Raises:
        MismatchError: ``limit`` is exceeded; the weights were left as they were.
    """
    sums: dict[str, float] = dict.fromkeys(_METRICS, 0.0)
    extremes = [-math.inf, -math.inf]  # max of ratio, of -ratio
    meter = MismatchMeter()
    for done, microbatch in enumerate(microbatches):
        logprobs, entropy = policy.logprobs(microbatch.microbatch, temperature=temperature)
        meter.add(logprobs if microbatch.old_logprobs is None else microbatch.old_logprobs, microbatch.microbatch)
        inputs = loss_inputs(logprobs, microbatch, correction)
        loss, metrics = loss_fn(inputs, totals)
        optimization.backward(loss)
        ratio = torch.exp(logprobs.detach() - inputs.old_logprobs)
        if inputs.importance_weights is not None:
            metrics["correction/weight"] = inputs.importance_weights.sum()
            metrics["correction/zeroed"] = (inputs.importance_weights == 0).sum()
        metrics |= {
            "loss": loss.detach(),
            "entropy": entropy.sum(),
            "ratio/mean": ratio.sum(),
            "ratio/outside": ((ratio < 0.9) | (ratio > 1.1)).sum(),
            "tokens": torch.tensor(float(len(logprobs))),
        }
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + float(value)
        seen = (ratio.max().item(), -ratio.min().item())
        extremes = [max(a, b) for a, b in zip(extremes, seen, strict=True)]
        if on_microbatch:
            on_microbatch(done + 1, len(microbatches))
    names = (
        world.gather(sums) if world.size > 1 else list(sums)
    )  # a rank without microbatches lacks the loss's own metrics
    names = sorted(set(names))
    reduced = dict(zip(names, world.sum([sums.get(name, 0.0) for name in names]), strict=True))
    extremes = world.max(extremes)
    tokens = reduced.pop("tokens")
    mismatch = meter.read(world)
    if mismatch is None:
        return {}  # no rank has anything to learn from
    if limit is not None:
        limit.check(mismatch)
    step_metrics = optimization.step(world)
    if not step_metrics.get("skipped_step"):
        policy.version += 1
    # The loss is divided by the step's totals already. The rest are means over the tokens in the microbatches, which
    # are fewer
    # than the totals where completions without an advantage were left out.
    means = {name: value / tokens for name, value in reduced.items() if name != "loss"}
    return (
        means
        | step_metrics
        | {
            "loss": reduced["loss"],
            "ratio/max": extremes[0],
            "ratio/min": -extremes[1],
        }
        | mismatch.metrics()
    )


def loss_inputs(logprobs: Tensor, microbatch: PreparedMicrobatch, correction: Correction | None) -> LossInputs:
    """What the loss is called with: the policy that the ratio is taken to, and the weights of a correction.

    Args:
        logprobs: [N], of the policy under training; carries the gradient.
        microbatch: its micro-batch and the log-probs that stay fixed.
        correction: None: no weights.
    """
    old = logprobs.detach() if microbatch.old_logprobs is None else microbatch.old_logprobs
    batch, weights = microbatch.microbatch, None
    if correction is not None:
        weights = correction(old, batch.sampler_logprobs, batch.target_sequence_index, batch.num_sequences)
    return LossInputs(
        logprobs=logprobs,
        old_logprobs=batch.sampler_logprobs if isinstance(correction, Bypass) else old,
        advantages=batch.advantages,
        sequence_index=batch.target_sequence_index,
        num_sequences=batch.num_sequences,
        reference_logprobs=microbatch.reference_logprobs,
        importance_weights=weights,
    )


_METRICS = ("loss", "entropy", "ratio/mean", "ratio/outside", "tokens")
