"""The norm of every leaf at every step."""

from typing import Any

import numpy as np

from optaxclip._plots import canvas as _canvas, grid as _grid
from optaxclip._plots.canvas import ACCENT, GREY, INK
from optaxclip._plots.grid import Grid

NAMES = 40  # of leaves, written at most
CROSSES = 40  # in a row of the picture, at most
SHADES = "#f4f4f4", "#b4d2e4", ACCENT, "#00263c"  # darker in grey, too
TEXTS = 6  # about leaves that are 0, at most


def layers(history: Any, ax: Any = None) -> Any:
    """Draws the norm of every leaf at every step, over the leaf's own median.

    Each leaf is a row of the picture, in forward order: light below its median, dark
    above. A norm of exactly 0 is black, with words where it stays 0 to the end. What
    is not finite is white with crosses. The bars at the right are the medians.

    A dead layer is a black row, an explosion a dark column that begins in one row,
    and vanishing gradients are a staircase of bars.

    Args:
      history: what ``optaxclip.history`` takes, with norms of leaves.
      ax: axes of matplotlib; new ones if None. The bars are placed to their right.

    Returns:
      The axes of the picture; those of the bars are the first of its child axes.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: there is no norm of a leaf in the history.

    Examples:
      >>> history = {"norm/a": [1.0, 2.0, 1.0, 2.0], "norm/b": [1.0, 0.0, 0.0, 0.0]}
      >>> ax = optaxclip.plot.layers(history)
      >>> print(ax.get_title(loc="left"))
      1 of 2 leaves: exactly 0 from step 1 on
    """
    grid = _grid.of(history)
    if ax is None:
        height = float(np.clip(0.24 * len(grid.paths) + 1.5, 2.4, 8))
        ax = _canvas.subplots(figsize=(6.4, height))
    _image(ax, grid)
    ax.set_xlim(grid.edges[0], grid.edges[-1])
    ax.locator_params(axis="x", nbins=6)
    _crosses(ax, grid)
    _words(ax, grid)
    _names(ax, grid.paths)
    _bars(ax, grid)
    ax.set_xlabel("step")
    _canvas.title(ax, _grid.message(grid))
    if max(map(len, grid.paths)) > _canvas.LETTERS / 2:  # there is room over the names
        _canvas.title(ax, _grid.message(grid), x=1.22, ha="right")
    return ax


def _image(ax: Any, grid: Grid) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    shades = LinearSegmentedColormap.from_list("", SHADES)
    shades = shades.with_extremes(under=INK, bad="white")
    ratios = _grid.ratios(grid)
    found = np.abs(ratios[np.isfinite(ratios)])
    decades = int(np.clip(np.ceil(np.percentile(found, 99)), 1, 4)) if found.size else 1
    colours = np.where(grid.norms == 0, -99, np.clip(ratios, -decades, decades))
    rows = np.arange(len(grid.paths) + 1) - 0.5
    image = ax.pcolormesh(
        grid.edges,
        rows,
        np.ma.masked_invalid(colours),
        cmap=shades,
        vmin=-decades,
        vmax=decades,
        rasterized=True,
    )
    ax.invert_yaxis()
    place: Any = {"location": "bottom", "fraction": 0.05, "aspect": 40}
    bar = ax.figure.colorbar(image, ax=ax, **place)
    low, high = f"median / {10**decades}", f"median x {10**decades}"
    bar.set_ticks([-decades, 0, decades], labels=[low, "median of the leaf", high])
    bar.ax.tick_params(labelsize="small", length=2)
    bar.outline.set_linewidth(0.5)


def _crosses(ax: Any, grid: Grid) -> None:
    """Puts crosses on what is not finite, not so many that they run together."""
    middle = (grid.edges[:-1] + grid.edges[1:]) / 2
    columns = np.arange(0, len(middle), -(-len(middle) // CROSSES))
    rows = np.arange(0, len(grid.paths), -(-len(grid.paths) // NAMES))
    y, x = np.nonzero(grid.bad[np.ix_(rows, columns)])
    style: Any = {"linestyle": "", "marker": "x", "color": GREY, "markersize": 4}
    ax.plot(middle[columns[x]], rows[y], **style)


def _words(ax: Any, grid: Grid) -> None:
    """Says of neighbouring leaves that stay at 0 from which step on."""
    dead = np.flatnonzero(np.isfinite(grid.zero_since))
    groups = np.split(dead, np.flatnonzero(np.diff(dead) > 1) + 1)
    box: Any = {"boxstyle": "square,pad=0.1", "facecolor": INK, "edgecolor": "none"}
    for group in sorted(groups, key=len, reverse=True)[:TEXTS]:
        if not group.size:
            continue
        since = grid.zero_since[group].max()
        left, right = since, ax.get_xlim()[1]
        is_wide = right - left > 0.4 * (right - grid.edges[0])
        x, side = ((left + right) / 2, "center") if is_wide else (right, "right")
        style: Any = {"color": "white", "ha": side, "va": "center", "bbox": box}
        text = f"exactly 0 from step {since:.0f} on"
        ax.text(x, group.mean(), text, **style, **_canvas.SMALL)


def _names(ax: Any, paths: list[str]) -> None:
    """Names the leaves; of many every second, third, ..., the first letters cut off."""
    rows = np.arange(0, len(paths), -(-len(paths) // NAMES))
    names = [_canvas.shortened(paths[i]) for i in rows]
    ax.set_yticks(rows, names, fontsize="small", parse_math=False)
    ax.tick_params(axis="y", length=2)


def _bars(ax: Any, grid: Grid) -> None:
    """Draws the medians of the leaves, beside their rows."""
    found = grid.medians[np.isfinite(grid.medians)]
    bars = ax.inset_axes((1.03, 0, 0.2, 1), sharey=ax)
    low, high = (found.min(), found.max()) if found.size else (1.0, 1.0)
    bars.set_rasterization_zorder(1.2 if len(grid.paths) > NAMES else 0)  # one image
    bars.barh(np.arange(len(grid.paths)), grid.medians, color=GREY, height=0.8)
    _canvas.log_axis(bars, low / 3, high * (high / low) ** 0.2 * 2, "x")
    bars.locator_params(axis="x", numticks=2)
    if high > 100 * low:
        bars.set_xticks(10.0 ** np.floor(np.log10([10 * low, high])))
    labels: Any = {"labeltop": True, "labelbottom": False, "labelsize": "small"}
    bars.tick_params(axis="x", which="both", **labels)
    bars.tick_params(axis="y", labelleft=False, length=0)
    bars.set_xlabel("median", fontsize="small")
    _canvas.bare(bars)
