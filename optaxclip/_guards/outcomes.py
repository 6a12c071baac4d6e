"""Is what comes out of an optimizer finite: its updates, and the params they make?

An element is broken where its update is not finite, or where it makes of a finite
parameter one that is not. A parameter that was not finite before is no fault of this
update's.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optaxclip._guards import slices
from optaxclip._measure import stacks as _stacks
from optaxclip._mesh import collectives
from optaxclip._trees.leaves import Leaves

# Of each leaf so many elements decide on the whole step: these are computed twice.
LOOKED_AT = 1024


def like_updates(params: Any) -> Any:
    """Returns those of the params that the gradients are of."""
    return params.fast if isinstance(params, optax.LookaheadParams) else params


def broken(
    updates: Any, params: Any, leaves: Leaves, take: slices.Take = slices.sliced
) -> jax.Array:
    """Returns whether something of each counted leaf broke, or of each layer in it.

    Args:
      updates: what came out.
      params: those that they will be added to, or None.
      leaves: what came in.
      take: how to take a slice.

    Returns:
      Booleans, the same on all devices, and one more at their end, for leaves that did
      not come in.
    """
    *starts, rest = entries(leaves)
    stacks = dict(zip(leaves.counted, _stacks.of_leaves(leaves), strict=True))
    places = dict(zip(leaves.counted, starts, strict=True))
    fits = _fits(updates, leaves)
    found: list[jax.Array] = []
    own: list[int] = []
    every = zip(jax.tree.leaves(updates), _paired(updates, params), strict=True)
    for i, (update, param) in enumerate(every):
        if _counts(update):
            leaf = i % max(len(leaves.leaves), 1)
            stack = stacks.get(leaf) if fits else None
            flags = _looked_at(update, param, stack, take)
            place = places.get(leaf, rest) if fits else rest
            found.append(flags)
            own += range(place, place + flags.shape[0])
    if not found:
        return jnp.zeros(rest + 1, bool)
    flags = jnp.any(_joined(found), axis=1)
    is_own = np.arange(rest + 1)[:, None] == np.array(own)
    flags = jnp.any(is_own & flags[None], axis=1)
    manual = frozenset(collectives.manual_axes())
    return collectives.anywhere(flags, manual)


def entries(leaves: Leaves) -> list[int]:
    """Returns where the entries of each counted leaf begin, and those of all others."""
    sizes = [stack.layers if stack else 1 for stack in _stacks.of_leaves(leaves)]
    return [sum(sizes[:i]) for i in range(len(sizes) + 1)]


def _looked_at(
    update: Any, param: Any, stack: _stacks.Stack | None, take: slices.Take
) -> jax.Array:
    """Returns which elements broke, of those that decide: a row for each layer."""
    if not collectives.is_local(jnp.asarray(update)):
        flags = _layers_first(_elements(update, param), stack)
        axes = tuple(range(1, flags.ndim))
        rows = collectives.replicated(jnp.any(flags, axis=axes))[:, None]
    else:
        by = _strides(jnp.shape(update), stack)
        flags = _elements(*(x if x is None else take(x, by) for x in (update, param)))
        flags = _layers_first(flags, stack)
        rows = flags.reshape(flags.shape[0], -1)
    return stack.every(rows.T).T if stack else rows


def _joined(rows: list[jax.Array]) -> jax.Array:
    """Returns all rows as one matrix, which takes one kernel."""
    length = max(x.shape[1] for x in rows)
    filled = (jnp.pad(x, ((0, 0), (0, length - x.shape[1]))) for x in rows)
    return jnp.concatenate(list(filled))


def _layers_first(flags: jax.Array, stack: _stacks.Stack | None) -> jax.Array:
    return jnp.moveaxis(flags, stack.axis, 0) if stack else flags[None]


def held(updates: Any, params: Any) -> Any:
    """Returns the updates, those that are broken replaced by nothing."""
    every, treedef = jax.tree.flatten(updates)
    pairs = zip(every, _paired(updates, params), strict=True)
    return treedef.unflatten(
        [
            jnp.where(_elements(*x), nothing(x[0]), x[0]) if _counts(x[0]) else x[0]
            for x in pairs
        ]
    )


def nothing(update: Any) -> Any:
    """Returns what added to a parameter leaves its bits as they are: 0.0 does not."""
    negative = jnp.issubdtype(jnp.result_type(update), jnp.inexact)
    return jnp.full_like(update, -0.0) if negative else jnp.zeros_like(update)


def _elements(update: Any, param: Any) -> jax.Array:
    bad = ~jnp.isfinite(update)
    if param is None:
        return bad
    with jax.numpy_dtype_promotion("standard"):  # as where they are added
        new = jnp.asarray(param + update).astype(jnp.result_type(param))
    return bad | (jnp.isfinite(param) & ~jnp.isfinite(new))


def _paired(updates: Any, params: Any) -> list[Any]:
    """Returns for each update its param, as far as there is one like it."""
    every, treedef = jax.tree.flatten(updates)
    if jax.tree.structure(params) != treedef:
        return [None] * len(every)
    return [
        param if _counts(param) and jnp.shape(param) == jnp.shape(update) else None
        for param, update in zip(jax.tree.leaves(params), every, strict=True)
    ]


def _fits(updates: Any, leaves: Leaves) -> bool:
    if isinstance(updates, optax.LookaheadParams):
        kinds = {jax.tree.structure(x) for x in (updates.fast, updates.slow)}
        return kinds == {leaves.treedef}
    return jax.tree.structure(updates) == leaves.treedef


def _strides(shape: tuple[int, ...], stack: _stacks.Stack | None) -> tuple[int, ...]:
    """Returns those of some elements of each layer, of all of a small one."""
    if stack is None:
        return slices.strides(shape, LOOKED_AT)
    i = stack.axis
    by = slices.strides(shape[:i] + shape[i + 1 :], LOOKED_AT)
    return *by[:i], 1, *by[i:]


def _counts(x: Any) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(x), jnp.inexact)) and np.size(x) > 0
