"""The plain formula of the norms of units, such as the output neurons of a kernel."""

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import PartitionSpec

from optaxclip._measure import (
    along as _along,
    forms,
    layouts,
    names as _names,
    reduce,
    stacks as _stacks,
    units as _units,
)
from optaxclip._measure.formulas import checked
from optaxclip._mesh import splits as _splits, spread as _spread
from optaxclip._trees import leaves as _leaves, paths as _paths

Axis = int | tuple[int, ...]
Axes = Axis | Mapping[str, Axis] | None


def unit_norms(
    updates: Any, splits: _splits.Splits, *, ord: float = 2, axis: Axes = None
) -> forms.Plain:
    _leaves.check_dense(updates, "a norm of units")
    leaves, paths = jax.tree.leaves(updates), _paths.paths(updates)
    stacks = _stacks.of(updates, splits)
    axes: list[Axis | None] = [None if isinstance(axis, Mapping) else axis] * len(
        leaves
    )
    if isinstance(axis, Mapping):
        winners = _paths.resolve(axis, paths, "`axis`")
        axes = [None if winner is None else axis[winner] for winner in winners]
    rows = zip(leaves, splits, axes, paths, stacks, strict=True)
    units = [_unit(*row) for row in rows]
    is_whole = [len(unit.dimensions) == unit.array.ndim for unit in units]
    whole = tuple(i for i, alone in enumerate(is_whole) if alone)
    rest = [i for i, alone in enumerate(is_whole) if not alone]
    checked(ord)

    def places(layout: layouts.Layout) -> tuple[_units.Scope, ...]:
        alike = _along.alike([units[i] for i in rest], layout)
        found = tuple(tuple(rest[i] for i in some) for some in alike)
        # Of those that are whole leaves one number each, in one array.
        return (*found, whole) if whole or not found else found

    joined = places(layouts.AS_THEY_ARE)
    spread = _spread.of(updates)
    specs: list[Any] = [
        PartitionSpec() if some == whole else _spec(some, units[some[0]], spread)
        for some in joined
    ]

    def scaled(updates: Any, layout: layouts.Layout) -> forms.Scaled:
        leaves = jax.tree.leaves(updates)
        parts = [units[i]._replace(array=leaves[i]) for i in rest]
        pieces = layouts.pieces(
            [leaves[i] for i in whole],
            [(place,) for place in range(len(whole))],
            tuple(splits[i] for i in whole),
            [None] * len(whole),
            layout,
        )

        def at(scale: reduce.Scale) -> _units.Units:
            arrays = _along.norms(parts, scale, ord, layout)
            if len(arrays) < len(places(layout)):
                norms = reduce.norms(pieces, scale, len(whole), ord, layout)
                arrays.append(norms)
            return _units.Units(arrays, places(layout))

        return at

    def every_name() -> _names.Names:
        return [
            _names.of_layer(path, stack and (stack.root, stack.depth), layer)
            for path, stack in zip(paths, stacks, strict=True)
            for layer in range(stack.layers if stack else 1)
        ]

    differ = [units[i].kept for i in rest]
    return forms.Plain(
        scaled,
        tuple((i,) for i in range(len(leaves))),
        frozenset[str]().union(*differ),
        every_name,
        specs=_units.Units(specs, joined),
    )


def _spec(
    places: _units.Scope, unit: _along.Reduction, spread: _spread.Spread | None
) -> Any:
    """Returns how the norms of some leaves are spread, if it is known of the leaves."""
    shape = [1 if d in unit.dimensions else n for d, n in enumerate(unit.array.shape)]
    return spread.of_units(places, shape) if spread else PartitionSpec()


def _unit(
    leaf: jax.Array,
    split: _splits.Split,
    axis: Axis | None,
    path: str,
    stack: _stacks.Stack | None,
) -> _along.Reduction:
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
    # Those of a layer, if it is one of many: axes are counted as in the layer alone.
    own = [d for d in range(leaf.ndim) if stack is None or d != stack.axis]
    axes = _unit_axes(tuple(shape[d] for d in own), axis, path)
    dimensions = tuple({own[d]: None for d in axes})
    along = -1 if stack is None else stack.axis
    over = split.along(dimensions)
    return _along.Reduction(leaf, dimensions, over, split.axes - over, along)


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
