"""Build what the config names: data, rewards, sampler, optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.nn import Parameter
from transformers import PreTrainedTokenizerBase

from rolltune.config.components import component_or_object, instantiate
from rolltune.config.schema import (
    Component,
    DataConfig,
    GRPOConfig,
    PromptConfig,
    SFTConfig,
)
from rolltune.data.dataset import overlap
from rolltune.distributed import World
from rolltune.errors import ConfigError
from rolltune.loss_scale import LossScale
from rolltune.model.load import DTYPES, load_for_sampling
from rolltune.model.parallel import make_mesh
from rolltune.model.policy import Policy
from rolltune.prompts import PromptRenderer
from rolltune.rewards.checks.overoptimization import OveroptimizationMonitor
from rolltune.rewards.combine import WeightedReward
from rolltune.rewards.judges.pool import JudgePool
from rolltune.run import notices
from rolltune.samplers import Sampler
from rolltune.samplers.native import NativeSampler
from rolltune.types import Problem
from rolltune.update import MasterWeights, Optimization

BUDGETS = "budgets"  # folder of a run that counts its judges' calls and tokens over all processes and restarts


def load_data(data: DataConfig, *, max_heldout: int) -> tuple[Sequence[Problem], list[Problem]]:
    """Load the training problems, and the first ``max_heldout`` held-out ones.

    Raises:
        ConfigError: a data set cannot be loaded or is empty, or a held-out question is also a training question.
    """
    train, heldout = instantiate(data.train), instantiate(data.heldout)
    for key, problems in (("data.train", train), ("data.heldout", heldout)):
        if not len(problems):
            raise ConfigError([f"{key}: has no problems; give at least one"])
    heldout = [heldout[i] for i in range(min(max_heldout, len(heldout)))]
    shared = overlap(train, heldout)
    if shared:
        raise ConfigError(
            [
                f"data.heldout: {len(shared)} of its {len(heldout)} questions are also in data.train, "
                f"first {next(iter(shared))!r}; choose another split, seed or slice"
            ]
        )
    return train, heldout


def build_reward(nodes: dict[str, Component]) -> WeightedReward:
    """Build the weighted sum of the configured rewards. A node's ``weight`` defaults to 1."""
    return WeightedReward(
        rewards={
            name: (component_or_object(node, ignore=("weight",)), float(node.get("weight", 1.0)))
            for name, node in nodes.items()
        }
    )


@dataclass(frozen=True, kw_only=True)
class Rewards:
    """Everything that scores responses in a run.

    Attributes:
        training: the reward that is trained on.
        heldout: ``correct`` and, if configured, ``lenient``, for :func:`rolltune.eval.heldout.score_heldout`.
        overoptimization: compares the training reward with an independent measure; None if not configured.
        pool: all judges of the three.
    """

    training: WeightedReward
    heldout: WeightedReward
    overoptimization: OveroptimizationMonitor | None
    pool: JudgePool


def start_rewards(
    cfg: GRPOConfig, train: Sequence[Problem], heldout: Sequence[Problem], *, smoke_test: bool
) -> Rewards:
    """Build everything that scores responses, and check that it can score these problems.

    Args:
        cfg: the run's config.
        train: problems that the training reward will score.
        heldout: problems that the other measures will score.
        smoke_test: ask every judge once, so that a missing server shows before weights are loaded. Caps then hold for
            the whole run, whose output folder counts calls and tokens.

    Raises:
        ValueError: a problem lacks what it is judged by, or a judge does not answer.
    """
    pool = JudgePool()
    try:
        training = build_reward(cfg.rewards)
        training.join(pool, "rewards", train)
        lenient = {} if cfg.eval.lenient is None else {"lenient": cfg.eval.lenient | {"weight": 0.0}}
        measured = build_reward({"correct": cfg.eval.correct} | lenient)
        measured.join(pool, "eval", heldout)
        check = cfg.eval.overoptimization
        monitor = None if check is None else instantiate(check).start(training, heldout, pool)
        if smoke_test:
            pool.keep_budgets(Path(cfg.output_dir) / BUDGETS)
            pool.smoke_test()
    except BaseException:
        pool.close()
        raise
    return Rewards(training=training, heldout=measured, overoptimization=monitor, pool=pool)


def start_sampler(
    cfg: GRPOConfig, policy: Policy, tokenizer: PreTrainedTokenizerBase, rewards: Rewards, world: World
) -> Sampler:
    """Build the policy's sampler, and give it to the judges that are the policy."""
    with policy.gathered():  # some samplers try the model out
        sampler = instantiate(cfg.sampler, policy.model, tokenizer)
    notices.show(getattr(sampler, "notes", ()), is_main=world.is_main)  # a sampler need not have any
    try:
        rewards.pool.bind(sampler, tokenizer, lambda: starting_sampler(cfg, tokenizer, world))
    except BaseException:
        sampler.close()
        raise
    return sampler


def starting_sampler(cfg: GRPOConfig, tokenizer: PreTrainedTokenizerBase, world: World) -> Sampler:
    """Build a sampler of the run's starting weights, which stay frozen beside the policy, also in a resumed run.

    For a policy in vLLM it is the native sampler: a second engine would need a GPU of its own, and a server has the
    weights of one model at a time.
    """
    weights = cfg.model
    model = load_for_sampling(
        weights.path,
        dtype=weights.dtype,
        device=world.device,
        quantization=weights.quantization,
        fp32_head=weights.fp32_head,
    )
    if cfg.sampler["_component_"].startswith("rolltune.samplers.vllm."):
        sampler = NativeSampler(model, tokenizer)
    else:
        sampler = instantiate(cfg.sampler, model, tokenizer)
    sampler.sync(0)
    return sampler


def distribute(cfg: GRPOConfig | SFTConfig, policy: Policy, world: World) -> None:
    """Distribute the policy's weights over the ranks as ``cfg.parallel`` says; all ranks call this.

    Call it before the optimizer is built, which steps the slices that a rank keeps.

    Raises:
        ConfigError: the model cannot be sharded.
    """
    if cfg.parallel.weights == "fsdp":
        policy.shard(
            make_mesh(world.device, cfg.parallel.shard),
            compute_dtype=DTYPES[cfg.model.dtype] if cfg.model.master_weights else None,
            cpu_offload=cfg.parallel.cpu_offload,
        )


def build_optimization(cfg: GRPOConfig | SFTConfig, policy: Policy, *, num_updates: int) -> Optimization:
    """Build optimizer, schedule, clip norm and, for float16, loss scale for the policy's trainable parameters.

    Args:
        cfg: names optimizer, schedule and loss scale.
        policy: on its device, in its precision.
        num_updates: optimizer steps of the whole run, for the schedule.
    """
    weights = MasterWeights(policy.trainable_parameters, enabled=cfg.model.master_weights)
    optimizer = instantiate(cfg.optimizer, parameter_groups(weights.masters))
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


def parameter_groups(parameters: Sequence[Parameter]) -> list[dict[str, Any]]:
    """Split parameters into those that the optimizer's weight decay acts on, and norms and biases, which it spares.

    Decay shrinks a matrix, whose scale the next norm undoes. The scale of a norm is undone by nothing (Hugging Face's
    Trainer exempts the same).
    """
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2]},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def prompt_renderer(prompt: PromptConfig, tokenizer: PreTrainedTokenizerBase) -> PromptRenderer:
    return PromptRenderer(
        tokenizer,
        system=prompt.system,
        few_shot=prompt.few_shot,
        prefill=prompt.prefill,
        chat_template_kwargs=prompt.chat_template_kwargs,
    )
