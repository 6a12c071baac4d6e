"""What is to be said of each leaf, in a row of a table?"""

from typing import NamedTuple

import numpy as np

from optaxclip._plots import columns as _columns, grid as _grid
from optaxclip._plots.columns import Columns

RECENT = 64  # rows at the end
GROWN = 10.0  # times the median of the rows before: growing


class Leaf(NamedTuple):
    """The norms of a leaf, in the units of the updates; NaN where there is none.

    Attributes:
      path: of the leaf.
      now: the last.
      median: of all that are finite.
      recent: median of the last 64.
      largest: of all that are finite.
      share: of the squares of all leaves, median of the last 64.
      mark: what is wrong, in a word and the step since when; empty if nothing.
    """

    path: str
    now: float
    median: float
    recent: float
    largest: float
    share: float
    mark: str


def table(columns: Columns) -> list[Leaf]:
    """Returns a row for each leaf, in forward order."""
    if not _columns.leaves(columns):
        return []
    columns = _grid.told(columns)
    paths, norms, bad = _grid.measured(columns)
    shares = _shares(norms)
    rows = []
    for path, values, is_bad, share in zip(paths, norms, bad, shares, strict=True):
        finite = values[np.isfinite(values)]
        now = _columns.leaves(columns)[path][-1]
        if not finite.size:
            finite = np.full(1, np.nan)
        peaks = columns.get(f"peak/norm/{path}", finite)
        largest = np.max(peaks, where=np.isfinite(peaks), initial=finite.max())
        recent = float(np.median(finite[-RECENT:]))
        mark = _mark(columns["step"], values, is_bad)
        middle = _columns.median(values, columns)
        rows.append(Leaf(path, now, middle, recent, float(largest), share, mark))
    return rows


def chosen(rows: list[Leaf], most: int = 8) -> list[Leaf]:
    """Returns the leaves with the largest shares, and all that are marked."""
    largest = sorted(rows, key=lambda row: -np.nan_to_num(row.share))[:most]
    kept = {row.path for row in largest}
    return [row for row in rows if row.mark or row.path in kept]


def _shares(norms: np.ndarray) -> list[float]:
    """Returns the share of each leaf in the squared norm, of the last rows."""
    norms = norms[:, np.isfinite(norms).all(axis=0)][:, -RECENT:]
    if not norms.size:
        return [np.nan] * len(norms)
    squares = (norms / np.maximum(norms.max(axis=0), np.finfo(float).tiny)) ** 2
    return np.median(squares / np.maximum(squares.sum(axis=0), 1e-9), axis=1).tolist()


def _mark(steps: np.ndarray, norms: np.ndarray, bad: np.ndarray) -> str:
    sound = np.flatnonzero(~bad)
    if bad[-1]:
        return f"not finite since {steps[sound[-1] + 1 if sound.size else 0]:.0f}"
    since = _grid.zero_since(steps, norms)
    if np.isfinite(since):
        return f"dead since {since:.0f}" if since > steps[0] else "always 0"
    norms = norms[np.isfinite(norms)]
    before, recent = norms[:-RECENT], norms[-RECENT:]
    if len(before) < RECENT or np.median(recent) < GROWN * np.median(before):
        return ""
    return "growing"
