"""Paths of the repository, and of GSM8K beside it."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# The real GSM8K (train.jsonl and test.jsonl), which the project does not contain.
GSM8K = Path(os.environ.get("ROLLTUNE_GSM8K", ROOT.parent / "shared/data/gsm8k"))

# A developer's machine may lack the data. CI must not pass without it: there the tests run, and fail.
needs_gsm8k = pytest.mark.skipif(
    not GSM8K.is_dir() and os.environ.get("CI", "") in ("", "false"),
    reason=f"{GSM8K} does not exist: put GSM8K's train.jsonl and test.jsonl there, or set ROLLTUNE_GSM8K",
)
