"""Sums over devices: what a norm needs inside ``shard_map``, and nothing anywhere else.

Under ``jit`` with sharded arrays the compiler inserts the collectives. Inside
``shard_map`` a leaf is one device's piece, and its type says over which mesh axes the
pieces differ.
"""

import functools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

Axes = frozenset[str]

# How JAX calls an axis of `pmap` that has no name, the newest and 0.8.
_MADE_UP = re.compile(r"_internal_pmap_axis_name|<axis 0x[0-9a-f]+>")


def manual_axes() -> tuple[Any, ...]:
    """Returns the mesh axes over which pieces of a leaf may be on different devices.

    Not that of a ``pmap`` without an ``axis_name``: no collective can cross it, so what
    a device has there is all there is.
    """
    every = jax.sharding.get_abstract_mesh().manual_axes
    return tuple(axis for axis in every if not _MADE_UP.fullmatch(str(axis)))


def varying_axes(x: jax.Array) -> Axes:
    """Returns the mesh axes over which ``x`` differs from device to device."""
    kind = jax.typeof(x)
    manual = getattr(kind, "manual_axis_type", None)  # JAX 0.10 and newer
    return frozenset(manual.varying if manual is not None else getattr(kind, "vma", ()))


def unreduced_axes(x: Any) -> Axes:
    """Returns the mesh axes over which ``x`` is a sum that has not been taken yet."""
    kind = jax.typeof(x)
    manual = getattr(kind, "manual_axis_type", None)
    spec = getattr(getattr(kind, "sharding", None), "spec", None)
    found = (getattr(some, "unreduced", frozenset()) for some in (manual, spec))
    return frozenset[str]().union(*found)


def vary_like(x: jax.Array, *others: Any) -> jax.Array:
    """Returns ``x``, whose type also says that it varies wherever the others do."""
    return vary_over(x, frozenset[str]().union(*map(varying_axes, others)))


def vary_over(x: jax.Array, axes: Axes) -> jax.Array:
    """Returns ``x``, whose type also says that it varies over some mesh axes."""
    missing = tuple(sorted(axes - varying_axes(x)))
    if not missing:
        return x
    before_0_9: Any = getattr(jax.lax, "pvary", None)
    if not hasattr(jax.lax, "pcast"):
        return before_0_9(x, missing)
    return jax.lax.pcast(x, missing, to="varying")


def is_local(x: jax.Array) -> bool:
    """Returns whether ``x`` is surely on one device, where reshaping it is free."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.axis_names and set(mesh.manual_axes) == set(mesh.axis_names):
        return True
    sharding: Any = getattr(jax.typeof(x), "sharding", None)
    spread = sharding is not None and sharding.mesh.size > 1
    return jax.device_count() == 1 and not spread and mesh.size < 2


def replicated(x: jax.Array) -> jax.Array:
    """Returns ``x`` on every device where its type says that it is spread."""
    own: Any = getattr(jax.typeof(x), "sharding", None)
    if own is None or not any(isinstance(e, str | tuple) and e for e in own.spec):
        return x
    return jax.sharding.reshard(x, NamedSharding(own.mesh, PartitionSpec()))


def pmax(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Returns the largest numbers of all devices; ``jax.lax.pmax`` may lose a NaN."""
    is_nan = jnp.isnan(x)
    pair = jnp.stack([jnp.where(is_nan, 0, x), is_nan.astype(x.dtype)])
    largest, missing = jax.lax.pmax(pair, axes)
    return jnp.where(missing > 0, jnp.nan, largest)


def all_devices(
    parts: Mapping[Axes, jax.Array], collective: Callable[..., jax.Array]
) -> jax.Array:
    """Combines per-device parts into the same value everywhere, in one collective.

    Args:
      parts: non-negative arrays of one shape, by the axes over which each varies. A
        part is counted once on the axes that it does not vary over.
      collective: ``jax.lax.psum``, or what looks for the largest.
    """
    union = frozenset[str]().union(*parts)
    if not union:
        (part,) = parts.values()
        return part
    once = [at_origin(part, union - axes) for axes, part in parts.items()]
    if collective is jax.lax.psum:
        return jax.lax.psum(sum(once), tuple(sorted(union)))
    return collective(functools.reduce(jnp.maximum, once), tuple(sorted(union)))


def anywhere(condition: jax.Array, axes: Axes) -> jax.Array:
    """Returns whether a condition holds on any device along some mesh axes."""
    if not axes:
        return condition
    return jax.lax.psum(condition.astype(jnp.int32), tuple(sorted(axes))) > 0


def own_piece(
    whole: jax.Array, shape: Sequence[int], dimensions: Sequence[Collection[str]]
) -> jax.Array:
    """Returns this device's piece of an array, given how each dimension is split."""
    start = _start(shape, dimensions)
    return jax.lax.dynamic_slice(vary_like(whole, *start), start, shape)


def in_place(
    piece: jax.Array, shape: Sequence[int], dimensions: Sequence[Collection[str]]
) -> jax.Array:
    """Returns a whole array with this device's piece in its place, and 0 elsewhere."""
    start = _start(piece.shape, dimensions)
    zeros = vary_like(jnp.zeros(shape, piece.dtype), piece, *start)
    return jax.lax.dynamic_update_slice(zeros, vary_like(piece, *start), start)


def _start(
    shape: Sequence[int], dimensions: Sequence[Collection[str]]
) -> list[jax.Array]:
    every = [*dimensions, *[()] * len(shape)]  # those that no spec names are whole
    return [size * index(axes) for size, axes in zip(shape, every, strict=False)]


def index(axes: Collection[str]) -> jax.Array:
    """Returns the place of this device among those along some mesh axes."""
    shape = jax.sharding.get_abstract_mesh().shape
    place = jnp.zeros((), jnp.int32)
    for axis in axes:
        place = place * shape[axis] + jax.lax.axis_index(axis)
    return place


def at_origin(part: jax.Array, axes: Axes) -> jax.Array:
    """Returns it on the first device along some mesh axes, and 0 on the others."""
    for axis in sorted(axes):
        part = jnp.where(jax.lax.axis_index(axis) == 0, part, jnp.zeros_like(part))
    return part
