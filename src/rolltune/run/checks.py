"""What a config's values have to be, each and together, beyond their types. Nothing is loaded.

A check yields problems, each ``key: what is wrong; what would be right``. A setting that is understood but would do
nothing in this run is a problem too.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
import shutil
import string
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rolltune import config
from rolltune.config.components import check_component, instantiate, is_node, locate, show, type_problem
from rolltune.config.schema import (
    AuditJudgeConfig,
    AuditRewardsConfig,
    Component,
    DataConfig,
    EvalConfig,
    EvaluateConfig,
    EvaluatedModel,
    EvaluateSamplingConfig,
    GRPOConfig,
    LintRubricsConfig,
    LoggingConfig,
    LoRAConfig,
    ModelConfig,
    PromptConfig,
    SamplingConfig,
    ServeConfig,
    SFTConfig,
    WriteRubricsConfig,
    WriteTracesConfig,
)
from rolltune.errors import ConfigError
from rolltune.rewards.rubric.templates import load_prompt

T = TypeVar("T")
DEVICES = ("auto", "cpu", "cuda")


def check_grpo(cfg: GRPOConfig, world_size: int) -> Iterator[str]:
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
    yield from _check_context(cfg.model.path, cfg.sampling.max_new_tokens)
    yield from _check_sampler(cfg.sampler, cfg.sampling)
    if cfg.model.batch_invariant:
        yield from _check_batch_invariant(cfg)
    yield from _check_advantage(cfg.advantage)
    yield from _check_loss(cfg)
    if cfg.correction is not None:
        yield from _check_correction(cfg.correction, cfg.loss)
    if cfg.mismatch is not None:
        yield from _check_mismatch(cfg.mismatch)
    updates = cfg.num_steps * cfg.batch.num_iterations * cfg.batch.minibatches
    yield from _check_optimization(cfg, updates)
    yield from _check_batch(cfg, world_size)
    yield from _check_eval(cfg)
    for name, node in (("correct", cfg.eval.correct), ("lenient", cfg.eval.lenient)):
        if node is not None and _is_class(node):
            yield from _reward_problems(node, f"eval.{name}")
        elif node is not None:
            yield from _check_verifier(node, f"eval.{name}")
    if cfg.eval.overoptimization is not None:
        yield from _check_overoptimization(cfg.eval.overoptimization, cfg)
    yield from _check_no_pairs(cfg)
    yield from _check_logging(cfg.logging)


def check_sft(cfg: SFTConfig, world_size: int) -> Iterator[str]:
    yield from _check_output_dir(cfg.output_dir)
    yield from _at_least("seed", cfg.seed, 0)
    yield from _check_device(cfg.device)
    yield from _check_weights(cfg.model, cfg.lora)
    if cfg.model.batch_invariant:
        yield "model.batch_invariant: true; does nothing in sft, which samples nothing; leave it out"
    yield from _check_data(cfg.data)
    yield from _check_prompt(cfg.prompt)
    yield from _check_answer_format(cfg.answer_format, cfg.prompt.prefill, wants=("solution", "answer"))
    yield from _check_optimization(cfg, cfg.num_steps)
    examples = cfg.batch.examples_per_step
    yield from _at_least("batch.examples_per_step", examples, 1)
    yield from _at_least("batch.microbatch_tokens", cfg.batch.microbatch_tokens, 1)
    if examples >= 1 and examples % world_size:
        yield f"batch.examples_per_step: {examples}; must be divisible by the number of processes, {world_size}"
    yield from _check_eval(cfg)
    for name in ("correct", "lenient"):
        if getattr(cfg.eval, name) != getattr(EvalConfig(), name):
            yield f"eval.{name}: does nothing here: the held-out measure of this recipe is the loss; leave it out"
    if cfg.eval.overoptimization is not None:
        yield "eval.overoptimization: does nothing here: sft samples nothing that could be scored; leave it out"
    yield from _check_logging(cfg.logging)
    if cfg.logging.classifier is not None:
        yield "logging.classifier: does nothing in sft, which samples nothing; leave it out"


def check_audit_rewards(cfg: AuditRewardsConfig, world_size: int) -> Iterator[str]:
    yield from _check_output_dir(cfg.output_dir)
    yield from _at_least("seed", cfg.seed, 0)
    yield from check_component(cfg.data, "data")
    yield from _check_rewards(cfg.rewards)
    yield from _check_answer_format(cfg.answer_format, "")
    if cfg.max_problems is not None:
        yield from _at_least("max_problems", cfg.max_problems, 1)


def check_lint_rubrics(cfg: LintRubricsConfig, world_size: int) -> Iterator[str]:
    yield from _check_output_dir(cfg.output_dir)
    yield from check_component(cfg.data, "data")
    if cfg.max_problems is not None:
        yield from _at_least("max_problems", cfg.max_problems, 1)
    yield from _at_least("fewest_criteria", cfg.fewest_criteria, 1)
    if cfg.most_criteria < cfg.fewest_criteria:
        yield f"most_criteria: {cfg.most_criteria}; must be at least fewest_criteria, {cfg.fewest_criteria}"


def check_audit_judge(cfg: AuditJudgeConfig, world_size: int) -> Iterator[str]:
    yield from _check_output_dir(cfg.output_dir)
    yield from _at_least("seed", cfg.seed, 0)
    yield from check_component(cfg.data, "data")
    problems = check_component(cfg.judge, "judge") or _call_problems(cfg.judge, "judge")
    yield from problems
    judge = None if problems else instantiate(cfg.judge)
    if judge is not None and not (hasattr(judge, "ask") and hasattr(judge, "metrics")):
        name = cfg.judge["_component_"]
        yield f"judge._component_: {name}: no judge; a rolltune.rewards.judges.judge.Judge has ask and metrics"
    if cfg.template is not None:
        try:
            load_prompt(cfg.template, "explicit" if cfg.one_call else "explicit_one")
        except ValueError as error:
            yield str(error).replace("prompt", "template", 1)
    if cfg.reversed and not cfg.one_call:
        yield "reversed: true; does nothing while one_call is false, where no question has two criteria"
    yield from _at_least("repeats", cfg.repeats, 1)
    if cfg.repeats > 1 and not problems and check_component(cfg.judge | {"seed": 0}, "judge"):
        yield f"repeats: {cfg.repeats}; {cfg.judge['_component_']} takes no seed, by which repeats differ; must be 1"
    yield from _at_least("resamples", cfg.resamples, 100)
    for name, lowest in (("min_accuracy", 0), ("min_kappa", -1)):
        least = getattr(cfg, name)
        if least is not None and not lowest <= least <= 1:
            yield f"{name}: {least}; must be in {lowest} .. 1"


def check_write_traces(cfg: WriteTracesConfig, world_size: int) -> Iterator[str]:
    yield from _check_output_dir(cfg.output_dir)
    yield from _at_least("seed", cfg.seed, 0)
    yield from check_component(cfg.data, "data")
    yield from _check_writer(cfg.writer, "rolltune.traces.TraceWriter", ("condition", "write"))
    yield from _check_verifier(cfg.correct, "correct")
    yield from _at_least("traces_per_problem", cfg.traces_per_problem, 1)
    yield from _at_least("max_concurrency", cfg.max_concurrency, 1)


def check_write_rubrics(cfg: WriteRubricsConfig, world_size: int) -> Iterator[str]:
    yield from _check_output_dir(cfg.output_dir)
    yield from _at_least("seed", cfg.seed, 0)
    yield from check_component(cfg.data, "data")
    yield from _check_writer(cfg.writer, "rolltune.writers.rubrics.RubricWriter", ("check", "write"))
    yield from _at_least("max_concurrency", cfg.max_concurrency, 1)


def _check_writer(node: Component, protocol: str, members: tuple[str, str]) -> Iterator[str]:
    """``members``: of the protocol; by the first of them it differs from the other recipe's."""
    problems = check_component(node, "writer") or _call_problems(node, "writer")
    yield from problems
    if not problems and not all(hasattr(instantiate(node), name) for name in members):
        has = " and ".join(members)
        yield f"writer._component_: {node['_component_']}: no writer for this recipe; a {protocol} has {has}"


