"""How are leaves laid out for the kernels that reduce them? Joined, or by rows."""

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optaxclip._measure import stacks as _stacks
from optaxclip._mesh import collectives, splits as _splits
from optaxclip._mesh.collectives import Axes
from optaxclip._trees.leaves import Leaves


class Layout(NamedTuple):
    """How a platform wants them.

    Attributes:
      small: leaves of fewer elements are joined.
      operands: at most so many of them in one kernel.
      filled: whether those of several sizes are rows of one length, filled with zeros.
      width: other leaves are reduced by rows of at most so many elements first; 0 for
        at once.
      equal: at most so many small leaves of one shape in one kernel for their units; 0
        for norms that are an array for each leaf.
      added: at most so many arrays of those are put into one by a sum, in one kernel.
      height: units are reduced by at most so many rows first; 0 for at once.
    """

    small: int = 0
    operands: int = 1
    filled: bool = False
    width: int = 0
    equal: int = 1
    added: int = 1
    height: int = 0


AS_THEY_ARE = Layout()
# It reduces small leaves together by itself, and takes a kernel to put the norms of a
# leaf's units into one array with others, but one for a sum of many.
ON_TPU = Layout(added=64)
ON_TPUS = Layout(equal=0)  # each with its piece: the norms leave as arrays of leaves
FEW = 8  # arrays, whose sum may be computed in several kernels
ON_CPU = Layout(small=8192, operands=256)
# Of more operands XLA for GPU writes what it joins to memory, and reads it again; zeros
# it does not read, and norms of leaves, of groups and of all share the sums of leaves;
# the sum of a whole large leaf takes two kernels, its rows all together share the
# second.
ON_GPU = Layout(small=65536, operands=64, filled=True, width=8192, equal=64)
# Of 16 bits XLA for GPU reads many columns at once, and where that makes too few blocks
# of work it writes their squares to memory, eight bytes each.
ON_GPU_NARROW = ON_GPU._replace(height=256)
ENOUGH = 4096  # columns


def on_gpu(leaves: Leaves) -> Layout:
    """Returns how a GPU wants the counted leaves, by what they are before a cast."""
    kinds = [getattr(leaves.leaves[i], "dtype", jnp.float32) for i in leaves.counted]
    is_narrow = any(jnp.finfo(kind).bits < 32 for kind in kinds)
    return ON_GPU_NARROW if is_narrow else ON_GPU


class Piece(NamedTuple):
    """Elements of some scopes, ``array[i]`` those of the scope ``scopes[i]``.

    Attributes:
      array: its first axis goes over the scopes.
      scopes: their numbers; of a stack of layers also those on other devices.
      axes: the mesh axes over which the array differs from device to device.
      stack: of which the rows are the layers.
      by_rows: whether the last axis is to be reduced before the others.
    """

    array: jax.Array
    scopes: tuple[int, ...]
    axes: Axes
    stack: _stacks.Stack | None = None
    by_rows: bool = False


