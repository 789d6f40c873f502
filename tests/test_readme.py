"""The README is a promise: its commands exist, its example works."""

import re

import pytest
from repo import ROOT

from rolltune.config.schema import (
    AuditJudgeConfig,
    AuditRewardsConfig,
    EvaluateConfig,
    GRPOConfig,
    LintRubricsConfig,
    ServeConfig,
    SFTConfig,
    WriteRubricsConfig,
    WriteTracesConfig,
)
from rolltune.rewards.combine import WeightedReward
from rolltune.run import checks
from rolltune.types import Completion, Problem

README = (ROOT / "README.md").read_text()
SCHEMAS = {
    "grpo": GRPOConfig,
    "sft": SFTConfig,
    "evaluate": EvaluateConfig,
    "write_traces": WriteTracesConfig,
    "write_rubrics": WriteRubricsConfig,
    "audit_rewards": AuditRewardsConfig,
    "audit_judge": AuditJudgeConfig,
    "lint_rubrics": LintRubricsConfig,
    "serve": ServeConfig,
}
RUN = re.compile(r"tune run (?:--nproc_per_node \d+ )?(\w+) --config (\S+\.yaml)([^#`\n]*)")
COMMANDS = sorted({(recipe, name, rest.strip()) for recipe, name, rest in RUN.findall(README)})


@pytest.mark.parametrize("recipe, name, rest", COMMANDS)
@pytest.mark.usefixtures("earlier_stages")
def test_run_commands_resolve(recipe, name, rest):
    overrides = ["dry_run=true" if word == "--dry-run" else word for word in rest.split()]
    checks.validate(SCHEMAS[recipe], str(ROOT / "configs" / name), overrides)


def test_there_are_commands():
    assert len(COMMANDS) >= 5


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"\bmake (\w+)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_config_is_in_the_table_and_no_other():
    for path in (ROOT / "configs").glob("*.yaml"):
        stem = path.stem
        assert f"`{stem}`" in README or f"`_{stem.removeprefix('qwen2_5_0_5b_')}`" in README, stem


def test_reward_example():
    (source,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    namespace: dict = {}
    exec(source, namespace)
    reward = WeightedReward(rewards={"brevity": (namespace["brevity"], 0.1)})
    problem = Problem(id="p", messages=({"role": "user", "content": "?"},))
    completion = Completion(token_ids=(1,), logprobs=(0.0,), finish_reason="stop", policy_version=0, text="short")
    assert reward(problem, completion).total == pytest.approx(0.1)


def test_nothing_is_left_to_fill_in():
    assert "@@" not in README
