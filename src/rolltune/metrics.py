"""What a run leaves behind besides checkpoints: numbers, samples, curves, and the progress shown while it goes on.

Files in the output folder:

- ``metrics.jsonl``: one JSON object a line, ``{"step": 10, "time": 1767225600.0, "kl": 0.003, ...}``;
- ``samples/step_000010.jsonl``: every completion of a step with its rewards and advantage;
- ``curves.png``: drawn from ``metrics.jsonl`` by :func:`plot_curves`;
- ``wandb/`` and ``tensorboard/`` where these are on.

In a run over several processes the first one writes; the others hold ``MetricsLog(None)`` and
``Progress(..., enabled=False)``, which take the same calls and do nothing.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from rolltune import types

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]
Series = tuple[list[float], list[float]]  # steps and values


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
        _write_atomic(path, "".join(map(_json_line, kept)))
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

            columns: list[Any] = ["step", "problem", "text", "tokens", "finish_reason", "reward", "advantage"]
            table = wandb.Table(columns=columns)
            for row in _sample_rows(step, groups, advantages):
                table.add_data(*(row[column] for column in columns))
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
    _write_atomic(id_file, run_id + "\n")
    return run


def read_metrics(output_dir: str | Path) -> list[Row]:
    """The lines of ``metrics.jsonl``, in order; null values are None.

    Raises:
        ValueError: there is no such file, or a line is not JSON. A last line that was cut off is no error.
    """
    path = Path(output_dir) / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; is {output_dir} the output_dir of a run?")
    return _read_rows(path)


def _read_rows(path: Path) -> list[Row]:
    if not path.is_file():
        return []
    # What stands behind the last newline was cut off by a kill in mid-write.
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    rows: list[Row] = []
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
    _write_atomic(path, "".join(map(_json_line, _sample_rows(step, groups, advantages))))
    return path


def _sample_rows(
    step: int,
    groups: Sequence[types.Group],
    advantages: Sequence[Sequence[float] | None],
) -> list[Row]:
    rows: list[Row] = []
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
                    "advantage": None if of_group is None or score.total is None else next(values),
                }
            )
    return rows


def write_json_atomic(path: str | Path, obj: Any) -> None:
    """Write ``obj`` as indented JSON; a reader sees the old file or the new one, never a part. NaN becomes null."""
    _write_atomic(Path(path), json.dumps(_finite(obj), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _write_atomic(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        # Model text can hold half of a surrogate pair, which UTF-8 cannot; as \udXXX it is the JSON escape for it.
        file.write(text.encode("utf-8", errors="backslashreplace"))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _json_line(row: Row) -> str:
    return json.dumps(_finite(row), ensure_ascii=False, allow_nan=False) + "\n"


def _finite(obj: Any) -> Any:
    """The same with NaN and infinities as None, in dicts and lists of any depth."""
    if isinstance(obj, Mapping):
        return {key: _finite(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [_finite(value) for value in obj]
    return None if isinstance(obj, float) and not math.isfinite(obj) else obj


def accuracy_interval(correct: int, total: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of an accuracy (Wilson 1927; Brown, Cai and DasGupta 2001, eq. 4).

    Unlike accuracy +- 1.96 standard errors it has a width at 0 and 1, and does not leave [0, 1].

    Example:
        >>> low, high = accuracy_interval(8, 10)
        >>> round(low, 3), round(high, 3)
        (0.49, 0.943)

    Args:
        correct: right answers.
        total: all answers, at least 1.

    Returns:
        The lower and the upper end.
    """
    assert 0 <= correct <= total and total > 0, (correct, total)
    z = 1.959963984540054  # the 97.5 % point of the normal distribution
    share = correct / total
    scale = 1 + z**2 / total
    center = (share + z**2 / (2 * total)) / scale
    radius = z / scale * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    # At 0 and at all the end is exactly 0 or 1; the formula misses it by a rounding error.
    return (0.0 if correct == 0 else center - radius), (1.0 if correct == total else center + radius)


