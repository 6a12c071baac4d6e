"""What remembers every element: arrays in the places of the params.

A memory is a tree like the params, so that recipes which shard an optimizer's state
like them find it (``optax.tree.map_params``).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip._trees import leaves as _leaves
from optaxclip._trees.leaves import Leaves


def zeros(leaves: Leaves) -> Any:
    """Returns a memory of updates."""
    kinds = [leaf.dtype for leaf in leaves.abstract()]
    return _zeros(leaves, kinds)


def real_zeros(leaves: Leaves) -> Any:
    """Returns a memory of the moduli of updates."""
    return _zeros(leaves, [leaves.dtype] * len(leaves.counted))


def recalled(memory: Any, leaves: Leaves) -> list[jax.Array]:
    """Returns what is remembered of every counted leaf.

    Raises:
      ValueError: the memory is one of other leaves.
    """
    found = jax.tree.leaves(memory)
    remedy = "it belongs to other params. Call `state = tx.init(params)`."
    if len(found) != len(leaves.counted):
        raise ValueError(
            "Expected a state with an array for each of"
            f" {len(leaves.counted)} leaves, got {len(found)}: {remedy}"
        )
    for place, i in enumerate(leaves.counted):
        if np.shape(found[place]) != np.shape(leaves.leaves[i]):
            raise ValueError(
                f"Expected a state of shape {np.shape(leaves.leaves[i])} at"
                f" {leaves.paths()[place]!r}, got {np.shape(found[place])}: {remedy}"
            )
    return [_leaves.widen(x, leaves.dtype) for x in found]


def remembered(memory: Any, new: Sequence[jax.Array]) -> Any:
    """Returns a memory with new arrays, of its structure and dtypes."""
    old, treedef = jax.tree.flatten(memory)
    pairs = zip(old, new, strict=True)
    return treedef.unflatten([x.astype(was.dtype) for was, x in pairs])


def _zeros(leaves: Leaves, kinds: Sequence[Any]) -> Any:
    pairs = zip(leaves.counted, kinds, strict=True)
    return leaves.tree([jnp.zeros_like(leaves.leaves[i], kind) for i, kind in pairs])