def pieces(
    leaves: Sequence[jax.Array],
    scopes: Sequence[tuple[int, ...]],
    splits: _splits.Splits,
    stacks: _stacks.Stacks,
    layout: Layout,
) -> list[Piece]:
    """Sorts leaves by scope, small ones joined: one kernel reduces all of one size.

    Reshapes only what is surely on one device, for anything else would be gathered. A
    stack of layers has a scope for each.
    """
    found, small = [], []
    for leaf, some, split, stack in zip(leaves, scopes, splits, stacks, strict=True):
        if stack:
            array = jnp.moveaxis(leaf, stack.axis, 0)
            found.append(Piece(array, some, split.axes, stack))
            continue
        is_local = collectives.is_local(leaf)
        width = _width(leaf.size, layout.width) if is_local else 0
        if is_local and leaf.size < layout.small:
            row = lax.reshape(leaf, (1, leaf.size))
            small.append(Piece(row, some, split.axes))
        elif width:
            rows = lax.reshape(leaf, (1, leaf.size // width, width))
            found.append(Piece(rows, some, split.axes, by_rows=True))
        else:
            found.append(Piece(lax.expand_dims(leaf, [0]), some, split.axes))
    return found + joined(small, layout)


def first(piece: Piece) -> tuple[int, ...]:
    """Returns the axes of a piece to be reduced at first."""
    return (2,) if piece.by_rows else tuple(range(1, piece.array.ndim))


def of_one_shape(
    places: Sequence[int], leaf: jax.Array, layout: Layout
) -> list[Sequence[int]]:
    """Returns which leaves of one shape a kernel reduces together by unit."""
    return _batches(places, layout.equal if leaf.size < layout.small else 1)


def in_one(arrays: Sequence[jax.Array], layout: Layout) -> jax.Array:
    """Concatenates arrays along their first axis."""
    batches = _batches(arrays, layout.added)
    return jnp.concatenate([_added(some) for some in batches])


def _added(arrays: Sequence[jax.Array]) -> jax.Array:
    if len(arrays) == 1:
        return arrays[0]
    ends = np.cumsum([len(x) for x in arrays]).tolist()
    rows = [
        jnp.pad(x, [(end - len(x), ends[-1] - end), *[(0, 0)] * (x.ndim - 1)])
        for x, end in zip(arrays, ends, strict=True)
    ]
    total = functools.reduce(jnp.add, rows)
    # Of many a sum is long, and to be computed once.
    return lax.optimization_barrier(total) if len(arrays) > FEW else total


def blocks(x: jax.Array, along: tuple[int, ...], layout: Layout) -> jax.Array | None:
    """Returns leaves ``x[i]`` in blocks of rows, to be reduced along axis 2 and 1.

    None if they are to be reduced along those axes at once.
    """
    kept = x.shape[len(along) + 1 :]
    size = math.prod(x.shape[1 : len(along) + 1])
    columns = len(x) * math.prod(kept)
    is_tall = 0 < layout.height < size and columns < ENOUGH
    if not is_tall or along != tuple(range(1, len(along) + 1)):
        return None
    height = _width(size, layout.height) if collectives.is_local(x) else 0
    if not height:
        return None
    return lax.reshape(x, (len(x), size // height, height, *kept))


def joined(parts: Iterable[Piece], layout: Layout) -> list[Piece]:
    """Joins pieces, each of them a matrix with one row, to matrices."""
    return (_filled if layout.filled else _of_equal)(parts, layout.operands)


def _filled(parts: Iterable[Piece], operands: int) -> list[Piece]:
    """Fills rows with zeros, to one length."""
    alike: dict[tuple[Axes, jnp.dtype], list[Piece]] = {}
    for part in sorted(parts, key=lambda part: part.array.size):
        alike.setdefault((part.axes, part.array.dtype), []).append(part)
    found = []
    for (axes, _), every in alike.items():
        for some in _batches(every, operands):
            width = some[-1].array.size
            rows = [jnp.pad(x.array, ((0, 0), (0, width - x.array.size))) for x in some]
            scopes = tuple(scope for part in some for scope in part.scopes)
            found.append(Piece(lax.concatenate(rows, dimension=0), scopes, axes))
    return found


def _of_equal(parts: Iterable[Piece], operands: int) -> list[Piece]:
    """Joins vectors of one scope, and those that are then of one size to matrices."""
    of_scope: dict[tuple[int, Axes, jnp.dtype], list[jax.Array]] = {}
    for part in parts:
        (scope,) = part.scopes
        key = scope, part.axes, part.array.dtype
        of_scope.setdefault(key, []).append(part.array)
    rows: dict[tuple[int, Axes, jnp.dtype, int], list[tuple[int, jax.Array]]] = {}
    for (scope, axes, dtype), every in of_scope.items():
        for some in _batches(every, operands):
            row = lax.concatenate(some, dimension=1)
            key = row.size, axes, dtype, len(some)
            rows.setdefault(key, []).append((scope, row))
    return [
        Piece(
            lax.concatenate([row for _, row in some], dimension=0),
            tuple(scope for scope, _ in some),
            axes,
        )
        for (_, axes, _, count), every in rows.items()
        for some in _batches(every, max(1, operands // count))
    ]


def _batches(every: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [every[i : i + size] for i in range(0, len(every), size)]


def _width(size: int, largest: int) -> int:
    """Returns how long equal rows of a leaf can be; 0 if they would be too short."""
    fits = (n for n in range(min(largest, size), largest // 128, -1) if size % n == 0)
    return next(fits, 0)
