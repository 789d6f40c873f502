"""Whole runs with frozen weights in 4 bits and an optimizer in 8: SFT, GRPO, evaluation, resume."""

import json
import shutil

import pytest
import yaml
from tiny_run import load_recipe, read_rows

from rolltune.config.schema import EvaluateConfig, SFTConfig
from rolltune.run import checks

LORA = {"rank": 4, "alpha": 8.0}
# It keeps the moments of tensors below min_8bit_size in float32.
OPTIMIZER = {"_component_": "bitsandbytes.optim.AdamW8bit", "lr": 1e-2, "min_8bit_size": 16}
NF4 = ("model.quantization=nf4",)
SUMS = {"_component_": "rolltune.data.sums.sums", "high": 9}


def run(recipe: str, schema: type, tmp_path, **settings):
    file = tmp_path / f"{recipe}.yaml"
    file.write_text(yaml.safe_dump({"output_dir": str(tmp_path / recipe)} | settings))
    load_recipe(recipe).run(checks.validate(schema, str(file), ()))
    return tmp_path / recipe


@pytest.mark.slow
def test_sft_grpo_and_evaluation_on_the_same_four_bits(run_grpo, tiny_llama, tmp_path):
    data = {"train": {**SUMS, "count": 20}, "heldout": {**SUMS, "count": 4, "split": "heldout"}}
    sft = run(
        *("sft", SFTConfig, tmp_path),
        model={"path": str(tiny_llama), "quantization": "nf4"},
        lora=LORA,
        data=data,
        optimizer=OPTIMIZER,
        num_steps=8,
        batch={"examples_per_step": 4},
        eval={"every_n_steps": 4, "max_problems": 4},
    )
    heldout = [row["heldout/loss"] for row in read_rows(sft) if "heldout/loss" in row]
    assert heldout[-1] < heldout[0] - 0.1

    grpo = run_grpo(model=sft / "best", lora=LORA, optimizer=OPTIMIZER, num_steps=2, overrides=NF4)
    rows = read_rows(grpo)
    assert rows[1]["kl"] == 0.0 and rows[2]["kl"] > 0.0  # the reference is the SFT adapter on the same weights
    assert rows[2]["mismatch/max_abs"] < 1e-3
    with pytest.raises(
        ValueError, match=r"model\.quantization: null; the adapter at .* was trained on weights in 4 bits"
    ):
        run_grpo("plain", model=sft / "best", lora=LORA, optimizer=OPTIMIZER, num_steps=1)

    results = run(
        *("evaluate", EvaluateConfig, tmp_path),
        models=[
            {"name": "four_bits", "path": str(grpo / "best"), "quantization": "nf4"},
            {"name": "plain", "path": str(grpo / "best")},
        ],
        data={**SUMS, "count": 4},
        sampling={"samples": 2, "max_new_tokens": 12},
        sampler={"_component_": "rolltune.samplers.native.NativeSampler"},
    )
    first = [
        json.loads((results / f"samples/{name}.jsonl").read_text().split("\n")[0]) for name in ("four_bits", "plain")
    ]
    assert first[0]["settings"] == {**first[1]["settings"], "quantization": "nf4"}


@pytest.mark.slow
def test_a_resumed_run_equals_an_unbroken_one(run_grpo):
    settings = {"lora": LORA, "optimizer": OPTIMIZER, "checkpoint": {"every_n_steps": 1, "keep_last": 4}}
    whole = read_rows(run_grpo("whole", overrides=NF4, **settings))
    again = run_grpo("again", overrides=NF4, **settings)
    for step in (3, 4):
        shutil.rmtree(again / f"checkpoints/step_{step:06d}")
    run_grpo("again", overrides=(*NF4, "resume=true"), **settings)
    assert read_rows(again) == whole
