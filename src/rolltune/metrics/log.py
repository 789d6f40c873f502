"""What a run leaves behind besides checkpoints: numbers and samples.

Files in the output folder:

- ``metrics.jsonl``: one JSON object a line, ``{"step": 10, "time": 1767225600.0, "kl": 0.003, ...}``;
- ``samples/step_000010.jsonl``: every completion of a step with its rewards and advantage;
- ``curves.png``: drawn from ``metrics.jsonl`` by :func:`rolltune.metrics.curves.plot_curves`;
- ``wandb/`` and ``tensorboard/`` where these are on.

In a run over several processes the first one writes; the others hold ``MetricsLog(None)``, which takes the same calls
and does nothing.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from rolltune import types
from rolltune.files import finite, write_text_atomic

Record = dict[str, Any]


class MetricsLog:
    """Scalars of a run, to ``metrics.jsonl`` and, where asked, to Weights & Biases and TensorBoard.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> log = MetricsLog(folder)
        >>> log.log(1, {"reward/mean": 0.25})
        >>> log.close()
        >>> read_metrics(folder)[0]["reward/mean"]
        0.25

    Args:
        output_dir: the run's folder, made if needed. None for a log that writes nothing.
        wandb: log to Weights & Biases: offline where the environment has no WANDB_API_KEY (WANDB_MODE overrides).
            ``wandb sync`` uploads an offline run later.
        wandb_project: its project.
        tensorboard: write ``<output_dir>/tensorboard``.
        config: the resolved config, shown by Weights & Biases.
        resume_step: the step of the checkpoint that the run goes on from: lines of later steps are dropped, since these
            steps come again. None starts over: earlier lines are dropped, all of them.

    Raises:
        ValueError: ``metrics.jsonl`` of the run to be resumed has a line that is not JSON.
    """

    def __init__(
        self,
        output_dir: str | Path | None,
        *,
        wandb: bool = False,
        wandb_project: str = "rolltune",
        tensorboard: bool = False,
        config: Mapping[str, Any] | None = None,
        resume_step: int | None = None,
    ) -> None:
        self._output_dir = None if output_dir is None else Path(output_dir)
        self._file: TextIO | None = None
        self._wandb_run: Any = None
        self._tensorboard: Any = None
        if self._output_dir is None:
            return
        self._output_dir.mkdir(parents=True, exist_ok=True)
        path = self._output_dir / "metrics.jsonl"
        kept = [] if resume_step is None else [row for row in _read_rows(path) if row["step"] <= resume_step]
        write_text_atomic(path, "".join(map(_json_line, kept)))
        self._file = path.open("a", encoding="utf-8")
        if wandb:
            self._wandb_run = _start_wandb(self._output_dir, wandb_project, config or {}, resume_step is not None)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # TensorBoard hides what an earlier process wrote for this step and later ones.
            purge_step = 0 if resume_step is None else resume_step + 1
            self._tensorboard = SummaryWriter(str(self._output_dir / "tensorboard"), purge_step=purge_step)

    @classmethod
    def null(cls) -> MetricsLog:
        """A log that writes nothing, for the processes that are not the first."""
        return cls(None)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one line, flushed. NaN and infinities become null in the file, since JSON has no word for them.

        Args:
            step: number of optimizer steps done; the same step may be logged more than once.
            metrics: name to value; names with slashes, such as "reward/mean".
        """
        if self._file is None:
            return
        values = {name: float(value) for name, value in metrics.items()}
        self._file.write(_json_line({"step": step, "time": round(time.time(), 3), **values}))
        self._file.flush()
        if self._wandb_run is not None:
            # The step is a value of its own (see _start_wandb): wandb's own may never go back, and on resume it does.
            self._wandb_run.log({"step": step, **values})
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)

    def log_samples(
        self,
        step: int,
        groups: Sequence[types.Group],
        advantages: Sequence[Sequence[float] | None],
    ) -> None:
        """Write the sample file of one step (:func:`write_samples`), and a table to Weights & Biases."""
        if self._output_dir is None:
            return
        write_samples(self._output_dir, step, groups, advantages)
        if self._wandb_run is not None:
            import wandb

            columns: list[Any] = ["step", "problem", "text", "tokens", "finish_reason", "reward", "advantage", "notes"]
            table = wandb.Table(columns=columns)
            for row in _sample_rows(step, groups, advantages):
                notes = "\n".join(f"{name}: {text}" for name, text in row["notes"].items())
                table.add_data(*(notes if column == "notes" else row[column] for column in columns))
            self._wandb_run.log({"step": step, "samples": table})

    def close(self) -> None:
        """Finish all writers."""
        if self._file is not None:
            self._file.close()
        if self._wandb_run is not None:
            self._wandb_run.finish()
        if self._tensorboard is not None:
            self._tensorboard.close()


