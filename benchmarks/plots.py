"""Bar charts and line plots of the benchmarks, drawn with matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

OURS, THEIRS, BASELINE = "tab:blue", "darkgrey", "tab:red"


@dataclass(frozen=True)
class Bar:
    """A named ratio; ``ours`` gives it the colour of this package."""

    name: str
    value: float
    ours: bool


@dataclass(frozen=True)
class Line:
    """A named line through points."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """Lines that share a pair of axes."""

    title: str
    x: str
    y: str
    lines: Sequence[Line]


def save_bars(charts: Sequence[tuple[str, Sequence[Bar]]], path: Path) -> None:
    """Save bar charts of ratios, one above the other, with a line at the baseline of 1.

    Args:
        charts: title and bars of each chart.
        path: file of the PNG.
    """
    heights = [len(bars) + 2 for _, bars in charts]
    figure = _figure(7.2, 0.28 * sum(heights))
    grid = figure.subplots(len(charts), 1, squeeze=False, gridspec_kw={"height_ratios": heights})
    for axes, (title, bars) in zip(grid[:, 0], charts, strict=True):
        drawn = axes.barh(
            [bar.name for bar in bars], [bar.value for bar in bars], color=[OURS if b.ours else THEIRS for b in bars]
        )
        axes.bar_label(drawn, fmt="%.2f", padding=3)
        axes.axvline(1.0, color=BASELINE, linewidth=1)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.xaxis.set_visible(False)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.set_title(title, fontsize="medium")
    _save(figure, path)


def save_panels(panels: Sequence[Panel], path: Path, columns: int | None = None) -> None:
    """Save line plots side by side, or in rows of ``columns``.

    Args:
        panels: the plots.
        path: file of the PNG.
        columns: plots in a row; all of them if None.
    """
    columns = columns or len(panels)
    rows = -(-len(panels) // columns)
    figure = _figure(6.2 * columns, 4.4 * rows)
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for axes, panel in zip(grid, panels, strict=False):
        for line in panel.lines:
            axes.plot(*zip(*line.points, strict=True), marker="o", label=line.name)
        axes.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
        axes.grid(alpha=0.3)
        axes.legend()
    _save(figure, path)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
