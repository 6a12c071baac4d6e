"""From reduced pieces to one number for each scope, over devices too."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip._measure import layouts
from optaxclip._measure.layouts import Piece
from optaxclip._mesh import collectives
from optaxclip._mesh.collectives import Axes

Combine = Callable[..., jax.Array]  # jnp.sum or jnp.max


def by_scope(
    parts: Sequence[Piece],
    count: int,
    combine: Combine,
    layout: layouts.Layout,
    dtype: Any = None,
) -> jax.Array:
    """Combines numbers that are not negative, those of one scope to one.

    Args: see `by_axes`.
    """
    totals = by_axes(parts, count, combine, layout, dtype)
    return collectives.all_devices(totals, collective(combine))


def by_axes(
    parts: Sequence[Piece],
    count: int,
    combine: Combine,
    layout: layouts.Layout,
    dtype: Any = None,
) -> dict[Axes, jax.Array]:
    """Does so on each device, by the mesh axes over which the numbers then differ.

    Args:
      parts: pieces reduced along their first axes to be reduced, `layouts.first`.
      count: how many scopes there are: 0, 1, ...
      combine: what reduced them.
      layout: how rows are joined.
      dtype: of the result; numbers are cast to it all at once, on each device.
    """
    if not parts:
        return {frozenset(): jnp.zeros(count)}
    whole = [part for part in parts if not part.by_rows]
    by_row = [part for part in parts if part.by_rows]
    # No sum is negative; of `abs` the compiler doesn't make one sum of the two again.
    for row in layouts.joined(by_row, layout):
        total = combine(jnp.abs(row.array), axis=1)
        whole.append(row._replace(array=total.astype(row.array.dtype)))
    if layout.filled:
        whole = [part._replace(array=jnp.abs(part.array)) for part in whole]
    alike: dict[Axes, list[Piece]] = {}
    for part in whole:
        if part.stack:
            every = part.stack.every(collectives.replicated(part.array))
            part = part._replace(array=every)
        alike.setdefault(part.axes, []).append(part)
    return {
        axes: jnp.asarray(_total(some, count, combine), dtype)
        for axes, some in alike.items()
    }


def collective(combine: Combine) -> Combine:
    return jax.lax.psum if combine is jnp.sum else collectives.pmax


def _total(pieces: Sequence[Piece], count: int, combine: Combine) -> jax.Array:
    """Combines pieces of one element for each scope; a scope without any gets 0."""
    flat = jax.lax.concatenate([piece.array for piece in pieces], 0)
    scopes = [scope for piece in pieces for scope in piece.scopes]
    if scopes == list(range(count)):
        return flat
    if count == 1:
        return combine(flat, axis=0, keepdims=True)
    if sorted(scopes) == list(range(count)):
        return flat.at[np.argsort(scopes)].get(mode="promise_in_bounds")
    own = jnp.arange(count)[:, None] == np.array([scopes])
    return combine(jnp.where(own, flat[None], 0), axis=1)
