"""Sample files: every completion of a step with its rewards and advantage."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rolltune.files import json_line, write_text_atomic
from rolltune.types import Completion, Group

MAX_TOKENS_SHOWN = 4096  # tokens of a step whose texts and log-probs are written: the first completions


def write_samples(
    output_dir: str | Path,
    step: int,
    groups: Sequence[Group],
    advantages: Sequence[Sequence[float] | None],
    *,
    token_gaps: Callable[[Completion], list[float] | None] | None = None,
    token_text: Callable[[int], str | list[str]] | None = None,
) -> Path:
    """Write every completion of a step to ``<output_dir>/samples/step_000010.jsonl``, one JSON object per line.

    Args:
        output_dir: the run's folder.
        step: number of optimizer steps done.
        groups: the sampled groups, including unscored completions.
        advantages: for each group, one value per scored completion, in order; None for a skipped group. A completion
            without an advantage gets null.
        token_gaps: returns the mismatch of each token of a completion; None if it is not known.
        token_text: decodes a token id. With it the first completions, :data:`MAX_TOKENS_SHOWN` tokens in all, get the
            text, the sampler's log-prob and the mismatch of each token.

    Returns:
        The path of the file, which appears complete or not at all.
    """
    path = Path(output_dir) / "samples" / f"step_{step:06d}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    records = sample_records(step, groups, advantages, token_gaps=token_gaps, token_text=token_text)
    write_text_atomic(path, "".join(map(json_line, records)))
    return path


def sample_records(
    step: int,
    groups: Sequence[Group],
    advantages: Sequence[Sequence[float] | None],
    *,
    token_gaps: Callable[[Completion], list[float] | None] | None = None,
    token_text: Callable[[int], str | list[str]] | None = None,
) -> list[dict[str, Any]]:
    """Make one record per completion; arguments as in :func:`write_samples`."""
    text_of = functools.cache(token_text) if token_text else None
    room = MAX_TOKENS_SHOWN
    records: list[dict[str, Any]] = []
    for number, (group, of_group) in enumerate(zip(groups, advantages, strict=True)):
        assert of_group is None or len(of_group) == len(group.scored().scores), "one advantage per scored completion"
        values = iter(of_group or ())
        for completion, score in zip(group.completions, group.scores, strict=True):
            records.append(
                {
                    "step": step,
                    "group": number,
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
            room -= len(completion.token_ids)
            if text_of and room >= 0:
                records[-1]["token_texts"] = [str(text_of(token)) for token in completion.token_ids]
                records[-1]["token_logprobs"] = [round(logprob, 3) for logprob in completion.logprobs]
                if token_gaps and (found := token_gaps(completion)) is not None:
                    records[-1]["token_gaps"] = [float(f"{gap:.2g}") for gap in found]
    return records
