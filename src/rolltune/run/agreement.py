"""All ranks do the same: an error of one ends all, and what they start from is compared."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from glob import glob
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

import rolltune
from rolltune import config
from rolltune.config.schema import EvaluateConfig, GRPOConfig, SFTConfig
from rolltune.distributed import World
from rolltune.errors import (
    ConfigError,
    EngineError,
    RankFailed,
    RunStopped,
    StopRequested,
    SyncError,
    os_error_text,
)
from rolltune.model.hollow import first_rows
from rolltune.model.load import unwrapped
from rolltune.samplers.generation import PromptTooLong
from rolltune.types import Problem

# Errors of one rank that all ranks raise, so that they stop in the same way. Any other ValueError is a user's mistake.
_SHARED = (EngineError, FloatingPointError, PromptTooLong, RunStopped, StopRequested, SyncError)
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element


@contextmanager
def together(world: World) -> Iterator[None]:
    """Let all ranks go on, or raise on all of them if one has raised; no rank waits for one that is gone.

    The block must not communicate.

    Raises:
        ConfigError: the mistakes that any rank has found.
        EngineError, FloatingPointError, PromptTooLong, RunStopped, StopRequested, SyncError: a rank has raised it.
        RankFailed: another rank has raised something else, which keeps its traceback there.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        if world.size == 1:
            raise
        error = raised
    failures = world.gather([] if error is None else [(world.rank, _kind(error), _text(error))])
    if not failures:
        return
    if error is not None and _kind(error) is None:
        raise error
    rank, kind, text = min(failures, key=lambda failure: failure[1] is not None)
    if kind is ConfigError:
        lines = dict.fromkeys(line for _, _, text in failures for line in text.splitlines())
        raise ConfigError(list(lines), on_all_ranks=True) from error
    raise (kind or RankFailed)(f"rank {rank}: {text}") from error


def _kind(error: Exception) -> type[Exception] | None:
    for kind in _SHARED:
        if isinstance(error, kind):
            return kind
    if isinstance(error, OSError):  # a full disk
        return RunStopped
    return ConfigError if isinstance(error, ValueError) else None


def _text(error: Exception) -> str:
    if isinstance(error, OSError):
        return os_error_text(error)
    return str(error) if _kind(error) else f"{type(error).__name__}: {error}"


def agree(world: World, facts: Mapping[str, str]) -> None:
    """Raise ConfigError on all ranks if they differ in one of ``facts``, with each value and its ranks."""
    if world.size == 1:
        return
    everyone = world.gather([dict(facts)])
    problems = []
    for name in dict.fromkeys(name for one in everyone for name in one):
        ranks: dict[str, list[int]] = {}
        for rank, one in enumerate(everyone):
            ranks.setdefault(one.get(name, "missing"), []).append(rank)
        if len(ranks) > 1:
            values = ", ".join(f"{value} on rank {', '.join(map(str, found))}" for value, found in ranks.items())
            problems.append(f"{name}: {values}; must be the same on all ranks")
    if problems:
        raise ConfigError(problems, on_all_ranks=True)


def agree_on_run(cfg: GRPOConfig | SFTConfig | EvaluateConfig, world: World) -> None:
    """Compare code and config over ranks before anything is loaded. ``output_dir`` may differ between nodes."""
    if world.size == 1:
        return
    keys = {name: str(value) for name, value in _leaves(config.masked(asdict(cfg))) if name != "output_dir"}
    code = source_checksum(Path(rolltune.__file__).parent)
    versions = {"rolltune": f"{rolltune.__version__} (source {code})", "torch": torch.__version__}
    agree(world, versions | {"transformers": transformers.__version__} | keys)


def agree_on_data(data: Mapping[str, Sequence[Problem]], world: World) -> None:
    """Compare data sets, each under its config key, over ranks."""
    if world.size > 1:
        agree(world, {key: _describe(problems) for key, problems in data.items()})


def agree_on_weights(key: str, model: PreTrainedModel | PeftModel, world: World) -> None:
    """Compare a checksum of all weights of a model, which a config key names, over ranks; of a hollow one, of rows."""
    if world.size > 1:
        agree(world, {f"{key}: weights": weights_checksum(first_rows(unwrapped(model)))})


def source_checksum(package: Path) -> str:
    """Return a checksum of all Python files in a folder, also in folders that are links: rewards and data are some."""
    files = sorted(glob("**/*.py", root_dir=package, recursive=True))
    return _digest(part for file in files for part in (file.encode(), (package / file).read_bytes()))


def weights_checksum(parameters: Iterable[Tensor]) -> str:
    """Return a checksum of the bits of the weights: one integer sum per tensor, computed where the tensor is."""
    sums = [p.detach().contiguous().view(_INTEGERS[p.element_size()]).sum(dtype=torch.int64) for p in parameters]
    return _digest([str([value.item() for value in sums]).encode()])


def _describe(problems: Sequence[Problem]) -> str:
    return f"{len(problems)} problems ({_digest(repr(problems[i]).encode() for i in range(len(problems)))})"


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=4)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
