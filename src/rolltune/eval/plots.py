"""Plots of an evaluation: pass@k, accuracy by length, behaviours. One colour per model; bands and bars are 95 %."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rolltune.eval.passk import Estimate
from rolltune.eval.results import Evaluation
from rolltune.metrics.plotting import COLORS, new_figure, save_figure, style_axes, title_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_evaluation(evaluation: Evaluation, output_dir: Path) -> list[Path]:
    """Draw ``pass_at_k.png``, ``accuracy_by_length.png`` and ``behaviours.png``."""
    return [
        _plot(evaluation, output_dir / name, draw)
        for name, draw in (
            ("pass_at_k.png", _pass_at_k),
            ("accuracy_by_length.png", _accuracy_by_length),
            ("behaviours.png", _behaviours),
        )
    ]


def _plot(evaluation: Evaluation, path: Path, draw: Callable[[Axes, Evaluation], None]) -> Path:
    figure = new_figure(6.4, 4.2)
    axes = figure.add_subplot()
    style_axes(axes, xlabel="")
    draw(axes, evaluation)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, frameon=False, loc="best")
    return save_figure(figure, path)


def _color(number: int) -> str:
    return COLORS[number % len(COLORS)]


def _size(evaluation: Evaluation) -> str:
    return f"{evaluation.problems} problems, {evaluation.samples} samples of each"


def _pass_at_k(axes: Axes, evaluation: Evaluation) -> None:
    title_axes(axes, "pass@k", f"share of problems; {_size(evaluation)}")
    ks = sorted(evaluation.ks)
    for number, model in enumerate(evaluation.models):
        points = [model.metrics[f"pass@{k}"] for k in ks]
        style = {"color": _color(number), "linewidth": 1.8, "marker": "o", "markersize": 3.5}
        axes.plot(ks, [p.mean for p in points], label=model.name, **style)
        axes.fill_between(
            ks, [p.low for p in points], [p.high for p in points], color=_color(number), alpha=0.15, linewidth=0
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.minorticks_off()
    axes.set_xlabel("k", fontsize=8, color="#444444")


def _accuracy_by_length(axes: Axes, evaluation: Evaluation) -> None:
    title_axes(axes, "Accuracy by completion length", f"accuracy of the samples; {_size(evaluation)}")
    axes.set_xlabel("tokens, mean of each tenth of the model's completions", fontsize=8, color="#444444")
    for number, model in enumerate(evaluation.models):
        estimates = [part.accuracy for part in model.by_length]
        axes.errorbar(
            [part.center for part in model.by_length],
            [e.mean for e in estimates],
            yerr=_errors(estimates),
            color=_color(number),
            label=model.name,
            linewidth=1.6,
            marker="o",
            markersize=3.5,
            elinewidth=1,
            capsize=2.5,
        )


def _behaviours(axes: Axes, evaluation: Evaluation) -> None:
    title_axes(axes, "Behaviours", f"occurrences per completion; {_size(evaluation)}")
    names = list(evaluation.models[0].behaviours)
    width = 0.8 / len(evaluation.models)
    for number, model in enumerate(evaluation.models):
        estimates = [model.behaviours[name].mean for name in names]
        axes.bar(
            [i + (number - (len(evaluation.models) - 1) / 2) * width for i in range(len(names))],
            [e.mean for e in estimates],
            yerr=_errors(estimates),
            width=width,
            color=_color(number),
            label=model.name,
            error_kw={"elinewidth": 1, "capsize": 2.5, "ecolor": "#444444"},
        )
    axes.set_xticks(range(len(names)), [name.replace("_", " ") for name in names])


def _errors(estimates: Sequence[Estimate]) -> list[list[float]]:
    """Return the lengths of the error bars, below and above the means; rounding can put an end past its mean."""
    return [[max(0.0, e.mean - e.low) for e in estimates], [max(0.0, e.high - e.mean) for e in estimates]]
