"""The curves of a run: ``curves.png``, drawn from ``metrics.jsonl``."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rolltune.behaviours import BEHAVIOURS
from rolltune.metrics.log import Record, read_metrics
from rolltune.metrics.plotting import COLORS, GREY, new_figure, save_figure, style_axes, title_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Series = tuple[list[float], list[float]]  # steps and values
Curves = dict[str, Series]  # by metric

ROUNDING = 1e-4  # of fp32 log-probs
# Patterns of whole metric names; the last group becomes the label of the curve.
BEHAVIOUR = f"reward/[^/]+/({'|'.join(BEHAVIOURS)})/mean"  # the middle part is the reward's name
CATEGORY = "reward/[^/]+/category/([^/]+)/mean"
CRITERION = "reward/[^/]+/criterion/([^/]+)/mean"
JUDGE = "judge/([^/]+/{})"


def plot_curves(output_dir: str | Path) -> Path:
    """Draw ``<output_dir>/curves.png`` from ``metrics.jsonl``.

    It has one panel for each of these, if the run has the data:

    - reward and its parts, or the loss in a run without rewards (supervised fine-tuning);
    - held-out accuracy with its 95 % interval;
    - completion length and truncation;
    - KL;
    - entropy;
    - gradient norm and clip fraction;
    - mismatch of sampler and trainer, if it is more than rounding;
    - reasoning behaviours;
    - judge and gold measure, a rubric's categories, its criteria, and the judge's calls and cost.

    Raises:
        ValueError: ``metrics.jsonl`` does not exist or has none of these metrics.
    """
    output_dir = Path(output_dir)
    curves = collect_series(read_metrics(output_dir))
    panels = _panels(curves)
    if not panels:
        raise ValueError(f"{output_dir / 'metrics.jsonl'}: nothing to draw; it has {', '.join(curves) or 'no metrics'}")
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(4.6 * columns, 3.3 * rows)
    for number, draw in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, number)
        style_axes(axes, xlabel="optimizer steps")
        axes.margins(x=0.02)
        draw(axes, curves)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7, frameon=False, loc="best")
    return save_figure(figure, output_dir / "curves.png")


def collect_series(records: Sequence[Record]) -> Curves:
    """Collect each metric's steps and values, in order of steps, without nulls. The last value of a step counts."""
    points: dict[str, dict[int, float]] = {}
    for record in records:
        for name, value in record.items():
            if name not in ("step", "time") and isinstance(value, int | float):
                points.setdefault(name, {})[record["step"]] = value
    return {
        name: ([float(step) for step in sorted(values)], [values[step] for step in sorted(values)])
        for name, values in points.items()
    }


def _panels(curves: Curves) -> list[Callable[[Axes, Curves], None]]:
    """Choose the panels that there is data for."""
    panels = [
        (_plot_reward, "reward/mean") if "reward/mean" in curves else (_plot_loss, "loss"),
        (_plot_accuracy, "heldout/accuracy"),
        (_plot_length, "completions/length_mean"),
        (_plot_kl, "kl"),
        (_plot_entropy, "entropy"),
        (_plot_gradient, "grad_norm"),
        (_plot_mismatch, "mismatch/k3"),
        (_plot_behaviours, BEHAVIOUR),
        (_plot_overoptimization, "overoptimization/mean"),
        (_plot_categories, CATEGORY),
        (_plot_criteria, CRITERION),
        (_plot_judge, JUDGE.format("questions")),
    ]
    has_mismatch = max(curves.get("mismatch/mean_abs", ([], [0.0]))[1]) > ROUNDING
    return [draw for draw, needed in panels if matching(curves, needed) and (draw != _plot_mismatch or has_mismatch)]


def matching(curves: Curves, pattern: str) -> dict[str, str]:
    """Return the names of the metrics that match a pattern, each with its label."""
    matches = ((name, re.fullmatch(pattern, name)) for name in curves)
    return {name: re.sub("[-_/]", " ", match[match.lastindex or 0]) for name, match in matches if match}


# --- curves -----------------------------------------------------------------------------------------------------------


def _line(axes: Axes, series: Series, color: str, label: str | None = None) -> None:
    """Draw the values faintly and the smoothed curve over them."""
    steps, values = series
    axes.plot(steps, values, color=color, alpha=0.25, linewidth=1)
    # A single point makes no line: mark it, or the panel looks empty.
    axes.plot(steps, _smooth(values), color=color, linewidth=1.8, label=label, marker="o" if len(steps) == 1 else None)


