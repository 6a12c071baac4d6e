"""Clips of updates by the size of the weights that they change."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from optaxclip import (
    _checks,
    _engine,
    _formulas,
    _leaves,
    _limits,
    _scopes,
    _splits,
    factors,
    norms,
    thresholds,
)


def clip_by_trust_ratio(
    max_ratio: ArrayLike = 1.0, trust_coefficient: ArrayLike = 1.0
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales every leaf to the size of its parameters, by no more than a cap.

    .. math:: u_l \leftarrow u_l \cdot \min(\text{max\_ratio},
      \text{trust\_coefficient} \cdot \|\theta_l\| / \|u_l\|)

    The trust ratio of LARS and LAMB with an upper clip: with ``max_ratio=1`` updates
    only ever shrink (LAMBC, timm's ``trust_clip``), with ``jnp.inf`` it is
    ``optax.scale_by_trust_ratio``. Put it after the preconditioner and weight decay,
    and before the learning rate. With the learning rate for the cap and
    ``optax.scale(-1.0)`` behind, it is LARC.

    Guarantees: those of :func:`clip_by_global_norm`, for each leaf by itself; a leaf
    whose parameters or updates are all zero comes back bit for bit.

    Args:
      max_ratio: largest factor, possibly above 1; ``jnp.inf`` for none. A negative
        traced number counts as 0.
      trust_coefficient: ratio of update norm to parameter norm aimed at.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` with state :class:`ClipState`,
      one entry per leaf, whose ``max_norms`` are ``trust_coefficient`` times the
      parameter norms, infinite where those are 0. ``update`` needs ``params``.

    Raises:
      TypeError, ValueError: an argument that is not a number, is negative or NaN; no
        params, or params that don't match the updates.

    Examples:
      >>> clip = optaxclip.clip_by_trust_ratio()
      >>> params = {"a": jnp.array([0.3, 0.4]), "b": jnp.array([3.0, 4.0])}
      >>> grads = {"a": jnp.array([0.0, 2.0]), "b": jnp.array([0.0, 2.0])}
      >>> updates, _ = clip.update(grads, clip.init(params), params)
      >>> print(updates["a"], updates["b"])
      [0.  0.5] [0. 2.]

    References:
      You et al., `Large Batch Optimization for Deep Learning: Training BERT in 76
      minutes <https://arxiv.org/abs/1904.00962>`_, 2019; You et al., `Large Batch
      Training of Convolutional Networks <https://arxiv.org/abs/1708.03888>`_, 2017
    """
    _checks.number(max_ratio, "max_ratio")
    _checks.number(trust_coefficient, "trust_coefficient")

    def capped(sizes: jax.Array, allowed: jax.Array) -> jax.Array:
        cap = jnp.maximum(jnp.asarray(max_ratio, sizes.dtype), 0)
        at_cap = cap * sizes <= allowed
        return jnp.where(at_cap, cap, allowed / jnp.where(at_cap, 1, sizes))

    def aimed_at(sizes: Any, params: Any) -> Any:
        del params
        share = jnp.asarray(trust_coefficient, sizes.dtype)
        return jnp.where(sizes == 0, jnp.inf, share * sizes)

    sizes = thresholds.relative_to_params(1.0, norms.leaf_norms, eps=0.0)
    rule = optax.chain(sizes, optax.stateless(aimed_at))
    return _engine.clip_by(norms.leaf_norms, rule, capped)


