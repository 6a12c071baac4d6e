"""From arrays to the norm of each scope: the sums of powers behind every norm."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip._measure import layouts, totals
from optaxclip._measure.layouts import Piece

Scale = float | jax.Array
Combine = Callable[..., jax.Array]  # jnp.sum or jnp.max
_STATIC = ("scale", "ord", "combine", "axes", "keepdims")


def scaled(x: jax.Array, scale: Scale, square: bool = False) -> jax.Array:
    """Returns ``x * scale``, in a form that the compiler leaves alone when squared.

    Where it knows enough of ``x`` (a constant, a single element) it would otherwise
    compute ``x**2 * scale**2``, which is 0 times infinity.

    Where the square will be taken the modulus will do, and a large number for an
    infinity or, on a CPU, a NaN: so a CPU squares and sums in one loop, where it would
    keep a copy of ``x`` otherwise. The scale is a power of two; an array is one that
    the compiler does not know.
    """
    if isinstance(scale, float) and scale == 1:
        return x
    if _is_complex(x):
        parts = scaled(x.real, scale, square), scaled(x.imag, scale, square)
        return jax.lax.complex(*parts)
    largest = jnp.finfo(x.dtype).max
    if square:
        return jnp.minimum(jax.lax.abs(x) * scale, largest)
    product = jnp.clip(x * scale, -largest, largest)
    return jnp.where(jnp.isinf(x), x, product)


def norms(
    pieces: Sequence[Piece],
    scale: Scale,
    count: int,
    ord: float,
    layout: layouts.Layout,
) -> jax.Array:
    """Returns the norms of the scopes 0, 1, ... times ``scale``, one vector.

    Args:
      pieces: of all scopes.
      scale: a power of two.
      count: how many scopes there are.
      ord: p of the norm.
      layout: how sums of rows are joined.
    """
    pieces, scale = scaled_at_once(pieces, scale, ord)
    total = functools.partial(gathered, count=count, layout=layout)
    if ord == 1:
        return total(pieces, scale, ord, jnp.sum)
    if ord == 2:
        return root(total(pieces, scale, ord, jnp.sum), 2)
    largest = total(pieces, scale, ord, jnp.max)
    if ord == jnp.inf:
        return largest
    units = unit(largest)
    pieces = [p._replace(array=scaled(p.array, scale)) for p in pieces]
    shrunk = [p._replace(array=over(p.array, _rows(units, p))) for p in pieces]
    return units * root(total(shrunk, 1.0, ord, jnp.sum), ord)


def scaled_at_once(some: Sequence[Any], scale: Scale, ord: float) -> tuple[Any, float]:
    """Scales pieces or leaves at once if the compiler does not know the scale.

    By a number of its own each: one that all share would be an array, and written.
    """
    if isinstance(scale, float):
        return some, scale
    each = jax.lax.optimization_barrier([scale] * len(some))
    pairs = zip(some, each, strict=True)
    return [x._replace(array=scaled(x.array, y, ord == 2)) for x, y in pairs], 1.0


def square(x: jax.Array) -> jax.Array:
    """Returns the square of the modulus, real."""
    if _is_complex(x):
        return jax.lax.square(x.real) + jax.lax.square(x.imag)
    return jax.lax.square(x)


def root(x: jax.Array, ord: float) -> jax.Array:
    """Returns ``x ** (1 / ord)``, with derivative 0 at 0."""
    zero, one = x == 0, jax.lax.full_like(x, 1)
    positive = jax.lax.select(zero, one, x)
    found = jax.lax.sqrt(positive) if ord == 2 else positive ** (1 / ord)
    return jax.lax.select(zero, x, found)


def _modulus(x: jax.Array) -> jax.Array:
    return root(square(x), 2) if _is_complex(x) else jax.lax.abs(x)


def _is_complex(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.complexfloating)


def unit(largest: jax.Array) -> jax.Array:
    """What to measure in, so that no power of a modulus overflows or underflows."""
    usable = jnp.isfinite(largest) & (largest > 0)
    return jax.lax.stop_gradient(jnp.where(usable, largest, 1))


def over(x: jax.Array, unit: jax.Array) -> jax.Array:
    """Returns ``x / unit`` also where the compiler's ``1 / unit`` would underflow."""
    quarter = jnp.where(unit > 1, 0.25, jnp.ones_like(unit))
    return (x * quarter) / (unit * quarter)


def _rows(values: jax.Array, piece: Piece) -> jax.Array:
    """Returns each row's entry of ``values``, which has one for each scope."""
    # A place that the compiler knows would make the kernel of every leaf another one.
    rows = values[jax.lax.optimization_barrier(np.array(piece.scopes, np.int32))]
    rows = piece.stack.own(rows) if piece.stack else rows
    return rows.reshape((-1,) + (1,) * (piece.array.ndim - 1))


def gathered(
    pieces: Sequence[Piece],
    scale: float,
    ord: float,
    combine: Combine,
    *,
    count: int,
    layout: layouts.Layout,
) -> jax.Array:
    """Combines the powers of the elements by scope, over devices too."""
    parts = [
        p._replace(array=combined(p.array, scale, ord, combine, layouts.first(p)))
        for p in pieces
    ]
    return totals.by_scope(parts, count, combine, layout)


def combined(
    x: jax.Array,
    scale: float,
    ord: float,
    combine: Combine,
    axes: tuple[int, ...],
    keepdims: bool = False,
) -> jax.Array:
    """Combines the powers of ``x * scale``."""
    if ord == 2 and scale == 1 and not keepdims:
        return jax.lax.reduce_sum(square(x), axes)  # quicker to trace than a call
    return _combined_once(x, scale, ord, combine, axes, keepdims)


@functools.partial(jax.jit, static_argnames=_STATIC)
def _combined_once(
    x: jax.Array,
    scale: float,
    ord: float,
    combine: Combine,
    axes: tuple[int, ...],
    keepdims: bool,
) -> jax.Array:
    """Does the same, traced once for all leaves of one shape."""
    x = scaled(x, scale, square=ord == 2)
    if ord == 2:
        return combine(square(x), axes, keepdims=keepdims)
    size = _modulus(x)
    is_plain = ord == 1 or combine is jnp.max
    found = combine(size if is_plain else size**ord, axes, keepdims=keepdims)
    if ord == jnp.inf:
        # The largest may not be the NaN that there is: of pieces on several devices,
        # or on a CPU, where XLA leaves 4096 elements or more to a library.
        missing = jnp.any(jnp.isnan(size), axes, keepdims=keepdims)
        found = jnp.where(missing, jnp.nan, found)
    return found
