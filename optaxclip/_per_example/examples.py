"""Gradients of many examples, each clipped by itself: measured, added up, rounded.

The norms, the factors and the rescue from over- and underflow are the engine's; here is
what a batch axis asks for.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from optaxclip import norms
from optaxclip._arguments import checks, mistakes
from optaxclip._engine import limits as _limits
from optaxclip._engine.multiply import Factor, scope_factors, total
from optaxclip._measure import scopes as _scopes, units as _units
from optaxclip._mesh import collectives, splits as _splits
from optaxclip._trees import leaves as _leaves

MaxNorm = ArrayLike | Mapping[str, ArrayLike]
Limits = Callable[[_scopes.Measured, _leaves.Leaves], jax.Array]

# Norms are right to 1e-6, and factors and products round a few times more.
_STRICT = 32  # units of the last place by which a strict threshold is lowered


class Example(NamedTuple):
    """The gradient of one example after the clip; of many, with a batch axis."""

    shares: Any  # what each counted leaf adds to the sum, not rounded
    norms: jax.Array
    factors: jax.Array
    is_above: jax.Array  # any norm above its threshold
    is_finite: jax.Array


class Rule(NamedTuple):
    """How to clip the gradient of one example: norm x threshold x factor."""

    norm: _scopes.Norm
    factor: Factor
    limits: Limits


def clipped(rule: Rule, splits: _splits.Splits, grads: Any) -> Example:
    """Returns the gradient of one example, clipped and not yet rounded."""
    leaves = _leaves.flatten(grads)
    measured = _scopes.measure(norms.formula(rule.norm), leaves, splits)
    limits = rule.limits(measured, leaves)
    scales, rests = scope_factors(rule.factor, measured, limits)
    parts = _units.of_leaf_together((scales, rests), measured.scopes, leaves)
    rows = zip(leaves.measured(), parts, strict=True)
    return Example(
        [x * scale * scale * rest for x, (scale, rest) in rows],
        measured.sizes(),
        total(scales, rests),
        jnp.any(measured.sizes() > limits),
        jnp.all(jnp.isfinite(measured.norms)),
    )


def limits_of(max_norm: MaxNorm, strict: bool) -> Limits:
    """Returns a function to the threshold of each scope."""

    def limits(measured: _scopes.Measured, leaves: _leaves.Leaves) -> jax.Array:
        if isinstance(max_norm, Mapping):
            past = _limits.stateless(max_norm, measured, leaves, None)
            zero = jnp.zeros((), jnp.int32)
            every, _ = _limits.update(max_norm, measured, zero, past, leaves, None, {})
        else:
            share = jnp.asarray(max_norm, leaves.dtype)
            share /= math.sqrt(max(len(measured.scopes), 1))
            every = jnp.broadcast_to(share, measured.norms.shape)
        every = jnp.maximum(every, 0)
        return every * (1 - _STRICT * jnp.finfo(leaves.dtype).eps) if strict else every

    return limits


def added(example: Example, real: jax.Array) -> list[jax.Array]:
    """Returns the sums over the batch axis of what each counted leaf adds."""
    used = real & example.is_finite

    def total(x: jax.Array) -> jax.Array:
        rows = used.reshape((-1,) + (1,) * (x.ndim - 1))
        return jnp.sum(x, axis=0, where=rows)  # a factor of 0 would keep a NaN

    return [total(x) for x in example.shares]


def by_microbatches(
    microbatch: Callable[[jax.Array, Any], tuple[Any, Any]],
    zeros: list[jax.Array],
    real: jax.Array,
    batch: Any,
    size: int | None,
) -> tuple[Any, Any]:
    """Runs over the batch in parts of ``size`` examples, the last one padded.

    A part takes every so-manieth example, so that of a batch that is spread over
    devices each has its share in every part.
    """
    total = real.size
    if size is None or size >= total:
        return microbatch(real, batch)
    count = -(-total // size)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.concatenate([x, x[: count * size - total]])
        return jnp.moveaxis(x.reshape(size, count, *x.shape[1:]), 1, 0)

    def join(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 0, 1).reshape(size * count, *x.shape[2:])[:total]

    def body(sums: Any, part: Any) -> tuple[Any, Any]:
        more, rows = microbatch(*part)
        return jax.tree.map(jnp.add, sums, more), rows

    inside = (jnp.arange(count * size) < total).reshape(size, count).T
    parts = split(real) & inside, jax.tree.map(split, batch)
    sums, rows = jax.lax.scan(body, zeros, parts)
    return sums, jax.tree.map(join, rows)


def statistics(
    example: Example, real: jax.Array, axes: collectives.Axes
) -> tuple[jax.Array, ...]:
    """Returns norms, factors, and how many are real, clipped and not finite."""
    used = real & example.is_finite
    rows = used.reshape((-1,) + (1,) * (example.factors.ndim - 1))
    factors = jnp.where(rows, example.factors, 0)
    masks = real, used & example.is_above, real & ~used
    counts = [jnp.sum(x, dtype=jnp.int32) for x in masks]
    if axes:
        counts = jax.lax.psum(counts, tuple(sorted(axes)))
    return example.norms, factors, *counts


def rounded_like(tree: Any, counted: list[jax.Array]) -> Any:
    """Returns ``tree`` with its counted leaves replaced and zeros for all others."""
    leaves = _leaves.flatten(jax.tree.map(jnp.zeros_like, tree))
    pairs = zip(counted, leaves.counted, strict=True)
    return leaves.replaced([_leaves.narrow(x, leaves.leaves[i]) for x, i in pairs])


def spread(params: Any, batch: Any) -> tuple[collectives.Axes, _splits.Splits]:
    """Returns the mesh axes that split the batch, and how the params are split."""
    leaves = _leaves.flatten(params)
    if not collectives.manual_axes():
        return frozenset(), (_splits.WHOLE,) * len(leaves.counted)
    if not _splits.types_are_kept():
        raise ValueError(
            "Expected types that say over which mesh axes the batch is split, without"
            " which gradients of several examples would be added up before the clip,"
            " got none. Use `shard_map(..., check_vma=True)`."
        )
    splits = _splits.by_type(leaves)
    axes = frozenset[str]().union(
        *map(collectives.varying_axes, jax.tree.leaves(batch))
    )
    for split, path in zip(splits, leaves.paths(), strict=True):
        if both := split.axes & axes:
            raise ValueError(
                "Expected params that are whole on every device of the batch, got"
                f" {path!r} split over the mesh axes {sorted(both)}, which split the"
                " batch, too: examples of several devices would be added up before the"
                ' clip. Gather it before, by `jax.lax.all_gather(..., to="invarying")`.'
            )
    return axes, splits


def check_own(loss: jax.Array, axes: collectives.Axes) -> None:
    """Raises where the loss of an example is not that of one device."""
    if missing := axes - collectives.varying_axes(loss):
        raise ValueError(
            "Expected `loss_fn` to return the loss of one example, got one that is the"
            f" same along the mesh axes {sorted(missing)}, which split the batch: don't"
            " sum over devices in it, and split the batch by examples alone."
        )


def batch_size(batch: Any) -> int:
    """Returns the number of examples."""
    shapes = [jnp.shape(x) for x in jax.tree.leaves(batch)]
    sizes = {shape[0] if shape else None for shape in shapes}
    if len(sizes) != 1 or None in sizes or sizes == {0}:
        raise ValueError(
            "Expected a batch of arrays with one leading batch axis, of at least one"
            f" example, got shapes {shapes}. Bind to `loss_fn` what has none."
        )
    return shapes[0][0]


def real(where: Any, size: int) -> jax.Array:
    """Returns which examples are not padding."""
    if where is None:
        return jnp.ones(size, bool)
    where = jnp.asarray(where)
    if where.shape != (size,) or where.dtype != bool:
        raise ValueError(
            f"Expected `where` to be {size} booleans, False for padding, got"
            f" {where.dtype} of shape {where.shape}."
        )
    return where


def check(rule: Rule, max_norm: Any, microbatch_size: Any = None) -> None:
    """Raises unless a gradient can be clipped like this."""
    if isinstance(max_norm, Mapping):
        checks.mapping(max_norm, "max_norm", checks.number)
    else:
        checks.number(max_norm, "max_norm")
        checks.not_off(max_norm)
    mistakes.factor(checks.function(rule.factor, "factor"))
    mistakes.norm(checks.function(rule.norm, "norm"))
    if not norms.is_partition(rule.norm):
        raise ValueError(
            "Expected an L2 norm in which every leaf counts once, `norms.global_norm`,"
            f" `norms.leaf_norms` or `norms.group_norms()`, got {rule.norm!r}: it would"
            " not bound what an example contributes."
        )
    if microbatch_size is None:
        return
    is_int = isinstance(microbatch_size, int | np.integer)
    if isinstance(microbatch_size, bool) or not is_int or microbatch_size < 1:
        raise ValueError(
            f"Expected microbatch_size >= 1, an int, got {microbatch_size!r}."
        )