class Progress:
    """Progress bars with the time left, and the last numbers under them. Not on a terminal: one plain line a step.

    Example:
        >>> with Progress(2, stream=sys.stdout) as progress:  # doctest: +SKIP
        ...     sampled = progress.phase("sampling", 64)
        ...     sampled(32, 64)
        ...     progress.step(1, {"reward": 0.42, "kl": 0.003})
        step 1/2 | reward 0.42 | kl 0.003 | 7.1 s/step | 0:00:07 left

    Args:
        total_steps: steps of the whole run.
        start: steps done before this process, by the run that it resumes.
        stream: where to write; None for stdout.
        enabled: False shows nothing.
    """

    def __init__(self, total_steps: int, start: int = 0, *, stream: TextIO | None = None, enabled: bool = True) -> None:
        self._total = total_steps
        self._start = start
        self._stream = sys.stdout if stream is None else stream
        self._enabled = enabled
        self._summary = Text(no_wrap=True, overflow="ellipsis")
        self._live: Live | None = None
        self._began = time.monotonic()
        if not enabled or not self._stream.isatty():
            return
        console = Console(file=self._stream)
        self._bars = RichProgress(
            TextColumn("{task.description:<12}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            expand=True,
            speed_estimate_period=24 * 3600,  # the default of 30 s forgets steps that take longer than that
        )
        self._steps = self._bars.add_task("steps", total=total_steps, completed=start)
        self._phase = self._bars.add_task("", total=None, visible=False)
        # rich prints what the program prints above the bars, as long as it goes to sys.stdout or sys.stderr.
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=4)

    def _render(self) -> RenderableType:
        return Group(self._bars, self._summary)

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._bars.update(self._phase, visible=False)
            self._live.stop()

    def phase(self, name: str, total: int | None = None) -> Callable[[int, int], None]:
        """Begin a part of a step, such as "sampling".

        Args:
            name: shown beside the bar.
            total: units of work in it; None where only the first call of the returned function tells.

        Returns:
            A function of (units done, total units) to be called as the work goes on.
        """
        if self._live is None:
            return lambda done, total: None
        self._bars.reset(self._phase, description=name, total=total, visible=True)
        return lambda done, total: self._bars.update(self._phase, completed=done, total=total)

    def step(self, step: int, summary: Mapping[str, float | str]) -> None:
        """Show the numbers of a step that is done.

        Args:
            step: steps done so far, from 1.
            summary: label to value, in the order shown.
        """
        pace = (time.monotonic() - self._began) / max(1, step - self._start)
        parts = [f"{name} {_short(value)}" for name, value in summary.items()] + [f"{pace:.1f} s/step"]
        if self._live is not None:
            self._summary.plain = " | ".join(parts)
            self._bars.update(self._steps, completed=step)
        elif self._enabled:
            parts = [f"step {step}/{self._total}", *parts, f"{_clock(int(pace * (self._total - step)))} left"]
            print(" | ".join(parts), file=self._stream, flush=True)


def _short(value: float | str) -> str:
    """A number in at most a few characters: 0.42, 61.3, 1250."""
    if isinstance(value, str):
        return value
    return f"{value:.0f}" if abs(value) >= 100 and math.isfinite(value) else f"{value:.3g}"


def _clock(seconds: int) -> str:
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


COLORS = ("#2a6fbb", "#e07b39", "#3c9d6b", "#8e5bb5", "#c8475d", "#7a7a7a")


def plot_curves(output_dir: str | Path) -> Path:
    """Draw ``<output_dir>/curves.png`` from ``metrics.jsonl``.

    One panel each for reward and its parts, held-out accuracy with its 95 % interval, completion length and
    truncation, KL, entropy, and the gradient norm with the clip fraction; panels without data are left out. A run
    without rewards (supervised fine-tuning) has its loss in the first panel.

    Raises:
        ValueError: there is no ``metrics.jsonl``, or none of these metrics is in it.
    """
    from matplotlib.figure import Figure  # without pyplot: no global state, no display
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    output_dir = Path(output_dir)
    curves = _series(read_metrics(output_dir))
    panels: list[tuple[Callable[[Axes, dict[str, Series]], None], str]] = [
        (_plot_reward, "reward/mean"),
        (_plot_accuracy, "heldout/accuracy"),
        (_plot_length, "completions/length_mean"),
        (_plot_kl, "kl"),
        (_plot_entropy, "entropy"),
        (_plot_gradient, "grad_norm"),
    ]
    if "reward/mean" not in curves:
        panels[0] = (_plot_loss, "loss")
    panels = [(draw, needed) for draw, needed in panels if needed in curves]
    if not panels:
        raise ValueError(f"{output_dir / 'metrics.jsonl'}: nothing to draw; it has {', '.join(curves) or 'no metrics'}")

    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
    figure = Figure(figsize=(4.6 * columns, 3.3 * rows), layout=layout, facecolor="white")
    for number, (draw, _) in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, number)
        style_axes(axes, xlabel="optimizer steps")
        axes.margins(x=0.02)
        draw(axes, curves)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7, frameon=False, loc="best")
    return save_figure(figure, output_dir / "curves.png")


