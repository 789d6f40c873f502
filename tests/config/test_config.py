"""Configs: what loads, and what a user is told of each mistake."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from repo import ROOT

from rolltune import config
from rolltune.config import schema
from rolltune.config.command_line import Arguments
from rolltune.config.components import check_component, component, instantiate, locate
from rolltune.errors import ConfigError
from rolltune.run import checks

VALID = """\
# tune run grpo --config valid.yaml
output_dir: outputs/test
model: {path: smollm2-135m-instruct}
data:
  train: {_component_: rolltune.data.sums.sums, count: 40, seed: 0, split: train}
  heldout: {_component_: rolltune.data.sums.sums, count: 8, seed: 0, split: heldout}
rewards:
  answer: {_component_: rolltune.rewards.answer.answer_reward, weight: 1.0}
  format: {_component_: rolltune.rewards.format.format_reward, weight: 0.2}
sampling: {group_size: 4, max_new_tokens: 64, stop: ["</answer>"]}
sampler: {_component_: rolltune.samplers.native.NativeSampler}
advantage: {_component_: rolltune.advantages.group_zscore}
loss: {_component_: rolltune.losses.grpo.GRPOLoss, kl_coef: 1e-3}
optimizer: {_component_: torch.optim.AdamW, lr: 1e-6, betas: [0.9, 0.95]}
lr_scheduler:
  _component_: torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup
  num_warmup_steps: 2
num_steps: 10
"""

PRIME = """\
output_dir: outputs/test
model: {path: smollm2-135m-instruct}
data:
  train: {_component_: rolltune.data.sums.sums, count: 40, seed: 0, split: train}
  heldout: {_component_: rolltune.data.sums.sums, count: 8, seed: 0, split: heldout}
optimizer: {_component_: torch.optim.AdamW, lr: 1e-4}
num_steps: 5
"""

AUDIT = """\
output_dir: outputs/test
data: {_component_: rolltune.data.sums.sums, count: 8, seed: 0, split: heldout}
rewards:
  answer: {_component_: rolltune.rewards.answer.answer_reward}
"""


EVALUATE = """\
output_dir: outputs/test
models:
  - {name: base, path: smollm2-135m-instruct}
  - {name: rl.step_10, path: meta-llama/Llama-3.2-1B-Instruct}
