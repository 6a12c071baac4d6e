"""What a clip saw, for people to read: its state at first and after a step."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optaxclip import _leaves, _limits, _mesh, _scopes, _units


class ClipState(NamedTuple):
    """What a clip saw at its last step; only the rule's state is ever read back.

    The arrays have one entry per scope, in tree order: shape ``()`` for a global norm,
    else ``(scopes,)``; where a scope is finer than a leaf, one entry per leaf, of the
    unit that was clipped hardest. Floats are float32, or float64 where a leaf is. Read
    them with :func:`optaxclip.summary`, which knows the names.

    Attributes:
      update_count: updates seen, int32.
      norms: norms before the clip, in the units of the updates; infinite where a norm
        is larger than its dtype can hold.
      max_norms: thresholds; infinite where there was none.
      factors: what the updates were multiplied by; 1 where nothing happened.
      clipped_count: steps at which the factor was below 1, int32.
      rule_state: the state of the threshold's rule, ``optax.EmptyState()`` if it has
        none, a tuple of those in the order of the sorted patterns if the threshold is a
        mapping.
    """

    update_count: jax.Array
    norms: jax.Array
    max_norms: jax.Array
    factors: jax.Array
    clipped_count: jax.Array
    rule_state: Any


def fresh(
    threshold: _limits.Threshold, zeros: _scopes.Measured, leaves: _leaves.Leaves
) -> ClipState:
    """Returns the state before the first step, given norms of zero."""
    zero = zeros.norms
    if isinstance(zero, _units.Units):
        zero = jnp.zeros(len(zeros.scopes), leaves.dtype)
    return ClipState(
        update_count=jnp.zeros((), jnp.int32),
        norms=zero,
        max_norms=jnp.full_like(zero, jnp.inf),
        factors=jnp.ones_like(zero),
        clipped_count=jnp.zeros_like(zero, jnp.int32),
        rule_state=_limits.init(threshold, zeros, leaves),
    )


def after(
    state: ClipState,
    measured: _scopes.Measured,
    max_norms: _units.Packed,
    factors: _units.Packed,
    rule_state: Any,
) -> ClipState:
    """Returns the state after this step."""
    columns = [measured.sizes(), max_norms, factors]
    if isinstance(factors, _units.Units):
        columns = _of_hardest(*columns)
    columns = [_fitting(x, state.norms) for x in columns]
    if measured.axes:
        columns = _mesh.at_smallest(columns[-1], columns, measured.axes)
    new_norms, new_max_norms, new_factors = columns
    return ClipState(
        update_count=jnp.asarray(optax.safe_increment(state.update_count)),
        norms=new_norms,
        max_norms=new_max_norms,
        factors=new_factors,
        clipped_count=jnp.where(
            new_factors < 1,
            optax.safe_increment(state.clipped_count),
            state.clipped_count,
        ),
        rule_state=rule_state,
    )


def _of_hardest(*columns: _units.Units) -> list[jax.Array]:
    """Returns of each leaf the numbers of the unit whose last, its factor, is least.

    A NaN is less than any number.
    """
    arrays = zip(*(units.arrays for units in columns), strict=True)
    found = [_at_smallest(*some) for some in arrays]
    order = np.argsort([i for some in columns[-1].places for i in some])
    return list(jnp.concatenate(found, axis=1)[:, order])


def _at_smallest(*columns: jax.Array) -> jax.Array:
    """Returns of each row the numbers where those of the last column are smallest.

    By masks, for an index into units that are spread over devices would gather them.
    """
    *others, key = columns
    if key.ndim == 1:
        return jnp.stack(columns)
    axes = tuple(range(1, key.ndim))
    place = jnp.arange(math.prod(key.shape[1:])).reshape(1, *key.shape[1:])
    # Like `argmin`, which takes XLA ten times as long to compile.
    smallest = jnp.min(key, axis=axes, keepdims=True)
    found = (key == smallest) | jnp.isnan(key)
    first = jnp.min(jnp.where(found, place, place.size), axis=axes, keepdims=True)
    rows = [jnp.sum(jnp.where(place == first, x, 0), axis=axes) for x in others]
    return jnp.stack([*rows, jnp.squeeze(smallest, axes)])


def _fitting(column: jax.Array, like: Any) -> jax.Array:
    if column.shape != jnp.shape(like):
        raise ValueError(
            f"Expected a state with one entry per scope, of shape {column.shape}, got"
            f" {jnp.shape(like)}: it belongs to another clip or to other params."
            " Call `clip.init(params)`."
        )
    return column.astype(like.dtype)
