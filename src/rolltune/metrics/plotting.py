"""The style shared by all plots."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rolltune.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#2a6fbb", "#e07b39", "#3c9d6b", "#8e5bb5", "#c8475d", "#7a7a7a")
GREY = "#444444"


def new_figure(width: float, height: float) -> Figure:
    """Make a figure of that size in inches, without pyplot: no global state and no display."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12), facecolor="white")


def style_axes(axes: Axes, *, xlabel: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.tick_params(colors=GREY, labelsize=8)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel(xlabel, fontsize=8, color=GREY)


def title_axes(axes: Axes, title: str, ylabel: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color="#222222")
    axes.set_ylabel(ylabel, fontsize=8, color=GREY)


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a PNG file, which appears complete or not at all."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    return path
