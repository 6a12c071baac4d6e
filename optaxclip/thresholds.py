"""How big is allowed: rules that compute thresholds.

A rule is an ``optax.GradientTransformation`` whose updates are norms: ``update`` takes
the norms of all scopes as one vector (a scalar if there is one scope, a list of arrays
if scopes are units) and returns the largest norms allowed. Optax's own elementwise
pieces are rules,
too: ``optax.chain(optax.ema(0.99), optax.scale(3.0))`` allows three times the mean
norm. An optimizer is none: what it makes of a norm of 1 is negative, and raises.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optaxclip import norms
from optaxclip._arguments import checks, mistakes
from optaxclip._measure import scopes as _scopes, units as _units
from optaxclip._thresholds.averages import (
    MeanRmsState as MeanRmsState,
    MeanState as MeanState,
    mean_over_rms as mean_over_rms,
    relative_to_mean as relative_to_mean,
    within_band as within_band,
)
from optaxclip._thresholds.deviations import (
    MeanStdState as MeanStdState,
    WindowState as WindowState,
    mean_plus_std as mean_plus_std,
)
from optaxclip._thresholds.quantiles import (
    QuantileState as QuantileState,
    RankedState as RankedState,
    streaming_quantile as streaming_quantile,
    window_percentile as window_percentile,
)
from optaxclip._thresholds.z_score import z_score as z_score
from optaxclip._trees import infinity, leaves as _leaves


class LaggedState(NamedTuple):
    """State of :func:`lagged`.

    Attributes:
      next_max_norms: thresholds for the next step, of the shape of the norms.
      rule_state: state of the wrapped rule.
    """

    next_max_norms: Any
    rule_state: Any


@mistakes.makes_rule
def relative_to_params(
    ratio: ArrayLike, norm: _scopes.Norm, eps: ArrayLike = 1e-3
) -> optax.GradientTransformationExtraArgs:
    r"""Allows updates a share of the size of their parameters.

    .. math:: \text{max\_norm} = \text{ratio} \cdot \max(\|\theta\|, \text{eps})

    Args:
      ratio: largest ratio of update norm to parameter norm allowed.
      norm: measures the parameters; the same as the clip's own norm.
      eps: floor of the parameter norm, so that parameters at zero can grow.

    Raises:
      TypeError: ``norm`` is not a function, or ratio or eps not a number.
      ValueError: when building, a negative or NaN ratio or eps; when tracing, no
        params, or scopes of the params that differ from those of the updates.

    Examples:
      >>> norm = optaxclip.norms.leaf_norms
      >>> rule = optaxclip.thresholds.relative_to_params(0.1, norm)
      >>> clip = optaxclip.clip_by(norm, rule)
      >>> params, grads = {"w": jnp.array([3.0, 4.0])}, {"w": jnp.array([0.0, 2.0])}
      >>> updates, _ = clip.update(grads, clip.init(params), params)
      >>> print(updates["w"])
      [0.  0.5]

    References:
      Brock et al., `High-Performance Large-Scale Image Recognition Without
      Normalization <https://arxiv.org/abs/2102.06171>`_, 2021
    """
    checks.number(ratio, "ratio")
    checks.number(eps, "eps")
    mistakes.norm(checks.function(norm, "norm"))
    formula = norms.formula(norm)

    def update_fn(updates: Any, state: Any, params: Any = None, **extra_args: Any):
        del extra_args
        if params is None:
            raise ValueError(
                "Expected params, with which this threshold compares the updates, got"
                " None. Call `clip.update(updates, state, params)`."
            )
        leaves = _leaves.flatten(params)
        own = _units.like(_scopes.measure(formula, leaves).sizes(), updates)
        shapes = jax.tree.map(jnp.shape, own), jax.tree.map(jnp.shape, updates)
        if shapes[0] != shapes[1]:
            raise ValueError(
                "Expected `norm` to have the same scopes as the norm of the clip, got"
                f" shapes {shapes[0]} and {shapes[1]}. Give both the same norm."
            )

        def allowed(own: jax.Array, size: jax.Array) -> jax.Array:
            dtype = size.dtype
            floor = jnp.asarray(eps, dtype)
            return jnp.asarray(ratio, dtype) * jnp.maximum(own.astype(dtype), floor)

        return jax.tree.map(allowed, own, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)


@mistakes.makes_rule
def lagged(rule: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Allows by the steps before this one: a spike must not raise its own threshold.

    The first step is not clipped, for there is nothing to go by.

    Args:
      rule: any rule that computes its thresholds from norms alone.

    Examples:
      >>> rule = optaxclip.thresholds.lagged(optax.scale(2.0))  # twice the last norm
      >>> clip = optaxclip.clip_by_global_norm(rule)
      >>> state = clip.init(jnp.zeros(1))
      >>> for grad in 1.0, 5.0:
      ...     updates, state = clip.update(jnp.array([grad]), state)
      ...     print(updates)
      [1.]
      [2.]
    """
    inner = optax.with_extra_args_support(checks.rule(rule, "lagged"))

    def init_fn(params: Any) -> LaggedState:
        unlimited = jax.tree.map(infinity.full_like, params)
        return LaggedState(unlimited, inner.init(params))

    def update_fn(updates: Any, state: Any, params: Any = None, **extra_args: Any):
        following, rule_state = inner.update(
            updates, state.rule_state, params, **extra_args
        )
        return state.next_max_norms, LaggedState(following, rule_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@mistakes.makes_rule
def clipped_history(
    rule: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Feeds a rule the norms after the clip instead of those before it.

    These are ``min(norm, max_norm)``: a spike enters the history at the size it was
    allowed, and thresholds rise slowly. The rule is asked twice: for its thresholds
    with the norms as they are, then for its new state with the clipped ones. Wrap it
    outermost: ``clipped_history(lagged(rule))``.

    Args:
      rule: any rule.

    Examples:
      >>> rule = optaxclip.thresholds.lagged(optax.scale(2.0))  # twice the last norm
      >>> rule = optaxclip.thresholds.clipped_history(rule)
      >>> clip = optaxclip.clip_by_global_norm(rule)
      >>> state = clip.init(jnp.zeros(1))
      >>> for grad in 1.0, 100.0, 100.0:
      ...     updates, state = clip.update(jnp.array([grad]), state)
      ...     print(updates)
      [1.]
      [2.]
      [4.]
    """
    inner = optax.with_extra_args_support(checks.rule(rule, "clipped_history"))

    def update_fn(updates: Any, state: Any, params: Any = None, **extra_args: Any):
        max_norms, _ = inner.update(updates, state, params, **extra_args)
        clipped = jax.tree.map(jnp.minimum, updates, max_norms)
        return max_norms, inner.update(clipped, state, params, **extra_args)[1]

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)
