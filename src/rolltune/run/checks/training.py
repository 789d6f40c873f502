"""Checks that grpo and sft share."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rolltune.config.components import check_component, is_node
from rolltune.config.schema import (
    Component,
    DataConfig,
    GRPOConfig,
    HeldoutConfig,
    LoggingConfig,
    LoRAConfig,
    ModelConfig,
    SFTConfig,
)
from rolltune.run.checks.common import (
    above,
    at_least,
    build_instance,
    check_device,
    check_model_path,
    check_output_dir,
    check_prompt,
)

# An update is lost if it is less than half of the distance to the next number of the dtype.
SMALLEST_UPDATE = {"bfloat16": "1/256", "float16": "1/2048"}

NOT_ELEMENTWISE = ("Adafactor", "Muon")  # optimizers of torch whose update of a slice is not a slice of the update


def check_training(cfg: GRPOConfig | SFTConfig, world_size: int, *, num_updates: int) -> Iterator[str]:
    """Check the keys that both recipes have.

    Args:
        cfg: the config.
        world_size: number of processes.
        num_updates: optimizer steps of the whole run.
    """
    yield from check_output_dir(cfg.output_dir)
    yield from at_least("seed", cfg.seed, 0)
    yield from check_device(cfg.device)
    yield from _check_weights(cfg.model, cfg.lora)
    yield from _check_parallel(cfg, world_size)
    yield from _check_data(cfg.data)
    yield from check_prompt(cfg.prompt)
    yield from at_least("num_steps", cfg.num_steps, 1)
    yield from above("max_grad_norm", cfg.max_grad_norm, 0)
    if cfg.loss_scale is not None:
        yield from _check_loss_scale(cfg.loss_scale, cfg.model.dtype)
    problems = list(_check_optimizer(cfg.optimizer))
    yield from problems
    if cfg.lr_scheduler is not None and not problems:
        factors = " x batch.num_iterations x batch.minibatches" if isinstance(cfg, GRPOConfig) else ""
        yield from _check_lr_scheduler(cfg.lr_scheduler, cfg.optimizer, num_updates, f"num_steps{factors}")
    yield from _check_heldout(cfg.eval)
    yield from at_least("stall_seconds", cfg.stall_seconds, 0)
    yield from above("grace_seconds", cfg.grace_seconds, 0)
    yield from at_least("checkpoint.every_n_steps", cfg.checkpoint.every_n_steps, 1)
    yield from at_least("checkpoint.keep_last", cfg.checkpoint.keep_last, 1)
    yield from _check_logging(cfg.logging)


def _check_weights(model: ModelConfig, lora: LoRAConfig | None) -> Iterator[str]:
    yield from check_model_path(model.path, "model.path")
    if model.master_weights and model.dtype == "float32":
        yield "model.master_weights: true; has no effect with model.dtype float32, whose weights are float32 already"
    if model.fp32_head and model.dtype == "float32":
        yield "model.fp32_head: true; has no effect with model.dtype float32, whose logits are float32 already"
    if lora is None:
        if model.quantization is not None:
            yield f"model.quantization: {model.quantization}; weights in 4 bits cannot be trained; add a lora section"
        if model.dtype in SMALLEST_UPDATE and not model.master_weights:
            yield (
                f"model.master_weights: false; must be true with model.dtype {model.dtype}, which would round away an "
                f"update below {SMALLEST_UPDATE[model.dtype]} of a weight"
            )
        return
    if model.master_weights:
        yield "model.master_weights: true; has no effect with lora, whose trained weights are float32 already"
    yield from at_least("lora.rank", lora.rank, 1)
    yield from above("lora.alpha", lora.alpha, 0)
    if not 0 <= lora.dropout < 1:
        yield f"lora.dropout: {lora.dropout}; must be in [0, 1)"
    if lora.dora and lora.experts:
        yield "lora.dora: true; must be false with lora.experts: true, whose adapters have no norms"
    if lora.dora and model.batch_invariant:
        yield "lora.dora: true; must be false with model.batch_invariant: true"
    if not all(name.strip() for name in lora.target_modules.split(",")):
        yield f"lora.target_modules: {lora.target_modules!r}; must be all-linear, or module names separated by commas"


def _check_parallel(cfg: GRPOConfig | SFTConfig, world_size: int) -> Iterator[str]:
    parallel = cfg.parallel
    if parallel.weights != "fsdp":
        if parallel.shard is not None:
            yield f"parallel.shard: {parallel.shard}; has no effect with parallel.weights {parallel.weights}"
        if parallel.cpu_offload:
            yield f"parallel.cpu_offload: true; has no effect with parallel.weights {parallel.weights}"
        return
    if parallel.shard is not None and (parallel.shard < 1 or world_size % parallel.shard):
        yield f"parallel.shard: {parallel.shard}; must divide the number of processes, {world_size}"
    fsdp, alternative = "is not supported with parallel.weights fsdp", "or set parallel.weights to replicated"
    if cfg.model.dtype == "float16":
        yield f"model.dtype: float16; {fsdp}; use bfloat16 or float32, {alternative}"
    if cfg.model.batch_invariant:
        yield f"model.batch_invariant: true; {fsdp}; set it to false, {alternative}"
    if cfg.model.quantization is not None:
        yield f"model.quantization: {cfg.model.quantization}; {fsdp}; set it to null, {alternative}"
    if cfg.lora is not None and cfg.lora.dora:
        yield f"lora.dora: true; {fsdp}; set it to false, {alternative}"
    if isinstance(cfg, GRPOConfig) and cfg.sampler.get("lora") == "adapter":
        yield f"sampler.lora: adapter; {fsdp}; set it to merged, {alternative}"
    optimizer = str(cfg.optimizer.get("_component_")) if is_node(cfg.optimizer) else ""
    if optimizer.startswith("bitsandbytes."):
        yield f"optimizer._component_: {optimizer}; {fsdp}; use torch.optim.AdamW, {alternative}"
    if optimizer.rpartition(".")[2] in NOT_ELEMENTWISE:
        yield f"optimizer._component_: {optimizer}; {fsdp}, as it needs whole matrices; use AdamW, {alternative}"


def _check_data(data: DataConfig) -> Iterator[str]:
    yield from check_component(data.train, "data.train")
    yield from check_component(data.heldout, "data.heldout")
    if data.train == data.heldout:
        yield "data.heldout: the same as data.train; give another split or slice, so that it is not trained on"


def _check_loss_scale(node: Component, dtype: str) -> Iterator[str]:
    from rolltune.loss_scale import LossScale

    if dtype != "float16":
        yield f"loss_scale: has no effect with model.dtype {dtype}, whose range is float32's; leave it out"
        return
    yield from build_instance(node, "loss_scale", LossScale)[1]


def _check_optimizer(node: Component) -> Iterator[str]:
    from rolltune.run.checks.resumable import optimizer_problem

    problems = check_component(node, "optimizer", positional=1)
    lr = node.get("lr")
    if isinstance(lr, int | float):
        problems += above("optimizer.lr", lr, 0)
    for name, value in node.items():
        if isinstance(value, float) and math.isinf(value):
            problems.append(f"optimizer.{name}: {value}; must be finite")
    yield from problems
    if problems:
        return
    if problem := optimizer_problem(node):
        yield f"optimizer._component_: {node['_component_']}: {problem}; torch.optim.AdamW trains and resumes"


def _check_lr_scheduler(node: Component, optimizer: Component, num_updates: int, product: str) -> Iterator[str]:
    from rolltune.run.checks.resumable import schedule_problem

    problems = check_component(node, "lr_scheduler", passed=("optimizer", "num_training_steps"))
    yield from problems
    if not problems and (problem := schedule_problem(node, optimizer, num_updates)):
        yield f"lr_scheduler: {problem}"
    warmup = node.get("num_warmup_steps")
    if isinstance(warmup, int):
        yield from at_least("lr_scheduler.num_warmup_steps", warmup, 0)
        if warmup > num_updates >= 1:
            yield (
                f"lr_scheduler.num_warmup_steps: {warmup}; must be at most the run's optimizer steps, {num_updates} "
                f"({product})"
            )


def _check_heldout(cfg: HeldoutConfig) -> Iterator[str]:
    yield from at_least("eval.every_n_steps", cfg.every_n_steps, 1)
    yield from at_least("eval.max_problems", cfg.max_problems, 1)


def _check_logging(logging: LoggingConfig) -> Iterator[str]:
    yield from at_least("logging.samples_every_n_steps", logging.samples_every_n_steps, 1)
    if logging.wandb_project != LoggingConfig.wandb_project and not logging.wandb:
        yield f"logging.wandb_project: {logging.wandb_project}; has no effect while logging.wandb is false"
