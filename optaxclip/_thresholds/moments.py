"""Running means of what may be as large or as small as its dtype allows.

Second moments are kept by their roots, for a square may leave the range. A mean moves
by a change: a factor close to 1 has the same rounding error at every step, and over
thousands of steps these add up.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optaxclip._measure import reduce


def newest_weight(count: jax.Array, decay: ArrayLike, dtype: Any) -> jax.Array:
    """Returns the weight of the newest of ``count`` norms, if theirs decay with age.

    By ``expm1`` and ``log1p``, for ``1 - decay**count`` would lose its digits.
    """
    return _newest_weight(count, jnp.asarray(1 - decay, dtype))


@jax.jit
def _newest_weight(count: jax.Array, share: jax.Array) -> jax.Array:
    faded = -jnp.expm1(count.astype(share.dtype) * jnp.log1p(-share))
    return jnp.where(count == 1, 1, share / faded)


def mean(old: jax.Array, new: jax.Array, weight: jax.Array) -> jax.Array:
    """Returns ``(1 - weight) * old + weight * new``; that of equals is exactly they.

    By their difference, which is 0 then, however the compiler rounds. It is taken of
    the halves where it could overflow.
    """
    top = jax.lax.stop_gradient(jnp.maximum(jnp.abs(old), jnp.abs(new)))
    half = jnp.where(top > jnp.finfo(top.dtype).max / 2, 0.5, 1).astype(top.dtype)
    is_near = weight < 0.5
    step = jnp.where(is_near, weight, weight - 1) / half
    return jnp.where(is_near, old, new) + step * (half * new - half * old)


def root_mean_square(old: jax.Array, new: jax.Array, weight: jax.Array) -> jax.Array:
    """Returns ``sqrt((1 - weight) * old**2 + weight * new**2)``, not negative.

    Of arrays that are not negative.
    """
    top = jax.lax.stop_gradient(jnp.maximum(old, new))
    unit = jnp.where(top > 0, top, 1)
    x, y = reduce.over(old, unit), reduce.over(new, unit)
    about = reduce.root((1 - weight) * x**2 + weight * y**2, 2)
    is_near = weight < 0.5
    near = jnp.where(is_near, x, y)
    change = jnp.where(is_near, weight, weight - 1) * (y - x) * (y + x)
    total = jnp.where(about + near > 0, about + near, 1)
    return jnp.where(is_near, old, new) + unit * (change / total)


def root_of_squares(x: jax.Array) -> jax.Array:
    """Returns the norm along the first axis, which no square takes out of range."""
    top = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=0))
    unit = jnp.where(top > 0, top, 1)
    squares = jnp.sum((x / unit[None]) ** 2, axis=0)
    return unit * jnp.where(top > 0, jnp.sqrt(jnp.where(top > 0, squares, 1)), 0)


def places(ring: jax.Array) -> jax.Array:
    """Returns the place of every norm in a window, its first axis."""
    return jnp.arange(ring.shape[0]).reshape((-1,) + (1,) * (ring.ndim - 1))
