"""The list of keys is frozen, and ``--help`` describes each of them."""

from typing import get_args, get_type_hints

import pytest

from rolltune import config
from rolltune.config import schema
from rolltune.config.explain import explained_keys
from rolltune.config.values import without_none
from rolltune.endpoints.serving import TRANSFERS
from rolltune.model.load import DTYPES
from rolltune.samplers.vllm import served

SHARED = {
    "output_dir",
    "seed",
    "device",
    "resume",
    "dry_run",
    "model",
    "model.path",
    "model.dtype",
    "model.master_weights",
    "model.fp32_head",
    "model.dropout",
    "model.batch_invariant",
    "model.router_aux_loss",
    "model.quantization",
    "model.gradient_checkpointing",
    "lora",
    "lora.rank",
    "lora.alpha",
    "lora.dropout",
    "lora.target_modules",
    "lora.rslora",
    "lora.dora",
    "lora.experts",
    "parallel",
    "parallel.weights",
    "parallel.shard",
    "parallel.cpu_offload",
    "data",
    "data.train",
    "data.heldout",
    "data.too_long",
    "stall_seconds",
    "grace_seconds",
    "prompt",
    "prompt.system",
    "prompt.few_shot",
    "prompt.few_shot.user",
    "prompt.few_shot.assistant",
    "prompt.prefill",
    "prompt.chat_template",
    "prompt.chat_template_kwargs",
    "answer_format",
    "optimizer",
    "lr_scheduler",
    "num_steps",
    "max_grad_norm",
    "loss_scale",
    "batch",
    "batch.microbatch_tokens",
    "eval",
    "eval.every_n_steps",
    "eval.max_problems",
    "checkpoint",
    "checkpoint.every_n_steps",
    "checkpoint.keep_last",
    "logging",
    "logging.wandb",
    "logging.wandb_project",
    "logging.tensorboard",
    "logging.samples_every_n_steps",
}
KEYS = {
    schema.GRPOConfig: SHARED
    | {
        "eval.max_new_tokens",
        "eval.correct",
        "eval.lenient",
        "eval.overoptimization",
        "rewards",
        "sampling",
        "sampling.group_size",
        "sampling.temperature",
        "sampling.top_p",
        "sampling.top_k",
        "sampling.max_new_tokens",
        "sampling.stop",
        "sampler",
        "advantage",
        "loss",
        "correction",
        "old_policy",
        "mismatch",
        "batch.prompts_per_step",
        "batch.num_iterations",
        "batch.minibatches",
        "batch.dynamic_sampling_rounds",
        "batch.mask_truncated",
        "batch.max_unscored",
    },
    schema.SFTConfig: SHARED | {"batch.examples_per_step"},
    schema.AuditRewardsConfig: {"output_dir", "seed", "dry_run", "data", "rewards", "answer_format", "max_problems"},
    schema.LintRubricsConfig: {
        "output_dir",
        "dry_run",
        "data",
        "max_problems",
        "fewest_criteria",
        "most_criteria",
    },
    schema.AuditJudgeConfig: {
        "output_dir",
        "seed",
        "dry_run",
        "data",
        "judge",
        "template",
        "one_call",
        "reversed",
        "repeats",
        "resamples",
        "min_accuracy",
        "min_kappa",
    },
    schema.WriteTracesConfig: {
        "output_dir",
        "seed",
        "dry_run",
        "data",
        "writer",
        "correct",
        "traces_per_problem",
        "max_concurrency",
    },
    schema.WriteRubricsConfig: {"output_dir", "seed", "dry_run", "data", "writer", "max_concurrency"},
    schema.ServeConfig: {
        "output_dir",
        "dry_run",
        "model",
        "name",
        "port",
        "dtype",
        "max_model_len",
        "max_num_seqs",
        "kv_cache_gib",
        "takes_weights",
        "lora_rank",
        "options",
        "start_seconds",
        "command",
    },
    schema.EvaluateConfig: {
        "output_dir",
        "seed",
        "device",
        "dry_run",
        "models",
        "models.name",
        "models.path",
        "models.quantization",
        "dtype",
        "data",
        "max_problems",
        "prompt",
        "prompt.system",
        "prompt.few_shot",
        "prompt.few_shot.user",
        "prompt.few_shot.assistant",
        "prompt.prefill",
        "prompt.chat_template",
        "prompt.chat_template_kwargs",
        "sampling",
        "sampling.samples",
        "sampling.temperature",
        "sampling.top_p",
        "sampling.top_k",
        "sampling.max_new_tokens",
        "sampling.stop",
        "sampler",
        "correct",
        "lenient",
        "format",
        "ks",
        "resamples",
        "classifier",
        "classified_samples",
    },
}


@pytest.mark.parametrize("recipe", KEYS, ids=lambda recipe: recipe.__name__)
def test_no_new_keys(recipe: type):
    """Prefer a new argument of a component to a new key; add a key here on purpose."""
    assert set(config.all_keys(recipe)) == KEYS[recipe]


@pytest.mark.parametrize("recipe", KEYS, ids=lambda recipe: recipe.__name__)
def test_help_describes_every_key(recipe: type):
    described = {left.split(":")[0]: comment for left, comment in explained_keys(recipe)}
    lists = {"prompt.few_shot", "models"}
    sections = {key.rpartition(".")[0] for key in KEYS[recipe]} - lists
    items = {key for key in KEYS[recipe] if key.rpartition(".")[0] in lists}
    assert KEYS[recipe] - sections - items <= described.keys()
    assert [key for key, comment in described.items() if not comment.removeprefix("required: ")] == []
    assert all(key in config.explain(recipe) for key in described)


def test_help_shows_types_defaults_and_comments():
    described = dict(explained_keys(schema.GRPOConfig))
    assert described["output_dir:"].startswith("required: folder")
    assert described['model.dtype: "float32"'].startswith("float32, bfloat16, float16: ")
    assert described["mismatch: null"].endswith("null: report the mismatch but never stop"), "a comment of two lines"
    assert described["lora: null"].startswith("Low-rank adapters")
    assert "completions per prompt" in described["sampling.group_size: 8"] and described["sampling.top_k: 0"]


def test_precisions_are_those_that_models_load_in():
    assert get_args(schema.Dtype) == tuple(DTYPES)


def test_ways_of_weights_are_those_of_the_server():
    accepted = get_args(without_none(get_type_hints(schema.ServeConfig)["takes_weights"]))
    assert accepted == tuple(TRANSFERS)
    assert accepted == get_args(get_type_hints(served)["transfer"])
