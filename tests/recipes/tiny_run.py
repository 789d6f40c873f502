"""A whole GRPO run on the tiny Llama: real recipe, real sampler, a reward that a random model can climb."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from repo import ROOT

# What a user would write: one function in one file, found through PYTHONPATH.
REWARD = '''
from rolltune.types import Score

def low_bytes(problem, text):
    """Share of characters that come early in the alphabet: a random byte model gets some, and can learn to get more."""
    return Score(total=sum(c.lower() in "abcdefgh0123456789" for c in text) / max(1, len(text)))

low_bytes.full_marks = None
'''

TIMES = ("time", "seconds/", "tokens_per_second/", "memory/", "imbalance/")


def tiny_grpo(model: Path, output_dir: Path, **changes: Any) -> dict[str, Any]:
    """A config of a few seconds; ``changes`` replace whole top-level keys."""
    return {
        "output_dir": str(output_dir),
        "model": {"path": str(model)},
        "data": {
            "train": {"_component_": "rolltune.data.sums.sums", "count": 20, "low": 1, "high": 9},
            "heldout": {"_component_": "rolltune.data.sums.sums", "count": 4, "high": 9, "split": "heldout"},
        },
        "rewards": {
            "low": {"_component_": "tiny_reward.low_bytes", "weight": 1.0},
            "answer": {"_component_": "rolltune.rewards.answer.answer_reward", "weight": 0.5},
        },
        "sampling": {"group_size": 4, "max_new_tokens": 12},
        "sampler": {"_component_": "rolltune.samplers.native.NativeSampler"},
        "advantage": {"_component_": "rolltune.advantages.group_zscore"},
        "loss": {"_component_": "rolltune.losses.grpo.GRPOLoss", "kl_coef": 0.04},
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-3, "eps": 1e-3},
        "num_steps": 4,
        "batch": {"prompts_per_step": 4, "microbatch_tokens": 128},
        "eval": {"every_n_steps": 2, "max_problems": 4},
        "checkpoint": {"every_n_steps": 1, "keep_last": 2},
    } | changes


def load_recipe(name: str) -> ModuleType:
    """A recipe as a module: recipes are run by path and live in no package."""
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", ROOT / "recipes" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def read_rows(output_dir: Path, *, timeless: bool = True) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without what a clock, the machine or the number of ranks decides."""
    rows = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not (timeless and k.startswith(TIMES))} for row in rows]


def assert_same_numbers(expected: list[dict[str, Any]], found: list[dict[str, Any]]) -> None:
    """Compare the metrics of runs that differ in the order of summation only."""
    assert len(found) == len(expected)
    for a, b in zip(expected, found, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            if name.startswith("mismatch/"):  # noise of 1e-7 itself, so not to 1e-6 of it
                assert b[name] == pytest.approx(a[name], abs=1e-5), (a["step"], name)
                continue
            # A single token's ratio, after updates, is fp32's own noise times the spread of the log-probs.
            relative = 1e-5 if name in ("ratio/min", "ratio/max") else 1e-6
            # The loss of GRPO is a sum of terms near 1 that cancel, and so is k3.
            assert b[name] == pytest.approx(a[name], rel=relative, abs=1e-6 if name in ("loss", "kl") else 1e-7), (
                a["step"],
                name,
            )
