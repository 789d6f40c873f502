"""Lint rubrics before training on them, by their words and weights only: no model is asked.

  - Errors would reward the wrong thing: a criterion marked against its wording, a pitfall of unknown direction, a
    repeated criterion, one that refers to something else, or one that contains the whole reference answer.
  - Warnings may make a rubric weaker than it could be. The rubric writers of "Rubrics as Rewards" (arXiv 2507.17746)
    were asked for 7 to 20 criteria, and no criterion should outweigh all others.

``<output_dir>/lint.json`` has every finding. The exit status is 1 if there was an error.

    tune run lint_rubrics --config lint_rubrics.yaml
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rolltune import config
from rolltune.config.components import instantiate
from rolltune.config.schema import LintRubricsConfig
from rolltune.files import make_folder, write_json_atomic
from rolltune.rewards.checks.rubric_lint import Finding, lint
from rolltune.run import checks
from rolltune.terminal import printable
from rolltune.types import Problem

SHOWN = 50  # findings in the table


def run(cfg: LintRubricsConfig) -> None:
    """Print the findings and write ``<output_dir>/lint.json``."""
    console = Console()
    problems = instantiate(cfg.data)
    problems = [problems[i] for i in range(min(cfg.max_problems or len(problems), len(problems)))]
    criteria = sum(len(problem.rubric.criteria) for problem in problems if problem.rubric is not None)
    console.print(f"{len(problems)} problems, {criteria} criteria")
    if cfg.dry_run:
        console.print("dry run: the config is complete and valid; nothing was linted")
        return
    findings = [finding for problem in problems for finding in lint_problem(problem, cfg)]
    findings.sort(key=lambda finding: finding.severity)  # errors first; else in the order of the problems
    counts = Counter(finding.severity for finding in findings)
    if findings:
        console.print(table(findings[:SHOWN]))
    if len(findings) > SHOWN:
        console.print(f"... and {len(findings) - SHOWN} more, see lint.json")
    kinds = Counter(f"{finding.severity} {finding.rule}" for finding in findings)
    console.print(f"{counts['error']} errors, {counts['warning']} warnings", highlight=False)
    for kind, count in kinds.most_common():
        console.print(f"  {count:>6} {kind}", highlight=False)
    report = {
        "problems": len(problems),
        "criteria": criteria,
        "errors": counts["error"],
        "warnings": counts["warning"],
        "findings": [asdict(finding) for finding in findings],
    }
    make_folder(cfg.output_dir)
    write_json_atomic(Path(cfg.output_dir) / "lint.json", report)
    if counts["error"]:
        sys.exit(1)


def lint_problem(problem: Problem, cfg: LintRubricsConfig) -> list[Finding]:
    """Lint a problem's rubric. A missing rubric is a finding."""
    if problem.rubric is None:
        return [
            Finding(
                severity="error",
                rule="no_rubric",
                rubric=problem.id,
                criterion=None,
                message="the problem has no rubric",
                mend="write one (tune run write_rubrics) and read it with rolltune.data.rubrics.rubric_jsonl",
            )
        ]
    return lint(
        problem.rubric,
        answer=problem.answer,
        name=problem.id,
        fewest=cfg.fewest_criteria,
        most=cfg.most_criteria,
    )


def table(findings: Sequence[Finding]) -> Table:
    found = Table("severity", "rubric", "rule", "what is wrong", "what would be right")
    for finding in findings:
        style = "red" if finding.severity == "error" else "yellow"
        cells = (finding.rubric, finding.rule, finding.message, finding.mend)
        found.add_row(Text(finding.severity, style), *(Text(printable(cell, keep="")) for cell in cells))
    return found


if __name__ == "__main__":
    config.main(LintRubricsConfig, run, check=checks.check_lint_rubrics)
