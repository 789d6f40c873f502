"""Which problems fit the model's context, decided before weights are loaded.

Every problem that a run can take is measured, not only the first: one that does not fit would end the run when it
comes up, and again whenever the run is resumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rolltune.config.schema import Component, GRPOConfig, ModelConfig, SFTConfig
from rolltune.data.dataset import Dataset
from rolltune.errors import ConfigError
from rolltune.model.load import load_config
from rolltune.model.parts import rope_change
from rolltune.prompts import PromptRenderer
from rolltune.samplers.caches import context_length
from rolltune.terminal import printable
from rolltune.types import Problem

LISTED = 3  # ids in a message


@dataclass(frozen=True, kw_only=True)
class Limit:
    """Most tokens of a prompt with its response, and what sets this limit."""

    tokens: int
    source: str


def sequence_limit(model: ModelConfig, sampler: Component | None = None) -> Limit | None:
    """Return the smaller one of the model's context and ``sampler.max_model_len``; None if there is no limit.

    The native sampler's context ends where RoPE starts to change with the longest sequence, the trainer's where it does
    with every length (dynamic RoPE).
    """
    config = load_config(model.path).get_text_config()
    is_native = sampler is not None and sampler["_component_"].startswith("rolltune.samplers.native.")
    if is_native or rope_change(config, "dynamic") is not None:
        context = context_length(config)
    else:
        context = getattr(config, "max_position_embeddings", None)
    limits = [] if context is None else [Limit(tokens=context, source=f"the context of {model.path}")]
    if sampler is not None and sampler.get("max_model_len") is not None:
        limits.append(Limit(tokens=sampler["max_model_len"], source="sampler.max_model_len"))
    return min(limits, key=lambda limit: limit.tokens, default=None)


def fitting(
    problems: Sequence[Problem],
    tokens: Sequence[int],
    limit: Limit | None,
    *,
    key: str,
    parts: str,
    remedy: str = "",
    drop: bool = False,
    quiet: bool = False,
) -> Sequence[Problem]:
    """Return the problems that fit, in order.

    Args:
        problems: the problems of one data set.
        tokens: tokens of each problem's prompt and response.
        limit: most tokens of a prompt with its response.
        key: config key of the data set.
        parts: what was counted, for the message.
        remedy: further ways out, for the message.
        drop: leave out problems that do not fit, with one printed line, instead of refusing them.
        quiet: print nothing.

    Raises:
        ConfigError: problems do not fit, and ``drop`` is false or nothing is left.
    """
    too_long = [i for i, count in enumerate(tokens) if limit is not None and count > limit.tokens]
    if not too_long or limit is None:
        return problems
    ids = ", ".join(problems[i].id for i in too_long[:LISTED]) + (", ..." if len(too_long) > LISTED else "")
    longest = max(too_long, key=lambda i: tokens[i])
    count = f"{len(too_long)} of {len(problems)} problems"
    found = f"{key}: {count} do not fit {limit.source}, {limit.tokens} tokens: {ids}"
    if not drop or len(too_long) == len(problems):
        raise ConfigError(
            [
                f"{found}; the longest, {problems[longest].id}, needs {tokens[longest]} ({parts}); "
                f"shorten the prompts or the responses, or leave these problems out{remedy}"
            ]
        )
    if not quiet:
        print(printable(f"{found}; they are left out (data.too_long: drop)"), flush=True)
    left_out = set(too_long)
    return Dataset(problem for i, problem in enumerate(problems) if i not in left_out)


def fitting_data(
    cfg: GRPOConfig | SFTConfig,
    limit: Limit | None,
    sets: Sequence[tuple[str, Sequence[Problem], Sequence[int]]],
    *,
    parts: str,
    quiet: bool,
) -> list[Sequence[Problem]]:
    """Apply :func:`fitting` to the data sets of a training run, given as (key, problems, tokens)."""
    drop = cfg.data.too_long == "drop"
    remedy = "" if drop else " with data.too_long=drop"
    return [
        fitting(problems, tokens, limit, key=key, parts=parts, remedy=remedy, drop=drop, quiet=quiet)
        for key, problems, tokens in sets
    ]


def fitting_prompts(
    cfg: GRPOConfig,
    train: Sequence[Problem],
    heldout: Sequence[Problem],
    render: PromptRenderer,
    *,
    quiet: bool = False,
) -> tuple[Sequence[Problem], Sequence[Problem], int]:
    """Measure all prompts of a GRPO run; the longest completion must fit behind each.

    Returns:
        The training and held-out problems that fit, and the tokens of the longest prompt among them.

    Raises:
        ConfigError: problems do not fit, and ``data.too_long`` is "refuse" or nothing is left.
    """
    limit = sequence_limit(cfg.model, cfg.sampler)
    training, evaluation = cfg.sampling.max_new_tokens, cfg.eval.max_new_tokens or cfg.sampling.max_new_tokens
    kept, longest = [], 0
    for key, problems, new_key, new in (
        ("data.train", train, "sampling.max_new_tokens", training),
        ("data.heldout", heldout, "eval.max_new_tokens", evaluation),
    ):
        prompts = render.lengths(problems)
        sets = [(key, problems, [count + new for count in prompts])]
        kept += fitting_data(cfg, limit, sets, parts=f"prompt and {new_key}, {new}", quiet=quiet)
        longest = max([longest, *(count for count in prompts if limit is None or count + new <= limit.tokens)])
    return kept[0], kept[1], longest
