"""Atomic checkpoints and exact resume.

    <output_dir>/checkpoints/step_000010/policy/     Hugging Face format, loads in plain transformers or peft
    <output_dir>/checkpoints/step_000010/trainer.pt  optimizer, schedule, master weights, loss scale
    <output_dir>/checkpoints/step_000010/state.json  step, position in the data, best score
    <output_dir>/best -> checkpoints/step_000010/policy

A checkpoint is written under a temporary name and renamed, so a folder named step_* is complete. No random state is
saved: all randomness is derived from (seed, step, purpose).
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from rolltune.errors import RunStopped


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """The state of a run between two steps.

    Attributes:
        step: steps taken.
        data_position: problems taken from the training stream.
        policy_version: optimizer steps taken.
        best_score: highest held-out score so far (accuracy; the negative loss for sft); None before the first one.
        best_step: step with the best score.
        seconds: training time so far, over all parts of a resumed run.
    """

    step: int = 0
    data_position: int = 0
    policy_version: int = 0
    best_score: float | None = None
    best_step: int | None = None
    seconds: float = 0.0


class Checkpoints:
    """The checkpoints in one output folder: the last ``keep_last``, and the best."""

    def __init__(self, output_dir: Path, *, keep_last: int):
        self.output_dir = output_dir
        self.folder = output_dir / "checkpoints"
        self.keep_last = keep_last

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, ascending."""
        numbers = (path.name.removeprefix("step_") for path in self.folder.glob("step_*"))
        return sorted(int(number) for number in numbers if number.isdigit())

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step:06d}"

    def latest(self) -> Path | None:
        """Return the newest checkpoint that can be resumed from; None if there is none."""
        whole = [self.path(step) for step in self.steps() if (self.path(step) / "trainer.pt").exists()]
        return whole[-1] if whole else None

    def save(
        self, state: TrainState, *, save_policy: Callable[[Path], None], optimization: dict, is_best: bool
    ) -> None:
        """Write a checkpoint, point ``best`` at it if ``is_best``, and delete old ones."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_stale()
        target = self.path(state.step)
        work = self.folder / f".tmp-{target.name}"
        try:
            save_policy(work / "policy")
            torch.save(optimization, work / "trainer.pt")
            (work / "state.json").write_text(json.dumps(asdict(state)))
            _sync_files(work)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors hide a full disk in theirs
            shutil.rmtree(work, ignore_errors=True)
            free = shutil.disk_usage(self.folder).free
            kept = f"the checkpoint of step {max(self.steps())} is intact" if self.steps() else "there is no other one"
            raise RunStopped(
                f"step {state.step}: the checkpoint could not be written to {self.folder} ({error}); "
                f"{free / 2**20:.0f} MiB are free there, and {kept}"
            ) from error
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
        """Finish saving ``state``: a kill after the rename leaves ``best`` and old checkpoints unchanged."""
        self._remove_stale()
        if state.best_step is not None and self.path(state.best_step).is_dir():
            self._point_best_at(self.path(state.best_step))
        self._prune()

    def _remove_stale(self) -> None:
        for stale in self.folder.glob(".tmp-*"):  # of a run that was killed while saving
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
                # The best checkpoint is loaded but never resumed, and the optimizer state is most of it.
                (path / "trainer.pt").unlink(missing_ok=True)
            else:
                # Renamed first, so that a kill inside rmtree cannot leave half a folder under a complete one's name.
                doomed = self.folder / f".tmp-old-{path.name}"
                os.rename(path, doomed)
                shutil.rmtree(doomed)


def damage(path: Path) -> str | None:
    """Return what makes a checkpoint unusable, such as a file that was cut; None if nothing was found.

    The files' own headers are checked, not every byte.
    """
    try:
        load_state(path)
    except (OSError, ValueError, TypeError) as error:
        return f"state.json: {type(error).__name__}"
    if not zipfile.is_zipfile(path / "trainer.pt"):
        return "trainer.pt: cut short"
    weights = list((path / "policy").glob("*.safetensors"))
    if not weights:
        return "policy: no *.safetensors file"
    for file in weights:
        try:
            with safe_open(file, framework="pt"):  # compares the file's length with its header
                pass
        except (OSError, SafetensorError) as error:
            return f"policy/{file.name}: {error}"
    return None


def load_state(path: Path) -> TrainState:
    return TrainState(**json.loads((path / "state.json").read_text()))


def load_optimization(path: Path, device: torch.device) -> dict:
    return torch.load(path / "trainer.pt", map_location=device, weights_only=True)


def _sync_files(folder: Path) -> None:
    """Flush files to disk before the rename, so that a renamed folder has no empty files after a power cut."""
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
