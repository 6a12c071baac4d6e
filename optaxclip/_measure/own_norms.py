"""Which norm is of which scope? For norms that this library did not measure itself."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optaxclip._measure import layouts, names as _names, reduce, stacks as _stacks
from optaxclip._measure.forms import Plain, Scaled
from optaxclip._measure.scopes import Measured, Norm, unscaled
from optaxclip._measure.units import (
    EVERYTHING,
    Packed,
    Scope,
    joined,
)
from optaxclip._mesh import splits as _splits, summed
from optaxclip._trees import paths as _paths
from optaxclip._trees.leaves import Leaves, is_numeric


def formula_of(norm: Norm, updates: Any, splits: _splits.Splits) -> Plain:
    """Returns what a norm of the user's own gives.

    Leaves that are given the very same scalar are one scope: so a norm of groups says
    which leaves belong together without saying anything.
    """

    def packed(updates: Any) -> _Sorted:
        return _sorted(norm(updates), treedef, stacks)

    def scaled(updates: Any, layout: layouts.Layout) -> Scaled:
        del layout

        def at(scale: reduce.Scale) -> Packed:
            if isinstance(scale, float) and scale == 1:
                return found.norms
            leaves = (reduce.scaled(x, scale) for x in jax.tree.leaves(updates))
            return packed(treedef.unflatten(leaves)).norms

        return at

    def every_name() -> _names.Names:
        bases = _names.of_scopes(found.scopes, _paths.paths(updates))
        pairs = zip(bases, found.layers, strict=True)
        return [_names.of_layer(x and x.path, *layer) for x, layer in pairs]

    treedef, stacks = jax.tree.structure(updates), _stacks.of(updates, splits)
    norms = _numbers(norm(updates))
    summed.check_same_everywhere(norms, splits)
    found = _sorted(norms, treedef, stacks)
    return Plain(scaled, found.scopes, names=every_name)


def given(norms: Any, leaves: Leaves) -> Measured:
    """Sorts norms that somebody else measured by scope."""
    holes = jax.tree.structure(leaves.tree(leaves.counted))
    found = _sorted(_numbers(norms), holes, _stacks.of_leaves(leaves))
    return unscaled(found.norms, found.scopes, leaves.dtype)


def _numbers(norms: Any) -> Any:
    for some in jax.tree.leaves(norms):
        if not is_numeric(some):
            raise TypeError(
                f"Expected norms that are numbers, got {some!r} of type"
                f" {type(some).__name__}. A norm is a function of updates that returns"
                " them: `norms.leaf_norms`, or what `norms.group_norms()` returns."
            )
    return norms


class _Sorted(NamedTuple):
    """Norms by scope, and which layer of which stack each scope is."""

    norms: Packed
    scopes: tuple[Scope, ...]
    layers: Sequence[tuple[Any, int]]


def _sorted(norms: Any, treedef: Any, stacks: _stacks.Stacks) -> _Sorted:
    if jax.tree.structure(norms) == jax.tree.structure(0.0) and jnp.ndim(norms) == 0:
        return _Sorted(jnp.asarray(norms), (EVERYTHING,), ())
    skeleton = treedef.unflatten(range(treedef.num_leaves))
    try:
        values = jax.tree.leaves(jax.tree.broadcast(norms, skeleton))
    except ValueError as error:
        raise ValueError(
            "Expected norms that are a tree prefix of the updates (a scalar, or a"
            f" tree of scalars), got {jax.tree.structure(norms)} for updates {treedef}."
        ) from error
    members: dict[int, list[int]] = {}
    for position, value in enumerate(values):
        members.setdefault(id(value), []).append(position)
    scopes = list(members.values())
    distinct = [jnp.asarray(values[some[0]]) for some in scopes]
    kinds = [_layers(x, some, stacks) for x, some in zip(distinct, scopes, strict=True)]
    if any(x.ndim and not kind for x, kind in zip(distinct, kinds, strict=True)):
        packed = joined(distinct, [(i,) for i in range(len(distinct))])
        return _Sorted(packed, tuple(map(tuple, scopes)), [(None, 0)] * len(scopes))
    flat = [x.reshape(x.size) for x in distinct]
    rows = [
        (tuple(some), (kind, n))
        for x, some, kind in zip(flat, scopes, kinds, strict=True)
        for n in range(x.size)
    ]
    if not flat:
        return _Sorted(jnp.zeros(0), (), ())
    vector = jnp.concatenate(flat) if any(kinds) else jnp.stack(distinct)
    return _Sorted(vector, tuple(x for x, _ in rows), [layer for _, layer in rows])


def _layers(
    value: jax.Array, scope: Sequence[int], stacks: _stacks.Stacks
) -> tuple[str, int] | None:
    """Returns of which stack the numbers are those of the layers, None if of none."""
    own = [stacks[i] for i in scope]
    fits = [stack is not None and value.size == stack.layers for stack in own]
    first = own[0]
    return (first.root, first.depth) if value.ndim and first and all(fits) else None