def _smooth(values: Sequence[float]) -> list[float]:
    """Average over a window centred on each value (no lag), about a tenth of the run wide, cut off at both ends."""
    half = min(25, len(values) // 20)
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _lines(axes: Axes, curves: Curves, pattern: str) -> None:
    """Draw the curves that match a pattern, those with the most points first, as many as there are colours."""
    labels = matching(curves, pattern)
    for color, name in zip(COLORS, sorted(labels, key=lambda name: -len(curves[name][0])), strict=False):
        _line(axes, curves[name], color, labels[name])


def _evaluations(axes: Axes, series: Series, color: str, label: str) -> None:
    """Draw values that are measured now and then."""
    axes.plot(*series, color=color, linewidth=1.6, marker="o", markersize=3.5, label=label)


def _second_axis(axes: Axes, series: Series, label: str, *, top: float | None = None) -> None:
    right = axes.twinx()
    right.spines[["top", "left", "bottom"]].set_visible(False)
    right.spines["right"].set_color("#999999")
    right.tick_params(colors=GREY, labelsize=8)
    right.set_ylabel(label, fontsize=8, color=COLORS[1])
    steps, values = series
    right.plot(steps, _smooth(values), color=COLORS[1], linewidth=1.3, linestyle="--")
    right.set_ylim(0, top if top is not None else max([*values, 0.01]) * 1.1)


# --- panels -----------------------------------------------------------------------------------------------------------


def _plot_reward(axes: Axes, curves: Curves) -> None:
    title_axes(axes, "Reward", "mean over completions")
    _line(axes, curves["reward/mean"], COLORS[0], "total")
    counters = {name.split("/")[1] for name in matching(curves, BEHAVIOUR)}  # another scale and a panel of their own
    parts = [name for name in matching(curves, "reward/[^/]+/mean") if name.split("/")[1] not in counters]
    for number, name in enumerate(parts):
        steps, values = curves[name]
        color = COLORS[1 + number % (len(COLORS) - 1)]
        axes.plot(steps, _smooth(values), color=color, linewidth=1.2, label=name.split("/")[1])


def _plot_loss(axes: Axes, curves: Curves) -> None:
    title_axes(axes, "Loss", "mean over tokens")
    _line(axes, curves["loss"], COLORS[0], "training")
    if "heldout/loss" in curves:
        _evaluations(axes, curves["heldout/loss"], COLORS[1], "held out")


def _plot_accuracy(axes: Axes, curves: Curves) -> None:
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


def _plot_length(axes: Axes, curves: Curves) -> None:
    title_axes(axes, "Completion length", "tokens, mean")
    _line(axes, curves["completions/length_mean"], COLORS[0])
    if "completions/truncated" in curves:
        _second_axis(axes, curves["completions/truncated"], "share truncated", top=1.0)


def _plot_kl(axes: Axes, curves: Curves) -> None:
    title_axes(axes, "KL to the reference", "nats per token")
    _line(axes, curves["kl"], COLORS[0])


def _plot_entropy(axes: Axes, curves: Curves) -> None:
    title_axes(axes, "Policy entropy", "nats per token")
    _line(axes, curves["entropy"], COLORS[0])


def _plot_gradient(axes: Axes, curves: Curves) -> None:
    title_axes(axes, "Gradient norm", "before clipping")
    _line(axes, curves["grad_norm"], COLORS[0])
    if "clip_fraction" in curves:
        _second_axis(axes, curves["clip_fraction"], "share of ratios clipped")


def _plot_mismatch(axes: Axes, curves: Curves) -> None:
    title_axes(axes, "Sampler and trainer", "k3 estimate of the KL, nats per token")
    _line(axes, curves["mismatch/k3"], COLORS[0])
    if "mismatch/outside" in curves:
        _second_axis(axes, curves["mismatch/outside"], "share of ratios not in [0.9, 1.1]")


def _plot_behaviours(axes: Axes, curves: Curves) -> None:
    title_axes(axes, "Reasoning behaviours", "per completion")
    _lines(axes, curves, BEHAVIOUR)


def _plot_overoptimization(axes: Axes, curves: Curves) -> None:
    title_axes(axes, "Judge and gold measure", "mean over held-out responses")
    _evaluations(axes, curves["overoptimization/train_mean"], COLORS[0], "trained on")
    _evaluations(axes, curves["overoptimization/mean"], COLORS[2], "gold")
    judged = dict(zip(*curves["overoptimization/train_mean"], strict=True))
    steps = [step for step, alarm in zip(*curves.get("overoptimization/alarm", ([], [])), strict=True) if alarm]
    if steps:
        style = {"color": COLORS[4], "linestyle": "none", "marker": "X", "markersize": 8}
        axes.plot(steps, [judged[step] for step in steps], label="alarm", **style)


def _plot_categories(axes: Axes, curves: Curves) -> None:
    title_axes(axes, "Rubric, by category", "mean credit of the criteria")
    _lines(axes, curves, CATEGORY)
    if shares := next((name for name in curves if name.endswith("/scored_share/mean")), None):
        _second_axis(axes, curves[shares], "share of the weight scored", top=1.05)


def _plot_criteria(axes: Axes, curves: Curves) -> None:
    title_axes(axes, "Rubric, by criterion", "mean credit")
    _lines(axes, curves, CRITERION)


def _plot_judge(axes: Axes, curves: Curves) -> None:
    title_axes(axes, "Judge", "so far in this process")
    for ending, style in (("questions", "-"), ("calls", "--"), ("cache_hits", ":")):
        for color, (name, label) in zip(COLORS, matching(curves, JUDGE.format(ending)).items(), strict=False):
            axes.plot(*curves[name], color=color, linestyle=style, linewidth=1.4, label=label)
    if dollars := next(iter(matching(curves, JUDGE.format("dollars"))), None):
        _second_axis(axes, curves[dollars], "dollars")
