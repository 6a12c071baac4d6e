"""Published rules that learn a threshold for each leaf, or each group of leaves."""

import optax
from jax.typing import ArrayLike

from optaxclip import factors, norms, thresholds
from optaxclip._arguments import checks
from optaxclip._engine.clip_by import clip_by


def adagc(
    relative: ArrayLike = 1.05,
    decay: ArrayLike = 0.98,
    warmup_steps: ArrayLike = 100,
    max_norm: ArrayLike = 1.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips every leaf to a little more than the mean of its own norms so far.

    .. math:: u_l \leftarrow u_l \cdot
      \min(1, \text{relative} \cdot \gamma_l / \|u_l\|), \qquad
      \gamma_l \leftarrow \text{decay} \, \gamma_l + (1 - \text{decay}) \|u_l\|

    The mean takes the norms after the clip, so no threshold grows by more than 0.1 % a
    step. In the warm-up the global norm is clipped to ``max_norm``, and the mean starts
    at the smallest norm that this left of the leaf.

    Deviations: a leaf whose first norms are zero, such as LoRA's first matrix, would be
    frozen for ever by the paper's rule: here its history starts with its first norm
    above zero. A leaf that is not finite does not count in the warm-up's global norm.

    Guarantees: those of :func:`clip_by_leaf_norm`.

    Args:
      relative: allowed norm over mean norm.
      decay: of the mean, at least 0 and below 1.
      warmup_steps: steps until the mean is used.
      max_norm: largest global norm in the warm-up.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` with state :class:`ClipState`,
      one entry per leaf, which holds two numbers per leaf for the history.

    Raises:
      TypeError: an argument is not a number.
      ValueError: an argument is out of range.

    Examples:
      >>> clip = optaxclip.adagc(warmup_steps=2)
      >>> state = clip.init(jnp.zeros(1))
      >>> for grad in 0.5, 0.4, 3.0:
      ...     updates, state = clip.update(jnp.array([grad]), state)
      ...     print(f"{updates[0]:.3f}")
      0.500
      0.400
      0.420

    References:
      Wang et al., `AdaGC: Improving Training Stability for LLM Pretraining
      <https://arxiv.org/abs/2502.11034>`_, 2025
    """
    checks.number(relative, "relative")
    rule = thresholds.relative_to_mean(relative, decay, warmup_steps, max_norm)
    return clip_by(norms.leaf_norms, rule)


def aggc(
    high: ArrayLike = 1.5,
    low: ArrayLike = 0.0,
    decay: ArrayLike = 0.98,
    labels: norms.Labels = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps the norm of every group in a band around its mean so far.

    .. math:: u_g \leftarrow u_g \cdot
      \frac{\min(\max(\|u_g\|, \text{low} \cdot \mu_g), \text{high} \cdot \mu_g)}
      {\|u_g\|}

    The mean is that of the norms after this, weighted by ``decay ** age``. The paper's
    groups are modules of one function: ``labels={"query": "q", "key": "k", ...}``.

    Deviations: the paper's mean starts at zero without a correction, so its second step
    is clamped to 3 % of the first; here the mean is Adam's, and the first step passes.
    The paper moves both bounds late in training: start a new one there.

    Guarantees: those of :func:`clip_by_group_norm`. Within the band updates come back
    bit for bit; a norm of zero is not raised.

    Args:
      high: largest norm over the mean norm, at least 1.
      low: smallest norm over the mean norm, at most 1; smaller ones are raised.
      decay: of the weights with age, at least 0 and below 1.
      labels: which leaves are a group, see :func:`clip_by_group_norm`.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` with state :class:`ClipState`,
      one entry per group, which holds two numbers per group for the history.

    Raises:
      TypeError, ValueError: an argument is not a number or out of range; see also
        :func:`clip_by_group_norm`.

    Examples:
      >>> clip = optaxclip.aggc(2.0, 0.5)
      >>> state = clip.init(jnp.zeros(1))
      >>> for grad in 1.0, 100.0, 0.1:
      ...     updates, state = clip.update(jnp.array([grad]), state)
      ...     print(updates.round(3))
      [1.]
      [2.]
      [0.753]

    References:
      Li et al., `AGGC: Adaptive Group Gradient Clipping for Stabilizing LLM Training
      <https://arxiv.org/abs/2601.11864>`_, 2026
    """
    band = thresholds.within_band(low, high, decay)
    return clip_by(norms.group_norms(labels), band, factors.normalize)
