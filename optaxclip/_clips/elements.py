"""How much did a clip of single elements take away? One more look at every leaf."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from optaxclip._measure import formulas, layouts, reduce, stacks as _stacks, totals
from optaxclip._mesh import (
    collectives,
    side_by_side,
    splits as _splits,
    spread as _spread,
)
from optaxclip._trees import infinity, leaves as _leaves

Bounds = tuple[jax.Array, ...]  # low and high, or the one limit of a range
Sides = tuple["Side", ...]  # the lower and the upper one, or one of both
Numbers = tuple[jax.Array, jax.Array]  # of every scope: the largest modulus, the count
ByAxes = dict[collectives.Axes, jax.Array]  # that a device's numbers differ over

_PIECES, _SHORT = 8, 1024  # of a row, and no shorter


class Side(NamedTuple):
    """One end of a range, and what is computed with: a number of its own each.

    Attributes:
      bound: of the upper end, or of the lower one with its sign changed.
      finite: the same, as a finite number.
      least: what the least excess counts: 1 above a bound that is NaN.
      most: what the largest excess counts: 0 above an infinite bound.
    """

    bound: jax.Array
    finite: jax.Array
    least: jax.Array
    most: jax.Array


class Seen(NamedTuple):
    """What was measured before the clip, one entry per leaf.

    Attributes:
      largest: modulus of the largest element.
      fractions: shares of the elements that are out of bounds; NaN with a NaN.
      counted: the counted leaves, for the clip: it waits for them to be measured, else
        one that overwrites them needs a copy.
    """

    largest: jax.Array
    fractions: jax.Array
    counted: list[Any]


def seen(leaves: _leaves.Leaves, bounds: Sequence[Bounds]) -> Seen:
    """Measures the leaves; those of one limit have the same bounds, not equal ones."""
    splits = _splits.splits(leaves)
    real = [abs(x) if jnp.iscomplexobj(x) else x for x in leaves.measured()]
    tree = leaves.tree(jax.lax.stop_gradient(real))
    sizes = np.array(formulas.sizes(tree, splits), leaves.dtype)
    # Bounds of its own, for what the clip shares with the sum would go to memory.
    each = {id(some): some for some in bounds}
    own = jax.lax.optimization_barrier(
        jax.lax.stop_gradient(list(map(_sides, each.values())))
    )
    places = [list(each).index(id(some)) for some in bounds]
    largest, counts = _of_all(tree, splits, own, places)
    largest = infinity.replaced(largest.astype(leaves.dtype))
    # Zeros that fill up rows are counted, too, above a bound that is NaN.
    shares = jnp.minimum(counts / sizes, 1)
    shares = jnp.where(jnp.isnan(largest), largest, shares)
    counted = [jnp.asarray(leaves.leaves[i]) for i in leaves.counted]
    found = Seen(largest, shares, counted)
    if collectives.manual_axes():
        return found  # JAX 0.8 takes all of them to vary where one does
    return Seen(*jax.lax.optimization_barrier(tuple(found)))


def _of_all(
    tree: Any, splits: _splits.Splits, bounds: list[Sides], places: list[int]
) -> Numbers:
    """Measures leaves; every device its own pieces, where it is known which."""
    spread = _spread.of(tree)
    if spread is None:
        return _numbers(tree, bounds, splits, places)
    specs = jax.tree.unflatten(jax.tree.structure(tree), spread.specs)
    return jax.shard_map(
        functools.partial(_numbers, splits=spread.splits(), places=places),
        mesh=spread.mesh,
        in_specs=(specs, PartitionSpec()),
        out_specs=PartitionSpec(),
    )(tree, bounds)


def _numbers(
    tree: Any, bounds: list[Sides], splits: _splits.Splits, places: list[int]
) -> Numbers:
    """Measures leaves of real numbers.

    In one look on a CPU and a GPU, where no leaf can be spread over devices: what a
    reduction to two numbers has of each device would be gathered, leaf by leaf. It
    counts in int32.

    Args:
      tree: of the leaves.
      bounds: all that there are.
      splits: how each is split.
      places: which of them are those of each leaf.
    """
    together = functools.partial(_together, splits=splits, places=places)
    apart = functools.partial(_apart, splits=splits, places=places)
    fits = (collectives.is_local(x) and x.size < 2**31 for x in jax.tree.leaves(tree))
    once = together if all(fits) else apart
    return jax.lax.platform_dependent(
        tree,
        bounds,
        cpu=once,
        cuda=functools.partial(once, layout=layouts.ON_GPU),
        default=apart,
    )


def _together(
    tree: Any,
    bounds: list[Sides],
    splits: _splits.Splits,
    places: list[int],
    layout: layouts.Layout = layouts.ON_CPU,
) -> Numbers:
    """Measures in one look, at the speed of the memory."""
    stacks = _stacks.of(tree, splits)
    scopes = _scopes(stacks)
    rows = list(zip(jax.tree.leaves(tree), scopes, splits, stacks, strict=True))
    largest, counts = [], []
    for place, own in enumerate(bounds):
        some = [row for row, other in zip(rows, places, strict=True) if other == place]
        columns: Any = zip(*some, strict=True)
        for piece in layouts.pieces(*columns, layout=layout):
            size, count = _by_pieces(piece.array, own, layouts.first(piece))
            largest.append(piece._replace(array=size))
            counts.append(piece._replace(array=count))
    gathered = functools.partial(
        totals.by_axes,
        count=sum(map(len, scopes)),
        layout=layout,
        dtype=jnp.result_type(jnp.float32, *jax.tree.leaves(tree)),
    )
    return _of_devices(
        gathered(largest, combine=jnp.max), gathered(counts, combine=jnp.sum)
    )


def _by_pieces(x: jax.Array, sides: Sides, axes: tuple[int, ...]) -> Numbers:
    """Reduces long rows by pieces: XLA for GPU would write some of it to memory."""
    width = x.shape[-1] // _PIECES
    if x.ndim != 2 or len(x) == 1 or width < _SHORT or x.shape[-1] % _PIECES:
        return _reduced(x, sides, axes)
    largest, count = _reduced(x.reshape(len(x), _PIECES, width), sides, (2,))
    return jnp.max(largest, axis=1), jnp.sum(count, axis=1, dtype=count.dtype)


@functools.partial(jax.jit, static_argnames="axes")
def _reduced(x: jax.Array, sides: Sides, axes: tuple[int, ...]) -> Numbers:
    size = abs(x)
    inside = size <= sides[0].bound
    if len(sides) > 1:
        inside = (-sides[0].bound <= x) & (x <= sides[-1].bound)
    largest, count = jax.lax.reduce(
        (size, (~inside).astype(jnp.int32)),
        (np.zeros((), x.dtype), np.int32(0)),
        lambda a, b: (jnp.maximum(a[0], b[0]), a[1] + b[1]),
        axes,
    )
    return largest, count


def _apart(
    tree: Any,
    bounds: list[Sides],
    splits: _splits.Splits,
    places: list[int],
    layout: layouts.Layout = layouts.AS_THEY_ARE,
) -> Numbers:
    """Measures in two looks, of which other platforms make one."""
    leaves, stacks = jax.tree.leaves(tree), _stacks.of(tree, splits)
    scopes = _scopes(stacks)
    over = [_over(x, bounds[place]) for x, place in zip(leaves, places, strict=True)]

    def gathered(arrays: list[jax.Array], combine: totals.Combine) -> ByAxes:
        pieces = layouts.pieces(arrays, scopes, splits, stacks, layout)
        parts = [
            p._replace(array=reduce.combined(p.array, 1.0, 1, combine, axes))
            for p, axes in zip(pieces, map(layouts.first, pieces), strict=True)
        ]
        count = sum(map(len, scopes))
        return totals.by_axes(parts, count, combine, layout)

    largest, counts = _of_devices(gathered(leaves, jnp.max), gathered(over, jnp.sum))
    # The largest on several devices may not be the NaN that there is.
    return jnp.where(jnp.isnan(counts), counts, largest), counts


def _of_devices(largest: ByAxes, counts: ByAxes) -> Numbers:
    """Combines the numbers of all devices; they differ over the same axes."""
    if not any(largest):
        return largest[frozenset()], counts[frozenset()]
    both = {axes: jnp.stack([x, counts[axes]]) for axes, x in largest.items()}
    found = collectives.all_devices(both, side_by_side.largest_and_sum)
    return found[0], found[1]


def _scopes(stacks: _stacks.Stacks) -> list[tuple[int, ...]]:
    """Returns the numbers of the scopes of every leaf."""
    ends = np.cumsum([stack.layers if stack else 1 for stack in stacks]).tolist()
    return [tuple(range(*some)) for some in zip([0, *ends], ends, strict=False)]


@jax.jit
def _over(x: jax.Array, sides: Sides) -> jax.Array:
    """Returns 1 where an element is out of bounds, 0 elsewhere, NaN for a NaN.

    By arithmetic alone, which a CPU does in the loop that adds them up: it would write
    what a comparison gives to memory, first.
    """
    return jnp.maximum(_above(x, sides[-1]), _above(-x, sides[0]))


def _above(x: jax.Array, side: Side) -> jax.Array:
    excess = (x - side.finite) * float(jnp.finfo(x.dtype).max)
    return jnp.clip(excess, side.least, side.most)


def _sides(bounds: Bounds) -> Sides:
    return tuple(map(_side, bounds if len(bounds) == 1 else (-bounds[0], bounds[1])))


def _side(bound: jax.Array) -> Side:
    highest = float(jnp.finfo(bound.dtype).max)
    is_nan = jnp.isnan(bound)
    finite = jnp.where(is_nan, 0, jnp.clip(bound, -highest, highest))
    least, most = (x.astype(bound.dtype) for x in (is_nan, ~(bound > highest)))
    return Side(bound, finite, least, most)