def check_evaluate(cfg: EvaluateConfig, world_size: int) -> Iterator[str]:
    yield from _check_output_dir(cfg.output_dir)
    yield from _at_least("seed", cfg.seed, 0)
    yield from _check_device(cfg.device)
    yield from _check_models(cfg.models)
    yield from _check_dtype("dtype", cfg.dtype)
    yield from check_component(cfg.data, "data")
    if cfg.max_problems is not None:
        yield from _at_least("max_problems", cfg.max_problems, 1)
    yield from _check_prompt(cfg.prompt)
    yield from _check_evaluate_sampling(cfg.sampling)
    for i, model in enumerate(cfg.models):
        yield from _check_context(model.path, cfg.sampling.max_new_tokens, f"models[{i}].path")
    yield from _check_sampler(cfg.sampler, cfg.sampling)
    for name in ("correct", "lenient", "format"):
        yield from _check_verifier(getattr(cfg, name), name)
    yield from _check_ks(cfg.ks, cfg.sampling.samples)
    yield from _at_least("resamples", cfg.resamples, 100)
    if cfg.classifier is not None:
        yield from check_component(cfg.classifier, "classifier")
        yield from _at_least("classified_samples", cfg.classified_samples, 1)
    elif cfg.classified_samples != EvaluateConfig().classified_samples:
        yield f"classified_samples: {cfg.classified_samples}; does nothing while classifier is null"


