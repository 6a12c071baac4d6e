"""How do the rows of any log become a history?

Trainers write what they like: under names of their own, with evaluations between, from
several runs into one file, and once more after a resume.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from optaxclip._looking import (
    cells as _cells,
    counts as _counts,
    meanings as _meanings,
    runs as _runs,
)
from optaxclip._looking.cells import Row
from optaxclip._looking.counts import History

_WHOLE = ("step", "width", "run", "clipped", "skipped", "nonfinite")
_FIRST = ("step", "width", "run", "loss", "norm", "learning_rate", *_WHOLE[3:])


def of_rows(rows: Sequence[Row]) -> History:
    """Returns the history that the rows of a log tell; what is missing is NaN.

    Rows without a loss or a norm, of evaluations, are left out.
    """
    names = _meanings.chosen(rows)
    every = [{names[k]: v for k, v in row.items() if k in names} for row in rows]
    if not any(map(_meanings.is_of_training, names.values())):
        raise _nothing(name for row in rows for name in row)
    if _meanings.is_history(names):
        return completed(*_arrays([x for x in every if _meanings.is_history(x)]))
    every = _without_blanks(every)
    if "step" not in names.values() and any(map(_meanings.statistic, names)):
        return completed(*_arrays([x for x in every if _runs.of_training(x)]))
    kept = [x for x in every if _runs.of_training(x) or "learning_rate" in x]
    divided = _runs.divided(_runs.placed(kept))
    found = [run for x in divided if (run := _runs.merged(x))]
    return completed(
        *_arrays([row | {"run": i} for i, run in enumerate(found) for row in run])
    )


def of_columns(seen: Mapping[str, Any]) -> History:
    """Returns the history of columns, or of one row, where nothing is missing."""
    arrays = {k: np.atleast_1d(_array(v)) for k, v in _cells.flat(seen)}
    shapes = {k: x.shape for k, x in arrays.items() if _cells.is_numeric(x)}
    others = {k: x.shape for k, x in arrays.items() if x.dtype.kind in "OU"}
    every = {*shapes.values(), *others.values()}
    if len(every) != 1 or len(next(iter(every))) != 1:
        raise ValueError(
            "Expected columns of one length, one number for each step, got shapes"
            f" {shapes | others}. Of a batch of runs take one:"
            " `jax.tree.map(lambda x: x[0], seen)`."
        )
    names = _meanings.chosen([{key: _fraction(arrays[key]) for key in shapes}])
    columns = {new: arrays[old].astype(float) for old, new in names.items()}
    is_ragged = others or any(map(_meanings.is_of_evaluation, shapes))
    is_in_order = (np.diff(columns.get("step", np.arange(2))) > 0).all()
    if _meanings.is_history(names) or (is_in_order and not is_ragged):
        return completed(columns, {})
    order = (*shapes, *others)
    table = zip(*(arrays[name].tolist() for name in order), strict=True)
    rows = [dict(zip(order, row, strict=True)) for row in table]
    return of_rows(_meanings.training(rows))


def _array(values: Any) -> np.ndarray:
    try:
        return np.asarray(values)
    except ValueError:  # lists that differ in length
        return np.full(len(values), None)


def _fraction(column: np.ndarray) -> float:
    """Returns by how much a column is off whole numbers."""
    finite = column.astype(float)[np.isfinite(column.astype(float))]
    return float(np.max(np.abs(finite - np.round(finite)), initial=0))


def completed(columns: History, present: Mapping[str, np.ndarray]) -> History:
    """Returns a history with what follows from its columns, in order.

    Args:
      columns: of one length.
      present: of some, where they are not missing.
    """
    training = [key for key in columns if _meanings.is_of_training(key)]
    if not training:
        raise _nothing(columns)
    history = _counts.with_norms(columns)
    are_bad = [
        ~np.isfinite(columns[key])
        & present.get(key, True)
        & _counts.is_new(columns, key)
        for key in training
    ]
    history.setdefault("nonfinite", np.any(are_bad, axis=0))
    history.setdefault("step", _counts.steps(columns, len(are_bad[0])))
    history = {key: _whole(key, column) for key, column in history.items()}
    history.setdefault("width", _widths(history["step"], history.get("run")))
    if "skipped" not in history and _counts.of("skipped_count", columns):
        history.setdefault("skipped", _counts.skipped(history).astype(np.int64))
    if "clipped" not in history and _counts.of("factor", columns):
        history.setdefault("clipped", _counts.clipped(history).astype(np.int64))
    if "run" in history and not history["run"].any():
        del history["run"]
    return _ordered(history)


def _nothing(names: Iterable[str]) -> ValueError:
    got = ", ".join(sorted({*names})) or "no names"
    return ValueError(
        "Expected a column with the loss or with the gradient norm, such as"
        f" `step,loss,grad_norm`, got {got}."
    )


def _arrays(rows: Sequence[Row]) -> tuple[History, History]:
    """Returns columns, NaN where a row has nothing, and where it has something."""
    keys = dict.fromkeys(name for row in rows for name in row)
    columns = {key: np.array([x.get(key, np.nan) for x in rows], float) for key in keys}
    return columns, {key: np.array([key in row for row in rows]) for key in keys}


def _without_blanks(rows: Sequence[Row]) -> list[Row]:
    """Leaves out rows of evaluations in tables that write NaN for what is missing.

    There the loss is NaN where an evaluation's is not, and the reverse. Then a NaN
    beside a loss or a norm that is finite is missing, too.
    """
    names = {name for row in rows for name in row}
    elsewhere = [name for name in names if _meanings.is_of_evaluation(name)]

    def some(values: Row) -> bool | None:
        return any(map(np.isfinite, values.values())) if values else None

    def sides(row: Row) -> tuple[bool | None, bool | None]:
        of_evaluation = {key: row[key] for key in elsewhere if key in row}
        return some(_runs.of_training(row)), some(of_evaluation)

    found = [sides(row) for row in rows] if elsewhere else []
    if (False, True) not in found or (True, False) not in found:
        return list(rows)
    return [
        {k: v for k, v in row.items() if v == v} if side[0] else row
        for row, side in zip(rows, found, strict=True)
        if side != (False, True)
    ]


def _widths(steps: np.ndarray, runs: np.ndarray | None) -> np.ndarray:
    """Returns the steps since the row before; of a first row as many as usual."""
    widths = np.diff(steps, prepend=steps[:1])
    first = np.zeros(len(steps), bool) if runs is None else np.diff(runs, prepend=0) > 0
    first[:1] = True
    usual = np.median(widths[~first]) if (~first).any() else 1
    widths[first] = np.minimum(steps[first] + 1, usual)
    return np.maximum(np.round(widths), 1).astype(np.int64)


def _whole(name: str, column: np.ndarray) -> np.ndarray:
    if name not in _WHOLE or not np.isfinite(column).all():
        return column.astype(float)
    return np.round(column).astype(np.int64)


def _ordered(history: History) -> History:
    """Returns the columns that all have first; in other names, numbers are numbers.

    So `Dense_2` comes before `Dense_10`, which is the order of the forward pass as far
    as names tell.
    """

    def place(name: str) -> Any:
        parts = [x for x in re.split(r"(\d+)", name) if x]
        digits = [(int(x), "") if x.isdecimal() else (-1, x) for x in parts]
        return (_FIRST.index(name), []) if name in _FIRST else (len(_FIRST), digits)

    return {name: history[name] for name in sorted(history, key=place)}
