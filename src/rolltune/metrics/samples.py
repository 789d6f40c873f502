"""Sample files: every completion of a step with its rewards and advantage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rolltune.files import json_line, write_text_atomic
from rolltune.types import Group


def write_samples(
    output_dir: str | Path,
    step: int,
    groups: Sequence[Group],
    advantages: Sequence[Sequence[float] | None],
) -> Path:
    """Write every completion of a step to ``<output_dir>/samples/step_000010.jsonl``, one JSON object per line.

    Args:
        output_dir: the run's folder.
        step: number of optimizer steps done.
        groups: the sampled groups, including unscored completions.
        advantages: for each group, one value per scored completion, in order; None for a skipped group. A completion
            without an advantage gets null.

    Returns:
        The path of the file, which appears complete or not at all.
    """
    path = Path(output_dir) / "samples" / f"step_{step:06d}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(path, "".join(map(json_line, sample_records(step, groups, advantages))))
    return path


def sample_records(
    step: int,
    groups: Sequence[Group],
    advantages: Sequence[Sequence[float] | None],
) -> list[dict[str, Any]]:
    """Make one record per completion; arguments as in :func:`write_samples`."""
    records: list[dict[str, Any]] = []
    for group, of_group in zip(groups, advantages, strict=True):
        assert of_group is None or len(of_group) == len(group.scored().scores), "one advantage per scored completion"
        values = iter(of_group or ())
        for completion, score in zip(group.completions, group.scores, strict=True):
            records.append(
                {
                    "step": step,
                    "problem": group.problem.id,
                    "messages": list(group.problem.messages),
                    "answer": group.problem.answer,
                    "text": completion.text,
                    "tokens": len(completion.token_ids),
                    "finish_reason": completion.finish_reason,
                    "policy_version": completion.policy_version,
                    "reward": score.total,
                    "parts": dict(score.parts),
                    "failure": score.failure,
                    "notes": dict(score.notes),
                    "advantage": None if of_group is None or score.total is None else next(values),
                }
            )
    return records
