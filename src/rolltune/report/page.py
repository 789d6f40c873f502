"""The content of a report: everything that the page shows, gathered from a folder as plain data."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rolltune.metrics.curves import Curves, collect_series
from rolltune.metrics.log import read_metrics
from rolltune.metrics.summary import summarise
from rolltune.report.evaluation import (
    evaluation_panels,
    evaluation_samples,
    evaluation_tables,
    read_results,
)
from rolltune.report.panels import Panel, comparison_panels, run_panels
from rolltune.report.samples import Record, Samples, criteria, read_records, run_samples
from rolltune.run import notices, record

Facts = list[tuple[str, str]]

LOSSES = (("loss", "training loss"), ("heldout/loss", "held-out loss"))


@dataclass(frozen=True, kw_only=True)
class Page:
    """A report.

    Attributes:
        title: name of the run, evaluation or comparison.
        kind: "run", "evaluation" or "comparison".
        facts: label and value: what was run, where and when.
        panels: the charts.
        tables: those below the charts, each with "title", "note", "columns" and "rows" of text.
        numbers: those above the charts.
        warnings: in plain words.
        notes: how to read the numbers.
        config: text of ``config.yaml``; empty without one.
        samples: completions; None without any.
    """

    title: str
    kind: str
    facts: Facts
    panels: list[Panel]
    tables: list[Record]
    numbers: Sequence[Record] = ()
    warnings: Sequence[str] = ()
    notes: Sequence[str] = ()
    config: str = ""
    samples: Samples | None = None

    def data(self) -> Record:
        """Return what the page's script reads, without the texts of the samples."""
        return {
            "title": self.title,
            "kind": self.kind,
            "facts": self.facts,
            "warnings": list(self.warnings),
            "panels": [asdict(panel) for panel in self.panels],
            "tables": self.tables,
            "numbers": list(self.numbers),
            "notes": list(self.notes),
            "config": self.config,
            "samples": self.samples.index() if self.samples and self.samples.packs else None,
        }


def gather(folder: str | Path) -> Page:
    """Gather the report of a training run or an evaluation.

    Raises:
        ValueError: the folder holds neither, or a file in it is damaged.
    """
    folder = Path(folder)
    if (folder / "results.json").is_file():
        return _evaluation(folder)
    _check_is_run(folder)
    return _run(folder)


def gather_comparison(folders: Sequence[str | Path]) -> Page:
    """Gather a report that compares training runs.

    Raises:
        ValueError: a folder does not hold a training run, or is given twice.
    """
    paths = [Path(folder) for folder in folders]
    for path in paths:
        if (path / "results.json").is_file():
            raise ValueError(f"{path}: holds an evaluation, which compares models by itself; give it alone")
        _check_is_run(path)
    names = _short_names(paths)
    metrics = {name: _metrics(path) for name, path in zip(names, paths, strict=True)}
    warnings = [f"{name}: {line}" for name, records in metrics.items() for line in notices.about_metrics(records)]
    return Page(
        title=f"{len(paths)} runs",
        kind="comparison",
        facts=[(name, str(path.resolve())) for name, path in zip(names, paths, strict=True)],
        warnings=warnings,
        panels=comparison_panels({name: collect_series(records) for name, records in metrics.items()}),
        numbers=[_numbers_table({name: _numbers(records) for name, records in metrics.items()})],
        tables=[_config_table({name: _read_config(path) for name, path in zip(names, paths, strict=True)})],
    )


def _check_is_run(folder: Path) -> None:
    if not any((folder / name).is_file() for name in ("metrics.jsonl", record.NAME)):
        raise ValueError(
            f"{folder}: holds no run and no evaluation (no metrics.jsonl, {record.NAME} or results.json); give the "
            "output_dir of one"
        )


# --- a run ------------------------------------------------------------------------------------------------------------


