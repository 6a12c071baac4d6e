"""Thresholds some standard deviations above the mean of the norms so far.

Rules on vectors of norms are part of :mod:`optaxclip.thresholds`. A norm that is
not finite never gets here: the engine keeps what a rule knew of that scope.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optaxclip._arguments import checks, mistakes
from optaxclip._thresholds import moments as _moments
from optaxclip._trees import infinity


class MeanStdState(NamedTuple):
    """State of :func:`mean_plus_std` with a decay: three numbers per scope.

    Attributes:
      seen_count: norms seen, int32.
      means: their weighted means.
      stds: their weighted standard deviations.
    """

    seen_count: Any
    means: Any
    stds: Any


class WindowState(NamedTuple):
    """State of :func:`mean_plus_std` with a window: ``window + 1`` numbers per scope.

    Attributes:
      seen_count: norms seen, int32.
      last_norms: the last of them, shape ``(window, ...)``, each new one in place of
        the oldest.
    """

    seen_count: Any
    last_norms: Any


@mistakes.makes_rule
def mean_plus_std(
    num_std: ArrayLike,
    *,
    decay: ArrayLike | None = None,
    window: int | None = None,
    warmup_steps: ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Allows some standard deviations above the mean norm: k-sigma clipping.

    .. math:: \text{max\_norm} = \mu + \text{num\_std} \cdot \sigma

    Mean and standard deviation are those of the norms so far, this step's included:
    weighted by ``decay ** age``, or of the last ``window``. To go by the steps before
    this one wrap it, ``lagged(mean_plus_std(3.0, decay=0.99))``: else a spike raises
    its own threshold. The norms enter as they are, or after the clip with
    :func:`clipped_history`.

    Args:
      num_std: standard deviations allowed above the mean.
      decay: of the weights with age, at least 0 and below 1. The sums are corrected for
        their start at zero.
      window: norms remembered, at least 2. One of ``decay`` and ``window`` is needed.
      warmup_steps: while fewer norms were seen, this one included, all is allowed.

    Raises:
      TypeError: ``num_std`` is not a number.
      ValueError: neither or both of ``decay`` and ``window``, or one out of range.

    Examples:
      >>> rule = optaxclip.thresholds.mean_plus_std(1.0, window=3)
      >>> state = rule.init(jnp.zeros(()))
      >>> for norm in 1.0, 3.0, 3.0, 3.0:
      ...     max_norm, state = rule.update(jnp.array(norm), state)
      ...     print(f"{max_norm:.3f}")
      1.000
      3.000
      3.276
      3.000
    """
    checks.number(num_std, "num_std")
    _check_memory(decay, window, warmup_steps)
    if decay is not None:
        return _rule(_decaying(decay), num_std, warmup_steps)
    return _rule(_in_window(window or 2), num_std, warmup_steps)


class _Moments(NamedTuple):
    """How a rule remembers; ``update`` gives means, deviations and the new state."""

    init: Callable[[jax.Array], Any]
    update: Callable[[jax.Array, Any], tuple[jax.Array, jax.Array, Any]]


def fresh(norms: jax.Array) -> MeanStdState:
    """Returns the state before the first norm."""
    count = jnp.zeros_like(norms, jnp.int32)
    return MeanStdState(count, jnp.zeros_like(norms), jnp.zeros_like(norms))


def _decaying(decay: ArrayLike) -> _Moments:
    def update(norms: jax.Array, state: MeanStdState) -> tuple[Any, Any, MeanStdState]:
        count = jnp.asarray(optax.safe_increment(state.seen_count))
        weight = _moments.newest_weight(count, decay, norms.dtype)
        means = _moments.mean(state.means, norms, weight)
        spread = jnp.sqrt(1 - weight) * (norms - state.means)
        stds = _moments.root_mean_square(state.stds, jnp.abs(spread), weight)
        return means, stds, MeanStdState(count, means, stds)

    return _Moments(fresh, update)


def _in_window(window: int) -> _Moments:
    def init(norms: jax.Array) -> WindowState:
        ring = jnp.zeros_like(norms, shape=(window, *norms.shape))
        return WindowState(jnp.zeros_like(norms, jnp.int32), ring)

    def update(norms: jax.Array, state: WindowState) -> tuple[Any, Any, WindowState]:
        state = _remembered(norms, state)
        filled, total = _filled(state)
        # Above the least of them: the deviation of equal norms is exactly 0.
        known = jnp.where(filled, state.last_norms, norms[None])
        least = jax.lax.stop_gradient(jnp.min(known, axis=0))
        total = total.astype(least.dtype)
        above = known - least[None]
        mean = jnp.sum(above / total[None], axis=0, where=filled)
        errors = jnp.where(filled, above - mean[None], 0)
        stds = _moments.root_of_squares(errors) / jnp.sqrt(total)
        return least + mean, stds, state

    return _Moments(init, update)


def _rule(
    moments: _Moments, num_std: ArrayLike, warmup_steps: ArrayLike
) -> optax.GradientTransformationExtraArgs:
    def update_fn(updates: Any, state: Any, params: Any = None, **extra_args: Any):
        del params, extra_args
        means, stds, state = moments.update(updates, state)
        times = jnp.asarray(num_std, means.dtype)
        is_endless = infinity.is_infinite(times)
        limits = means + jnp.where(is_endless, 0, times) * stds
        allows_all = is_endless | (state.seen_count < warmup_steps)
        return jnp.where(allows_all, infinity.full_like(limits), limits), state

    init_fn: Any = moments.init
    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _remembered(norms: jax.Array, state: WindowState) -> WindowState:
    """Returns the window with the newest norms in place of the oldest."""
    count, size = state.seen_count, state.last_norms.shape[0]
    newest = _moments.places(state.last_norms) == (count % size)[None]
    return WindowState(
        jnp.asarray(optax.safe_increment(count)),
        jnp.where(newest, norms[None], state.last_norms),
    )


def _filled(state: WindowState) -> tuple[jax.Array, jax.Array]:
    """Returns which places of the window hold norms, and how many."""
    total = jnp.minimum(state.seen_count, state.last_norms.shape[0])
    return _moments.places(state.last_norms) < total[None], total


def _check_memory(decay: Any, window: Any, warmup_steps: Any) -> None:
    if (decay is None) == (window is None):
        raise ValueError(
            "Expected one of `decay` and `window`, how a rule forgets, got"
            f" decay={decay!r}, window={window!r}."
        )
    if decay is not None:
        checks.decay(decay, "decay")
    checks.steps(warmup_steps, "warmup_steps", 0)
    if window is not None:
        checks.window(window)
