"""By which power of two are updates multiplied, so that their norm is in range?"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from optaxclip._mesh import collectives

Pair = tuple[jax.Array, jax.Array]


def ends(dtype: Any) -> tuple[float, float]:
    """Powers of two under which no square of a normal number leaves the range."""
    exponent = jnp.finfo(dtype).maxexp
    return 2.0 ** -(3 * exponent // 4), 2.0 ** (5 * exponent // 8)


@jax.jit
def of(plain: jax.Array) -> jax.Array:
    """Returns what the updates of a scope have to be multiplied by to be measured."""
    down, up = ends(plain.dtype)
    low = 2.0 ** (1 - jnp.finfo(plain.dtype).maxexp // 4)  # squares lose elements below
    one = jnp.ones_like(plain)
    power = jnp.where(jnp.isfinite(plain), one, down * one)
    return jax.lax.stop_gradient(jnp.where(plain < low, up * one, power))


@jax.jit
def of_double(norm: jax.Array) -> jax.Array:
    """The same of a norm in float64, with which no float32 has come near an end."""
    down, up = ends(jnp.float32)
    one = jnp.ones_like(norm)
    power = jnp.where(norm > 2.0**60, down * one, one)
    return jnp.where(norm < 2.0**-30, up * one, power)


@jax.jit
def pick(
    power: jax.Array, plain: jax.Array, down: jax.Array, up: jax.Array
) -> jax.Array:
    return jnp.where(power > 1, up, jnp.where(power < 1, down, plain))


@jax.custom_batching.custom_vmap
def anywhere(powers: list[jax.Array]) -> Pair:
    """Returns whether any is below 1, and above, one answer for the whole batch.

    With one for each example of a `vmap` a `cond` would run both of its branches.
    """
    return functools.reduce(_either, map(_found, powers))


@anywhere.def_vmap
def _in_batch(
    size: int, batched: Any, powers: list[jax.Array]
) -> tuple[Pair, tuple[bool, bool]]:
    del size, batched
    return anywhere(powers), (False, False)


def _found(powers: jax.Array) -> Pair:
    below, above = powers < 1, powers > 1
    if not collectives.is_local(powers):  # a look at both would gather them
        return jnp.any(below), jnp.any(above)
    # In one look, for a CPU takes long to compile what reduces to one number.
    axes = tuple(range(powers.ndim))
    return tuple(jax.lax.reduce((below, above), (False, False), _either, axes))


def _either(some: Any, others: Any) -> Pair:
    return some[0] | others[0], some[1] | others[1]
