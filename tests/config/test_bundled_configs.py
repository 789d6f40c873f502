"""Every config in configs/ is checked as a run would check it, and says how it is run."""

import re
from statistics import median

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
from rolltune.config.tree import read_yaml
from rolltune.run import checks

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
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
# Stages whose output another config starts from.
STAGES = sorted({stage for path in CONFIGS for stage in re.findall(r"path: outputs/(\w+)/best", path.read_text())})

pytestmark = pytest.mark.usefixtures("earlier_stages")


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=pytest.mark.vllm if "_vllm" in path.stem else ()) for path in CONFIGS],
    ids=lambda path: path.stem,
)
def test_config(path):
    first, *_ = path.read_text().splitlines()
    command = re.fullmatch(r"# tune run (\w+) --config (\S+)", first)
    assert command, f"{path.name} must open with its command, not {first!r}"
    recipe, name = command.groups()
    assert name == path.name
    assert "Meant for:" in re.sub(r"\s*\n# ", " ", path.read_text()), "say which machine it is meant for"
    cfg = checks.validate(SCHEMAS[recipe], str(path), [])
    assert cfg.output_dir == f"outputs/{path.stem}"


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_others_start_from_has_a_config(stage):
    assert stage in {path.stem for path in CONFIGS}


def test_learning_rates_of_lora_are_an_order_of_magnitude_above_those_of_full_training():
    """Those of full training at the same stage, in models of 0.5B and more: LoRA takes 10 to 30 times as much."""
    rates = {}
    for path in CONFIGS:
        tree = read_yaml(path)
        if "optimizer" in tree and not path.stem.startswith(("smollm2", "quickstart", "gemma3_270m")):
            stage = "sft" if path.stem.endswith("_sft") else "grpo"
            rates.setdefault((stage, "lora" in tree), []).append(float(tree["optimizer"]["lr"]))
    for stage in ("sft", "grpo"):
        full, lora = median(rates[stage, False]), rates[stage, True]
        assert all(10 * full <= rate <= 30.001 * full for rate in lora), (stage, full, lora)


def test_there_are_configs():
    assert {
        "quickstart",
        "smollm2_135m_gsm8k",
        "llama3_2_1b",
        "llama3_2_1b_lora",
        "llama3_2_3b",
        "llama3_2_3b_lora",
    } <= {path.stem for path in CONFIGS}