def check_serve(cfg: ServeConfig, world_size: int) -> Iterator[str]:
    from rolltune.endpoints.serving import TRANSFERS

    yield from _check_output_dir(cfg.output_dir)
    yield from _check_path(cfg.model, "model")
    yield from _check_dtype("dtype", cfg.dtype)
    if not cfg.name.strip():
        yield "name: is empty; give what clients call the model"
    if not 1 <= cfg.port <= 65535:
        yield f"port: {cfg.port}; must be in 1 .. 65535"
    yield from _at_least("max_model_len", cfg.max_model_len, 1)
    yield from _at_least("max_num_seqs", cfg.max_num_seqs, 1)
    yield from _above("kv_cache_gib", cfg.kv_cache_gib, 0)
    if cfg.takes_weights is not None and cfg.takes_weights not in TRANSFERS:
        yield f"takes_weights: {cfg.takes_weights}; one of {', '.join(TRANSFERS)} is wanted, or null"
    yield from _above("start_seconds", cfg.start_seconds, 0)
    if cfg.command and shutil.which(cfg.command[0]) is None:
        yield f"command[0]: {cfg.command[0]}: no such program"


def _check_models(models: list[EvaluatedModel]) -> Iterator[str]:
    if not models:
        yield "models: none; give one at least: [{name: base, path: ...}]"
    names = [model.name for model in models]
    for i, model in enumerate(models):
        if not re.fullmatch(r"\w[\w.+-]*", model.name):
            yield f"models[{i}].name: {model.name!r}; a file is named after it: letters, digits, . _ + - are wanted"
        elif model.name in names[:i]:
            yield f"models[{i}].name: {model.name}; models[{names.index(model.name)}] has that name already"
        yield from _check_path(model.path, f"models[{i}].path")


def _check_evaluate_sampling(sampling: EvaluateSamplingConfig) -> Iterator[str]:
    yield from _at_least("sampling.samples", sampling.samples, 1)
    yield from _check_distribution(sampling)
    if sampling.temperature < 0:
        yield f"sampling.temperature: {sampling.temperature}; must be >= 0"
    elif sampling.temperature == 0 and sampling.samples > 1:
        yield (
            f"sampling.temperature: 0; all {sampling.samples} samples of a problem would be the same: must be > 0 "
            "(greedy decoding is done besides)"
        )
    elif sampling.temperature == 0 and (sampling.top_p, sampling.top_k) != (1, 0):
        yield "sampling.temperature: 0; top_p and top_k do nothing then"


