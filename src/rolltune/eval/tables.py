"""The tables of an evaluation: boxes on a terminal, Markdown when the output is piped."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rolltune.eval.passk import Difference, Estimate
from rolltune.eval.results import Bin, Evaluation, ModelResult
from rolltune.terminal import printable

_PLAIN_WIDTH = 200  # columns in a pipe or file, wide enough that no cell is wrapped
_LABELS = {
    "accuracy": "accuracy",
    "lenient_accuracy": "lenient accuracy",
    "format": "in the exact format",
    "length_mean": "length in tokens",
    "truncated": "cut at the limit",
}


def make_console() -> Console:
    """Make a console as wide as the terminal, or wide enough for whole tables if stdout is not a terminal."""
    return Console() if sys.stdout.isatty() else Console(width=_PLAIN_WIDTH)


def print_tables(evaluation: Evaluation, console: Console) -> None:
    """Print all tables and the notes. Accuracy by length has a plot instead of a table."""
    models, size = evaluation.models, f"{evaluation.problems} problems, {evaluation.samples} samples of each"
    _print(console, f"{size}; greedy: 1 of each", _main_table(evaluation))
    if evaluation.comparisons:
        _print(console, f"differences on the same {size}; * significant", _differences_table(evaluation))
    if len(models) > 1:
        title = f"accuracy of the samples by the solve rate of {models[0].name}; {evaluation.samples} samples of each"
        _print_bins(console, title, models[1:], lambda model: model.by_baseline)
    title = f"accuracy of the samples by words of the gold solution; {evaluation.samples} samples of each"
    _print_bins(console, title, models, lambda model: model.by_solution_length)
    _print(console, f"behaviours by the counter; {size}", _behaviours_table(evaluation))
    if any(model.classified for model in models):
        _print(console, "behaviours per completion by the classifier", _classified_table(evaluation))
    console.print()
    for note in evaluation.notes:
        console.print(Text(printable(note), style="dim"), soft_wrap=True)


def _print(console: Console, title: str, table: Table) -> None:
    if not console.is_terminal:
        table.box, table.show_edge, table.pad_edge = box.MARKDOWN, True, True
    console.print()
    console.print(Text(title, style="bold"), soft_wrap=True)
    console.print(table)


def _table(*columns: str) -> Table:
    table = Table(show_edge=False, pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=not column)
    return table


def _main_table(evaluation: Evaluation) -> Table:
    """One row per metric, one column per model."""
    table = _table("", *(model.name for model in evaluation.models))
    for metric in dict.fromkeys(metric for model in evaluation.models for metric in model.metrics):
        cells = [estimate_cell(model.metrics.get(metric), evaluation.problems) for model in evaluation.models]
        table.add_row(metric_label(metric), *cells)
    return table


def metric_label(metric: str) -> str:
    """Return a metric's name for readers."""
    kind, _, name = metric.partition("/")
    return f"{_LABELS[name]}, {kind}" if name else metric


def estimate_cell(estimate: Estimate | None, problems: int | None = None) -> str:
    """Format an estimate as ``0.412 [0.350, 0.470]``, with its number of problems if that is not ``problems``."""
    if estimate is None or math.isnan(estimate.mean):
        return "-"
    digits = 3 if abs(estimate.mean) < 10 else 1
    shown = f"{estimate.mean:.{digits}f} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"
    return shown if estimate.problems == problems else f"{shown} of {estimate.problems} problems"


def _differences_table(evaluation: Evaluation) -> Table:
    first = evaluation.comparisons[0]
    labels = [metric_label(metric) for metric in first.differences]
    table = _table("", *labels, "McNemar's p, greedy")
    for comparison in evaluation.comparisons:
        cells = []
        for difference in comparison.differences.values():
            fewer = "" if difference.problems == evaluation.problems else f" of {difference.problems} problems"
            cells.append(difference_cell(difference) + (fewer if difference.problems else ""))
        p = comparison.differences["greedy/accuracy"].mcnemar_p
        table.add_row(f"{comparison.second} - {comparison.first}", *cells, "-" if p is None else f"{p:.3g}")
    return table


def difference_cell(difference: Difference) -> str:
    """Format a difference as ``+0.120 [+0.010, +0.230] *``."""
    if not difference.problems:
        return "-"
    mark = " *" if difference.is_significant else ""
    return f"{difference.mean:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]{mark}"


def _print_bins(
    console: Console, title: str, models: Sequence[ModelResult], bins: Callable[[ModelResult], list[Bin]]
) -> None:
    """Print one row per bin and one column per model; nothing if all problems share one bin."""
    by_model = [{part.label: part.accuracy for part in bins(model)} for model in models]
    labels = dict.fromkeys(label for accuracies in by_model for label in accuracies)
    if len(labels) < 2:
        return
    table = _table("", "problems", *(model.name for model in models))
    for label in labels:
        problems = max(accuracies[label].problems for accuracies in by_model if label in accuracies)
        table.add_row(
            label, str(problems), *(estimate_cell(accuracies.get(label), problems) for accuracies in by_model)
        )
    _print(console, title, table)


def _behaviours_table(evaluation: Evaluation) -> Table:
    table = _table("", *(model.name for model in evaluation.models))
    for name in evaluation.models[0].behaviours:
        for measure, label in (("mean", "per completion"), ("any", "share with any")):
            cells = [
                estimate_cell(getattr(m.behaviours[name], measure), evaluation.problems) for m in evaluation.models
            ]
            table.add_row(f"{name.replace('_', ' ')}, {label}", *cells)
    return table


def _classified_table(evaluation: Evaluation) -> Table:
    classified = {model.name: model.classified for model in evaluation.models if model.classified is not None}
    table = _table("", *classified)
    table.add_row("completions", *(str(c.completions) for c in classified.values()))
    table.add_row("without a verdict", *(str(c.unscored) for c in classified.values()))
    for name in evaluation.models[0].behaviours:
        cells = [estimate_cell(c.mean.get(name), evaluation.problems) for c in classified.values()]
        table.add_row(name.replace("_", " "), *cells)
    return table
