"""The checks of configs of the recipes that audit rewards, judges and rubrics."""

from __future__ import annotations

from collections.abc import Iterator

from rolltune.config.components import check_component
from rolltune.config.schema import AuditJudgeConfig, AuditRewardsConfig, LintRubricsConfig
from rolltune.rewards.rubric.templates import load_prompt
from rolltune.run.checks.common import (
    at_least,
    check_answer_format,
    check_max_problems,
    check_members,
    check_output_dir,
    check_rewards,
)


def check_audit_rewards(cfg: AuditRewardsConfig, world_size: int) -> Iterator[str]:
    yield from check_output_dir(cfg.output_dir)
    yield from at_least("seed", cfg.seed, 0)
    yield from check_component(cfg.data, "data")
    yield from check_rewards(cfg.rewards)
    yield from check_answer_format(cfg.answer_format)
    yield from check_max_problems(cfg.max_problems)


def check_audit_judge(cfg: AuditJudgeConfig, world_size: int) -> Iterator[str]:
    yield from check_output_dir(cfg.output_dir)
    yield from at_least("seed", cfg.seed, 0)
    yield from check_component(cfg.data, "data")
    problems = check_members(cfg.judge, "judge", "rolltune.rewards.judges.judge.Judge", ["ask", "metrics"])
    yield from problems
    if cfg.template is not None:
        try:
            load_prompt(cfg.template, "explicit" if cfg.one_call else "explicit_one")
        except ValueError as error:
            yield str(error).replace("prompt", "template", 1)
    if cfg.reversed and not cfg.one_call:
        yield "reversed: true; has no effect while one_call is false: each question has one criterion"
    yield from at_least("repeats", cfg.repeats, 1)
    if cfg.repeats > 1 and not problems and check_component(cfg.judge | {"seed": 0}, "judge"):
        yield f"repeats: {cfg.repeats}; must be 1, as {cfg.judge['_component_']} takes no seed to tell repeats apart"
    yield from at_least("resamples", cfg.resamples, 100)
    for name, lowest in (("min_accuracy", 0), ("min_kappa", -1)):
        least = getattr(cfg, name)
        if least is not None and not lowest <= least <= 1:
            yield f"{name}: {least}; must be in {lowest} .. 1"


def check_lint_rubrics(cfg: LintRubricsConfig, world_size: int) -> Iterator[str]:
    yield from check_output_dir(cfg.output_dir)
    yield from check_component(cfg.data, "data")
    yield from check_max_problems(cfg.max_problems)
    yield from at_least("fewest_criteria", cfg.fewest_criteria, 1)
    if cfg.most_criteria < cfg.fewest_criteria:
        yield f"most_criteria: {cfg.most_criteria}; must be at least fewest_criteria, {cfg.fewest_criteria}"