def _check_ks(ks: list[int], samples: int) -> Iterator[str]:
    for i, k in enumerate(ks):
        if not 1 <= k <= samples:
            yield f"ks[{i}]: {k}; must be in 1 .. sampling.samples, {samples}"
        elif k in ks[:i]:
            yield f"ks[{i}]: {k}; stands there twice"


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
    import torch  # here, as with rolltune.model.load below: a config without a model is checked in a moment

    return torch.cuda.is_available()


def _check_path(path: str, key: str = "model.path") -> Iterator[str]:
    from rolltune.model.load import PACKAGED, resolve_model

    if path != PACKAGED:
        try:
            resolve_model(path)
        except ValueError as error:
            yield str(error).replace("model.path", key, 1)


def _check_dtype(key: str, dtype: str) -> Iterator[str]:
    from rolltune.model.load import DTYPES

    if dtype not in DTYPES:
        yield f"{key}: {show(dtype)}; one of {', '.join(DTYPES)} is wanted"


def _check_weights(model: ModelConfig, lora: LoRAConfig | None) -> Iterator[str]:
    yield from _check_path(model.path)
    yield from _check_dtype("model.dtype", model.dtype)
    if model.master_weights and model.dtype == "float32":
        yield "model.master_weights: true; does nothing with model.dtype float32, whose weights are fp32 already"
    if model.fp32_head and model.dtype == "float32":
        yield "model.fp32_head: true; does nothing with model.dtype float32, whose logits are fp32 products already"
    if lora is None:
        if model.dtype == "float16" and not model.master_weights:
            yield (
                "model.master_weights: false; must be true with model.dtype float16: an update below 1/2048 of a "
                "weight would be rounded away"
            )
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
        yield from _reward_problems(node, key)
        weight = node.get("weight", 1.0)
        wrong = type_problem(weight, float)
        if wrong or not math.isfinite(weight):
            yield f"{key}.weight: {wrong or f'{weight}; a finite number is wanted'}"


def _reward_problems(node: Component, key: str) -> list[str]:
    """Of a function that is called with (problem, text), or of a class whose object is."""
    if not _is_class(node):
        return check_component(node, key, positional=2, reserved=("completion",), ignore=("weight",))
    bare = {name: value for name, value in node.items() if name != "weight"}
    problems = check_component(bare, key) or _call_problems(bare, key)
    if not problems and not callable(instantiate(bare)):
        problems = [f"{key}._component_: {node['_component_']}: no reward; it is not called with (problem, text)"]
    return problems


def _is_class(node: Component) -> bool:
    try:
        return inspect.isclass(locate(node.get("_component_", "")))
    except ValueError:
        return False


def _check_verifier(node: Component, key: str) -> Iterator[str]:
    """A reward that says by the problem and the turn's text alone whether the turn is right."""
    for problem in check_component(node, key, positional=2):
        if problem.startswith(f"{key}.completion: missing"):
            name = node["_component_"]
            problem = f"{key}._component_: {name} takes the completion; a turn is judged by its text alone here"
        yield problem


def _check_answer_format(answer_format: str, prefill: str, *, wants: tuple[str, ...] = ("answer",)) -> Iterator[str]:
    """``wants``: fields of which one has to stand there. A trace's ``{solution}`` is a whole turn, answer included."""
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(answer_format) if name is not None]
    except ValueError as error:
        yield f"answer_format: {answer_format!r}: {error}; a literal brace is doubled: {{{{ }}}}"
        return
    unknown = [name for name in fields if name not in ("solution", "answer")]
    if unknown:
        yield f"answer_format: has {{{unknown[0]}}}; {{solution}} and {{answer}} are filled in; double other braces"
    elif not set(wants) & set(fields):
        yield f"answer_format: {answer_format!r} has no {' and no '.join(f'{{{name}}}' for name in wants)}"
    elif not answer_format.startswith(prefill):
        yield f"answer_format: {answer_format!r} does not start with prompt.prefill, {prefill!r}, as a turn does"