def _start_wandb(output_dir: Path, project: str, config: Mapping[str, Any], resume: bool) -> Any:
    """A run whose id is kept in ``wandb_run_id``, so that a resumed run goes on in the same curves."""
    import wandb

    id_file = output_dir / "wandb_run_id"
    run_id = id_file.read_text(encoding="utf-8").strip() if resume and id_file.is_file() else uuid.uuid4().hex[:8]
    mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
    run = wandb.init(
        project=project,
        name=output_dir.resolve().name,
        id=run_id,
        dir=output_dir,
        config=dict(config),
        mode=mode,  # pyright: ignore[reportArgumentType]
        resume="allow" if mode == "online" else None,  # offline, wandb merges runs of one id when they are synced
        settings=wandb.Settings(console="off", quiet=True),  # stdout belongs to the progress bars
    )
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    write_text_atomic(id_file, run_id + "\n")
    return run


def read_metrics(output_dir: str | Path) -> list[Record]:
    """The lines of ``metrics.jsonl``, in order; null values are None.

    Raises:
        ValueError: there is no such file, or a line is not JSON. A last line that was cut off is no error.
    """
    path = Path(output_dir) / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; is {output_dir} the output_dir of a run?")
    return _read_rows(path)


def _read_rows(path: Path) -> list[Record]:
    if not path.is_file():
        return []
    # What stands behind the last newline was cut off by a kill in mid-write.
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    rows: list[Record] = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON ({error.msg}); remove the line to go on") from None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise ValueError(f"{path}:{number}: not an object with an integer 'step'; remove the line to go on")
        rows.append(row)
    return rows


def write_samples(
    output_dir: str | Path,
    step: int,
    groups: Sequence[types.Group],
    advantages: Sequence[Sequence[float] | None],
) -> Path:
    """Write every completion of a step to ``<output_dir>/samples/step_000010.jsonl``, one JSON object a line.

    Args:
        output_dir: the run's folder.
        step: number of optimizer steps done.
        groups: what was sampled, unscored completions included.
        advantages: for each group one value for each of its scored completions, in order; None for a group that was
            skipped. What has no advantage is written as null.

    Returns:
        The file. It appears whole or not at all.
    """
    path = Path(output_dir) / "samples" / f"step_{step:06d}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(path, "".join(map(_json_line, _sample_rows(step, groups, advantages))))
    return path


def _sample_rows(
    step: int,
    groups: Sequence[types.Group],
    advantages: Sequence[Sequence[float] | None],
) -> list[Record]:
    rows: list[Record] = []
    for group, of_group in zip(groups, advantages, strict=True):
        assert of_group is None or len(of_group) == len(group.scored().scores), "one advantage a scored completion"
        values = iter(of_group or ())
        for completion, score in zip(group.completions, group.scores, strict=True):
            rows.append(
                {
                    "step": step,
                    "problem": group.problem.id,
                    "messages": list(group.problem.messages),
                    "answer": group.problem.answer,
                    "text": completion.text,
                    "tokens": len(completion.token_ids),
                    "finish_reason": completion.finish_reason,
                    "policy_version": completion.policy_version,
                    "reward": score.total,
                    "parts": dict(score.parts),
                    "failure": score.failure,
                    "notes": dict(score.notes),
                    "advantage": None if of_group is None or score.total is None else next(values),
                }
            )
    return rows


def _json_line(row: Record) -> str:
    return json.dumps(finite(row), ensure_ascii=False, allow_nan=False) + "\n"
