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
from typing import Any

import jax
import jax.numpy as jnp

from optaxclip._measure import forms, layouts, names as _names
from optaxclip._measure.units import EVERYTHING, Packed, Scope
from optaxclip._mesh import collectives, splits as _splits
from optaxclip._trees import infinity
from optaxclip._trees.leaves import Leaves

Norm = Callable[[Any], Any]  # updates -> norms, a tree prefix of the updates


Formula = Callable[
    [Any, _splits.Splits], forms.Plain
]  # of updates, and how they are split


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
    on_gpu = layouts.on_gpu(leaves)
    return measured(formula, splits, updates, jnp.dtype(leaves.dtype), on_gpu)


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
    if collectives.manual_axes():
        return jax.tree.map(jnp.zeros_like, measure(formula, leaves))
    splits = (_splits.WHOLE,) * len(leaves.counted)
    updates = leaves.tree(leaves.abstract())

    def plain(updates: Any) -> Measured:
        found = formula(updates, splits)
        return unscaled(found.norms(updates), found.scopes, leaves.dtype, found.axes)

    shapes = jax.eval_shape(plain, updates)
    return jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)


def names(formula: Formula, leaves: Leaves) -> _names.Names | None:
    """Returns the names of all scopes, None of a scope of all leaves."""
    splits, found = _splits.splits(leaves), []
    if collectives.manual_axes():
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
    formula: Formula,
    splits: _splits.Splits,
    updates: Any,
    dtype: Any,
    on_gpu: layouts.Layout,
) -> Measured:
    plain = formula(updates, splits)
    if not plain.scopes:
        return unscaled(plain.norms(updates), (), dtype)
    if is_ours(formula):
        exact = forms.ours_on_any_platform(formula, splits, updates, dtype, on_gpu)
    else:
        exact = forms.on_any_platform(plain, updates, dtype)
    norms, powers = exact
    return Measured(norms, powers, plain.scopes, plain.axes)


_measured_once = jax.jit(_measured, static_argnums=(0, 1, 3, 4), inline=True)


@jax.jit
def _size(norm: jax.Array, power: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(norm), infinity.replaced(norm / power), norm)


def unscaled(
    norms: Packed,
    scopes: tuple[Scope, ...],
    dtype: Any,
    axes: _splits.Axes = frozenset(),
) -> Measured:
    """Returns plain norms that need no rescue."""
    norms = jax.tree.map(lambda x: jnp.asarray(x, dtype), norms)
    return Measured(norms, jax.tree.map(jnp.ones_like, norms), scopes, axes)
