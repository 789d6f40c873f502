"""One optimizer step: microbatches, backward, clip, step. Every average is a sum until the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from rolltune.corrections import Correction
from rolltune.distributed import World
from rolltune.loss_scale import LossScale
from rolltune.mismatch import MismatchLimit, MismatchMeter, TokenGaps
from rolltune.model import parallel
from rolltune.model.policy import Policy
from rolltune.types import Loss, LossInputs, LossTotals, RolloutMicrobatch


class MasterWeights:
    """fp32 copies of parameters held in bf16 or fp16, for the optimizer to step.

    bf16 has 8 bits of mantissa: an update below 1/256 of a weight is rounded away (1/2048 in fp16). The copies keep it.
    They also take each microbatch's gradient as soon as it is computed, so that gradients add up in fp32. If not
    ``enabled``, the optimizer steps the parameters themselves. So it does if they are slices of float32 weights, which
    FSDP computes with in less; these are saved as master weights.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], *, enabled: bool):
        self.parameters = list(parameters)
        self.enabled = enabled
        self.masters = self.parameters
        if enabled and not parallel.is_sharded(self.parameters):
            self.masters = [torch.nn.Parameter(p.detach().float().clone()) for p in self.parameters]
            for master, parameter in zip(self.masters, self.parameters, strict=True):
                parameter.register_post_accumulate_grad_hook(partial(_move_gradient, master))

    @torch.no_grad()
    def write_back(self) -> None:
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            if master is not parameter:
                parameter.copy_(master)

    def state_dict(self) -> list[Tensor]:
        return [master.detach() for master in self.masters] if self.enabled else []

    @torch.no_grad()
    def load_state_dict(self, state: list[Tensor]) -> None:
        for master, saved in zip(self.masters if self.enabled else [], state, strict=True):
            master.copy_(parallel.slice_like(saved, master))


