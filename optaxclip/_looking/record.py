"""The flight recorder: what every step of a run was like, in the optimizer's state."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optaxclip import norms
from optaxclip._arguments import checks, mistakes
from optaxclip._guards import outcomes, skips, watched
from optaxclip._looking import row as _row, seen as _seen, stretches
from optaxclip._measure import names as _names, scopes as _scopes
from optaxclip._mesh import summed
from optaxclip._trees import infinity, leaves as _leaves


class RecordState(NamedTuple):
    """State of :func:`record`.

    A column is a number of every step: the loss, the global norm, the norm of each
    scope, then what each clip inside saw. On finite steps all are finite: the lowest
    number stands for one that is missing, a number a millionth below the largest for
    infinity.

    Attributes:
      seen: steps seen, and how many of them are rows: all but, of steps in a row that
        are not finite, those after the first; shape ``(2,)``, int32.
      memory: shape ``(3, size, columns + 6)``, float32, or float64 where a leaf is: of
        each stretch one step and the largest finite values, and the last rows. The last
        six columns are the upper and the lower 16 bits of the number of the step, and
        how many steps there are, how many skipped, clipped and not finite.
      scope_ids: which the scopes of the norm are, as in :class:`ClipState`.
      recorded_state: state of the wrapped optimizer.
    """

    seen: jax.Array
    memory: jax.Array
    scope_ids: jax.Array
    recorded_state: Any

    records_every_step = True  # no field: for guards, which would undo it


def record(
    inner: optax.GradientTransformation | optax.MultiSteps,
    norm: _scopes.Norm = norms.leaf_norms,
    size: int = 256,
) -> optax.GradientTransformationExtraArgs:
    """Records every step in the optimizer's state, like a flight recorder.

    The updates are those of ``inner``, bit for bit. What the run was like is there
    afterwards, whatever its length, and if it ends in NaN: wrap the whole optimizer.

    .. code-block:: python

      optimizer = optaxclip.record(
          optax.chain(optaxclip.clip_by_global_norm(1.0), optax.adamw(1e-3))
      )
      updates, opt_state = optimizer.update(grads, opt_state, params, value=loss)

    A row has the loss, if it is passed; the global L2 norm of the updates that come in,
    and the norm of each scope; and of each clip inside what it saw: norm, threshold and
    factor, of :func:`clip_by_value` the largest element and the share clipped. The last
    ``size`` rows are kept one by one. Those before are in at most ``size`` stretches,
    all equally long, which become twice as long whenever they are as many. Of a stretch
    there is one row, drawn evenly, of every column the largest finite number, and how
    many steps were skipped, clipped, and not finite.

    Of steps in a row whose loss or norm is not finite only the first is a row. The
    others are counted in it: so however long a run goes on with NaN, the steps before
    are still there.

    Guarantees:
      * The updates, and the state of ``inner``, are those of ``inner``.
      * The state has the same structure, shapes and dtypes after every step; its size
        does not depend on how many there are. On finite steps it is finite.
      * Rows are in order, and each step is counted in one of them.
      * A run that is stopped and goes on has the record of one that was not.
      * A step reads and writes two stretches and one row. A norm that a clip inside
        measures of the same updates is measured once.

    A step that a clip inside did not see has no numbers of it: one that a guard
    skipped, or that ``optax.MultiSteps`` only accumulates. It is not counted as
    clipped. A row counts up to 2**24 steps, more than there are in a stretch of a run
    with 2**31 if ``size`` is 256.

    Args:
      inner: optimizer, with its clips and guards. A guard around a record would undo it
        together with the step, and raises.
      norm: of which scopes there are columns: :func:`norms.leaf_norms`, one for each
        leaf or layer of a stack (:func:`over_layers`); ``norms.group_norms()``;
        :func:`norms.global_norm`, none but that of all leaves.
      size: how many of the last rows there are, and at most how many stretches; a power
        of two. The state holds 3 * size * columns floats: with 250 leaves 0.8 MB, and
        as much again for each number that a clip of leaves inside has.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` with state :class:`RecordState`.

    Raises:
      TypeError: ``inner`` is not a transformation, or ``norm`` not a norm; the loss
        comes by another name than ``value``.
      ValueError: ``size`` is not a power of two; when tracing, a norm of units, a loss
        that is not one number or differs between devices, a state that belongs to
        another optimizer; and what ``inner`` raises.

    Examples:
      >>> clip = optaxclip.clip_by_global_norm(1.0)
      >>> tx = optaxclip.record(optax.chain(clip, optax.sgd(0.1)), size=4)
      >>> params = {"w": jnp.array([1.0])}
      >>> state = tx.init(params)
      >>> for grad in 0.5, 2.0, jnp.nan, jnp.nan:
      ...     grads = {"w": jnp.array([grad])}
      ...     updates, state = tx.update(grads, state, params)
      >>> history = optaxclip.history(state, params)
      >>> print(history["step"], history["norm"], history["nonfinite"])
      [0 1 2] [0.5 2.  nan] [0 0 2]
    """
    if isinstance(inner, optax.MultiSteps):
        inner = inner.gradient_transformation()
    inner = checks.transformation(inner, "inner", "optax.chain(clip, optax.sgd(0.1))")
    mistakes.norm(checks.function(norm, "norm"))
    _check_size(size)
    formula = norms.formula(norm)

    def init_fn(params: Any) -> RecordState:
        leaves = _leaves.flatten(params, abstract=True)
        zeros = _scopes.zeros(formula, leaves)
        scopes = _row.columns(norm, zeros, leaves.paths())
        names = _scopes.names(formula, leaves)
        state = inner.init(params)
        columns = 2 + scopes.size + _seen.count(state)
        return RecordState(
            seen=jnp.zeros(2, jnp.int32),
            memory=stretches.empty(size, columns, leaves.dtype),
            scope_ids=_names.encoded(names).reshape(-1, 4)[scopes],
            recorded_state=state,
        )

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, RecordState]:
        checks.needed_state(state, RecordState)
        watched.check_name_of_loss(extra_args)
        leaves = _leaves.flatten(watched.detached(updates))
        summed.check_summed(leaves, outcomes.like_updates(params))
        sizes = _row.norms_of(norm, leaves)
        before = state.recorded_state
        _check_columns(state, 1 + sizes.size + _seen.count(before))
        updates, after = inner.update(updates, before, params, **extra_args)
        dtype = state.memory.dtype
        loss = _row.loss(watched.with_detached_loss(extra_args), dtype)
        own = jnp.concatenate([loss[None], sizes.astype(dtype)])
        found = _seen.seen(before, after, dtype, stretches.none(dtype))
        flags = found.is_skipped, found.is_clipped, _row.is_nonfinite(norm, own)
        values = jnp.concatenate([own, watched.detached(found.values)])
        return updates, _after(state, values, flags, after)

    setattr(init_fn, skips.RECORDS, True)
    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_columns(state: Any, needed: int) -> None:
    columns = state.memory.shape[2] - stretches.OWN
    if needed != columns:
        raise ValueError(
            f"Expected the state of a record with {needed} columns, got"
            f" {columns}: it belongs to another optimizer or to other"
            " params. Call `state = tx.init(params)`."
        )


def _after(state: Any, values: jax.Array, flags: Any, recorded: Any) -> RecordState:
    # In a blend of states counts have become floats.
    seen, ids = (jnp.asarray(x, jnp.int32) for x in (state.seen, state.scope_ids))
    memory, seen = stretches.after(state.memory, seen, values, flags)
    return RecordState(seen, memory, ids, recorded)


def _check_size(size: Any) -> None:
    is_whole = isinstance(size, int | np.integer) and not isinstance(size, bool)
    if not is_whole or size < 2 or size & (size - 1):
        raise ValueError(
            f"Expected size to be a power of two, at least 2, got {size!r}. It is how"
            " many of the last steps are kept one by one: 256 is usual."
        )


def rows(state: Any, paths: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Returns the history that a record holds, on the host.

    Args:
      state: a :class:`RecordState`.
      paths: of the params, to name scopes by.

    Returns:
      Arrays by the names of their columns, an entry for each row: those before the last
      `size` ones in stretches, then these one by one.

    Raises:
      ValueError: the state has a batch axis.
    """
    seen, memory, ids = jax.device_get(
        [jax.tree.leaves(field)[0] for field in state[:3]]
    )
    if np.ndim(seen) > 1:
        raise ValueError(
            f"Expected a record without a batch axis, got {seen.shape[:-1]} of them."
            " Take one of the batch, `jax.tree.map(lambda x: x[0], state)`."
        )
    past, last = stretches.in_order(memory, int(seen[1]))
    drawn, largest = map(np.concatenate, zip(past, last, strict=True))
    known = _names.candidates(paths) if paths else {}
    scopes = _seen.of_scopes(ids, known)
    own = ["loss", "norm", *(f"norm/{name}" for name in scopes)]
    names = own + _seen.names(state.recorded_state, paths)
    named = [i for i in range(2, len(own)) if own[i] != "norm/"]  # of one bare array
    order = sorted(named, key=lambda i: _forward(own[i]))
    order = [0, 1, *order, *range(len(own), len(names))]
    if np.all(_is_missing(drawn[:, 0])):
        order = order[1:]
    counts = drawn[:, -len(stretches.COUNTS) :].T.astype(np.int64)
    of = dict(zip(stretches.COUNTS, counts, strict=True))
    columns = {"step": stretches.steps(drawn), "width": of.pop("width")}
    columns |= {names[i]: _shown(drawn[:, i]) for i in order} | of
    if len(past.drawn):
        columns |= {f"peak/{names[i]}": _shown(largest[:, i]) for i in order}
    return columns


def _shown(values: np.ndarray) -> np.ndarray:
    """Returns what the numbers stand for, in float64."""
    large = infinity.is_infinite(values)
    shown = np.where(_is_missing(values), np.nan, np.where(large, np.inf, values))
    return shown.astype(np.float64)


def _is_missing(values: np.ndarray) -> np.ndarray:
    return (values <= stretches.none(values.dtype)) & np.isfinite(values)


def _forward(name: str) -> list[Any]:
    """Sorts numbers as numbers: Dense_2 before Dense_10."""
    parts = re.split(r"(\d+)", name)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]