data: {_component_: rolltune.data.sums.sums, count: 8, seed: 0, split: heldout}
sampling: {samples: 8}
sampler: {_component_: rolltune.samplers.native.NativeSampler}
"""


GOLD = "_component_: rolltune.rewards.checks.overoptimization.OveroptimizationCheck"
ANSWER = "{_component_: rolltune.rewards.answer.answer_reward}"
LOSS_SCALE = "{_component_: rolltune.loss_scale.LossScale}"
JUDGE = "{_component_: rolltune.rewards.judges.policy.PolicyJudge}"
PAIRWISE = f"{{_component_: rolltune.rewards.rubric.pairwise.PairwiseReward, judges: [{JUDGE}]}}"


@pytest.fixture
def valid(tmp_path: Path) -> Path:
    path = tmp_path / "valid.yaml"
    path.write_text(VALID)
    return path


def problems_of(path: Path, *overrides: str, recipe: type = schema.GRPOConfig, world_size: int = 1) -> list[str]:
    try:
        checks.validate(recipe, path, overrides, world_size=world_size)
    except ConfigError as error:
        return error.problems
    return []


# --- what loads -------------------------------------------------------------------------------------------------------


def test_valid_config_loads_typed(valid: Path):
    cfg = checks.validate(schema.GRPOConfig, valid)
    assert isinstance(cfg, schema.GRPOConfig) and isinstance(cfg.sampling, schema.SamplingConfig)
    assert cfg.optimizer == {"_component_": "torch.optim.AdamW", "lr": 1e-6, "betas": [0.9, 0.95]}
    assert cfg.loss["kl_coef"] == 1e-3 and isinstance(cfg.loss["kl_coef"], float)
    assert cfg.sampling.stop == ["</answer>"] and cfg.sampling.temperature == 1.0
    assert cfg.lora is None and cfg.num_steps == 10


@pytest.mark.parametrize(
    ("text", "recipe"),
    [(PRIME, schema.SFTConfig), (AUDIT, schema.AuditRewardsConfig), (EVALUATE, schema.EvaluateConfig)],
)
def test_other_recipes_configs_load(tmp_path: Path, text: str, recipe: type):
    path = tmp_path / "other.yaml"
    path.write_text(text)
    assert problems_of(path, recipe=recipe) == []


@pytest.mark.parametrize("text", ["1e-6", "1E-6", "1.0e-6", "0.000001", "+1e-06"])
def test_small_floats_are_numbers_everywhere(valid: Path, text: str):
    cfg = config.load(schema.GRPOConfig, valid, [f"optimizer.lr={text}", f"max_grad_norm={text}"])
    assert cfg.optimizer["lr"] == cfg.max_grad_norm == 1e-6


def test_overrides(valid: Path):
    cfg = config.load(
        schema.GRPOConfig,
        valid,
        [
            "num_steps=3",
            "lora.rank=4",
            "lora.alpha=8",
            'sampling.stop=["a","b"]',
            "sampling.stop.1=c",
            "prompt.system=a=b c",
            "prompt.prefill=",
            "loss=rolltune.losses.dapo.DAPOLoss",
            "~loss.kl_coef",
            "advantage={_component_: rolltune.advantages.group_mean}",
            "batch={minibatches: 2}",
            "lr_scheduler=null",
            "dry_run=true",
        ],
    )
    assert cfg.num_steps == 3 and cfg.dry_run is True
    assert cfg.lora == schema.LoRAConfig(rank=4, alpha=8.0, dropout=0.0) and repr(cfg.lora).count("alpha=8.0") == 1
    assert cfg.sampling.stop == ["a", "c"] and cfg.prompt.system == "a=b c" and cfg.prompt.prefill == ""
    assert cfg.loss == {"_component_": "rolltune.losses.dapo.DAPOLoss"}
    assert cfg.advantage == {"_component_": "rolltune.advantages.group_mean"}
    assert cfg.batch.minibatches == 2 and cfg.batch.prompts_per_step == 8
    assert cfg.lr_scheduler is None


def test_interpolations_and_environment(valid: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ROLLTUNE_STEPS", "7")
    monkeypatch.setenv("ROLLTUNE_LR", "3e-5")
    cfg = config.load(
        schema.GRPOConfig,
        valid,
        [
            "num_steps=${oc.env:ROLLTUNE_STEPS}",
            "optimizer.lr=${oc.decode:${oc.env:ROLLTUNE_LR}}",
            "eval.max_new_tokens=${sampling.max_new_tokens}",
            "eval.max_problems=${batch.prompts_per_step}",
            "logging.wandb_project=${output_dir}/x",
        ],
    )
    assert cfg.num_steps == 7 and cfg.optimizer["lr"] == 3e-5
    assert cfg.eval.max_new_tokens == 64
    assert cfg.eval.max_problems == 8, "a default can be referred to"
    assert cfg.logging.wandb_project == "outputs/test/x"


def test_escaped_interpolation_stays_text(valid: Path):
    assert config.load(schema.GRPOConfig, valid, [r"prompt.system=say \${x}"]).prompt.system == "say ${x}"


def test_what_is_saved_is_read(valid: Path, tmp_path: Path):
    folder = tmp_path / "new/run"
    assert config.read_saved(folder) is None
    cfg = config.load(schema.GRPOConfig, valid, ["prompt.system='1e-3'"])  # text, though it looks like a number
    config.save(cfg, folder)
    config.save(cfg, folder)
    assert config.read_saved(folder) == dataclasses.asdict(cfg)
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"seed: 0\nmodel: [\n", r"config\.yaml, line 3: "),
        (b"", r"config\.yaml: holds no config"),
        (b"- a\n", r"config\.yaml: holds no config"),
        (b"a: \xff\n", r"config\.yaml: is no UTF-8 text"),
    ],
)
def test_a_broken_saved_config_is_named(tmp_path: Path, content: bytes, fragment: str):
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=f"^{tmp_path}/{fragment}.*; mend it, or choose another output_dir$"):
        config.read_saved(tmp_path)


def test_dump_loads_to_the_same(valid: Path, tmp_path: Path):
    cfg = config.load(schema.GRPOConfig, valid, ["lora.rank=4", "prompt.few_shot=[{user: a, assistant: 'b: c'}]"])
    again = tmp_path / "again.yaml"
    again.write_text(config.dump(cfg))
    assert config.load(schema.GRPOConfig, again) == cfg


# --- what a user is told ----------------------------------------------------------------------------------------------

MISTAKES = [
    # keys
    ("sampling.temprature=1", "sampling.temprature: no such key; did you mean sampling.temperature?"),
    ("smpling={}", "smpling: no such key; did you mean sampling?"),
    ("group_size=8", "group_size: no such key; did you mean sampling.group_size?"),
    ("lr=1e-5", "lr: no such key; did you mean optimizer.lr?"),
    ("max_steps=3", "max_steps: no such key; did you mean num_steps?"),
    ("lora.rnk=3", "lora.rnk: no such key; did you mean lora.rank?"),
    ("checkpoint.zzz=3", "checkpoint.zzz: no such key; keys here: every_n_steps, keep_last"),
    ("prompt.few_shot=[{user: a, assistant: b, sistant: c}]", "prompt.few_shot[0].sistant: no such key; did you mean"),
    # types
    ("num_steps=ten", "num_steps: 'ten' is a string; an integer is wanted"),
    ("num_steps=1.5", "num_steps: 1.5; an integer is wanted"),
    ("seed=true", "seed: true; an integer is wanted"),
    ("seed=null", "seed: null; an integer is wanted"),
    ("seed.x=1", "seed: a mapping (x); an integer is wanted"),
    ("resume=maybe", "resume: 'maybe' is a string; true or false is wanted"),
    ("output_dir=123", "output_dir: 123; a string is wanted (put it in quotes)"),
    ("eval.max_new_tokens=None", "an integer or null is wanted (null, not None)"),
    ("sampling.stop=x", "sampling.stop: 'x' is a string; a list of strings is wanted"),
    ("sampling.stop=[1]", "sampling.stop[0]: 1; a string is wanted"),
    ("sampling.group_size=[4]", "sampling.group_size: a list of 1; an integer is wanted"),
    ("max_grad_norm=.nan", "max_grad_norm: nan; a number is wanted"),
    ("model=gpt", "model: 'gpt' is a string; a mapping with keys of path, dtype"),
    ("loss=3", "loss: 3; a component (a mapping with _component_ and its arguments) is wanted"),
    ("output_dir=???", "output_dir: missing; a string is wanted"),
    # overrides and interpolations
    ("nonsense", "nonsense: not of the form key=value"),
    ("num_steps=[1", "num_steps: [1 is no YAML value"),
    ("~nothing.here", "~nothing.here: the config has no nothing.here to leave out"),
    ("sampling.stop.5=x", "sampling.stop.5: the list has 1 items"),
    ("num_steps=${nope}", "num_steps: interpolation key 'nope' not found"),
    ("num_steps=${oc.env:ROLLTUNE_NOT_SET}", "num_steps: environment variable 'ROLLTUNE_NOT_SET' not found"),
    ("loss.kl_coef=${oc.env:ROLLTUNE_NOT_SET}", "loss.kl_coef: environment variable"),
    # components
    ("loss=GRPOLoss", "loss._component_: GRPOLoss: not a dotted path"),
    ("loss=rolltune.losses.grpo.GRPOLos", "rolltune.losses.grpo has no GRPOLos; did you mean GRPOLoss?"),
    ("loss=rolltune.losses.grp.GRPOLoss", "rolltune.losses has no grp; did you mean grpo?"),
    ("loss=roltune.losses.grpo.GRPOLoss", "no module roltune here, on PYTHONPATH or among rolltune"),
    ("loss=losses.grpo.GRPOLoss", "did you mean rolltune.losses.grpo.GRPOLoss?"),
    ("loss=os.system", "os is not one of rolltune, torchtune, torch, nor a module of yours"),
    ("loss=rolltune.losses.grpo", "rolltune.losses.grpo is a module; a class or a function is wanted"),
    ("~loss._component_", "loss: no _component_; it names the class or function"),
    ("loss.beta=0.1", "loss.beta: GRPOLoss takes no such argument; it takes clip_high, clip_low, kl_coef"),
    ("loss.klcoef=0.1", "loss.klcoef: GRPOLoss takes no such argument; did you mean loss.kl_coef?"),
    ("loss.kl_coef=0.1x", "loss.kl_coef: '0.1x' is a string; a number is wanted"),
    ("loss.kl_coef='0.1'", "'0.1' is a string; a number is wanted (without quotes; from the environment: ${oc.decode"),
    ("loss.kl_coef=true", "loss.kl_coef: true; a number is wanted"),
    ("loss.kl_coef=-1", "loss.kl_coef: -1"),
    ("loss=rolltune.losses.dr_grpo.DrGRPOLoss", "loss.max_completion_tokens: missing; DrGRPOLoss needs it"),
    ("data.train.count=1.5", "data.train.count: 1.5; an integer is wanted"),
    ("data.train.cuont=1", "data.train.cuont: sums takes no such argument; did you mean data.train.count?"),
    ("optimizer.betas=3", "optimizer.betas: 3; a list of 2 is wanted"),
    ("optimizer.lr=0.1x", "optimizer.lr: '0.1x' is a string; a number is wanted"),
    ("optimizer.params=[]", "optimizer.params: the recipe passes it to AdamW; leave it out"),
    ("lr_scheduler.num_training_steps=5", "lr_scheduler.num_training_steps: the recipe passes it"),
    (
        "lr_scheduler={_component_: torch.optim.lr_scheduler.ConstantLR}",
        "ConstantLR takes no num_training_steps, which the recipe passes to it",
    ),
    ("advantage=rolltune.rewards.answer.is_correct", "advantage.text: missing; is_correct needs it"),
    ("rewards.answer.completion=1", "rewards.answer.completion: answer_reward takes no such argument"),
    (
        "rewards.length={_component_: rolltune.rewards.length.cosine_length_reward, max_tokens: 9, completion: 1}",
        "rewards.length.completion: the recipe passes it to cosine_length_reward",
    ),
    ("advantage.eps=0", "advantage.eps: 0, must be > 0"),
    (
        "correction={_component_: rolltune.corrections.TokenTIS, max_rato: 2}",
        "correction.max_rato: TokenTIS takes no such argument; did you mean correction.max_ratio?",
    ),
    ("correction={_component_: rolltune.corrections.TokenTIS, max_ratio: 0.5}", "correction.max_ratio: 0.5, must be"),
    ("correction={_component_: rolltune.corrections.TokenMask, low: 2}", "correction.low: 2, must be in [0, 1]"),
    ("correction={_component_: rolltune.advantages.group_zscore}", "group_zscore takes 1 positional arguments"),
    ("correction={_component_: rolltune.corrections.bounded}", "bounded takes 1 positional arguments"),
    (
        "correction={_component_: rolltune.corrections.Bypass, rejection: "
        "{_component_: rolltune.corrections.TokenTIS}}",
        "correction.rejection: rolltune.corrections.TokenTIS weighs by pi_old / mu, which the ratio to the sampler "
        "holds already: it would be counted twice",
    ),
    (
        "correction={_component_: rolltune.corrections.Bypass, rejection: "
        "{_component_: rolltune.corrections.K3Rejection, max_k3: 0}}",
        "correction.rejection: rolltune.corrections.K3Rejection: max_k3: 0, must be > 0",
    ),
    ("mismatch={_component_: rolltune.mismatch.MismatchLimit, max_k3: 0}", "mismatch.max_k3: 0, must be > 0"),
    (
        "mismatch={_component_: rolltune.mismatch.MismatchLimit, max_k3: null, max_ratio_gap: null}",
        "mismatch.max_k3, max_ratio_gap and max_outside are null: nothing would be looked at",
    ),
    ("mismatch={_component_: rolltune.losses.grpo.GRPOLoss}", "rolltune.mismatch.MismatchLimit is wanted"),
    # values
    ("rewards.answer.weight=much", "rewards.answer.weight: 'much' is a string; a number is wanted"),
    ("rewards.answer.weight=.inf", "rewards.answer.weight: inf; a finite number is wanted"),
    ("rewards.a/b={_component_: rolltune.rewards.answer.answer_reward}", "rewards.a/b: a reward's name"),
    ("sampling.group_size=1", "sampling.group_size: 1; a group of one has no baseline"),
    ("sampling.temperature=0", "sampling.temperature: 0.0; must be > 0"),
    ("sampling.top_p=0", "sampling.top_p: 0.0; must be in (0, 1]"),
    ("sampling.top_p=1.5", "sampling.top_p: 1.5; must be in (0, 1]"),
    ("sampling.top_k=1", "sampling.top_k: 1; leaves nothing to choose, so nothing would be learnt"),
    ("sampling.top_k=-1", "sampling.top_k: -1; must be >= 0"),
    ("sampling.max_new_tokens=0", "sampling.max_new_tokens: 0; must be >= 1"),
    ("sampling.stop=['']", "sampling.stop: holds an empty string"),
    ("batch.minibatches=3", "batch.prompts_per_step: 8; must be divisible by batch.minibatches (3)"),
    ("batch.minibatches=0", "batch.minibatches: 0; must be >= 1"),
    ("batch.dynamic_sampling_rounds=-1", "batch.dynamic_sampling_rounds: -1; must be >= 0"),
    ("batch.max_unscored=1.5", "batch.max_unscored: 1.5; a share in 0 .. 1 is wanted"),
    (
        "batch.microbatch_tokens=64",
        "batch.microbatch_tokens: 64; a prompt and a completion of sampling.max_new_tokens (64)",
    ),
    ("model.dtype=float8", "model.dtype: 'float8' is a string; one of float32, bfloat16, float16 is wanted"),
    ("model.dtype=float16", "model.master_weights: false; must be true with model.dtype float16"),
    ("model.fp32_head=true", "model.fp32_head: true; does nothing with model.dtype float32"),
    (f"loss_scale={LOSS_SCALE}", "loss_scale: does nothing with model.dtype float32"),
    ("model.master_weights=true", "model.master_weights: true; does nothing with model.dtype float32"),
    (
        "model={path: smollm2-135m-instruct, batch_invariant: true, dtype: bfloat16}",
        "needs model.dtype float32, not bfloat16",
    ),
    ("model.path=gpt2", "model.path: gpt2: no such folder; give a model folder, a Hub id"),
    ("model.path=./nowhere/model", "model.path: ./nowhere/model: no such folder"),
    ("lora.rank=0", "lora.rank: 0; must be >= 1"),
    ("lora.dropout=1", "lora.dropout: 1.0; must be in [0, 1)"),
    ("device=gpu", "device: 'gpu' is a string; one of auto, cpu, cuda is wanted"),
    ("optimizer.lr=0", "optimizer.lr: 0; must be > 0"),
    ("lr_scheduler.num_warmup_steps=11", "lr_scheduler.num_warmup_steps: 11; the run has 10 optimizer steps"),
    ("num_steps=0", "num_steps: 0; must be >= 1"),
    ("max_grad_norm=0", "max_grad_norm: 0.0; must be > 0"),
    ("eval.every_n_steps=0", "eval.every_n_steps: 0; must be >= 1"),
    ("eval.max_new_tokens=0", "eval.max_new_tokens: 0; must be >= 1"),
    ("eval.correct={_component_: rolltune.rewards.answer.answer}", "rolltune.rewards.answer has no answer"),
    ("eval.correct.tiemout=1", "eval.correct.tiemout: answer_reward takes no such argument; did you mean eval.correct"),
    ("eval.lenient={_component_: rolltune.advantages.group_zscore}", "group_zscore takes 1 positional arguments"),
    (
        "eval.lenient={_component_: rolltune.rewards.length.cosine_length_reward, max_tokens: 9}",
        "cosine_length_reward takes the completion; a turn is judged by its text alone here",
    ),
    (
        "eval.overoptimization={_component_: rolltune.losses.grpo.GRPOLoss}",
        "rolltune.rewards.checks.overoptimization.OveroptimizationCheck is wanted",
    ),
    (
        f"eval.overoptimization={{{GOLD}, reward: format}}",
        "eval.overoptimization.gold: missing; OveroptimizationCheck needs it",
    ),
    (
        f"eval.overoptimization={{{GOLD}, reward: frmt, gold: {ANSWER}}}",
        "eval.overoptimization.reward: frmt; one of rewards is wanted: answer",
    ),
    (
        f"eval.overoptimization={{{GOLD}, reward: answer, gold: {ANSWER}}}",
        "eval.overoptimization.gold: the same as rewards.answer, which would",
    ),
    (
        f"eval.overoptimization={{{GOLD}, reward: format, gold: {ANSWER}, alarm_gap: 0}}",
        "eval.overoptimization.alarm_gap: 0; must be > 0",
    ),
    (
        f"eval.overoptimization={{{GOLD}, reward: format, gold: {{_component_: rolltune.nope}}}}",
        "eval.overoptimization.gold._component_: rolltune",
    ),
    (
        f"eval.overoptimization={{{GOLD}, reward: format, gold: {ANSWER}, max_problems: 300, min_problems: 201}}",
        "eval.overoptimization.min_problems: 201; eval.max_problems is 200, so nothing would ever be compared",
    ),
    (
        f"eval.correct={PAIRWISE}",
        "eval.correct: PairwiseReward compares turns of a group, and a held-out problem has one",
    ),
    (
        f"eval.overoptimization={{{GOLD}, reward: answer, gold: {PAIRWISE}}}",
        "eval.overoptimization.gold: PairwiseReward compares turns of a",
    ),
    ("checkpoint.every_n_steps=0", "checkpoint.every_n_steps: 0; must be >= 1"),
    ("checkpoint.keep_last=0", "checkpoint.keep_last: 0; must be >= 1"),
    ("logging.samples_every_n_steps=0", "logging.samples_every_n_steps: 0; must be >= 1"),
    ("logging.classified_samples=4", "logging.classified_samples: 4; does nothing while logging.classifier is null"),
    ("logging.wandb_project=mine", "logging.wandb_project: mine; does nothing while logging.wandb is false"),
    ("prompt.chat_template=no.jinja", "prompt.chat_template: no.jinja: no such file"),
    ("answer_format='{solution}'", "answer_format: '{solution}' has no {answer}"),
    ("answer_format='{answer} {x}'", "answer_format: has {x}; {solution} and {answer} are filled in"),
    ("answer_format='{answer'", "answer_format: '{answer': "),
    ("prompt.prefill='<thinking>'", "does not start with prompt.prefill, '<thinking>'"),
]


@pytest.mark.parametrize(("override", "fragment"), MISTAKES, ids=[override for override, _ in MISTAKES])
def test_one_mistake_is_one_message(valid: Path, override: str, fragment: str):
    problems = problems_of(valid, override)
    assert len(problems) == 1 and fragment in problems[0], problems


EVALUATE_MISTAKES = [
    ("models=[]", "models: none; give one at least: [{name: base, path: ...}]"),
    ("models.1.name=base", "models[1].name: base; models[0] has that name already"),
    ("models.1.name=a/b", "models[1].name: 'a/b'; a file is named after it: letters, digits, . _ + - are wanted"),
    ("models.0.name=..", "models[0].name: '..'; a file is named after it"),
    ("models.0.name=", "models[0].name: ''; a file is named after it"),
    ("models.0.path=gpt2", "models[0].path: gpt2: no such folder; give a model folder, a Hub id"),
    ("models.1.path=./nowhere", "models[1].path: ./nowhere: no such folder"),
    ("models=[{name: x}]", "models[0].path: missing; a string is wanted"),
    ("models.1.pth=x", "models[1].pth: no such key; did you mean models[1].path?"),
    ("dtype=half", "dtype: 'half' is a string; one of float32, bfloat16, float16 is wanted"),
    ("device=gpu", "device: 'gpu' is a string; one of auto, cpu, cuda is wanted"),
    ("max_problems=0", "max_problems: 0; must be >= 1"),
    ("sampling.samples=0", "sampling.samples: 0; must be >= 1"),
    ("sampling.temperature=-1", "sampling.temperature: -1.0; must be >= 0"),
    ("sampling.temperature=0", "sampling.temperature: 0; all 8 samples of a problem would be the same: must be > 0"),
    ("sampling={samples: 1, temperature: 0, top_k: 5}", "sampling.temperature: 0; top_p and top_k do nothing then"),
    ("sampling.top_p=0", "sampling.top_p: 0.0; must be in (0, 1]"),
    ("sampling.top_k=-1", "sampling.top_k: -1; must be >= 0"),
    ("sampling.max_new_tokens=0", "sampling.max_new_tokens: 0; must be >= 1"),
    ("sampling.stop=['']", "sampling.stop: holds an empty string"),
    ("ks=[1, 9]", "ks[1]: 9; must be in 1 .. sampling.samples, 8"),
    ("ks=[0]", "ks[0]: 0; must be in 1 .. sampling.samples, 8"),
    ("ks=[2, 1, 2]", "ks[2]: 2; stands there twice"),
    ("ks=[1.5]", "ks[0]: 1.5; an integer is wanted"),
    ("resamples=99", "resamples: 99; must be >= 100"),
    ("classified_samples=7", "classified_samples: 7; does nothing while classifier is null"),
    ("classified_samples=0", "classified_samples: 0; does nothing while classifier is null"),
    ("classifier={_component_: rolltune.nothing.Classifier}", "rolltune has no nothing"),
    ("correct={_component_: rolltune.rewards.answer.answer_rewrd}", "has no answer_rewrd; did you mean answer_reward?"),
    ("lenient={_component_: rolltune.losses.grpo.GRPOLoss}", "GRPOLoss takes 0 positional arguments"),
    (
        "format={_component_: rolltune.rewards.length.cosine_length_reward, max_tokens: 9}",
        "format._component_: rolltune.rewards.length.cosine_length_reward takes the completion",
    ),
    (
        "sampler.max_num_seq=3",
        "sampler.max_num_seq: NativeSampler takes no such argument; did you mean sampler.max_num_seqs?",
    ),
    (
        "sampler={_component_: rolltune.samplers.vllm.served, transfer: carrier_pigeon}",
        "sampler.transfer: carrier_pigeon; one of files, nccl is wanted",
    ),
    ("sampler={_component_: rolltune.samplers.vllm.colocated, max_num_seq: 3}", "did you mean sampler.max_num_seqs?"),
    ("data.cuont=1", "data.cuont: sums takes no such argument; did you mean data.count?"),
    ("prompt.chat_template=no.jinja", "prompt.chat_template: no.jinja: no such file"),
    ("seed=-1", "seed: -1; must be >= 0"),
]


@pytest.mark.parametrize(
    ("override", "fragment"), EVALUATE_MISTAKES, ids=[override for override, _ in EVALUATE_MISTAKES]
)
def test_one_mistake_of_an_evaluation_is_one_message(tmp_path: Path, override: str, fragment: str):
    path = tmp_path / "evaluate.yaml"
    path.write_text(EVALUATE)
    problems = problems_of(path, override, recipe=schema.EvaluateConfig)
    assert len(problems) == 1 and fragment in problems[0], problems


@pytest.mark.parametrize("override", ["sampling.top_p=0.9", "sampling.top_k=2", "sampling={top_k: 20, top_p: 0.95}"])
def test_training_may_truncate(valid: Path, override: str):
    assert problems_of(valid, override) == []


@pytest.mark.parametrize(
    "override",
    ["sampling={samples: 1, temperature: 0}", "ks=[8, 1]", "sampling.top_p=0.9", "sampling.top_k=50", "resamples=100"],
)
def test_what_an_evaluation_may_do(tmp_path: Path, override: str):
    path = tmp_path / "evaluate.yaml"
    path.write_text(EVALUATE)
    assert problems_of(path, override, recipe=schema.EvaluateConfig) == []


def test_prime_measures_no_accuracy(tmp_path: Path):
    path = tmp_path / "sft.yaml"
    path.write_text(PRIME)
    judge = "{_component_: rolltune.rewards.countdown.countdown_reward}"
    (found,) = problems_of(path, f"eval.correct={judge}", recipe=schema.SFTConfig)
    assert found.startswith("eval.correct: does nothing here: the held-out measure of this recipe is the loss")
    (found,) = problems_of(path, f"eval.lenient={judge}", recipe=schema.SFTConfig)
    assert found.startswith("eval.lenient: does nothing here")


def test_batch_invariance_is_for_the_native_sampler_on_a_cpu(tmp_path: Path, valid: Path):
    on = "model.batch_invariant=true"
    assert problems_of(valid, on, "device=cpu") == []
    found = [text for text in problems_of(valid, on, "device=cuda") if text.startswith("model.batch_invariant")]
    assert len(found) == 1 and "works on a CPU alone" in found[0]
    (found,) = problems_of(valid, on, "lora.dropout=0.1")
    assert found.endswith("the sampler has no dropout, so lora.dropout must be 0")
    mine = "rolltune.samplers.sequences.EndOfText"  # another class
    found = problems_of(valid, on, f"sampler={{_component_: {mine}, stop: [], max_new_tokens: 1}}")
    assert found == ["model.batch_invariant: true; the sampler must be rolltune.samplers.native.NativeSampler"]
    path = tmp_path / "sft.yaml"
    path.write_text(PRIME)
    (found,) = problems_of(path, on, recipe=schema.SFTConfig)
    assert found == "model.batch_invariant: true; does nothing in sft, which samples nothing; leave it out"


def test_a_gold_check_is_for_what_samples(tmp_path: Path, valid: Path):
    gold = f"eval.overoptimization={{{GOLD}, reward: format, gold: {ANSWER}}}"
    assert problems_of(valid, gold) == []
    path = tmp_path / "sft.yaml"
    path.write_text(PRIME)
    (found,) = problems_of(path, gold, recipe=schema.SFTConfig)
    assert found.startswith("eval.overoptimization: does nothing here")


def test_several_settings_that_contradict(valid: Path):
    assert problems_of(valid, "model.dtype=bfloat16", "model.master_weights=true") == []
    found = problems_of(valid, "model.dtype=bfloat16", "model.master_weights=true", "lora.rank=4")
    assert found == ["model.master_weights: true; does nothing with lora, whose trained weights are fp32 already"]
    found = problems_of(valid, "data.heldout=${data.train}")
    assert len(found) == 1 and found[0].startswith("data.heldout: the same as data.train")
    found = problems_of(valid, "~rewards.format", "rewards.answer.weight=0")
    assert found == ["rewards: every weight is 0 (answer); there is nothing to train on"]
    found = problems_of(valid, "~rewards")
    assert found == ["rewards: none; name at least one reward"]
    found = problems_of(valid, "~rewards.format", "rewards.answer.weight=0", "~rewards.answer._component_")
    assert len(found) == 2
    loss = "loss=rolltune.losses.reinforce.ReinforceLoss"
    assert problems_of(valid, loss) == []
    assert "ReinforceLoss has no ratio" in problems_of(valid, loss, "batch.num_iterations=2")[0]
    bypass = "correction={_component_: rolltune.corrections.Bypass}"
    assert problems_of(valid, bypass) == []
    assert "Bypass does nothing with ReinforceLoss, which has no ratio" in problems_of(valid, loss, bypass)[0]
    assert problems_of(valid, "logging.wandb=true", "logging.wandb_project=mine") == []
    assert problems_of(valid, "lr_scheduler.num_warmup_steps=11", "batch.minibatches=2") == [], "20 updates"


def test_float16_has_a_loss_scale_and_master_weights_or_adapters(valid: Path):
    half = ("model.dtype=float16", "model.master_weights=true", "model.fp32_head=true")
    assert problems_of(valid, *half) == problems_of(valid, *half, f"loss_scale={LOSS_SCALE}") == []
    assert problems_of(valid, "model.dtype=float16", "lora.rank=4", f"loss_scale={LOSS_SCALE}") == []
    for wrong, message in (
        ("{_component_: rolltune.losses.grpo.GRPOLoss}", "rolltune.loss_scale.LossScale is wanted"),
        ("{_component_: rolltune.loss_scale.LossScale, initial: 1000}", "initial: 1000; must be a power of two, >= 1"),
        ("{_component_: rolltune.loss_scale.LossScale, initial: 0.5}", "initial: 0.5; must be a power of two, >= 1"),
        ("{_component_: rolltune.loss_scale.LossScale, initial: .inf}", "initial: inf; must be a power of two, >= 1"),
        ("{_component_: rolltune.loss_scale.LossScale, growth_interval: 0}", "growth_interval: 0; must be >= 1"),
        ("{_component_: rolltune.loss_scale.LossScale, growth: 2}", "loss_scale.growth: LossScale takes no such"),
    ):
        (found,) = problems_of(valid, *half, f"loss_scale={wrong}")
        assert found.startswith("loss_scale.") and message in found


def test_number_of_processes(valid: Path, monkeypatch: pytest.MonkeyPatch):
    assert problems_of(valid, "batch.minibatches=2", world_size=4) == []
    assert "batch.minibatches (2) x 8 processes" in problems_of(valid, "batch.minibatches=2", world_size=8)[0]
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="x 3 processes"):
        checks.validate(schema.GRPOConfig, valid)


def test_context_of_a_model_on_disk(valid: Path, tmp_path: Path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama", "max_position_embeddings": 64}')
    path = f"model.path={tmp_path / 'model'}"
    (tmp_path / "evaluate.yaml").write_text(EVALUATE)
    of_model = f"models.1.path={tmp_path / 'model'}"
    (found,) = problems_of(tmp_path / "evaluate.yaml", of_model, recipe=schema.EvaluateConfig)
    assert found.startswith(
        "sampling.max_new_tokens: 256; must leave room for a prompt in the context of models[1].path"
    )
    assert "in the context of model.path, 64 tokens" in problems_of(valid, path)[0]
    assert problems_of(valid, path, "sampling.max_new_tokens=32") == []


def test_cuda_without_cuda(valid: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert problems_of(valid, "device=cuda") == [
        "device: cuda; torch finds no CUDA device here (auto takes the CPU then)"
    ]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert problems_of(valid, "device=cuda") == []


def test_output_dir_is_a_file(valid: Path):
    assert problems_of(valid, f"output_dir={valid}") == [f"output_dir: {valid} is a file; give a folder"]


def test_all_mistakes_are_reported_at_once(valid: Path):
    found = problems_of(
        valid,
        "smpling.x=1",
        "num_steps=ten",
        "~output_dir",
        "loss.beta=1",
        "loss.clip_low=x",
        "optimizer.lr=-1",
        "sampling.group_size=1",
        "eval.max_problems=${nope}",
    )
    keys = [problem.partition(":")[0] for problem in found]
    assert sorted(keys) == [
        "eval.max_problems",
        "loss.beta",
        "loss.clip_low",
        "num_steps",
        "optimizer.lr",
        "output_dir",
        "sampling.group_size",
        "smpling",
    ]


def test_a_wrong_value_is_not_checked_against_others(valid: Path):
    found = problems_of(valid, "batch.prompts_per_step=x", "batch.minibatches=3")
    assert found == ["batch.prompts_per_step: 'x' is a string; an integer is wanted"]


def test_everything_that_is_missing_is_named(tmp_path: Path):
    path = tmp_path / "empty.yaml"
    path.write_text("seed: 1\n")
    keys = [problem.partition(":")[0] for problem in problems_of(path)]
    assert keys == [
        "output_dir",
        "model.path",
        "data.train",
        "data.heldout",
        "sampler",
        "advantage",
        "loss",
        "optimizer",
        "num_steps",
        "rewards",
    ]


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("", "is empty; a config is a mapping of keys"),
        ("- 1\n", "a list of 1; a config is a mapping of keys"),
        ("a: [1\nb: 2\n", "bad.yaml, line 2: "),
        ("a: 1\n\tb: 2\n", "bad.yaml, line 2: "),
        ("a: 1\nb: 2\na: 3\n", "bad.yaml, line 3: a: stands here twice"),
        ("loss:\n  kl_coef: 1\n  kl_coef: 2\n", "bad.yaml, line 3: kl_coef: stands here twice"),
        ("a: !!python/object/apply:os.system [ls]\n", "bad.yaml, line 1: could not determine a constructor"),
    ],
)
def test_yaml_mistakes_name_file_and_line(tmp_path: Path, text: str, fragment: str):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        config.load(schema.GRPOConfig, path)
    assert fragment in str(error.value) and "\n" not in str(error.value)


def test_file_mistakes(tmp_path: Path):
    with pytest.raises(ConfigError, match="no such file or directory"):
        config.load(schema.GRPOConfig, tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="is a directory"):
        config.load(schema.GRPOConfig, tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is no UTF-8 text"):
        config.load(schema.GRPOConfig, tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    ("argv", "fragment"),
    [
        (["--config"], "--config: no value"),
        (["--config="], "--config: no value"),
        (
            ["--num-steps", "3"],
            "--num-steps: none of --config, --dry-run and --help; config keys are set as",
        ),
        (["--num_steps=3"], "config keys are set as num_steps=3"),
        (["--dryrun"], "--dryrun: none of --config, --dry-run and --help"),
    ],
)
def test_command_line_mistakes(argv: list[str], fragment: str):
    with pytest.raises(ConfigError) as error:
        config.parse_args(argv)
    assert fragment in str(error.value)


def test_command_line():
    parsed = config.parse_args(["a=1", "--config", "x.yaml", "--dry-run", "b=--c"])
    assert parsed == Arguments(config="x.yaml", overrides=("a=1", "dry_run=true", "b=--c"), help=False)
    assert config.parse_args(["--config=x.yaml", "-h"]) == Arguments(config="x.yaml", overrides=(), help=True)


# --- components -------------------------------------------------------------------------------------------------------


def test_instantiate_and_component():
    loss = instantiate({"_component_": "rolltune.losses.grpo.GRPOLoss", "kl_coef": 0.5})
    assert loss.kl_coef == 0.5
    node = {"_component_": "rolltune.advantages.group_zscore", "eps": 1.0, "weight": 3}
    advantage = component(node, ignore=("weight",))
    assert advantage([0.0, 0.0]) == [0.0, 0.0] and advantage([1.0, 3.0])[1] == pytest.approx(1 / (2**0.5 + 1))
    with pytest.raises(ConfigError, match=r"rolltune.losses.grpo.GRPOLoss: kl_coef"):
        instantiate({"_component_": "rolltune.losses.grpo.GRPOLoss", "kl_coef": -1})
    with pytest.raises(ConfigError, match=r"rolltune.advantages has no nope"):
        component({"_component_": "rolltune.advantages.nope"})


def test_modules_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    here, on_path = tmp_path / "here", tmp_path / "on_path"
    here.mkdir()
    on_path.mkdir()
    (here / "my_test_rewards.py").write_text("def fixed(problem, text, *, value: float = 0.5):\n    return value\n")
    (on_path / "my_test_other.py").write_text("def fixed(problem, text):\n    return 1\n")
    (here / "my_test_broken.py").write_text("import torch\n\n1 / 0\n")
    monkeypatch.chdir(here)
    monkeypatch.setenv("PYTHONPATH", str(on_path))
    monkeypatch.setattr(sys, "path", [*sys.path, str(on_path)])
    assert locate("my_test_rewards.fixed")(None, "") == 0.5
    assert locate("my_test_other.fixed")(None, "") == 1
    node = {"_component_": "my_test_rewards.fixed", "value": "x"}
    assert check_component(node, "rewards.mine", positional=2) == [
        "rewards.mine.value: 'x' is a string; a number is wanted"
    ]
    found = check_component({"_component_": "my_test_broken.fixed"}, "sampler")
    assert len(found) == 1 and "its import fails: ZeroDivisionError" in found[0] and "my_test_broken.py:3" in found[0]
    with pytest.raises(ValueError, match="yaml is not one of rolltune"):
        locate("yaml.safe_load")


def test_own_folders_of_the_repository_keep_their_name(monkeypatch: pytest.MonkeyPatch):
    """From the repository's root ``rewards`` would import a second time under another name."""
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match=r"did you mean rolltune.rewards.answer.answer_reward\?"):
        locate("rewards.answer.answer_reward")


