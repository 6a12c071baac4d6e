"""Thresholds from a few running averages of the norms, as published rules have them.

All are rules on vectors of norms and part of :mod:`optaxclip.thresholds`. Each averages
what was left of a norm after its own clip, so a spike moves it no more than the largest
norm allowed.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optaxclip._arguments import checks, mistakes
from optaxclip._thresholds import moments as _moments
from optaxclip._trees import infinity


class MeanState(NamedTuple):
    """State of rules that know a mean: two numbers per scope.

    Attributes:
      seen_count: norms seen, int32.
      means: their running means.
    """

    seen_count: Any
    means: Any


class MeanRmsState(NamedTuple):
    """State of :func:`mean_over_rms`: three numbers per scope.

    Attributes:
      seen_count: norms seen, int32.
      means: their weighted means.
      rms: their weighted root mean squares.
    """

    seen_count: Any
    means: Any
    rms: Any


@mistakes.makes_rule
def relative_to_mean(
    ratio: ArrayLike = 1.05,
    decay: ArrayLike = 0.98,
    warmup_steps: ArrayLike = 100,
    max_norm: ArrayLike = 1.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Allows a multiple of the mean norm so far: the rule of AdaGC.

    .. math:: \text{max\_norm}_t = \text{ratio} \cdot \gamma, \qquad
      \gamma \leftarrow \text{decay} \, \gamma
      + (1 - \text{decay}) \min(\|u\|, \text{ratio} \cdot \gamma)

    In the warm-up all scopes together are clipped to the global norm ``max_norm``, and
    :math:`\gamma` is the smallest norm that this left. A scope whose norm is not finite
    does not count in the global norm. Afterwards a threshold grows by at most
    ``(1 - decay) * (ratio - 1)`` of itself at every step, 0.1 % by default.

    Args:
      ratio: allowed norm over mean norm.
      decay: of the mean, at least 0 and below 1.
      warmup_steps: norms of a scope until its mean is used.
      max_norm: global norm of all scopes in the warm-up.

    Raises:
      TypeError: an argument is not a number.
      ValueError: an argument is out of range.

    Examples:
      >>> rule = optaxclip.thresholds.relative_to_mean(1.5, 0.5, warmup_steps=1)
      >>> state = rule.init(jnp.zeros(2))
      >>> for norms in jnp.array([3.0, 4.0]), jnp.array([0.6, 2.0]):
      ...     max_norms, state = rule.update(norms, state)
      ...     print(max_norms)
      [0.6 0.8]
      [0.90000004 1.2       ]

    References:
      Wang et al., `AdaGC: Improving Training Stability for LLM Pretraining
      <https://arxiv.org/abs/2502.11034>`_, 2025
    """
    for what, value in {"ratio": ratio, "max_norm": max_norm}.items():
        checks.number(value, what)
    checks.decay(decay, "decay")
    checks.steps(warmup_steps, "warmup_steps", 0)

    def init_fn(params: Any) -> MeanState:
        count, mean = _zeros(params, 1)
        return MeanState(count, infinity.full_like(mean))  # larger than any norm

    def update_fn(updates: Any, state: Any, params: Any = None, **extra_args: Any):
        del params, extra_args
        dtype, mean = updates.dtype, state.means
        is_warm = state.seen_count >= warmup_steps
        together = _limits_together(updates, jnp.asarray(max_norm, dtype))
        is_new = infinity.is_infinite(mean)
        multiple = jnp.asarray(ratio, dtype) * jnp.where(is_new, 1, mean)
        multiple = jnp.where(is_new, mean, multiple)
        limits = jnp.where(is_warm, multiple, together)
        left = jnp.minimum(updates, limits)
        known = jnp.where(is_new, left, mean)
        # What was left less the mean, in the form whose rounding adds up to nothing.
        most = jnp.asarray(ratio - 1, dtype) * known
        share = jnp.asarray(1 - decay, dtype)
        moved = known + share * jnp.minimum(updates - known, most)
        means = jnp.where(is_warm, moved, jnp.minimum(known, left))
        count = jnp.asarray(optax.safe_increment(state.seen_count))
        return limits, MeanState(count, means)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@mistakes.makes_rule
