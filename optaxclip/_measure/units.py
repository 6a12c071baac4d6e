"""The numbers of all scopes as rules see them, and which of them is of which leaf."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optaxclip._measure import stacks as _stacks
from optaxclip._trees.leaves import Leaves

Packed = Any  # a scalar if global, a vector, or Units
Scope = tuple[int, ...]  # positions of its leaves among the counted ones
EVERYTHING: Scope = ()  # of a bare scalar, which covers every leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Units:
    """One number for each unit, those of several leaves in one array.

    Attributes:
      arrays: ``array[row]`` are the numbers of one leaf, with the dimensions kept; one
        number if the leaf is one unit.
      places: of every array, the places of its leaves in tree order.
    """

    arrays: list[jax.Array]
    places: tuple[Scope, ...] = dataclasses.field(metadata={"static": True})

    def of_leaves(self) -> list[jax.Array]:
        """Returns the numbers of every leaf, in tree order."""
        pairs = zip(self.places, self.arrays, strict=True)
        rows = {i: array[row] for some, array in pairs for row, i in enumerate(some)}
        return [rows[i] for i in range(len(rows))]

    def shapes(self) -> dict[int, tuple[int, ...]]:
        """Returns the shape of the numbers of every leaf, by its place."""
        pairs = zip(self.places, self.arrays, strict=True)
        return {i: array.shape[1:] for some, array in pairs for i in some}

    def of_some(self, chosen: Sequence[int]) -> "Units":
        """Returns the numbers of some leaves."""
        new = {old: place for place, old in enumerate(chosen)}
        kept = [tuple(new[i] for i in some if i in new) for some in self.places]
        leaves = self.of_leaves()
        return joined([leaves[i] for i in chosen], [some for some in kept if some])


def joined(leaves: Sequence[jax.Array], places: Sequence[Scope]) -> Units:
    """Returns the numbers of all leaves, those at some places in one array each."""
    arrays = [jnp.stack([leaves[i] for i in some]) for some in places]
    return Units(arrays, tuple(places))


def rejoined(units: Units, places: Sequence[Scope]) -> Units:
    """Returns the numbers of all leaves, those at some other places in one array."""
    arrays = dict(zip(units.places, units.arrays, strict=True))
    if any(some not in arrays for some in places):
        leaves = units.of_leaves()
        new = {some: jnp.stack([leaves[i] for i in some]) for some in places}
        arrays = new | arrays
    return Units([arrays[some] for some in places], tuple(places))


def like(packed: Packed, other: Packed) -> Packed:
    """Returns the numbers joined as others are, if they are of equal units.

    In which order arrays come, and what is in one, depends on all leaves there are.
    """
    if not isinstance(packed, Units) or not isinstance(other, Units):
        return packed
    equal = packed.shapes() == other.shapes()
    return rejoined(packed, other.places) if equal else packed


def ones_at(leaves: frozenset[int], packed: Packed, scopes: Sequence[Scope]) -> Packed:
    """Returns the numbers of all scopes, 1 for those of some leaves."""
    if not leaves:
        return packed
    if EVERYTHING in scopes:
        return jnp.ones_like(packed)
    if not isinstance(packed, Units):
        chosen = np.array([leaves.issuperset(scope) for scope in scopes], bool)
        return jnp.where(chosen, 1, packed)
    rows = [np.array([i in leaves for i in some], bool) for some in packed.places]
    arrays = [
        jnp.where(row.reshape((-1,) + (1,) * (array.ndim - 1)), 1, array)
        for row, array in zip(rows, packed.arrays, strict=True)
    ]
    return dataclasses.replace(packed, arrays=arrays)


def of_each_leaf(leaves: Leaves) -> list[Scope]:
    """Returns the scopes of a norm of leaves: one for each, or for each layer in it."""
    stacks = enumerate(_stacks.of_leaves(leaves))
    return [(i,) for i, stack in stacks for _ in range(stack.layers if stack else 1)]


def of_leaf(packed: Packed, scopes: Sequence[Scope], leaves: Leaves) -> list[jax.Array]:
    """Returns for each counted leaf the entry of its scope.

    For a stack of layers, whose scopes are many, an array with the dimensions kept.
    """
    return [entry for (entry,) in of_leaf_together((packed,), scopes, leaves)]


def of_leaf_together(
    columns: Sequence[Packed], scopes: Sequence[Scope], leaves: Leaves
) -> list[tuple[jax.Array, ...]]:
    """Returns the same of several that are packed alike, looked up together."""
    if EVERYTHING in scopes:
        return [tuple(columns)] * len(leaves.counted)
    stacks = _stacks.of_leaves(leaves)
    is_fine = isinstance(columns[0], Units)
    if any(stacks) and not is_fine:
        found = (of_layers(column, scopes, stacks) for column in columns)
        return list(zip(*found, strict=True))
    if is_fine:
        scopes = [(i,) for some in columns[0].places for i in some]
        arrays = zip(*(column.arrays for column in columns), strict=True)
    else:
        arrays = [columns]
    entries = [entry for some in arrays for entry in _entries(*some)]
    pairs = list(zip(scopes, entries, strict=True))
    by_leaf = {i: entry for scope, entry in pairs for i in scope}
    return [by_leaf[i] for i in range(len(by_leaf))]


def of_each(
    numbers: Any, scopes: Sequence[Scope], stacks: _stacks.Stacks
) -> Sequence[Any]:
    """Returns the number of each leaf, given those of all scopes, or that of all."""
    if isinstance(numbers, float) or EVERYTHING in scopes:
        return [numbers] * len(stacks)
    if isinstance(numbers, Units):
        return numbers.of_leaves()
    return of_layers(numbers, scopes, stacks)


def of_layers(
    vector: jax.Array, scopes: Sequence[Scope], stacks: _stacks.Stacks
) -> list[jax.Array]:
    """Returns for each leaf the entry of its scope, of a stack those of all layers."""
    numbers: list[list[int]] = [[] for _ in stacks]
    for number, scope in enumerate(scopes):
        for i in scope:
            numbers[i].append(number)
    return [
        stack.kept(vector[np.array(some)]) if stack else vector[some[0]]
        for some, stack in zip(numbers, stacks, strict=True)
    ]


def _entries(*arrays: jax.Array) -> list[tuple[jax.Array, ...]]:
    """Returns the entries of all arrays at place 0, at place 1, ..."""
    if len(arrays[0]) < 2 or not isinstance(arrays[0], Tracer):
        return _rows(*arrays)
    return jax.lax.platform_dependent(*arrays, cpu=by_unknown_places, default=_rows)


def _rows(*arrays: jax.Array) -> list[tuple[jax.Array, ...]]:
    return list(zip(*arrays, strict=True))


def by_unknown_places(*arrays: jax.Array) -> list[tuple[jax.Array, ...]]:
    """Does the same with places that a CPU's compiler does not know.

    With a place that it knows the kernel of each leaf would be a different one, each
    compiled for itself.
    """
    places = jax.lax.optimization_barrier(list(np.arange(len(arrays[0]), dtype="i4")))
    every = jnp.stack(arrays)
    rows = [jax.lax.dynamic_index_in_dim(every, i, 1, keepdims=False) for i in places]
    if every.ndim > 2:  # or the product would look up each number anew
        rows = jax.lax.optimization_barrier(rows)
    return [tuple(row) for row in rows]
