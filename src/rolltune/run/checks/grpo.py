"""The check of a config of recipes/grpo.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rolltune.config.components import check_component, is_node
from rolltune.config.schema import Component, GRPOConfig, SamplingConfig
from rolltune.run.checks.common import (
    at_least,
    build_component,
    build_instance,
    check_answer_format,
    check_context,
    check_reward,
    check_rewards,
    check_sampler,
    check_sampling_params,
    check_verifier,
    component_class,
    not_a,
)
from rolltune.run.checks.training import check_training

OLD_POLICIES = ("trainer", "sampler")


def check_grpo(cfg: GRPOConfig, world_size: int) -> Iterator[str]:
    yield from check_training(
        cfg, world_size, num_updates=cfg.num_steps * cfg.batch.num_iterations * cfg.batch.minibatches
    )
    yield from check_rewards(cfg.rewards)
    if cfg.rewards and all(node.get("weight", 1.0) == 0 for node in cfg.rewards.values()):
        yield f"rewards: every weight is 0 ({', '.join(cfg.rewards)}); give one a weight, or nothing is trained"
    yield from check_answer_format(cfg.answer_format, cfg.prompt.prefill)
    yield from _check_sampling(cfg.sampling)
    yield from check_context(cfg.model.path, cfg.sampling.max_new_tokens, "model.path")
    yield from check_sampler(cfg.sampler, cfg.sampling)
    if cfg.sampler.get("lora") == "adapter":
        yield from _check_adapter_sync(cfg)
    if cfg.model.batch_invariant:
        yield from _check_batch_invariant(cfg)
    yield from build_component(cfg.advantage, "advantage", [0.0, 1.0])[1]
    loss, problems = build_component(cfg.loss, "loss")
    yield from problems
    if loss is not None:
        yield from _check_loss(loss, cfg)
    if cfg.correction is not None:
        yield from _check_correction(cfg.correction)
    yield from _check_old_policy(cfg, loss)
    if cfg.mismatch is not None:
        from rolltune.mismatch import MismatchLimit

        yield from build_instance(cfg.mismatch, "mismatch", MismatchLimit)[1]
    yield from _check_batch(cfg, world_size)
    yield from _check_eval(cfg)
    if cfg.eval.overoptimization is not None:
        yield from _check_overoptimization(cfg.eval.overoptimization, cfg)
    yield from _check_no_pairs(cfg)


def _check_sampling(sampling: SamplingConfig) -> Iterator[str]:
    yield from check_sampling_params(sampling)
    if sampling.group_size < 2:
        yield f"sampling.group_size: {sampling.group_size}; must be >= 2: a group of one has no baseline"
    if sampling.temperature == 0:
        yield "sampling.temperature: 0; must be > 0: greedy completions of a prompt are all the same"
    if sampling.top_k == 1:
        yield "sampling.top_k: 1; must be 0 (no limit) or >= 2: completions of a prompt would all be the same"


def _check_adapter_sync(cfg: GRPOConfig) -> Iterator[str]:
    """Check what can be known of an adapter before the model is loaded."""
    from rolltune.endpoints.serving import ADAPTER_RANKS

    key, remedy = "sampler.lora: adapter", "set sampler.lora to merged"
    if cfg.lora is None:
        yield f"{key}; the run has no lora section; add one, or {remedy}"
        return
    if cfg.lora.dora:
        yield f"lora.dora: true; must be false with {key}, as vLLM does not serve DoRA; or {remedy}"
    if cfg.lora.experts:
        yield f"lora.experts: true; must be false with {key}; or use rolltune.samplers.native.NativeSampler"
    if cfg.lora.rank > ADAPTER_RANKS[-1]:
        yield f"lora.rank: {cfg.lora.rank}; must be <= {ADAPTER_RANKS[-1]} with {key}; or {remedy}"
    if cfg.sampler.get("transfer", "files") != "files":
        yield f"sampler.transfer: {cfg.sampler['transfer']}; must be files with {key}"


def _check_batch_invariant(cfg: GRPOConfig) -> Iterator[str]:
    from rolltune.samplers.native import NativeSampler

    if cfg.model.dtype != "float32":
        yield f"model.batch_invariant: true; needs model.dtype float32, not {cfg.model.dtype}"
    if cfg.device == "cuda":
        yield (
            "model.batch_invariant: true; works only on a CPU: on CUDA, matrix products and attention choose their "
            "order of summation by the batch's size; leave it out, or set device: cpu"
        )
    if cfg.lora is not None and cfg.lora.dropout > 0:
        yield "model.batch_invariant: true; needs lora.dropout 0, as the sampler has no dropout"
    if cfg.model.quantization is not None:
        yield "model.batch_invariant: true; needs model.quantization null, whose products are torch's own"
    if cfg.model.dropout:
        yield "model.batch_invariant: true; needs model.dropout false, as the sampler has no dropout"
    if not issubclass(component_class(cfg.sampler) or object, NativeSampler):
        yield "model.batch_invariant: true; needs the sampler rolltune.samplers.native.NativeSampler"


def _check_loss(loss: Any, cfg: GRPOConfig) -> Iterator[str]:
    from rolltune.losses.reinforce import ReinforceLoss

    if not callable(loss) or not hasattr(loss, "kl_coef"):
        yield not_a(cfg.loss, "loss", "a rolltune.types.Loss, which is called and has kl_coef")
    if isinstance(loss, ReinforceLoss) and (cfg.batch.num_iterations, cfg.batch.minibatches) != (1, 1):
        yield (
            "loss._component_: ReinforceLoss has no ratio, so that only a step's first update is on-policy; "
            "set batch.num_iterations and batch.minibatches to 1, or use a loss with a ratio"
        )


def _check_correction(node: Component) -> Iterator[str]:
    """Check a class whose object is called with three tensors and a number, or such a function."""
    if component_class(node) is None:
        yield from check_component(node, "correction", positional=4)
        return
    correction, problems = build_component(node, "correction")
    yield from problems
    if not problems and not callable(correction):
        yield not_a(node, "correction", "a rolltune.corrections.Correction, which is called")


def _check_old_policy(cfg: GRPOConfig, loss: Any) -> Iterator[str]:
    """Check the policy that the ratio is taken to, and the correction beside it."""
    from rolltune.corrections import GeometricRejection, K3Rejection
    from rolltune.losses.reinforce import ReinforceLoss

    if cfg.old_policy not in OLD_POLICIES:
        yield f"old_policy: {cfg.old_policy}; must be one of {', '.join(OLD_POLICIES)}"
    if cfg.old_policy != "sampler":
        return
    if isinstance(loss, ReinforceLoss):
        yield (
            "old_policy: sampler; has no effect with ReinforceLoss, which has no ratio; use a loss with a ratio, or a "
            "correction such as rolltune.corrections.SequenceTIS"
        )
    if cfg.correction is not None and not issubclass(
        component_class(cfg.correction) or object, GeometricRejection | K3Rejection
    ):
        name = str(cfg.correction.get("_component_")).rpartition(".")[2]
        yield (
            f"correction._component_: {name}; must be GeometricRejection or K3Rejection with "
            "old_policy sampler: the ratio to the sampler contains these weights already"
        )


def _check_batch(cfg: GRPOConfig, world_size: int) -> Iterator[str]:
    batch = cfg.batch
    counts = {name: getattr(batch, name) for name in ("prompts_per_step", "num_iterations", "minibatches")}
    for name, count in counts.items():
        yield from at_least(f"batch.{name}", count, 1)
    yield from at_least("batch.dynamic_sampling_rounds", batch.dynamic_sampling_rounds, 0)
    if not 0 <= batch.max_unscored <= 1:
        yield f"batch.max_unscored: {batch.max_unscored}; must be in [0, 1]"
    if batch.microbatch_tokens <= cfg.sampling.max_new_tokens:
        yield (
            f"batch.microbatch_tokens: {batch.microbatch_tokens}; must hold a prompt and a completion of "
            f"sampling.max_new_tokens, {cfg.sampling.max_new_tokens}"
        )
    if min(counts.values()) >= 1 and batch.prompts_per_step % (batch.minibatches * world_size):
        processes = f" x {world_size} processes" if world_size > 1 else ""
        yield (
            f"batch.prompts_per_step: {batch.prompts_per_step}; must be divisible by batch.minibatches "
            f"({batch.minibatches}){processes}: a minibatch consists of whole groups"
        )


def _check_eval(cfg: GRPOConfig) -> Iterator[str]:
    if cfg.eval.max_new_tokens is not None:
        yield from at_least("eval.max_new_tokens", cfg.eval.max_new_tokens, 1)
    for key, node in (("eval.correct", cfg.eval.correct), ("eval.lenient", cfg.eval.lenient)):
        if node is not None:
            yield from check_verifier(node, key) if component_class(node) is None else check_reward(node, key)


def _check_overoptimization(node: Component, cfg: GRPOConfig) -> Iterator[str]:
    from rolltune.rewards.checks.overoptimization import OveroptimizationCheck

    key = "eval.overoptimization"
    check, problems = build_instance(node, key, OveroptimizationCheck)
    yield from problems
    if check is None:
        return
    if check.reward not in cfg.rewards:
        yield f"{key}.reward: {check.reward}; must be one of rewards: {', '.join(cfg.rewards)}"
    elif check.gold == {name: value for name, value in cfg.rewards[check.reward].items() if name != "weight"}:
        yield f"{key}.gold: the same as rewards.{check.reward}; must be another measure, to compare the reward with"
    if cfg.eval.max_problems < check.min_problems:
        yield f"{key}.min_problems: {check.min_problems}; must be at most eval.max_problems, {cfg.eval.max_problems}"


def _check_no_pairs(cfg: GRPOConfig) -> Iterator[str]:
    """Refuse a pairwise reward on held-out problems: these have one response, so nothing would be compared."""
    from rolltune.rewards.rubric.pairwise import PairwiseReward

    check = cfg.eval.overoptimization or {}
    nodes = {
        "eval.correct": cfg.eval.correct,
        "eval.lenient": cfg.eval.lenient,
        "eval.overoptimization.gold": check.get("gold"),
        "eval.overoptimization.reward": cfg.rewards.get(str(check.get("reward"))),
    }
    for key, node in nodes.items():
        if is_node(node) and issubclass(component_class(node) or object, PairwiseReward):
            yield (
                f"{key}: PairwiseReward compares the responses of a group, but a held-out problem has one response; "
                "use another reward"
            )