# --- sampling and loss ------------------------------------------------------------------------------------------------


def _check_sampling(sampling: SamplingConfig) -> Iterator[str]:
    if sampling.group_size < 2:
        yield f"sampling.group_size: {sampling.group_size}; a group of one has no baseline: must be >= 2"
    yield from _above("sampling.temperature", sampling.temperature, 0)
    yield from _check_distribution(sampling)
    if sampling.top_k == 1:
        yield "sampling.top_k: 1; leaves nothing to choose, so nothing would be learnt; 0 (no limit) or >= 2 is wanted"


def _check_sampler(node: Component, sampling: SamplingConfig | EvaluateSamplingConfig) -> Iterator[str]:
    problems = check_component(node, "sampler", positional=2)
    yield from problems
    if problems or not node["_component_"].startswith("rolltune.samplers.vllm."):
        return
    from rolltune.endpoints import serving
    from rolltune.samplers.vllm_sampler import sampling_problem

    try:
        serving.installed_version()
    except ValueError as error:
        yield f"sampler._component_: {node['_component_']}: {error}"
    if problem := sampling_problem(sampling.temperature, sampling.top_p, sampling.top_k):
        yield problem
    length = node.get("max_model_len")
    if length is not None and length <= sampling.max_new_tokens:
        yield f"sampler.max_model_len: {length}; must leave room for a prompt and {sampling.max_new_tokens} new tokens"
    transfer = node.get("transfer", "files")
    if transfer not in serving.TRANSFERS:
        yield f"sampler.transfer: {transfer}; one of {', '.join(serving.TRANSFERS)} is wanted"


def _check_distribution(sampling: SamplingConfig | EvaluateSamplingConfig) -> Iterator[str]:
    yield from _at_least("sampling.max_new_tokens", sampling.max_new_tokens, 1)
    if not 0 < sampling.top_p <= 1:
        yield f"sampling.top_p: {sampling.top_p}; must be in (0, 1]"
    yield from _at_least("sampling.top_k", sampling.top_k, 0)
    if "" in sampling.stop:
        yield "sampling.stop: holds an empty string, which would stop every completion at once"


def _check_batch_invariant(cfg: GRPOConfig) -> Iterator[str]:
    from rolltune.samplers.native import NativeSampler

    if cfg.model.dtype != "float32":
        yield f"model.batch_invariant: true; needs model.dtype float32, not {cfg.model.dtype}"
    if cfg.device == "cuda":
        yield (
            "model.batch_invariant: true; works on a CPU alone: on CUDA, products and attention choose their order of "
            "summation by the size of the batch; leave it out, or give device: cpu"
        )
    if cfg.lora is not None and cfg.lora.dropout > 0:
        yield "model.batch_invariant: true; the sampler has no dropout, so lora.dropout must be 0"
    if not _is_class(cfg.sampler) or not issubclass(locate(cfg.sampler["_component_"]), NativeSampler):
        yield "model.batch_invariant: true; the sampler must be rolltune.samplers.native.NativeSampler"


