"""What a clip saw, for people to read: its state at first and after a step."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

from optaxclip._engine import limits as _limits
from optaxclip._measure import (
    names as _names,
    scopes as _scopes,
    stacks as _stacks,
    units as _units,
)
from optaxclip._mesh import collectives, side_by_side, spread as _spread
from optaxclip._trees import infinity, leaves as _leaves


class ClipState(NamedTuple):
    """What a clip saw at its last step; only the rule's state is ever read back.

    The arrays have one entry per scope, in tree order: shape ``()`` for a global norm,
    else ``(scopes,)``; where a scope is finer than a leaf, one entry per leaf, of the
    unit that was clipped hardest. Floats are float32, or float64 where a leaf is; on
    finite updates they are finite. Read them with :func:`optaxclip.summary`, which
    knows the names and shows as infinite what a number a millionth below the largest
    of the dtype stands for here.

    Attributes:
      update_count: updates seen, int32.
      norms: norms before the clip, in the units of the updates; the largest number
        where a norm is larger than its dtype can hold.
      max_norms: thresholds; the largest number where there was none.
      factors: what the updates were multiplied by; 1 where nothing happened.
      clipped_count: steps at which the factor was below 1, int32.
      rule_state: the state of the threshold's rule, ``optax.EmptyState()`` if it has
        none, a tuple of those in the order of the sorted patterns if the threshold is a
        mapping.
      scope_ids: which the scopes are, shape ``(scopes, 4)``, int32: two of the path's
        fingerprint and two of the place in a stack. Shape ``(4,)`` for a global norm.
    """

    update_count: jax.Array
    norms: jax.Array
    max_norms: jax.Array
    factors: jax.Array
    clipped_count: jax.Array
    rule_state: Any
    scope_ids: jax.Array


def fresh(
    threshold: _limits.Threshold,
    zeros: _scopes.Measured,
    leaves: _leaves.Leaves,
    names: _names.Names | None,
) -> ClipState:
    """Returns the state before the first step, given norms of zero."""
    zero = zeros.norms
    if isinstance(zero, _units.Units):
        zero = jnp.zeros(len(names or ()), leaves.dtype)
    return ClipState(
        update_count=jnp.zeros((), jnp.int32),
        norms=zero,
        max_norms=infinity.full_like(zero),
        factors=jnp.ones_like(zero),
        clipped_count=jnp.zeros_like(zero, jnp.int32),
        rule_state=_limits.init(threshold, zeros, leaves),
        scope_ids=_names.encoded(names),
    )


def typed(state: ClipState) -> ClipState:
    """Returns the state with its whole numbers as such: a blend makes them floats."""
    whole = {"update_count", "clipped_count", "scope_ids"}
    return state._replace(
        **{key: jnp.asarray(getattr(state, key), jnp.int32) for key in whole}
    )


def after(
    state: ClipState,
    measured: _scopes.Measured,
    max_norms: _units.Packed,
    factors: _units.Packed,
    rule_state: Any,
    leaves: _leaves.Leaves,
) -> ClipState:
    """Returns the state after this step."""
    zero = jnp.zeros_like(state.norms)
    columns = [measured.sizes(), max_norms, factors]
    if isinstance(factors, _units.Units):
        columns = _hardest(columns, leaves)
    columns = [_fitting(x, zero) for x in columns]
    if measured.axes:
        columns = side_by_side.at_smallest(columns, measured.axes)
    new_norms, new_max_norms, new_factors = columns
    return ClipState(
        update_count=jnp.asarray(optax.safe_increment(state.update_count)),
        norms=new_norms,
        max_norms=infinity.replaced(new_max_norms),
        factors=new_factors,
        clipped_count=jnp.where(
            new_factors < 1,
            optax.safe_increment(state.clipped_count),
            state.clipped_count,
        ),
        rule_state=rule_state,
        scope_ids=state.scope_ids,
    )


def _hardest(
    columns: Sequence[_units.Units], leaves: _leaves.Leaves
) -> Sequence[jax.Array]:
    """Returns of each leaf the numbers of the unit that was clipped hardest.

    Where it is known how units are spread, every device looks through its own.
    """
    *_, keys = columns
    stacks = _stacks.of_leaves(leaves)
    spread = None if any(stacks) else _spread.of(leaves.tree(leaves.measured()))
    if spread is None:
        return _of_hardest(columns, stacks)
    pairs = zip(keys.places, keys.arrays, strict=True)
    own = [spread.of_units(some, x.shape[1:]) for some, x in pairs]
    splits = spread._replace(specs=own).splits()
    axes = frozenset[str]().union(*(split.axes for split in splits))

    def on_pieces(every: Sequence[list[jax.Array]]) -> Sequence[jax.Array]:
        alike: dict[Any, list[int]] = {}
        for some, array in zip(keys.places, every[-1], strict=True):
            key = array.shape[1:], collectives.varying_axes(array)
            alike.setdefault(key, []).extend(some)
        units = (_units.Units(arrays, keys.places) for arrays in every)
        places = list(map(tuple, alike.values()))
        rows = _of_hardest([_units.rejoined(x, places) for x in units], stacks)
        return side_by_side.at_smallest(rows, axes) if axes else rows

    specs = [own] * len(columns)
    every = spread.placed([x.arrays for x in columns], specs)
    mapped = jax.shard_map(
        on_pieces, mesh=spread.mesh, in_specs=(specs,), out_specs=PartitionSpec()
    )
    return mapped(every)


def _of_hardest(
    columns: Sequence[_units.Units], stacks: _stacks.Stacks
) -> list[jax.Array]:
    """Returns of each leaf the numbers of the unit whose last, its factor, is least.

    Of a stack those of every layer. A NaN is less than any number.
    """
    places = columns[-1].places
    found, order = [], []
    for some, *arrays in zip(places, *(units.arrays for units in columns), strict=True):
        stack = stacks[some[0]] if some else None
        rows = _at_smallest(arrays, -1 if stack is None else stack.axis + 1)
        if stack:
            # The smallest over all devices is looked for later.
            *others, key = collectives.replicated(rows)
            rows = jnp.stack([*map(stack.every, others), stack.every(key, jnp.inf)])
        found.append(rows.reshape(len(rows), -1))
        count = found[-1].shape[1] // max(len(some), 1)
        order += [(place, layer) for place in some for layer in range(count)]
    ranks = sorted(range(len(order)), key=order.__getitem__)
    return list(jnp.concatenate(found, axis=1)[:, np.array(ranks, int)])


def _at_smallest(columns: Sequence[jax.Array], layers: int) -> jax.Array:
    """Returns of each row the numbers where those of the last column are smallest.

    A NaN is less than any number, and of equal ones the first is taken.

    Args:
      columns: arrays of one shape.
      layers: an axis besides the first to be kept; -1 for none.
    """
    key = columns[-1]
    axes = tuple(i for i in range(1, key.ndim) if i != layers)
    if not axes:
        return jnp.stack(columns)
    by_masks = functools.partial(_by_masks, axes)
    if not collectives.is_local(key):
        return by_masks(columns)

    @jax.custom_jvp
    def chosen(columns: Sequence[jax.Array]) -> jax.Array:
        at_once = functools.partial(_in_one_look, axes)
        return jax.lax.platform_dependent(columns, cuda=at_once, default=by_masks)

    chosen.defjvp(functools.partial(jax.jvp, by_masks))
    return chosen(columns)


def _by_masks(axes: tuple[int, ...], columns: Sequence[jax.Array]) -> jax.Array:
    """Does so with numbers that may be spread over devices, and compiles fast."""
    *others, key = columns
    # A NaN may be lost in the least of several devices' numbers.
    key = jnp.where(jnp.isnan(key), -jnp.inf, key)
    place = _places(key, axes)
    # Like `argmin`, which takes XLA ten times as long to compile.
    smallest = jnp.min(key, axis=axes, keepdims=True)
    found = jnp.where(key == smallest, place, place.size)
    first = jnp.min(found, axis=axes, keepdims=True)
    rows = [jnp.sum(jnp.where(place == first, x, 0), axis=axes) for x in others]
    smallest = jnp.squeeze(smallest, axes)
    return jnp.stack([*rows, jnp.where(smallest == -jnp.inf, jnp.nan, smallest)])


def _in_one_look(axes: tuple[int, ...], columns: Sequence[jax.Array]) -> jax.Array:
    """Does so on a GPU: a kernel, in which the columns are computed, too."""
    *others, key = columns
    key = jnp.where(jnp.isnan(key), -jnp.inf, key)
    place = jnp.broadcast_to(_places(key, axes), key.shape)

    def first(a: Any, b: Any) -> Any:
        is_first = (a[0] < b[0]) | ((a[0] == b[0]) & (a[1] < b[1]))
        return tuple(jnp.where(is_first, x, y) for x, y in zip(a, b, strict=True))

    last = jnp.iinfo(place.dtype).max
    start = [np.array(jnp.inf, key.dtype), np.array(last, place.dtype)]
    start += [np.zeros((), x.dtype) for x in others]
    smallest, _, *rows = jax.lax.reduce(
        (key, place, *others), tuple(start), first, axes
    )
    return jnp.stack([*rows, jnp.where(smallest == -jnp.inf, jnp.nan, smallest)])


def _places(key: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Returns the place of each number along some axes."""
    shape = tuple(key.shape[i] if i in axes else 1 for i in range(key.ndim))
    return jnp.arange(math.prod(shape)).reshape(shape)


def _fitting(column: jax.Array, like: Any) -> jax.Array:
    if column.shape != jnp.shape(like):
        raise ValueError(
            f"Expected a state with one entry per scope, of shape {column.shape}, got"
            f" {jnp.shape(like)}: it belongs to another clip or to other params."
            " Call `clip.init(params)`."
        )
    return column.astype(like.dtype)
