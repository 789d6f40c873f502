"""Whole runs of a batch-invariant model: the sampler's log-probs are the trainer's to the last bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tiny_run import read_rows

from rolltune.samplers.native import NativeSampler

SAMPLING = {"group_size": 4, "max_new_tokens": 12}


EXACT = ("model.batch_invariant=true",)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("lora", [None, {"rank": 4, "alpha": 8.0}], ids=["full", "lora"])
def test_there_is_no_mismatch(run_grpo, temperature, lora):
    adapters = {"lora": lora} if lora else {}
    output_dir = run_grpo(overrides=EXACT, sampling=SAMPLING | {"temperature": temperature}, num_steps=3, **adapters)
    for row in read_rows(output_dir)[1:]:
        assert row["mismatch/max_abs"] == 0.0
        assert row["mismatch/mean_ratio"] == 1.0
        assert row["ratio/max"] == row["ratio/min"] == 1.0
    assert read_rows(output_dir)[3]["kl"] > 0.0, "nothing was trained"


def test_the_ratio_to_the_sampler_is_one(run_grpo):
    for row in read_rows(run_grpo(overrides=EXACT, old_policy="sampler", num_steps=2))[1:]:
        assert row["ratio/max"] == row["ratio/min"] == 1.0


@pytest.mark.slow
def test_how_rows_are_sampled_and_packed_changes_no_completion(run_grpo):
    """One step: later ones differ by the order in which the gradients of rows were added."""
    runs = []
    for max_num_seqs, microbatch_tokens in ((64, 128), (3, 64)):
        output_dir = run_grpo(
            str(max_num_seqs),
            overrides=EXACT,
            sampler={"_component_": "rolltune.samplers.native.NativeSampler", "max_num_seqs": max_num_seqs},
            batch={"prompts_per_step": 4, "microbatch_tokens": microbatch_tokens},
            num_steps=1,
        )
        runs.append((output_dir / "samples/step_000001.jsonl").read_text())
        assert read_rows(output_dir)[1]["mismatch/max_abs"] == 0.0
    assert runs[0] == runs[1]


def test_the_self_test_allows_no_difference(run_grpo, monkeypatch):
    right = NativeSampler.generate

    def generate(self, requests, params, **options):
        def off(completion):
            return replace(
                completion, logprobs=tuple(float(np.nextafter(np.float32(x), -9)) for x in completion.logprobs)
            )

        return [tuple(map(off, group)) for group in right(self, requests, params, **options)]

    monkeypatch.setattr(NativeSampler, "generate", generate)
    with pytest.raises(ValueError, match="sampler and trainer give the same log-probs"):
        run_grpo(overrides=EXACT)