def _run(folder: Path) -> Page:
    records = _metrics(folder)
    samples = run_samples(folder)
    return Page(
        title=folder.resolve().name,
        kind="run",
        facts=_run_facts(folder, records),
        warnings=list(notices.about_metrics(records)),
        panels=run_panels(collect_series(records)),
        numbers=[_numbers_table({"": _numbers(records)})],
        tables=_criteria_table(samples),
        config=_config_text(folder),
        samples=samples,
    )


def _metrics(folder: Path) -> list[Record]:
    return read_metrics(folder) if (folder / "metrics.jsonl").is_file() else []


def _run_facts(folder: Path, records: Sequence[Record]) -> Facts:
    config = _read_config(folder)
    done = max((int(line["step"]) for line in records), default=0)
    facts = [("steps", f"{done} of {config['num_steps']}" if "num_steps" in config else str(done))]
    times = [line["time"] for line in records if line.get("time")]
    if times:
        seconds = sum(v or 0.0 for line in records for name, v in line.items() if name.startswith("seconds/"))
        facts.append(("time", f"{_clock(min(times))} to {_clock(max(times))}, {_duration(seconds)} in steps"))
    if "model.path" in config:
        facts.append(("model", config["model.path"]))
    return [*facts, *_judge_facts(collect_series(records)), *_process_facts(folder), ("folder", str(folder.resolve()))]


