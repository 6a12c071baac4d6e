"""From arrays to the norm of each scope: the sums of powers behind every norm."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip._measure import layouts, totals
from optaxclip._measure.layouts import Piece
from optaxclip._mesh import collectives, side_by_side
from optaxclip._mesh.collectives import Axes

Scale = float | jax.Array
Combine = Callable[..., jax.Array]  # jnp.sum or jnp.max
_STATIC = ("scale", "ord", "combine", "axes", "keepdims")


class Reduction(NamedTuple):
    """A leaf to be reduced along some of its dimensions only.

    Attributes:
      array: the leaf.
      dimensions: those to reduce, which stay with size 1.
      axes: the mesh axes that split these.
      kept: those that split the others.
      layers: the dimension that goes over the layers of a stack; -1 if none does.
    """

    array: jax.Array
    dimensions: tuple[int, ...]
    axes: Axes
    kept: Axes
    layers: int


def scaled(x: jax.Array, scale: Scale, square: bool = False) -> jax.Array:
    """Returns ``x * scale``, in a form that the compiler leaves alone when squared.

    Where it knows enough of ``x`` (a constant, a single element) it would otherwise
    compute ``x**2 * scale**2``, which is 0 times infinity.

    Where the square will be taken the modulus will do, and a large number for an
    infinity: so a CPU squares and sums in one loop, where it would keep a copy of ``x``
    otherwise. The scale is a power of two.
    """
    if isinstance(scale, float) and scale == 1:
        return x
    if jnp.iscomplexobj(x):
        parts = scaled(x.real, scale, square), scaled(x.imag, scale, square)
        return jax.lax.complex(*parts)
    largest = jnp.finfo(x.dtype).max
    if square:
        return jnp.minimum(jnp.abs(x) * scale, largest)
    product = jnp.clip(x * scale, -largest, largest)
    return jnp.where(jnp.isinf(x), x, product)


def norms(
    pieces: Sequence[Piece], scale: Scale, count: int, ord: float, operands: int
) -> jax.Array:
    """Returns the norms of the scopes 0, 1, ... times ``scale``, one vector.

    Args:
      pieces: of all scopes.
      scale: a power of two, or a vector of one for each scope.
      count: how many scopes there are.
      ord: p of the norm.
      operands: how many sums of rows may be joined.
    """
    if isinstance(scale, jax.Array):
        scales = (_rows(scale, p) for p in pieces)
        pieces = [
            p._replace(array=scaled(p.array, own, square=ord == 2))
            for p, own in zip(pieces, scales, strict=True)
        ]
        scale = 1.0
    total = functools.partial(gathered, count=count, operands=operands)
    if ord == 1:
        return total(pieces, scale, ord, jnp.sum)
    if ord == 2:
        return root(total(pieces, scale, ord, jnp.sum), 2)
    largest = total(pieces, scale, ord, jnp.max)
    if ord == jnp.inf:
        return largest
    unit = _unit(largest)
    pieces = [p._replace(array=scaled(p.array, scale)) for p in pieces]
    shrunk = [p._replace(array=over(p.array, _rows(unit, p))) for p in pieces]
    return unit * root(total(shrunk, 1.0, ord, jnp.sum), ord)


def alike(leaves: Sequence[Reduction], layout: layouts.Layout) -> list[list[int]]:
    """Returns which have their norms in one array: of one shape, and surely local."""
    found: dict[Any, list[int]] = {}
    for i, leaf in enumerate(leaves):
        x = leaf.array
        key = x.shape, x.dtype, collectives.varying_axes(x), *leaf[1:]
        kind = key if layout.equal and collectives.is_local(x) else i
        found.setdefault(kind, []).append(i)
    return list(found.values())


def norms_along(
    leaves: Sequence[Reduction], scale: float, ord: float, layout: layouts.Layout
) -> list[jax.Array]:
    """Returns the norms along some dimensions, kept with size 1, times ``scale``.

    Each is an array of the norms of leaves that are `alike`.
    """
    total = functools.partial(_totals_along, layout=layout)
    if ord == 1:
        return total(leaves, scale, ord, jnp.sum)
    if ord == 2:
        return [root(x, 2) for x in total(leaves, scale, ord, jnp.sum)]
    largest = total(leaves, scale, ord, jnp.max)
    if ord == jnp.inf:
        return largest
    units = [_unit(x) for x in largest]
    rows = {
        i: x[row]
        for x, some in zip(units, alike(leaves, layout), strict=True)
        for row, i in enumerate(some)
    }
    leaves = [x._replace(array=scaled(x.array, scale)) for x in leaves]
    shrunk = [x._replace(array=over(x.array, rows[i])) for i, x in enumerate(leaves)]
    sums = total(shrunk, 1.0, ord, jnp.sum)
    return [unit * root(x, ord) for unit, x in zip(units, sums, strict=True)]


def square(x: jax.Array) -> jax.Array:
    """Returns the square of the modulus, real."""
    return (
        jnp.square(x.real) + jnp.square(x.imag)
        if jnp.iscomplexobj(x)
        else jnp.square(x)
    )


def root(x: jax.Array, ord: float) -> jax.Array:
    """Returns ``x ** (1 / ord)``, with derivative 0 at 0."""
    zero = x == 0
    positive = jnp.where(zero, 1, x)
    return jnp.where(zero, 0, jnp.sqrt(positive) if ord == 2 else positive ** (1 / ord))


def _modulus(x: jax.Array) -> jax.Array:
    return root(square(x), 2) if jnp.iscomplexobj(x) else jnp.abs(x)


def _unit(largest: jax.Array) -> jax.Array:
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
    operands: int,
) -> jax.Array:
    """Combines the powers of the elements by scope, over devices too."""
    parts = [
        p._replace(array=_combined(p.array, scale, ord, combine, layouts.first(p)))
        for p in pieces
    ]
    return totals.by_scope(parts, count, combine, operands)


def _totals_along(
    leaves: Sequence[Reduction],
    scale: float,
    ord: float,
    combine: Combine,
    layout: layouts.Layout,
) -> list[jax.Array]:
    """Combines the powers of the elements by unit, over devices too."""
    batches = [
        (group, leaves[few[0]], jnp.stack([leaves[i].array for i in few]))
        for group, some in enumerate(alike(leaves, layout))
        for few in layouts.of_one_shape(some, leaves[some[0]].array, layout)
    ]
    parts = [
        _along(array, scale, ord, combine, one.dimensions, layout)
        for _, one, array in batches
    ]
    axes = [one.axes for _, one, _ in batches]
    kept = [one.kept for _, one, _ in batches]
    every = side_by_side.each_over(parts, axes, kept, totals.collective(combine))
    found: dict[int, list[jax.Array]] = {}
    for (group, *_), part in zip(batches, every, strict=True):
        found.setdefault(group, []).append(part)
    return [jnp.concatenate(some) for some in found.values()]


def _along(
    x: jax.Array,
    scale: float,
    ord: float,
    combine: Combine,
    dimensions: tuple[int, ...],
    layout: layouts.Layout,
) -> jax.Array:
    """Combines the powers of leaves of one shape, ``x[i]``, by unit."""
    along = tuple(d + 1 for d in dimensions)
    blocks = layouts.blocks(x, along, layout)
    if blocks is None:
        return _combined(x, scale, ord, combine, along, keepdims=True)
    sums = _combined(blocks, scale, ord, combine, (2,))
    whole = combine(jnp.abs(sums), axis=1)  # not one sum again, see `totals.by_scope`
    return jnp.expand_dims(whole, along)


@functools.partial(jax.jit, static_argnames=_STATIC)
def _combined(
    x: jax.Array,
    scale: float,
    ord: float,
    combine: Combine,
    axes: tuple[int, ...],
    keepdims: bool = False,
) -> jax.Array:
    """Combines the powers of ``x * scale``; traced once for all leaves of one shape."""
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