def clippy(
    relative: ArrayLike = 0.5, absolute: ArrayLike = 1e-2
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales every leaf so that no weight changes by more than a share of itself.

    With :math:`w_i` the weights of a leaf and :math:`u_i` their updates,

    .. math:: u \leftarrow u \cdot \min\left(1, \min_i
      \frac{\text{relative} \cdot |w_i| + \text{absolute}}{|u_i|}\right).

    One weight out of bounds scales down its whole leaf, which keeps its direction.
    What it bounds is what is added to the weights, so put it last in the chain, after
    the learning rate; there it goes with any optimizer, where the paper's is Adagrad.

    Guarantees:
      * Structure, shapes and dtypes of the updates are kept.
      * No weight changes by more than ``relative * |w| + absolute``, up to one rounding
        to the leaf's dtype.
      * Leaves within their bounds come back bit for bit; zeros stay zeros.
      * A NaN or an infinity in a leaf makes all of that leaf NaN.
      * Without an absolute share a weight at zero may not move: where one has an
        update, its leaf becomes zeros, as in the authors' code.

    Args:
      relative: largest change of a weight, as a share of it.
      absolute: largest change of a weight at zero, in the units of the weights. The
        defaults are the paper's; its code in TensorFlow Recommenders has 0.1 and 1e-7.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` with state :class:`ClipState`,
      one entry per leaf: ``norms`` are the largest ratios of a change to what is
      allowed, ``max_norms`` 1. ``update`` needs ``params``.

    Raises:
      TypeError, ValueError: an argument that is not a number, is negative or NaN; no
        params, or params that don't match the updates.

    Examples:
      >>> clip = optaxclip.clippy(relative=0.1, absolute=0.02)
      >>> params, deltas = {"w": jnp.array([4.0, 0.0])}, {"w": jnp.array([-0.3, 0.04])}
      >>> updates, state = clip.update(deltas, clip.init(params), params)
      >>> print(updates["w"], state.factors)
      [-0.15  0.02] [0.5]

    References:
      Tang et al., `Improving Training Stability for Multitask Ranking Models in
      Recommender Systems <https://arxiv.org/abs/2302.09178>`_, 2023
    """
    _checks.number(relative, "relative")
    _checks.number(absolute, "absolute")

    def update_fn(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        leaves = _leaves.flatten(updates)
        if params is None and leaves.counted:
            raise ValueError(
                "Expected params, with which `clippy` compares the updates, got None."
                " Call `clip.update(updates, state, params)`."
            )
        _splits.check_summed(leaves, params)
        allowed = [
            _allowed(_leaves.widen(x, leaves.dtype), relative, absolute)
            for x in _limits.params_like(params, leaves)
        ]
        return _engine.clipped(
            _engine.Rule(1.0, factors.rescale),
            leaves,
            _largest_ratios(leaves, allowed),
            state,
            params,
            extra_args,
        )

    init_fn = _engine.clip_by(norms.leaf_norms, 1.0).init
    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _allowed(weights: jax.Array, relative: ArrayLike, absolute: ArrayLike) -> jax.Array:
    sizes = jnp.abs(weights)
    share, floor = (
        jnp.maximum(jnp.asarray(x, sizes.dtype), 0) for x in (relative, absolute)
    )
    return jnp.where(sizes == 0, 0, share * sizes) + floor  # the share may be infinite


def _largest_ratios(
    leaves: _leaves.Leaves, allowed: list[jax.Array]
) -> _scopes.Measured:
    """Returns the largest ``|update| / allowed`` of every leaf as if it were its norm.

    A ratio may be as large as the square of the largest number: where it is, it is
    measured a second time, as one of an update scaled down to an allowance scaled up.
    """
    info = jnp.finfo(leaves.dtype)
    far, half = 2.0 ** (3 * info.maxexp // 4), 2.0 ** (info.maxexp // 2 - 1)
    splits = _splits.splits(leaves)

    def largest(ratios: list[jax.Array]) -> _scopes.Plain:
        return _formulas.leaf_norms(leaves.tree(ratios), splits, ord=np.inf)

    pairs = list(zip(leaves.measured(), allowed, strict=True))
    plain = largest([_near_ratio(*pair, far) for pair in pairs])
    scaled = largest([_far_ratio(*pair, half) for pair in pairs])
    is_far = plain.norms > far
    return _scopes.Measured(
        jnp.where(is_far, scaled.norms, plain.norms),
        jnp.where(is_far, half**-2, jnp.ones_like(plain.norms)),
        plain.scopes,
        plain.axes,
    )


def _near_ratio(update: jax.Array, allowed: jax.Array, far: float) -> jax.Array:
    """Returns the ratio, or one above ``far`` for all that are above it."""
    size = jnp.abs(update)
    is_near = (size <= allowed * far) & (allowed > 0)
    beyond = jnp.where(size == 0, 0, jnp.where(jnp.isnan(size), size, 2 * far))
    ratio = jnp.where(is_near, size, 0) / jnp.where(is_near, allowed, 1)
    return jnp.where(is_near, ratio, beyond)


def _far_ratio(update: jax.Array, allowed: jax.Array, half: float) -> jax.Array:
    """Returns the ratio divided by ``half`` squared, finite where the update is."""
    largest = jnp.finfo(allowed.dtype).max
    size, floor = jnp.abs(update / half), allowed * half
    is_known = floor > size / largest
    ratio = jnp.where(is_known, size, 0) / jnp.where(is_known, floor, 1)
    ratio = jnp.where(is_known | (size == 0), ratio, largest)
    return jnp.where(jnp.isfinite(update), ratio, jnp.inf)
