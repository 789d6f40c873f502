"""Build what the config names: data, rewards, sampler, optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rolltune.config.components import component_or_object, instantiate
from rolltune.config.schema import (
    Component,
    DataConfig,
    GRPOConfig,
    PromptConfig,
    SFTConfig,
)
from rolltune.data.dataset import ProblemStream, overlap
from rolltune.distributed import World
from rolltune.errors import ConfigError
from rolltune.loss_scale import LossScale
from rolltune.model.load import load_for_sampling
from rolltune.model.policy import Policy
from rolltune.prompts import render_prompt
from rolltune.rewards.checks.overoptimization import OveroptimizationMonitor
from rolltune.rewards.combine import WeightedReward
from rolltune.samplers import Sampler
from rolltune.samplers.native import NativeSampler
from rolltune.types import Problem, Prompt
from rolltune.update import MasterWeights, Optimization

SPENT = "spent"  # the folder of what judges have cost, over all processes and starts of a run


def load_data(data: DataConfig, *, max_heldout: int) -> tuple[Sequence[Problem], list[Problem]]:
    """Training problems, and the first ``max_heldout`` held-out ones, none of which may be trained on.

    Raises:
        ConfigError: a data set cannot be loaded, or a held-out question is among the training questions.
    """
    train, heldout = instantiate(data.train), instantiate(data.heldout)
    heldout = [heldout[i] for i in range(min(max_heldout, len(heldout)))]
    shared = overlap(train, heldout)
    if shared:
        raise ConfigError(
            [
                f"data.heldout: {len(shared)} of its {len(heldout)} questions are in data.train too, "
                f"first {next(iter(shared))!r}; choose another split, seed or slice"
            ]
        )
    return train, heldout


def build_reward(nodes: dict[str, Component]) -> WeightedReward:
    """The weighted sum of the configured rewards: functions, or classes whose objects are called.

    A node's ``weight`` defaults to 1.
    """

    return WeightedReward(
        rewards={
            name: (component_or_object(node, ignore=("weight",)), float(node.get("weight", 1.0)))
            for name, node in nodes.items()
        }
    )


@dataclass(frozen=True, kw_only=True)
class Rewards:
    """Everything that scores turns in a run.

    Attributes:
        training: what is trained on.
        heldout: ``correct`` and, where the config has it, ``lenient``, for :func:`rolltune.eval.heldout.score_heldout`.
        gold: the alarm for a hacked judge; None where the config has none.
        exits: what is closed behind the judges.
    """

    training: WeightedReward
    heldout: WeightedReward
    overoptimization: OveroptimizationMonitor | None
    exits: ExitStack = field(default_factory=ExitStack, repr=False, compare=False)

    def bind(self, sampler: Sampler, tokenizer: PreTrainedTokenizerBase, frozen: Callable[[], Sampler]) -> None:
        """Hand the policy to judges that are the policy; see :class:`rolltune.rewards.combine.JudgedReward`.

        ``frozen`` is called once at most, however many judges want the weights as they were. What it makes is closed
        with the judges; the policy's sampler is not.
        """
        owned = cache(lambda: self.exits.enter_context(closing(frozen())))
        for part in self._parts():
            part.bind(sampler, tokenizer, owned)

    @property
    def pool(self) -> Rewards:
        return self

    @property
    def stop_reason(self) -> str | None:
        return self.training.stop_reason

    def metrics(self) -> dict[str, float]:
        return self.training.metrics() | {f"heldout/{name}": cost for name, cost in self.heldout.metrics().items()}

    def close(self) -> None:
        with self.exits:
            for part in self._parts():
                part.close()

    def _parts(self) -> list[WeightedReward | OveroptimizationMonitor]:
        return [self.training, self.heldout, *([self.overoptimization] if self.overoptimization else [])]


def start_rewards(
    cfg: GRPOConfig, train: Sequence[Problem], heldout: Sequence[Problem], *, smoke_test: bool
) -> Rewards:
    """Build what scores turns; none of it is taken on trust.

    Args:
        cfg: names them.
        train: what the training reward will be asked for.
        heldout: what the others will be asked for.
        smoke_test: have a turn judged now, so that a judge that is not there shows before weights are loaded. From
            then on caps hold for the run: what was spent is kept in its folder.

    Raises:
        ValueError: a problem lacks what it would be judged by, or a judge does not answer.
    """
    training = build_reward(cfg.rewards)
    lenient = {} if cfg.eval.lenient is None else {"lenient": cfg.eval.lenient | {"weight": 0.0}}
    measured = build_reward({"correct": cfg.eval.correct} | lenient)
    gold = (
        None if cfg.eval.overoptimization is None else instantiate(cfg.eval.overoptimization).start(training, heldout)
    )
    rewards = Rewards(training=training, heldout=measured, overoptimization=gold)
    try:
        training.check(train)
        measured.check(heldout)
        if smoke_test:
            for name, judged in (("training", training), ("heldout", measured), ("gold", gold)):
                if judged is not None:
                    judged.share_budget(Path(cfg.output_dir) / SPENT / f"{name}.sqlite")
                    judged.smoke_test(train[0] if judged is training else heldout[0])
    except BaseException:
        rewards.close()
        raise
    return rewards


def start_sampler(
    cfg: GRPOConfig, policy: Policy, tokenizer: PreTrainedTokenizerBase, rewards: Rewards, world: World
) -> Sampler:
    """The policy's sampler, handed to the judges that are the policy as well."""
    sampler = instantiate(cfg.sampler, policy.model, tokenizer)
    try:
        rewards.bind(sampler, tokenizer, lambda: starting_sampler(cfg, tokenizer, world))
    except BaseException:
        sampler.close()
        raise
    return sampler


