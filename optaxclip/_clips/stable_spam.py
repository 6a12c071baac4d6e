"""Stable-SPAM's clip: its largest elements first, then the norm of the leaf."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optaxclip import factors, norms, thresholds
from optaxclip._arguments import checks
from optaxclip._engine import limits as _limits
from optaxclip._engine.clip_by import clip_by
from optaxclip._measure import scopes as _scopes, units as _units
from optaxclip._mesh import summed
from optaxclip._trees import leaves as _leaves


class AdaClipState(NamedTuple):
    """State of the first stage of :func:`stable_spam_clip`.

    Attributes:
      rule_state: the mean of the largest moduli so far, for every leaf.
    """

    rule_state: Any


def stable_spam_clip(
    mean_decay: ArrayLike = 0.7,
    rms_decay: ArrayLike = 0.9,
    max_decay: ArrayLike = 0.999,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips the largest elements of a leaf, then gives the leaf a norm near 1.

    AdaClip, then AdaGN: with T the mean of the leaf's largest modulus so far, and with
    the means of its norm and of the square of its norm,

    .. math:: u_i &\leftarrow u_i \cdot T / \max_j |u_j|
        \quad \text{where } |u_i| > T

      u &\leftarrow \frac{u}{\|u\|} \cdot
        \frac{\text{mean} \|u\|}{\sqrt{\text{mean} \|u\|^2}}

    All means take in this step, and weights decay with age. For low-precision training;
    Stable-SPAM adds :func:`reset_momentum` around Adam. The size of the gradient is
    gone after this, as after :func:`normalize_by_update_norm`.

    Deviations: the paper's code restarts its step counter at each reset of the momentum
    but not the means, which switches AdaClip off for a thousand steps; nothing restarts
    here. Its eps of 1e-8 is left out, for a norm of zero enters no mean. The cosine
    schedule of its decay is left out.

    Guarantees: those of :func:`clip_by_leaf_norm`; a NaN or an infinity makes all of
    its leaf NaN and enters no mean.

    Args:
      mean_decay: of the weights of the mean norm.
      rms_decay: of the weights of the mean square of the norm.
      max_decay: of the weights of the mean largest modulus.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` with states
      :class:`AdaClipState` and :class:`ClipState`, seven numbers per leaf in all for
      the history.

    Raises:
      TypeError: an argument is not a number.
      ValueError: a decay is not at least 0 and below 1.

    Examples:
      >>> clip = optaxclip.stable_spam_clip()
      >>> state = clip.init(jnp.zeros(2))
      >>> for grad in jnp.array([3.0, 4.0]), jnp.array([3.0, 400.0]):
      ...     updates, state = clip.update(grad, state)
      ...     print(f"{updates[0]:.3f} {updates[1]:.3f}")
      0.600 0.800
      0.012 0.825

    References:
      Huang et al., `Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit Adam
      <https://arxiv.org/abs/2502.17055>`_, 2025
    """
    checks.decay(max_decay, "max_decay")
    rule = thresholds.mean_over_rms(mean_decay, rms_decay)
    return optax.chain(
        _ada_clip(max_decay), clip_by(norms.leaf_norms, rule, factors.normalize)
    )


def _ada_clip(decay: ArrayLike) -> optax.GradientTransformationExtraArgs:
    rule = thresholds.mean_plus_std(0.0, decay=decay)
    formula = norms.formula(functools.partial(norms.leaf_norms, ord=jnp.inf))

    def init_fn(params: optax.Params) -> AdaClipState:
        leaves = _leaves.flatten(params, abstract=True)
        return AdaClipState(_limits.init(rule, _scopes.zeros(formula, leaves), leaves))

    def update_fn(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, AdaClipState]:
        leaves = _leaves.flatten(updates)
        summed.check_summed(leaves, params)
        checks.needed_state(state, AdaClipState)
        measured = _scopes.measure(formula, leaves)
        count = jnp.zeros((), jnp.int32)
        limits, rule_state = _limits.update(
            rule, measured, count, state.rule_state, leaves, None, extra_args
        )
        bounds = _units.of_leaf(limits, measured.scopes, leaves)
        tops = _units.of_leaf(measured.sizes(), measured.scopes, leaves)
        clipped = [
            _held(leaves.leaves[i], bound, top, leaves.dtype)
            for i, bound, top in zip(leaves.counted, bounds, tops, strict=True)
        ]
        return leaves.replaced(clipped), AdaClipState(rule_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _held(leaf: Any, limit: jax.Array, top: jax.Array, dtype: Any) -> jax.Array:
    """Returns the leaf with what is above the limit scaled as the largest must be."""
    wide = _leaves.widen(leaf, dtype)
    is_above = jnp.abs(wide) > limit
    factor = jnp.where(top > limit, limit / jnp.where(top > 0, top, 1), 1)
    held = _leaves.narrow(jnp.where(is_above, wide * factor, wide), leaf)
    return jnp.where(is_above, held, jnp.asarray(leaf, held.dtype))
