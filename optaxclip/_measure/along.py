"""From arrays to the norms of units: sums along some of the dimensions of a leaf."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optaxclip._measure import layouts, reduce, totals
from optaxclip._mesh import collectives, side_by_side
from optaxclip._mesh.collectives import Axes


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


def alike(leaves: Sequence[Reduction], layout: layouts.Layout) -> list[list[int]]:
    """Returns which have their norms in one array: of one shape, and surely local."""
    found: dict[Any, list[int]] = {}
    for i, leaf in enumerate(leaves):
        x = leaf.array
        key = x.shape, x.dtype, collectives.varying_axes(x), *leaf[1:]
        kind = key if layout.equal and collectives.is_local(x) else i
        found.setdefault(kind, []).append(i)
    return list(found.values())


def norms(
    leaves: Sequence[Reduction], scale: reduce.Scale, ord: float, layout: layouts.Layout
) -> list[jax.Array]:
    """Returns the norms along some dimensions, kept with size 1, times ``scale``.

    Each is an array of the norms of leaves that are `alike`.
    """
    leaves, scale = reduce.scaled_at_once(leaves, scale, ord)
    total = functools.partial(_totals_along, layout=layout)
    if ord == 1:
        return total(leaves, scale, ord, jnp.sum)
    if ord == 2:
        return [reduce.root(x, 2) for x in total(leaves, scale, ord, jnp.sum)]
    largest = total(leaves, scale, ord, jnp.max)
    if ord == jnp.inf:
        return largest
    units = [reduce.unit(x) for x in largest]
    rows = {
        i: x[row]
        for x, some in zip(units, alike(leaves, layout), strict=True)
        for row, i in enumerate(some)
    }
    leaves = [x._replace(array=reduce.scaled(x.array, scale)) for x in leaves]
    shrunk = [
        x._replace(array=reduce.over(x.array, rows[i])) for i, x in enumerate(leaves)
    ]
    sums = total(shrunk, 1.0, ord, jnp.sum)
    return [unit * reduce.root(x, ord) for unit, x in zip(units, sums, strict=True)]


def _totals_along(
    leaves: Sequence[Reduction],
    scale: float,
    ord: float,
    combine: reduce.Combine,
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
    return [layouts.in_one(some, layout) for some in found.values()]


def _along(
    x: jax.Array,
    scale: float,
    ord: float,
    combine: reduce.Combine,
    dimensions: tuple[int, ...],
    layout: layouts.Layout,
) -> jax.Array:
    """Combines the powers of leaves of one shape, ``x[i]``, by unit."""
    along = tuple(d + 1 for d in dimensions)
    blocks = layouts.blocks(x, along, layout)
    if blocks is None:
        return reduce.combined(x, scale, ord, combine, along, keepdims=True)
    sums = reduce.combined(blocks, scale, ord, combine, (2,))
    whole = combine(jnp.abs(sums), axis=1)  # not one sum again, see `totals.by_scope`
    return jnp.expand_dims(whole, along)
