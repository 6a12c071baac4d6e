"""The clips people ask for by name, most of them one line on the engine."""

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optaxclip import norms
from optaxclip._arguments import checks, mistakes
from optaxclip._engine.at_once import at_once
from optaxclip._engine.clip_by import clip_by
from optaxclip._engine.limits import Threshold


@mistakes.at_most(1, mistakes.ONCE)
def clip_by_global_norm(max_norm: Threshold) -> optax.GradientTransformationExtraArgs:
    r"""Rescales all updates together so that their global norm is at most ``max_norm``.

    With :math:`\|u\|` the L2 norm of all leaves taken as one vector,

    .. math:: u \leftarrow u \cdot \min(1, \text{max\_norm} / \|u\|).

    The direction is kept, and updates already small enough come back bit for bit. A
    drop-in for ``optax.clip_by_global_norm``; Keras calls it ``global_clipnorm``,
    PyTorch ``clip_grad_norm_``.

    Guarantees:
      * Structure, shapes and dtypes of the updates are kept.
      * The result's norm is at most ``max_norm``, up to one rounding to the leaf's
        dtype.
      * Finite updates have a finite norm, whatever their dtype and magnitude.
      * A NaN or an infinity in any leaf makes all of them NaN: nothing is hidden.

    Args:
      max_norm: largest norm allowed, in the units of the updates at this point of the
        chain; any threshold of :func:`clip_by`.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` with state :class:`ClipState`.

    Raises:
      TypeError, ValueError: see :func:`clip_by`.

    Examples:
      >>> clip = optaxclip.clip_by_global_norm(1.0)
      >>> grads = {"w": jnp.array([0.0, 3.0]), "b": jnp.array([4.0])}  # norm 5
      >>> updates, state = clip.update(grads, clip.init(grads))
      >>> print(updates["w"], updates["b"], state.norms)
      [0.  0.6] [0.8] 5.0

    References:
      Pascanu et al., `On the difficulty of training recurrent neural networks
      <https://arxiv.org/abs/1211.5063>`_, 2013
    """
    checks.threshold(max_norm, "max_norm")
    return clip_by(norms.global_norm, max_norm)


@mistakes.at_most(1, mistakes.ONCE)
def clip_by_leaf_norm(max_norm: Threshold) -> optax.GradientTransformationExtraArgs:
    r"""Rescales every leaf so that its own L2 norm is at most ``max_norm``.

    .. math:: u_l \leftarrow u_l \cdot \min(1, \text{max\_norm} / \|u_l\|)

    Each leaf keeps its direction, the updates as a whole do not. This is ``clipnorm``
    of Keras 3; that of Keras before 2.4, as in the old tutorials, is the global norm.

    Guarantees: those of :func:`clip_by_global_norm`, for each leaf by itself.

    Args:
      max_norm: largest norm of a leaf; any threshold of :func:`clip_by`, such as
        ``{"embed": 10.0, "**": 1.0}``.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` with state :class:`ClipState`,
      one entry per leaf.

    Raises:
      TypeError, ValueError: see :func:`clip_by`.

    Examples:
      >>> clip = optaxclip.clip_by_leaf_norm(1.0)
      >>> grads = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([0.5])}
      >>> updates, _ = clip.update(grads, clip.init(grads))
      >>> print(updates["w"], updates["b"])
      [0.6 0.8] [0.5]
    """
    checks.threshold(max_norm, "max_norm")
    return clip_by(norms.leaf_norms, max_norm)


