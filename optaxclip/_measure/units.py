"""The numbers of all scopes as rules see them, and which of them is of which leaf."""

import dataclasses
import math
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
    if EVERYTHING in scopes:
        return [packed] * len(leaves.counted)
    stacks = _stacks.of_leaves(leaves)
    if any(stacks) and not isinstance(packed, Units):
        return of_layers(packed, scopes, stacks)
    if isinstance(packed, Units):
        scopes = [(i,) for some in packed.places for i in some]
        entries = [x for array in packed.arrays for x in _entries(array)]
    else:
        entries = _entries(packed)
    pairs = zip(scopes, entries, strict=True)
    return [x for _, x in sorted((i, x) for scope, x in pairs for i in scope)]


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


def _entries(array: jax.Array) -> list[jax.Array]:
    """Returns ``array[i]`` for every i, on a CPU by way of blocks of the array.

    There an entry of the whole would make the kernel of each leaf a different one, each
    compiled for itself. Leaves at one place of their blocks share theirs.
    """
    if len(array) < 2 or not isinstance(array, Tracer):
        return list(array)
    return jax.lax.platform_dependent(array, cpu=_by_blocks, default=list)


def _by_blocks(array: jax.Array) -> list[jax.Array]:
    size = math.isqrt(len(array))
    blocks = [_apart(array[i : i + size]) for i in range(0, len(array), size)]
    return [entry for block in blocks for entry in block]


def _apart(x: jax.Array) -> jax.Array:
    """Returns ``x``, divided by 1: the compiler puts no division into many kernels."""
    return x / jnp.where(x == x, 1, x)
