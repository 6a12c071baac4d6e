"""Clipping inside the backward pass: identities whose derivative is clipped."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optaxclip import _checks, _clips, _engine, _values, norms


def clip_cotangent(x: Any, limit: _values.Range) -> Any:
    r"""Returns ``x``; clips every element of its cotangent on the way back.

    .. math:: y = x, \qquad
      \bar{x}_i = \min(\max(\bar{y}_i, \text{low}), \text{high})

    It acts at this point of the graph, before the cotangent is multiplied by earlier
    Jacobians and summed over time steps and batch: inside ``jax.lax.scan`` at every
    step, under ``jax.vmap`` on every example. That is not a clip of the gradient of the
    parameters, for which there is :func:`clip_by_value`. Limits are in units of the
    loss: under a mean over the batch divide them by its size.

    Guarantees: the value of ``x`` bit for bit; those of :func:`clip_by_value` for the
    cotangent. The limit gets a derivative of zero.

    Args:
      x: tree of arrays.
      limit: largest modulus allowed, or a pair (low, high) with low <= 0 <= high;
        possibly traced, when a bound on the wrong side of 0 counts as 0.

    Raises:
      TypeError: a limit that is neither a number nor a pair; forward-mode
        differentiation (``jax.jvp``, ``jax.jacfwd``), JAX's own error.
      ValueError: a negative or NaN limit, a range without 0, a range for a complex
        leaf.

    Examples:
      >>> loss = lambda x: 0.5 * optaxclip.clip_cotangent(x, 1.0) ** 2  # Huber's slope
      >>> print(jax.grad(loss)(0.5), jax.grad(loss)(3.0))
      0.5 1.0

    References:
      Graves, `Generating Sequences With Recurrent Neural Networks
      <https://arxiv.org/abs/1308.0850>`_, 2013
    """
    _values.check_range(limit, "limit")
    ends = tuple(limit) if isinstance(limit, tuple | list) else limit
    return _limited(x, jax.tree.map(_as_float, ends))


def clip_cotangent_norm(
    x: Any, max_norm: ArrayLike, axis: int | tuple[int, ...] | None = None
) -> Any:
    r"""Returns ``x``; rescales its cotangent to a norm of at most ``max_norm``.

    .. math:: y = x, \qquad
      \bar{x} = \bar{y} \cdot \min(1, \text{max\_norm} / \|\bar{y}\|)

    Guarantees: the value of ``x`` bit for bit; those of :func:`clip_by_global_norm` for
    the cotangent, or for each slice of it that goes along ``axis``. The limit gets a
    derivative of zero.

    Args:
      x: tree of arrays.
      max_norm: largest L2 norm allowed, possibly traced, when a negative one counts
        as 0.
      axis: the axes that a norm goes over; None, all axes of all leaves together. For
        activations ``[batch, time, features]``, -1 clips each token and ``(1, 2)`` each
        example.

    Raises:
      TypeError: a max_norm that is not a number; forward-mode differentiation.
      ValueError: a negative or NaN max_norm, an axis out of range, or one of a leaf
        that is split over devices inside ``shard_map``.

    Examples:
      >>> loss = lambda x: jnp.sum(optaxclip.clip_cotangent_norm(x, 1.0, axis=-1) ** 2)
      >>> print(jax.grad(loss)(jnp.array([[3.0, 4.0], [0.3, 0.0]])))
      [[0.6 0.8]
       [0.6 0. ]]
    """
    _checks.number(max_norm, "max_norm")
    return _rescaled(x, _as_float(max_norm), axis)


@jax.custom_vjp
def _limited(x: Any, limit: Any) -> Any:
    del limit
    return x


def _limited_fwd(x: Any, limit: Any) -> tuple[Any, Any]:
    return x, limit


def _limited_bwd(limit: Any, cotangent: Any) -> tuple[Any, Any]:
    clipped, _ = _values.clip_by_value(limit).update(cotangent, optax.EmptyState())
    return clipped, jax.tree.map(jnp.zeros_like, limit)


_limited.defvjp(_limited_fwd, _limited_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rescaled(x: Any, max_norm: jax.Array, axis: Any) -> Any:
    del max_norm, axis
    return x


def _rescaled_fwd(x: Any, max_norm: jax.Array, axis: Any) -> tuple[Any, jax.Array]:
    del axis
    return x, max_norm


def _rescaled_bwd(axis: Any, max_norm: jax.Array, cotangent: Any) -> tuple[Any, Any]:
    clip = _clips.clip_by_global_norm(max_norm)
    if axis is not None:
        norm = functools.partial(norms.unit_norms, axis=axis)
        clip = _engine.clip_by(norm, max_norm)
    return clip.update(cotangent, optax.EmptyState())[0], jnp.zeros_like(max_norm)


_rescaled.defvjp(_rescaled_fwd, _rescaled_bwd)


def _as_float(limit: ArrayLike) -> jax.Array:
    return jnp.asarray(limit, jnp.promote_types(jnp.result_type(limit), jnp.float32))
