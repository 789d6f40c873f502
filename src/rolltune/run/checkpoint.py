"""Atomic checkpoints and exact resume.

    <output_dir>/checkpoints/step_000010/policy/     Hugging Face format, loads in plain transformers or peft
    <output_dir>/checkpoints/step_000010/trainer.pt  optimizer, schedule, master weights, loss scale
    <output_dir>/checkpoints/step_000010/state.json  step, position in the data, best score
    <output_dir>/checkpoints/step_000010/files.json  the size of each of these files
    <output_dir>/best -> checkpoints/step_000010/policy

A checkpoint is written under a temporary name and renamed, so a folder named step_* is complete. No random state is
saved: all randomness is derived from (seed, step, purpose).
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch.utils._pytree import tree_leaves

from rolltune.config.values import type_problem
from rolltune.errors import ConfigError

FILES = "files.json"


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
        numbers = [path.name.removeprefix("step_") for path in self.folder.glob("step_*") if path.is_dir()]
        steps = [int(number) for number in numbers if number.isdecimal()]
        return sorted(step for step in steps if self.path(step).name.removeprefix("step_") in numbers)

    def obstacle(self) -> str | None:
        """Return what stands in the way of saving or finding checkpoints, such as a renamed one; None if nothing."""
        if self.folder.is_symlink() and not self.folder.exists():
            return f"{self.folder}: the link leads nowhere; restore what it points to, or remove it"
        if self.folder.exists() and not self.folder.is_dir():
            return f"{self.folder}: is a file; move it away: checkpoints go into a folder of this name"
        others = {path.name for path in self.folder.glob("step_*")} - {self.path(step).name for step in self.steps()}
        if others:
            return f"{self.folder / min(others)}: is not a checkpoint, which is a folder such as step_000010; rename it"
        best = self.output_dir / "best"
        if best.exists() and not best.is_symlink():
            return f"{best}: is not the link to the best checkpoint; move it away"
        return None

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
            (work / FILES).write_text(json.dumps(_sizes(work), indent=1))
            _sync_files(work)
        except Exception:
            shutil.rmtree(work, ignore_errors=True)
            raise
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


def tensor_bytes(tensors: Any) -> int:
    """Return the bytes of all tensors in nested containers."""
    return sum(leaf.nbytes for leaf in tree_leaves(tensors) if isinstance(leaf, torch.Tensor))


def free_bytes(folder: Path) -> int:
    """Return what is free on the disk of a folder, which need not exist yet."""
    return shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free


def check_room(folder: Path, *, needed: float) -> None:
    """Raise OSError if the disk of a folder has less than ``needed`` bytes free."""
    free = free_bytes(folder)
    if free < needed:
        raise OSError(errno.ENOSPC, f"needs {needed / 2**30:.2f} GiB, and {free / 2**30:.2f} GiB are free")


def damage(path: Path) -> str | None:
    """Return what makes a checkpoint unusable, such as a file that was cut; None if nothing was found.

    The sizes of the files are compared, not every byte.
    """
    try:
        state, sizes = load_state(path), dict(json.loads((path / FILES).read_text()))
    except FileNotFoundError as error:
        return f"{Path(error.filename).name}: missing"
    except (OSError, ValueError, TypeError) as error:
        return f"state.json or {FILES}: {type(error).__name__}: {error}"
    if f"step_{state.step:06d}" != path.name:
        return f"state.json: is of step {state.step}"
    there = _sizes(path)
    for name, size in sizes.items():
        if there.get(name) != size:
            return f"{name}: {f'{there[name]} bytes instead of {size}' if name in there else 'missing'}"
    return None


def _sizes(folder: Path) -> dict[str, int]:
    """Return the size of each file in a checkpoint, by its path there."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file.stat().st_size for file in files}


def load_state(path: Path) -> TrainState:
    """Read a checkpoint's state.json.

    Raises:
        ValueError: it is not JSON, or a value has another type.
        TypeError: it holds other keys.
    """
    state = TrainState(**json.loads((path / "state.json").read_text()))
    for name, hint in get_type_hints(TrainState).items():
        if problem := type_problem(getattr(state, name), hint):
            raise ValueError(f"{name}: {problem}")
    return state


def load_optimization(path: Path) -> dict:
    """Read a checkpoint's trainer.pt into host memory: whole tensors, of which a rank may need a slice only.

    Raises:
        ConfigError: it is damaged.
    """
    file = path / "trainer.pt"
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise ConfigError(
            [f"{file}: cannot be read ({str(error).splitlines()[0]}); delete this checkpoint to resume from another"]
        ) from error


def _sync_files(folder: Path) -> None:
    """Flush files to disk before the rename, so that a renamed folder has no empty files after a power cut."""
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
