"""Norms that neither overflow nor underflow, one for each scope.

A norm is positively homogeneous, ``norm(c u) = |c| norm(u)``. So where the plain
formula leaves the range of its dtype (squares do above 1.8e19 in float32), a copy of
the updates scaled by a power of two is measured instead, and the power is kept beside
the norm. This needs to know nothing about the norm, so a user's own is rescued just
like a built-in one.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip._leaves import Leaves

Norm = Callable[[Any], Any]  # updates -> norms, a tree prefix of the updates
Scope = tuple[int, ...]  # positions of its leaves among the counted ones
Scopes = dict[Scope, jax.Array]
EVERYTHING: Scope = ()  # of a bare scalar, which covers every leaf


class Measured(NamedTuple):
    """The norms of the updates times a power of two, and that power, for every scope.

    The norm itself is their quotient, infinite where its dtype cannot hold it.

    Attributes:
      norms: by scope, for the updates to be multiplied by.
      powers: by scope.
      packed_norms: the same for all scopes at once, for rules and the state.
      packed_powers: likewise.
    """

    norms: Scopes
    powers: Scopes
    packed_norms: Any
    packed_powers: Any

    def packed(self) -> Any:
        """Returns the norms of all scopes, as rules see them."""
        return jax.tree.map(jnp.divide, self.packed_norms, self.packed_powers)


def measure(norm: Norm, leaves: Leaves) -> Measured:
    """Measures every scope of the updates, exactly."""
    updates = leaves.tree(leaves.measured())
    norms, powers, packed_powers = _measure(norm, updates, jnp.dtype(leaves.dtype))
    return Measured(norms, powers, pack(norms, leaves.dtype), packed_powers)


def exact(norm: Norm, leaves: Leaves) -> Scopes:
    """Returns the norm of every scope."""
    measured = measure(norm, leaves)
    return jax.tree.map(jnp.divide, measured.norms, measured.powers)


def zeros(norm: Norm, leaves: Leaves) -> Scopes:
    """Returns a zero for every scope, of the shape and type of its norm.

    Inside ``shard_map`` the type says over which axes a value varies, so there it is
    made from a norm.
    """
    if jax.sharding.get_abstract_mesh().manual_axes:
        return jax.tree.map(jnp.zeros_like, measure(norm, leaves).norms)
    shapes = jax.eval_shape(
        lambda updates: _by_scope(norm, updates, None, leaves.dtype),
        leaves.tree(leaves.abstract()),
    )
    return jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)


def of_leaf(scopes: dict[tuple[int, ...], Any], count: int) -> list[Any]:
    """Returns for each of ``count`` leaves what ``scopes`` holds for its scope."""
    if EVERYTHING in scopes:
        return [scopes[EVERYTHING]] * count
    return [x for _, x in sorted((i, x) for scope, x in scopes.items() for i in scope)]


def pack(scopes: Scopes, dtype: Any) -> Any:
    """Returns what rules see: a scalar if global, a vector, a list for units."""
    values = list(scopes.values())
    if EVERYTHING in scopes:
        return values[0]
    if any(value.ndim for value in values):
        return values
    if not values:
        return jnp.zeros((0,), dtype)
    distinct = {id(value): value for value in values}
    stacked = jnp.stack(list(distinct.values()))
    if len(distinct) == len(values):
        return stacked
    places = {key: i for i, key in enumerate(distinct)}  # one constant, say, for all
    return stacked[np.array([places[id(value)] for value in values])]


def unpack(packed: Any, scopes: Sequence[Scope]) -> Scopes:
    """Inverts `pack`."""
    if EVERYTHING in scopes:
        return {EVERYTHING: packed}
    return {scope: packed[i] for i, scope in enumerate(scopes)}


@functools.partial(jax.jit, static_argnums=(0, 2), inline=True)
def _measure(norm: Norm, updates: Any, dtype: Any) -> tuple[Scopes, Scopes, Any]:
    """One pass, and a rare second one on CPU; elsewhere three norms in one pass.

    On a GPU a branch costs a round trip to the host, and on a TPU the compiler's
    fusions; on a CPU three accumulators cost three passes.
    """
    ends = _ends(dtype)

    def two_passes(plain: Scopes, powers: Scopes, fits: jax.Array) -> Scopes:
        return jax.lax.cond(
            fits, lambda: plain, lambda: _by_scope(norm, updates, powers, dtype)
        )

    def one_pass(plain: Scopes, powers: Scopes, fits: jax.Array) -> Scopes:
        del fits
        everywhere = [dict.fromkeys(plain, jnp.asarray(end, dtype)) for end in ends]
        scaled = [_by_scope(norm, updates, power, dtype) for power in everywhere]
        return jax.tree.map(_pick, powers, plain, *scaled)

    plain = _by_scope(norm, updates, None, dtype)
    if not plain:
        return plain, plain, pack(plain, dtype)
    powers = jax.tree.map(_power, plain)
    packed = jax.tree.map(_power, pack(plain, dtype))
    fits = _everywhere([power == 1 for power in jax.tree.leaves(packed)])
    norms = jax.lax.platform_dependent(
        plain, powers, fits, cpu=two_passes, default=one_pass
    )
    return norms, powers, packed


@jax.custom_batching.custom_vmap
def _everywhere(conditions: list[jax.Array]) -> jax.Array:
    """Returns whether all conditions hold, one answer for the whole batch under `vmap`.

    With an answer for each example a `cond` would run both of its branches.
    """
    return functools.reduce(jnp.logical_and, map(jnp.all, conditions))


@_everywhere.def_vmap
def _everywhere_in_batch(
    size: int, batched: Any, conditions: list[jax.Array]
) -> tuple[jax.Array, bool]:
    del size, batched
    return _everywhere(conditions), False


def _ends(dtype: Any) -> tuple[float, float]:
    """Powers of two under which no square of a normal number leaves the range."""
    exponent = jnp.finfo(dtype).maxexp
    return 2.0 ** -(3 * exponent // 4), 2.0 ** (5 * exponent // 8)


@jax.jit
def _power(plain: jax.Array) -> jax.Array:
    """Returns what the updates of a scope have to be multiplied by to be measured."""
    down, up = _ends(plain.dtype)
    low = 2.0 ** (1 - jnp.finfo(plain.dtype).maxexp // 4)  # squares lose elements below
    one = jnp.ones_like(plain)
    power = jnp.where(jnp.isfinite(plain), one, down * one)
    return jax.lax.stop_gradient(jnp.where(plain < low, up * one, power))


@jax.jit
def _pick(
    power: jax.Array, plain: jax.Array, down: jax.Array, up: jax.Array
) -> jax.Array:
    return jnp.where(power > 1, up, jnp.where(power < 1, down, plain))


def _by_scope(norm: Norm, updates: Any, powers: Scopes | None, dtype: Any) -> Scopes:
    leaves, treedef = jax.tree.flatten(updates)
    if powers is not None:
        leaves = [
            x * p for x, p in zip(leaves, of_leaf(powers, len(leaves)), strict=True)
        ]
    return _sorted(norm(treedef.unflatten(leaves)), treedef, dtype)


def given(norms: Any, leaves: Leaves) -> Scopes:
    """Sorts norms that somebody else measured by scope."""
    holes = jax.tree.structure(leaves.tree(leaves.counted))
    return _sorted(norms, holes, leaves.dtype)


def _sorted(norms: Any, treedef: Any, dtype: Any) -> Scopes:
    """Sorts norms by scope.

    Leaves that are given the very same scalar are one scope: so a norm of groups says
    which leaves belong together without saying anything.
    """
    if jax.tree.structure(norms) == jax.tree.structure(0.0) and jnp.ndim(norms) == 0:
        return {EVERYTHING: jnp.asarray(norms, dtype)}
    skeleton = treedef.unflatten(range(treedef.num_leaves))
    try:
        values = jax.tree.leaves(jax.tree.broadcast(norms, skeleton))
    except ValueError as error:
        raise ValueError(
            "Expected norms that are a tree prefix of the updates (a scalar, or a"
            f" tree of scalars), got {jax.tree.structure(norms)} for updates {treedef}."
        ) from error
    members: dict[int, list[int]] = {}
    for position, value in enumerate(values):
        members.setdefault(id(value), []).append(position)
    return {
        tuple(positions): jnp.asarray(values[positions[0]], dtype)
        for positions in members.values()
    }
