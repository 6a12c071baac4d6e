"""The two panels of a run: its loss and its norm."""

from typing import Any

import numpy as np

from optaxclip._plots import canvas as _canvas, columns as _columns
from optaxclip._plots.canvas import ACCENT, DASHES, GREY, INK, PALE
from optaxclip._plots.columns import Columns

BINS = 100  # bars of the share clipped
HEIGHT = 0.08  # of the axes, for a share of 1
FAR = 1e3  # a threshold so many times above or below all norms is named, not drawn


def loss(ax: Any, columns: Columns, earlier: list[Columns]) -> None:
    """Draws the loss, over that of the runs before."""
    values = columns.get("loss")
    ax.set_ylabel("loss")
    if values is None or not _columns.is_there(values):
        return _canvas.say(ax, "no finite loss in this record")
    finite = values[np.isfinite(values)]
    _scale(ax, columns, finite)
    for part in earlier:
        _line(ax, part, part["loss"], color=GREY, alpha=0.6)
    _line(ax, columns, values, color=INK)
    if _columns.crash(columns) is None:
        _canvas.at_end(ax, finite[-1], _canvas.number(finite[-1]))


def norm(ax: Any, columns: Columns, earlier: list[Columns]) -> None:
    """Draws the norm, the threshold, and what lies between them."""
    values = columns.get("norm")
    ax.set_ylabel("gradient norm")
    if values is None or not _columns.is_there(values):
        return _canvas.say(ax, "no finite gradient norm in this record")
    _limits(ax, columns, values)
    for part in earlier:
        _line(ax, part, part.get("norm"), color=GREY, alpha=0.6)
    _band(ax, columns, values)
    _line(ax, columns, values, color=INK, label="norm")
    _threshold(ax, columns, values)
    _rug(ax, columns)
    _edges(ax, columns, values)
    if len(ax.get_legend_handles_labels()[1]) > 1:
        place: Any = {"loc": "lower left", "bbox_to_anchor": (-0.02, 0.98)}
        place |= {"ncols": 5, "handlelength": 1.2, "columnspacing": 1}
        ax.legend(frameon=False, fontsize="small", **place)


def _line(ax: Any, columns: Columns, values: np.ndarray | None, **style: Any) -> None:
    """Draws a line through what was told, with a gap where it can't be drawn."""
    if values is None:
        return
    told = np.isfinite(values) | (columns["nonfinite"] > 0)
    can_be = np.isfinite(values) & ((values > 0) | (ax.get_yscale() != "log"))
    shown = np.where(can_be, values, np.nan)[told]
    marker = "." if np.sum(told) <= 40 else ""
    ax.plot(columns["step"][told], shown, linewidth=1.2, marker=marker, **style)


def _scale(ax: Any, columns: Columns, finite: np.ndarray) -> None:
    """Chooses the axis of the loss: log, linear, or linear about 0 and log beyond."""
    size = np.abs(finite[finite != 0])
    if not size.size or size.max() < 30 * size.min():
        return
    if np.all(finite >= 0):
        _canvas.log_axis(ax, size.min() / 1.3, size.max() * 1.3)
        _canvas.at_edge(ax, columns["step"][columns["loss"] == 0], 0.03, "v", "loss 0")
    elif size.max() > 1e3 * np.median(size):
        ax.set_yscale("symlog", linthresh=float(np.median(size)))


def _limits(ax: Any, columns: Columns, values: np.ndarray) -> None:
    """Makes room for all norms, and for the threshold where it is not far away."""
    every = np.concatenate([values, columns["peak/norm"]])
    every = every[np.isfinite(every) & (every > 0)]
    every = every if every.size else np.ones(1)
    low, high = every.min(), every.max()
    max_norms = _columns.max_norm(columns)
    near = every if max_norms is None else max_norms
    near = near[(near > low / FAR) & (near < high * FAR)]
    low, high = min([low, *near]), max([high, *near])
    _canvas.log_axis(ax, low / (high / low) ** 0.15 / 1.2, high * 1.3)


def _band(ax: Any, columns: Columns, values: np.ndarray) -> None:
    peaks = columns["peak/norm"]
    told = np.isfinite(values) & np.isfinite(peaks)
    if np.any(peaks[told] > values[told]):
        x, low, high = (x[told] for x in (columns["step"], values, peaks))
        ax.fill_between(x, low, high, color=PALE, linewidth=0, label="largest")


def _threshold(ax: Any, columns: Columns, values: np.ndarray) -> None:
    """Draws and names the threshold, and fills the area from it up to the norm."""
    max_norms = _columns.max_norm(columns)
    if max_norms is None:
        return
    told = np.isfinite(values) & np.isfinite(max_norms)
    x, values, max_norms = columns["step"][told], values[told], max_norms[told]
    if not x.size:
        return
    text = f"clip at {_canvas.number(max_norms[-1])}"
    low, high = ax.get_ylim()
    above, below = np.all(max_norms > high), np.all(max_norms < low)
    if above or below:
        text += ", far above" if above else ", far below"
    else:
        ax.plot(x, max_norms, color=ACCENT, linestyle=DASHES, linewidth=1.5)
    _canvas.at_end(ax, max_norms[-1], text, color=ACCENT)
    style: Any = {"color": ACCENT, "alpha": 0.3, "linewidth": 0}
    style |= {"label": "clipped away"} if np.any(values > max_norms) else {}
    ax.fill_between(
        x, max_norms, values, where=values > max_norms, interpolate=True, **style
    )


def _rug(ax: Any, columns: Columns) -> None:
    """Draws bars at the bottom, as high as the share of the steps that was clipped."""
    if "clipped" not in columns or not columns["clipped"].any():
        return
    few = _columns.thinned(columns, BINS)
    edges = np.append(few["from"], few["to"][-1])
    place: Any = {"transform": ax.get_xaxis_transform(), "fill": True}
    heights = HEIGHT * few["clipped"] / np.maximum(few["width"], 1)
    ax.stairs(heights, edges, color=ACCENT, **place)
    ax.text(1, 0.04, " clipped", transform=ax.transAxes, va="center", **_canvas.SMALL)


def _edges(ax: Any, columns: Columns, values: np.ndarray) -> None:
    """Marks what a log axis can't show: norms of 0, and steps that are not finite."""
    step, lost = columns["step"], _columns.crash(columns)
    _canvas.at_edge(ax, step[values == 0], 0.11, "v", "norm 0")
    before = np.arange(len(step)) < (len(step) if lost is None else lost)
    single = step[before & (columns["nonfinite"] > 0)]
    _canvas.at_edge(ax, single, 0.96, "x", "not finite")
