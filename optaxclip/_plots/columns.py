"""What is in a history, for those who draw it?"""

import re
from typing import Any

import numpy as np

from optaxclip._looking.history import history

Columns = dict[str, np.ndarray]

COUNTS = ("width", "clipped", "skipped", "nonfinite")  # add up where rows are joined
GLOBAL = re.compile(r"clip(_\d+)?(/.+)?/max_norm")  # of a clip with one threshold


def read(seen: Any) -> Columns:
    """Returns the columns of what `history` takes, as floats."""
    return {name: np.asarray(x, float) for name, x in history(seen).items()}


def runs(columns: Columns) -> list[Columns]:
    """Returns each run by itself, where a file holds several; the last is the last."""
    if "run" not in columns:
        return [columns]
    numbers = columns["run"]
    return [
        {name: x[numbers == number] for name, x in columns.items()}
        for number in np.unique(numbers)
    ]


def leaves(columns: Columns) -> Columns:
    """Returns the norms of the scopes, by their paths, in forward order."""
    found = [name for name in columns if name.startswith("norm/")]
    return {name.removeprefix("norm/"): columns[name] for name in found}


def max_norm(columns: Columns) -> np.ndarray | None:
    """Returns the threshold of the first clip that has one for all leaves."""
    for name, values in columns.items():
        if GLOBAL.fullmatch(name) and name.removesuffix("max_norm") + "norm" in columns:
            return values if np.any(np.isfinite(values)) else None
    return None


def is_there(values: np.ndarray | None) -> bool:
    """Tells whether a column has anything to draw."""
    return values is not None and bool(np.any(np.isfinite(values)))


def clipped(columns: Columns) -> np.ndarray | None:
    """Returns how many steps of each row were clipped, None where nothing tells."""
    if "clipped" in columns:
        return columns["clipped"]
    norms, max_norms = columns.get("norm"), max_norm(columns)
    if norms is None or max_norms is None:
        return None
    return np.where(norms > max_norms, columns["width"], 0)


def clipped_share(columns: Columns) -> float | None:
    """Returns the share of the steps that were clipped, None where nothing tells."""
    counts = clipped(columns)
    return None if counts is None else float(counts.sum() / columns["width"].sum())


def crash(columns: Columns) -> int | None:
    """Returns the row from which on nothing is finite any more, None if there is none.

    Rows that tell nothing are left out.
    """
    told = np.array([columns[x] for x in ("loss", "norm") if x in columns])
    bad = (columns["nonfinite"] > 0) & ~np.isfinite(told).all(axis=0)
    sound = np.flatnonzero(np.isfinite(told).any(axis=0) & ~bad)
    lost = np.flatnonzero(bad)
    lost = lost[lost > sound[-1]] if sound.size else lost
    return int(lost[0]) if lost.size else None


def end(columns: Columns) -> float:
    """Returns the step at which the record ends."""
    return float(columns["step"][-1] + columns["width"][-1] - 1)


def shown(columns: Columns) -> Columns:
    """Returns the rows to draw: after a crash no more steps than there were before."""
    row, steps = crash(columns), columns["step"]
    if not row:
        return columns
    last = 2 * steps[row] - steps[0]
    return {name: x[steps <= last] for name, x in columns.items()}


def thinned(columns: Columns, rows: int) -> Columns:
    """Returns at most so many rows, each of which stands for a stretch.

    Of each stretch the finite entry nearest to its middle is drawn; counts are summed,
    and `peak/norm` is the largest.
    """
    columns = dict(columns)
    if "norm" in columns:
        norms = columns["norm"]
        finite = np.where(np.isfinite(norms), norms, np.nan)
        columns["peak/norm"] = np.fmax(columns.get("peak/norm", finite), finite)
    group = -(-len(columns["step"]) // rows)
    return {name: _grouped(name, x, group) for name, x in columns.items()}


def _grouped(name: str, values: np.ndarray, group: int) -> np.ndarray:
    lacking = -len(values) % group
    empty = 0.0 if name in COUNTS else np.nan
    table = np.pad(values, (0, lacking), constant_values=empty).reshape(-1, group)
    if name == "step":
        return table[:, 0]
    if name in COUNTS:
        return table.sum(axis=1)
    if name.startswith("peak/"):
        return np.fmax.reduce(table, axis=1)
    table = table[:, np.argsort(np.abs(np.arange(group) - (group - 1) // 2))]
    chosen = np.argmax(np.isfinite(table), axis=1)
    return table[np.arange(len(table)), chosen]
