"""Drop-ins for Optax's clips of gradients that have a batch axis already."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optaxclip import factors, norms
from optaxclip._arguments import checks
from optaxclip._measure import scopes as _scopes
from optaxclip._mesh import collectives, splits as _splits
from optaxclip._per_example import examples
from optaxclip._trees import leaves as _leaves


def per_example_global_norm_clip(
    grads: Any, l2_norm_clip: ArrayLike
) -> tuple[Any, jax.Array]:
    """Returns the sum of gradients of examples, each clipped, and how many were.

    A drop-in for ``optax.per_example_global_norm_clip``, for those who have the
    gradients of all examples, from ``jax.vmap``; :func:`per_example_clipped_grad` needs
    less memory. An example with a NaN or an infinity contributes 0, where Optax lets it
    into the sum unclipped.

    Args:
      grads: tree of arrays with a leading batch axis.
      l2_norm_clip: largest norm of the gradient of an example.

    Raises:
      ValueError: leaves without one common batch axis, or split over devices inside
        ``shard_map``.

    Examples:
      >>> grads = {"w": jnp.array([[3.0, 4.0], [0.3, 0.4]])}
      >>> total, clipped = optaxclip.per_example_global_norm_clip(grads, 1.0)
      >>> print(total["w"], clipped)
      [0.90000004 1.2       ] 1

    References:
      Abadi et al., `Deep Learning with Differential Privacy
      <https://arxiv.org/abs/1607.00133>`_, 2016
    """
    checks.number(l2_norm_clip, "l2_norm_clip")
    totals, found = _clipped_sum(
        grads, norms.global_norm, examples.limits_of(l2_norm_clip, False)
    )
    return totals, jnp.sum(found < 1)


def per_example_layer_norm_clip(
    grads: Any, global_l2_norm_clip: ArrayLike, uniform: bool = True
) -> tuple[Any, Any]:
    """Returns the sum of gradients of examples, each leaf clipped, and how many were.

    A drop-in for ``optax.per_example_layer_norm_clip``. An example with a NaN or an
    infinity in any leaf contributes 0 to all of them.

    Args:
      grads: tree of arrays with a leading batch axis.
      global_l2_norm_clip: largest norm C of the whole gradient of an example.
      uniform: clip each of the K leaves to ``C / sqrt(K)``; else each to ``C`` times
        the root of its share of all elements.

    Raises:
      ValueError: see :func:`per_example_global_norm_clip`.

    Examples:
      >>> grads = [jnp.array([[3.0], [0.5]]), jnp.array([[0.0], [4.0]])]
      >>> totals, clipped = optaxclip.per_example_layer_norm_clip(grads, 2.0**0.5)
      >>> print(*totals, *clipped)  # each leaf of each example to 1
      [1.5] [1.] 1 1

    References:
      McMahan et al., `Learning Differentially Private Recurrent Language Models
      <https://arxiv.org/abs/1710.06963>`_, 2017
    """
    checks.number(global_l2_norm_clip, "global_l2_norm_clip")

    def by_size(measured: _scopes.Measured, leaves: _leaves.Leaves) -> jax.Array:
        sizes = [jnp.size(leaves.leaves[i]) for i in leaves.counted]
        shares = jnp.asarray(sizes, leaves.dtype) / sum(sizes)
        return jnp.asarray(global_l2_norm_clip, leaves.dtype) * jnp.sqrt(shares)

    limits = examples.limits_of(global_l2_norm_clip, False) if uniform else by_size
    totals, found = _clipped_sum(grads, norms.leaf_norms, limits)
    leaves = _leaves.flatten(totals)
    counts = jnp.sum(found < 1, axis=0)
    nobody = leaves._replace(leaves=[jnp.zeros((), counts.dtype)] * len(leaves.leaves))
    return totals, nobody.replaced([counts[i] for i in range(counts.size)])


def _clipped_sum(
    grads: Any, norm: _scopes.Norm, limits: examples.Limits
) -> tuple[Any, jax.Array]:
    """Returns the sum over the batch axis and the factor of every example."""
    grads = jax.tree.map(_inexact, grads)
    real = jnp.ones(examples.batch_size(grads), bool)
    differ = any(collectives.varying_axes(x) for x in jax.tree.leaves(grads))
    if differ or not _splits.types_are_kept():
        raise ValueError(
            "Expected gradients of the whole batch, got some that differ from device to"
            " device inside `shard_map`: nothing says whether the batch or a leaf is"
            " split. Use `per_example_clipped_grad`."
        )
    splits = (_splits.WHOLE,) * len(_leaves.flatten(grads).counted)
    rule = examples.Rule(norm, factors.rescale, limits)
    clipped = functools.partial(examples.clipped, rule, splits)
    example = jax.vmap(clipped)(grads)
    first = jax.tree.map(lambda x: x[0], grads)
    totals = examples.rounded_like(first, examples.added(example, real))
    return totals, examples.statistics(example, real, frozenset())[1]


def _inexact(x: ArrayLike) -> jax.Array:
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.float32)