def _move_gradient(master: Tensor, parameter: Tensor) -> None:
    assert parameter.grad is not None
    if master.grad is None:
        master.grad = parameter.grad.float()
    else:
        master.grad += parameter.grad
    parameter.grad = None


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """The optimizer over the master weights, its schedule, the clip norm, and the loss scale of float16."""

    weights: MasterWeights
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler | None
    max_grad_norm: float
    loss_scale: LossScale | None = None

    def __post_init__(self) -> None:
        if self.loss_scale is not None:
            # GradScaler creates its scale when it first scales. A rank without microbatches would step before that.
            self.loss_scale.scale(self.weights.masters[0].new_zeros(()))

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return self.optimizer.param_groups[0]["lr"]

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of the scaled loss."""
        (loss if self.loss_scale is None else self.loss_scale.scale(loss)).backward()

    def step(self, world: World) -> dict[str, float]:
        """Sum gradients over ranks, unscale, clip, step.

        The step is skipped, and weights, optimizer and schedule stay as they were, if there is nothing to learn from,
        that is if all gradients are 0: weight decay and momentum would move the weights all the same. It is also
        skipped if a gradient is not finite and there is a loss scale above 1, which is halved. All ranks have the same
        sums, so all decide alike.

        Returns:
            "lr"; "skipped_step", 1 or 0; "grad_norm", before clipping, if it is finite; with a loss scale also
            "loss_scale", the factor that the gradients were scaled by.

        Raises:
            FloatingPointError: a gradient is not finite, and the loss scale is not the reason.
        """
        world.sum_gradients(self.weights.masters)  # in fp32, even if the weights are held in less
        metrics = {"lr": self.lr, "skipped_step": 0.0}
        if self.loss_scale is not None:
            metrics["loss_scale"] = self.loss_scale.get_scale()
            self.loss_scale.unscale_(self.optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(self.weights.masters, self.max_grad_norm)
        grad_norm = parallel.whole(grad_norm).item()
        if not math.isfinite(grad_norm):
            if self.loss_scale is None or metrics["loss_scale"] == 1:
                raise FloatingPointError(
                    f"the gradient norm is {grad_norm}; the weights were left as they were: lower optimizer.lr, or "
                    "look for the cause in the ratio curves"
                )
            self.loss_scale.update()
            if self.loss_scale.get_scale() == metrics["loss_scale"]:  # every element is finite, but not their norm
                self.loss_scale.update(metrics["loss_scale"] / 2)
            self.optimizer.zero_grad(set_to_none=True)
            return metrics | {"skipped_step": 1.0}
        if grad_norm > 0:
            self.optimizer.step()
            if self.scheduler is not None:
                self.scheduler.step()
            self.weights.write_back()
        self.optimizer.zero_grad(set_to_none=True)
        if self.loss_scale is not None:
            self.loss_scale.update()
        return metrics | {"grad_norm": grad_norm, "skipped_step": float(grad_norm == 0)}

    def state_dict(self) -> dict:
        """Return the state with whole tensors; if the weights are sharded, on rank 0 only. All ranks call this."""
        state = {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler else None,
            "masters": self.weights.state_dict(),
            "loss_scale": self.loss_scale.state_dict() if self.loss_scale else None,
        }
        return parallel.collect(state)

    def load_state_dict(self, state: dict) -> None:
        """Load a state that was saved with any number of processes, sharded or not."""
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        moments = {
            number: {
                name: parallel.slice_like(value, parameters[number]) if isinstance(value, Tensor) else value
                for name, value in of_parameter.items()
            }
            for number, of_parameter in state["optimizer"]["state"].items()
        }
        self.optimizer.load_state_dict(state["optimizer"] | {"state": moments})
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.weights.load_state_dict(state["masters"])
        if self.loss_scale is not None:
            self.loss_scale.load_state_dict(state["loss_scale"])


# The policy that the ratio of the loss is taken to, where pi_old stands in the papers:
#   "current": the policy itself, before its only update of the step. The ratio is exactly 1 and costs no pass. Not
#       with dropout, with which the policy under training is not the one that sampled.
#   "trainer": the trainer's log-probs before the first of several updates.
#   "sampler": the sampler's log-probs (verl's bypass mode). Costs no pass; the loss's clipping bounds the mismatch.
OldPolicy = Literal["current", "trainer", "sampler"]


@dataclass(frozen=True, kw_only=True)
class PreparedMicrobatch:
    """A microbatch with the log-probs that stay fixed while it is trained on.

    Attributes:
        microbatch: N trained tokens.
        old_policy: the policy that the ratio is taken to.
        trainer_logprobs: float32 [N], by the weights that were sampled with, without dropout; None where the log-probs
            of the first update are the same.
        reference_logprobs: float32 [N]; None where the loss has no KL term.
    """

    microbatch: RolloutMicrobatch
    old_policy: OldPolicy
    trainer_logprobs: Tensor | None
    reference_logprobs: Tensor | None


def prepare_microbatches(
    policy: Policy,
    microbatches: Iterable[RolloutMicrobatch],
    *,
    temperature: float,
    old_policy: OldPolicy,
    with_reference: bool,
) -> list[PreparedMicrobatch]:
    """Compute the log-probs that stay fixed during the updates of a step.

    Args:
        policy: before the first update.
        microbatches: the microbatches of this rank.
        temperature: the sampling temperature.
        old_policy: the policy that the ratio will be taken to.
        with_reference: whether the loss has a KL term.
    """
    microbatches = list(microbatches)
    idle = policy.idle_microbatches("prepare", len(microbatches))
    prepared = []
    for microbatch in [*microbatches, *idle]:
        trainer = None
        if old_policy == "trainer" or policy.has_dropout:
            with torch.no_grad():
                trainer = policy.logprobs(microbatch, temperature=temperature)[0]
        reference = policy.reference_logprobs(microbatch, temperature=temperature) if with_reference else None
        prepared.append(
            PreparedMicrobatch(
                microbatch=microbatch, old_policy=old_policy, trainer_logprobs=trainer, reference_logprobs=reference
            )
        )
    return prepared[: len(microbatches)]


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
    gaps: TokenGaps | None = None,
    on_microbatch: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Take one optimizer step.

    Args:
        policy: its ``version`` goes up by one, unless the step is skipped.
        microbatches: the microbatches of this rank; may be empty where other ranks have some.
        loss_fn: called once per microbatch.
        totals: global denominators, the same on every rank.
        optimization: optimizer, schedule, clip norm and loss scale.
        world: gradients and metrics are summed over it.
        temperature: the sampling temperature.
        correction: importance weights for the sampler/trainer mismatch; None: the weights are 1.
        limit: limit on the mismatch, checked before the step; None: the mismatch is reported but never stops the run.
        gaps: notes the mismatch of each token.
        on_microbatch: called with (microbatches done, all microbatches).

    Returns:
        Metrics averaged over the tokens of all ranks' microbatches (the loss is already normalised); identical on every
        rank. Only "lr" and "skipped_step" if no rank has a microbatch. "mismatch/..." are those of
        :mod:`rolltune.mismatch`. With a correction, "correction/weight" is the mean weight and "correction/zeroed" the
        share of tokens with weight 0. "router/aux_loss" is the routers' load-balancing loss, where it is trained with.

    Raises:
        MismatchError: the mismatch exceeds ``limit``; the weights were left as they were.
    """
    meter, mismatch_meter = _Meter(), MismatchMeter()
    idle = policy.idle_microbatches("train", len(microbatches))
    with policy.with_dropout():
        for done, prepared in enumerate(microbatches, start=1):
            logprobs, entropy, router_loss = policy.trained_logprobs(prepared.microbatch, temperature=temperature)
            trainer = logprobs.detach() if prepared.trainer_logprobs is None else prepared.trainer_logprobs
            mismatch_meter.add(trainer, prepared.microbatch)
            if gaps is not None:
                gaps.add(trainer, prepared.microbatch)
            inputs = loss_inputs(logprobs, trainer, prepared, correction)
            loss, loss_metrics = loss_fn(inputs, totals)
            if router_loss is None:
                optimization.backward(loss)
            else:
                tokens = len(logprobs)
                optimization.backward(loss + policy.router_aux_loss * router_loss * (tokens / totals.tokens))
                loss_metrics = loss_metrics | {"router/aux_loss": router_loss.detach() * tokens}
            meter.add(loss, entropy, inputs, loss_metrics)
            if on_microbatch:
                on_microbatch(done, len(microbatches))
        policy.idle_backward(idle)
    metrics = meter.read(world)
    mismatch = mismatch_meter.read(world)
    if mismatch is None:
        return {"lr": optimization.lr, "skipped_step": 1.0}  # no rank has anything to learn from
    if limit is not None:
        limit.check(mismatch)
    step_metrics = optimization.step(world)
    policy.version += not step_metrics["skipped_step"]
    return metrics | step_metrics | mismatch.metrics()


