"""Whole runs in float16: the scale comes down until gradients fit, and a resumed run has it where it was."""

import json
import shutil

import pytest
import torch
from tiny_run import read_rows
from transformers import AutoModelForCausalLM

from rolltune.run.checkpoint import load_state

# At 2^20 and above gradients of the tiny Llama overflow, at 2^18 they fit; two steps without an overflow double it.
LOSS_SCALE = {"_component_": "rolltune.loss_scale.LossScale", "init_scale": 2.0**21, "growth_interval": 2}


@pytest.fixture
def run_fp16(run_grpo):
    def run(name="run", *, overrides=("model.master_weights=true",), **changes):
        half = ("model.dtype=float16", *overrides)
        return run_grpo(name, overrides=half, **({"loss_scale": LOSS_SCALE, "num_steps": 6} | changes))

    return run


def test_steps_are_skipped_until_gradients_fit(run_fp16):
    output_dir = run_fp16()
    rows = read_rows(output_dir)[1:]
    skipped = [row["skipped_step"] for row in rows]
    assert skipped[0] == 1.0 and {0.0, 1.0} == set(skipped)
    scale, clean = 2.0**21, 0
    for row in rows:
        assert row["loss_scale"] == scale
        clean = 0 if row["skipped_step"] else clean + 1
        scale *= 0.5 if row["skipped_step"] else 2.0 if clean == 2 else 1.0
        clean %= 2
    assert [row["updates"] for row in rows] == [1.0 - skip for skip in skipped]
    assert ["grad_norm" in row for row in rows] == [not skip for skip in skipped]
    assert all(row["ratio/max"] == row["ratio/min"] == 1.0 for row in rows)
    versions = [
        {json.loads(line)["policy_version"] for line in path.read_text().splitlines()}
        for path in sorted((output_dir / "samples").glob("*.jsonl"))
    ]
    taken = [6 - i - sum(skipped[i:]) for i in range(7)]  # steps from the i-th on
    assert versions == [{taken[0] - left} for left in taken[:6]], (
        "a skipped step leaves the weights that were sampled with"
    )
    assert load_state(output_dir / "checkpoints/step_000006").policy_version == taken[0]
    saved = AutoModelForCausalLM.from_pretrained(output_dir / "checkpoints/step_000006/policy", dtype="auto")
    assert saved.dtype == torch.float16


def test_after_a_skipped_update_the_next_one_is_the_first(run_fp16):
    scale = LOSS_SCALE | {"init_scale": 2.0**20}
    batch = {"prompts_per_step": 4, "num_iterations": 2, "microbatch_tokens": 128}
    row = read_rows(run_fp16(loss_scale=scale, batch=batch, num_steps=1))[1]
    assert row["updates"] == 1.0 and row["skipped_step"] == 0.5 and row["loss_scale"] == 2.0**19
    assert row["ratio/max"] == row["ratio/min"] == 1.0


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides", [("model.master_weights=true",), ("lora.rank=4", "model.fp32_head=true")], ids=["full", "lora"]
)
def test_resumed_equals_unbroken(run_fp16, overrides):
    """From step 3, where one clean step of two is counted."""
    keep_all = {"every_n_steps": 1, "keep_last": 6}
    output_dir = run_fp16(checkpoint=keep_all, overrides=overrides)
    whole = read_rows(output_dir)
    assert {row["skipped_step"] for row in whole[1:]} == {0.0, 1.0}
    for step in (4, 5, 6):
        shutil.rmtree(output_dir / f"checkpoints/step_{step:06d}")
    run_fp16(checkpoint=keep_all, overrides=(*overrides, "resume=true"))
    assert read_rows(output_dir) == whole


def test_without_a_section_the_scale_has_its_defaults(run_fp16):
    row = read_rows(run_fp16(loss_scale=None, num_steps=1))[1]
    assert row["loss_scale"] == 2.0**16 and row["skipped_step"] == 0.0
