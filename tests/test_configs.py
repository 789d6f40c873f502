"""Every config in configs/ is checked as a run would check it, and says how it is run."""

import re
from pathlib import Path

import pytest

from rolltune import config
from rolltune.schema import AuditRewardsConfig, GRPOConfig, PrimeConfig

CONFIGS = sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml"))
SCHEMAS = {"grpo": GRPOConfig, "prime": PrimeConfig, "audit_rewards": AuditRewardsConfig}


@pytest.fixture(autouse=True)
def earlier_stages(tmp_path, monkeypatch, tiny_llama):
    """Configs that start from an earlier stage's output find one, and no test writes into the repository."""
    monkeypatch.chdir(tmp_path)
    for stage in ("quickstart_prime", "smollm2_135m_gsm8k_prime"):
        (tmp_path / "outputs" / stage).mkdir(parents=True)
        (tmp_path / "outputs" / stage / "best").symlink_to(tiny_llama)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config(path):
    first, *_ = path.read_text().splitlines()
    command = re.fullmatch(r"# tune run (\w+) --config (\S+)", first)
    assert command, f"{path.name} must open with its command, not {first!r}"
    recipe, name = command.groups()
    assert name == path.name
    assert "Meant for:" in re.sub(r"\s*\n# ", " ", path.read_text()), "say which machine it is meant for"
    cfg = config.validate(SCHEMAS[recipe], str(path), [])
    assert cfg.output_dir == f"outputs/{path.stem}"


def test_there_are_configs():
    assert {
        "quickstart",
        "smollm2_135m_gsm8k",
        "llama3_2_1b",
        "llama3_2_1b_lora",
        "llama3_2_3b",
        "llama3_2_3b_lora",
    } <= {path.stem for path in CONFIGS}
