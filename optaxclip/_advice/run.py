"""What do the rules look at? One run of a history, and the measures of its noise."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from optaxclip._looking.columns import History
from optaxclip._trees import paths as _paths

MOST = 1000  # rows, for a level


class Run(NamedTuple):
    """The rows of one run, as the rules need them.

    Attributes:
      step: of each row.
      width: how many steps a row stands for.
      loss: NaN where there is none.
      norm: NaN where there is none.
      peak: largest norm in a row's steps.
      bad: whether the loss or a norm is NaN or infinite in a row.
      skipped: whether a guard skipped all that is bad in a row.
      scopes: norms by the names of their scopes.
      columns: all of the history's.
      weights: params by their paths, or their shapes; empty where there are none.
    """

    step: np.ndarray
    width: np.ndarray
    loss: np.ndarray
    norm: np.ndarray
    peak: np.ndarray
    bad: np.ndarray
    skipped: np.ndarray
    scopes: dict[str, np.ndarray]
    columns: History
    weights: dict[str, Any]

    @property
    def steps(self) -> int:
        """How many steps the rows stand for."""
        return int(self.width.sum())

    @property
    def begins_late(self) -> bool:
        """Whether the beginning of the run is not in the log."""
        usual = np.median(self.width)
        return bool(self.step[0] > 20 * max(usual, 1)) if len(self.step) else True


class Series(NamedTuple):
    """The finite numbers of a column, and the steps that they are of."""

    step: np.ndarray
    value: np.ndarray


def runs(history: History, params: Any = None) -> list[Run]:
    """Returns the runs of a history, one after another; the params are the last one's.

    There is one run at least, if only an empty one.
    """
    number = history.get("run", np.zeros(len(history["step"]), int))
    every = [_run(history, np.flatnonzero(number == i)) for i in np.unique(number)]
    every = every or [_run(history, np.zeros(0, int))]
    pairs = zip(_paths.paths(params), jax.tree.leaves(params), strict=True)
    return [*every[:-1], every[-1]._replace(weights=dict(pairs))]


def evened(run: Run) -> Run:
    """Returns the run with rows that stand for about as many steps each.

    A record has the last steps one by one. Of each group of these that is as wide as
    the stretches before them, the middle one stays, with the peak of all.
    """
    widest = run.width.max(initial=1)
    if "peak/norm" not in run.columns and "peak/loss" not in run.columns:
        return run
    group = (np.cumsum(run.width) - 1) // widest
    firsts = np.flatnonzero(np.diff(group, prepend=-1))
    ends = np.append(firsts[1:], len(group))
    picked = _run(run.columns, (firsts + ends - 1) // 2, run.weights)
    highest = np.fmax.reduceat(run.peak, firsts) if len(firsts) else run.peak
    width = np.add.reduceat(run.width, firsts) if len(firsts) else run.width
    return picked._replace(peak=highest, width=width)


def series(run: Run, column: np.ndarray) -> Series:
    """Returns the finite numbers of a column, in rows that are finite."""
    found = np.flatnonzero(np.isfinite(column) & ~run.bad)
    return Series(run.step[found], column[found])


def coarse(found: Series) -> Series:
    """Returns at most a thousand numbers: medians of as many rows each."""
    size = -(-len(found.value) // MOST)
    if size <= 1:
        return found
    whole = len(found.value) // size * size
    value = np.median(found.value[:whole].reshape(-1, size), axis=1)
    return Series(found.step[:whole].reshape(-1, size)[:, size // 2], value)


def noise(values: np.ndarray) -> float:
    """Returns the standard deviation of what changes from one value to the next.

    From the median of the changes, which neither a trend nor a few outliers move.
    """
    if len(values) < 2:
        return np.inf
    return float(1.4826 * np.median(np.abs(np.diff(values))) / np.sqrt(2))


def wander(values: np.ndarray) -> float:
    """Returns the spread of values around their level, runs of them too.

    Noise in which neighbours are alike changes little from one to the next.
    """
    return max(noise(values), spread(values - rolling_median(values, len(values) // 3)))


def spread(values: np.ndarray) -> float:
    """Returns the standard deviation, from the median of the deviations."""
    if not len(values):
        return np.inf
    return float(1.4826 * np.median(np.abs(values - np.median(values))))


def rolling_median(values: np.ndarray, window: int) -> np.ndarray:
    """Returns the median of the values around each, as many at the ends as there are.

    Args:
      values: at least one.
      window: of how many; one more if that is even.
    """
    window = max(1, min(window | 1, len(values) - (len(values) + 1) % 2))
    half = window // 2
    padded = np.concatenate([values[:half], values, values[len(values) - half :]])
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, window), axis=1)


def short(value: float) -> str:
    """Writes a number for people: three digits at most."""
    text = f"{value:.3g}"
    return text.replace("e+0", "e").replace("e+", "e").replace("e-0", "e-")


def few(names: Iterable[object], most: int = 3) -> str:
    """Lists the first names for people, and how many more there are."""
    every = [str(name) for name in names]
    rest = f" and {len(every) - most} more" if len(every) > most else ""
    return ", ".join(every[:most]) + rest


def _run(
    history: History, rows: np.ndarray, weights: dict[str, Any] | None = None
) -> Run:
    own = {key: column[rows] for key, column in history.items()}
    nothing = np.full(len(rows), np.nan)
    norm = own.get("norm", nothing)
    bad = own["nonfinite"] > 0
    return Run(
        step=own["step"],
        width=own["width"],
        loss=own.get("loss", nothing),
        norm=norm,
        peak=own.get("peak/norm", norm),
        bad=bad,
        skipped=bad & (own.get("skipped", np.zeros(len(rows))) >= own["nonfinite"]),
        scopes={k[5:]: x for k, x in own.items() if k.startswith("norm/")},
        columns=own,
        weights=weights or {},
    )


def zero_since(column: np.ndarray) -> int:
    """Returns the row from which on all are exactly zero; their number, if none."""
    alive = np.flatnonzero(column != 0)
    return int(alive[-1]) + 1 if len(alive) else 0
