"""SPAM's clip: spikes are elements far above their own second moment."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from optaxclip._arguments import checks
from optaxclip._clips import by_value
from optaxclip._mesh import summed
from optaxclip._thresholds import moments as _moments
from optaxclip._trees import leaves as _leaves, memories


class SpamState(NamedTuple):
    """State of :func:`spam_clip`.

    Attributes:
      update_count: updates seen, shape ``()``, int32.
      rms: root mean squares of the clipped elements since the last reset, a tree like
        the params, float32 or wider, real.
    """

    update_count: jax.Array
    rms: Any


def spam_clip(
    threshold: ArrayLike = 5000.0,
    decay: ArrayLike = 0.999,
    warmup_steps: ArrayLike = 20,
    reset_every: ArrayLike | None = 500,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips the elements that are spikes by their own second moment.

    With :math:`v_i` that of the steps before, not corrected for its start at zero,

    .. math::
      u_i &\leftarrow \text{sgn}(u_i) \sqrt{\text{threshold} \cdot v_i}
      \quad \text{where} \quad u_i^2 > \text{threshold} \cdot v_i \\
      v_i &\leftarrow \text{decay} \cdot v_i + (1 - \text{decay}) \, u_i^2

    in the steps :math:`t = 1, 2, \ldots` with :math:`t \bmod \text{reset\_every} \ge
    \text{warmup\_steps}`; in the others only the second line. Where
    :math:`t \bmod \text{reset\_every} = 0`, all :math:`v_i` start again at zero, first.
    For the whole of SPAM put :func:`reset_momentum` behind it.

    Guarantees:
      * Structure, shapes and dtypes of the updates are kept.
      * Elements that are not clipped come back bit for bit; zeros stay zeros.
      * Elements of 1e-33 and of 1e38 are right: no squares are kept.
      * A NaN stays NaN, an infinity becomes the bound where there is one; neither
        enters :math:`v_i`. Complex elements are clipped by their modulus, as in
        :func:`clip_by_value`.

    An element that has seen no gradient since the reset, :math:`v_i = 0`, passes as it
    is. The paper's code makes it zero, and it stays so until the next reset: the
    embedding of a rare token, say. The step ``warmup_steps`` is clipped, as in that
    code.

    Args:
      threshold: largest square of an element, relative to its second moment; possibly
        traced. ``jnp.inf`` allows all.
      decay: of the second moment per step, at least 0 and below 1.
      warmup_steps: steps from the start, and from every reset, before elements are
        clipped.
      reset_every: steps from reset to reset, more than ``warmup_steps``; None for none.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` with state :class:`SpamState`.

    Raises:
      TypeError: an argument that is not a number.
      ValueError: a number out of its range; when tracing, a state of other params.

    Examples:
      >>> clip = optaxclip.spam_clip(4.0, decay=0.75, warmup_steps=2)
      >>> state = clip.init(jnp.zeros(2))
      >>> for grad in [1.0, 0.0], [9.0, 9.0], [1.0, 90.0]:
      ...     updates, state = clip.update(jnp.array(grad), state)
      ...     print(updates)
      [1. 0.]
      [1. 9.]
      [1. 9.]

    References:
      Huang et al., `SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM Training
      <https://arxiv.org/abs/2501.06842>`_, 2025
    """
    checks.number(threshold, "threshold")
    checks.decay(decay, "decay")
    _check_steps(warmup_steps, reset_every)

    def init_fn(params: optax.Params) -> SpamState:
        leaves = _leaves.flatten(params, abstract=True)
        return SpamState(jnp.zeros((), jnp.int32), memories.real_zeros(leaves))

    def update_fn(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, SpamState]:
        del extra_args
        checks.needed_state(state, SpamState)
        leaves = _leaves.flatten(updates)
        summed.check_summed(leaves, params)

        count = jnp.asarray(optax.safe_increment(state.update_count))
        since = count if reset_every is None else count % reset_every
        limit = jnp.sqrt(jnp.maximum(jnp.asarray(threshold, leaves.dtype), 0))
        weight = jnp.asarray(1 - decay, leaves.dtype)

        olds = memories.recalled(state.rms, leaves)
        olds = [jnp.where(since == 0, 0, rms) for rms in olds]
        rows = zip(leaves.counted, olds, strict=True)
        now = limit, since >= warmup_steps, weight
        found = [_step(leaves.leaves[i], rms, *now) for i, rms in rows]
        return leaves.replaced([clipped for clipped, _ in found]), SpamState(
            count, memories.remembered(state.rms, [rms for _, rms in found])
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_steps(warmup_steps: Any, reset_every: Any) -> None:
    checks.steps(warmup_steps, "warmup_steps", 0)
    if reset_every is None:
        return
    checks.steps(reset_every, "reset_every", 1, " To never reset, use None.")
    steps = warmup_steps, reset_every
    if all(isinstance(x, checks.STATIC) for x in steps) and np.greater_equal(*steps):
        raise ValueError(
            f"Expected warmup_steps < reset_every, got {warmup_steps} and"
            f" {reset_every}: nothing would ever be clipped."
        )


@jax.jit
def _step(
    leaf: Any, rms: jax.Array, limit: jax.Array, active: jax.Array, weight: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the clipped leaf, and the root mean squares with it among them."""
    bound = jnp.where(active & (rms > 0), limit * rms, jnp.inf)
    update = _leaves.widen(leaf, rms.dtype)
    size = jnp.minimum(jnp.abs(update), bound)
    new = _moments.root_mean_square(rms, size, weight)
    clipped = by_value.clamped(leaf, (bound,), rms.dtype, "")
    return clipped, jnp.where(jnp.isfinite(update), new, rms)
