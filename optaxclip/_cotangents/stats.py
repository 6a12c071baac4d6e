"""What a clip inside the backward pass saw: the gradient of a dummy parameter."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optaxclip import norms
from optaxclip._mesh import collectives
from optaxclip._trees import leaves as _leaves

_BINS = 256


class CotangentStats(NamedTuple):
    """What a clip in the backward pass saw, summed over its calls; all float32.

    A call is one step of a scan, one example of a ``vmap``, one device of a
    ``shard_map``. Cotangents are only ever added, so everything here is a sum, and a
    histogram shows how large the largest norm was. Read it with
    :func:`optaxclip.summary`.

    Attributes:
      calls: their number.
      norms: sum of the L2 norms before the clip, of the calls where it is finite.
      nonfinite: calls whose norm is NaN or infinite.
      elements: elements that came back, zeros too.
      clipped: elements that the clip changed.
      histogram: shape ``(256,)``; entry i counts the finite norms in
        ``[2**(i-128), 2**(i-127))``, entry 0 those of 0 as well.
    """

    calls: jax.Array
    norms: jax.Array
    nonfinite: jax.Array
    elements: jax.Array
    clipped: jax.Array
    histogram: jax.Array


def cotangent_stats() -> CotangentStats:
    """Returns a dummy parameter whose "gradient" is what a clip saw.

    What happens in a backward pass cannot be returned from it, but a gradient can. So
    give this to a clip as ``stats``, and differentiate with respect to it as well. Give
    it anew at every step: what comes back is the count of that step alone.

    Returns:
      :class:`CotangentStats` of zeros.

    Examples:
      >>> def loss(x, stats):
      ...     return jnp.sum(optaxclip.clip_cotangent(x, 1.0, stats=stats) ** 2)
      >>> stats = optaxclip.cotangent_stats()
      >>> x = jnp.array([1.5, 2.0, 0.1])
      >>> grads, stats = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, stats)
      >>> for name, value in optaxclip.summary(stats).items():
      ...     print(f"{name:28} {value:.2f}")
      cotangent/norm               5.00
      cotangent/largest_norm       8.00
      cotangent/clipped_fraction   0.67
      cotangent/nonfinite_fraction 0.00
      cotangent/calls              1.00
    """
    zero = jnp.zeros((), jnp.float32)
    return CotangentStats(zero, zero, zero, zero, zero, jnp.zeros(_BINS, jnp.float32))


def seen_by(before: Any, after: Any, like: CotangentStats) -> CotangentStats:
    """Returns the statistics of one call, of the types of ``like``."""
    leaves = _leaves.flatten(before)
    new = jax.tree.leaves(after)
    pairs = [(leaves.leaves[i], new[i]) for i in leaves.counted]
    changed = [(a != b) & (b == b) for b, a in pairs]  # a NaN stays what it is
    norm = norms.global_norm(before)
    finite = jnp.isfinite(norm)
    size = jnp.where(finite, norm, 0)
    exponent = jnp.frexp(size)[1]  # of a mantissa from 1/2 up to 1
    place = jnp.where(size > 0, jnp.clip(exponent + _BINS // 2 - 1, 0, _BINS - 1), 0)
    # Of this cotangent, for `vmap` adds up only what depends on what it maps over.
    one = jnp.asarray(finite | ~finite, like.calls.dtype)
    stats = CotangentStats(
        calls=one,
        norms=size,
        nonfinite=~finite,
        elements=one * sum(x.size for x in changed),
        clipped=sum((jnp.sum(x) for x in changed), jnp.zeros(())),
        histogram=(jnp.arange(_BINS) == place) & finite,
    )
    return jax.lax.stop_gradient(
        jax.tree.map(
            lambda x, y: collectives.vary_like(jnp.asarray(x, y.dtype), y), stats, like
        )
    )


def spread(stats: Any, x: Any) -> Any:
    """Makes each device's statistics its own, so that their sum is the gradient."""
    if stats is None:
        return None
    if not isinstance(stats, CotangentStats):
        raise TypeError(
            "Expected stats made by `optaxclip.cotangent_stats()`, got"
            f" {type(stats).__name__}."
        )
    leaves = jax.tree.leaves(x)
    return jax.tree.map(lambda s: collectives.vary_like(s, *leaves), stats)
