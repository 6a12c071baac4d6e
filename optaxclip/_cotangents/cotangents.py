"""Clipping inside the backward pass: identities whose derivative is clipped."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optaxclip import norms
from optaxclip._arguments import checks, mistakes
from optaxclip._clips import by_value
from optaxclip._cotangents.stats import CotangentStats, seen_by, spread
from optaxclip._engine.clip_by import clip_by


@mistakes.at_most(2, by_value.PAIR)
def clip_cotangent(
    x: Any,
    limit: by_value.Range,
    *,
    stats: CotangentStats | None = None,
) -> Any:
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
      stats: None, or a dummy parameter, :func:`cotangent_stats`, whose "gradient" will
        be what came back here.

    Raises:
      TypeError: a limit that is neither a number nor a pair; stats of another type;
        forward-mode differentiation of this function (``jax.jvp``, ``jax.jacfwd``),
        JAX's own error.
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
    _check_arrays(x)
    by_value.check_range(limit, "limit")
    ends = tuple(limit) if isinstance(limit, tuple | list) else limit
    ends = jax.tree.map(_as_float, ends)
    return _tapped(x, ends, spread(stats, x), by_value.clip_by_value)


def clip_cotangent_norm(
    x: Any,
    max_norm: ArrayLike,
    axis: norms.Axes = None,
    *,
    stats: CotangentStats | None = None,
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
      axis: the axes that a norm goes over, or a mapping from path patterns to axes;
        None, all axes of all leaves together. For activations ``[batch, time,
        features]``, -1 clips each token and ``(1, 2)`` each example.
      stats: as in :func:`clip_cotangent`; its norm is that of all of ``x``.

    Raises:
      TypeError: a max_norm that is not a number; an axis that is not an int or a tuple;
        forward-mode differentiation.
      ValueError: a negative or NaN max_norm, an axis out of range, or one of a leaf
        that is split over devices inside ``shard_map``.

    Examples:
      >>> loss = lambda x: jnp.sum(optaxclip.clip_cotangent_norm(x, 1.0, axis=-1) ** 2)
      >>> print(jax.grad(loss)(jnp.array([[3.0, 4.0], [0.3, 0.0]])))
      [[0.6 0.8]
       [0.6 0. ]]
    """
    _check_arrays(x)
    checks.number(max_norm, "max_norm")
    norm: Any = norms.global_norm
    if axis is not None:
        norm = functools.partial(norms.unit_norms, axis=axis)
    jax.eval_shape(norm, x)  # a bad axis raises here, not first on the way back
    clip = functools.partial(clip_by, norm)
    return _tapped(x, _as_float(max_norm), spread(stats, x), clip)


@mistakes.at_most(2, by_value.PAIR)
def clip_preactivation(
    activation: Callable[[jax.Array], jax.Array], limit: by_value.Range
) -> Callable[[jax.Array], jax.Array]:
    r"""Returns ``activation`` with the derivative of its input clipped.

    .. math:: y = f(x), \qquad \bar{x} = \text{clip}(f'(x) \, \bar{y})

    For what a layer lets you choose. With the gates and the activation of an LSTM cell
    it is the rule of Graves up to one thing: cells apply the activation to the cell
    state too, so that is clipped as well. In the trained LSTM of
    ``benchmarks/studies/lstm_handwriting.py`` the gradient differs from his by 2 % of
    its norm with a limit of 10, by 8 % with 1. :func:`clip_layer_cotangents` is exact.

    Args:
      activation: function of one array.
      limit: as in :func:`clip_cotangent`.

    Returns:
      A function; for equal static arguments the same one, so that equal models are
      traced once.

    Raises:
      TypeError, ValueError: an activation that is not a function; see
        :func:`clip_cotangent`.

    Examples:
      >>> sigmoid = optaxclip.clip_preactivation(jax.nn.sigmoid, 0.1)
      >>> print(jax.grad(jax.nn.sigmoid)(0.0), jax.grad(sigmoid)(0.0))
      0.25 0.1
      >>> cell = nn.OptimizedLSTMCell(
      ...     32,
      ...     gate_fn=optaxclip.clip_preactivation(nn.sigmoid, 10.0),
      ...     activation_fn=optaxclip.clip_preactivation(nn.tanh, 10.0),
      ... )
    """
    checks.function(activation, "activation")
    by_value.check_range(limit, "limit")
    static: Any = tuple(limit) if isinstance(limit, list) else limit
    try:
        return _preactivation(activation, static)
    except TypeError:  # a traced limit is not hashable
        return _preactivation.__wrapped__(activation, static)


@functools.lru_cache(typed=True)
def _preactivation(activation: Any, limit: Any) -> Any:
    @functools.wraps(activation)
    def clipped(x: jax.Array) -> jax.Array:
        return activation(clip_cotangent(x, limit))

    return clipped


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _tapped(x: Any, threshold: Any, stats: Any, clip: Any) -> Any:
    del threshold, stats, clip
    return x


def _tapped_fwd(x: Any, threshold: Any, stats: Any, clip: Any) -> tuple[Any, Any]:
    del clip
    return x, (threshold, stats)


def _tapped_bwd(clip: Any, residuals: Any, cotangent: Any) -> tuple[Any, Any, Any]:
    threshold, stats = residuals
    limits = jax.tree.map(jnp.asarray, threshold)  # which may be NumPy's here
    clipped, _ = clip(limits).update(cotangent, optax.EmptyState())
    seen = None if stats is None else seen_by(cotangent, clipped, stats)
    return clipped, jax.tree.map(jnp.zeros_like, threshold), seen


_tapped.defvjp(_tapped_fwd, _tapped_bwd)


def _check_arrays(x: Any) -> None:
    if callable(x) and jax.tree.structure(x) == jax.tree.structure(0):
        raise TypeError(
            f"Expected an array, or a tree of arrays, got {x!r}. For the input of a"
            " function take `clip_preactivation(activation, limit)`."
        )


def _as_float(limit: ArrayLike) -> jax.Array:
    return jnp.asarray(limit, jnp.promote_types(jnp.result_type(limit), jnp.float32))
