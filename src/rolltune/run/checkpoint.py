"""Atomic checkpoints and exact resume.

    <output_dir>/checkpoints/step_000010/policy/     Hugging Face format, loads in plain transformers or peft
    <output_dir>/checkpoints/step_000010/trainer.pt  optimizer, schedule, master weights, loss scale
    <output_dir>/checkpoints/step_000010/state.json  step, data data_position, best accuracy
    <output_dir>/best -> checkpoints/step_000010/policy

A checkpoint is written under a temporary name and renamed, so a folder named step_* is whole. There is no random
state to save: all of it is derived from (seed, step, purpose).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Where a run stands between two steps.

    Attributes:
        step: steps done.
        data_position: problems taken from the training stream.
        policy_version: optimizer steps done.
        best_score: highest held-out score so far (accuracy; for prime the negative loss); None before the first one.
        best_step: the step that had it.
        seconds: of training so far, over all resumed parts.
    """

    step: int = 0
    data_position: int = 0
    policy_version: int = 0
    best_score: float | None = None
    best_step: int | None = None
    seconds: float = 0.0


class Checkpoints:
    """The checkpoints of one output folder: the last ``keep_last``, and the best."""

    def __init__(self, output_dir: Path, *, keep_last: int):
        self.output_dir = output_dir
        self.folder = output_dir / "checkpoints"
        self.keep_last = keep_last

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, ascending."""
        numbers = (path.name.removeprefix("step_") for path in self.folder.glob("step_*"))
        return sorted(int(number) for number in numbers if number.isdigit())

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step:06d}"

    def latest(self) -> Path | None:
        """The newest checkpoint that can be resumed from."""
        whole = [self.path(step) for step in self.steps() if (self.path(step) / "trainer.pt").exists()]
        return whole[-1] if whole else None

    def save(
        self, state: TrainState, *, save_policy: Callable[[Path], None], optimization: dict, is_best: bool
    ) -> None:
        """Write one checkpoint; point ``best`` at it if it is; drop those that are no longer wanted."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_stale()
        target = self.path(state.step)
        work = self.folder / f".tmp-{target.name}"
        save_policy(work / "policy")
        torch.save(optimization, work / "trainer.pt")
        (work / "state.json").write_text(json.dumps(asdict(state)))
        _sync_files(work)
        if target.exists():
            old = self.folder / f".tmp-old-{target.name}"
            os.rename(target, old)
            os.rename(work, target)
            shutil.rmtree(old)
        else:
            os.rename(work, target)
        if is_best:
            self._point_best_at(target)
        self._prune()

    def recover(self, state: TrainState) -> None:
        """Finish the save of ``state``: a kill behind the rename leaves ``best`` and older checkpoints as they were."""
        self._remove_stale()
        if state.best_step is not None and self.path(state.best_step).is_dir():
            self._point_best_at(self.path(state.best_step))
        self._prune()

    def _remove_stale(self) -> None:
        for stale in self.folder.glob(".tmp-*"):  # a run that was killed in here
            shutil.rmtree(stale)

    def _point_best_at(self, target: Path) -> None:
        link = self.output_dir / ".tmp-best"
        link.unlink(missing_ok=True)
        link.symlink_to(Path("checkpoints") / target.name / "policy")
        os.replace(link, self.output_dir / "best")

    def _prune(self) -> None:
        best = (self.output_dir / "best").resolve().parent if (self.output_dir / "best").exists() else None
        for step in self.steps()[: -self.keep_last]:
            path = self.path(step)
            if path.resolve() == best:
                # It is loaded, never resumed, and optimizer state is the bulk.
                (path / "trainer.pt").unlink(missing_ok=True)
            else:
                # Renamed first: a kill inside rmtree must not leave half a folder under a whole one's name.
                doomed = self.folder / f".tmp-old-{path.name}"
                os.rename(path, doomed)
                shutil.rmtree(doomed)


def load_state(path: Path) -> TrainState:
    return TrainState(**json.loads((path / "state.json").read_text()))


def load_optimization(path: Path, device: torch.device) -> dict:
    return torch.load(path / "trainer.pt", map_location=device, weights_only=True)


def _sync_files(folder: Path) -> None:
    """Flush to disk before the rename: after a power cut a renamed folder must not hold empty files."""
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
