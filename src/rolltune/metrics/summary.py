"""The numbers shown while a run goes on, and the summary at its end."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rolltune.files import write_json_atomic
from rolltune.metrics.log import Record, read_metrics


def live_line(metrics: dict[str, float]) -> dict[str, float | str]:
    """Select the few metrics that the progress line shows, by label."""
    names = {
        "reward": "reward/mean",
        "loss": "loss",
        "kl": "kl",
        "length": "completions/length_mean",
        "entropy": "entropy",
        "held-out": "heldout/score",
    }
    line: dict[str, float | str] = {label: metrics[name] for label, name in names.items() if name in metrics}
    return line if has_signal(metrics) else line | {"signal": "none"}


def has_signal(metrics: Mapping[str, float | None]) -> bool:
    """Whether the rewards of some group of a step differ; else all its advantages are 0."""
    without = (metrics.get("groups/zero_variance") or 0.0) + (metrics.get("groups/skipped") or 0.0)
    return without < 1 - 1e-6


def write_summary(output_dir: Path, console: Console) -> dict:
    """Write ``summary.json`` and print it.

    It is computed from ``metrics.jsonl``, so the summary of a resumed run covers the whole run.
    """
    summary = summarise(read_metrics(output_dir))
    write_json_atomic(output_dir / "summary.json", summary)
    _print_summary(summary, output_dir, console)
    return summary


def summarise(records: Sequence[Record]) -> dict:
    """Summarise a run: rewards of the first and last fifth of the steps, held-out accuracy before and after."""
    steps = [record for record in records if record.get("reward/mean") is not None]
    fifth = max(1, len(steps) // 5)
    evaluations = [record for record in records if record.get("heldout/accuracy") is not None]
    seconds = sum(value or 0.0 for record in records for name, value in record.items() if name.startswith("seconds/"))
    summary: dict = {"steps": len(steps), "train_minutes": seconds / 60}
    summary["steps_without_signal"] = sum(not has_signal(record) for record in steps)
    summary["steps_without_update"] = sum(record.get("updates") == 0 for record in steps)
    means = {name for record in steps for name in record if name.startswith("reward/") and name.endswith("/mean")}
    for name in sorted(name for name in means if "/criterion/" not in name):  # there may be hundreds of criteria
        key = name.removesuffix("/mean").replace("/", "_")
        for label, part in (("first", steps[:fifth]), ("last", steps[-fifth:])):
            seen = [record[name] for record in part if record.get(name) is not None]
            summary[f"{key}_{label}_fifth"] = statistics.fmean(seen) if seen else None
    if evaluations:  # a judge may have left every held-out response unscored
        for label, record in (("before", evaluations[0]), ("after", evaluations[-1])):
            summary[f"heldout_{label}"] = record["heldout/accuracy"]
            summary[f"heldout_{label}_interval"] = [record["heldout/accuracy_low"], record["heldout/accuracy_high"]]
            summary[f"heldout_{label}_score"] = record["heldout/score"]
        best = max(evaluations[1:] or evaluations, key=lambda record: record["heldout/score"])
        summary |= {"heldout_best": best["heldout/score"], "heldout_best_step": best["step"]}
    return summary


def _print_summary(summary: dict, output_dir: Path, console: Console) -> None:
    table = Table("", "before / first fifth", "after / last fifth", show_edge=False, pad_edge=False)
    for key in sorted(key for key in summary if key.endswith("_first_fifth")):
        name = key.removesuffix("_first_fifth")
        means = (summary[key], summary[f"{name}_last_fifth"])
        table.add_row(name.replace("_", " "), *("-" if mean is None else f"{mean:.3f}" for mean in means))
    best = "no held-out response was scored"
    if "heldout_best" in summary:
        labels = ("before", "after")
        cells = []
        for label in labels:
            low, high = summary[f"heldout_{label}_interval"]
            cells.append(f"{summary[f'heldout_{label}']:.3f}  (95 %: {low:.3f} to {high:.3f})")
        table.add_row("held-out accuracy, greedy", *cells)
        if any(summary[f"heldout_{label}_score"] != summary[f"heldout_{label}"] for label in labels):  # graded
            table.add_row("held-out score, greedy", *(f"{summary[f'heldout_{label}_score']:.3f}" for label in labels))
        best = f"best held-out score {summary['heldout_best']:.3f} at step {summary['heldout_best_step']}"
    console.print(table)
    steps, idle, without = summary["steps"], summary["steps_without_update"], summary["steps_without_signal"]
    if idle:
        why = ": all rewards of a group were equal, in every group" if without else ""
        console.print(f"optimizer steps were taken in {steps - idle} of {steps} steps{why}")
    elif without:
        console.print(f"in {without} of {steps} steps all rewards of a group were equal, in every group: no signal")
    console.print(
        f"{summary['steps']} steps in {summary['train_minutes']:.1f} minutes; {best}\n"
        f"curves: {output_dir / 'curves.png'}   weights: {output_dir / 'best'}   summary: {output_dir / 'summary.json'}"
    )
