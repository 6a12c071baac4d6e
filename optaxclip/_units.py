"""The numbers of all scopes as rules see them, and which of them is of which leaf."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

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


def of_leaf(packed: Packed, scopes: Sequence[Scope], count: int) -> list[jax.Array]:
    """Returns for each of ``count`` leaves the entry of its scope."""
    if EVERYTHING in scopes:
        return [packed] * count
    if isinstance(packed, Units):
        scopes = [(i,) for some in packed.places for i in some]
        entries = [x for array in packed.arrays for x in _entries(array)]
    else:
        entries = _entries(packed)
    pairs = zip(scopes, entries, strict=True)
    return [x for _, x in sorted((i, x) for scope, x in pairs for i in scope)]


def _entries(array: jax.Array) -> list[jax.Array]:
    """Returns ``array[i]`` for every i, on a CPU by way of blocks of the array.

    There an entry of the whole would make the kernel of each leaf a different one, each
    compiled for itself. Leaves at one place of their blocks share theirs.
    """
    count = len(array)
    if count < 2 or jax.default_backend() != "cpu":
        return [array[i] for i in range(count)]
    size = math.isqrt(count)
    blocks = [_apart(array[i : i + size]) for i in range(0, count, size)]
    return [block[i] for block in blocks for i in range(len(block))]


def _apart(x: jax.Array) -> jax.Array:
    """Returns ``x``, divided by 1: the compiler puts no division into many kernels."""
    return x / jnp.where(x == x, 1, x)
