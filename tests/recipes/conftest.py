"""Fixtures for whole runs on the tiny Llama."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_run import REWARD, load_recipe, tiny_grpo


@pytest.fixture
def reward_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the user's reward, importable here and in processes started from here."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "tiny_reward.py").write_text(REWARD)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")])))
    monkeypatch.delitem(sys.modules, "tiny_reward", raising=False)
    return folder


@pytest.fixture
def run_grpo(tiny_llama: Path, tmp_path: Path, reward_module: Path) -> Callable[..., Path]:
    """Run recipes/grpo.py in this process; returns the output folder."""
    from rolltune.config.schema import GRPOConfig
    from rolltune.run import checks

    def run(name: str = "run", *, model: Path = tiny_llama, overrides: tuple[str, ...] = (), **changes: Any) -> Path:
        output_dir = tmp_path / name
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(tiny_grpo(model, output_dir, **changes)))
        load_recipe("grpo").run(checks.validate(GRPOConfig, str(file), overrides))
        return output_dir

    return run
