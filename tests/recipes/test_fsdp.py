"""Sharded runs give the numbers of replicated ones, and each continues the other's checkpoints."""

import os
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_run import assert_same_numbers, load_recipe, read_rows, tiny_grpo
from transformers import AutoModelForCausalLM

from rolltune.config.schema import GRPOConfig, SFTConfig
from rolltune.run import checks
from rolltune.run.checkpoint import load_state

SCHEMAS = {"grpo": GRPOConfig, "sft": SFTConfig}
SHARDED = "parallel.weights=fsdp"
LORA = {"rank": 4, "alpha": 8.0}


@pytest.fixture
def run(tiny_llama, tmp_path, reward_module):
    """Run a recipe in this process, or in several that are started; returns the output folder."""

    def run(recipe, name, *overrides, processes=1, **changes):
        settings = tiny_grpo(tiny_llama, tmp_path / name)
        if recipe == "sft":
            names = ("output_dir", "model", "data", "optimizer", "num_steps", "eval", "checkpoint")
            settings = {key: settings[key] for key in names}
            settings["data"]["heldout"]["count"] = 5  # one rank has more
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(settings | changes))
        if processes == 1:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # as in the others: sums round differently with more
            try:
                load_recipe(recipe).run(checks.validate(SCHEMAS[recipe], str(file), overrides))
            finally:
                torch.set_num_threads(threads)
            return tmp_path / name
        command = ["-m", "rolltune.cli", "run", "--nproc_per_node", str(processes), recipe]
        done = subprocess.run(
            [sys.executable, *command, "--config", str(file), *overrides],
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


def assert_same_run(expected, found, step):
    """Compare metrics, place in the data and weights."""
    assert_same_numbers(read_rows(expected), read_rows(found))
    place, other = (load_state(folder / f"checkpoints/step_{step:06d}") for folder in (expected, found))
    assert (place.data_position, place.policy_version) == (other.data_position, other.policy_version)
    a, b = weights(expected, step), weights(found, step)
    assert a.keys() == b.keys()
    for name, weight in a.items():
        assert (b[name] - weight).norm() <= 1e-4 * weight.norm(), name


SFT = {"batch": {"examples_per_step": 4, "microbatch_tokens": 96}, "eval": {"every_n_steps": 2, "max_problems": 5}}
GRPO = {
    "batch": {"prompts_per_step": 8, "microbatch_tokens": 128, "minibatches": 2, "dynamic_sampling_rounds": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "changes"),
    [("sft", SFT), ("grpo", GRPO), ("grpo", GRPO | {"lora": LORA})],
    ids=["sft", "grpo", "grpo with lora"],
)
def test_two_sharded_processes_equal_one_and_each_goes_on_in_the_number_of_the_other(run, recipe, changes):
    one = run(recipe, "one", **changes, num_steps=5)
    two = run(recipe, "two", SHARDED, processes=2, **changes, num_steps=5)
    assert_same_run(one, two, 5)
    run(recipe, "two", "resume=true", **changes, num_steps=7)
    run(recipe, "one", "resume=true", SHARDED, processes=2, **changes, num_steps=7)
    assert_same_run(one, two, 7)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "overrides", "changes"),
    [
        ("grpo", (), GRPO),
        ("grpo", (SHARDED, "parallel.shard=2"), GRPO),
        ("grpo", (SHARDED, "parallel.shard=2"), GRPO | {"lora": LORA}),
        ("sft", (SHARDED, "parallel.shard=2"), SFT),
    ],
    ids=["replicated", "two copies in two slices", "lora, two copies in two slices", "sft, two copies in two slices"],
)
def test_four_processes_equal_one(run, recipe, overrides, changes):
    one = run(recipe, "one", **changes, num_steps=5)
    four = run(recipe, "four", *overrides, processes=4, **changes, num_steps=5)
    assert_same_run(one, four, 5)


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
