"""Which leaf had which norm when, and which stay at exactly 0?"""

from typing import Any, NamedTuple

import numpy as np

from optaxclip._advice.layers import QUARTER
from optaxclip._plots import canvas as _canvas, columns as _columns
from optaxclip._plots.columns import Columns

ROWS = 300  # of the history, drawn at most


class Grid(NamedTuple):
    """The norms of leaves, drawn.

    Attributes:
      paths: of the leaves, in forward order.
      steps: drawn, `[columns]`.
      edges: steps between which each column lies, `[columns + 1]`.
      norms: of the leaves, NaN where there is none, `[leaves, columns]`.
      bad: whether it is not finite, `[leaves, columns]`.
      medians: of the norms above 0 of each leaf, NaN if there is none.
      zero_since: step since which each leaf is exactly 0 to the end, NaN if it isn't.
      bad_since: step since which always one is not finite, NaN if the last are.
    """

    paths: list[str]
    steps: np.ndarray
    edges: np.ndarray
    norms: np.ndarray
    bad: np.ndarray
    medians: np.ndarray
    zero_since: np.ndarray
    bad_since: float


def of(history: Any) -> Grid:
    """Returns the grid of a history; of several runs in one file that of the last."""
    columns = _columns.runs(history)[-1]
    if not _columns.leaves(columns):
        names = ", ".join(x for x in columns if x not in ("from", "to"))
        raise ValueError(
            f"Expected norms of leaves, columns `norm/<path>`, got {names}."
            " `optaxclip.record` keeps them."
        )
    columns = told(columns)
    paths, norms, bad = measured(columns)
    sound = np.flatnonzero(~bad.any(axis=0))
    lost = columns["step"][sound[-1] + 1 if sound.size else 0 :]
    drawn = _columns.thinned(_columns.shown(columns), ROWS)
    _, shown, is_bad = measured(drawn)
    return Grid(
        paths=paths,
        steps=drawn["step"],
        edges=np.append(drawn["from"], drawn["to"][-1]),
        norms=shown,
        bad=is_bad,
        medians=np.array([_above_zero(x, columns) for x in norms]),
        zero_since=np.array([zero_since(columns["step"], x) for x in norms]),
        bad_since=float(lost[0]) if lost.size else np.nan,
    )


def ratios(grid: Grid) -> np.ndarray:
    """Returns the log10 of each norm over the median of its leaf, NaN where it is 0."""
    norms = np.where(grid.norms > 0, grid.norms, np.nan)
    return np.log10(norms) - np.log10(grid.medians)[:, None]


def message(grid: Grid) -> str:
    """Returns what the picture says, in one line."""
    dead = np.isfinite(grid.zero_since)
    if dead.any():
        since, of = grid.zero_since[dead].max(), "leaf" if len(dead) == 1 else "leaves"
        return f"{dead.sum()} of {len(dead)} {of}: exactly 0 from step {since:.0f} on"
    if np.isfinite(grid.bad_since):
        return f"Not finite from step {grid.bad_since:.0f} on"
    found = ratios(grid)
    if not np.isfinite(found).any():
        return "No norm above 0"
    row, column = np.unravel_index(np.nanargmax(found), found.shape)
    most = _canvas.number(float(10 ** found[row, column]))
    step = grid.steps[column]
    return f"At most {most} times the median of a leaf, at step {step:.0f}"


def told(columns: Columns) -> Columns:
    """Returns the rows that tell anything of leaves."""
    norms = np.stack([*_columns.leaves(columns).values()])
    told = np.isfinite(norms).any(axis=0) | (columns["nonfinite"] > 0)
    told = told if told.any() else ~told
    return {name: x[told] for name, x in columns.items()}


def measured(columns: Columns) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Returns paths, norms and what is not finite.

    Where the loss or the whole norm is not finite, a leaf of norm 0 is not either: its
    NaN did not come through a relu.
    """
    found = _columns.leaves(columns)
    norms = np.stack([*found.values()])
    total = [columns[name] for name in ("loss", "norm") if name in columns]
    lost = ~np.isfinite(total).all(axis=0) & (columns["nonfinite"] > 0)
    bad = (~np.isfinite(norms) & (columns["nonfinite"] > 0)) | ((norms == 0) & lost)
    return [*found], np.where(bad | ~np.isfinite(norms), np.nan, norms), bad


def zero_since(steps: np.ndarray, norms: np.ndarray) -> float:
    """Returns the step since which a norm is exactly 0 to the end, NaN if it isn't.

    It is said of those that are 0 for a quarter of the rows.
    """
    steps, norms = steps[~np.isnan(norms)], norms[~np.isnan(norms)]
    other = np.flatnonzero(norms != 0)
    first = int(other[-1]) + 1 if other.size else 0
    if len(norms) - first < max(3, QUARTER * len(norms)):
        return np.nan
    return float(steps[first])


def _above_zero(norms: np.ndarray, columns: Columns) -> float:
    """Returns the median of the norms above 0."""
    return _columns.median(np.where(norms > 0, norms, np.nan), columns)
