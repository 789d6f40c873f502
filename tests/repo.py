"""Where the repository is, and GSM8K beside it."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The real GSM8K (train.jsonl and test.jsonl), which the project does not contain.
GSM8K = Path(os.environ.get("ROLLTUNE_GSM8K", ROOT.parent / "shared/data/gsm8k"))
