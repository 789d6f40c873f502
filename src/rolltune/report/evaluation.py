"""The report of an evaluation, from ``results.json``, ``problems.jsonl`` and the sample files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rolltune.eval.passk import Difference, Estimate
from rolltune.eval.tables import difference_cell, estimate_cell, metric_label
from rolltune.report.panels import Line, Panel
from rolltune.report.samples import Pack, Record, Samples, make_group, make_pack, read_records

PROBLEMS_IN_PACK = 25
MAX_ONLY_ONE = 200  # problems listed


def evaluation_panels(results: Mapping[str, Any]) -> list[Panel]:
    """Draw pass@k, and accuracy by length and by difficulty."""
    models: Mapping[str, Any] = results["models"]
    ks = sorted(results["ks"])
    panels = [
        _panel(
            "pass@k",
            "share of problems, with 95 % interval",
            "k",
            {name: [(float(k), model["metrics"].get(f"pass@{k}")) for k in ks] for name, model in models.items()},
            log2=True,
        )
    ]
    for bins, title, label in (
        ("by_length", "Accuracy by completion length", "tokens, mean of a tenth of the completions"),
        ("by_solution_length", "Accuracy by length of the gold solution", "words, mean of a fifth of the problems"),
        ("by_baseline", "Accuracy by difficulty", f"solve rate of {next(iter(models), '')}"),
    ):
        points = {
            name: [(part["center"], part["accuracy"]) for part in model[bins] if part["center"] is not None]
            for name, model in models.items()
        }
        panels.append(_panel(title, "accuracy of the samples", label, points))
    return [panel for panel in panels if panel.lines and len(panel.x) > 1]


def _panel(
    title: str, unit: str, x_label: str, points: Mapping[str, Sequence[tuple[float, Any]]], *, log2: bool = False
) -> Panel:
    """Draw a line of estimates for each model that has any."""
    x = sorted({center for of_model in points.values() for center, _ in of_model})
    lines = []
    for name, of_model in points.items():
        by_x = {center: estimate for center, estimate in of_model if estimate is not None}
        ends = {end: [by_x[center][end] if center in by_x else None for center in x] for end in ("mean", "low", "high")}
        if by_x:
            lines.append(Line(label=name, y=ends["mean"], low=ends["low"], high=ends["high"], points=True))
    return Panel(title=title, unit=unit, x=x, lines=lines, x_label=x_label, log2=log2)


def evaluation_tables(results: Mapping[str, Any], problems: Sequence[Record]) -> list[Record]:
    """Make the tables: all metrics, differences, behaviours, and the problems that only one model solves."""
    models, size = results["models"], results["problems"]
    metrics = dict.fromkeys(metric for model in models.values() for metric in model["metrics"])
    tables = [
        {
            "title": "Metrics",
            "note": f"{size} problems, {results['samples']} samples of each; 95 % intervals over problems",
            "columns": ["", *models],
            "rows": [
                [metric_label(metric), *(_estimate(model["metrics"].get(metric), size) for model in models.values())]
                for metric in metrics
            ],
        }
    ]
    if results["comparisons"]:
        differences = results["comparisons"][0]["differences"]
        tables.append(
            {
                "title": "Differences between models",
                "note": "paired, on the same problems; * significant",
                "columns": ["", *map(metric_label, differences)],
                "rows": [
                    [f"{pair['second']} - {pair['first']}", *map(_difference, pair["differences"].values())]
                    for pair in results["comparisons"]
                ],
            }
        )
    behaviours = next(iter(models.values()))["behaviours"] if models else {}
    tables.append(
        {
            "title": "Behaviours",
            "note": "occurrences per completion, by the counter",
            "columns": ["", *models],
            "rows": [
                [
                    name.replace("_", " "),
                    *(_estimate(model["behaviours"][name]["mean"], size) for model in models.values()),
                ]
                for name in behaviours
            ],
        }
    )
    return [*tables, *_only_one_table(problems)]


def _only_one_table(problems: Sequence[Record]) -> list[Record]:
    """List the problems that one model solves in some sample, and no other model in any."""
    rows = []
    for record in problems:
        rates = {name: _rate(verdicts) for name, verdicts in record["models"].items()}
        solvers = [name for name, rate in rates.items() if rate]
        if len(solvers) == 1 and len(rates) > 1:
            rows.append([solvers[0], record["problem"], f"{rates[solvers[0]]:.0%}", _question(record)])
    if not rows:
        return []
    left_out = f"; the first {MAX_ONLY_ONE} of {len(rows)}" if len(rows) > MAX_ONLY_ONE else ""
    return [
        {
            "title": "Problems that only one model solves",
            "note": f"in at least one sample, greedy included{left_out}",
            "columns": ["model", "problem", "right", "question"],
            "rows": sorted(rows)[:MAX_ONLY_ONE],
        }
    ]


def _rate(verdicts: Mapping[str, Any]) -> float:
    """Share of right responses, without unscored ones; 0 without any."""
    known = [verdict for verdict in (verdicts["greedy"], *verdicts["samples"]) if verdict is not None]
    return sum(known) / len(known) if known else 0.0


def _question(record: Record) -> str:
    text = next((m["content"] for m in reversed(record["messages"]) if m["role"] == "user"), "")
    return text if len(text) <= 160 else f"{text[:160]} ..."


def _estimate(estimate: Mapping[str, Any] | None, problems: int) -> str:
    return estimate_cell(None if estimate is None else Estimate(**_with_nan(estimate)), problems)


def _difference(difference: Mapping[str, Any]) -> str:
    return difference_cell(Difference(**_with_nan(difference)))


def _with_nan(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Turn the nulls of a JSON file into the NaN that they stand for; a missing p-value is None in both."""
    return {name: math.nan if value is None and name != "mcnemar_p" else value for name, value in numbers.items()}


def evaluation_samples(folder: Path, problems: Sequence[Record], models: Sequence[str]) -> Samples:
    """Pack each model's responses, the greedy one first. A response's reward is its verdict.

    Raises:
        ValueError: a sample file is damaged.
    """
    packs: dict[str, Pack] = {}
    for number, name in enumerate(models):
        path = folder / "samples" / f"{name}.jsonl"
        if not path.is_file():
            continue
        found = {record["problem"]: record for record in read_records(path, header=True)}
        listed = [record for record in problems if record["problem"] in found]
        for start in range(0, len(listed), PROBLEMS_IN_PACK):
            groups = [
                _group(record, found[record["problem"]], name) for record in listed[start : start + PROBLEMS_IN_PACK]
            ]
            packs[f"m{number}-{start}"] = make_pack(name, groups)
    return Samples("model", packs)


def _group(record: Record, samples: Record, model: str) -> Record:
    verdicts = record["models"][model]
    responses = [(samples["greedy"], verdicts["greedy"], "greedy")]
    responses += [
        (sample, verdict, f"sample {i}")
        for i, (sample, verdict) in enumerate(zip(samples["samples"], verdicts["samples"], strict=False), start=1)
    ]
    completions = [response | {"reward": verdict, "label": label} for response, verdict, label in responses]
    return make_group(record["problem"], record["messages"], record["answer"], completions)


def read_results(path: Path) -> Record:
    """Read ``results.json``.

    Raises:
        ValueError: it is not the file of an evaluation.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        return {key: results[key] for key in ("problems", "samples", "ks", "models", "comparisons", "notes")}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not the results of an evaluation ({type(error).__name__}: {error})") from None
