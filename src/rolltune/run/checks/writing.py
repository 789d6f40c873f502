"""The checks of configs of the recipes that write traces and rubrics."""

from __future__ import annotations

from collections.abc import Iterator

from rolltune.config.components import check_component
from rolltune.config.schema import WriteRubricsConfig, WriteTracesConfig
from rolltune.run.checks.common import at_least, check_members, check_output_dir, check_verifier


def check_write_traces(cfg: WriteTracesConfig, world_size: int) -> Iterator[str]:
    yield from check_output_dir(cfg.output_dir)
    yield from at_least("seed", cfg.seed, 0)
    yield from check_component(cfg.data, "data")
    yield from check_members(cfg.writer, "writer", "rolltune.traces.TraceWriter", ["condition", "write"])
    yield from check_verifier(cfg.correct, "correct")
    yield from at_least("traces_per_problem", cfg.traces_per_problem, 1)
    yield from at_least("max_concurrency", cfg.max_concurrency, 1)


def check_write_rubrics(cfg: WriteRubricsConfig, world_size: int) -> Iterator[str]:
    yield from check_output_dir(cfg.output_dir)
    yield from at_least("seed", cfg.seed, 0)
    yield from check_component(cfg.data, "data")
    yield from check_members(cfg.writer, "writer", "rolltune.writers.rubrics.RubricWriter", ["check", "write"])
    yield from at_least("max_concurrency", cfg.max_concurrency, 1)
