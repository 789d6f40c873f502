"""Check every model family that rolltune may meet, on tiny random models; write the table of the documentation.

Exit status 1 if a family is silently wrong, or fails without a readable message.

    .venv/bin/python dev/model_families.py                # all families at all lengths
    .venv/bin/python dev/model_families.py mistral gpt-oss
    .venv/bin/python dev/model_families.py --docs         # also write the table of docs/model_families.md
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore")
ROOT = Path(__file__).parents[1]
DOCS, MARK = ROOT / "docs/model_families.md", "<!-- written by dev/model_families.py --docs -->"
sys.path.insert(0, str(ROOT / "tests"))

import torch
import transformers
from family_check import Result, check_family
from model_families import FAMILIES, LENGTHS

transformers.logging.set_verbosity_error()
logging.disable(logging.WARNING)


def line(result: Result) -> str:
    """Return one row of the printed table."""
    worst = max(result.errors.values(), default=float("nan"))
    problems = [
        *(f"SILENTLY WRONG: {text}" for text in result.silently_wrong),
        *(f"WRONG ({check}): {text}" for check, text in result.wrong.items()),
        *(f"refused ({check}): {text}" for check, text in result.refused.items()),
    ]
    head = f", {result.head} head" if result.head else ""
    return (
        f"{result.family:18} {result.length:7} {result.trained + head:28} {result.sampled:13} {worst:.0e}  "
        f"{'; '.join(problems) or 'right'}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("families", nargs="*", metavar="family", help=f"default: all {len(FAMILIES)}")
    parser.add_argument("--length", choices=LENGTHS, action="append", help="default: all")
    parser.add_argument("--docs", action="store_true", help="write the table of docs/model_families.md")
    options = parser.parse_args()
    if options.docs and (options.families or options.length):
        parser.error("--docs: needs all families at all lengths")
    if unknown := [family for family in options.families if family not in FAMILIES]:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(FAMILIES)}")
    torch.set_num_threads(1)
    results: list[Result] = []
    for family in options.families or FAMILIES:
        for length in options.length or LENGTHS:
            with tempfile.TemporaryDirectory() as folder:
                result = check_family(family, length, Path(folder) / "model")
            results.append(result)
            print(line(result).replace(folder, ""), flush=True)
    if options.docs:
        DOCS.write_text(f"{DOCS.read_text().partition(MARK)[0]}{MARK}\n\n{table(results)}")
    return summary(results)


def table(results: Sequence[Result]) -> str:
    """Return the documentation's table, a row for each family."""
    lines = ["| family | class | trained | LM head | native sampler |", "|---|---|---|---|---|"]
    for family in dict.fromkeys(result.family for result in results):
        own = [result for result in results if result.family == family]
        trained = by_length({r.length: "**wrong**" if r.silently_wrong or r.wrong else r.trained for r in own})
        sampled = by_length({r.length: r.sampled for r in own})
        head = "own" if any(r.head for r in own) else "product"
        lines.append(f"| {family} | {own[0].model} | {trained} | {head} | {sampled} |")
    return "\n".join(lines) + "\n"


def by_length(found: dict[str, str]) -> str:
    """Say what was found at all lengths, or at each."""
    kinds = list(dict.fromkeys(found.values()))
    if len(kinds) == 1:
        return kinds[0]
    return "; ".join(f"{kind} ({', '.join(name for name in found if found[name] == kind)})" for kind in kinds)


def summary(results: Sequence[Result]) -> int:
    """Print the counts, and return the exit status."""
    silent = [r for r in results if r.silently_wrong]
    wrong = [r for r in results if r.wrong]
    right = [r for r in results if r.is_right]
    refused = [r for r in results if r.trained == "refused" and not r.wrong]
    print(
        f"{len(results)} checks: {len(right)} trained right, {len(refused)} refused, {len(silent)} silently wrong, "
        f"{len(wrong)} failed"
    )
    return 1 if silent or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
