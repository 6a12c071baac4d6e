"""How do the rows of any log become a history?

Trainers write what they like: under names of their own, with evaluations between, from
several runs into one file, and once more after a resume.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from optaxclip._looking import cells as _cells, meanings as _meanings, runs as _runs
from optaxclip._looking.cells import Row

History = dict[str, np.ndarray]

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
    arrays = {k: np.atleast_1d(np.asarray(v)) for k, v in _cells.flat(seen)}
    shapes = {k: x.shape for k, x in arrays.items() if _cells.is_numeric(x)}
    others = {k: x.shape for k, x in arrays.items() if x.dtype.kind in "OU"}
    every = {*shapes.values(), *others.values()}
    if len(every) != 1 or len(next(iter(every))) != 1:
        raise ValueError(
            "Expected columns of one length, one number for each step, got shapes"
            f" {shapes | others}. Of a batch of runs take one:"
            " `jax.tree.map(lambda x: x[0], seen)`."
        )
    is_ragged = others or any(map(_meanings.is_of_evaluation, shapes))
    if is_ragged and not _meanings.is_history(shapes):
        columns = [arrays[name].tolist() for name in (*shapes, *others)]
        table = zip(*columns, strict=True)
        return of_rows(
            [_cells.numbers(dict(zip(arrays, x, strict=True))) for x in table]
        )
    names = _meanings.chosen([dict.fromkeys(shapes, 0.0)])
    return completed({new: arrays[old].astype(float) for old, new in names.items()}, {})


def completed(columns: History, present: Mapping[str, np.ndarray]) -> History:
    """Returns a history with what follows from its columns, in order.

    Args:
      columns: of one length.
      present: of some, where they are not missing.
    """
    training = [key for key in columns if _meanings.is_of_training(key)]
    if not training:
        raise _nothing(columns)
    history = _with_norms(columns)
    are_bad = [
        ~np.isfinite(columns[key]) & present.get(key, True) & _is_new(columns, key)
        for key in training
    ]
    history.setdefault("nonfinite", np.any(are_bad, axis=0))
    history.setdefault("step", _steps(columns, len(are_bad[0])))
    history = {key: _whole(key, column) for key, column in history.items()}
    history.setdefault("width", _widths(history["step"], history.get("run")))
    skipped = _skipped(history)
    if skips := _of("skipped_count", columns):
        history.setdefault("skipped", skipped.astype(np.int64))
    factors = _of("factor", columns)
    if factors:
        clipped = [(columns[key] < 1) & _is_new(columns, key) for key in factors]
        clipped = np.any(clipped, axis=0) & ((skipped == 0) if skips else True)
        history.setdefault("clipped", clipped.astype(np.int64))
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

    There the loss is NaN where an evaluation's is not, and the reverse.
    """
    names = {name for row in rows for name in row}
    elsewhere = [name for name in names if _meanings.is_of_evaluation(name)]

    def sides(row: Row) -> tuple[bool | None, bool | None]:
        both = _runs.of_training(row), {k: row[k] for k in elsewhere if k in row}
        ends = [np.isfinite([*x.values()]) if x else None for x in both]
        return tuple(None if x is None else bool(x.any()) for x in ends)

    found = [sides(row) for row in rows] if elsewhere else []
    if (False, True) in found and (True, False) in found:
        return [x for x, side in zip(rows, found, strict=True) if side != (False, True)]
    return list(rows)


def _of(what: str, columns: History) -> list[str]:
    """Returns the names of a statistic, of all clips and guards."""
    every = {key: _meanings.statistic(key) for key in columns}
    return [key for key, found in every.items() if found and found.what == what]


def _is_new(columns: History, name: str) -> np.ndarray | bool:
    """Whether a clip saw something at each step; at one that was skipped it did not."""
    found = _meanings.statistic(name)
    if found is None:
        return True
    label = f"/{found.label}" if found.label else ""
    count = columns.get(f"{found.kind}{found.number}{label}/update_count")
    return True if count is None else np.diff(count, prepend=0) != 0


def _with_norms(columns: History) -> History:
    """Returns the columns and the norms that the first clip saw, where there are none.

    Of norms of scopes alone, the total is the root of the sum of their squares.
    """
    history = dict(columns)
    for key in _of("norm", columns):
        _, number, label, _, scope = _meanings.statistic(key) or [""] * 5
        if key.startswith("clip") and number in ("", "_0") and not label:
            seen = np.where(_is_new(columns, key), columns[key], np.nan)
            history.setdefault(f"norm/{scope}".removesuffix("/"), seen)
    norms = {key: x for key, x in history.items() if key.startswith("norm/")}
    is_nested = any(x.startswith(f"{y}/") for x in norms for y in norms)
    if norms and "norm" not in history and not is_nested:
        every = np.array([*norms.values()])
        largest = np.max(every, axis=0)  # whose square may overflow
        scale = np.where(np.isfinite(largest) & (largest > 0), largest, 1)
        history["norm"] = scale * np.sqrt(np.sum((every / scale) ** 2, axis=0))
    return history


def _steps(columns: History, length: int) -> np.ndarray:
    """Returns the number of each step, by what clips and guards counted if they can.

    A guard around a clip keeps it from counting what is skipped; the guard's own count
    is in its share.
    """
    for key in _of("update_count", columns)[:1]:
        steps = columns[key]
        for name in _of("skipped_count", columns):
            skips = columns[name]
            share = columns[name.replace("skipped_count", "skipped_fraction")]
            total = skips / np.where(share > 0, share, 1)
            steps = np.maximum(steps, np.round(total))
        if length == 1 or (np.diff(steps) > 0).all():
            return np.maximum(steps - 1, 0)
    return np.arange(length)


def _skipped(history: History) -> np.ndarray:
    """Returns how many steps of each row guards skipped.

    Of those before the first row only the last is known to be in it.
    """
    every = np.zeros(len(history["step"]))
    begins = history["step"][0] < history["width"][0]
    for key in _of("skipped_count", history):
        counts = history[key]
        last = history[key.replace("skipped_count", "consecutive_count")][0]
        first = counts[0] if begins else min(counts[0], last, history["width"][0])
        change = np.diff(counts, prepend=counts[0] - first)
        every = every + np.where(change < 0, counts, change)
    return every


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