def within_band(
    low: ArrayLike, high: ArrayLike, decay: ArrayLike = 0.98
) -> optax.GradientTransformationExtraArgs:
    r"""Allows norms in a band around the mean norm so far: the rule of AGGC.

    .. math:: \text{max\_norm}_t = \min(\max(\|u\|, \text{low} \cdot \mu),
      \text{high} \cdot \mu)

    This is a norm to have, not only the largest allowed: with ``factors.normalize`` a
    scope below the band is raised to it; with ``factors.rescale`` only ``high`` counts.
    The mean is that of the norms in the band, weighted by ``decay ** age``. The first
    norm is allowed as it is, and so is every norm within the band.

    Args:
      low: smallest norm over the mean norm, at most 1.
      high: largest norm over the mean norm, at least 1.
      decay: of the weights with age, at least 0 and below 1.

    Raises:
      TypeError: an argument is not a number.
      ValueError: an argument is out of range.

    Examples:
      >>> rule = optaxclip.thresholds.within_band(0.5, 2.0)
      >>> state = rule.init(jnp.zeros(()))
      >>> for norm in 1.0, 100.0, 0.1:
      ...     allowed, state = rule.update(jnp.array(norm), state)
      ...     print(f"{allowed:.3f}")
      1.000
      2.000
      0.753

    References:
      Li et al., `AGGC: Adaptive Group Gradient Clipping for Stabilizing LLM Training
      <https://arxiv.org/abs/2601.11864>`_, 2026
    """
    checks.number(low, "low")
    checks.number(high, "high", minimum=1)
    checks.decay(decay, "decay")
    if isinstance(low, checks.STATIC) and low > 1:
        raise ValueError(f"Expected low <= 1, got {low}: the mean is in the band.")

    def init_fn(params: Any) -> MeanState:
        return MeanState(*_zeros(params, 1))

    def update_fn(updates: Any, state: Any, params: Any = None, **extra_args: Any):
        del params, extra_args
        mean = state.means
        least, most = (jnp.asarray(x, updates.dtype) * mean for x in (low, high))
        held = jnp.minimum(jnp.maximum(updates, least), most)
        held = jnp.where(state.seen_count == 0, updates, held)
        count = jnp.asarray(optax.safe_increment(state.seen_count))
        means = _moments.mean(
            mean, held, _moments.newest_weight(count, decay, mean.dtype)
        )
        return held, MeanState(count, means)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@mistakes.makes_rule
def mean_over_rms(
    mean_decay: ArrayLike = 0.7, rms_decay: ArrayLike = 0.9
) -> optax.GradientTransformationExtraArgs:
    r"""Allows the mean norm over their root mean square: the rule of AdaGN.

    .. math:: \text{max\_norm}_t = \frac{\text{mean}_{s \le t} \|u_s\|}
      {\sqrt{\text{mean}_{s \le t} \|u_s\|^2}}

    A number near 1, for ``factors.normalize``: Adam's step, taken by a norm. This
    step's norm is among them; the weights decay with age.

    Args:
      mean_decay: of the weights of the mean, at least 0 and below 1.
      rms_decay: of the weights of the mean square, at least 0 and below 1.

    Raises:
      TypeError: an argument is not a number.
      ValueError: an argument is out of range.

    Examples:
      >>> rule = optaxclip.thresholds.mean_over_rms()
      >>> state = rule.init(jnp.zeros(()))
      >>> for norm in 1.0, 1.0, 100.0:
      ...     max_norm, state = rule.update(jnp.array(norm), state)
      ...     print(f"{max_norm:.3f}")
      1.000
      1.000
      0.761

    References:
      Huang et al., `Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit Adam
      <https://arxiv.org/abs/2502.17055>`_, 2025
    """
    checks.decay(mean_decay, "mean_decay")
    checks.decay(rms_decay, "rms_decay")

    def init_fn(params: Any) -> MeanRmsState:
        return MeanRmsState(*_zeros(params, 2))

    def update_fn(updates: Any, state: Any, params: Any = None, **extra_args: Any):
        del params, extra_args
        count = jnp.asarray(optax.safe_increment(state.seen_count))
        decays = (mean_decay, rms_decay)
        weights = [_moments.newest_weight(count, x, updates.dtype) for x in decays]
        means = _moments.mean(state.means, updates, weights[0])
        rms = _moments.root_mean_square(state.rms, updates, weights[1])
        return means / jnp.where(rms > 0, rms, 1), MeanRmsState(count, means, rms)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _zeros(norms: Any, arrays: int) -> list[jax.Array]:
    some = [jnp.zeros_like(norms) for _ in range(arrays)]
    return [jnp.zeros_like(norms, jnp.int32), *some]


def _limits_together(norms: jax.Array, max_norm: jax.Array) -> jax.Array:
    """Returns what each norm may be so that they are ``max_norm`` together.

    A norm that is not finite does not count: the scope it belongs to turns NaN.
    """
    flat = jnp.ravel(norms)
    total = _moments.root_of_squares(jnp.where(jnp.isfinite(flat), flat, 0))
    shares = jnp.minimum(norms / jnp.where(total > 0, total, 1), 1)
    is_above = total > max_norm
    allowed = jnp.where(is_above, max_norm, 1) * shares
    return jnp.where(is_above, allowed, infinity.full_like(norms))
