"""The picture of a run: ``curves.png``, drawn from ``metrics.jsonl``, and the looks that all of our plots have."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rolltune.behaviours import BEHAVIOURS
from rolltune.metrics.log import Record, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Series = tuple[list[float], list[float]]  # steps and values

COLORS = ("#2a6fbb", "#e07b39", "#3c9d6b", "#8e5bb5", "#c8475d", "#7a7a7a")
ROUNDING = 1e-4  # of log-probs in fp32


def plot_curves(output_dir: str | Path) -> Path:
    """Draw ``<output_dir>/curves.png`` from ``metrics.jsonl``.

    One panel each for reward and its parts, held-out accuracy with its 95 % interval, completion length and truncation,
    KL, entropy, the gradient norm with the clip fraction, the mismatch of sampler and trainer where it is more than
    rounding, and, of a run that is judged, the judge beside the gold measure, a rubric's categories and criteria, and
    what the judge was asked and has cost; panels without data are left out. A run without rewards (supervised
    fine-tuning) has its loss in the first panel.

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
    if max(curves.get("mismatch/mean_abs", ([], [0.0]))[1]) > ROUNDING:
        panels.append((_plot_mismatch, "mismatch/k3"))
    if "reward/mean" not in curves:
        panels[0] = (_plot_loss, "loss")
    panels = [(draw, needed) for draw, needed in panels if needed in curves]
    for draw, is_drawn in (
        (_plot_behaviours, _behaviour_of),
        (_plot_overoptimization, {"overoptimization/mean"}.__contains__),
        (_plot_rubric, _category_of),
        (_plot_criteria, _criterion_of),
        (_plot_judge, _questions_of),
    ):
        panels += [(draw, name) for name in list(filter(is_drawn, curves))[:1]]
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


def _series(rows: Sequence[Record]) -> dict[str, Series]:
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
    right.set_ylim(0, top if top is not None else max([*values, 0.01]) * 1.1)


def _plot_reward(axes: Axes, curves: dict[str, Series]) -> None:
    title_axes(axes, "Reward", "mean over completions")
    _line(axes, curves["reward/mean"], COLORS[0], "total")
    counted = {name.split("/")[1] for name in curves if _behaviour_of(name)}  # on another scale, drawn apart
    parts = [name for name in curves if name.startswith("reward/") and name.endswith("/mean") and name.count("/") == 2]
    parts = [name for name in parts if name.split("/")[1] not in counted]
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


def _plot_mismatch(axes: Axes, curves: dict[str, Series]) -> None:
    title_axes(axes, "Sampler and trainer", "k3 estimate of the KL, nats per token")
    _line(axes, curves["mismatch/k3"], COLORS[0])
    if "mismatch/outside" in curves:
        _second_axis(axes, curves["mismatch/outside"], "share of ratios not in [0.9, 1.1]")


def _plot_behaviours(axes: Axes, curves: dict[str, Series]) -> None:
    title_axes(axes, "Reasoning behaviours", "per completion")
    named = [name for name in curves if _behaviour_of(name)]
    for color, name in zip(COLORS, named, strict=False):
        _line(axes, curves[name], color, _behaviour_of(name))


def _behaviour_of(name: str) -> str | None:
    """The behaviour whose mean count a metric is: "reward/<the reward's name>/verification/mean"."""
    parts = name.split("/")
    if len(parts) == 4 and (parts[0], parts[3]) == ("reward", "mean") and parts[2] in BEHAVIOURS:
        return parts[2].replace("_", " ")
    return None


def _plot_overoptimization(axes: Axes, curves: dict[str, Series]) -> None:
    title_axes(axes, "Judge and gold measure", "mean over held-out turns")
    for name, label, color in (("train_mean", "trained on", COLORS[0]), ("mean", "gold", COLORS[2])):
        axes.plot(
            *curves[f"overoptimization/{name}"], color=color, linewidth=1.6, marker="o", markersize=3.5, label=label
        )
    judged = dict(zip(*curves["overoptimization/train_mean"], strict=True))
    steps = [step for step, alarm in zip(*curves.get("overoptimization/alarm", ([], [])), strict=True) if alarm]
    if steps:
        at = [judged[step] for step in steps]
        axes.plot(steps, at, color=COLORS[4], linestyle="none", marker="X", markersize=8, label="alarm")


def _plot_rubric(axes: Axes, curves: dict[str, Series]) -> None:
    title_axes(axes, "Rubric, by category", "mean of what criteria earn")
    _plot_named(axes, curves, _category_of)
    if shares := next((name for name in curves if name.endswith("/scored_share/mean")), None):
        _second_axis(axes, curves[shares], "share of the weight scored", top=1.05)


def _category_of(name: str) -> str | None:
    return _label(name, r"reward/([^/]+)/category/([^/]+)/mean")


def _plot_criteria(axes: Axes, curves: dict[str, Series]) -> None:
    title_axes(axes, "Rubric, by criterion", "mean of what it earns")
    _plot_named(axes, curves, _criterion_of)


def _criterion_of(name: str) -> str | None:
    return _label(name, r"reward/([^/]+)/criterion/([^/]+)/mean")


def _plot_judge(axes: Axes, curves: dict[str, Series]) -> None:
    title_axes(axes, "Judge", "so far in this process")
    for ending, style in (("questions", "-"), ("calls", "--"), ("cache_hits", ":")):
        named = [name for name in curves if re.fullmatch(f"judge/[^/]+/{ending}", name)]
        for color, name in zip(COLORS, named, strict=False):
            label = " ".join(name.split("/")[1:]).replace("_", " ")
            axes.plot(*curves[name], color=color, linestyle=style, linewidth=1.4, label=label)
    if dollars := next((name for name in curves if re.fullmatch("judge/[^/]+/dollars", name)), None):
        _second_axis(axes, curves[dollars], "dollars")


def _questions_of(name: str) -> str | None:
    return _label(name, "judge/([^/]+)/(questions)")


def _plot_named(axes: Axes, curves: dict[str, Series], label_of: Callable[[str], str | None]) -> None:
    """The curves that have a label, those with the most points first, and of these as many as there are colours."""
    named = sorted((name for name in curves if label_of(name)), key=lambda name: -len(curves[name][0]))
    for color, name in zip(COLORS, named, strict=False):
        _line(axes, curves[name], color, label_of(name))


def _label(name: str, pattern: str) -> str | None:
    match = re.fullmatch(pattern, name)
    return match and match[2].replace("_", " ").replace("-", " ")


def _plot_loss(axes: Axes, curves: dict[str, Series]) -> None:
    title_axes(axes, "Loss", "mean over tokens")
    _line(axes, curves["loss"], COLORS[0], "training")
    if "heldout/loss" in curves:
        axes.plot(*curves["heldout/loss"], color=COLORS[1], linewidth=1.6, marker="o", markersize=3.5, label="held out")
