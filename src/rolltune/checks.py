"""What a config's values have to be, each and together, beyond their types. Nothing is loaded.

A check yields problems, each ``key: what is wrong; what would be right``. A setting that is understood but would do
nothing in this run is a problem too.
"""

from __future__ import annotations

import dataclasses
import math
import re
import string
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rolltune.components import ConfigError, check_component, instantiate, mismatch, show
from rolltune.schema import (
    AuditRewardsConfig,
    Component,
    DataConfig,
    GRPOConfig,
    LoggingConfig,
    LoRAConfig,
    ModelConfig,
    PrimeConfig,
    PromptConfig,
    SamplingConfig,
)

DEVICES = ("auto", "cpu", "cuda")


def check_config(cfg: Any, *, world_size: int = 1) -> list[str]:
    """All problems of a config of one of :mod:`rolltune.schema`'s recipes; of another schema's none are known.

    Args:
        cfg: an instance of the recipe's dataclass, its types already right.
        world_size: number of processes that the run has.
    """
    if isinstance(cfg, GRPOConfig):
        return list(_check_grpo(cfg, world_size))
    if isinstance(cfg, PrimeConfig):
        return list(_check_prime(cfg, world_size))
    if isinstance(cfg, AuditRewardsConfig):
        return list(_check_audit_rewards(cfg))
    return []


def _check_grpo(cfg: GRPOConfig, world_size: int) -> Iterator[str]:
    yield from _check_output_dir(cfg.output_dir)
    yield from _at_least("seed", cfg.seed, 0)
    yield from _check_device(cfg.device)
    yield from _check_weights(cfg.model, cfg.lora)
    yield from _check_data(cfg.data)
    yield from _check_prompt(cfg.prompt)
    yield from _check_rewards(cfg.rewards)
    if cfg.rewards and all(node.get("weight", 1.0) == 0 for node in cfg.rewards.values()):
        yield f"rewards: every weight is 0 ({', '.join(cfg.rewards)}); there is nothing to train on"
    yield from _check_answer_format(cfg.answer_format, cfg.prompt.prefill)
    yield from _check_sampling(cfg.sampling)
    yield from _check_context(cfg)
    yield from check_component(cfg.sampler, "sampler", positional=2)
    yield from _check_advantage(cfg.advantage)
    yield from _check_loss(cfg)
    updates = cfg.num_steps * cfg.batch.num_iterations * cfg.batch.minibatches
    yield from _check_optimization(cfg, updates)
    yield from _check_batch(cfg, world_size)
    yield from _check_eval(cfg)
    yield from _check_logging(cfg.logging)


def _check_prime(cfg: PrimeConfig, world_size: int) -> Iterator[str]:
    yield from _check_output_dir(cfg.output_dir)
    yield from _at_least("seed", cfg.seed, 0)
    yield from _check_device(cfg.device)
    yield from _check_weights(cfg.model, cfg.lora)
    yield from _check_data(cfg.data)
    yield from _check_prompt(cfg.prompt)
    yield from _check_answer_format(cfg.answer_format, cfg.prompt.prefill)
    yield from _check_optimization(cfg, cfg.num_steps)
    examples = cfg.batch.examples_per_step
    yield from _at_least("batch.examples_per_step", examples, 1)
    yield from _at_least("batch.microbatch_tokens", cfg.batch.microbatch_tokens, 1)
    if examples >= 1 and examples % world_size:
        yield f"batch.examples_per_step: {examples}; must be divisible by the number of processes, {world_size}"
    yield from _check_eval(cfg)
    yield from _check_logging(cfg.logging)


def _check_audit_rewards(cfg: AuditRewardsConfig) -> Iterator[str]:
    yield from _check_output_dir(cfg.output_dir)
    yield from _at_least("seed", cfg.seed, 0)
    yield from check_component(cfg.data, "data")
    yield from _check_rewards(cfg.rewards)
    yield from _check_answer_format(cfg.answer_format, "")
    if cfg.max_problems is not None:
        yield from _at_least("max_problems", cfg.max_problems, 1)


# --- model, device ----------------------------------------------------------------------------------------------------


def _check_output_dir(output_dir: str) -> Iterator[str]:
    if not output_dir:
        yield "output_dir: is empty; give a folder"
    elif Path(output_dir).exists() and not Path(output_dir).is_dir():
        yield f"output_dir: {output_dir} is a file; give a folder"


def _check_device(device: str) -> Iterator[str]:
    if device not in DEVICES:
        yield f"device: {show(device)}; one of {', '.join(DEVICES)} is wanted"
    elif device == "cuda" and not _has_cuda():
        yield "device: cuda; torch finds no CUDA device here (auto takes the CPU then)"


def _has_cuda() -> bool:
    import torch  # here, as with rolltune.models below: a config without a model is checked in a moment

    return torch.cuda.is_available()


