"""The check of a config of recipes/serve.py."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

from rolltune.config.schema import ServeConfig
from rolltune.endpoints.serving import ADAPTER_RANKS
from rolltune.run.checks.common import above, at_least, check_model_path, check_output_dir


def check_serve(cfg: ServeConfig, world_size: int) -> Iterator[str]:
    yield from check_output_dir(cfg.output_dir)
    yield from check_model_path(cfg.model, "model")
    if not cfg.name.strip():
        yield "name: empty; give the model name that clients use"
    if not 1 <= cfg.port <= 65535:
        yield f"port: {cfg.port}; must be in 1 .. 65535"
    yield from at_least("max_model_len", cfg.max_model_len, 1)
    yield from at_least("max_num_seqs", cfg.max_num_seqs, 1)
    yield from above("kv_cache_gib", cfg.kv_cache_gib, 0)
    if cfg.lora_rank is not None:
        if not 1 <= cfg.lora_rank <= ADAPTER_RANKS[-1]:
            yield f"lora_rank: {cfg.lora_rank}; must be in 1 .. {ADAPTER_RANKS[-1]}"
        if cfg.takes_weights != "files":
            yield f"lora_rank: {cfg.lora_rank}; needs takes_weights: files, the way in which adapters travel"
    yield from above("start_seconds", cfg.start_seconds, 0)
    if cfg.command and shutil.which(cfg.command[0]) is None:
        yield f"command[0]: {cfg.command[0]}: no such program"