def test_positional_arguments_are_counted():
    node = {"_component_": "rolltune.advantages.group_zscore"}
    assert check_component(node, "advantage", positional=1) == []
    assert check_component(node, "advantage", positional=2) == [
        "advantage._component_: group_zscore takes 1 positional arguments; it is called with 2 here"
    ]
    assert check_component(node, "advantage") == ["advantage.rewards: missing; group_zscore needs it"]


# --- the frozen list --------------------------------------------------------------------------------------------------

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
    "model.batch_invariant",
    "model.gradient_checkpointing",
    "lora",
    "lora.rank",
    "lora.alpha",
    "lora.dropout",
    "lora.target_modules",
    "data",
    "data.train",
    "data.heldout",
    "prompt",
    "prompt.system",
    "prompt.few_shot",
    "prompt.few_shot.user",
    "prompt.few_shot.assistant",
    "prompt.prefill",
    "prompt.chat_template",
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
    "eval.max_new_tokens",
    "eval.correct",
    "eval.lenient",
    "eval.overoptimization",
    "checkpoint",
    "checkpoint.every_n_steps",
    "checkpoint.keep_last",
    "logging",
    "logging.wandb",
    "logging.wandb_project",
    "logging.tensorboard",
    "logging.samples_every_n_steps",
    "logging.classifier",
    "logging.classified_samples",
}
KEYS = {
    schema.GRPOConfig: SHARED
    | {
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
        "mismatch",
        "batch.prompts_per_step",
        "batch.num_iterations",
        "batch.minibatches",
        "batch.dynamic_sampling_rounds",
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
    """A new option is an argument of a component wherever it can be; what cannot is added here on purpose."""
    assert set(config.all_keys(recipe)) == KEYS[recipe]


@pytest.mark.parametrize("recipe", KEYS, ids=lambda recipe: recipe.__name__)
def test_explain_shows_every_key(recipe: type):
    shown = {line.split(":")[0].strip() for line in config.explain(recipe).splitlines()}
    lists = {"prompt.few_shot", "models"}
    sections = {key.rpartition(".")[0] for key in KEYS[recipe]} - lists
    items = {key for key in KEYS[recipe] if key.rpartition(".")[0] in lists}
    assert KEYS[recipe] - sections - items <= shown


# --- as a process -----------------------------------------------------------------------------------------------------

RECIPE = """\
from dataclasses import dataclass
from rolltune import config

@dataclass(kw_only=True)
class TinyConfig:
    count: int = 1
    dry_run: bool = False
    fail: str = ""

def run(cfg):
    print("ran", cfg.count, cfg.dry_run)
    if cfg.fail == "config":
        raise config.ConfigError(["count: 1; two"])
    if cfg.fail == "value":
        raise ValueError("count: 1; three")
    if cfg.fail == "bug":
        int("x" * len({}) + "y")
    if cfg.fail == "torch":
        __import__("json").loads("{")
    if cfg.fail == "interrupt":
        raise KeyboardInterrupt

if __name__ == "__main__":
    config.main(TinyConfig, run)
"""


@pytest.mark.parametrize(
    ("arguments", "status", "out", "err"),
    [
        ([], 0, "ran 3 False", ""),
        (["count=4", "--dry-run"], 0, "ran 4 True", ""),
        (["cuont=4"], 2, "", "tiny: 1 mistake\n  cuont: no such key; did you mean count?"),
        (["count=x", "y=1"], 2, "", "tiny: 2 mistakes"),
        (["--count", "3"], 2, "", "config keys are set as count=..."),
        (["fail=config"], 2, "ran", "count: 1; two"),
        (["fail=value"], 2, "ran", "tiny.py:15"),
        (["fail=interrupt"], 130, "ran", "interrupted"),
        (["fail=torch"], 1, "ran", "JSONDecodeError"),
        (["--help"], 0, "count: 1", ""),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_main_as_a_process(tmp_path: Path, arguments: list[str], status: int, out: str, err: str):
    (tmp_path / "tiny.py").write_text(RECIPE)
    (tmp_path / "tiny.yaml").write_text("count: 3\n")
    done = subprocess.run(
        [sys.executable, "tiny.py", "--config", "tiny.yaml", *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == status, done.stderr
    assert out in done.stdout and err in done.stderr
    assert ("Traceback" in done.stderr) == (status == 1)