def _check_weights(model: ModelConfig, lora: LoRAConfig | None) -> Iterator[str]:
    from rolltune.models import DTYPES, PACKAGED, resolve_model

    if model.path != PACKAGED:
        try:
            resolve_model(model.path)
        except ValueError as error:
            yield str(error)
    if model.dtype not in DTYPES:
        yield f"model.dtype: {show(model.dtype)}; one of {', '.join(DTYPES)} is wanted"
    if model.master_weights and model.dtype == "float32":
        yield "model.master_weights: true; does nothing with model.dtype float32, whose weights are fp32 already"
    if lora is None:
        return
    if model.master_weights:
        yield "model.master_weights: true; does nothing with lora, whose trained weights are fp32 already"
    yield from _at_least("lora.rank", lora.rank, 1)
    yield from _above("lora.alpha", lora.alpha, 0)
    if not 0 <= lora.dropout < 1:
        yield f"lora.dropout: {lora.dropout}; must be in [0, 1)"
    if not all(name.strip() for name in lora.target_modules.split(",")):
        yield f"lora.target_modules: {lora.target_modules!r}; all-linear, or module names with commas between"


# --- data, prompts, rewards -------------------------------------------------------------------------------------------


def _check_data(data: DataConfig) -> Iterator[str]:
    yield from check_component(data.train, "data.train")
    yield from check_component(data.heldout, "data.heldout")
    if data.train == data.heldout:
        yield "data.heldout: the same as data.train; held-out problems would be trained on: give another split or slice"


def _check_prompt(prompt: PromptConfig) -> Iterator[str]:
    if prompt.chat_template is not None and not Path(prompt.chat_template).is_file():
        yield f"prompt.chat_template: {prompt.chat_template}: no such file; give a Jinja file"


def _check_rewards(rewards: dict[str, Component]) -> Iterator[str]:
    if not rewards:
        yield "rewards: none; name at least one reward"
    for name, node in rewards.items():
        key = f"rewards.{name}"
        if not re.fullmatch(r"[\w-]+", name):
            yield f"{key}: a reward's name heads its curves; letters, digits, - and _ are wanted"
        yield from check_component(node, key, positional=2, reserved=("completion",), ignore=("weight",))
        weight = node.get("weight", 1.0)
        wrong = mismatch(weight, float)
        if wrong or not math.isfinite(weight):
            yield f"{key}.weight: {wrong or f'{weight}; a finite number is wanted'}"


def _check_answer_format(answer_format: str, prefill: str) -> Iterator[str]:
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(answer_format) if name is not None]
    except ValueError as error:
        yield f"answer_format: {answer_format!r}: {error}; a literal brace is doubled: {{{{ }}}}"
        return
    unknown = [name for name in fields if name not in ("solution", "answer")]
    if unknown:
        yield f"answer_format: has {{{unknown[0]}}}; {{solution}} and {{answer}} are filled in; double other braces"
    elif "answer" not in fields:
        yield f"answer_format: {answer_format!r} has no {{answer}}"
    elif not answer_format.startswith(prefill):
        yield f"answer_format: {answer_format!r} does not start with prompt.prefill, {prefill!r}, as a turn does"


# --- sampling and loss ------------------------------------------------------------------------------------------------


def _check_sampling(sampling: SamplingConfig) -> Iterator[str]:
    if sampling.group_size < 2:
        yield f"sampling.group_size: {sampling.group_size}; a group of one has no baseline: must be >= 2"
    yield from _above("sampling.temperature", sampling.temperature, 0)
    yield from _at_least("sampling.max_new_tokens", sampling.max_new_tokens, 1)
    if not 0 < sampling.top_p <= 1:
        yield f"sampling.top_p: {sampling.top_p}; must be in (0, 1]"
    elif sampling.top_p != 1:
        yield f"sampling.top_p: {sampling.top_p}; {_FULL_SUPPORT.format('1')}"
    if sampling.top_k < 0:
        yield f"sampling.top_k: {sampling.top_k}; must be >= 0"
    elif sampling.top_k != 0:
        yield f"sampling.top_k: {sampling.top_k}; {_FULL_SUPPORT.format('0')}"
    if "" in sampling.stop:
        yield "sampling.stop: holds an empty string, which would stop every completion at once"


def _check_context(cfg: GRPOConfig) -> Iterator[str]:
    """A model on disk is asked; one on the Hub is asked by the dry run, which knows the length of the prompts too."""
    from rolltune.models import load_config

    if not (Path(cfg.model.path) / "config.json").exists():
        return
    try:
        context = getattr(load_config(cfg.model.path).get_text_config(), "max_position_embeddings", None)
    except ValueError as error:
        yield str(error)
        return
    if context is not None and cfg.sampling.max_new_tokens >= context:
        yield (
            f"sampling.max_new_tokens: {cfg.sampling.max_new_tokens}; must leave room for a prompt in the context of "
            f"model.path, {context} tokens"
        )


_FULL_SUPPORT = (
    "must be {} for training: the trainer's log-probs are of the full softmax, with a truncated support the ratio "
    "would be biased"
)


