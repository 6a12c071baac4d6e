"""The threshold of ZClip: the further a norm is above the mean, the less is allowed."""

from typing import Any

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optaxclip._arguments import checks, mistakes
from optaxclip._thresholds import moments as _moments
from optaxclip._thresholds.deviations import MeanStdState, fresh
from optaxclip._trees import infinity


@mistakes.makes_rule
def z_score(
    z_threshold: ArrayLike = 2.5,
    decay: ArrayLike = 0.97,
    warmup_steps: ArrayLike = 25,
    max_norm: ArrayLike = jnp.inf,
) -> optax.GradientTransformationExtraArgs:
    r"""Allows less the further a norm is above the mean: the rule of ZClip.

    With :math:`z = (\|u\| - \mu) / \sigma`, and only where it is above its threshold,

    .. math:: \text{max\_norm}_t = \mu + \frac{\text{z\_threshold}^2}{z} \sigma,

    and never more than ``max_norm``. At the z-threshold nothing jumps; the larger the
    spike, the closer to the mean it is clipped. Mean and deviation are those of the
    first ``warmup_steps`` norms, then running ones of what the formula left of each
    norm: before ``max_norm`` cuts it, as in the paper's code.

    Args:
      z_threshold: standard deviations above the mean from which on it clips.
      decay: of mean and variance, at least 0 and below 1.
      warmup_steps: norms from which it takes its first mean and deviation, at least 2;
        until then all up to ``max_norm`` is allowed.
      max_norm: allowed at most, at every step.

    Raises:
      TypeError: an argument is not a number.
      ValueError: an argument is out of range.

    Examples:
      >>> rule = optaxclip.thresholds.z_score(2.0, 0.5, warmup_steps=2)
      >>> state = rule.init(jnp.zeros(()))
      >>> for norm in 1.0, 3.0, 4.0, 12.0:
      ...     max_norm, state = rule.update(jnp.array(norm), state)
      ...     print(f"{max_norm:.4g}")  # 3.4e38 is none
      3.403e+38
      3.403e+38
      3.403e+38
      3.444

    References:
      Kumar et al., `ZClip: Adaptive Spike Mitigation for LLM Pre-Training
      <https://arxiv.org/abs/2504.02507>`_, 2025
    """
    checks.number(z_threshold, "z_threshold")
    checks.decay(decay, "decay")
    checks.steps(warmup_steps, "warmup_steps", 2)
    checks.number(max_norm, "max_norm")

    init_fn: Any = fresh

    def update_fn(updates: Any, state: Any, params: Any = None, **extra_args: Any):
        del params, extra_args
        dtype = updates.dtype
        times, cap = jnp.asarray(z_threshold, dtype), jnp.asarray(max_norm, dtype)
        mean, std = state.means, state.stds
        is_spike = (state.seen_count >= warmup_steps) & (updates > mean + times * std)
        excess = jnp.where(is_spike, updates - mean, 1)
        limits = mean + times * std * (times * std / excess)
        limits = jnp.where(is_spike, limits, infinity.full_like(limits))
        count = jnp.asarray(optax.safe_increment(state.seen_count))
        seen = jnp.minimum(updates, limits)
        share = jnp.asarray(1 - decay, dtype)
        # The paper's variance is around the new mean; that of the warm-up is exact.
        is_warm = count > warmup_steps
        weight = jnp.where(is_warm, share, 1 / count.astype(dtype))
        spread = jnp.where(is_warm, 1 - weight, jnp.sqrt(1 - weight)) * (seen - mean)
        stds = _moments.root_mean_square(std, jnp.abs(spread), weight)
        means = _moments.mean(mean, seen, weight)
        return jnp.minimum(limits, cap), MeanStdState(count, means, stds)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
