"""Norms that neither overflow nor underflow, one for each scope.

A norm is positively homogeneous, ``norm(c u) = |c| norm(u)``. So where the plain
formula leaves the range of its dtype (squares do above 1.8e19 in float32), a copy of
the updates scaled by a power of two is measured instead, and the power is kept beside
the norm. This needs to know nothing about the norm, so a user's own is rescued just
like a built-in one.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from optaxclip._measure import names as _names
from optaxclip._measure.units import EVERYTHING, Packed, Scope
from optaxclip._mesh import collectives, splits as _splits
from optaxclip._trees import infinity
from optaxclip._trees.leaves import Leaves

Norm = Callable[[Any], Any]  # updates -> norms, a tree prefix of the updates


class Plain(NamedTuple):
    """What a plain formula gives, which over- and underflows.

    Attributes:
      norms: of all scopes.
      scopes: which those are.
      scaled: function from a power of two to the norms of the updates times that.
      axes: the mesh axes over which the norms differ, as those of units may.
      names: function to those of the scopes, where they aren't those of the leaves.
    """

    norms: Packed
    scopes: tuple[Scope, ...]
    scaled: Callable[[float], Packed]
    axes: _splits.Axes = frozenset()
    names: Callable[[], _names.Names] = tuple


Formula = Callable[[Any, _splits.Splits], Plain]  # of updates, and how they are split


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Measured:
    """The norms of the updates times a power of two, and that power, of all scopes.

    The norm itself is their quotient. It differs from device to device over the mesh
    axes ``axes``.
    """

    norms: Packed
    powers: Packed
    scopes: tuple[Scope, ...] = dataclasses.field(metadata={"static": True})
    axes: _splits.Axes = dataclasses.field(metadata={"static": True})

    def sizes(self) -> Packed:
        """Returns the norms themselves; one beyond the range by its stand-in."""
        return jax.tree.map(_size, self.norms, self.powers)


def measure(
    formula: Formula, leaves: Leaves, splits: _splits.Splits | None = None
) -> Measured:
    """Measures every scope of the updates, exactly."""
    updates = leaves.tree(leaves.measured())
    if splits is None:
        splits = _splits.splits(leaves)
    measured = _measured_once if is_ours(formula) else _measured
    return measured(formula, splits, updates, jnp.dtype(leaves.dtype))


def is_ours(function: Any) -> bool:
    """Returns whether a function is made of this library's alone.

    Such a one is traced once. What a user wrote may read a variable that has changed
    since, and need not have a hash.
    """
    if isinstance(function, functools.partial):
        parts = (function.func, *function.args, *function.keywords.values())
        return all(is_ours(part) for part in parts if callable(part))
    return str(getattr(function, "__module__", "")).partition(".")[0] == "optaxclip"


def zeros(formula: Formula, leaves: Leaves) -> Measured:
    """Returns norms of zero, of the shapes and types of the real ones.

    Inside ``shard_map`` the type says over which axes a value varies, so there they are
    made from norms.
    """
    if jax.sharding.get_abstract_mesh().manual_axes:
        return jax.tree.map(jnp.zeros_like, measure(formula, leaves))
    splits = (_splits.WHOLE,) * len(leaves.counted)
    updates = leaves.tree(leaves.abstract())
    shapes = jax.eval_shape(
        lambda u: unscaled(formula(u, splits), leaves.dtype), updates
    )
    return jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)


def names(formula: Formula, leaves: Leaves) -> _names.Names | None:
    """Returns the names of all scopes, None of a scope of all leaves."""
    splits, found = _splits.splits(leaves), []
    if jax.sharding.get_abstract_mesh().manual_axes:
        found.append(formula(leaves.tree(leaves.measured()), splits))
    else:
        updates = leaves.tree(leaves.abstract())
        jax.eval_shape(lambda u: found.append(formula(u, splits)), updates)
    (plain,) = found
    if EVERYTHING in plain.scopes:
        return None
    return plain.names() or _names.of_scopes(plain.scopes, leaves.paths())


def single(size: jax.Array, dtype: Any) -> Measured:
    """Returns one number that is not a norm as if it were the global one."""
    size = jnp.asarray(size, dtype)
    return Measured(size, jnp.ones_like(size), (EVERYTHING,), frozenset())


def _measured(
    formula: Formula, splits: _splits.Splits, updates: Any, dtype: Any
) -> Measured:
    """One pass, and a rare second one on CPU; elsewhere three norms in one pass.

    On a GPU a branch costs a round trip to the host, and on a TPU the compiler's
    fusions; on a CPU three accumulators cost three passes.
    """
    plain = formula(updates, splits)
    norms = unscaled(plain, dtype).norms
    if not plain.scopes:
        return unscaled(plain, dtype)
    powers = jax.tree.map(_power, norms)
    small, large = _ends(dtype)

    def scaled(scale: float) -> Packed:
        return jax.tree.map(lambda x: jnp.asarray(x, dtype), plain.scaled(scale))

    def anywhere(conditions: list[jax.Array]) -> jax.Array:
        # All devices take one branch, for there are collectives in it.
        return collectives.anywhere(_anywhere(conditions), plain.axes)

    needed = anywhere([p != 1 for p in jax.tree.leaves(powers)])

    def picked(at: Callable[[float, jax.Array], Packed]) -> Packed:
        down = at(small, anywhere([p < 1 for p in jax.tree.leaves(powers)]))
        up = at(large, anywhere([p > 1 for p in jax.tree.leaves(powers)]))
        return jax.tree.map(_pick, powers, norms, down, up)

    def if_needed(end: float, needed: jax.Array) -> Packed:
        return _cond(needed, lambda: scaled(end), lambda: norms)

    def always(end: float, needed: jax.Array) -> Packed:
        del needed
        return scaled(end)

    def rarely(needed: jax.Array) -> Packed:
        return _cond(needed, lambda: picked(if_needed), lambda: norms)

    exact = (
        jax.lax.platform_dependent(
            needed, cpu=rarely, default=lambda needed: picked(always)
        )
        if isinstance(needed, Tracer)
        else rarely(needed)
    )
    return Measured(exact, powers, plain.scopes, plain.axes)


_measured_once = jax.jit(_measured, static_argnums=(0, 1, 3), inline=True)


def _cond(
    condition: jax.Array, if_true: Callable[[], Any], if_false: Callable[[], Any]
) -> Any:
    """Takes one of two branches; of what is not traced, without compiling them."""
    if isinstance(condition, Tracer):
        return jax.lax.cond(condition, if_true, if_false)
    return if_true() if condition else if_false()


@jax.jit
def _size(norm: jax.Array, power: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(norm), infinity.replaced(norm / power), norm)


def unscaled(plain: Plain, dtype: Any) -> Measured:
    """Returns plain norms that need no rescue."""
    norms = jax.tree.map(lambda x: jnp.asarray(x, dtype), plain.norms)
    powers = jax.tree.map(jnp.ones_like, norms)
    return Measured(norms, powers, plain.scopes, plain.axes)


@jax.custom_batching.custom_vmap
def _anywhere(conditions: list[jax.Array]) -> jax.Array:
    """Returns whether a condition holds, one answer for the whole batch under `vmap`.

    With an answer for each example a `cond` would run both of its branches.
    """
    return functools.reduce(jnp.logical_or, map(jnp.any, conditions))


@_anywhere.def_vmap
def _anywhere_in_batch(
    size: int, batched: Any, conditions: list[jax.Array]
) -> tuple[jax.Array, bool]:
    del size, batched
    return _anywhere(conditions), False


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