def _check_advantage(node: Component) -> Iterator[str]:
    problems = check_component(node, "advantage", positional=1)
    yield from problems or _call_problems(node, "advantage", [0.0, 1.0])


def _call_problems(node: Component, key: str, *args: Any) -> list[str]:
    """What a component that is cheap to call says of its arguments' values."""
    try:
        instantiate(node, *args)
    except ConfigError as error:
        return [f"{key}.{error.problems[0].removeprefix(node['_component_']).removeprefix(': ')}"]
    return []


def _check_loss(cfg: GRPOConfig) -> Iterator[str]:
    problems = check_component(cfg.loss, "loss") or _call_problems(cfg.loss, "loss")
    yield from problems
    if problems:
        return
    loss = instantiate(cfg.loss)
    if not callable(loss) or not hasattr(loss, "kl_coef"):
        yield f"loss._component_: {cfg.loss['_component_']}: no loss; a rolltune.types.Loss is called and has kl_coef"
    one_update = cfg.batch.num_iterations == cfg.batch.minibatches == 1
    if cfg.loss["_component_"].endswith(".ReinforceLoss") and not one_update:
        yield (
            "loss._component_: ReinforceLoss has no ratio, so only the first update of a step would be on-policy; "
            "batch.num_iterations and batch.minibatches must be 1, or take a loss with a ratio"
        )


# --- optimization and batches -----------------------------------------------------------------------------------------


def _check_optimization(cfg: GRPOConfig | PrimeConfig, num_updates: int) -> Iterator[str]:
    yield from _at_least("num_steps", cfg.num_steps, 1)
    yield from _above("max_grad_norm", cfg.max_grad_norm, 0)
    yield from check_component(cfg.optimizer, "optimizer", positional=1)
    lr = cfg.optimizer.get("lr")
    if isinstance(lr, int | float):
        yield from _above("optimizer.lr", lr, 0)
    if cfg.lr_scheduler is None:
        return
    yield from check_component(cfg.lr_scheduler, "lr_scheduler", positional=1, passed=("num_training_steps",))
    warmup = cfg.lr_scheduler.get("num_warmup_steps")
    if isinstance(warmup, int):
        yield from _at_least("lr_scheduler.num_warmup_steps", warmup, 0)
        if warmup > num_updates >= 1:
            yield (
                f"lr_scheduler.num_warmup_steps: {warmup}; the run has {num_updates} optimizer steps in all (num_steps"
                f"{' x batch.num_iterations x batch.minibatches' if isinstance(cfg, GRPOConfig) else ''})"
            )


def _check_batch(cfg: GRPOConfig, world_size: int) -> Iterator[str]:
    batch = cfg.batch
    counts = {name: getattr(batch, name) for name in ("prompts_per_step", "num_iterations", "minibatches")}
    for name, count in counts.items():
        yield from _at_least(f"batch.{name}", count, 1)
    yield from _at_least("batch.dynamic_sampling_rounds", batch.dynamic_sampling_rounds, 0)
    if batch.microbatch_tokens <= cfg.sampling.max_new_tokens:
        yield (
            f"batch.microbatch_tokens: {batch.microbatch_tokens}; a prompt and a completion of "
            f"sampling.max_new_tokens ({cfg.sampling.max_new_tokens}) tokens have to fit in"
        )
    if min(counts.values()) >= 1 and batch.prompts_per_step % (batch.minibatches * world_size):
        processes = f" x {world_size} processes" if world_size > 1 else ""
        yield (
            f"batch.prompts_per_step: {batch.prompts_per_step}; must be divisible by batch.minibatches "
            f"({batch.minibatches}){processes}: a mini-batch is of whole groups"
        )


def _check_eval(cfg: GRPOConfig | PrimeConfig) -> Iterator[str]:
    yield from _at_least("eval.every_n_steps", cfg.eval.every_n_steps, 1)
    yield from _at_least("eval.max_problems", cfg.eval.max_problems, 1)
    if cfg.eval.max_new_tokens is not None:
        yield from _at_least("eval.max_new_tokens", cfg.eval.max_new_tokens, 1)
    yield from _at_least("checkpoint.every_n_steps", cfg.checkpoint.every_n_steps, 1)
    yield from _at_least("checkpoint.keep_last", cfg.checkpoint.keep_last, 1)


def _check_logging(logging: LoggingConfig) -> Iterator[str]:
    yield from _at_least("logging.samples_every_n_steps", logging.samples_every_n_steps, 1)
    default = next(field.default for field in dataclasses.fields(logging) if field.name == "wandb_project")
    if logging.wandb_project != default and not logging.wandb:
        yield f"logging.wandb_project: {logging.wandb_project}; does nothing while logging.wandb is false"


def _at_least(key: str, value: int, lowest: int) -> Iterable[str]:
    return [] if value >= lowest else [f"{key}: {value}; must be >= {lowest}"]


def _above(key: str, value: float, bound: float) -> Iterable[str]:
    return [] if value > bound else [f"{key}: {value}; must be > {bound}"]
