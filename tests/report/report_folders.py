"""Output folders of runs with known numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from rolltune.metrics.samples import write_samples
from rolltune.types import Completion, Group, Problem, Prompt, Score


def metrics(step: int, **values: float) -> dict[str, Any]:
    return {"step": step, "time": 1_767_225_600.0 + step, **{k.replace("__", "/"): v for k, v in values.items()}}


def make_groups(step: int, text: str | None = None) -> list[Group]:
    """Two problems of two completions; their rewards rise from step to step. ``text`` is that of the first one."""
    groups = []
    for number in range(2):
        completions = tuple(
            Completion(
                token_ids=tuple(range(3)),
                logprobs=(-0.05, -1.0, -4.0),
                finish_reason="length" if (number, i) == (1, 1) else "stop",
                policy_version=step,
                text=f"step {step} problem {number} completion {i}",
            )
            for i in range(2)
        )
        if text is not None and number == 0:
            completions = (replace(completions[0], text=text), completions[1])
        scores = (
            Score(
                total=step / 10 + number / 100 + 1e-6,
                parts={"rubric": step / 10, "rubric/scored_share": 1.0},
                notes={"rubric/is_short": "1: a 1: It is short. | b 1: Yes.", "rubric/is_kind": "0.5: a 1: x | b 0: y"},
            ),
            Score(total=0.0) if number == 0 else Score(total=None, failure="judge_down"),
        )
        groups.append(
            Group(
                problem=Problem(
                    id=f"sums/{number}", messages=({"role": "user", "content": f"{number} + {step}?"},), answer="4"
                ),
                prompt=Prompt(token_ids=(1,)),
                completions=completions,
                scores=scores,
            )
        )
    return groups


def write_step(folder: Path, step: int, text: str | None = None) -> None:
    """Add a step to a run's folder."""
    advantages = [[1.0, -1.0], None]
    write_samples(folder, step, make_groups(step, text), advantages, token_text=lambda token: f"<t{token}>")
    line = metrics(
        step,
        reward__mean=step / 10,
        reward__unscored=0.25,
        reward__rubric__mean=step / 10,
        completions__truncated=0.25,
        updates=1.0,
        seconds__sample=2.0,
        seconds__train=1.0,
        mismatch__mean_abs=0.01 * step,
        judge__rubric__calls=4.0 * step,
        judge__rubric__dollars=0.5 * step,
    )
    if step % 2 == 0:
        line |= metrics(step, heldout__accuracy=0.5, heldout__accuracy_low=0.25, heldout__accuracy_high=0.75)
        line |= {"heldout/score": 0.5}
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
