"""What to do about a norm, exactly: factors of any size, and one rounding."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optaxclip import _leaves, _scopes, _units

Factor = Callable[[jax.Array, jax.Array], jax.Array]


def scope_factors(
    factor: Factor, measured: _scopes.Measured, max_norms: _units.Packed
) -> tuple[_units.Packed, _units.Packed]:
    """Returns the factors in two parts each, a power of two and the rest.

    Where a factor is too small for its dtype, it is computed for a threshold scaled up,
    and the updates are scaled down: a factor so small is proportional to the threshold.
    """
    norms, powers = measured.norms, measured.powers
    rest = functools.partial(_rest, factor)
    ones = jax.tree.map(jnp.ones_like, norms)
    plain = jax.tree.map(rest, norms, powers, ones, max_norms)
    ups = jax.tree.map(_up, plain, norms, powers, max_norms)
    rests = jax.tree.map(rest, norms, powers, ups, max_norms)
    return jax.tree.map(jnp.reciprocal, ups), rests


@jax.jit
def _up(
    plain: jax.Array, norm: jax.Array, power: jax.Array, max_norm: jax.Array
) -> jax.Array:
    """Returns a power of two for the threshold, of which the updates get the inverse.

    So large only that what the updates lose to underflow would be lost in the product.
    Where the power is above 1, norms are so small that no factor underflows.
    """
    info = jnp.finfo(norm.dtype)
    half, full = 2.0 ** (info.maxexp // 2), 2.0 ** (info.maxexp - 2)
    loss = 2.0 ** (info.nmant + 2)
    one = jnp.ones_like(norm)
    reach = max_norm * (power * (half * loss))
    up = jnp.where(reach < norm, half, one)
    up = jnp.where(reach < norm * (half / full), full, up)
    is_tiny = (plain * (half * loss) < 1) & (power <= 1)
    return jax.lax.stop_gradient(jnp.where(is_tiny, up, one))


@functools.partial(jax.jit, static_argnums=0)
def _rest(
    factor: Factor,
    norm: jax.Array,
    power: jax.Array,
    up: jax.Array,
    max_norm: jax.Array,
) -> jax.Array:
    info = jnp.finfo(norm.dtype)
    one = jnp.ones_like(norm)
    # Both go down where the power would take a large threshold out of the range.
    large = 2.0 ** (3 * info.maxexp // 4)
    down = jnp.where(max_norm * power > large, 2.0 ** -(info.maxexp // 2), one)
    scaled = jnp.minimum((max_norm * down) * (power * up), info.max)
    rest = factor(jnp.where(norm == 0, 1, norm * down), scaled)
    rest = jnp.where((norm == 0) | jnp.isinf(max_norm), 1, rest)
    # NaN where the norm is not finite. A division comes last because the compiler
    # repeats anything cheaper in the kernel of every leaf.
    return rest / (1 + 0 * norm * scaled)


def multiplied(
    leaves: _leaves.Leaves,
    scopes: Sequence[_units.Scope],
    scales: _units.Packed,
    rests: _units.Packed,
) -> Any:
    """Returns the updates times their factors, untouched where the factor is 1."""
    columns = [
        _units.of_leaf(packed, scopes, len(leaves.counted))
        for packed in (scales, rests)
    ]
    every = zip(leaves.counted, *columns, strict=True)
    return leaves.replaced(
        [_times(leaves.leaves[i], leaves.dtype, *row) for i, *row in every]
    )


def _times(leaf: Any, dtype: Any, scale: jax.Array, rest: jax.Array) -> jax.Array:
    untouched = scale * rest == 1
    product = _leaves.narrow(_leaves.widen(leaf, dtype) * scale * rest, leaf)
    leaf = jnp.asarray(leaf, product.dtype)
    # Where it can be had, `select`: it is quicker to trace and compile than `where`.
    choose = jnp.where if untouched.ndim else jax.lax.select
    return choose(untouched, leaf, product)