def style_axes(axes: Axes, *, xlabel: str) -> None:
    """The looks that all of our plots have."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.tick_params(colors="#444444", labelsize=8)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel(xlabel, fontsize=8, color="#444444")


def title_axes(axes: Axes, title: str, ylabel: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color="#222222")
    axes.set_ylabel(ylabel, fontsize=8, color="#444444")


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a PNG file; it appears whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, dpi=150, format="png")
    os.replace(temporary, path)
    return path


def _series(rows: Sequence[Row]) -> dict[str, Series]:
    """Metric name to its steps and values, in order of steps; null values left out, the last of a step counts."""
    points: dict[str, dict[int, float]] = {}
    for row in rows:
        for name, value in row.items():
            if name not in ("step", "time") and isinstance(value, int | float):
                points.setdefault(name, {})[row["step"]] = value
    return {
        name: ([float(step) for step in sorted(values)], [values[step] for step in sorted(values)])
        for name, values in points.items()
    }


def _smooth(values: Sequence[float]) -> list[float]:
    """Mean over a window centred on each value (no lag), about a tenth of the run wide, cut off at both ends."""
    half = min(25, len(values) // 20)
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _line(axes: Axes, series: Series, color: str, label: str | None = None) -> None:
    """The values, faint, and the smoothed line over them."""
    steps, values = series
    axes.plot(steps, values, color=color, alpha=0.25, linewidth=1)
    # One point makes no line: mark it, or the panel looks empty.
    axes.plot(steps, _smooth(values), color=color, linewidth=1.8, label=label, marker="o" if len(steps) == 1 else None)


def _second_axis(axes: Axes, series: Series, label: str, *, top: float | None = None) -> None:
    right = axes.twinx()
    right.spines[["top", "left", "bottom"]].set_visible(False)
    right.spines["right"].set_color("#999999")
    right.tick_params(colors="#444444", labelsize=8)
    right.set_ylabel(label, fontsize=8, color=COLORS[1])
    steps, values = series
    right.plot(steps, _smooth(values), color=COLORS[1], linewidth=1.3, linestyle="--")
    right.set_ylim(0, top if top is not None else max([*values, 1e-6]) * 1.1)


def _plot_reward(axes: Axes, curves: dict[str, Series]) -> None:
    title_axes(axes, "Reward", "mean over completions")
    _line(axes, curves["reward/mean"], COLORS[0], "total")
    parts = [name for name in curves if name.startswith("reward/") and name.endswith("/mean") and name.count("/") == 2]
    for number, name in enumerate(parts):
        steps, values = curves[name]
        color = COLORS[1 + number % (len(COLORS) - 1)]
        axes.plot(steps, _smooth(values), color=color, linewidth=1.2, label=name.split("/")[1])


def _plot_accuracy(axes: Axes, curves: dict[str, Series]) -> None:
    title_axes(axes, "Held-out accuracy", "greedy, with 95 % interval")
    steps, values = curves["heldout/accuracy"]
    low, high = (dict(zip(*curves.get(f"heldout/accuracy_{end}", ([], [])), strict=True)) for end in ("low", "high"))
    errors = [
        [value - low.get(step, value) for step, value in zip(steps, values, strict=True)],
        [high.get(step, value) - value for step, value in zip(steps, values, strict=True)],
    ]
    style = {"color": COLORS[0], "linewidth": 1.6, "marker": "o", "markersize": 3.5, "elinewidth": 1, "capsize": 2.5}
    axes.errorbar(steps, values, yerr=errors, label="strict", **style)
    if "heldout/lenient_accuracy" in curves:
        axes.plot(*curves["heldout/lenient_accuracy"], color=COLORS[5], linewidth=1.2, linestyle=":", label="lenient")
    axes.set_ylim(bottom=0)


def _plot_length(axes: Axes, curves: dict[str, Series]) -> None:
    title_axes(axes, "Completion length", "tokens, mean")
    _line(axes, curves["completions/length_mean"], COLORS[0])
    if "completions/truncated" in curves:
        _second_axis(axes, curves["completions/truncated"], "share truncated", top=1.0)


def _plot_kl(axes: Axes, curves: dict[str, Series]) -> None:
    title_axes(axes, "KL to the reference", "nats per token")
    _line(axes, curves["kl"], COLORS[0])


def _plot_entropy(axes: Axes, curves: dict[str, Series]) -> None:
    title_axes(axes, "Policy entropy", "nats per token")
    _line(axes, curves["entropy"], COLORS[0])


def _plot_gradient(axes: Axes, curves: dict[str, Series]) -> None:
    title_axes(axes, "Gradient norm", "before clipping")
    _line(axes, curves["grad_norm"], COLORS[0])
    if "clip_fraction" in curves:
        _second_axis(axes, curves["clip_fraction"], "share of ratios clipped")


def _plot_loss(axes: Axes, curves: dict[str, Series]) -> None:
    title_axes(axes, "Loss", "mean over tokens")
    _line(axes, curves["loss"], COLORS[0], "training")
    if "heldout/loss" in curves:
        axes.plot(*curves["heldout/loss"], color=COLORS[1], linewidth=1.6, marker="o", markersize=3.5, label="held out")
