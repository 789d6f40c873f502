"""Audit rewards before training on them: do right answers get full marks, and wrong answers nothing?

  - every gold answer of a data set, in several spellings (``$1,800``, ``1800.``, ``**1800**`` ...), must score 1;
  - mutated answers (off by one, an extra digit, a list of guesses, a hedge, the right number only in the working ...)
    must score 0 if a reward measures correctness.

Any other score is a false negative or a false positive. They are counted by kind and shown with examples. If there is
one, the exit status is 1.

A reward that measures something else (the format, say) is checked on right responses only. A reward that does not give
a right response 1 for its text (a penalty, a price on length) is left out.

    tune run audit_rewards --config audit_rewards.yaml

The data may also be answers that somebody has labelled right or wrong. Then these are scored, and every miss is shown:

    tune run audit_rewards --config audit_rewards_labelled.yaml
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from rolltune import config
from rolltune.config.components import instantiate
from rolltune.config.schema import AuditRewardsConfig
from rolltune.errors import ConfigError
from rolltune.files import make_folder, write_json_atomic
from rolltune.rewards.checks.reward_audit import (
    AuditReport,
    LabelledAnswer,
    audit,
    audit_labelled,
    render,
    render_response,
)
from rolltune.rewards.combine import format_counts, gold_kinds
from rolltune.run import build, checks
from rolltune.run.selftest import full_marks
from rolltune.terminal import printable
from rolltune.types import Problem, Reward


def run(cfg: AuditRewardsConfig) -> None:
    """Print a table for each reward and write ``<output_dir>/audit.json``."""
    console = Console()
    data = instantiate(cfg.data)
    problems, labelled = take(data, cfg.max_problems)
    rewards = {n: r for n, r in build.build_reward(cfg.rewards).text_rewards.items() if full_marks(r) == 1.0}
    if not rewards:
        raise ConfigError([f"rewards: none of {', '.join(cfg.rewards)} gives a right response 1 for its text"])
    answers = f", {len(labelled)} labelled answers" if labelled else ""
    console.print(f"{len(problems)} problems{answers}, rewards: {', '.join(rewards)}")
    if left_out := [name for name in cfg.rewards if name not in rewards]:
        console.print(f"not audited, because they do not give a right response 1 for its text: {', '.join(left_out)}")
    for name, reward in rewards.items():
        if kinds := gold_kinds(f"rewards.{name}", reward, problems):
            console.print(f"gold answers of {name}: {format_counts(kinds)}")
    if cfg.dry_run:
        console.print("dry run: the config is complete and valid; nothing was audited")
        return
    reports = {name: audit_one(problems, labelled, reward, cfg) for name, reward in rewards.items()}
    for name, report in reports.items():
        console.rule(f"{name}: {report.false_negatives} false negatives, {report.false_positives} false positives")
        console.print(printable(render(report)), markup=False, highlight=False)
    found = {
        name: {"false_negatives": report.false_negatives, "false_positives": report.false_positives}
        for name, report in reports.items()
    }
    make_folder(cfg.output_dir)
    write_json_atomic(Path(cfg.output_dir) / "audit.json", found)
    if any(count for counts in found.values() for count in counts.values()):
        sys.exit(1)


def take(data: Sequence[Any], count: int | None) -> tuple[list[Problem], list[LabelledAnswer]]:
    """Return the first problems and their labelled answers, which only labelled data have."""
    if not isinstance(data[0], LabelledAnswer):
        return [data[i] for i in range(min(count or len(data), len(data)))], []
    ids = list(dict.fromkeys(answer.problem.id for answer in data))[:count]
    labelled = [answer for answer in data if answer.problem.id in ids]
    return list({answer.problem.id: answer.problem for answer in labelled}.values()), labelled


def audit_one(
    problems: Sequence[Problem], labelled: Sequence[LabelledAnswer], reward: Reward, cfg: AuditRewardsConfig
) -> AuditReport:
    """Audit one reward, on right responses only if it gives full marks to a wrong answer (a format reward does)."""
    answer_format = cfg.answer_format.format(solution="{solution}", answer="{answer}")  # turns {{ }} into { }
    probe = Problem(id="probe", messages=({"role": "user", "content": "What is 1 + 1?"},), answer="2")
    wrong = render_response(answer_format, solution="So it is 1.", answer="1")
    wrong_responses = reward(probe, wrong).total != 1.0
    if labelled:
        return audit_labelled(labelled, reward, answer_format, wrong_responses=wrong_responses)
    return audit(problems, reward, answer_format, seed=cfg.seed, wrong_responses=wrong_responses)


if __name__ == "__main__":
    config.main(AuditRewardsConfig, run, check=checks.check_audit_rewards)
