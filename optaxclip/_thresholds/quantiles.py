"""Thresholds that are quantiles of the norms so far: of a window, or estimated.

Both are rules on vectors of norms and part of :mod:`optaxclip.thresholds`. A norm that
is not finite never gets here: the engine keeps what a rule knew of that scope.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optaxclip._arguments import checks, mistakes
from optaxclip._thresholds import moments as _moments
from optaxclip._trees import infinity


class RankedState(NamedTuple):
    """State of :func:`window_percentile`: ``2 * window + 1`` numbers per scope.

    Attributes:
      seen_count: norms seen, int32.
      last_norms: the last of them, shape ``(window, ...)``, each new one in place of
        the oldest; near the largest number where there is none yet.
      ranked_norms: the same, in ascending order.
    """

    seen_count: Any
    last_norms: Any
    ranked_norms: Any


@mistakes.makes_rule
def window_percentile(
    q: ArrayLike, window: int
) -> optax.GradientTransformationExtraArgs:
    """Allows a percentile of the last norms, this step's included: AutoClip's rule.

    Between two norms it is interpolated linearly, as in ``jnp.percentile``. The norms
    enter as they are, or after the clip with :func:`clipped_history`. So the first step
    is never clipped, and with ``q=100`` none.

    Args:
      q: percentile, from 0 to 100.
      window: norms remembered, at least 2. They are kept in order: a step takes a few
        passes over them and sorts nothing.

    Raises:
      TypeError: ``q`` is not a number.
      ValueError: ``q`` is not between 0 and 100, or ``window`` below 2.

    Examples:
      >>> rule = optaxclip.thresholds.window_percentile(50.0, window=3)
      >>> state = rule.init(jnp.zeros(()))
      >>> for norm in 1.0, 2.0, 9.0, 9.0:
      ...     max_norm, state = rule.update(jnp.array(norm), state)
      ...     print(max_norm)
      1.0
      1.5
      2.0
      9.0

    References:
      Seetharaman et al., `AutoClip: Adaptive Gradient Clipping for Source Separation
      Networks <https://arxiv.org/abs/2007.14469>`_, 2020
    """
    checks.number(q, "q")
    if isinstance(q, checks.STATIC) and q > 100:
        raise ValueError(f"Expected 0 <= q <= 100, got {q}.")
    checks.window(window)

    def init_fn(params: Any) -> RankedState:
        like: Any = params
        count = jnp.zeros_like(like, jnp.int32)
        # Two arrays: one in two places could not be donated.
        rings = [infinity.full_like(like, shape=(window, *like.shape)) for _ in "ab"]
        return RankedState(count, *rings)

    def update_fn(updates: Any, state: Any, params: Any = None, **extra_args: Any):
        del params, extra_args
        count, last = state.seen_count, state.last_norms
        is_oldest = _moments.places(last) == (count % window)[None]
        oldest = jnp.sum(jnp.where(is_oldest, last, 0), axis=0)
        ranked = _reranked(state.ranked_norms, oldest, updates)
        last = jnp.where(is_oldest, updates[None], last)
        count = jnp.asarray(optax.safe_increment(count))
        limits = _percentile(ranked, q, jnp.minimum(count, window))
        return limits, RankedState(count, last, ranked)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _reranked(ranked: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
    """Returns the ranked norms with a new one among them instead of an old one."""
    places, end = _moments.places(ranked), infinity.full_like(ranked[:1])
    is_before = places < jnp.sum(ranked < old[None], axis=0)[None]
    rest = jnp.where(is_before, ranked, jnp.concatenate([ranked[1:], end]))
    rank = jnp.sum(rest < new[None], axis=0)[None]
    after = jnp.where(places == rank, new[None], jnp.concatenate([end, rest[:-1]]))
    return jnp.where(places < rank, rest, after)


def _percentile(ranked: jax.Array, q: ArrayLike, total: jax.Array) -> jax.Array:
    """Returns a percentile of the first norms, interpolated linearly."""
    share = jnp.clip(jnp.asarray(q, ranked.dtype) / 100, 0, 1)
    place = (share * (total - 1).astype(ranked.dtype))[None]
    low = jnp.floor(place).astype(jnp.int32)
    high = jnp.minimum(low + 1, (total - 1)[None])
    pair = [jnp.take_along_axis(ranked, i, axis=0)[0] for i in (low, high)]
    between = (place - jnp.floor(place))[0]
    return pair[0] + between * (pair[1] - pair[0])


class QuantileState(NamedTuple):
    """State of :func:`streaming_quantile`: one number per scope.

    Attributes:
      next_max_norms: estimates of the quantile, which the next step is held to.
    """

    next_max_norms: Any


@mistakes.makes_rule
def streaming_quantile(
    quantile: ArrayLike = 0.5,
    learning_rate: ArrayLike = 0.2,
    initial: ArrayLike = 1.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Allows a quantile of the norms before this one, estimated in one number.

    .. math:: C \leftarrow C \exp\left(
      -\text{learning\_rate} \cdot (\mathbf 1[\|u\| \le C] - \text{quantile})\right)

    The estimate moves by a share of itself, however far away the norm is: no spike
    moves it more than any other norm above it.

    Args:
      quantile: share of the steps that shall not be clipped, from 0 to 1.
      learning_rate: of the logarithm of the estimate, per step.
      initial: estimate to start from, above 0. The defaults correct it by 10 % a step:
        one that is wrong by a factor of 1000 is right after 70 steps.

    Raises:
      TypeError: an argument is not a number.
      ValueError: a quantile that is not between 0 and 1, a negative learning rate, or
        an estimate that is not above 0.

    Examples:
      >>> rule = optaxclip.thresholds.streaming_quantile(0.5, 0.2)
      >>> state = rule.init(jnp.zeros(()))
      >>> for norm in [5.0, 1.0, 9.0] * 50:
      ...     max_norm, state = rule.update(jnp.array(norm), state)
      >>> print(f"{max_norm:.1f}")  # the median, give or take a step
      4.5

    References:
      Andrew et al., `Differentially Private Learning with Adaptive Clipping
      <https://arxiv.org/abs/1905.03871>`_, 2019
    """
    arguments = {"quantile": quantile, "learning_rate": learning_rate}
    for what, value in (arguments | {"initial": initial}).items():
        checks.number(value, what)
    if isinstance(quantile, checks.STATIC) and quantile > 1:
        raise ValueError(f"Expected 0 <= quantile <= 1, got {quantile}.")
    if isinstance(initial, checks.STATIC) and initial == 0:
        raise ValueError("Expected initial > 0, got 0: it would stay there.")

    def init_fn(params: Any) -> QuantileState:
        like: Any = params
        return QuantileState(jnp.zeros_like(like) + jnp.asarray(initial, like.dtype))

    def update_fn(updates: Any, state: Any, params: Any = None, **extra_args: Any):
        del params, extra_args
        (now,) = state
        inside = (updates <= now).astype(updates.dtype)
        rate = jnp.asarray(learning_rate, updates.dtype)
        change = rate * (inside - jnp.asarray(quantile, updates.dtype))
        return now, QuantileState(now * jnp.exp(-change))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