def starting_sampler(cfg: GRPOConfig, tokenizer: PreTrainedTokenizerBase, world: World) -> Sampler:
    """Samples from the weights that the run starts from, held frozen beside the policy; also in a resumed run.

    Beside a policy in vLLM it is the native sampler: a second engine would want a GPU of its own, and a server has the
    weights of one model at a time.
    """
    weights = cfg.model
    model = load_for_sampling(weights.path, dtype=weights.dtype, device=world.device, fp32_head=weights.fp32_head)
    if cfg.sampler["_component_"].startswith("rolltune.samplers.vllm."):
        sampler = NativeSampler(model, tokenizer)
    else:
        sampler = instantiate(cfg.sampler, model, tokenizer)
    sampler.sync(0)
    return sampler


def build_optimization(cfg: GRPOConfig | SFTConfig, policy: Policy, *, num_updates: int) -> Optimization:
    """Optimizer, schedule, clip norm and, for float16, loss scale over the policy's trainable parameters.

    Args:
        cfg: names the optimizer, the schedule and the loss scale.
        policy: on its device, in its precision.
        num_updates: optimizer steps of the whole run, for the schedule.
    """
    weights = MasterWeights(policy.trainable_parameters, enabled=cfg.model.master_weights)
    optimizer = instantiate(cfg.optimizer, weights.masters)
    scheduler = None
    if cfg.lr_scheduler:
        scheduler = instantiate(cfg.lr_scheduler, optimizer=optimizer, num_training_steps=num_updates)
    loss_scale = None
    if cfg.model.dtype == "float16":
        loss_scale = LossScale() if cfg.loss_scale is None else instantiate(cfg.loss_scale)
    return Optimization(
        weights=weights,
        optimizer=optimizer,
        scheduler=scheduler,
        max_grad_norm=cfg.max_grad_norm,
        loss_scale=loss_scale,
    )


def prompt_renderer(prompt: PromptConfig, tokenizer: PreTrainedTokenizerBase) -> Callable[[Problem], Prompt]:
    return partial(
        render_prompt, tokenizer=tokenizer, system=prompt.system, few_shot=prompt.few_shot, prefill=prompt.prefill
    )


def longest_prompt(stream: ProblemStream, render: Callable[[Problem], Prompt], *, most: int = 256) -> int:
    """Tokens of the longest of the first ``most`` training prompts, for checks before weights are loaded."""
    return max(len(render(problem).token_ids) for problem in stream.take(0, min(most, len(stream.dataset))))
