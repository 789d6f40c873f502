"""The curves of a report: which metrics a panel shows, as plain lists for the page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rolltune.metrics.curves import BEHAVIOUR, CATEGORY, CRITERION, JUDGE, Curves, Series, matching

Values = list[float | None]


@dataclass(frozen=True, kw_only=True)
class Line:
    """A curve.

    Attributes:
        label: name in the legend.
        y: values, one for each x of the panel; None where nothing was measured.
        low: lower ends of the intervals; None for a curve without.
        high: upper ends of the intervals.
        points: whether values are measured now and then, so that they are marked and never smoothed.
    """

    label: str
    y: Values
    low: Values | None = None
    high: Values | None = None
    points: bool = False


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A chart.

    Attributes:
        title: what it shows.
        unit: unit of the values.
        x: shared by the lines, ascending.
        lines: in the order of the legend.
        x_label: name of x.
        log2: whether x is on a logarithmic axis.
        stacked: whether the lines are parts of a sum, drawn as areas on top of each other.
    """

    title: str
    unit: str
    x: list[float]
    lines: list[Line]
    x_label: str = "step"
    log2: bool = False
    stacked: bool = False


@dataclass(frozen=True, kw_only=True)
class _Spec:
    """A panel of a run.

    Attributes:
        metrics: metric to label. A pattern of whole metric names stands for all that match, each labelled by its last
            group; its label is None.
        points: whether the metrics are measured now and then.
        stacked: as in :class:`Panel`.
        without: patterns of metrics that are left out.
    """

    title: str
    unit: str
    metrics: Mapping[str, str | None]
    points: bool = False
    stacked: bool = False
    without: Sequence[str] = ()


_SPECS = (
    _Spec(title="Reward", unit="mean over completions", metrics={"reward/mean": "total"}),
    _Spec(
        title="Reward parts", unit="mean, before weights", metrics={r"reward/([^/]+)/mean": None}, without=[BEHAVIOUR]
    ),
    _Spec(title="Loss", unit="", metrics={"loss": "training", "heldout/loss": "held out"}),
    _Spec(
        title="Held-out accuracy",
        unit="greedy, with 95 % interval",
        metrics={"heldout/accuracy": "strict", "heldout/lenient_accuracy": "lenient", "heldout/format": "in format"},
        points=True,
    ),
    _Spec(
        title="Held-out score",
        unit="mean",
        metrics={"heldout/score": "score"},
        points=True,
    ),
    _Spec(
        title="Completion length",
        unit="tokens, mean",
        metrics={"completions/length_mean": "training", "heldout/length_mean": "held out"},
    ),
    _Spec(
        title="Lost completions and groups",
        unit="share",
        metrics={
            "completions/truncated": "truncated",
            "reward/unscored": "unscored",
            "groups/zero_variance": "groups without variance",
            "groups/skipped": "groups skipped",
        },
    ),
    _Spec(title="Policy entropy", unit="nats per token", metrics={"entropy": "entropy"}),
    _Spec(title="KL to the reference", unit="nats per token", metrics={"kl": "KL"}),
    _Spec(
        title="Sampler against trainer",
        unit="difference of log-probs, mean; share of ratios not in [0.9, 1.1]",
        metrics={"mismatch/mean_abs": "mean difference", "mismatch/k3": "k3", "mismatch/outside": "share outside"},
    ),
    _Spec(title="Reward and length", unit="correlation", metrics={"reward/length_correlation": "correlation"}),
    _Spec(title="Gradient norm", unit="before clipping", metrics={"grad_norm": "norm"}),
    _Spec(
        title="Clipped and far ratios",
        unit="share of tokens",
        metrics={"clip_fraction": "clipped", "ratio/outside": "outside [0.9, 1.1]"},
    ),
    _Spec(title="Learning rate", unit="", metrics={"lr": "lr"}),
    _Spec(title="Reasoning behaviours", unit="per completion", metrics={BEHAVIOUR: None}),
    _Spec(
        title="Judge and gold measure",
        unit="mean over held-out responses",
        metrics={"overoptimization/train_mean": "trained on", "overoptimization/mean": "gold"},
        points=True,
    ),
    _Spec(title="Rubric, by category", unit="mean credit", metrics={CATEGORY: None}),
    _Spec(title="Rubric, by criterion", unit="mean credit", metrics={CRITERION: None}),
    _Spec(
        title="Judge",
        unit="so far in this process",
        metrics={JUDGE.format(name): None for name in ("questions", "calls", "cache_hits")},
    ),
    _Spec(title="Judge's cost", unit="dollars, so far in this process", metrics={JUDGE.format("dollars"): None}),
    _Spec(title="Seconds of a step", unit="by phase", metrics={r"seconds/(.+)": None}, stacked=True),
    _Spec(title="Peak memory", unit="GiB", metrics={"memory/peak_gib": "peak"}),
)
MAX_LINES = 8  # of a panel, those with the most points first


def run_panels(curves: Curves) -> list[Panel]:
    """Make the panels of a run that there is data for."""
    curves = {name: series for name, series in curves.items() if not (name.endswith("/dollars") and not any(series[1]))}
    if curves.get("heldout/score") == curves.get("heldout/accuracy"):  # verdicts are 0 or 1
        curves.pop("heldout/score", None)
    return [panel for spec in _SPECS if (panel := _panel(spec, curves))]


def comparison_panels(runs: Mapping[str, Curves]) -> list[Panel]:
    """Make the panels that compare runs: one for each metric that at least two of them have, with a line for each."""
    panels = []
    for spec in _SPECS:
        for metric, label in spec.metrics.items():
            having = {name: curves[metric] for name, curves in runs.items() if metric in curves}
            if len(having) > 1 and label is not None:
                title = spec.title if len(spec.metrics) == 1 else f"{spec.title}: {label}"
                x = _steps(having.values())
                intervals = [_intervals(runs[name], metric, x) for name in having]
                lines = [
                    Line(label=name, y=_aligned(series, x), points=spec.points, **interval)
                    for (name, series), interval in zip(having.items(), intervals, strict=True)
                ]
                panels.append(Panel(title=title, unit=spec.unit, x=x, lines=lines))
    return panels


def _panel(spec: _Spec, curves: Curves) -> Panel | None:
    labels: dict[str, str] = {}
    for pattern, label in spec.metrics.items():
        labels |= {name: label or found for name, found in matching(curves, pattern).items()}
    for pattern in spec.without:
        labels = {name: label for name, label in labels.items() if name not in matching(curves, pattern)}
    shown = sorted(labels, key=lambda name: -len(curves[name][0]))[:MAX_LINES]
    if not shown:
        return None
    x = _steps(curves[name] for name in shown)
    lines = [
        Line(
            label=labels[name],
            y=_aligned(curves[name], x),
            points=spec.points or name.startswith("heldout/"),
            **_intervals(curves, name, x),
        )
        for name in labels
        if name in shown
    ]
    return Panel(title=spec.title, unit=spec.unit, x=x, lines=lines, stacked=spec.stacked)


def _steps(series: Iterable[Series]) -> list[float]:
    return sorted({step for steps, _ in series for step in steps})


def _aligned(series: Series, x: Sequence[float]) -> Values:
    values = dict(zip(*series, strict=True))
    return [values.get(step) for step in x]


def _intervals(curves: Curves, metric: str, x: Sequence[float]) -> dict[str, Values]:
    ends = {end: curves.get(f"{metric}_{end}") for end in ("low", "high")}
    return {end: _aligned(series, x) for end, series in ends.items() if series}
