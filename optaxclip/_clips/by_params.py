"""Clips of updates by the norm of the weights that they change."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optaxclip import norms, thresholds
from optaxclip._arguments import checks
from optaxclip._engine.at_once import at_once
from optaxclip._engine.clip_by import clip_by
from optaxclip._trees import infinity


@at_once("max_ratio", "trust_coefficient")
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
    checks.number(max_ratio, "max_ratio")
    checks.number(trust_coefficient, "trust_coefficient")

    def capped(sizes: jax.Array, allowed: jax.Array) -> jax.Array:
        cap = jnp.maximum(jnp.asarray(max_ratio, sizes.dtype), 0)
        at_cap = cap * sizes <= allowed
        return jnp.where(at_cap, cap, allowed / jnp.where(at_cap, 1, sizes))

    def aimed_at(sizes: Any, params: Any) -> Any:
        del params
        share = jnp.asarray(trust_coefficient, sizes.dtype)
        return jnp.where(sizes == 0, infinity.full_like(sizes), share * sizes)

    sizes = thresholds.relative_to_params(1.0, norms.leaf_norms, eps=0.0)
    rule = optax.chain(sizes, optax.stateless(aimed_at))
    return clip_by(norms.leaf_norms, rule, capped)


@at_once("relative", "eps")
def clip_by_relative_step(
    relative: ArrayLike = 0.03, eps: ArrayLike = 1.0
) -> optax.GradientTransformationExtraArgs:
    r"""Bounds every step by a share of the norm of the parameters, less and less.

    .. math:: u_t \leftarrow u_t \cdot \min(1, c_t / \|u_t\|), \qquad
      c_t = \frac{\text{relative}}{\sqrt t} \max(\|\theta\|, \text{eps})

    The nearest to a clip of SGD without a threshold to tune. It bounds what a gradient
    adds to the parameters, so it comes after the learning rate and does not care if
    that is too large, and before momentum, which is a sum of such steps:
    ``optax.chain(optax.scale(-0.1), clip, optax.trace(0.9))``.

    Not for Adam, whose steps are as long as its learning rate says. Outliers hurt it,
    so clip its gradients: by :func:`thresholds.streaming_quantile`.

    Deviations: Adafactor's relative step size, from which this comes, is a step to take
    and no bound; it is one of each leaf, and the share is ``min(0.01, 1 / sqrt(t))``.

    Guarantees: those of :func:`clip_by_global_norm`. A step of zeros and one that is
    not finite is not counted.

    Args:
      relative: largest norm of the first step, as a share of that of the parameters.
        With 0.06 some runs of `benchmarks/studies/no_knob.py` diverge.
      eps: floor of the norm of the parameters, in their units: a model whose weights
        all start at zero moves by it. Most networks have a norm far above 1.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` with state :class:`ClipState`,
      which holds one number for the rule, the count. ``update`` needs ``params``.

    Raises:
      TypeError, ValueError: an argument that is not a number, is negative or NaN; no
        params, or params that don't match the updates.

    Examples:
      >>> clip = optaxclip.clip_by_relative_step(0.1)
      >>> params = jnp.array([6.0, 8.0])
      >>> state = clip.init(params)
      >>> for _ in range(4):
      ...     updates, state = clip.update(jnp.array([0.0, -4.0]), state, params)
      ...     print(f"{updates[1]:.3f}")
      -1.000
      -0.707
      -0.577
      -0.500

    References:
      Shazeer and Stern, `Adafactor: Adaptive Learning Rates with Sublinear Memory Cost
      <https://arxiv.org/abs/1804.04235>`_, 2018
    """
    checks.number(relative, "relative")
    rule = optax.chain(
        thresholds.relative_to_params(relative, norms.global_norm, eps),
        optax.scale_by_schedule(lambda count: jnp.asarray(count + 1, float) ** -0.5),
    )
    return clip_by(norms.global_norm, rule)


@at_once("clipping", "eps")
def adaptive_grad_clip(
    clipping: ArrayLike,
    eps: ArrayLike = 1e-3,
    axis: norms.Axes = None,
    exclude: Sequence[str] = (),
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales every unit to at most ``clipping`` times the norm of its parameters.

    With :math:`u_i` and :math:`\theta_i` the update and the parameters of an output
    neuron,

    .. math:: u_i \leftarrow u_i \cdot
      \min(1, \text{clipping} \cdot \max(\|\theta_i\|, \text{eps}) / \|u_i\|).

    A drop-in for ``optax.adaptive_grad_clip``, without its floor of 1e-6 under the norm
    of the update, which makes smaller updates too small. The paper leaves the last
    linear layer unclipped: ``exclude=("head",)``.

    Guarantees: those of :func:`clip_by_global_norm`, for each unit by itself. Dtypes of
    the updates are kept, whatever those of the params.

    Args:
      clipping: largest ratio of update norm to parameter norm.
      eps: floor of the parameter norm, so that units at zero can grow.
      axis: the axes within a unit, static, or a mapping from path patterns to axes;
        None goes by rank, see :func:`optaxclip.norms.unit_norms`. Kernels of layers
        that are stacked for a scan, ``(layers, in, out)``, need 1: by rank a unit would
        go over the layers.
      exclude: path patterns of the leaves that are never clipped.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` with state :class:`ClipState`,
      one entry per leaf, of the unit that was clipped hardest. ``update`` needs
      ``params``.

    Raises:
      TypeError, ValueError: see :func:`clip_by`; no params; a rank above 5 without
        axes.

    Examples:
      >>> clip = optaxclip.adaptive_grad_clip(0.1)
      >>> params = {"w": jnp.array([[3.0, 0.0], [4.0, 1.0]])}  # two inputs, two outputs
      >>> grads = {"w": jnp.array([[0.0, 0.0], [2.0, 0.05]])}
      >>> updates, _ = clip.update(grads, clip.init(params), params)
      >>> print(updates["w"])
      [[0.   0.  ]
       [0.5  0.05]]

    References:
      Brock et al., `High-Performance Large-Scale Image Recognition Without
      Normalization <https://arxiv.org/abs/2102.06171>`_, 2021
    """
    checks.number(clipping, "clipping")
    checks.not_off(clipping)
    norm = functools.partial(norms.unit_norms, axis=axis)
    rule = thresholds.relative_to_params(clipping, norm, eps)
    if not isinstance(exclude, str | list | tuple):
        raise TypeError(
            f"Expected `exclude` to be a path pattern or several, got {exclude!r}."
        )
    never = dict.fromkeys([exclude] if isinstance(exclude, str) else exclude, jnp.inf)
    return clip_by(norm, {"**": rule, **never} if never else rule)
