"""What stands for infinity where none may be: in a state, and in what becomes one.

Wrappers blend states by arithmetic, ``(1 - b) * x + b * y``, and zero times infinity is
NaN; and ``jax.debug_infs`` takes every infinity for a fault. So "no threshold", and a
norm beyond the range, are a number a millionth below the largest of its dtype: room for
the rounding of a blend.
"""

from typing import Any

import jax
import jax.numpy as jnp


def stand_in(dtype: Any) -> float:
    """Returns the number that stands for infinity."""
    return float(jnp.finfo(dtype).max) * (1 - 2.0**-20)


def full_like(x: Any, **options: Any) -> jax.Array:
    """Returns an array of these, of the shape and type of ``x``."""
    return jnp.full_like(x, stand_in(jnp.result_type(x)), **options)


def is_infinite(x: Any) -> Any:
    """Returns where a number is infinite, or stands for it; NaN is neither."""
    return x >= float(jnp.finfo(x.dtype).max) * (1 - 2.0**-19)


@jax.jit
def replaced(x: jax.Array) -> jax.Array:
    """Returns ``x`` as a state keeps it: what is infinite replaced, a NaN as it is."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    largest = stand_in(x.dtype)
    return jnp.clip(x, -largest, largest)