@mistakes.at_most(2, mistakes.ONCE)
@at_once("max_norm")
def clip_by_group_norm(
    max_norm: Threshold, labels: norms.Labels = None
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales every group of leaves so that its L2 norm is at most ``max_norm``.

    .. math:: u_g \leftarrow u_g \cdot \min(1, \text{max\_norm} / \|u_g\|)

    Guarantees: those of :func:`clip_by_global_norm`, for each group by itself.

    Args:
      max_norm: largest norm of a group; any threshold of :func:`clip_by`. A mapping has
        to give all leaves of a group the same entry.
      labels: which leaves are a group: None, a layer, that is the leaves under one
        module path, also one of flat names, ``layers.3.weight``; or a mapping from path
        patterns to labels; or a function from updates to a tree of labels (under
        ``optax.inject_hyperparams`` name it in ``static_args``).

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` with state :class:`ClipState`,
      one entry per group, ordered by their first leaves.

    Raises:
      TypeError, ValueError: see :func:`clip_by`; a leaf without a label, a pattern that
        matches nothing.

    Examples:
      >>> clip = optaxclip.clip_by_group_norm(1.0)
      >>> grads = {
      ...     "dense": {"kernel": jnp.array([3.0]), "bias": jnp.array([4.0])},
      ...     "head": {"kernel": jnp.array([0.5])},
      ... }
      >>> updates, state = clip.update(grads, clip.init(grads))
      >>> print(state.norms, updates["dense"]["kernel"])
      [5.  0.5] [0.6]
    """
    checks.threshold(max_norm, "max_norm")
    return clip_by(norms.group_norms(labels), max_norm)


@mistakes.at_most(1, mistakes.ONCE)
def clip_by_block_rms(threshold: Threshold) -> optax.GradientTransformationExtraArgs:
    r"""Rescales every leaf so that its root mean square is at most ``threshold``.

    .. math:: u_l \leftarrow u_l / \max(1, \text{rms}(u_l) / \text{threshold})

    The update clipping of Adafactor, to be put after the preconditioner and before the
    learning rate. A drop-in for ``optax.clip_by_block_rms``.

    Guarantees: those of :func:`clip_by_global_norm`, for the rms of each leaf.

    Args:
      threshold: largest root mean square of a leaf; any threshold of :func:`clip_by`.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` with state :class:`ClipState`,
      one entry per leaf; its norms are root mean squares.

    Raises:
      TypeError, ValueError: see :func:`clip_by`.

    Examples:
      >>> clip = optaxclip.clip_by_block_rms(1.0)
      >>> updates, _ = clip.update({"w": jnp.array([1.0, -7.0])}, None)  # rms 5
      >>> print(updates["w"])
      [ 0.2 -1.4]

    References:
      Shazeer and Stern, `Adafactor: Adaptive Learning Rates with Sublinear Memory Cost
      <https://arxiv.org/abs/1804.04235>`_, 2018
    """
    checks.threshold(threshold, "threshold")
    return clip_by(norms.leaf_rms, threshold)


@at_once("scale_factor", "eps")
def normalize_by_update_norm(
    scale_factor: ArrayLike = 1.0, eps: ArrayLike = 1e-6
) -> optax.GradientTransformationExtraArgs:
    r"""Gives the updates one global norm, however large or small they are.

    .. math:: u \leftarrow u \cdot \text{scale\_factor} / (\|u\| + \text{eps})

    The textbooks' "gradient scaling". A drop-in for ``optax.normalize_by_update_norm``.

    Guarantees: those of :func:`clip_by`; zeros stay zeros, also with ``eps=0``.

    Args:
      scale_factor: norm of the result; a negative one turns the updates around.
      eps: added to the norm, in the units of the updates.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` with state :class:`ClipState`,
      whose ``max_norms`` is 1: what is allowed before the scale factor.

    Raises:
      TypeError, ValueError: an argument that is not a number, a negative or NaN
        ``eps``.

    Examples:
      >>> normalize = optaxclip.normalize_by_update_norm(2.0)
      >>> updates, _ = normalize.update({"w": jnp.array([0.3, 0.4])}, None)
      >>> print(updates["w"].round(3))
      [1.2 1.6]
    """
    checks.number(scale_factor, "scale_factor", minimum=-jnp.inf)
    checks.number(eps, "eps")

    def factor(norm: jax.Array, one: jax.Array) -> jax.Array:
        scale, floor = (
            jnp.asarray(scale_factor, norm.dtype),
            jnp.asarray(eps, norm.dtype),
        )
        return scale * one / (norm + floor * one)

    return clip_by(norms.global_norm, 1.0, factor)
