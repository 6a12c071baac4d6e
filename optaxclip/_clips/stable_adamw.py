"""AdamW with the update clipping of Adafactor, for whom norm clipping came too late."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from optaxclip import norms
from optaxclip._arguments import checks
from optaxclip._engine import limits as _limits
from optaxclip._engine.clip_by import clip_by
from optaxclip._engine.state import ClipState
from optaxclip._measure import reduce, units as _units
from optaxclip._mesh import summed
from optaxclip._thresholds import moments as _moments
from optaxclip._trees import leaves as _leaves, memories


class StableAdamWState(NamedTuple):
    """State of :func:`stable_adamw`.

    Attributes:
      momentum: means of the gradients, a tree like the params, float32 or wider.
      rms: root mean squares of the gradients, likewise, real.
      clip_state: norms are root mean squares of the gradients relative to ``rms``, one
        for each leaf, and its ``update_count`` that of the steps.
    """

    momentum: Any
    rms: Any
    clip_state: ClipState


def stable_adamw(
    learning_rate: ArrayLike | optax.Schedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.99,
    eps: ArrayLike = 1e-6,
    weight_decay: ArrayLike = 0.01,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW that takes smaller steps where gradients outgrow their second moments.

    With :math:`\hat\beta = (\beta^t - \beta) / (\beta^t - 1)` for both decays,

    .. math::
      m &\leftarrow \hat\beta_1 m + (1 - \hat\beta_1) g, \qquad
      v \leftarrow \hat\beta_2 v + (1 - \hat\beta_2) g^2 \\
      \eta &= \text{learning\_rate} / \max(1, \text{rms}), \qquad
      \text{rms}^2 = \text{mean}(g^2 / \max(v, \text{eps}^2)) \\
      u &= -\eta \left(m / (\sqrt{v} + \text{eps}) + \text{weight\_decay}\,
      \theta\right)

    where the mean is over a leaf. A whole optimizer: loss spikes come where a
    :math:`v` of small gradients meets large ones, which no clip of the gradients before
    Adam sees. It is used without one.

    Guarantees:
      * The first step is not clipped, and none by more than the root of
        :math:`1 - \hat\beta_2`: with the default ``b2`` to a tenth.
      * Structure, shapes and dtypes of the updates are kept; they are rounded once.
      * Gradients as small as 1e-30 and as large as 1e38 are right: no squares are kept.
      * A NaN or an infinity makes the updates of its leaf NaN, and doesn't enter the
        moments, which keep what they knew of that element.

    Args:
      learning_rate: a number, or a schedule ``count -> number``, where the count starts
        at 0.
      b1: decay of the first moment, at least 0 and below 1.
      b2: decay of the second one.
      eps: lower floor of the root of the second moment, and added to it, in the units
        of the gradients.
      weight_decay: share of the params that a step takes off, times the learning rate;
        it shrinks with the step.
      mask: which leaves decay: a tree prefix of booleans, or a function from params to
        one (under ``optax.inject_hyperparams`` name it in ``static_args``); None for
        all.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` with state
      :class:`StableAdamWState`; ``update`` needs ``params``. :func:`optaxclip.summary`
      shows the rms and the factor of every leaf.

    Raises:
      TypeError: an argument of the wrong type; a mask that holds no booleans.
      ValueError: a number out of its range; when tracing, no params, a mask that
        doesn't fit, a state of other params.

    Examples:
      >>> tx = optaxclip.stable_adamw(0.1, weight_decay=0.0)
      >>> params = {"w": jnp.array([1.0, 2.0])}
      >>> state = tx.init(params)
      >>> for size in 1.0, 1.0, 1000.0:
      ...     grads = {"w": size * jnp.array([1.0, -1.0])}
      ...     updates, state = tx.update(grads, state, params)
      ...     print(updates["w"].round(3), state.clip_state.factors.round(2))
      [-0.1  0.1] [1.]
      [-0.1  0.1] [1.]
      [-0.037  0.037] [0.58]

    References:
      Wortsman et al., `Stable and low-precision training for large-scale
      vision-language models <https://arxiv.org/abs/2304.13013>`_, 2023
    """
    if not callable(learning_rate):
        kinds = "a number or a schedule"
        checks.number(learning_rate, "learning_rate", -jnp.inf, kinds)
    checks.decay(b1, "b1")
    checks.decay(b2, "b2")
    checks.number(eps, "eps")
    checks.number(weight_decay, "weight_decay", -jnp.inf)
    clip: Any = clip_by(norms.leaf_rms, 1.0)

    def init_fn(params: optax.Params) -> StableAdamWState:
        leaves = _leaves.flatten(params, abstract=True)
        return StableAdamWState(
            memories.zeros(leaves), memories.real_zeros(leaves), clip.init(params)
        )

    def update_fn(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, StableAdamWState]:
        del extra_args
        checks.needed_state(state, StableAdamWState)
        leaves = _leaves.flatten(updates)
        summed.check_summed(leaves, params)
        decaying = _decaying(params, mask, leaves)

        count, dtype = state.clip_state.update_count, leaves.dtype
        rate = learning_rate(count) if callable(learning_rate) else learning_rate
        rate, floor, share = (jnp.asarray(x, dtype) for x in (rate, eps, weight_decay))
        weights = _weight(b1, count, dtype), _weight(b2, count, dtype)

        olds = [memories.recalled(x, leaves) for x in (state.momentum, state.rms)]
        rows = zip(leaves.measured(), *olds, strict=True)
        moved = [_moved(*row, *weights, floor) for row in rows]
        momenta, sizes, ratios = zip(*moved, strict=True) if moved else ((), (), ())
        _, clip_state = clip.update(leaves.replaced(list(ratios)), state.clip_state)

        scopes = _units.of_each_leaf(leaves)
        factors = _units.of_leaf(clip_state.factors, scopes, leaves)
        rows = zip(leaves.counted, momenta, sizes, decaying, strict=True)
        steps = [
            _leaves.narrow(
                _step(m, v, p, -rate * factor, share, floor), leaves.leaves[i]
            )
            for (i, m, v, p), factor in zip(rows, factors, strict=True)
        ]
        return leaves.replaced(steps), StableAdamWState(
            memories.remembered(state.momentum, momenta),
            memories.remembered(state.rms, sizes),
            clip_state,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _weight(decay: ArrayLike, count: jax.Array, dtype: Any) -> jax.Array:
    """Returns the weight of the newest gradient, 1 minus the decay with a hat."""
    return _moments.newest_weight(count + 1, decay, dtype)


@jax.jit
def _moved(
    gradient: jax.Array,
    momentum: jax.Array,
    rms: jax.Array,
    weight: jax.Array,
    square_weight: jax.Array,
    eps: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns both moments after this step, and the gradient relative to the second."""
    finite = jnp.isfinite(gradient)
    momentum = jnp.where(finite, _moments.mean(momentum, gradient, weight), momentum)
    size = _moments.root_mean_square(rms, jnp.abs(gradient), square_weight)
    rms = jnp.where(finite, size, rms)
    return momentum, rms, _ratio(gradient, jnp.maximum(rms, eps))


@jax.jit
def _step(
    momentum: jax.Array,
    rms: jax.Array,
    param: jax.Array,
    rate: jax.Array,
    weight_decay: jax.Array,
    eps: jax.Array,
) -> jax.Array:
    return rate * (_ratio(momentum, rms + eps) + weight_decay * param)


def _ratio(x: jax.Array, size: jax.Array) -> jax.Array:
    """Returns the quotient, 0 where there never was a gradient and ``eps`` is 0."""
    return reduce.over(x, jnp.where(size == 0, 1, size))


def _decaying(params: Any, mask: Any, leaves: _leaves.Leaves) -> list[jax.Array]:
    """Returns the params that decay, and zero in the place of the others."""
    if params is None and leaves.counted:
        raise ValueError(
            "Expected params, which decay, got None. Call `update(updates, state,"
            " params)`."
        )
    wide = [_leaves.widen(x, leaves.dtype) for x in _limits.params_like(params, leaves)]
    if mask is None:
        return wide
    tree = mask(params) if callable(mask) else mask
    try:
        flags = jax.tree.leaves(jax.tree.broadcast(tree, params))
    except ValueError as error:
        raise ValueError(
            "Expected `mask` to be a tree prefix of the params, got"
            f" {jax.tree.structure(tree)} for {jax.tree.structure(params)}."
        ) from error
    for flag in flags:
        if not isinstance(flag, bool | np.bool_):
            raise TypeError(f"Expected `mask` to hold booleans, got {flag!r}.")
    pairs = zip(leaves.counted, wide, strict=True)
    return [x if flags[i] else jnp.zeros_like(x) for i, x in pairs]
