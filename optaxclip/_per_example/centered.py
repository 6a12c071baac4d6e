"""A mean of the updates of many workers in which a bad one has a bounded share."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from optaxclip import factors, norms
from optaxclip._arguments import checks
from optaxclip._mesh import collectives, splits as _splits
from optaxclip._per_example import examples
from optaxclip._trees import leaves as _leaves


class CenteredClip(NamedTuple):
    """What :func:`centered_clip` saw of the workers in its last iteration.

    Inside ``shard_map`` the arrays are those of the device's own workers, and the
    counts those of all.

    Attributes:
      norms: distance of each worker from the center, shape ``(workers,)``.
      factors: what the difference was multiplied by; 0 for one that is not finite.
      clipped_count: workers further away than the threshold, int32; those that are not
        finite do not count.
      nonfinite_count: workers with a NaN or an infinity, int32.
    """

    norms: jax.Array
    factors: jax.Array
    clipped_count: jax.Array
    nonfinite_count: jax.Array


def centered_clip(
    updates: Any, center: Any, max_norm: ArrayLike, *, num_iters: int = 1
) -> tuple[Any, CenteredClip]:
    r"""Returns the mean of many workers' updates, clipped around a center.

    .. math:: v \leftarrow v + \frac1n \sum_{i=1}^n (x_i - v) \cdot
      \min(1, \text{max\_norm} / \|x_i - v\|)

    starting at ``center``, the result of the step before (zeros at first). A worker or
    a microbatch that sends anything at all moves the mean by ``max_norm / n``.

    Guarantees:
      * Structure, shapes and dtypes of ``center`` are kept; the arithmetic is in
        float32 (float64 where a leaf is) throughout, and rounded once.
      * A worker with a NaN or an infinity contributes 0 and is counted; so does one
        whose difference from the center is too large for a number. The aggregate of
        finite centers is finite.
      * A worker at the center contributes 0, where the authors' code has NaN.
      * Inside ``shard_map`` workers may be spread over devices, and so may params:
        the axes over which a leaf of the updates varies and the center does not are
        those of the workers.

    Args:
      updates: tree of arrays with a leading axis of workers.
      center: tree of that structure without this axis, finite.
      max_norm: largest norm of a difference, all leaves together; a number, possibly
        traced, ``jnp.inf`` for the mean.
      num_iters: how often to repeat, static.

    Returns:
      The aggregate, which is the update of this step and the next center, and what was
      seen, a :class:`CenteredClip`.

    Raises:
      TypeError, ValueError: a max_norm that is not a number, is negative or NaN;
        ``num_iters`` below 1; trees that don't match; inside ``shard_map``, no types.

    Examples:
      >>> grads = {"w": jnp.array([[0.9], [1.1], [-1000.0], [jnp.nan]])}
      >>> center = {"w": jnp.array([1.0])}
      >>> center, seen = optaxclip.centered_clip(grads, center, max_norm=0.4)
      >>> print(center["w"], seen.clipped_count, seen.nonfinite_count)
      [0.9] 1 1

    References:
      Karimireddy et al., `Learning from History for Byzantine Robust Optimization
      <https://arxiv.org/abs/2012.10333>`_, 2020
    """
    checks.number(max_norm, "max_norm")
    is_int = isinstance(num_iters, int | np.integer) and not isinstance(num_iters, bool)
    if not is_int or num_iters < 1:
        raise ValueError(f"Expected num_iters >= 1, an int, got {num_iters!r}.")
    leaves, stacked = _leaves.flatten(center), _leaves.flatten(updates)
    dtype = jnp.promote_types(leaves.dtype, stacked.dtype)
    workers = [_leaves.widen(x, dtype) for x in _workers(stacked, leaves)]
    axes, splits = _spread(workers, leaves)
    limits = examples.limits_of(max_norm, False)
    rule = examples.Rule(norms.global_norm, factors.rescale, limits)
    clipped = jax.vmap(functools.partial(examples.clipped, rule, splits))
    is_worker = jnp.ones(workers[0].shape[0], bool)
    means = [_leaves.widen(leaves.leaves[i], dtype) for i in leaves.counted]
    seen: tuple[jax.Array, ...] = ()
    for _ in range(num_iters):
        example = clipped([x - v for x, v in zip(workers, means, strict=True)])
        sums = examples.added(example, is_worker)
        if axes:
            sums = jax.lax.psum(sums, tuple(sorted(axes)))
        seen = examples.statistics(example, is_worker, axes)
        count = seen[2].astype(dtype)
        means = [v + x / count for v, x in zip(means, sums, strict=True)]
    pairs = zip(means, leaves.counted, strict=True)
    aggregate = [_leaves.narrow(x, leaves.leaves[i]) for x, i in pairs]
    return leaves.replaced(aggregate), CenteredClip(*seen[:2], *seen[3:])


def _workers(stacked: _leaves.Leaves, leaves: _leaves.Leaves) -> list[Any]:
    """Returns the leaves of the workers that belong to the counted ones of the center.

    Raises:
      ValueError: the trees don't match, or nothing counts.
    """
    if stacked.treedef != leaves.treedef or not leaves.counted:
        different = sorted(set(stacked.paths()) ^ set(leaves.paths()))
        where = f"at {different[0]!r}" if different else "or have no leaves"
        raise ValueError(
            "Expected a center of the same structure as the updates: they differ"
            f" {where}. Start with `jax.tree.map(jnp.zeros_like, params)`."
        )
    workers = [stacked.leaves[i] for i in leaves.counted]
    size = jnp.shape(workers[0])[:1]
    for leaf, i, path in zip(workers, leaves.counted, leaves.paths(), strict=True):
        shape = jnp.shape(leaves.leaves[i])
        if not size or jnp.shape(leaf) != (*size, *shape) or size == (0,):
            expected = ", ".join(map(str, ("workers", *shape)))
            count = f", {size[0]} workers" if size else ""
            raise ValueError(
                f"Expected updates of shape ({expected}) at {path!r}{count}, got"
                f" {jnp.shape(leaf)}: all leaves have a leading axis of workers."
            )
    return workers


def _spread(
    workers: list[jax.Array], leaves: _leaves.Leaves
) -> tuple[collectives.Axes, _splits.Splits]:
    """Returns the mesh axes that split the workers, and how the center is split."""
    if not collectives.manual_axes():
        return frozenset(), (_splits.WHOLE,) * len(workers)
    if not _splits.types_are_kept():
        raise ValueError(
            "Expected types that say over which mesh axes the workers are split, got"
            " none. Use `shard_map(..., check_vma=True)`."
        )
    splits = _splits.by_type(leaves)
    pairs = zip(workers, splits, strict=True)
    axes = [collectives.varying_axes(x) - split.axes for x, split in pairs]
    return frozenset[str]().union(*axes), splits