def loss_inputs(
    logprobs: Tensor, trainer_logprobs: Tensor, prepared: PreparedMicrobatch, correction: Correction | None
) -> LossInputs:
    """Assemble the inputs of the loss: the old policy's log-probs, and the weights of a correction.

    Args:
        logprobs: [N], of the policy under training; carries the gradient.
        trainer_logprobs: [N], of the trainer where the sampler's are compared with it.
        prepared: the microbatch and the log-probs that stay fixed.
        correction: None: no weights.
    """
    batch, weights = prepared.microbatch, None
    if correction is not None:
        weights = correction(trainer_logprobs, batch.sampler_logprobs, batch.target_sequence_index, batch.num_sequences)
    return LossInputs(
        logprobs=logprobs,
        old_logprobs=batch.sampler_logprobs if prepared.old_policy == "sampler" else trainer_logprobs,
        advantages=batch.advantages,
        sequence_index=batch.target_sequence_index,
        num_sequences=batch.num_sequences,
        reference_logprobs=prepared.reference_logprobs,
        importance_weights=weights,
    )


class _Meter:
    """Sums of a step's metrics over microbatches, then over ranks; nothing is averaged before the end."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = dict.fromkeys(("loss", "entropy", "ratio/mean", "ratio/outside", "tokens"), 0.0)
        self._extremes = [-math.inf, -math.inf]  # max of ratio, of -ratio

    def add(self, loss: Tensor, entropy: Tensor, inputs: LossInputs, loss_metrics: dict[str, Tensor]) -> None:
        ratio = torch.exp(inputs.logprobs.detach() - inputs.old_logprobs)
        metrics = loss_metrics | {
            "loss": loss.detach(),
            "entropy": entropy.sum(),
            "ratio/mean": ratio.sum(),
            "ratio/outside": ((ratio < 0.9) | (ratio > 1.1)).sum(),
            "tokens": torch.tensor(float(len(ratio))),
        }
        if inputs.importance_weights is not None:
            metrics["correction/weight"] = inputs.importance_weights.sum()
            metrics["correction/zeroed"] = (inputs.importance_weights == 0).sum()
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value)
        seen = (ratio.max().item(), -ratio.min().item())
        self._extremes = [max(a, b) for a, b in zip(self._extremes, seen, strict=True)]

    def read(self, world: World) -> dict[str, float]:
        """Return the metrics over all ranks; all ranks call this. Empty where none has counted a token."""
        # A rank without microbatches lacks the loss's own metrics.
        names = sorted(set(world.gather(self._sums) if world.size > 1 else self._sums))
        sums = dict(zip(names, world.sum([self._sums.get(name, 0.0) for name in names]), strict=True))
        largest, smallest = world.max(self._extremes)
        loss, tokens = sums.pop("loss"), sums.pop("tokens")
        if tokens == 0:
            return {}
        # The loss is divided by the step's totals already. The rest are means over the tokens in the microbatches,
        # which are fewer than the totals if completions without an advantage were left out.
        means = {name: value / tokens for name, value in sums.items()}
        return means | {"loss": loss, "ratio/max": largest, "ratio/min": -smallest}
