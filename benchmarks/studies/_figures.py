"""Figures of the studies: a style, lines that are told apart in grey, and marks."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _study import last_finite, quartiles
from matplotlib import rcParams
from matplotlib.figure import Figure

PARAMS: Any = {
    "axes.grid": True,
    "axes.titlesize": "medium",
    "figure.titlesize": "large",
    "grid.alpha": 0.3,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "savefig.dpi": 120,
}
# Okabe and Ito's colours, which the colour-blind tell apart; the dashes are for grey.
STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#0072B2", "linestyle": "-"},
    {"color": "#D55E00", "linestyle": "--"},
    {"color": "#009E73", "linestyle": "-."},
    {"color": "#CC79A7", "linestyle": (0, (1, 1))},
    {"color": "#000000", "linestyle": (0, (6, 2, 1, 2, 1, 2))},
    {"color": "#E69F00", "linestyle": (0, (8, 2))},
    {"color": "#56B4E9", "linestyle": (0, (3, 1, 1, 1))},
    {"color": "#777777", "linestyle": (0, (2, 4))},
    {"color": "#332288", "linestyle": (0, (12, 2, 2, 2))},
)
LIMIT: dict[str, Any] = {"color": "black", "linestyle": (0, (4, 3)), "linewidth": 1}
GUESS: dict[str, Any] = {"color": "black", "linestyle": (0, (1, 2)), "linewidth": 1}


def new_figure(rows: int, columns: int, size: tuple[float, float], **options: Any):
    """Opens a figure of panels; returns it and the array of its axes, `[rows, cols]`.

    Options are those of `Figure.subplots`, such as `sharey=True`.
    """
    rcParams.update(PARAMS)
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def plot_band(ax, x, values, style: Mapping[str, Any], label: str | None = None):
    """Draws the median of the runs `[runs, x]`, and a band between their quartiles."""
    low, middle, high = quartiles(values)
    ax.plot(x, middle, label=label, **style)
    ax.fill_between(x, low, high, color=style["color"], alpha=0.2, linewidth=0)


def plot_runs(ax, values, style: Mapping[str, Any], label: str | None = None):
    """Draws each run `[runs, steps]` up to its last finite value, marked by a cross."""
    steps = np.arange(1, np.shape(values)[-1] + 1)
    for run, last in zip(values, last_finite(values), strict=True):
        ax.plot(steps[: last + 1], run[: last + 1], label=label, **style)
        label = None
        if 0 <= last < len(run) - 1:
            ax.plot(steps[last], run[last], "x", color="black", markersize=6)


def mark_above(ax, x, style: Mapping[str, Any], label: str | None = "above the axis"):
    """Puts arrows to the upper edge, at the places where a value is above the axis."""
    if np.size(x) == 0:
        return
    place = {"transform": ax.get_xaxis_transform(), "clip_on": False}
    arrow = {"color": style["color"], "marker": "^", "linestyle": ""}
    ax.plot(x, np.full(np.shape(x), 0.97), label=label, **arrow, **place)


def legend_below(figure: Figure, axes: Sequence[Any], columns: int = 5) -> None:
    """Puts one legend below the panels; a label that several use is there once."""
    found = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    handles, labels = list(found.values()), list(found)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def save_all(figures: Mapping[str, Callable[[], Figure]], folder: Path) -> None:
    """Draws figures by their names, and prints where they are."""
    print("Figures:")
    for name, draw in figures.items():
        path = folder / f"{name}.png"
        draw().savefig(path)
        print(f"  {path}")
