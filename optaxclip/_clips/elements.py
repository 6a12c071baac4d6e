"""How much did a clip of single elements take away? Two more looks at every leaf."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip._measure import formulas
from optaxclip._mesh import splits as _splits
from optaxclip._trees import infinity, leaves as _leaves

Bounds = tuple[jax.Array, ...]  # low and high, or the one limit of a range


class Seen(NamedTuple):
    """What was measured before the clip, one entry per leaf.

    Attributes:
      largest: modulus of the largest element.
      fractions: shares of the elements that are out of bounds.
      counted: the counted leaves, for the clip: it waits for them to be measured, else
        one that overwrites them needs a copy.
    """

    largest: jax.Array
    fractions: jax.Array
    counted: list[Any]


def seen(leaves: _leaves.Leaves, bounds: Sequence[Bounds]) -> Seen:
    """Measures the leaves."""
    splits = _splits.splits(leaves)
    measured, bounds = jax.lax.stop_gradient((leaves.measured(), bounds))
    over = [_over(x, some) for x, some in zip(measured, bounds, strict=True)]
    sizes = np.array(formulas.sizes(leaves.tree(over), splits), leaves.dtype)
    largest, counts = (
        formulas.leaf_norms(tree, splits, ord=ord).norms(tree)
        for tree, ord in ((leaves.tree(measured), jnp.inf), (leaves.tree(over), 1))
    )
    counted = [jnp.asarray(leaves.leaves[i]) for i in leaves.counted]
    largest = infinity.replaced(largest.astype(leaves.dtype))
    found = Seen(largest, counts / sizes, counted)
    if jax.sharding.get_abstract_mesh().manual_axes:
        return found  # JAX 0.8 takes all of them to vary where one does
    return Seen(*jax.lax.optimization_barrier(tuple(found)))


@jax.jit
def _over(x: jax.Array, bounds: Bounds) -> jax.Array:
    """Returns 1 where an element is out of bounds, 0 elsewhere, NaN for a NaN.

    By arithmetic alone, which a CPU does in the loop that adds them up: it would write
    what a comparison gives to memory, first.
    """
    # Bounds of its own, for what the clip shares with the sum would go to memory too.
    bounds = jax.lax.optimization_barrier(bounds)
    size = jnp.abs(x) if jnp.iscomplexobj(x) else x
    low = -bounds[0] if len(bounds) == 1 else bounds[0]
    excess = jnp.maximum(jnp.maximum(size - bounds[-1], low - size), 0)
    return jnp.minimum(excess * float(jnp.finfo(excess.dtype).max), 1)
