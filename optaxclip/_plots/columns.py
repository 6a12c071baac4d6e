"""What is in a history, for those who draw it?"""

import re
from typing import Any

import numpy as np

from optaxclip._looking.history import history

Columns = dict[str, np.ndarray]

COUNTS = ("width", "clipped", "skipped", "nonfinite")  # add up where rows are joined
GLOBAL = re.compile(r"clip(_\d+)?(/.+)?/max_norm")  # of a clip with one threshold


def runs(seen: Any) -> list[Columns]:
    """Returns the columns of each run in what `history` takes, as floats.

    With those of `history` there are `from` and `to`, the steps between which a row
    lies, and `peak/norm`.
    """
    columns = {name: np.asarray(x, float) for name, x in history(seen).items()}
    numbers = columns.pop("run", np.zeros(len(columns["step"])))
    return [
        _spanned({name: x[numbers == number] for name, x in columns.items()})
        for number in np.unique(numbers)
    ]


def _spanned(columns: Columns) -> Columns:
    """Returns a run with its spans: rows follow each other, each as wide as it is.

    The last ends at its step, but where steps that were not finite are counted in it.
    Where that leaves a step outside of its row, rows meet halfway.
    """
    step, width = columns["step"], columns["width"]
    end = step[-1] + (width[-1] if columns["nonfinite"][-1] > 1 else 1)
    edges = end - np.append(np.cumsum(width[::-1])[::-1], 0)
    if np.any(step < edges[:-1]) or np.any(step >= edges[1:]):
        middles = np.ceil((step[:-1] + step[1:]) / 2)
        edges = np.concatenate([step[:1], middles, [end]])
    found = columns | {"from": edges[:-1], "to": edges[1:]}
    norms, max_norms = columns.get("norm"), max_norm(columns)
    if norms is not None:
        finite = np.where(np.isfinite(norms), norms, np.nan)
        found["peak/norm"] = np.fmax(columns.get("peak/norm", finite), finite)
    if norms is not None and max_norms is not None and "clipped" not in columns:
        found["clipped"] = np.where(norms > max_norms, width, 0)
    return found


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


def clipped_share(columns: Columns) -> float | None:
    """Returns the share of the steps that were clipped, None where nothing tells."""
    if "clipped" not in columns:
        return None
    return float(columns["clipped"].sum() / columns["width"].sum())


def median(values: np.ndarray, columns: Columns) -> float:
    """Returns the median of the finite values, each as often as it has finite steps."""
    finite = columns["width"] - columns["nonfinite"]
    told = np.isfinite(values) & (finite > 0)
    if not told.any():
        return np.nan
    order = np.argsort(values[told], kind="stable")
    values, reached = values[told][order], np.cumsum(finite[told][order])
    low = np.searchsorted(reached, reached[-1] / 2)
    high = np.searchsorted(reached, reached[-1] / 2, side="right")
    return float((values[low] + values[high]) / 2)


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


def shown(columns: Columns) -> Columns:
    """Returns the rows to draw: after a crash no more steps than there were before."""
    row = crash(columns)
    if not row:
        return columns
    end = 2 * columns["from"][row] - columns["from"][0]
    kept = {name: x[columns["from"] < end] for name, x in columns.items()}
    return kept | {"to": np.minimum(kept["to"], end)}


def thinned(columns: Columns, rows: int) -> Columns:
    """Returns at most so many rows, each of which stands for a stretch.

    Of each stretch the finite entry nearest to its middle is drawn; counts are summed,
    and of the peaks the largest is kept.
    """
    group = -(-len(columns["step"]) // rows)
    return {name: _grouped(name, x, group) for name, x in columns.items()}


def _grouped(name: str, values: np.ndarray, group: int) -> np.ndarray:
    lacking = -len(values) % group
    empty = 0.0 if name in COUNTS else np.nan
    table = np.pad(values, (0, lacking), constant_values=empty).reshape(-1, group)
    if name == "from":
        return table[:, 0]
    if name in COUNTS:
        return table.sum(axis=1)
    if name == "to" or name.startswith("peak/"):
        return np.fmax.reduce(table, axis=1)
    table = table[:, np.argsort(np.abs(np.arange(group) - (group - 1) // 2))]
    chosen = np.argmax(np.isfinite(table), axis=1)
    return table[np.arange(len(table)), chosen]
