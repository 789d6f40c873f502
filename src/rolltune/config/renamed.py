"""Names of earlier versions. A config that has one is refused, and the message gives the name to use instead."""

from __future__ import annotations

# Config keys: old -> new.
KEYS = {
    "eval.gold": "eval.overoptimization",
}

# Config keys that are gone: key -> what to use instead.
_CURVES = (
    "count behaviours with a reward of weight 0: "
    "behaviours: {_component_: rolltune.rewards.behaviours.behaviour_counts, weight: 0}"
)
REMOVED_KEYS = {
    "logging.classifier": _CURVES,
    "logging.classified_samples": _CURVES,
}

# Component paths: old -> new.
COMPONENTS = {
    "rolltune.rewards.rubric.endpoint_judge.EndpointJudge": "rolltune.rewards.judges.endpoint.EndpointJudge",
    "rolltune.rewards.rubric.gold.GoldCheck": "rolltune.rewards.checks.overoptimization.OveroptimizationCheck",
    "rolltune.rewards.rubric.policy_judge.PolicyJudge": "rolltune.rewards.judges.policy.PolicyJudge",
    "rolltune.data.countdown.countdown_rows": "rolltune.data.countdown.countdown_records",
    "rolltune.rewards.rubric.writer.EndpointRubricWriter": "rolltune.writers.rubrics.EndpointRubricWriter",
}

# Component paths that are gone: path -> what to use instead.
REMOVED_COMPONENTS = {
    "rolltune.corrections.Bypass": "set old_policy: sampler, and its rejection as the correction",
    "rolltune.schedules.constant_with_warmup": "use transformers.get_scheduler with name: constant_with_warmup",
}

# Arguments: old -> new, for each component that takes the new one and not the old one. The new one may be a field of a
# mapping, such as "endpoint.base_url".
ARGUMENTS = {
    "initial": "init_scale",
    "max_rows": "max_num_seqs",
    "rows": "hub_split",
    "base_url": "endpoint.base_url",
    "model": "endpoint.model",
    "api_key_env": "endpoint.api_key_env",
    "timeout_seconds": "endpoint.timeout_seconds",
    "max_attempts": "endpoint.max_attempts",
    "max_calls": "endpoint.max_calls",
    "max_total_tokens": "endpoint.max_total_tokens",
    "max_dollars": "endpoint.max_dollars",
    "dollars_per_million_input": "endpoint.dollars_per_million_input",
    "dollars_per_million_output": "endpoint.dollars_per_million_output",
}


def renamed_key(key: str) -> str | None:
    """Say what became of an old config key; None for any other key."""
    if key in KEYS:
        return f"was renamed; use {KEYS[key]}"
    return f"was removed; {REMOVED_KEYS[key]}" if key in REMOVED_KEYS else None
