"""What updates go through before a clip can look at them: unscaled, made finite."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optaxclip._arguments import checks, mistakes
from optaxclip._engine.at_once import at_once
from optaxclip._measure import formulas
from optaxclip._mesh import splits as _splits, summed
from optaxclip._trees import leaves as _leaves


class ZeroNonfiniteState(NamedTuple):
    """State of :func:`zero_nonfinite`.

    Attributes:
      step_count: steps seen, int32.
      zeroed_step_count: steps with something to zero, int32.
      zeroed_elements: elements zeroed at the last step, float32.
    """

    step_count: jax.Array
    zeroed_step_count: jax.Array
    zeroed_elements: jax.Array


@mistakes.at_most(0, f"It wraps nothing. {mistakes.CHAIN}")
@at_once()
def zero_nonfinite() -> optax.GradientTransformationExtraArgs:
    """Replaces every NaN and infinity by 0, and counts them.

    ``optax.zero_nans`` lets infinities pass. To zero what is broken hides where it
    comes from, and the rest of the gradient may point anywhere:
    :func:`skip_if_nonfinite` is the safer remedy.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` with state
      :class:`ZeroNonfiniteState`.

    Examples:
      >>> tx = optaxclip.zero_nonfinite()
      >>> grads = jnp.array([1.0, jnp.nan, -jnp.inf])
      >>> updates, state = tx.update(grads, tx.init(grads))
      >>> print(updates, state.zeroed_elements)
      [1. 0. 0.] 2.0
    """

    def init_fn(params: Any) -> ZeroNonfiniteState:
        del params
        return ZeroNonfiniteState(
            jnp.zeros((), jnp.int32),
            jnp.zeros((), jnp.int32),
            jnp.zeros((), jnp.float32),
        )

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, ZeroNonfiniteState]:
        del extra_args
        checks.needed_state(state, ZeroNonfiniteState)
        leaves = _leaves.flatten(updates)
        summed.check_summed(leaves, params)
        counted = [jnp.asarray(leaves.leaves[i]) for i in leaves.counted]
        finite = [jnp.isfinite(x) for x in counted]
        kept = [jnp.where(ok, x, 0) for ok, x in zip(finite, counted, strict=True)]
        broken = leaves.tree([(~ok).astype(jnp.float32) for ok in finite])
        plain = formulas.global_norm(broken, _splits.splits(leaves), ord=1)
        count = plain.norms(broken)
        steps = optax.safe_increment(state.zeroed_step_count)
        return leaves.replaced(kept), ZeroNonfiniteState(
            jnp.asarray(optax.safe_increment(state.step_count)),
            jnp.where(count > 0, steps, state.zeroed_step_count),
            count.astype(jnp.float32),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def unscale(scale: ArrayLike | None = None) -> optax.GradientTransformationExtraArgs:
    """Divides the updates by the scale of the loss, before anything else.

    In mixed precision the loss is multiplied by a scale, so that small gradients don't
    underflow in float16. So are the gradients: a clip would take them for too large.

    Args:
      scale: what the loss was multiplied by, possibly traced; None takes it from
        ``update(..., loss_scale=scale)``, for a scale that changes.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` without a state. Its updates are
      float32 (float64 where they were), for float16 would lose what the scale saved.

    Raises:
      TypeError, ValueError: a scale that is not a positive number, or none.

    Examples:
      A scale that halves when a step overflows, and doubles after 1000 that don't.

      >>> optimizer = optax.chain(
      ...     optaxclip.unscale(),
      ...     optaxclip.skip_if_nonfinite(
      ...         optax.chain(optaxclip.clip_by_global_norm(1.0), optax.sgd(0.1))
      ...     ),
      ... )
      >>> def step(params, opt_state, scale, x):
      ...     def scaled_loss(params):
      ...         return jnp.sum((x * params.astype(jnp.float16)) ** 2) * scale
      ...
      ...     grads = jax.grad(scaled_loss)(params)
      ...     updates, opt_state = optimizer.update(
      ...         grads, opt_state, params, loss_scale=scale
      ...     )
      ...     guard = opt_state[1]
      ...     bad = guard.consecutive_count > 0
      ...     good_steps = guard.step_count - 1 - guard.last_skipped_step
      ...     scale = jnp.where(bad, scale / 2, scale)
      ...     scale = jnp.where(~bad & (good_steps % 1000 == 0), scale * 2, scale)
      ...     return optax.apply_updates(params, updates), opt_state, scale
      >>> params, scale = jnp.ones(2), jnp.float16(2.0**15)
      >>> opt_state = optimizer.init(params)
      >>> for _ in range(3):
      ...     params, opt_state, scale = step(params, opt_state, scale, jnp.float16(1))
      ...     print(f"{params[0]:.4f} {scale:.0f}")
      1.0000 16384
      0.9293 16384
      0.8586 16384

    References:
      Micikevicius et al., `Mixed Precision Training
      <https://arxiv.org/abs/1710.03740>`_, 2017
    """
    if scale is not None:
        _check_scale(scale)

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        del params
        now = extra_args.get("loss_scale") if scale is None else scale
        if now is None:
            raise ValueError(
                "Expected the scale of the loss, `unscale(scale)` or"
                " `update(..., loss_scale=scale)`, got none."
            )
        _check_scale(now)
        leaves = _leaves.flatten(updates)
        divisor = jnp.asarray(now, leaves.dtype)
        return leaves.replaced([x / divisor for x in leaves.measured()]), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)


def _check_scale(scale: Any) -> None:
    checks.number(scale, "scale", minimum=-jnp.inf)
    if isinstance(scale, checks.STATIC) and not 0 < float(scale) < jnp.inf:
        raise ValueError(f"Expected scale > 0, and finite, got {scale}.")
