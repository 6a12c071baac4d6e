"""Where is a run not finite, and did somebody skip it?"""

from typing import NamedTuple

import numpy as np

from optaxclip._advice.courses import trend
from optaxclip._advice.run import Run

SINGLE = 2  # rows that are not finite, and skipped by somebody


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
    """Whether a crash is one or two steps that somebody skipped: the run goes on."""
    is_short = crash.end - crash.first <= SINGLE
    if run.skipped[crash.first : crash.end].all():
        return is_short or not crash.is_last
    return is_short and len(run.bad) - crash.end >= 3


def is_average(run: Run, crash: Crash) -> bool:
    """Whether the norms alone are not finite, for many rows, while the loss falls.

    So does the average of an epoch with one infinite step in it.
    """
    losses = run.loss[crash.first : crash.end]
    if len(losses) <= SINGLE or not np.isfinite(losses).all() or not losses.any():
        return False
    _, change, error = trend(losses)
    return change < -3 * error


def who(run: Run, crash: Crash) -> str:
    """Names the scopes that are not finite in the first such row, if it is one step."""
    bad = [k for k, x in run.scopes.items() if not np.isfinite(x[crash.first])]
    if not bad:
        return ""
    if len(bad) == len(run.scopes):
        return ", every leaf at once" if len(bad) > 1 else ""
    rest = f" and {len(bad) - 3} more of {len(run.scopes)}" if len(bad) > 3 else ""
    return f", in {', '.join(bad[:3])}{rest}, the others finite"
