"""A clip by the largest change of a weight relative to that weight."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from optaxclip import factors, norms
from optaxclip._arguments import checks
from optaxclip._engine import limits as _limits
from optaxclip._engine.clip_by import Rule, clip_by, clipped
from optaxclip._measure import formulas, scopes as _scopes
from optaxclip._mesh import splits as _splits, summed
from optaxclip._trees import leaves as _leaves


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
    checks.number(relative, "relative")
    checks.number(absolute, "absolute")

    def update_fn(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        leaves = _leaves.flatten(updates)
        if params is None and leaves.counted:
            raise ValueError(
                "Expected params, with which `clippy` compares the updates, got None."
                " Call `clip.update(updates, state, params)`."
            )
        summed.check_summed(leaves, params)
        allowed = [
            _allowed(_leaves.widen(x, leaves.dtype), relative, absolute)
            for x in _limits.params_like(params, leaves)
        ]
        return clipped(
            Rule(1.0, factors.rescale),
            leaves,
            _largest_ratios(leaves, allowed),
            state,
            params,
            extra_args,
        )

    init_fn = clip_by(norms.leaf_norms, 1.0).init
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
    pairs = list(zip(leaves.measured(), allowed, strict=True))
    near = leaves.tree([_near_ratio(*pair, far) for pair in pairs])
    beyond = leaves.tree([_far_ratio(*pair, half) for pair in pairs])
    plain = formulas.leaf_norms(near, _splits.splits(leaves), ord=np.inf)
    norms, scaled = plain.norms(near), plain.norms(beyond)
    is_far = norms > far
    return _scopes.Measured(
        jnp.where(is_far, scaled, norms),
        jnp.where(is_far, half**-2, jnp.ones_like(norms)),
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
