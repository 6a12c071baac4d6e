"""Wrappers that add a memory: of what a clip took away, of when momentum began."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optaxclip._arguments import checks
from optaxclip._engine.multiply import multiplied
from optaxclip._measure import units as _units
from optaxclip._mesh import summed
from optaxclip._trees import leaves as _leaves, memories


class UClipState(NamedTuple):
    """State of :func:`u_clip`.

    Attributes:
      carry: what was cut off so far, a tree like the params, float32 or wider.
      clip_state: state of the wrapped clip.
    """

    carry: Any
    clip_state: Any


class ResetState(NamedTuple):
    """State of :func:`reset_momentum`.

    Attributes:
      update_count: updates seen, shape ``()``, int32.
      wrapped_state: state of the wrapped transformation.
    """

    update_count: jax.Array
    wrapped_state: Any


def u_clip(
    clip: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    r"""Adds what a clip cuts off to the next update: clipping without a bias.

    .. math::
      u_t = \text{clip}(g_t + D_t), \qquad D_{t+1} = g_t + D_t - u_t, \qquad D_1 = 0

    So all that came out is all that went in, less what is carried:
    :math:`\sum u_t = \sum g_t - D`.

    Guarantees:
      * Structure, shapes and dtypes of the updates are kept. Updates that need no clip,
        and have no carry, come back bit for bit.
      * The carry is in float32, or wider, and holds what rounding cuts off as well.
      * Where an update is not finite, or comes out of the clip so, the carry stays as
        it was.

    A zero update does not stay zero while something is carried.

    Args:
      clip: any clip; it sees updates in the dtype of the carry.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` with state :class:`UClipState`.

    Raises:
      TypeError: ``clip`` is not a transformation.
      ValueError: when tracing, a state of other params; and what ``clip`` raises.

    Examples:
      >>> tx = optaxclip.u_clip(optaxclip.clip_by_value(1.0))
      >>> state = tx.init(jnp.zeros(1))
      >>> for grad in 2.5, 0.0, 0.0:
      ...     updates, state = tx.update(jnp.array([grad]), state)
      ...     print(updates, state.carry)
      [1.] [1.5]
      [1.] [0.5]
      [0.5] [0.]

    References:
      Elesedy and Hutter, `U-Clip: On-Average Unbiased Stochastic Gradient Clipping
      <https://arxiv.org/abs/2302.02971>`_, 2023
    """
    clip = checks.transformation(clip, "clip", "optaxclip.clip_by_value(1.0)")

    def init_fn(params: optax.Params) -> UClipState:
        leaves = _leaves.flatten(params, abstract=True)
        return UClipState(memories.zeros(leaves), clip.init(params))

    def update_fn(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, UClipState]:
        checks.needed_state(state, UClipState)
        leaves = _leaves.flatten(updates)
        summed.check_summed(leaves, params)
        olds = memories.recalled(state.carry, leaves)
        totals = list(map(jnp.add, leaves.measured(), olds))
        clipped, clip_state = clip.update(
            leaves.replaced(totals), state.clip_state, params, **extra_args
        )
        every = jax.tree.leaves(clipped)
        kept = [_kept(leaves.leaves[i], every[i]) for i in leaves.counted]
        news = list(map(_rest, totals, kept, olds))
        return leaves.replaced(kept), UClipState(
            memories.remembered(state.carry, news), clip_state
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def reset_momentum(
    inner: optax.GradientTransformation,
    every: ArrayLike = 500,
    warmup_steps: ArrayLike = 150,
) -> optax.GradientTransformationExtraArgs:
    r"""Lets the momentum of an optimizer start again every so many steps.

    In the steps :math:`t = 1, 2, \ldots` with :math:`t \bmod \text{every} = 0` all
    arrays like the params in the state of ``inner`` go back to their first values,
    before the step is taken. From then on, with :math:`k` steps since the reset, the
    updates of ``inner`` are scaled by

    .. math::
      s = 1 - 0.99 \cdot \tfrac12
      \left(1 + \cos \frac{\pi k}{\text{warmup\_steps} + 1}\right)
      \quad \text{while} \quad k < \text{warmup\_steps},

    and before the first reset not at all. Counts and schedules of ``inner`` go on, as
    does its bias correction: a step of Adam after the reset would be three times its
    size, were it not scaled.

    This is half of SPAM; the other is :func:`spam_clip`, with the decay of Adam's
    second moment and resets in the same steps. The paper's code adds ``eps`` before
    that moment is corrected, and does not scale the weight decay: for that, add it
    behind this wrapper.

    Guarantees:
      * Structure, shapes and dtypes of the updates are kept. What is not scaled comes
        out of ``inner`` bit for bit.
      * A reset also removes what is NaN.

    Args:
      inner: optimizer, or a part of one with momentum. Of ``optax.MultiSteps``, put
        around this wrapper, only whole steps count.
      every: steps from reset to reset, at least 1.
      warmup_steps: steps from a reset until updates have their whole size again; 0 for
        no scaling.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` with state :class:`ResetState`.
      The first values are those of ``inner.init`` for the params passed to ``update``,
      or if there are none for the updates, which usually are the same: zeros.

    Raises:
      TypeError: ``inner`` is not a transformation, or another argument not a number.
      ValueError: a number of steps out of its range.

    Examples:
      >>> spam = optax.chain(
      ...     optaxclip.spam_clip(),
      ...     optaxclip.reset_momentum(optax.adam(1e-3, eps=1e-6)),
      ... )
      >>> updates, _ = spam.update(jnp.ones(1), spam.init(jnp.zeros(1)))
      >>> print(updates.round(5))
      [-0.001]
      >>> tx = optaxclip.reset_momentum(optax.trace(1.0), every=3, warmup_steps=2)
      >>> state = tx.init(jnp.zeros(1))
      >>> for _ in range(5):
      ...     updates, state = tx.update(jnp.ones(1), state)
      ...     print(f"{updates[0]:.3f}")
      1.000
      2.000
      0.010
      0.515
      3.000

    References:
      Huang et al., `SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM Training
      <https://arxiv.org/abs/2501.06842>`_, 2025
    """
    inner = checks.transformation(inner, "inner", "optax.adam(1e-3)")
    checks.steps(every, "every", 1)
    checks.steps(warmup_steps, "warmup_steps", 0)

    def init_fn(params: optax.Params) -> ResetState:
        return ResetState(jnp.zeros((), jnp.int32), inner.init(params))

    def update_fn(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, ResetState]:
        checks.needed_state(state, ResetState)
        count = jnp.asarray(optax.safe_increment(state.update_count))
        since = count % every
        fresh = inner.init(updates if params is None else params)
        started = _restarted(inner, state.wrapped_state, fresh, since == 0)
        updates, wrapped_state = inner.update(updates, started, params, **extra_args)

        leaves = _leaves.flatten(updates)
        phase = jnp.pi * since.astype(leaves.dtype) / (warmup_steps + 1)
        rising = (count >= every) & (since < warmup_steps)
        scale = jnp.where(rising, 1 - 0.495 * (1 + jnp.cos(phase)), 1)
        scaled = multiplied(leaves, (_units.EVERYTHING,), jnp.ones_like(scale), scale)
        return scaled, ResetState(count, wrapped_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _kept(leaf: Any, clipped: jax.Array) -> jax.Array:
    """Returns the result in the dtype of the leaf, and that itself where they agree."""
    narrow = _leaves.narrow(jnp.asarray(clipped), leaf)
    same = _leaves.widen(leaf, clipped.dtype) == clipped
    return jnp.where(same, jnp.asarray(leaf, narrow.dtype), narrow)


@jax.jit
def _rest(total: jax.Array, kept: jax.Array, carry: jax.Array) -> jax.Array:
    rest = total - kept.astype(total.dtype)
    return jnp.where(jnp.isfinite(rest), rest, carry)


def _restarted(inner: Any, state: Any, fresh: Any, is_reset: jax.Array) -> Any:
    """Returns the state with its arrays like the params fresh, in a step of reset."""
    ours = optax.tree.map_params(
        inner, lambda _: True, state, transform_non_params=lambda _: False
    )
    old, treedef = jax.tree.flatten(state)
    new = [
        jnp.where(is_reset, x.astype(was.dtype), was) if is_ours else was
        for is_ours, was, x in zip(
            jax.tree.leaves(ours), old, jax.tree.leaves(fresh), strict=True
        )
    ]
    return treedef.unflatten(new)
