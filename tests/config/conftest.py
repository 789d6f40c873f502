"""A valid config of each recipe, and what a check says of it with overrides."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rolltune.config import schema
from rolltune.errors import ConfigError
from rolltune.run import checks

GRPO = """\
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
  _component_: transformers.get_scheduler
  name: cosine
  num_warmup_steps: 2
num_steps: 10
"""
SFT = """\
output_dir: outputs/test
model: {path: smollm2-135m-instruct}
data:
  train: {_component_: rolltune.data.sums.sums, count: 40, seed: 0, split: train}
  heldout: {_component_: rolltune.data.sums.sums, count: 8, seed: 0, split: heldout}
optimizer: {_component_: torch.optim.AdamW, lr: 1e-4}
num_steps: 5
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
AUDIT_REWARDS = """\
output_dir: outputs/test
data: {_component_: rolltune.data.sums.sums, count: 8, seed: 0, split: heldout}
rewards:
  answer: {_component_: rolltune.rewards.answer.answer_reward}
"""


@pytest.fixture
def grpo_yaml(tmp_path: Path) -> Path:
    path = tmp_path / "valid.yaml"
    path.write_text(GRPO)
    return path


@pytest.fixture
def problems(tmp_path: Path) -> Callable[..., list[str]]:
    """The mistakes in a config text with overrides; none if it is valid."""

    def problems_of(recipe: type, text: str, *overrides: str, world_size: int = 1) -> list[str]:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        try:
            checks.validate(recipe, path, overrides, world_size=world_size)
        except ConfigError as error:
            return error.problems
        return []

    return problems_of


@pytest.fixture
def grpo(problems) -> Callable[..., list[str]]:
    return lambda *overrides, **options: problems(schema.GRPOConfig, GRPO, *overrides, **options)


@pytest.fixture
def sft(problems) -> Callable[..., list[str]]:
    return lambda *overrides, **options: problems(schema.SFTConfig, SFT, *overrides, **options)


@pytest.fixture
def evaluate(problems) -> Callable[..., list[str]]:
    return lambda *overrides, **options: problems(schema.EvaluateConfig, EVALUATE, *overrides, **options)


@pytest.fixture
def audit_rewards(problems) -> Callable[..., list[str]]:
    return lambda *overrides, **options: problems(schema.AuditRewardsConfig, AUDIT_REWARDS, *overrides, **options)
