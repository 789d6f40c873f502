"""The check of a config of recipes/sft.py."""

from __future__ import annotations

from collections.abc import Iterator

from rolltune.config.schema import SFTConfig
from rolltune.run.checks.common import at_least, check_answer_format
from rolltune.run.checks.training import check_training


def check_sft(cfg: SFTConfig, world_size: int) -> Iterator[str]:
    yield from check_training(cfg, world_size, num_updates=cfg.num_steps)
    if cfg.model.batch_invariant:
        yield "model.batch_invariant: true; has no effect in sft, which does not sample; leave it out"
    # A trace's {solution} is a whole response, answer included.
    yield from check_answer_format(cfg.answer_format, cfg.prompt.prefill, needs=("solution", "answer"))
    yield from at_least("batch.microbatch_tokens", cfg.batch.microbatch_tokens, 1)
    examples = cfg.batch.examples_per_step
    yield from at_least("batch.examples_per_step", examples, 1)
    if examples >= 1 and examples % world_size:
        yield f"batch.examples_per_step: {examples}; must be divisible by the number of processes, {world_size}"
