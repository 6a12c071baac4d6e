"""What to do about a norm, exactly: factors of any size, and one rounding."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from optaxclip._measure import scopes as _scopes, units as _units
from optaxclip._trees import infinity, leaves as _leaves

Factor = Callable[[jax.Array, jax.Array], jax.Array]


def scope_factors(
    factor: Factor, measured: _scopes.Measured, max_norms: _units.Packed
) -> tuple[_units.Packed, _units.Packed]:
    """Returns the factors in two parts: a power of two, to be applied twice, the rest.

    Where a factor is too small or too large for its dtype, it is computed for a
    threshold scaled up or down, and the updates are scaled the other way: a factor so
    small or so large is proportional to the threshold.
    """
    if _scopes.is_ours(factor):
        parts = functools.partial(_parts_once, factor)
    else:
        parts = functools.partial(_parts, factor)  # may have changed since
    pairs = jax.tree.map(parts, measured.norms, measured.powers, max_norms)
    return jax.tree.transpose(
        jax.tree.structure(measured.norms), jax.tree.structure((0, 0)), pairs
    )


def _parts(
    factor: Factor, norm: jax.Array, power: jax.Array, max_norm: jax.Array
) -> tuple[jax.Array, jax.Array]:
    one = jnp.ones_like(norm)
    plain, _ = _rest(factor, norm, power, one, max_norm)
    root = _root(plain, norm, power, max_norm)
    rest, scaled = _rest(factor, norm, power, root, max_norm)
    # NaN where the norm is not finite. A division comes last because the compiler
    # repeats anything cheaper in the kernel of every leaf.
    rest = rest / (1 + 0 * norm * scaled)
    pair = 1 / root, rest
    if not isinstance(norm, Tracer):
        return pair
    forms = {"cpu": _as_one_array}
    if not norm.ndim:  # a GPU then scales several leaves in one kernel
        forms["cuda"] = _as_one_array
    return jax.lax.platform_dependent(*pair, default=lambda *pair: pair, **forms)


def _as_one_array(*pair: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns both parts, which a CPU computes in one kernel if they are one array."""
    scale, rest = jax.lax.optimization_barrier(jnp.stack(pair))
    return scale, rest


_parts_once = jax.jit(_parts, static_argnums=0)


def _root(
    plain: jax.Array, norm: jax.Array, power: jax.Array, max_norm: jax.Array
) -> jax.Array:
    """Returns the root of a power of two for the threshold; updates get the inverse.

    So large only that what the updates lose to underflow would be lost in the product.
    Where the power is above 1, norms are so small that no factor underflows.
    """
    info = jnp.finfo(norm.dtype)
    half, full = 2.0 ** (info.maxexp // 4), 2.0 ** (info.maxexp // 2)
    loss = 2.0 ** (info.nmant + 2)
    one = jnp.ones_like(norm)
    reach = max_norm * (power * (half**2 * loss))
    up = jnp.where(reach < norm, half, one)
    up = jnp.where(reach < norm / half**2, full, up)
    is_tiny = (plain * (half**2 * loss) < 1) & (power <= 1)
    root = jnp.where(is_tiny, up, one)
    return jax.lax.stop_gradient(jnp.where(jnp.isinf(plain), 1 / full, root))


def _rest(
    factor: Factor,
    norm: jax.Array,
    power: jax.Array,
    root: jax.Array,
    max_norm: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Returns the factor of norms that are finite, and of which threshold it is."""
    info = jnp.finfo(norm.dtype)
    one = jnp.ones_like(norm)
    # Both go down where the power would take a large threshold out of the range.
    large = 2.0 ** (3 * info.maxexp // 4)
    down = jnp.where(max_norm * power > large, 2.0 ** -(info.maxexp // 2), one)
    scaled = jnp.minimum((max_norm * down * root) * (power * root), info.max)
    rest = factor(jnp.where(norm == 0, 1, norm * down), scaled)
    if not _leaves.is_numeric(rest) or jnp.shape(rest) not in ((), norm.shape):
        raise TypeError(
            f"Expected a factor that returns an array like the norms, {norm}, got"
            f" {rest!r}. Use `factors.rescale` or another function of norms and"
            " thresholds."
        )
    rest = jnp.where((norm == 0) | infinity.is_infinite(max_norm), 1, rest)
    return rest, scaled


@jax.jit
def total(scale: jax.Array, rest: jax.Array) -> jax.Array:
    """Returns a factor, given its two parts."""
    return infinity.replaced(scale * scale * rest)


def multiplied(
    leaves: _leaves.Leaves,
    scopes: Sequence[_units.Scope],
    scales: _units.Packed,
    rests: _units.Packed,
    untouched: frozenset[int] = frozenset(),
) -> Any:
    """Returns the updates times their factors, untouched where the factor is 1.

    So are those leaves that are named by their places among the counted ones.
    """
    factors = _units.of_leaf_together((scales, rests), scopes, leaves)
    every = zip(leaves.counted, factors, strict=True)
    products = [_times(leaves.leaves[i], leaves.dtype, *row) for i, row in every]
    return leaves.replaced(products, untouched)


@functools.partial(jax.jit, static_argnums=1)
def _times(leaf: Any, dtype: Any, scale: jax.Array, rest: jax.Array) -> jax.Array:
    """Returns the product; traced once for all leaves of one shape."""
    untouched = scale * scale * rest == 1
    wide = _leaves.widen(leaf, dtype)
    product = _leaves.narrow(wide * scale * scale * rest, leaf)
    leaf = jnp.asarray(leaf, product.dtype)
    # Where it can be had, `select`: it is quicker to trace and compile than `where`.
    choose = jnp.where if untouched.ndim else jax.lax.select
    return choose(untouched, leaf, product)
