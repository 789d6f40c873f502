"""The numbers of an evaluation for people: tables in the terminal, plain text where the output is piped."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from rolltune.eval.comparison import Bin, Evaluation, ModelResult
from rolltune.eval.passk import Estimate

_PLAIN_WIDTH = 200  # of a pipe or file: nobody's window, so no cell has to be broken
_SECONDS_BETWEEN_LINES = 30
_LABELS = {
    "accuracy": "accuracy",
    "lenient_accuracy": "lenient accuracy",
    "format": "in the exact format",
    "length_mean": "length in tokens",
    "truncated": "cut at the limit",
}


def make_console() -> Console:
    """A console as wide as the terminal; wide where there is none."""
    return Console() if sys.stdout.isatty() else Console(width=_PLAIN_WIDTH)


def results_json(evaluation: Evaluation) -> dict[str, Any]:
    """All numbers, as ``results.json`` has them."""
    tree = asdict(evaluation)
    tree["models"] = {model.pop("name"): model for model in tree["models"]}
    return tree


def print_report(evaluation: Evaluation, console: Console) -> None:
    """All tables but the accuracy by length, which is a plot. Into a pipe they go as Markdown."""
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
        _print(console, "behaviours in a completion by the classifier", _classified_table(evaluation))
    console.print()
    for note in evaluation.notes:
        console.print(Text(note, style="dim"), soft_wrap=True)


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
    """Metrics down, models across."""
    table = _table("", *(model.name for model in evaluation.models))
    for metric in dict.fromkeys(metric for model in evaluation.models for metric in model.metrics):
        cells = [_cell(model.metrics.get(metric), evaluation.problems) for model in evaluation.models]
        table.add_row(_label(metric), *cells)
    return table


def _label(metric: str) -> str:
    kind, _, name = metric.partition("/")
    return f"{_LABELS[name]}, {kind}" if name else metric


def _cell(estimate: Estimate | None, problems: int | None = None) -> str:
    """``0.412 [0.350, 0.470]``, with its number of problems where that is not ``problems``."""
    if estimate is None or math.isnan(estimate.mean):
        return "-"
    digits = 3 if abs(estimate.mean) < 10 else 1
    shown = f"{estimate.mean:.{digits}f} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"
    return shown if estimate.problems == problems else f"{shown} of {estimate.problems} problems"


def _differences_table(evaluation: Evaluation) -> Table:
    first = evaluation.comparisons[0]
    labels = [_label(metric) for metric in first.differences]
    table = _table("", *labels, "McNemar's p, greedy")
    for comparison in evaluation.comparisons:
        cells = []
        for difference in comparison.differences.values():
            mark = " *" if difference.is_significant else ""
            fewer = "" if difference.problems == evaluation.problems else f" of {difference.problems} problems"
            shown = f"{difference.mean:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]{mark}{fewer}"
            cells.append(shown if difference.problems else "-")
        p = comparison.differences["greedy/accuracy"].mcnemar_p
        table.add_row(f"{comparison.second} - {comparison.first}", *cells, "-" if p is None else f"{p:.3g}")
    return table


def _print_bins(
    console: Console, title: str, models: Sequence[ModelResult], bins: Callable[[ModelResult], list[Bin]]
) -> None:
    """Groups of problems down, models across; nothing where all problems are of one group."""
    by_model = [{part.label: part.accuracy for part in bins(model)} for model in models]
    labels = dict.fromkeys(label for parts in by_model for label in parts)
    if len(labels) < 2:
        return
    table = _table("", "problems", *(model.name for model in models))
    for label in labels:
        problems = max(parts[label].problems for parts in by_model if label in parts)
        table.add_row(label, str(problems), *(_cell(parts.get(label), problems) for parts in by_model))
    _print(console, title, table)


def _behaviours_table(evaluation: Evaluation) -> Table:
    table = _table("", *(model.name for model in evaluation.models))
    for name in evaluation.models[0].behaviours:
        for measure, label in (("mean", "in a completion"), ("any", "share with any")):
            cells = [_cell(getattr(m.behaviours[name], measure), evaluation.problems) for m in evaluation.models]
            table.add_row(f"{name.replace('_', ' ')}, {label}", *cells)
    return table


def _classified_table(evaluation: Evaluation) -> Table:
    classified = {model.name: model.classified for model in evaluation.models if model.classified is not None}
    table = _table("", *classified)
    table.add_row("completions", *(str(c.completions) for c in classified.values()))
    table.add_row("without a verdict", *(str(c.unscored) for c in classified.values()))
    for name in evaluation.models[0].behaviours:
        cells = [_cell(c.mean.get(name), evaluation.problems) for c in classified.values()]
        table.add_row(name.replace("_", " "), *cells)
    return table


class SamplingProgress:
    """A bar of the completions of one model after another; without a terminal, a line now and then.

    Args:
        models: how many there are.
        enabled: False shows nothing, for the ranks behind the first.
    """

    def __init__(self, models: int, *, enabled: bool) -> None:
        self._models = models
        self._enabled = enabled
        self._is_live = enabled and sys.stdout.isatty()
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=make_console(),
            expand=True,
            disable=not self._is_live,
            speed_estimate_period=24 * 3600,  # the default of 30 s forgets blocks that take longer than that
        )

    def __enter__(self) -> SamplingProgress:
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    def say(self, number: int, name: str, text: str) -> None:
        """One line about a model."""
        if self._enabled:
            self._bars.console.print(f"model {number} of {self._models}, {name}: {text}", markup=False, highlight=False)

    def model(self, number: int, name: str) -> Callable[[int, int], None]:
        """Begin a model.

        Args:
            number: from 1.
            name: of the model.

        Returns:
            A function of (completions done, completions in all).
        """
        began = said_at = time.monotonic()
        said = 0
        task = self._bars.add_task(f"model {number} of {self._models}, {name}", total=None)

        def update(done: int, total: int) -> None:
            nonlocal said, said_at
            self._bars.update(task, completed=done, total=total)
            now = time.monotonic()
            if not self._is_live and done > said and (now - said_at > _SECONDS_BETWEEN_LINES or done == total):
                said, said_at = done, now
                left = int((now - began) / max(1, done) * (total - done))
                self.say(number, name, f"{done} of {total} completions, {left // 60}:{left % 60:02d} min left")

        return update
