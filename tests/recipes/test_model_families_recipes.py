"""Whole runs of models that need something special: unpacked sequences, routers to balance."""

from dataclasses import replace

import pytest
import yaml
from model_families import LENGTHS, save_model
from tiny_run import load_recipe, read_rows, tiny_grpo

from rolltune.config.schema import GRPOConfig, SFTConfig
from rolltune.run import checks

SUMS = {"_component_": "rolltune.data.sums.sums", "high": 9}
ANSWER = {"answer": {"_component_": "rolltune.rewards.answer.answer_reward"}}


@pytest.mark.parametrize("recipe", ["sft", "grpo"])
@pytest.mark.parametrize("family", ["mamba", "qwen3-moe"])
def test_run(tmp_path, capsys, family, recipe):
    save_model(family, replace(LENGTHS["short"], positions=256), tmp_path / "model")
    tree = tiny_grpo(tmp_path / "model", tmp_path / "run", rewards=ANSWER)
    if recipe == "sft":
        names = ("output_dir", "model", "optimizer", "checkpoint", "eval")
        data = {"train": SUMS | {"count": 20, "low": 1}, "heldout": SUMS | {"count": 4, "split": "heldout"}}
        tree = {name: tree[name] for name in names} | {"data": data, "batch": {"examples_per_step": 4}}
    tree["num_steps"] = 1
    if family == "qwen3-moe":
        tree["model"]["router_aux_loss"] = 0.01
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(tree))
    load_recipe(recipe).run(checks.validate(SFTConfig if recipe == "sft" else GRPOConfig, str(file)))
    last = read_rows(tmp_path / "run")[-1]
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    if family == "mamba":
        assert any("training unpacked" in note for note in notes)
        assert any("its own cache" in note for note in notes) is (recipe == "grpo")
        assert "router/aux_loss" not in last
    else:
        assert not notes
        assert 2.0 <= last["router/aux_loss"] < 4.0  # top 2 of 4 experts
