"""Which layers are dead or starved?"""

import re
from collections.abc import Iterable

import numpy as np

from optaxclip._advice.crashes import printed_as_zero
from optaxclip._advice.run import Run, Series, evened, few, series, short, zero_since
from optaxclip._advice.traction import learns
from optaxclip._trees import paths as _paths

QUARTER = 0.25  # of the rows: so long is an exact zero no accident
LEAST = 3  # such rows
FADED = 0.01  # of the usual norm: so small it went to zero by itself
ROWS = 8  # at least, for the size of a layer's gradient
VANISHED = 1e3  # from the last layer to the first


def dead(run: Run) -> str | None:
    """Says that gradients are exactly 0, which noise never makes.

    Of a leaf, in a quarter of the rows as they are kept: those of the last steps, each
    by itself, are many.
    """
    even = evened(run)
    others = _dead_since(even) or _dead_rows(even) or _no_signal(even)
    return _dead_leaves(run) or others


def vanishing(run: Run) -> str | None:
    """Says that the gradients of the first layers are a thousandth of the last's.

    Root mean squares, for a norm grows with its leaf; of the matrices of numbered
    layers alone, whose order is known. Sizes come from the params. Of the last quarter
    of the rows; where nothing is learnt of the first rows too, for afterwards the last
    layers have fitted a constant, and have no gradient either.
    """
    run = evened(run)
    late = _vanishing(run, slice(-(len(run.step) // 4 + 1), None))
    return late or (
        None if learns(series(run, run.loss)) else _vanishing(run, slice(0, ROWS))
    )


def _vanishing(run: Run, rows: slice) -> str | None:
    sizes = {name: _matrix_size(run, name) for name in run.scopes}
    kinds = [re.sub(r"\d+", "#", name) for name, size in sizes.items() if size]
    usual = max(kinds, key=kinds.count, default="")
    rms = {
        name: float(np.median(values[rows]) / np.sqrt(sizes[name]))
        for name in _in_order(k for k in sizes if re.sub(r"\d+", "#", k) == usual)
        if len(values := series(run, run.scopes[name]).value) >= ROWS
    }
    alive = [name for name, value in rms.items() if value > 0]
    if len(alive) < 3 or rms[alive[-1]] < VANISHED * rms[alive[0]]:
        return None
    logs = np.log([rms[name] for name in alive])
    if np.corrcoef(logs, np.arange(len(logs)))[0, 1] < 0.7:
        return None
    first, last = alive[0], alive[-1]
    return (
        f"VANISHING: the gradient of {first} has a root mean square of"
        f" {short(rms[first])}, that of {last} one of {short(rms[last])}, and it falls"
        " from layer to layer. No clip lifts a small gradient: look at the"
        " initialisation, at skip connections and normalisation, or use Adam, whose"
        " steps don't shrink with the gradient."
    )


def _dead_leaves(run: Run) -> str | None:
    rows = np.flatnonzero(~run.bad)
    since = {name: zero_since(x[rows]) for name, x in run.scopes.items()}
    need = max(LEAST, QUARTER * len(rows))
    gone = {k: i for k, i in since.items() if len(rows) - i >= need}
    if not gone or len(gone) == len(since):
        return None
    first = rows[min(gone.values())]
    start = f"DEAD since step {run.step[first]}: "
    order = _in_order(since)
    alive = order[len(gone) :]
    if len(gone) > 1 and alive and not gone.keys() & {*alive}:
        return (
            f"{start}everything up to {order[len(gone) - 1]} is cut off (gradient"
            f" exactly 0); the first leaf that lives is {alive[0]}: look at what feeds"
            f" it.{_only_finite(run, first)}"
        )
    return (
        f"{start}the gradient of {few(gone)} ({len(gone)} of {len(since)} leaves) is"
        f" exactly 0. Unless frozen, {'they learn' if len(gone) > 1 else 'it learns'}"
        f" nothing any more.{_only_finite(run, first)}"
    )


def _dead_since(run: Run) -> str | None:
    """Says that all gradients were there, and are exactly 0 from one row on.

    Not by fading away, as where all is learnt, and not while the loss falls.
    """
    rows = np.flatnonzero(~run.bad & np.isfinite(run.norm))
    first = zero_since(run.norm[rows])
    zero, before = rows[first:], run.norm[rows[:first]]
    before = before[before > 0]
    if not len(before) or len(zero) < max(LEAST, QUARTER * len(rows)):
        return None
    is_faded = np.median(before[-3:]) < FADED * np.median(before)
    if is_faded or learns(_losses(run, zero)):
        return None
    return (
        f"DEAD since step {run.step[zero[0]]}: the gradient norm was"
        f" {short(before[-1])} before and is exactly 0 from there on, in {len(zero)}"
        f" rows{_level(run, zero)}. Nothing is trained any more. Look for units that"
        " are off for every input, and at examples that all give the same loss."
        f"{_only_finite(run, zero[0])}"
    )


def _dead_rows(run: Run) -> str | None:
    """Says that the norm is exactly 0 in many rows, here and there or in all."""
    rows = np.flatnonzero(~run.bad & np.isfinite(run.norm))
    late = rows[len(rows) // 2 :]
    zero = rows[run.norm[rows] == 0]
    enough = max(2, QUARTER * len(late))
    if len(zero) < LEAST or np.sum(run.norm[late] == 0) < enough:
        return None
    if learns(series(run, run.loss)) and run.loss[late[run.norm[late] == 0]].any():
        return None
    return (
        f"DEAD: the gradient norm is exactly 0 in {len(zero)} of {len(rows)}"
        f" rows{_level(run, zero)}. Nothing is trained there: look at what is frozen or"
        " detached, at examples that all give the same loss, and at units that are off"
        " for every input."
    )


def _no_signal(run: Run) -> str | None:
    loss = series(run, run.loss).value
    zeros = len(loss) - zero_since(loss)
    is_told = zeros >= LEAST and not np.isfinite(run.norm).any()
    if not is_told or printed_as_zero(run) is not None:
        return None
    return (
        f"DEAD: the loss is exactly 0 in the last {zeros} rows. Either there is nothing"
        " left to learn from, or it is a NaN that was not printed: log the gradient"
        " norm."
    )


def _losses(run: Run, rows: np.ndarray) -> Series:
    rows = rows[np.isfinite(run.loss[rows])]
    return Series(run.step[rows], run.loss[rows])


def _level(run: Run, rows: np.ndarray) -> str:
    """Says what the loss is in some rows."""
    loss = _losses(run, rows).value
    if not len(loss):
        return ""
    if not loss.any():
        return ", and the loss exactly 0"
    return f", and the loss stays at about {short(np.median(loss))}"


def _only_finite(run: Run, first: int) -> str:
    """Says that a threshold hid the explosion that killed the layers."""
    rows = np.flatnonzero(~run.bad[:first])
    if not len(rows) or "clipped" not in run.columns:
        return ""
    limit = run.columns.get("clip/max_norm", np.full(len(run.step), np.inf))
    limit = float(limit[rows[-1]])
    if not (run.columns["clipped"][rows[-10:]].any() and np.isfinite(limit)):
        return ""
    return (
        f" The threshold {short(limit)} kept the run finite, not healthy: the steps"
        " before were too long. Begin anew with a tenth of it."
    )


def _in_order(names: Iterable[str]) -> list[str]:
    """Returns leaves in forward order, a bias after its kernel; none if unknown.

    It is known where all are of layers that are numbered in one way.
    """
    layers = {name: _paths.layer(name) for name in names}
    if len({re.sub(r"\d+", "#", layer) for layer in layers.values()}) != 1:
        return []
    if not all(re.search(r"\d", layer) for layer in layers.values()):
        return []

    def place(name: str) -> tuple[list[int], bool]:
        return [int(x) for x in re.findall(r"\d+", layers[name])], "bias" in name

    return sorted(layers, key=place)


def _matrix_size(run: Run, name: str) -> int:
    """Returns how many elements a matrix has, or a member of a stack; 0 if neither."""
    if name in run.weights:
        shape = np.shape(run.weights[name])
    else:
        stack = re.sub(r"(^|/)\d+(?=/|$)", "", name, count=1).lstrip("/")
        shape = np.shape(run.weights.get(stack, 0.0))[1:]
    return int(np.prod(shape)) if len(shape) >= 2 else 0
