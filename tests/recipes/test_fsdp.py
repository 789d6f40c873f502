"""Sharded runs give the numbers of replicated ones, and each continues the other's checkpoints."""

import os
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_run import ROOT, assert_same_numbers, load_recipe, read_rows, tiny_grpo
from transformers import AutoModelForCausalLM

from rolltune.config.schema import GRPOConfig, SFTConfig
from rolltune.run import checks

SCHEMAS = {"grpo": GRPOConfig, "sft": SFTConfig}
SHARDED = "parallel.weights=fsdp"
LORA = {"rank": 4, "alpha": 8.0}


@pytest.fixture
def run(tiny_llama, tmp_path, reward_module):
    """Run a recipe in this process, or in two that are started; returns the output folder."""

    def run(recipe, name, *overrides, processes=1, **changes):
        settings = tiny_grpo(tiny_llama, tmp_path / name)
        if recipe == "sft":
            names = ("output_dir", "model", "data", "optimizer", "num_steps", "eval", "checkpoint")
            settings = {key: settings[key] for key in names}
            settings["data"]["heldout"]["count"] = 5  # one rank has more
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(settings | changes))
        if processes == 1:
            load_recipe(recipe).run(checks.validate(SCHEMAS[recipe], str(file), overrides))
            return tmp_path / name
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        done = subprocess.run(
            [sys.executable, *launcher, str(ROOT / f"recipes/{recipe}.py"), "--config", str(file), *overrides],
            capture_output=True,
            text=True,
            timeout=300,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        return tmp_path / name

    return run


def weights(run_folder, step=None):
    folder = run_folder / "best" if step is None else run_folder / f"checkpoints/step_{step:06d}/policy"
    return load_file(next(folder.glob("*.safetensors")))


SFT = {"batch": {"examples_per_step": 4, "microbatch_tokens": 96}, "eval": {"every_n_steps": 2, "max_problems": 5}}
GRPO = {
    "batch": {"prompts_per_step": 4, "microbatch_tokens": 128, "minibatches": 2, "dynamic_sampling_rounds": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "changes"),
    [("sft", SFT), ("grpo", GRPO), ("grpo", GRPO | {"lora": LORA})],
    ids=["sft", "grpo", "grpo with lora"],
)
def test_two_sharded_processes_equal_one_and_their_run_goes_on_in_one(run, recipe, changes):
    one = run(recipe, "one", **changes, num_steps=5)
    two = run(recipe, "two", SHARDED, processes=2, **changes, num_steps=5)
    assert_same_numbers(read_rows(one), read_rows(two))
    expected, found = weights(one, 5), weights(two, 5)
    assert expected.keys() == found.keys()
    for name, weight in expected.items():
        assert (found[name] - weight).norm() <= 1e-4 * weight.norm(), name
    for folder in (one, two):
        run(recipe, folder.name, "resume=true", **changes, num_steps=7)
    assert_same_numbers(read_rows(one), read_rows(two))


@pytest.mark.slow
@pytest.mark.parametrize("first", [(), (SHARDED,)], ids=["replicated first", "sharded first"])
def test_a_run_goes_on_to_the_same_bits_sharded_or_not(run, tiny_llama, first):
    """Weights in bfloat16, whose float32 copies are in the checkpoint."""
    model = {"path": str(tiny_llama), "dtype": "bfloat16", "master_weights": True}
    straight = run("grpo", "straight", **GRPO, model=model, num_steps=3)
    parts = run("grpo", "parts", *first, **GRPO, model=model, num_steps=2)
    then = ("parallel.weights=replicated",) if first else (SHARDED,)
    run("grpo", "parts", "resume=true", *then, **GRPO, model=model, num_steps=3)
    expected, found = weights(straight, 3), weights(parts, 3)
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    states = [torch.load(folder / "checkpoints/step_000003/trainer.pt") for folder in (straight, parts)]
    assert all(map(torch.equal, *(state["masters"] for state in states)))
    assert AutoModelForCausalLM.from_pretrained(parts / "best").dtype == torch.bfloat16