def _process_facts(folder: Path) -> Facts:
    """What ``run.json`` says, if it is there and whole."""
    try:
        started = json.loads((folder / record.NAME).read_text(encoding="utf-8"))
        hardware = started["hardware"]
        cores = f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['memory_gib']} GiB of memory"
        return [
            ("command", started["command"]),
            ("last start", f"{_clock(started['started'])}, processes: {started['processes']}"),
            ("hardware", ", ".join([*hardware["gpus"], cores])),
            ("versions", ", ".join(f"{name} {version}" for name, version in started["versions"].items())),
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _judge_facts(curves: Curves) -> Facts:
    """What judging cost; the counts of each process of the run start at 0."""
    totals: dict[str, float] = {}
    for name, (_, values) in curves.items():
        kind, _, count = name.rpartition("/")
        if "judge" in kind.split("/") and count in ("calls", "prompt_tokens", "completion_tokens", "dollars"):
            totals[count] = totals.get(count, 0.0) + _sum_of_counters(values)
    if not totals.get("calls"):
        return []
    tokens = totals.get("prompt_tokens", 0) + totals.get("completion_tokens", 0)
    dollars = f", {totals['dollars']:.2f} dollars" if totals.get("dollars") else ""
    return [("judges", f"{totals['calls']:.0f} calls, {tokens:.0f} tokens{dollars}")]


def _sum_of_counters(values: Sequence[float]) -> float:
    """Add up counters that start at 0 again in each process: the last value before each drop, and the last one."""
    return sum(value for value, after in zip(values, [*values[1:], -1.0], strict=True) if after < value)


def _numbers(records: Sequence[Record]) -> dict[str, str]:
    """The summary's numbers, by label; a run without rewards has its losses."""
    summary = summarise(records)
    if not summary["steps"]:
        losses = {label: [line[name] for line in records if line.get(name) is not None] for name, label in LOSSES}
        return {label: _change(seen[0], seen[-1]) for label, seen in losses.items() if seen}
    rewards = [key.removesuffix("_first_fifth") for key in summary if key.endswith("_first_fifth")]
    shown = {
        name.replace("_", " "): _change(summary[f"{name}_first_fifth"], summary[f"{name}_last_fifth"])
        for name in sorted(rewards)
    }
    if "heldout_before" in summary:
        shown["held-out accuracy"] = " → ".join(_accuracy(summary, when) for when in ("before", "after"))
        shown["best held-out score"] = f"{summary['heldout_best']:.3f} at step {summary['heldout_best_step']}"
    counts = {"steps without signal": "steps_without_signal", "steps without update": "steps_without_update"}
    shown |= {label: str(summary[key]) for label, key in counts.items() if summary[key]}
    return shown | {"minutes": f"{summary['train_minutes']:.1f}"}


def _accuracy(summary: Mapping[str, Any], when: str) -> str:
    low, high = summary[f"heldout_{when}_interval"]
    return f"{summary[f'heldout_{when}']:.3f} [{low:.3f}, {high:.3f}]"


def _change(first: float | None, last: float | None) -> str:
    return " → ".join("-" if value is None else f"{value:.3f}" for value in (first, last))


def _numbers_table(runs: Mapping[str, Mapping[str, str]]) -> Record:
    labels = dict.fromkeys(label for numbers in runs.values() for label in numbers)
    return {
        "title": "Numbers",
        "note": "rewards: mean of the first and of the last fifth of the steps; held-out accuracy: before and after, "
        "greedy, with 95 % interval",
        "columns": ["", *runs],
        "rows": [[label, *(numbers.get(label, "-") for numbers in runs.values())] for label in labels],
    }


def _criteria_table(samples: Samples) -> list[Record]:
    rows = [
        [
            criterion,
            _ratio(tally.total, tally.responses),
            _ratio(tally.agreed, tally.judged_twice),
            str(tally.responses),
            str(tally.unscored),
        ]
        for criterion, tally in criteria(samples.packs.values()).items()
    ]
    if not rows:
        return []
    return [
        {
            "title": "Rubric, by criterion",
            "note": "the most often met first; a grade of 1 means met; agreement: share of the responses graded by "
            "several judges to which all gave the same grade",
            "columns": ["criterion", "mean grade", "agreement", "graded", "unscored"],
            "rows": rows,
        }
    ]


def _ratio(part: float, whole: int) -> str:
    return f"{part / whole:.2f}" if whole else "-"


# --- an evaluation ----------------------------------------------------------------------------------------------------


def _evaluation(folder: Path) -> Page:
    results = read_results(folder / "results.json")
    path = folder / "problems.jsonl"
    problems = read_records(path) if path.is_file() else []
    return Page(
        title=folder.resolve().name,
        kind="evaluation",
        facts=[
            ("models", ", ".join(results["models"])),
            ("problems", f"{results['problems']}, {results['samples']} samples of each"),
            *_process_facts(folder),
            ("folder", str(folder.resolve())),
        ],
        notes=results["notes"],
        panels=evaluation_panels(results),
        tables=evaluation_tables(results, problems),
        config=_config_text(folder),
        samples=evaluation_samples(folder, problems, list(results["models"])),
    )


# --- shared -----------------------------------------------------------------------------------------------------------


def _config_text(folder: Path) -> str:
    path = folder / "config.yaml"
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _read_config(folder: Path) -> dict[str, str]:
    """A saved config with dotted keys; empty if it is missing or damaged."""
    import yaml

    try:
        return dict(_flat(yaml.safe_load(_config_text(folder)) or {}))
    except yaml.YAMLError:
        return {}


def _flat(tree: Any, key: str = "") -> list[tuple[str, str]]:
    if isinstance(tree, dict) and tree:
        return [pair for name, item in tree.items() for pair in _flat(item, f"{key}.{name}" if key else str(name))]
    return [(key, str(tree))]


def _config_table(configs: Mapping[str, Mapping[str, str]]) -> Record:
    keys = dict.fromkeys(key for config in configs.values() for key in config)
    rows = [[key, *(config.get(key, "-") for config in configs.values())] for key in keys]
    return {
        "title": "Settings that differ",
        "note": "",
        "columns": ["", *configs],
        "rows": [row for row in rows if len(set(row[1:])) > 1],
    }


def _short_names(paths: Sequence[Path]) -> list[str]:
    """Name runs by their folder, or by more of the path where two folders have the same name."""
    resolved = [path.resolve() for path in paths]
    if len(set(resolved)) < len(resolved):
        raise ValueError(f"{next(p for p in paths if resolved.count(p.resolve()) > 1)}: is given twice")
    for parts in range(1, max(len(path.parts) for path in resolved) + 1):
        names = ["/".join(path.parts[-parts:]) for path in resolved]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("different paths have different names")


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.1f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
