"""Did the steps explode?

An explosion announces itself in the norms, and shorter steps prevent it.
"""

from typing import NamedTuple

import numpy as np

from optaxclip._advice.crashes import Crash, crashes, is_overflow, who
from optaxclip._advice.run import Run, short

LEAD = 10  # rows before the end in which an explosion is looked for
RECENT = 100  # rows before these, for what is quiet
GROWTH = 10.0  # times the quiet median
CALM = 3.0  # times the quiet median

ASK = "`suggest_max_norm(optimizer, params)` names a threshold to begin with"


class Growth(NamedTuple):
    """How a column grew before a crash.

    Attributes:
      name: of the column.
      first: number of the row where the growth began.
      last: number of the last finite row.
      low: what the column was in the first of these rows.
      high: and in the last.
      steps: between them.
      rate: factor a step, by a fitted line.
    """

    name: str
    first: int
    last: int
    low: float
    high: float
    steps: int
    rate: float


def exploded(run: Run) -> str | None:
    """Says that the norm, or the loss, grew until it was not finite."""
    for crash in crashes(run):
        found = None if is_overflow(run, crash) else growth(run, crash)
        if found:
            where = _who_grew(run, found) or who(run, crash)
            pace = f", about x {short(found.rate)} a step" if found.rate > 1 else ""
            return (
                f"EXPLODED at step {run.step[crash.first]}{where}. The {found.name}"
                f" grew from {short(found.low)} to {short(found.high)} in the"
                f" {found.steps} steps before{pace}: the steps were too large. Divide"
                " the learning rate by ten, or clip: with SGD not at the norms seen"
                f" here, which the explosion made. {ASK}."
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
        last = column[near[-1]]
        if len(before) >= 5:
            quiet = min(np.median(column[x]) for x in (before, before[-RECENT:]))
            is_high = last >= GROWTH * quiet
        else:  # nothing quiet is known
            quiet = column[near].min()
            rises = len(near) > 3 and bool((np.diff(column[near[-4:]]) > 0).all())
            is_high = last >= (GROWTH if rises else GROWTH**2) * quiet
        if is_high and last >= column[near].max() / 3:
            calm = rows[:-1][column[rows[:-1]] <= CALM * quiet]
            start = calm[-1] if len(calm) else near[0]
            return _fitted(run, name, column, rows[rows >= start])
    return None


def _fitted(run: Run, name: str, column: np.ndarray, rows: np.ndarray) -> Growth:
    steps = (run.step[rows] - run.step[rows[0]]).astype(float)
    logs = np.log(column[rows])
    slope = np.polyfit(steps, logs, 1)[0] if steps[-1] > 0 else 0.0
    return Growth(
        name=name,
        first=int(rows[0]),
        last=int(rows[-1]),
        low=float(column[rows[0]]),
        high=float(column[rows[-1]]),
        steps=int(steps[-1]),
        rate=float(np.exp(np.clip(slope, 0, 700))),
    )


def _who_grew(run: Run, growth: Growth) -> str:
    """Names the scopes that grew, if it was all of them, or a few and no other."""
    start = slice(max(growth.first - 2, 0), growth.first + 1)
    grown = {
        name: column[growth.last] / low
        for name, column in run.scopes.items()
        if (low := np.median(column[start])) > 0 and np.isfinite(low)
    }
    most = [name for name, times in grown.items() if times >= GROWTH]
    if len(grown) > 1 and len(most) == len(grown):
        return " (every leaf)"
    others = [times for name, times in grown.items() if name not in most]
    if 0 < len(most) <= 3 and others and max(others) < CALM:
        return f" ({', '.join(most)} alone)"
    return ""
