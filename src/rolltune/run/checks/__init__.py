"""Checks of each recipe's config beyond the types of its keys. They load no data and no weights.

A check yields problems, each ``key: value; what is accepted``. It builds components that are cheap to build, so that
these check their own arguments, and applies the rules that relate several keys. A setting that would have no effect
in the run is a problem too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from rolltune import config
from rolltune.config import schema as schemas
from rolltune.run.checks.audits import check_audit_judge, check_audit_rewards, check_lint_rubrics
from rolltune.run.checks.evaluate import check_evaluate
from rolltune.run.checks.grpo import check_grpo
from rolltune.run.checks.serve import check_serve
from rolltune.run.checks.sft import check_sft
from rolltune.run.checks.writing import check_write_rubrics, check_write_traces

__all__ = [
    "CHECKS",
    "check_audit_judge",
    "check_audit_rewards",
    "check_evaluate",
    "check_grpo",
    "check_lint_rubrics",
    "check_serve",
    "check_sft",
    "check_write_rubrics",
    "check_write_traces",
    "validate",
]

T = TypeVar("T")

CHECKS: dict[type, config.Check[Any]] = {
    schemas.GRPOConfig: check_grpo,
    schemas.SFTConfig: check_sft,
    schemas.AuditRewardsConfig: check_audit_rewards,
    schemas.AuditJudgeConfig: check_audit_judge,
    schemas.LintRubricsConfig: check_lint_rubrics,
    schemas.WriteTracesConfig: check_write_traces,
    schemas.WriteRubricsConfig: check_write_rubrics,
    schemas.EvaluateConfig: check_evaluate,
    schemas.ServeConfig: check_serve,
}


def validate(schema: type[T], path: str | Path, overrides: Sequence[str] = (), *, world_size: int | None = None) -> T:
    """Call :func:`rolltune.config.validate` with the check of the recipe that ``schema`` belongs to."""
    return config.validate(schema, path, overrides, check=CHECKS[schema], world_size=world_size)
