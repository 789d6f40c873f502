"""The metrics log of a run.

It writes these files in the output folder:

- ``metrics.jsonl``: one JSON object per line, ``{"step": 10, "time": 1767225600.0, "kl": 0.003, ...}``;
- ``samples/step_000010.jsonl``: every completion of a step (:mod:`rolltune.metrics.samples`);
- ``wandb/`` and ``tensorboard/`` if these are enabled.

Only rank 0 writes. The other ranks hold ``MetricsLog.null()``, which accepts the same calls and does nothing.
"""

from __future__ import annotations

import json
import os
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TextIO

from rolltune.errors import ConfigError
from rolltune.files import json_line, write_text_atomic
from rolltune.metrics.samples import sample_records, write_samples
from rolltune.types import Group

Record = dict[str, Any]


class MetricsLog:
    """Log scalars to ``metrics.jsonl`` and optionally to Weights & Biases and TensorBoard.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> log = MetricsLog(folder)
        >>> log.log(1, {"reward/mean": 0.25})
        >>> log.close()
        >>> read_metrics(folder)[0]["reward/mean"]
        0.25

    Args:
        output_dir: the run's folder, created if needed. None makes a log that writes nothing.
        wandb: log to Weights & Biases, offline unless the environment has WANDB_API_KEY (WANDB_MODE overrides this).
            ``wandb sync`` uploads an offline run later.
        wandb_project: name of the Weights & Biases project.
        tensorboard: write ``<output_dir>/tensorboard``.
        config: the resolved config, shown by Weights & Biases.
        resume_step: step of the checkpoint the run resumes from. Lines of later steps are dropped, because the run
            repeats these steps. None starts over and drops all earlier lines.

    Raises:
        ValueError: ``metrics.jsonl`` of the resumed run has a line that is not JSON.
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
        kept = [] if resume_step is None else [r for r in _read_records(path) if r["step"] <= resume_step]
        write_text_atomic(path, "".join(map(json_line, kept)))
        self._file = path.open("a", encoding="utf-8")
        if wandb:
            try:
                self._wandb_run = _start_wandb(self._output_dir, wandb_project, config or {}, resume_step is not None)
            except Exception as error:
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                raise ConfigError(
                    [f"logging.wandb: true: {reason}; set WANDB_MODE=offline, or logging.wandb=false"]
                ) from None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # Hide what an earlier process wrote for the steps that come again.
            purge_step = 0 if resume_step is None else resume_step + 1
            self._tensorboard = SummaryWriter(str(self._output_dir / "tensorboard"), purge_step=purge_step)

    @classmethod
    def null(cls) -> MetricsLog:
        """Make a log that writes nothing, for all ranks but the first."""
        return cls(None)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one line and flush it. NaN and infinities become null, since JSON cannot represent them.

        Args:
            step: number of optimizer steps done; a step may be logged more than once.
            metrics: values by name; names contain slashes, such as "reward/mean".
        """
        if self._file is None:
            return
        values = {name: float(value) for name, value in metrics.items()}
        self._file.write(json_line({"step": step, "time": round(time.time(), 3), **values}))
        self._file.flush()
        if self._wandb_run is not None:
            # Log the step as a value (see _start_wandb): wandb's own step cannot go back, as it does on resume.
            with self._optional("wandb"):
                self._wandb_run.log({"step": step, **values})
        if self._tensorboard is not None:
            with self._optional("tensorboard"):
                for name, value in values.items():
                    self._tensorboard.add_scalar(name, value, step)

    @contextmanager
    def _optional(self, name: Literal["wandb", "tensorboard"]) -> Iterator[None]:
        """Say once that an optional log has failed, and go on without it."""
        try:
            yield
        except Exception as error:
            setattr(self, {"wandb": "_wandb_run", "tensorboard": "_tensorboard"}[name], None)
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            print(
                f"logging.{name}: {reason}; the run goes on without it, and metrics.jsonl has all numbers",
                file=sys.stderr,
                flush=True,
            )

    def log_samples(
        self,
        step: int,
        groups: Sequence[Group],
        advantages: Sequence[Sequence[float] | None],
    ) -> None:
        """Write the sample file of a step, and a table to Weights & Biases; arguments as in :func:`write_samples`."""
        if self._output_dir is None:
            return
        write_samples(self._output_dir, step, groups, advantages)
        if self._wandb_run is not None:
            with self._optional("wandb"):
                self._log_table(step, groups, advantages)

    def _log_table(self, step: int, groups: Sequence[Group], advantages: Sequence[Sequence[float] | None]) -> None:
        import wandb

        columns: list[Any] = ["step", "problem", "text", "tokens", "finish_reason", "reward", "advantage", "notes"]
        table = wandb.Table(columns=columns)
        for record in sample_records(step, groups, advantages):
            notes = "\n".join(f"{name}: {text}" for name, text in record["notes"].items())
            table.add_data(*(notes if column == "notes" else record[column] for column in columns))
        self._wandb_run.log({"step": step, "samples": table})

    def close(self) -> None:
        """Close all writers."""
        if self._file is not None:
            self._file.close()
        if self._wandb_run is not None:
            with self._optional("wandb"):
                self._wandb_run.finish()
        if self._tensorboard is not None:
            with self._optional("tensorboard"):
                self._tensorboard.close()


def _start_wandb(output_dir: Path, project: str, config: Mapping[str, Any], resume: bool) -> Any:
    """Start a wandb run. Its id is kept in the file ``wandb_run_id``, so that a resumed run continues its curves."""
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
        resume="allow" if mode == "online" else None,  # `wandb sync` merges offline runs with the same id
        settings=wandb.Settings(console="off", quiet=True),  # stdout is for the progress bars
    )
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    write_text_atomic(id_file, run_id + "\n")
    return run


def read_metrics(output_dir: str | Path) -> list[Record]:
    """Read the records of ``metrics.jsonl``, in order; null values are None.

    A last line without its newline was cut by a kill and is ignored.

    Raises:
        ValueError: the file does not exist, or a line is not JSON.
    """
    path = Path(output_dir) / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; is {output_dir} the output_dir of a run?")
    return _read_records(path)


def _read_records(path: Path) -> list[Record]:
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    records: list[Record] = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON ({error.msg}); remove the line to go on") from None
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise ValueError(f"{path}:{number}: not an object with an integer 'step'; remove the line to go on")
        records.append(record)
    return records
