"""What the clips of matrices share: which those are, and their size as a norm.

A leaf is a stack of matrices, its last two axes; one of rank 0 or 1 is a column.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from optaxclip._measure import names as _names, scopes as _scopes, units as _units
from optaxclip._mesh import splits as _splits
from optaxclip._trees import leaves as _leaves


def splits(leaves: _leaves.Leaves) -> _splits.Splits:
    """Returns how the counted leaves are split over devices, between their matrices.

    Raises:
      ValueError: a matrix is split.
    """
    found = _splits.splits(leaves)
    every = zip(found, leaves.abstract(), leaves.paths(), strict=True)
    for split, leaf, path in every:
        of_matrix = range(max(len(leaf.shape) - 2, 0), len(leaf.shape))
        is_known = split.dimensions is not None and len(leaf.shape) > 2
        if split.axes and (not is_known or split.along(of_matrix)):
            raise ValueError(
                f"Expected whole matrices, got {path!r} split over the mesh axes"
                f" {sorted(split.axes)}: its singular values are not those of its"
                ' pieces. Gather it, by `jax.lax.all_gather(..., to="invarying")`, or'
                " clip under `jit`, outside of `shard_map`. For a stack that is split"
                " between its matrices, say so by `optaxclip.over_axes(clip, specs)`."
            )
    return found


def axes(splits: _splits.Splits) -> _splits.Axes:
    """Returns the mesh axes over which matrices differ."""
    return frozenset[str]().union(*(split.axes for split in splits))


def matrices(leaves: _leaves.Leaves) -> list[jax.Array]:
    """Returns the counted leaves as stacks of matrices."""
    _leaves.check_dense(leaves.tree(leaves.counted), "singular values")
    whole = [put_like(x, None) for x in leaves.measured()]
    return [x if x.ndim > 1 else x.reshape(-1, 1) for x in whole]


def put_like(x: jax.Array, leaf: Any) -> jax.Array:
    """Returns x, spread like a leaf or not at all, where types say how (explicit axes).

    There a decomposition refuses what is spread; elsewhere the compiler gathers it.
    """
    own: Any = getattr(jax.typeof(x if leaf is None else leaf), "sharding", None)
    if own is None or not any(isinstance(e, str | tuple) and e for e in own.spec):
        return x
    to = PartitionSpec() if leaf is None else own.spec
    return jax.sharding.reshard(x, NamedSharding(own.mesh, to))


def scaled(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns matrices in units whose squares are in range, and these powers of two.

    One with a NaN or an infinity is 0 in a unit of NaN.
    """
    parts = jnp.maximum(jnp.abs(x.real), jnp.abs(x.imag))
    largest = jnp.max(parts, axis=(-2, -1), keepdims=True)
    is_finite = jnp.isfinite(largest)
    usable = jnp.where(is_finite & (largest > 0), largest, 1)
    mantissa, _ = jnp.frexp(jax.lax.stop_gradient(usable))
    end = 2.0 ** (3 * jnp.finfo(usable.dtype).maxexp // 4)
    unit = jnp.clip(jax.lax.stop_gradient(usable) / (2 * mantissa), 1 / end, end)
    return jnp.where(is_finite, x, 0) / unit, jnp.where(is_finite, unit, jnp.nan)


def as_norms(
    sizes: Sequence[jax.Array],
    units: Sequence[jax.Array],
    axes: _splits.Axes = frozenset(),
) -> Any:
    """Returns the sizes of matrices in their units, dimensions kept, as norms."""
    scopes = tuple((i,) for i in range(len(sizes)))
    norms = [x + 0 * unit for x, unit in zip(sizes, units, strict=True)]
    powers = [1 / jnp.where(jnp.isnan(unit), 1, unit) for unit in units]
    return _scopes.Measured(_packed(norms), _packed(powers), scopes, axes)


def zeros(leaves: _leaves.Leaves) -> Any:
    """Returns norms of zero for all matrices."""
    shapes = [(*x.shape[:-2], 1, 1) for x in leaves.abstract()]
    nothing = [jnp.zeros(shape, leaves.dtype) for shape in shapes]
    return as_norms(nothing, [jnp.ones_like(x) for x in nothing])


def names(leaves: _leaves.Leaves) -> _names.Names:
    """Returns the name of every leaf."""
    return [_names.Name(path) for path in leaves.paths()]


def _packed(values: list[jax.Array]) -> Any:
    sizes = [x.reshape(()) if x.ndim == 2 else x for x in values]
    if not any(x.ndim for x in sizes):
        return jnp.stack(sizes) if sizes else jnp.zeros(0, jnp.float32)
    places: dict[int | None, list[int]] = {}
    for i, x in enumerate(sizes):
        places.setdefault(i if x.ndim else None, []).append(i)
    return _units.joined(sizes, [tuple(some) for some in places.values()])
