"""The plain formulas of the norms, which over- and underflow: `_scopes` rescues them.

Each takes the tree of counted leaves, in the dtype of the arithmetic, and how every
leaf is split over devices.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optaxclip import _paths, _reduce, _scopes, _splits, _units

Axis = int | tuple[int, ...]
Axes = Axis | Mapping[str, Axis] | None
Labels = Mapping[str, Hashable] | Callable[[Any], Any] | None


def global_norm(
    updates: Any, splits: _splits.Splits, *, ord: float = 2
) -> _scopes.Plain:
    leaves = jax.tree.leaves(updates)
    norms = _scope_norms(leaves, splits, [0] * len(leaves), 1, checked(ord))

    def scaled(scale: float) -> jax.Array:
        return norms(scale)[0]

    return _scopes.Plain(scaled(1.0), (_units.EVERYTHING,), scaled)


def leaf_norms(
    updates: Any, splits: _splits.Splits, *, ord: float = 2
) -> _scopes.Plain:
    leaves = jax.tree.leaves(updates)
    places = range(len(leaves))
    norms = _scope_norms(leaves, splits, places, len(leaves), checked(ord))
    return _scopes.Plain(norms(1.0), tuple((i,) for i in range(len(leaves))), norms)


def leaf_rms(updates: Any, splits: _splits.Splits) -> _scopes.Plain:
    pairs = zip(jax.tree.leaves(updates), splits, strict=True)
    sizes = [x.size * _splits.copies(split.axes) for x, split in pairs]
    plain = leaf_norms(updates, splits)
    roots = jnp.sqrt(jnp.asarray(sizes, plain.norms.dtype))
    return _scopes.Plain(
        plain.norms / roots, plain.scopes, lambda scale: plain.scaled(scale) / roots
    )


def group_norms(
    updates: Any, splits: _splits.Splits, *, labels: Labels, ord: float
) -> _scopes.Plain:
    groups: dict[Hashable, list[int]] = {}
    for position, label in enumerate(_labels(updates, labels)):
        groups.setdefault(label, []).append(position)
    members = list(groups.values())
    numbers = {i: number for number, some in enumerate(members) for i in some}
    leaves = jax.tree.leaves(updates)
    scopes = [numbers[i] for i in range(len(leaves))]
    norms = _scope_norms(leaves, splits, scopes, len(members), ord)
    return _scopes.Plain(norms(1.0), tuple(map(tuple, members)), norms)


def excluding(
    updates: Any,
    splits: _splits.Splits,
    formula: _scopes.Formula,
    exclude: tuple[str, ...],
) -> _scopes.Plain:
    matching = _paths.matching(exclude, _paths.paths(updates), "`exclude`")
    leaves, treedef = jax.tree.flatten(updates)
    counted = [
        jnp.zeros_like(leaf) if is_excluded else leaf
        for leaf, is_excluded in zip(leaves, matching, strict=True)
    ]
    return formula(treedef.unflatten(counted), splits)


def _scope_norms(
    leaves: Sequence[jax.Array],
    splits: Sequence[_splits.Split],
    scopes: Sequence[int],
    count: int,
    ord: float,
) -> Callable[[float], jax.Array]:
    """Returns a function from a scale to the norms of the scopes 0, 1, ..."""
    pieces = _reduce.pieces(leaves, scopes, [split.axes for split in splits])
    return lambda scale: _reduce.norms(pieces, scale, count, ord)


def _labels(updates: Any, labels: Labels) -> Sequence[Hashable]:
    paths = _paths.paths(updates)
    if labels is None:
        return [_paths.layer(path) for path in paths]
    if isinstance(labels, Mapping):
        return [labels[winner] for winner in _paths.cover(labels, paths, "`labels`")]
    tree = labels(updates)
    try:
        return jax.tree.structure(updates).flatten_up_to(tree)
    except ValueError as error:
        raise ValueError(
            "Expected `labels` to return a tree of labels of the structure of the"
            f" updates, {jax.tree.structure(updates)}, got {jax.tree.structure(tree)}."
        ) from error


def unit_norms(
    updates: Any, splits: _splits.Splits, *, ord: float = 2, axis: Axes = None
) -> _scopes.Plain:
    leaves = jax.tree.leaves(updates)
    paths = _paths.paths(updates)
    axes: list[Axis | None] = [None if isinstance(axis, Mapping) else axis] * len(
        leaves
    )
    if isinstance(axis, Mapping):
        winners = _paths.resolve(axis, paths, "`axis`")
        axes = [None if winner is None else axis[winner] for winner in winners]
    units = [_unit(*one) for one in zip(leaves, splits, axes, paths, strict=True)]
    is_whole = [len(unit.dimensions) == unit.array.ndim for unit in units]
    whole = tuple(i for i, alone in enumerate(is_whole) if alone)
    rest = [i for i, alone in enumerate(is_whole) if not alone]
    of_whole = _scope_norms(
        [leaves[i] for i in whole],
        [splits[i] for i in whole],
        range(len(whole)),
        len(whole),
        checked(ord),
    )
    parts = [units[i] for i in rest]
    places = [tuple(rest[i] for i in some) for some in _reduce.alike(parts)]

    def norms(scale: float) -> _units.Units:
        arrays = _reduce.kept_norms(parts, scale, ord)
        if whole or not parts:
            return _units.Units([*arrays, of_whole(scale)], (*places, whole))
        return _units.Units(arrays, tuple(places))

    differ = [splits[i].axes - units[i].axes for i in rest]
    return _scopes.Plain(
        norms(1.0),
        tuple((i,) for i in range(len(leaves))),
        norms,
        frozenset[str]().union(*differ),
    )


def _unit(
    leaf: jax.Array, split: _splits.Split, axis: Axis | None, path: str
) -> _reduce.Kept:
    """Returns along which dimensions of a leaf, and mesh axes, a unit goes."""
    if split.dimensions is None:
        if leaf.ndim > 1:
            raise ValueError(
                f"Expected to know along which of its dimensions {path!r} is split over"
                f" the mesh axes {sorted(split.axes)}, for a norm of units: its type"
                " doesn't say. Pass its spec by `optaxclip.over_axes(clip, specs)`."
            )
        split = split._replace(dimensions=(split.axes,))
    shape = split.whole_shape(leaf.shape)
    dimensions = tuple({d % leaf.ndim: None for d in _unit_axes(shape, axis, path)})
    return _reduce.Kept(leaf, dimensions, split.along(dimensions))


def _unit_axes(shape: tuple[int, ...], axis: Axis | None, path: str) -> tuple[int, ...]:
    axes = (axis,) if isinstance(axis, int) else axis
    if axes is None:
        if sum(size > 1 for size in shape) <= 1:
            return tuple(range(len(shape)))
        if len(shape) > 5:
            raise ValueError(
                f"Expected a rank of at most 5, got shape {shape} at {path!r}."
                " Name the axes of a unit with `axis`."
            )
        return (0,) if len(shape) < 4 else tuple(range(len(shape) - 1))
    if not isinstance(axes, tuple) or not all(isinstance(a, int) for a in axes):
        raise TypeError(
            f"Expected `axis` to be static, an int or a tuple, got {axis!r}."
        )
    if not all(-len(shape) <= a < len(shape) for a in axes):
        raise ValueError(
            f"Expected axes within shape {shape} at {path!r}, got axis={axis}."
            " Give each rank its own axes: `axis={pattern: axes}`."
        )
    return axes


def checked(ord: float) -> float:
    """Returns ``ord`` if there is a norm of that order, and raises otherwise."""
    if isinstance(ord, bool) or not isinstance(ord, int | float) or not ord >= 1:
        raise ValueError(
            f"Expected ord >= 1, got ord={ord!r}. Use 1, 2, jnp.inf or any p."
        )
    return ord
