"""Where is a run not finite, and did somebody skip that?"""

from typing import NamedTuple

import numpy as np

from optaxclip._advice.run import Run, few, zero_since
from optaxclip._advice.traction import trend

SINGLE = 2  # rows that are not finite, and skipped by somebody
AFTER = 3  # rows that are finite, before one believes that the run went on


class Crash(NamedTuple):
    """Rows that are not finite, without a finite one between.

    Attributes:
      first: number of the first of these rows.
      end: number of the row after the last.
      is_last: whether no finite row follows.
    """

    first: int
    end: int
    is_last: bool


def crashes(run: Run) -> list[Crash]:
    """Returns the stretches of rows that are not finite."""
    edges = np.diff(run.bad.astype(int), prepend=0, append=0)
    pairs = zip(np.flatnonzero(edges > 0), np.flatnonzero(edges < 0), strict=True)
    return [Crash(int(a), int(b), b == len(run.bad)) for a, b in pairs]


def is_overflow(run: Run, crash: Crash) -> bool:
    """Whether somebody skipped what is not finite, so that the run went on.

    Weights that are NaN stay so. Hence finite rows that follow tell of a skip; a few of
    them, for a batch may be NaN by itself before the weights are.
    """
    rows = slice(crash.first, crash.end)
    is_short = crash.end - crash.first <= SINGLE
    if crash.is_last:
        return is_short and bool(run.skipped[rows].all())
    if run.skipped[rows].all() or np.isfinite(run.loss[rows]).all():
        return True
    return is_short and not run.bad[crash.end : crash.end + AFTER].any()


def is_average(run: Run, crash: Crash) -> bool:
    """Whether the norms alone are not finite, for many rows, while the loss falls.

    So does the average of an epoch with one infinite step in it.
    """
    rows = slice(crash.first, crash.end)
    losses = run.loss[rows]
    if len(losses) <= SINGLE or run.skipped[rows].all():
        return False
    if not np.isfinite(losses).all() or not losses.any():
        return False
    _, change, error = trend(losses)
    return change < -3 * error


def printed_as_zero(run: Run) -> int | None:
    """Returns the row from which a loss is exactly 0 at once, and no norm tells why."""
    rows = np.flatnonzero(np.isfinite(run.loss) & ~run.bad)
    first = zero_since(run.loss[rows])
    alive = np.abs(run.loss[rows[:first]])
    alive = alive[alive > 0]
    if len(alive) < 3 or first == len(rows) or alive[-1] <= 0.1 * np.median(alive):
        return None
    return None if np.isfinite(run.norm[rows[first:]]).any() else int(rows[first])


def who(run: Run, crash: Crash) -> str:
    """Names the scopes that are not finite in the first such row."""
    bad = [k for k, x in run.scopes.items() if not np.isfinite(x[crash.first])]
    if len(bad) == len(run.scopes):
        return ", every leaf at once" if len(bad) > 1 else ""
    share = f"({len(bad)} of {len(run.scopes)} leaves)"
    return f", in {few(bad)} {share}, the others finite" if bad else ""
