"""Sums over devices: what a norm needs inside ``shard_map``, and nothing anywhere else.

Under ``jit`` with sharded arrays the compiler inserts the collectives. Inside
``shard_map`` a leaf is one device's piece, and its type says over which mesh axes the
pieces differ.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

Axes = frozenset[str]


def varying_axes(x: jax.Array) -> Axes:
    """Returns the mesh axes over which ``x`` differs from device to device."""
    kind = jax.typeof(x)
    manual = getattr(kind, "manual_axis_type", None)  # JAX 0.10 and newer
    return frozenset(manual.varying if manual is not None else getattr(kind, "vma", ()))


def vary_like(x: jax.Array, *others: Any) -> jax.Array:
    """Returns ``x``, whose type also says that it varies wherever the others do."""
    union = frozenset[str]().union(*(varying_axes(other) for other in others))
    missing = tuple(sorted(union - varying_axes(x)))
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
    return jax.device_count() == 1 and not spread


def check_axes_are_known() -> None:
    """Raises where ``shard_map`` keeps no types: norms would be one device's own."""
    for axis in jax.sharding.get_abstract_mesh().manual_axes:
        if axis not in varying_axes(jax.lax.axis_index(axis)):
            raise ValueError(
                "Expected `shard_map(..., check_vma=True)`, which records over which"
                f" mesh axes each leaf varies, got axis {axis!r} without that record."
                " Use `check_vma=True`, or clip outside of `shard_map`."
            )


def all_devices(
    parts: Mapping[Axes, jax.Array], collective: Callable[..., jax.Array]
) -> jax.Array:
    """Combines per-device parts into the same value everywhere, in one collective.

    Args:
      parts: non-negative arrays of one shape, by the axes over which each varies. A
        part is counted once on the axes that it does not vary over.
      collective: ``jax.lax.psum`` or ``jax.lax.pmax``.
    """
    union = sorted(frozenset[str]().union(*parts))
    if not union:
        (part,) = parts.values()
        return part
    once = [
        _at_origin(part, [a for a in union if a not in axes])
        for axes, part in parts.items()
    ]
    if collective is jax.lax.psum:
        return jax.lax.psum(sum(once), tuple(union))
    return collective(jnp.max(jnp.stack(once), axis=0), tuple(union))


def _at_origin(part: jax.Array, axes: list[str]) -> jax.Array:
    for axis in axes:
        part = jnp.where(jax.lax.axis_index(axis) == 0, part, jnp.zeros_like(part))
    return part
