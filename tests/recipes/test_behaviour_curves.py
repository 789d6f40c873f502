"""The behaviours in a whole run: four curves, and neither the self-test nor the audit asks for them."""

from __future__ import annotations

import json

import pytest
import yaml
from tiny_run import load_recipe, read_rows

from rolltune.behaviours import BEHAVIOURS
from rolltune.config.schema import AuditRewardsConfig
from rolltune.run import checks

LOGGED = {"_component_": "rolltune.rewards.behaviours.behaviour_counts", "weight": 0}
ANSWER = {"_component_": "rolltune.rewards.answer.answer_reward", "weight": 1.0}
PREFILL = "<think>3 * 8 = 24, not 42. Go back. "

pytestmark = pytest.mark.slow


def test_grpo_logs_them(run_grpo):
    rewards = {"low": {"_component_": "tiny_reward.low_bytes", "weight": 1.0}, "behaviours": LOGGED}
    output_dir = run_grpo(
        num_steps=1,
        rewards=rewards,
        prompt={"prefill": PREFILL},  # seen as written by the model
        answer_format=PREFILL + "{solution}</think>\n<answer>{answer}</answer>",
        eval={"every_n_steps": 10, "max_problems": 1},
    )
    (row,) = [row for row in read_rows(output_dir) if row["step"] == 1]
    means = {name: row[f"reward/behaviours/{name}/mean"] for name in BEHAVIOURS}
    assert means["verification"] >= 1.0 and means["backtracking"] >= 1.0
    assert row["reward/behaviours/mean"] == pytest.approx(sum(means.values()))
    assert row["reward/mean"] == pytest.approx(row["reward/low/mean"])


def test_the_audit_leaves_them_out(tmp_path, capsys):
    file = tmp_path / "audit.yaml"
    data = {"_component_": "rolltune.data.sums.sums", "count": 3}
    wanted = {"output_dir": str(tmp_path / "out"), "data": data, "rewards": {"answer": ANSWER, "behaviours": LOGGED}}
    file.write_text(yaml.safe_dump(wanted))
    load_recipe("audit_rewards").run(checks.validate(AuditRewardsConfig, str(file), ()))
    assert set(json.loads((tmp_path / "out" / "audit.json").read_text())) == {"answer"}
    assert "behaviours" in capsys.readouterr().out
