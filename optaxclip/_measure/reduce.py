"""From arrays to the norm of each scope: the sums of powers behind every norm."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip._measure import stacks as _stacks
from optaxclip._mesh import collectives, splits as _splits
from optaxclip._mesh.collectives import Axes

_SMALL = 8192  # elements; smaller leaves are joined


class Piece(NamedTuple):
    """Elements of some scopes, ``array[i]`` those of the scope ``scopes[i]``.

    Attributes:
      array: its first axis goes over the scopes.
      scopes: their numbers; of a stack of layers also those on other devices.
      axes: the mesh axes over which the array differs from device to device.
      stack: of which the rows are the layers.
    """

    array: jax.Array
    scopes: tuple[int, ...]
    axes: Axes
    stack: _stacks.Stack | None = None


class Reduction(NamedTuple):
    """A leaf to be reduced along some of its dimensions only.

    Attributes:
      array: the leaf.
      dimensions: those to reduce, which stay with size 1.
      axes: the mesh axes that split these.
      layers: the dimension that goes over the layers of a stack; -1 if none does.
    """

    array: jax.Array
    dimensions: tuple[int, ...]
    axes: Axes
    layers: int


def pieces(
    leaves: Sequence[jax.Array],
    scopes: Sequence[tuple[int, ...]],
    splits: _splits.Splits,
    stacks: _stacks.Stacks,
) -> list[Piece]:
    """Sorts leaves by scope, small ones joined: one kernel reduces all of one size.

    Joins only what is surely on one device, for anything else would be gathered. A TPU
    reduces small leaves together by itself. A stack of layers has a scope for each.
    """
    join = jax.default_backend() != "tpu"
    small: dict[tuple[int, Axes, jnp.dtype], list[jax.Array]] = {}
    found = []
    for leaf, some, split, stack in zip(leaves, scopes, splits, stacks, strict=True):
        over = split.axes
        if stack:
            found.append(Piece(jnp.moveaxis(leaf, stack.axis, 0), some, over, stack))
            continue
        (scope,) = some
        if join and leaf.size < _SMALL and collectives.is_local(leaf):
            small.setdefault((scope, over, leaf.dtype), []).append(leaf)
        else:
            found.append(Piece(leaf[None], (scope,), over))
    rows: dict[tuple[int, Axes, jnp.dtype], list[int]] = {}
    for (scope, over, dtype), some in small.items():
        size = sum(leaf.size for leaf in some)
        rows.setdefault((size, over, dtype), []).append(scope)
    for (_, over, dtype), same in rows.items():
        some = [small[scope, over, dtype] for scope in same]
        flat = [jnp.concatenate([x.reshape(x.size) for x in one]) for one in some]
        found.append(Piece(jnp.stack(flat), tuple(same), over))
    return found


def scaled(x: jax.Array, scale: float, square: bool = False) -> jax.Array:
    """Returns ``x * scale``, in a form that the compiler leaves alone when squared.

    Where it knows enough of ``x`` (a constant, a single element) it would otherwise
    compute ``x**2 * scale**2``, which is 0 times infinity.

    Where the square will be taken the modulus will do, and the largest number for an
    infinity: so a CPU squares and sums in one loop, where it would keep a copy of ``x``
    otherwise. The scale is a power of two.
    """
    if scale == 1:
        return x
    if jnp.iscomplexobj(x):
        parts = scaled(x.real, scale, square), scaled(x.imag, scale, square)
        return jax.lax.complex(*parts)
    largest = jnp.finfo(x.dtype).max
    if square:
        return jnp.minimum(jnp.abs(x) * scale, largest)
    product = jax.lax.clamp(-largest, x * scale, largest)
    return jnp.where(jnp.isinf(x), x, product)


def norms(pieces: Sequence[Piece], scale: float, count: int, ord: float) -> jax.Array:
    """Returns the norms of the scopes 0, 1, ... times ``scale``, one vector."""
    pieces = [p._replace(array=scaled(p.array, scale, ord == 2)) for p in pieces]
    if ord == 1:
        return _totals(pieces, count, _modulus, jnp.sum)
    if ord == 2:
        return root(_totals(pieces, count, square, jnp.sum), 2)
    largest = _totals(pieces, count, _modulus, jnp.max)
    if ord == jnp.inf:
        return largest
    unit = _unit(largest)
    shrunk = [p._replace(array=over(p.array, _rows(unit, p))) for p in pieces]
    return unit * root(
        _totals(shrunk, count, lambda x: _modulus(x) ** ord, jnp.sum), ord
    )


def alike(leaves: Sequence[Reduction]) -> list[list[int]]:
    """Returns which may have their norms in one array: alike, and surely local."""
    found: dict[Any, list[int]] = {}
    for i, leaf in enumerate(leaves):
        shape = np.array(leaf.array.shape)
        shape[list(leaf.dimensions)] = 1
        varying = collectives.varying_axes(leaf.array) - leaf.axes
        key = tuple(shape), varying, leaf.layers
        kind = key if collectives.is_local(leaf.array) else i
        found.setdefault(kind, []).append(i)
    return list(found.values())


def norms_along(
    leaves: Sequence[Reduction], scale: float, ord: float
) -> list[jax.Array]:
    """Returns the norms along some dimensions, kept with size 1, times ``scale``.

    Each is an array of the norms of leaves that are `alike`.
    """
    leaves = [x._replace(array=scaled(x.array, scale, ord == 2)) for x in leaves]
    if ord == 1:
        return _totals_along(leaves, _modulus, jnp.sum)
    if ord == 2:
        return [root(x, 2) for x in _totals_along(leaves, square, jnp.sum)]
    largest = _totals_along(leaves, _modulus, jnp.max)
    if ord == jnp.inf:
        return largest
    units = [_unit(x) for x in largest]
    rows = {
        i: x[row]
        for x, some in zip(units, alike(leaves), strict=True)
        for row, i in enumerate(some)
    }
    shrunk = [x._replace(array=over(x.array, rows[i])) for i, x in enumerate(leaves)]
    totals = _totals_along(shrunk, lambda x: _modulus(x) ** ord, jnp.sum)
    return [unit * root(x, ord) for unit, x in zip(units, totals, strict=True)]


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
    rows = values[np.array(piece.scopes)]
    rows = piece.stack.own(rows) if piece.stack else rows
    return rows.reshape((-1,) + (1,) * (piece.array.ndim - 1))


def _totals(
    pieces: Sequence[Piece],
    count: int,
    element: Callable[[jax.Array], jax.Array],
    combine: Callable[..., jax.Array],
) -> jax.Array:
    """Combines a function of the elements by scope, over devices too."""
    if not pieces:
        return jnp.zeros(count)
    by_axes: dict[Axes, list[Piece]] = {}
    for piece in pieces:
        reduced = combine(element(piece.array), axis=range(1, piece.array.ndim))
        if piece.stack:
            reduced = piece.stack.every(collectives.replicated(reduced))
        by_axes.setdefault(piece.axes, []).append(piece._replace(array=reduced))
    totals = {axes: _total(some, count, combine) for axes, some in by_axes.items()}
    return collectives.all_devices(totals, _collective(combine))


def _totals_along(
    leaves: Sequence[Reduction],
    element: Callable[[jax.Array], jax.Array],
    combine: Callable[..., jax.Array],
) -> list[jax.Array]:
    """Combines a function of the elements by unit, over devices too."""
    parts = [combine(element(x.array), x.dimensions, keepdims=True) for x in leaves]
    axes = [x.axes for x in leaves]
    totals = collectives.each_over(parts, axes, _collective(combine))
    return [jnp.stack([totals[i] for i in some]) for some in alike(leaves)]


def _collective(combine: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    return jax.lax.psum if combine is jnp.sum else jax.lax.pmax


def _total(
    pieces: Sequence[Piece], count: int, combine: Callable[..., jax.Array]
) -> jax.Array:
    """Combines pieces of one element for each scope; a scope without any gets 0."""
    flat = jnp.concatenate([piece.array for piece in pieces])
    scopes = [scope for piece in pieces for scope in piece.scopes]
    if scopes == list(range(count)):
        return flat
    if count == 1:
        return combine(flat, axis=0, keepdims=True)
    if sorted(scopes) == list(range(count)):
        return flat[np.argsort(scopes)]
    own = jnp.arange(count)[:, None] == np.array([scopes])
    return combine(jnp.where(own, flat[None], 0), axis=1)
