"""Is what comes out of an optimizer finite: its updates, and the params they make?

An element is broken where its update is not finite, or where it makes of a finite
parameter one that is not. A parameter that was not finite before is no fault of this
update's.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optaxclip import _mesh
from optaxclip._leaves import Leaves

# Of each leaf so many elements decide on the whole step: these are computed twice.
LOOKED_AT = 1024


def like_updates(params: Any) -> Any:
    """Returns those of the params that the gradients are of."""
    return params.fast if isinstance(params, optax.LookaheadParams) else params


def broken(updates: Any, params: Any, leaves: Leaves) -> jax.Array:
    """Returns for each counted leaf that came in whether something of it broke.

    Args:
      updates: what came out.
      params: those that they will be added to, or None.
      leaves: what came in.

    Returns:
      Booleans, the same on all devices, and one more at their end, for leaves that did
      not come in.
    """
    places = {i: place for place, i in enumerate(leaves.counted)}
    rest = len(leaves.counted)
    fits = _fits(updates, leaves)
    found: dict[int, list[tuple[int, jax.Array]]] = {}
    every = zip(jax.tree.leaves(updates), _paired(updates, params), strict=True)
    for i, (update, param) in enumerate(every):
        if _counts(update):
            place = places.get(i % len(leaves.leaves), rest) if fits else rest
            flags = _looked_at(update, param)
            found.setdefault(flags.size, []).append((place, flags))
    flags, own = [], []
    for some in found.values():  # one kernel for all of one size
        flags.append(jnp.any(jnp.stack([x for _, x in some]), axis=1))
        own += [place for place, _ in some]
    if not flags:
        return jnp.zeros(rest + 1, bool)
    is_own = np.arange(rest + 1)[:, None] == np.array(own)
    flags = jnp.any(is_own & jnp.concatenate(flags), axis=1)
    manual = frozenset(jax.sharding.get_abstract_mesh().manual_axes)
    return _mesh.anywhere(flags, manual)


def _looked_at(update: Any, param: Any) -> jax.Array:
    """Returns which elements broke, of those that decide."""
    if not _mesh.is_local(jnp.asarray(update)):
        return jnp.any(_elements(update, param))[None]
    return _elements(_sample(update), None if param is None else _sample(param))


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


def _sample(x: Any) -> jax.Array:
    """Returns all elements of a small leaf, and some of a large one, evenly spread."""
    flat = jnp.reshape(x, -1)
    return flat[:: max(1, math.ceil(flat.size / LOOKED_AT))]


def _counts(x: Any) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(x), jnp.inexact)) and np.size(x) > 0
