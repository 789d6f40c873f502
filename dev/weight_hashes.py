"""SHA-256 of the final weights of eight tiny runs, one line each.

A refactoring must not change a number: run this before and after it, and compare. Equal hashes need the same machine,
number of threads and library versions.

    .venv/bin/python dev/weight_hashes.py > before.txt
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
TESTS = Path(__file__).parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "recipes")]

import yaml
from conftest import save_tiny_llama  # pyright: ignore[reportAttributeAccessIssue]
from safetensors import safe_open
from tiny_run import REWARD, load_recipe, tiny_grpo

from rolltune.config.schema import GRPOConfig, SFTConfig
from rolltune.run import checks

SEVERAL_UPDATES = {"prompts_per_step": 4, "microbatch_tokens": 128, "num_iterations": 2, "minibatches": 2}


def grpo_runs(model: Path) -> dict[str, dict[str, Any]]:
    """The changes to :func:`tiny_run.tiny_grpo` by name of the run."""

    def loss(name: str, **options: Any) -> dict[str, Any]:
        return {"_component_": f"rolltune.losses.{name.lower().removesuffix('loss')}.{name}", **options}

    return {
        "grpo, full, no KL": {"loss": loss("GRPOLoss", kl_coef=0.0)},
        "grpo, LoRA with dropout": {"lora": {"rank": 4, "alpha": 8.0, "dropout": 0.1}},
        "grpo, 4 updates a step": {"batch": SEVERAL_UPDATES},
        "grpo, KL": {"loss": loss("GRPOLoss", kl_coef=0.1)},
        "grpo, bf16, master weights": {"model": {"path": str(model), "dtype": "bfloat16", "master_weights": True}},
        "dapo, dynamic sampling": {
            "loss": loss("DAPOLoss"),
            "batch": SEVERAL_UPDATES | {"dynamic_sampling_rounds": 3},
        },
        "gspo": {"loss": loss("GSPOLoss"), "batch": SEVERAL_UPDATES},
    }


def sft(model: Path, output_dir: Path) -> dict[str, Any]:
    sums = {"_component_": "rolltune.data.sums.sums", "high": 9}
    return {
        "output_dir": str(output_dir),
        "model": {"path": str(model)},
        "data": {"train": sums | {"count": 20, "low": 1}, "heldout": sums | {"count": 4, "split": "heldout"}},
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-2, "eps": 1e-3},
        "num_steps": 4,
        "batch": {"examples_per_step": 4, "microbatch_tokens": 256},
        "eval": {"every_n_steps": 2, "max_problems": 4},
        "checkpoint": {"every_n_steps": 1, "keep_last": 2},
    }


def digest(output_dir: Path) -> str:
    """Hash names, shapes, types and values of all tensors of the newest checkpoint's policy."""
    newest = max((output_dir / "checkpoints").iterdir())
    total = hashlib.sha256()
    (file,) = (newest / "policy").glob("*.safetensors")
    with safe_open(file, framework="pt") as tensors:
        for name in sorted(tensors.keys()):
            tensor = tensors.get_tensor(name)
            total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            total.update(tensor.float().numpy().tobytes())
    return total.hexdigest()


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tiny_reward.py").write_text(REWARD)
        sys.path.insert(0, name)
        os.environ["PYTHONPATH"] = name  # where components of one's own are looked for
        model = save_tiny_llama(folder / "model")
        runs: dict[str, tuple[str, Any, dict[str, Any]]] = {
            label: ("grpo", GRPOConfig, tiny_grpo(model, folder / label) | changes)
            for label, changes in grpo_runs(model).items()
        }
        runs["sft"] = ("sft", SFTConfig, sft(model, folder / "sft"))
        for label, (recipe, schema, tree) in runs.items():
            file = folder / "config.yaml"
            file.write_text(yaml.safe_dump(tree))
            with contextlib.redirect_stdout(sys.stderr):
                load_recipe(recipe).run(checks.validate(schema, str(file)))
            print(f"{digest(folder / label)}  {label}", flush=True)


if __name__ == "__main__":
    main()
