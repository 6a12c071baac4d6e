"""Thresholds from the norms so far: what a rule remembers, and what it makes of it.

All are rules on vectors of norms and part of :mod:`optaxclip.thresholds`. A norm that
is not finite never gets here: the engine keeps what a rule knew of that scope.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optaxclip import _checks, _moments


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


class RankedState(NamedTuple):
    """State of :func:`window_percentile`: ``2 * window + 1`` numbers per scope.

    Attributes:
      seen_count: norms seen, int32.
      last_norms: the last of them, shape ``(window, ...)``, each new one in place of
        the oldest; infinite where there is none yet.
      ranked_norms: the same, in ascending order.
    """

    seen_count: Any
    last_norms: Any
    ranked_norms: Any


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
    _checks.number(num_std, "num_std")
    _check_memory(decay, window, warmup_steps)
    if decay is not None:
        return _rule(_decaying(decay), num_std, warmup_steps)
    return _rule(_in_window(window or 2), num_std, warmup_steps)


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
    _checks.number(q, "q")
    if isinstance(q, _checks.STATIC) and q > 100:
        raise ValueError(f"Expected 0 <= q <= 100, got {q}.")
    _check_memory(None, window, 0)

    def init_fn(params: Any) -> RankedState:
        like: Any = params
        count = jnp.zeros_like(like, jnp.int32)
        # Two arrays: one in two places could not be donated.
        rings = [
            jnp.full_like(like, jnp.inf, shape=(window, *like.shape)) for _ in "ab"
        ]
        return RankedState(count, *rings)

    def update_fn(updates: Any, state: Any, params: Any = None, **extra_args: Any):
        del params, extra_args
        count, last = state.seen_count, state.last_norms
        is_oldest = _places(last) == (count % window)[None]
        oldest = jnp.sum(jnp.where(is_oldest, last, 0), axis=0)
        ranked = _reranked(state.ranked_norms, oldest, updates)
        last = jnp.where(is_oldest, updates[None], last)
        count = jnp.asarray(optax.safe_increment(count))
        limits = _percentile(ranked, q, jnp.minimum(count, window))
        return limits, RankedState(count, last, ranked)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _reranked(ranked: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
    """Returns the ranked norms with a new one among them instead of an old one."""
    places, end = _places(ranked), jnp.full_like(ranked[:1], jnp.inf)
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
    return pair[0] + (place - low)[0] * (pair[1] - pair[0])


class QuantileState(NamedTuple):
    """State of :func:`streaming_quantile`: one number per scope.

    Attributes:
      next_max_norms: estimates of the quantile, which the next step is held to.
    """

    next_max_norms: Any


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
        _checks.number(value, what)
    if isinstance(quantile, _checks.STATIC) and quantile > 1:
        raise ValueError(f"Expected 0 <= quantile <= 1, got {quantile}.")
    if isinstance(initial, _checks.STATIC) and initial == 0:
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


class _Moments(NamedTuple):
    """How a rule remembers; ``update`` gives means, deviations and the new state."""

    init: Callable[[jax.Array], Any]
    update: Callable[[jax.Array, Any], tuple[jax.Array, jax.Array, Any]]


def _decaying(decay: ArrayLike) -> _Moments:
    def init(norms: jax.Array) -> MeanStdState:
        return MeanStdState(
            jnp.zeros_like(norms, jnp.int32),
            jnp.zeros_like(norms),
            jnp.zeros_like(norms),
        )

    def update(norms: jax.Array, state: MeanStdState) -> tuple[Any, Any, MeanStdState]:
        count = jnp.asarray(optax.safe_increment(state.seen_count))
        weight = _moments.newest_weight(count, decay, norms.dtype)
        means = _moments.mean(state.means, norms, weight)
        spread = jnp.sqrt(1 - weight) * (norms - state.means)
        stds = _moments.root_mean_square(state.stds, jnp.abs(spread), weight)
        return means, stds, MeanStdState(count, means, stds)

    return _Moments(init, update)


def _in_window(window: int) -> _Moments:
    def init(norms: jax.Array) -> WindowState:
        ring = jnp.zeros_like(norms, shape=(window, *norms.shape))
        return WindowState(jnp.zeros_like(norms, jnp.int32), ring)

    def update(norms: jax.Array, state: WindowState) -> tuple[Any, Any, WindowState]:
        state = _remembered(norms, state)
        filled, total = _filled(state)
        means = jnp.sum(state.last_norms / total[None], axis=0, where=filled)
        errors = jnp.where(filled, state.last_norms - means[None], 0)
        total = total.astype(means.dtype)
        return means, _moments.root_of_squares(errors) / jnp.sqrt(total), state

    return _Moments(init, update)


def _rule(
    moments: _Moments, num_std: ArrayLike, warmup_steps: ArrayLike
) -> optax.GradientTransformationExtraArgs:
    def update_fn(updates: Any, state: Any, params: Any = None, **extra_args: Any):
        del params, extra_args
        means, stds, state = moments.update(updates, state)
        times = jnp.asarray(num_std, means.dtype)
        limits = jnp.where(jnp.isinf(times), times, means + times * stds)
        return jnp.where(state.seen_count < warmup_steps, jnp.inf, limits), state

    init_fn: Any = moments.init
    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _remembered(norms: jax.Array, state: WindowState) -> WindowState:
    """Returns the window with the newest norms in place of the oldest."""
    count, size = state.seen_count, state.last_norms.shape[0]
    newest = _places(state.last_norms) == (count % size)[None]
    return WindowState(
        jnp.asarray(optax.safe_increment(count)),
        jnp.where(newest, norms[None], state.last_norms),
    )


def _filled(state: WindowState) -> tuple[jax.Array, jax.Array]:
    """Returns which places of the window hold norms, and how many."""
    total = jnp.minimum(state.seen_count, state.last_norms.shape[0])
    return _places(state.last_norms) < total[None], total


def _places(ring: jax.Array) -> jax.Array:
    """Returns the place of every norm in its window."""
    return jnp.arange(ring.shape[0]).reshape((-1,) + (1,) * (ring.ndim - 1))


def _check_memory(decay: Any, window: Any, warmup_steps: Any) -> None:
    if (decay is None) == (window is None):
        raise ValueError(
            "Expected one of `decay` and `window`, how a rule forgets, got"
            f" decay={decay!r}, window={window!r}."
        )
    if decay is not None:
        _checks.decay(decay, "decay")
    _checks.steps(warmup_steps, "warmup_steps", 0)
    if window is not None and not (isinstance(window, int) and window >= 2):
        raise ValueError(
            f"Expected window >= 2, an int, got {window!r}. It is the shape of the"
            " state: under `optax.inject_hyperparams` name it in `static_args`."
        )
