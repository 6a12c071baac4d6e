"""Where a run ends: from which step on nothing is finite, and how it came to that."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from optaxclip._plots import canvas as _canvas, columns as _columns
from optaxclip._plots.canvas import BADGE, GREY, INK, SMALL
from optaxclip._plots.columns import Columns

ROWS = 64  # before the crash, drawn once more
GROWN = 10.0  # times: less is no growth


def hatch(axes: Sequence[Any], columns: Columns) -> None:
    """Hatches the axes from the first step on from which nothing is finite."""
    row = _columns.crash(columns)
    assert row is not None
    start, end = columns["step"][row], _columns.end(columns)
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
    place["ha"] = "left" if start <= (left + right) / 2 else "right"
    axes[0].text(start, 0.97, text, bbox=BADGE, **place, **SMALL)


def growth(steps: np.ndarray, norms: np.ndarray) -> tuple[int, float] | None:
    """Returns where the norm began to grow to its end, and by what factor per step.

    A line is fitted to the log of the norms after the last that was not above the
    median. None where there are fewer than three such norms, or they grew less than
    tenfold.
    """
    quiet = np.flatnonzero(norms <= np.median(norms))
    first = int(quiet[-1]) if quiet.size else 0
    steps, norms = steps[first:], norms[first:]
    if len(norms) < 3 or norms[-1] < GROWN * norms[0]:
        return None
    slope = np.polyfit(steps - steps[0], np.log(norms), 1)[0]
    return first, float(np.exp(slope))


def inset(ax: Any, columns: Columns) -> None:
    """Draws the last norms before the crash, where they grew."""
    row, norms = _columns.crash(columns), columns.get("norm")
    if norms is None:
        return
    before = np.flatnonzero(np.isfinite(norms[:row]) & (norms[:row] > 0))[-ROWS:]
    steps, norms = columns["step"][before], norms[before]
    grown = growth(steps, norms) if len(norms) >= 3 else None
    if grown is None:
        return
    first, factor = grown
    left, right = ax.get_xlim()
    is_early = columns["step"][row] < left + 0.55 * (right - left)
    small = ax.inset_axes((0.57 if is_early else 0.12, 0.38, 0.4, 0.42))
    small.plot(steps, norms, color=INK, linewidth=1.2, marker=".")
    fitted = norms[first] * factor ** (steps[first:] - steps[first])
    small.plot(steps[first:], fitted, color=GREY, linestyle=_canvas.DASHES)
    _canvas.log_axis(small, norms.min() / 1.5, norms.max() * 1.5)
    small.locator_params(axis="x", nbins=3, integer=True)
    small.tick_params(labelsize="small")
    text = f"last {len(steps)} rows: x {_canvas.number(factor)} a step"
    small.set_title(text, fontsize="small", backgroundcolor="white", pad=4)
