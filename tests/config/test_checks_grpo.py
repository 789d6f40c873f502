"""The check of grpo's config: values, components that refuse their arguments, and keys that contradict each other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

CHECK = "_component_: rolltune.rewards.checks.overoptimization.OveroptimizationCheck"
ANSWER = "{_component_: rolltune.rewards.answer.answer_reward}"
LOSS_SCALE = "{_component_: rolltune.loss_scale.LossScale}"
POLICY_JUDGE = "{_component_: rolltune.rewards.judges.policy.PolicyJudge}"
PAIRWISE = f"{{_component_: rolltune.rewards.rubric.pairwise.PairwiseReward, judges: [{POLICY_JUDGE}]}}"


def correction(name: str, arguments: str = "") -> str:
    return f"correction={{_component_: rolltune.corrections.{name}{arguments}}}"


def overoptimization(arguments: str) -> str:
    return f"eval.overoptimization={{{CHECK}, {arguments}}}"


MISTAKES = [
    # components
    ("loss.kl_coef=-1", "loss.kl_coef: -1"),
    ("advantage.eps=0", "advantage.eps: 0"),
    (
        correction("TokenTIS", ", max_rato: 2"),
        "correction.max_rato: TokenTIS takes no such argument; did you mean corr",
    ),
    (correction("TokenTIS", ", max_ratio: 0.5"), "correction.max_ratio: 0.5"),
    (correction("TokenMask", ", low: 2"), "correction.low: 2"),
    (correction("bounded"), "correction._component_: bounded takes 1 positional arguments"),
    ("correction={_component_: rolltune.advantages.group_zscore}", "group_zscore takes 1 positional arguments"),
    (correction("K3Rejection", ", max_k3: 0"), "correction.max_k3: 0"),
    ("old_policy=samplr", "old_policy: samplr; must be one of trainer, sampler"),
    ("mismatch={_component_: rolltune.mismatch.MismatchLimit, max_k3: 0}", "mismatch.max_k3: 0"),
    (
        "mismatch={_component_: rolltune.mismatch.MismatchLimit, max_k3: null, max_ratio_gap: null}",
        "max_outside: all are null",
    ),
    ("mismatch={_component_: rolltune.losses.grpo.GRPOLoss}", "must be a rolltune.mismatch.MismatchLimit"),
    (
        "loss={_component_: rolltune.mismatch.MismatchLimit}",
        "loss._component_: rolltune.mismatch.MismatchLimit; must be",
    ),
    (f"loss_scale={LOSS_SCALE}", "loss_scale: has no effect with model.dtype float32"),
    # rewards
    ("rewards.answer.weight=much", "rewards.answer.weight: 'much' (a string); must be a number"),
    ("rewards.answer.weight=.inf", "rewards.answer.weight: inf; must be finite"),
    ("rewards.a/b={_component_: rolltune.rewards.answer.answer_reward}", "rewards.a/b: a reward's name"),
    ("rewards.x={_component_: rolltune.losses.grpo.GRPOLoss, kl_coef: -1}", "rewards.x.kl_coef: -1"),
    (
        f"rewards.x={PAIRWISE.replace('PolicyJudge', 'PolicyJudge, temperature: -1')}",
        "rewards.x.judges[0].temperature: -1",
    ),
    (
        "rewards.x={_component_: rolltune.mismatch.MismatchLimit}",
        "rewards.x._component_: rolltune.mismatch.MismatchLimit",
    ),
    # sampling and batches
    ("sampling.group_size=1", "sampling.group_size: 1; must be >= 2"),
    ("sampling.temperature=0", "sampling.temperature: 0; must be > 0"),
    ("sampling.temperature=-1", "sampling.temperature: -1.0; must be >= 0"),
    ("sampling.top_p=0", "sampling.top_p: 0.0; must be in (0, 1]"),
    ("sampling.top_p=1.5", "sampling.top_p: 1.5; must be in (0, 1]"),
    ("sampling.top_k=1", "sampling.top_k: 1; must be 0 (no limit) or >= 2"),
    ("sampling.top_k=-1", "sampling.top_k: -1; must be >= 0"),
    ("sampling.max_new_tokens=0", "sampling.max_new_tokens: 0; must be >= 1"),
    ("sampling.stop=['']", "sampling.stop: holds an empty string"),
    ("batch.minibatches=3", "batch.prompts_per_step: 8; must be divisible by batch.minibatches (3)"),
    ("batch.minibatches=0", "batch.minibatches: 0; must be >= 1"),
    ("batch.dynamic_sampling_rounds=-1", "batch.dynamic_sampling_rounds: -1; must be >= 0"),
    ("batch.max_unscored=1.5", "batch.max_unscored: 1.5"),
    ("batch.microbatch_tokens=64", "batch.microbatch_tokens: 64"),
    # model and optimizer
    ("model.dtype=float16", "model.master_weights: false; must be true with model.dtype float16"),
    ("model.dtype=bfloat16", "model.master_weights: false; must be true with model.dtype bfloat16"),
    ("loss.dual_clip=1.1", "loss.dual_clip: 1.1; must be > 1 + clip_high"),
    ("model.fp32_head=true", "model.fp32_head: true; has no effect with model.dtype float32"),
    ("model.master_weights=true", "model.master_weights: true; has no effect with model.dtype float32"),
    (
        "model={path: smollm2-135m-instruct, batch_invariant: true, dtype: bfloat16, master_weights: true}",
        "model.batch_invariant: true; needs model.dtype float32",
    ),
    ("model.quantization=nf4", "model.quantization: nf4; weights in 4 bits cannot be trained; add a lora section"),
    ("model.path=gpt2", "model.path: gpt2: no such folder"),
    ("model.path=./nowhere/model", "model.path: ./nowhere/model: no such folder"),
    ("lora.rank=0", "lora.rank: 0; must be >= 1"),
    ("lora.dropout=1", "lora.dropout: 1.0; must be in [0, 1)"),
    ("optimizer.lr=0", "optimizer.lr: 0; must be > 0"),
    (
        "lr_scheduler.num_warmup_steps=11",
        "lr_scheduler.num_warmup_steps: 11; must be at most the run's optimizer steps",
    ),
    ("num_steps=0", "num_steps: 0; must be >= 1"),
    ("max_grad_norm=0", "max_grad_norm: 0.0; must be > 0"),
    # eval
    ("eval.every_n_steps=0", "eval.every_n_steps: 0; must be >= 1"),
    ("eval.max_new_tokens=0", "eval.max_new_tokens: 0; must be >= 1"),
    ("eval.correct={_component_: rolltune.rewards.answer.answer}", "rolltune.rewards.answer has no answer"),
    ("eval.correct.tiemout=1", "eval.correct.tiemout: answer_reward takes no such argument; did you mean eval.correct"),
    ("eval.lenient={_component_: rolltune.advantages.group_zscore}", "group_zscore takes 1 positional arguments"),
    (
        "eval.lenient={_component_: rolltune.rewards.length.cosine_length_reward, max_tokens: 9}",
        "eval.lenient._component_: rolltune.rewards.length.cosine_length_reward; must be a reward without the argument",
    ),
    (f"eval.correct={PAIRWISE}", "eval.correct: PairwiseReward compares"),
    (
        "eval.overoptimization={_component_: rolltune.losses.grpo.GRPOLoss}",
        "must be a rolltune.rewards.checks.overoptimization.OveroptimizationCheck",
    ),
    (overoptimization("reward: format"), "eval.overoptimization.gold: missing"),
    (
        overoptimization(f"reward: frmt, gold: {ANSWER}"),
        "eval.overoptimization.reward: frmt; must be one of rewards: ans",
    ),
    (overoptimization(f"reward: answer, gold: {ANSWER}"), "eval.overoptimization.gold: the same as rewards.answer"),
    (overoptimization(f"reward: format, gold: {ANSWER}, alarm_gap: 0"), "eval.overoptimization.alarm_gap: 0"),
    (
        overoptimization("reward: format, gold: {_component_: rolltune.nope}"),
        "eval.overoptimization.gold._component_: ",
    ),
    (
        overoptimization(f"reward: format, gold: {ANSWER}, max_problems: 300, min_problems: 201"),
        "eval.overoptimization.min_problems: 201; must be at most eval.max_problems, 200",
    ),
    (overoptimization(f"reward: answer, gold: {PAIRWISE}"), "eval.overoptimization.gold: PairwiseReward compares"),
    # the rest
    ("checkpoint.every_n_steps=0", "checkpoint.every_n_steps: 0; must be >= 1"),
    ("checkpoint.keep_last=0", "checkpoint.keep_last: 0; must be >= 1"),
    ("logging.samples_every_n_steps=0", "logging.samples_every_n_steps: 0; must be >= 1"),
    ("logging.wandb_project=mine", "logging.wandb_project: mine; has no effect while logging.wandb is false"),
    ("prompt.chat_template=no.jinja", "prompt.chat_template: no.jinja: no such file"),
    ("answer_format='{solution}'", "answer_format: '{solution}'; must have {answer}"),
    ("answer_format='{answer} {x}'", "answer_format: has {x}"),
    ("answer_format='{answer'", "answer_format: '{answer': "),
    ("prompt.prefill='<thinking>'", "must start with prompt.prefill, '<thinking>'"),
]


@pytest.mark.parametrize(("override", "fragment"), MISTAKES, ids=[override for override, _ in MISTAKES])
def test_one_mistake_is_one_message(grpo, override: str, fragment: str):
    (found,) = grpo(override)
    assert fragment in found


@pytest.mark.parametrize("override", ["sampling.top_p=0.9", "sampling.top_k=2", "sampling={top_k: 20, top_p: 0.95}"])
def test_training_may_truncate(grpo, override: str):
    assert grpo(override) == []


def test_batch_invariance_is_for_the_native_sampler_on_a_cpu(grpo):
    on = "model.batch_invariant=true"
    assert grpo(on, "device=cpu") == []
    (found,) = [text for text in grpo(on, "device=cuda") if text.startswith("model.batch_invariant")]
    assert "only on a CPU" in found
    (found,) = grpo(on, "lora.dropout=0.1")
    assert found.startswith("model.batch_invariant: true; needs lora.dropout 0")
    (found,) = grpo(on, "sampler={_component_: torch.optim.lr_scheduler.StepLR}")  # a class called with two arguments
    assert found.startswith("model.batch_invariant: true; needs the sampler rolltune.samplers.native.NativeSampler")


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("parallel.shard=3", "parallel.shard: 3; must divide the number of processes, 4"),
        ("parallel.shard=0", "parallel.shard: 0; must divide the number of processes, 4"),
        ("model={path: smollm2-135m-instruct, dtype: float16, master_weights: true}", "model.dtype: float16; is not"),
        ("model.batch_invariant=true", "model.batch_invariant: true; is not supported with parallel.weights fsdp"),
        ("model={path: smollm2-135m-instruct, quantization: nf4}", "model.quantization: nf4; is not supported with"),
        ("lora.dora=true", "lora.dora: true; is not supported with parallel.weights fsdp"),
        ("sampler={_component_: rolltune.samplers.vllm.served, lora: adapter}", "sampler.lora: adapter; is not"),
        ("optimizer={_component_: bitsandbytes.optim.AdamW8bit, lr: 1e-3}", "optimizer._component_: bitsandbytes"),
        ("optimizer={_component_: torch.optim.Adafactor, lr: 1e-3}", "optimizer._component_: torch.optim.Adafactor"),
    ],
)
def test_what_cannot_be_sharded_is_refused(grpo, override: str, problem: str):
    four = {"world_size": 4}
    assert grpo("parallel={weights: fsdp, shard: 2, cpu_offload: true}", **four) == []
    found = grpo("parallel.weights=fsdp", override, **four)
    assert [text for text in found if "parallel" in text and text.startswith(problem)], found


def test_options_of_shards_need_shards(grpo):
    problems = grpo("parallel={shard: 1, cpu_offload: true}")
    assert [text.partition(";")[0] for text in problems] == ["parallel.shard: 1", "parallel.cpu_offload: true"]
    (problem,) = grpo("parallel.weights=zero")
    assert "parallel.weights: zero" in problem or "parallel.weights: 'zero'" in problem


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "sampler.lora: adapter; the run has no lora section"),
        (["lora.dora=true"], "lora.dora: true; must be false with sampler.lora: adapter, as vLLM does not serve DoRA"),
        (["lora.experts=true"], "lora.experts: true; must be false with sampler.lora: adapter"),
        (["lora.rank=600"], "lora.rank: 600; must be <= 512 with sampler.lora: adapter"),
        (["lora.rank=4", "sampler.transfer=nccl"], "sampler.transfer: nccl; must be files with sampler.lora: adapter"),
        (["lora.rank=4", "sampler.lora=both"], "sampler.lora: 'both'"),
    ],
)
def test_adapters_that_vllm_does_not_serve_are_refused(grpo, monkeypatch, overrides, message):
    monkeypatch.setattr("rolltune.endpoints.serving.installed_version", lambda: "0.32.0")
    sampler = "sampler={_component_: rolltune.samplers.vllm.served, lora: adapter}"
    (found,) = grpo(sampler, *overrides)
    assert found.startswith(message), found
    assert grpo(sampler, "lora.rank=512") == []


def test_kinds_of_adapters_that_contradict(grpo):
    (found,) = grpo("lora.dora=true", "lora.experts=true")
    assert found.startswith("lora.dora: true; must be false with lora.experts")
    (found,) = grpo("lora.dora=true", "model.batch_invariant=true")
    assert found.startswith("lora.dora: true; must be false with model.batch_invariant")


def test_an_overoptimization_check(grpo):
    assert grpo(overoptimization(f"reward: format, gold: {ANSWER}")) == []


def test_settings_that_contradict(grpo):
    bfloat16 = ("model.dtype=bfloat16", "model.master_weights=true")
    assert grpo(*bfloat16) == []
    (found,) = grpo(*bfloat16, "lora.rank=4")
    assert found.startswith("model.master_weights: true; has no effect with lora")
    (found,) = grpo("data.heldout=${data.train}")
    assert found.startswith("data.heldout: the same as data.train")
    (found,) = grpo("~rewards.format", "rewards.answer.weight=0")
    assert found.startswith("rewards: every weight is 0 (answer)")
    (found,) = grpo("~rewards")
    assert found.startswith("rewards: none")
    assert len(grpo("~rewards.format", "rewards.answer.weight=0", "~rewards.answer._component_")) == 2
    assert grpo("logging.wandb=true", "logging.wandb_project=mine") == []
    assert grpo("lr_scheduler.num_warmup_steps=11", "batch.minibatches=2") == [], "20 updates"


def test_reinforce_has_no_ratio(grpo):
    loss = "loss=rolltune.losses.reinforce.ReinforceLoss"
    assert grpo(loss) == []
    (found,) = grpo(loss, "batch.num_iterations=2")
    assert found.startswith("loss._component_: ReinforceLoss has no ratio")
    (found,) = grpo(loss, "old_policy=sampler")
    assert found.startswith("old_policy: sampler; has no effect with ReinforceLoss")


@pytest.mark.parametrize("name", ["TokenTIS", "TokenMask", "SequenceTIS", "SequenceMIS"])
def test_weights_do_not_go_with_the_ratio_to_the_sampler(grpo, name):
    (found,) = grpo("old_policy=sampler", correction(name))
    assert found.startswith(f"correction._component_: {name}; must be GeometricRejection or K3Rejection")
    assert grpo("old_policy=sampler", correction("GeometricRejection")) == grpo("old_policy=sampler") == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("init_scale: 1000", "loss_scale.init_scale: 1000; must be a power of two"),
        ("init_scale: 0.5", "loss_scale.init_scale: 0.5; must be a power of two"),
        ("init_scale: .inf", "loss_scale.init_scale: inf; must be a power of two"),
        ("growth_interval: 0", "loss_scale.growth_interval: 0; must be >= 1"),
        ("growth: 2", "loss_scale.growth: LossScale takes no such argument"),
    ],
)
def test_float16_has_a_loss_scale(grpo, arguments: str, message: str):
    half = ("model.dtype=float16", "model.master_weights=true", "model.fp32_head=true")
    (found,) = grpo(*half, f"loss_scale={{_component_: rolltune.loss_scale.LossScale, {arguments}}}")
    assert found.startswith(message)
    (found,) = grpo(*half, "loss_scale={_component_: rolltune.losses.grpo.GRPOLoss}")
    assert "must be a rolltune.loss_scale.LossScale" in found


def test_float16_needs_master_weights_or_adapters(grpo):
    half = ("model.dtype=float16", "model.master_weights=true", "model.fp32_head=true")
    assert grpo(*half) == grpo(*half, f"loss_scale={LOSS_SCALE}") == []
    assert grpo("model.dtype=float16", "lora.rank=4", f"loss_scale={LOSS_SCALE}") == []


def test_four_bits_need_adapters_and_have_no_batch_invariant_products(grpo):
    assert grpo("model.quantization=nf4", "lora.rank=4") == []
    (found,) = grpo("model.quantization=nf4", "lora.rank=4", "model.batch_invariant=true")
    assert found.startswith("model.batch_invariant: true; needs model.quantization null")


def test_number_of_processes(grpo, monkeypatch: pytest.MonkeyPatch):
    assert grpo("batch.minibatches=2", world_size=4) == []
    assert "batch.minibatches (2) x 8 processes" in grpo("batch.minibatches=2", world_size=8)[0]
    for name, value in {"WORLD_SIZE": "3", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    assert "x 3 processes" in grpo(world_size=None)[0]


def test_context_of_a_local_model(grpo, evaluate, tmp_path: Path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 64}))
    (found,) = evaluate(f"models.1.path={tmp_path / 'model'}")
    assert found.startswith("sampling.max_new_tokens: 256") and "models[1].path, 64 tokens" in found
    path = f"model.path={tmp_path / 'model'}"
    (found,) = grpo(path)
    assert found.startswith("sampling.max_new_tokens: 64") and "model.path, 64 tokens" in found
    assert grpo(path, "sampling.max_new_tokens=32") == []


def test_cuda_without_cuda(grpo, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (found,) = grpo("device=cuda")
    assert found.startswith("device: cuda; torch finds no CUDA device")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert grpo("device=cuda") == []


def test_output_dir_is_a_file(grpo, grpo_yaml: Path):
    assert grpo(f"output_dir={grpo_yaml}") == [f"output_dir: {grpo_yaml}: is a file; give a folder that can be written"]


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/proc/rolltune", "No such file or directory"),
        ("/sys/rolltune", ""),
        ("file/below", ""),
        ("file", "is a file"),
        ("dangling", "dangling leads nowhere, to nowhere"),
        ("caf\udcc3\udca9", "cannot read it in this locale: export PYTHONUTF8=1"),
        ("dangling/below", "dangling leads nowhere, to nowhere"),
        ("x" * 300, "File name too long"),
    ],
)
def test_an_output_dir_that_cannot_be_made(grpo, tmp_path, monkeypatch, path: str, reason: str):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to("nowhere")
    (found,) = grpo(f"output_dir={path}")
    assert found.startswith(f"output_dir: {path}: ") and reason in found and "give a folder" in found
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(("file", ".rolltune", "x"))) == ["file"]


def test_an_output_dir_that_can_be_made_is_not_made(grpo, tmp_path):
    assert grpo(f"output_dir={tmp_path}/a/b") == []
    assert not (tmp_path / "a").exists()
