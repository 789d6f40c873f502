"""The metrics log of a run.

It writes these files in the output folder:

- ``metrics.jsonl``: one JSON object per line, ``{"step": 10, "time": 1767225600.0, "kl": 0.003, ...}``;
- ``samples/step_000010.jsonl``: every completion of a step (:mod:`rolltune.metrics.samples`);
- ``wandb/`` and ``tensorboard/`` if these are enabled.

``metrics.jsonl`` is what counts: a run goes on if one of the others fails. Only rank 0 writes. The other ranks hold
``MetricsLog.null()``, which accepts the same calls and does nothing.
"""

from __future__ import annotations

import json
import os
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rolltune.files import json_line, write_text_atomic
from rolltune.metrics.samples import sample_records, write_samples
from rolltune.types import Completion, Group

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
        token_text: decodes a token id, for the sample files; None leaves out their tokens.

    Raises:
        ValueError: ``metrics.jsonl`` of the resumed run has a line that is not JSON, or Weights & Biases does not
            start.
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
        token_text: Callable[[int], str | list[str]] | None = None,
    ) -> None:
        self._output_dir = None if output_dir is None else Path(output_dir)
        self._token_text = token_text
        self._file: _LineFile | None = None
        self._writers: dict[str, Any] = {}  # besides metrics.jsonl, by the config key that asks for them
        if self._output_dir is None:
            return
        self._output_dir.mkdir(parents=True, exist_ok=True)
        path = self._output_dir / "metrics.jsonl"
        kept = [] if resume_step is None else [r for r in _read_records(path) if r["step"] <= resume_step]
        if wandb:
            run = _start_wandb(self._output_dir, wandb_project, config or {}, resume_step is not None)
            self._writers["logging.wandb"] = run
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # Hide what an earlier process wrote for the steps that come again.
            purge_step = 0 if resume_step is None else resume_step + 1
            folder = str(self._output_dir / "tensorboard")
            self._writers["logging.tensorboard"] = SummaryWriter(folder, purge_step=purge_step)
        write_text_atomic(path, "".join(map(json_line, kept)))
        self._file = _LineFile(path)

    @classmethod
    def null(cls) -> MetricsLog:
        """Make a log that writes nothing, for all ranks but the first."""
        return cls(None)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one line. NaN and infinities become null, since JSON cannot represent them.

        A line that cannot be written, on a full disk for example, is kept and written with the next one.

        Args:
            step: number of optimizer steps done; a step may be logged more than once.
            metrics: values by name; names contain slashes, such as "reward/mean".
        """
        if self._file is None:
            return
        values = {name: float(value) for name, value in metrics.items()}
        self._file.write(json_line({"step": step, "time": round(time.time(), 3), **values}))
        # Log the step as a value (see _start_wandb): wandb's own step cannot go back, as it does on resume.
        self._try("logging.wandb", lambda run: run.log({"step": step, **values}))
        self._try(
            "logging.tensorboard",
            lambda board: [board.add_scalar(name, value, step) for name, value in values.items()],
        )

    def log_samples(
        self,
        step: int,
        groups: Sequence[Group],
        advantages: Sequence[Sequence[float] | None],
        token_gaps: Callable[[Completion], list[float] | None] | None = None,
    ) -> None:
        """Write the sample file of a step, and a table to Weights & Biases; arguments as in :func:`write_samples`."""
        if self._output_dir is None:
            return
        try:
            write_samples(
                self._output_dir, step, groups, advantages, token_gaps=token_gaps, token_text=self._token_text
            )
        except OSError as error:
            _say(f"samples of step {step}: not written ({_reason(error)})")

        def write_table(run: Any) -> None:
            import wandb

            columns: list[Any] = ["step", "problem", "text", "tokens", "finish_reason", "reward", "advantage", "notes"]
            table = wandb.Table(columns=columns)
            for record in sample_records(step, groups, advantages):
                notes = "\n".join(f"{name}: {text}" for name, text in record["notes"].items())
                table.add_data(*(notes if column == "notes" else record[column] for column in columns))
            run.log({"step": step, "samples": table})

        self._try("logging.wandb", write_table)

    def _try(self, key: str, write: Callable[[Any], object]) -> None:
        """Call a writer besides metrics.jsonl, if there is one. If it fails, the run goes on without it."""
        writer = self._writers.get(key)
        if writer is None:
            return
        try:
            write(writer)
        except Exception as error:  # wandb and TensorBoard raise unrelated errors
            del self._writers[key]
            _say(f"{key}: failed ({_reason(error)}); the run goes on, and metrics.jsonl has all numbers")

    def close(self) -> None:
        """Close all writers."""
        self._try("logging.wandb", lambda run: run.finish())
        self._try("logging.tensorboard", lambda board: board.close())
        if self._file is not None:
            self._file.close()


class _LineFile:
    """A file of lines that a full disk leaves whole: a line is written as a whole, or later."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._size = path.stat().st_size
        self._waiting = b""

    def write(self, line: str) -> None:
        is_first = not self._waiting
        self._waiting += line.encode("utf-8", errors="backslashreplace")
        rest = self._waiting
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self._file.truncate(self._size)
            if is_first:
                _say(f"{self._path}: not written ({_reason(error)}); its lines are kept until they can be")
            return
        self._size += len(self._waiting)
        self._waiting = b""

    def close(self) -> None:
        if self._waiting:
            self.write("")
        if self._waiting:
            _say(f"{self._path}: {self._waiting.count(b'{')} lines are lost")
        self._file.close()


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or f"{type(error).__name__}: {error}"


def _start_wandb(output_dir: Path, project: str, config: Mapping[str, Any], resume: bool) -> Any:
    """Start a wandb run. Its id is kept in the file ``wandb_run_id``, so that a resumed run continues its curves."""
    import wandb

    id_file = output_dir / "wandb_run_id"
    run_id = id_file.read_text(encoding="utf-8").strip() if resume and id_file.is_file() else uuid.uuid4().hex[:8]
    mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
    try:
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
    except Exception as error:  # wandb's own errors, and those of network and files
        raise ValueError(
            f"logging.wandb: true; Weights & Biases does not start ({_reason(error)}); set WANDB_MODE=offline in the "
            "environment and upload later with `wandb sync`, or leave it out"
        ) from None
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
