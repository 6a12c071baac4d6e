"""Did the steps explode?

An explosion announces itself in the norms, and shorter steps prevent it.
"""

from typing import NamedTuple

import numpy as np

from optaxclip._advice.crashes import Crash, crashes, is_overflow, who
from optaxclip._advice.run import Run, short

LEAD = 10  # rows before the end in which an explosion is looked for
GROWTH = 10.0  # times the quiet median

ASK = "`suggest_max_norm(optimizer, params)` names a threshold to begin with"


class Growth(NamedTuple):
    """How a column grew before a crash.

    Attributes:
      name: of the column.
      low: its number where the growth began.
      high: the last finite number.
      steps: between them.
      rate: factor a step, by a fitted line.
    """

    name: str
    low: float
    high: float
    steps: int
    rate: float


def exploded(run: Run) -> str | None:
    """Says that the norm, or the loss, grew until it was not finite."""
    for crash in crashes(run):
        found = growth(run, crash)
        if found and not is_overflow(run, crash):
            where = who(run, crash) or _who_grew(run, crash, found)
            step, low, high = run.step[crash.first], short(found.low), short(found.high)
            return (
                f"EXPLODED at step {step}{where}. The {found.name} grew from {low} to"
                f" {high} in the {found.steps} steps before{_a_step(found)}: the steps"
                " were too large. Divide the learning rate by ten, or clip: with SGD"
                f" not at the norms seen here, which the explosion made. {ASK}."
            )
    return None


def growth(run: Run, crash: Crash) -> Growth | None:
    """Returns what grew tenfold just before a crash, the norm or else the loss."""
    for name, column in ("gradient norm", run.norm), ("loss", np.abs(run.loss)):
        is_seen = np.isfinite(column) & (column > 0) & ~run.bad
        rows = np.flatnonzero(is_seen[: crash.first])
        near, before = rows[-LEAD:], rows[1:-LEAD]  # a first row is often far above
        if len(near) < 3:
            continue
        is_known = len(before) >= 5
        quiet = np.median(column[before]) if is_known else column[near].min()
        is_high = column[near[-1]] >= quiet * (GROWTH if is_known else GROWTH**2)
        if is_high and column[near[-1]] >= column[near].max() / 3:
            calm = near[:-1][column[near[:-1]] <= 3 * quiet]
            start = calm[-1] if len(calm) else near[0]
            return _fitted(run, name, column, near[near >= start])
    return None


def _fitted(run: Run, name: str, column: np.ndarray, rows: np.ndarray) -> Growth:
    steps = run.step[rows]
    rate = np.exp(np.polyfit(steps - steps[0], np.log(column[rows]), 1)[0])
    first, last = rows[0], rows[-1]
    return Growth(
        name=name,
        low=float(column[first]),
        high=float(column[last]),
        steps=int(steps[-1] - steps[0]),
        rate=float(rate),
    )


def _who_grew(run: Run, crash: Crash, growth: Growth) -> str:
    """Names the scopes that grew, if it was all of them, or a few and no other."""
    end = int(np.flatnonzero(~run.bad[: crash.first])[-1])
    start = int(np.searchsorted(run.step, run.step[end] - growth.steps))
    grown = {
        name: column[end] / np.median(column[max(start - 2, 0) : start + 1])
        for name, column in run.scopes.items()
        if np.median(column[max(start - 2, 0) : start + 1]) > 0
    }
    most = [name for name, times in grown.items() if times >= GROWTH]
    if len(grown) > 1 and len(most) == len(grown):
        return " (every leaf)"
    others = [times for name, times in grown.items() if name not in most]
    if 0 < len(most) <= 3 and others and max(others) < 3:
        return f" ({', '.join(most)} alone)"
    return ""


def _a_step(growth: Growth) -> str:
    return f", about x {short(growth.rate)} a step" if growth.rate > 1 else ""
