"""Where a run ends: from which step on nothing is finite, and how it came to that."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from optaxclip._advice import run as _run
from optaxclip._advice.crashes import Crash
from optaxclip._advice.explosions import growth
from optaxclip._plots import canvas as _canvas, columns as _columns
from optaxclip._plots.canvas import BADGE, DASHES, GREY, INK, SMALL
from optaxclip._plots.columns import Columns

ROWS = 64  # before the crash, drawn once more


def hatch(axes: Sequence[Any], columns: Columns) -> None:
    """Hatches the axes from the first step on from which nothing is finite."""
    row = _columns.crash(columns)
    assert row is not None
    start, end = columns["step"][row], columns["to"][-1] - 1
    left, right = axes[0].get_xlim()
    right = max(right, start + 0.04 * (right - left))
    for ax in axes:
        ax.set_xlim(left, right)
        style: Any = {"facecolor": "none", "edgecolor": GREY, "linewidth": 0}
        ax.axvspan(start, right, hatch="////", **style)
        ax.axvline(start, color=INK, linewidth=1)
    text = f" not finite from step {start:.0f} on"
    text += f" (to step {end:.0f}) " if end > right else " "
    place: Any = {"transform": axes[0].get_xaxis_transform(), "va": "top"}
    place["ha"] = "left" if start < left + 0.6 * (right - left) else "right"
    axes[0].text(start, 0.97, text, bbox=BADGE, **place, **SMALL)


def inset(axes: Sequence[Any], columns: Columns) -> None:
    """Draws the rows before the crash, where the norm grew, or else the loss."""
    row = _columns.crash(columns)
    assert row is not None
    run = _run.runs(columns)[-1]
    found = growth(run, Crash(row, len(run.step), is_last=True))
    if found is None:
        return
    is_norm = found.name == "gradient norm"
    values = run.norm if is_norm else np.abs(run.loss)
    before = np.flatnonzero(np.isfinite(values[:row]) & (values[:row] > 0))[-ROWS:]
    steps, values = run.step[before], values[before]
    ax = axes[1] if is_norm else axes[0]
    left, right = ax.get_xlim()
    is_early = columns["step"][row] < left + 0.6 * (right - left)
    small = ax.inset_axes((0.57 if is_early else 0.12, 0.38, 0.4, 0.42))
    small.plot(steps, values, color=INK, linewidth=1.2, marker=".")
    ends = [found.high / found.rate**found.steps, found.high]
    small.plot([steps[-1] - found.steps, steps[-1]], ends, color=GREY, linestyle=DASHES)
    _canvas.log_axis(small, values.min() / 1.5, values.max() * 1.5)
    small.locator_params(axis="x", nbins=3, integer=True)
    small.tick_params(labelsize="small")
    text = f"last {len(steps)} rows: x {_canvas.number(found.rate)} a step"
    small.set_title(text, fontsize="small", backgroundcolor="white", pad=4)