def _check_context(path: str, max_new_tokens: int, key: str = "model.path") -> Iterator[str]:
    """A model on disk is asked; one on the Hub is asked by the dry run, which knows the length of the prompts too."""
    from rolltune.model.load import load_config

    if not (Path(path) / "config.json").exists():
        return
    try:
        context = getattr(load_config(path).get_text_config(), "max_position_embeddings", None)
    except ValueError as error:
        yield str(error).replace("model.path", key, 1)
        return
    if context is not None and max_new_tokens >= context:
        yield (
            f"sampling.max_new_tokens: {max_new_tokens}; must leave room for a prompt in the context of {key}, "
            f"{context} tokens"
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


def _check_correction(node: Component, loss: Component) -> Iterator[str]:
    """Of a class whose object is called with three tensors and a number, or of such a function."""
    if not _is_class(node):
        yield from check_component(node, "correction", positional=4)
        return
    problems = check_component(node, "correction") or _call_problems(node, "correction")
    yield from problems
    if problems:
        return
    correction = instantiate(node)
    if not callable(correction):
        yield f"correction._component_: {node['_component_']}: no rolltune.corrections.Correction; one is called"


def _check_mismatch(node: Component) -> Iterator[str]:
    from rolltune.mismatch import MismatchLimit

    problems = check_component(node, "mismatch") or _call_problems(node, "mismatch")
    yield from problems
    if not problems and not isinstance(instantiate(node), MismatchLimit):
        yield f"mismatch._component_: {node['_component_']}: rolltune.mismatch.MismatchLimit is wanted"


# --- optimization and batches -----------------------------------------------------------------------------------------


def _check_optimization(cfg: GRPOConfig | SFTConfig, num_updates: int) -> Iterator[str]:
    yield from _at_least("num_steps", cfg.num_steps, 1)
    yield from _above("max_grad_norm", cfg.max_grad_norm, 0)
    if cfg.loss_scale is not None:
        yield from _check_loss_scale(cfg.loss_scale, cfg.model.dtype)
    yield from check_component(cfg.optimizer, "optimizer", positional=1)
    lr = cfg.optimizer.get("lr")
    if isinstance(lr, int | float):
        yield from _above("optimizer.lr", lr, 0)
    if cfg.lr_scheduler is None:
        return
    problems = check_component(cfg.lr_scheduler, "lr_scheduler", passed=("optimizer", "num_training_steps"))
    yield from problems or _schedule_problems(cfg.lr_scheduler, num_updates)
    warmup = cfg.lr_scheduler.get("num_warmup_steps")
    if isinstance(warmup, int):
        yield from _at_least("lr_scheduler.num_warmup_steps", warmup, 0)
        if warmup > num_updates >= 1:
            yield (
                f"lr_scheduler.num_warmup_steps: {warmup}; the run has {num_updates} optimizer steps in all (num_steps"
                f"{' x batch.num_iterations x batch.minibatches' if isinstance(cfg, GRPOConfig) else ''})"
            )


def _schedule_problems(node: Component, num_updates: int) -> list[str]:
    """Build the schedule for a throw-away optimizer."""
    from torch import zeros
    from torch.optim import SGD

    try:
        instantiate(node, optimizer=SGD([zeros(1)]), num_training_steps=num_updates)
    except ConfigError as error:
        return [f"lr_scheduler: {error.problems[0]}"]
    return []


def _check_loss_scale(node: Component, dtype: str) -> Iterator[str]:
    from rolltune.loss_scale import LossScale

    if dtype != "float16":
        yield f"loss_scale: does nothing with model.dtype {dtype}, whose range is that of fp32; leave it out"
        return
    problems = check_component(node, "loss_scale") or _call_problems(node, "loss_scale")
    yield from problems
    if not problems and not isinstance(instantiate(node), LossScale):
        yield f"loss_scale._component_: {node['_component_']}: rolltune.loss_scale.LossScale is wanted"


def _check_batch(cfg: GRPOConfig, world_size: int) -> Iterator[str]:
    batch = cfg.batch
    counts = {name: getattr(batch, name) for name in ("prompts_per_step", "num_iterations", "minibatches")}
    for name, count in counts.items():
        yield from _at_least(f"batch.{name}", count, 1)
    yield from _at_least("batch.dynamic_sampling_rounds", batch.dynamic_sampling_rounds, 0)
    if not 0 <= batch.max_unscored <= 1:
        yield f"batch.max_unscored: {batch.max_unscored}; a share in 0 .. 1 is wanted"
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


def _check_eval(cfg: GRPOConfig | SFTConfig) -> Iterator[str]:
    yield from _at_least("eval.every_n_steps", cfg.eval.every_n_steps, 1)
    yield from _at_least("eval.max_problems", cfg.eval.max_problems, 1)
    if cfg.eval.max_new_tokens is not None:
        yield from _at_least("eval.max_new_tokens", cfg.eval.max_new_tokens, 1)
    yield from _at_least("checkpoint.every_n_steps", cfg.checkpoint.every_n_steps, 1)
    yield from _at_least("checkpoint.keep_last", cfg.checkpoint.keep_last, 1)


def _check_overoptimization(node: Component, cfg: GRPOConfig) -> Iterator[str]:
    from rolltune.rewards.checks.overoptimization import OveroptimizationCheck

    problems = check_component(node, "eval.overoptimization") or _call_problems(node, "eval.overoptimization")
    yield from problems
    if problems:
        return
    check = instantiate(node)
    if not isinstance(check, OveroptimizationCheck):
        wanted = "rolltune.rewards.checks.overoptimization.OveroptimizationCheck"
        yield f"eval.overoptimization._component_: {node['_component_']}: {wanted} is wanted"
        return
    if check.reward not in cfg.rewards:
        yield f"eval.overoptimization.reward: {check.reward}; one of rewards is wanted: {', '.join(cfg.rewards)}"
    elif check.gold == {key: value for key, value in cfg.rewards[check.reward].items() if key != "weight"}:
        yield f"eval.overoptimization.gold: the same as rewards.{check.reward}, which would be compared with itself"
    if cfg.eval.max_problems < check.min_problems:
        yield (
            f"eval.overoptimization.min_problems: {check.min_problems}; eval.max_problems is "
            f"{cfg.eval.max_problems}, so nothing "
            "would ever be compared"
        )


def _check_no_pairs(cfg: GRPOConfig) -> Iterator[str]:
    """A held-out problem has one turn, which nothing can be compared with: it would never be scored."""
    from rolltune.rewards.rubric.pairwise import PairwiseReward

    gold = cfg.eval.overoptimization or {}
    nodes = {
        "eval.correct": cfg.eval.correct,
        "eval.lenient": cfg.eval.lenient,
        "eval.overoptimization.gold": gold.get("gold"),
        "eval.overoptimization.reward": cfg.rewards.get(str(gold.get("reward"))),
    }
    for key, node in nodes.items():
        if is_node(node) and _is_class(node) and issubclass(locate(node["_component_"]), PairwiseReward):
            yield f"{key}: PairwiseReward compares turns of a group, and a held-out problem has one turn; give another"


def _check_logging(logging: LoggingConfig) -> Iterator[str]:
    yield from _at_least("logging.samples_every_n_steps", logging.samples_every_n_steps, 1)
    default = next(field.default for field in dataclasses.fields(logging) if field.name == "wandb_project")
    if logging.wandb_project != default and not logging.wandb:
        yield f"logging.wandb_project: {logging.wandb_project}; does nothing while logging.wandb is false"
    yield from _at_least("logging.classified_samples", logging.classified_samples, 1)
    if logging.classifier is not None:
        yield from check_component(logging.classifier, "logging.classifier")
    elif logging.classified_samples != LoggingConfig.classified_samples:
        yield (
            f"logging.classified_samples: {logging.classified_samples}; does nothing while logging.classifier is null"
        )


def _at_least(key: str, value: int, lowest: int) -> Iterable[str]:
    return [] if value >= lowest else [f"{key}: {value}; must be >= {lowest}"]


def _above(key: str, value: float, bound: float) -> Iterable[str]:
    return [] if value > bound else [f"{key}: {value}; must be > {bound}"]


# --- by schema --------------------------------------------------------------------------------------------------------

CHECKS: dict[type, config.Check[Any]] = {
    GRPOConfig: check_grpo,
    SFTConfig: check_sft,
    AuditRewardsConfig: check_audit_rewards,
    AuditJudgeConfig: check_audit_judge,
    LintRubricsConfig: check_lint_rubrics,
    WriteTracesConfig: check_write_traces,
    WriteRubricsConfig: check_write_rubrics,
    EvaluateConfig: check_evaluate,
    ServeConfig: check_serve,
}


def validate(schema: type[T], path: str | Path, overrides: Sequence[str] = (), *, world_size: int | None = None) -> T:
    """:func:`rolltune.config.validate` by the checks of the recipe that ``schema`` belongs to."""
    return config.validate(schema, path, overrides, check=CHECKS[schema], world_size=world_size)
