"""Numbers that differ from device to device, side by side in one collective.

Every device puts its own in a row of their own, where the others have zeros. There is
one round less to wait for with each collective that is saved, and more to send.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip._mesh import collectives, splits
from optaxclip._mesh.collectives import Axes

# Bytes to send, and devices to look through, for which a collective more takes longer.
SMALL, FEW = 2**20, 64


class _Kind(NamedTuple):
    """Over which mesh axes to combine, over which others it varies, and its dtype."""

    axes: Axes
    kept: Axes
    dtype: jnp.dtype


def each_over(
    parts: Sequence[jax.Array],
    axes: Sequence[Axes],
    kept: Sequence[Axes],
    collective: Callable[..., jax.Array],
) -> list[jax.Array]:
    """Combines every part over its own mesh axes, all in one collective if it is small.

    Args:
      parts: arrays, not negative if the largest are looked for.
      axes: those to combine each over.
      kept: the others over which each varies.
      collective: ``jax.lax.psum`` or `collectives.pmax`.
    """
    alike: dict[_Kind, list[int]] = {}
    for i, (part, over, rest) in enumerate(zip(parts, axes, kept, strict=True)):
        if over:
            alike.setdefault(_Kind(over, rest, part.dtype), []).append(i)
    flat = {
        kind: jnp.concatenate([parts[i].ravel() for i in places])
        for kind, places in alike.items()
    }
    combined = list(parts)
    for kind, found in _combined(flat, collective).items():
        ends = np.cumsum([parts[i].size for i in alike[kind]])[:-1]
        for i, piece in zip(alike[kind], jnp.split(found, ends), strict=True):
            combined[i] = piece.reshape(parts[i].shape)
    return combined


def at_smallest(columns: Sequence[jax.Array], axes: Axes) -> list[jax.Array]:
    """Returns the numbers of the device whose last one is smallest, place by place.

    Args:
      columns: vectors of one length; NaN is smaller than any number.
      axes: the mesh axes along which to look.
    """
    rows = jnp.stack(columns)
    names, count = tuple(sorted(axes)), splits.copies(axes)
    if count <= FEW:
        every = jax.lax.psum(_in_own_row(rows, axes), names)
        key, device = _ordered(every[:, -1]), jnp.arange(count)[:, None]
        is_best = key == jnp.min(key, axis=0)
        first = jnp.min(jnp.where(is_best, device, count), axis=0)
        return list(jnp.sum(jnp.where((device == first)[:, None], every, 0), axis=0))
    key, device = _ordered(rows[-1]), collectives.index(names)
    is_best = key == jax.lax.pmin(key, names)
    first = jax.lax.pmin(jnp.where(is_best, device, count), names)
    return list(jax.lax.psum(jnp.where((device == first)[None], rows, 0), names))


def largest_and_sum(rows: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """Returns the largest numbers of all devices, NaN if one is, and the sums.

    Args:
      rows: two, of which the first is looked through and the second summed.
      names: the mesh axes along which to do so.
    """
    axes = frozenset(names)
    if splits.copies(axes) > FEW:
        largest = collectives.pmax(rows[0], names)
        return jnp.stack([largest, jax.lax.psum(rows[1], names)])
    sizes, numbers = jnp.moveaxis(jax.lax.psum(_in_own_row(rows, axes), names), 1, 0)
    missing = jnp.any(jnp.isnan(sizes), axis=0)
    largest = jnp.where(missing, jnp.nan, jnp.max(sizes, axis=0))
    return jnp.stack([largest, jnp.sum(numbers, axis=0)])


def _combined(
    vectors: Mapping[_Kind, jax.Array], collective: Callable[..., jax.Array]
) -> dict[_Kind, jax.Array]:
    """Combines a vector of each kind over its axes.

    Apart stay those that would vary over different axes still: joined, they would all
    vary over whatever one of them does.
    """
    union = frozenset[str]().union(*(kind.axes for kind in vectors))
    sizes = (x.nbytes * splits.copies(kind.kept & union) for kind, x in vectors.items())
    is_small = sum(sizes) <= SMALL
    groups: dict[object, list[_Kind]] = {}
    for kind in vectors:
        key = (kind.kept - union, kind.dtype) if is_small else kind
        groups.setdefault(key, []).append(kind)
    found = {}
    for kinds in groups.values():
        over = frozenset[str]().union(*(kind.axes for kind in kinds))
        rows = [
            collectives.at_origin(
                _in_own_row(vectors[kind], kind.kept & over),
                over - kind.axes - kind.kept,
            )
            for kind in kinds
        ]
        flat = jnp.concatenate([x.ravel() for x in rows])
        ends = np.cumsum([x.size for x in rows])[:-1]
        every = jnp.split(collective(flat, tuple(sorted(over))), ends)
        for kind, x, row in zip(kinds, every, rows, strict=True):
            found[kind] = _own_row(x.reshape(row.shape), kind.kept & over)
    return found


def _in_own_row(x: jax.Array, axes: Axes) -> jax.Array:
    """Returns a row for each device along some mesh axes, 0 in all but its own."""
    places = jnp.arange(splits.copies(axes)).reshape(-1, *[1] * x.ndim)
    return jnp.where(places == collectives.index(sorted(axes)), x[None], 0)


def _own_row(rows: jax.Array, axes: Axes) -> jax.Array:
    return rows[collectives.index(sorted(axes))] if axes else rows[0]


def _ordered(key: jax.Array) -> jax.Array:
    return jax.lax.stop_gradient(jnp.where(jnp.isnan(key), -jnp.inf, key))
