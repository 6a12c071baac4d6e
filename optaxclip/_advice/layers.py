"""Which layers are dead or starved, and what became of the weights?"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip._advice.courses import learns
from optaxclip._advice.run import Run, evened, series, short
from optaxclip._trees import paths as _paths

QUARTER = 0.25  # of the rows: so long is an exact zero no accident
VANISHED = 1e3  # from the last layer to the first
LARGE = 1e3  # root mean square of a weight


def dead(run: Run) -> str | None:
    """Says that gradients are exactly 0, which noise never makes."""
    run = evened(run)
    return _dead_leaves(run) or _dead_as_a_whole(run) or _no_signal(run)


def vanishing(run: Run, params: Any) -> str | None:
    """Says that the gradients of the first layers are a thousandth of the last's.

    Root mean squares, for a norm grows with its leaf; of matrices alone.
    """
    run = evened(run)
    if params is None:
        return None
    shapes = {k: np.shape(x) for k, x in _leaves(params).items()}
    rms = {
        name: float(np.median(values[-(len(values) // 4 + 1) :]) / np.sqrt(size))
        for name, column in run.scopes.items()
        if len(shapes.get(name, ())) >= 2
        and len(values := series(run, column).value) >= 8
        and (size := int(np.prod(shapes[name]))) > 0
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
        " initialisation, at skip connections and normalisation, or use Adam."
    )


def weights(params: Any) -> dict[str, str]:
    """Says that params are not finite, or larger than layers need them to be."""
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(params)):
        return {}
    found = {"not_finite": _broken(params), "growing": _large(params)}
    return {name: text for name, text in found.items() if text}


def _broken(params: Any) -> str | None:
    bad = [k for k, x in _leaves(params).items() if not np.isfinite(x).all()]
    if not bad:
        return None
    rest = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
    return (
        f"NOT FINITE: the weights {', '.join(bad[:3])}{rest} hold NaN or infinity. Go"
        " back to a checkpoint; `skip_if_nonfinite(optimizer)` keeps such steps out."
    )


def _large(params: Any) -> str | None:
    sizes = {
        name: float(np.sqrt(np.mean(np.abs(x).astype(float) ** 2)))
        for name, x in _leaves(params).items()
        if np.size(x) and np.isfinite(x).all()
    }
    name = max(sizes, key=sizes.__getitem__, default=None)
    if name is None or sizes[name] < LARGE:
        return None
    return (
        f"GROWING: the weights {name} have a root mean square of {short(sizes[name])}."
        " If they did not begin there, the steps were too large: begin anew with a"
        " lower learning rate or a clip."
    )


def _dead_leaves(run: Run) -> str | None:
    rows = np.flatnonzero(~run.bad)
    since = {name: _zero_since(x[rows]) for name, x in run.scopes.items()}
    need = max(3, QUARTER * len(rows))
    gone = {k: i for k, i in since.items() if len(rows) - i >= need}
    if not gone or len(gone) == len(since):
        return None
    names = list(since)
    first = int(run.step[rows[min(gone.values())]])
    cut = names[: len(gone)]
    if len(gone) > 1 and set(cut) == set(gone):
        return (
            f"DEAD since step {first}: everything up to {cut[-1]} is cut off (gradient"
            f" exactly 0); the first leaf that lives is {names[len(gone)]}: look at"
            f" what feeds it.{_only_finite(run, first)}"
        )
    rest = f" and {len(gone) - 3} more" if len(gone) > 3 else ""
    return (
        f"DEAD since step {first}: the gradient of {', '.join([*gone][:3])}{rest} is"
        f" exactly 0. Unless frozen, {'they learn' if len(gone) > 1 else 'it learns'}"
        f" nothing any more.{_only_finite(run, first)}"
    )


def _zero_since(column: np.ndarray) -> int:
    """Returns the row from which on all are exactly zero; their number, if none."""
    alive = np.flatnonzero(column != 0)
    return int(alive[-1]) + 1 if len(alive) else 0


def _only_finite(run: Run, step: int) -> str:
    """Says that a threshold hid the explosion that killed the layers."""
    before = (run.step < step) & ~run.bad
    cut = run.columns.get("clipped", np.zeros(len(run.step)))[before]
    limits = run.columns.get("clip/max_norm", np.full(len(run.step), np.inf))[before]
    if not cut[-10:].any() or not np.isfinite(limits[-1]):
        return ""
    return (
        f" The threshold {short(limits[-1])} kept the run finite, not healthy: the"
        " steps before were too long. Begin anew with a tenth of it."
    )


def _dead_as_a_whole(run: Run) -> str | None:
    rows = np.flatnonzero(~run.bad & np.isfinite(run.norm))
    late = rows[len(rows) // 2 :]
    zero = late[run.norm[late] == 0]
    count = int(np.sum(run.norm[rows] == 0))
    is_dead = count > 2 and len(zero) >= max(2, QUARTER * len(late))
    if not is_dead or (learns(series(run, run.loss)) and run.loss[zero].any()):
        return None
    return (
        f"DEAD: the gradient norm is exactly 0 in {count} of"
        f" {len(rows)} rows, and the loss does not fall. Nothing is trained there: look"
        " at what is frozen or detached, at examples that all give the same loss, and"
        " at units that are off for every input."
    )


def _no_signal(run: Run) -> str | None:
    loss = series(run, run.loss).value
    zeros = len(loss) - _zero_since(loss)
    if zeros < 3 or np.isfinite(run.norm).any():
        return None
    return (
        f"DEAD: the loss is exactly 0 in the last {zeros} rows. Either there is nothing"
        " left to learn from, or it is a NaN that was not printed: log the gradient"
        " norm."
    )


def _leaves(params: Any) -> dict[str, np.ndarray]:
    pairs = zip(_paths.paths(params), jax.tree.leaves(params), strict=True)
    return {k: x for k, x in pairs if jnp.issubdtype(x.dtype, jnp.inexact)}
