"""GRPO on a CUDA device: native sampler, packed attention and log-probs, held together by the run's own self-test."""

from __future__ import annotations

import pytest
from tiny_run import read_rows

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    "dtype, most_k3", [("float32", 1e-4), ("bfloat16", 0.05), ("float16", 0.01)], ids=["fp32", "bf16", "fp16"]
)
def test_a_run(run_grpo, tiny_llama, dtype, most_k3):
    model = {"path": str(tiny_llama), "dtype": dtype, "master_weights": dtype != "float32"}
    rows = read_rows(run_grpo(device="cuda", model=model))
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert all(row["mismatch/k3"] <= most_k3 for row in rows[1:])
