"""Published rules that learn a threshold for the global norm from its history.

Each is a norm, a threshold and a factor, under the name that people search for.
"""

import optax
from jax.typing import ArrayLike

from optaxclip import norms, thresholds
from optaxclip._engine.clip_by import clip_by


def autoclip(
    percentile: ArrayLike = 10.0, window: int = 10_000
) -> optax.GradientTransformationExtraArgs:
    r"""Clips the global norm to a percentile of its own history.

    .. math:: u \leftarrow u \cdot \min(1, c_t / \|u\|), \qquad
      c_t = \text{percentile of } \|u_{t - \text{window} + 1}\|, \dots, \|u_t\|

    The norms enter before the clip, this step's included: the first step is never
    clipped, with ``percentile=100`` none is. With the paper's 10 most steps are: this
    is close to a gradient of constant norm, so tune the learning rate with it.

    Deviations: the paper keeps all norms, its TensorFlow code the last 10 000; that
    code clips each leaf to the global percentile, this one all together. One NaN stays
    in the paper's history for ever; here it never enters, and a zero does not either.

    Guarantees: those of :func:`clip_by_global_norm`.

    Args:
      percentile: from 0 to 100.
      window: norms remembered, static.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` with state :class:`ClipState`,
      which holds ``2 * window + 1`` numbers for the history.

    Raises:
      TypeError: ``percentile`` is not a number.
      ValueError: ``percentile`` is not between 0 and 100, or ``window`` below 2.

    Examples:
      >>> clip = optaxclip.autoclip(50.0)
      >>> state = clip.init(jnp.zeros(1))
      >>> for grad in 1.0, 2.0, 9.0:
      ...     updates, state = clip.update(jnp.array([grad]), state)
      ...     print(updates)
      [1.]
      [1.5]
      [2.]

    References:
      Seetharaman et al., `AutoClip: Adaptive Gradient Clipping for Source Separation
      Networks <https://arxiv.org/abs/2007.14469>`_, 2020
    """
    return clip_by(norms.global_norm, thresholds.window_percentile(percentile, window))


def zclip(
    z_threshold: ArrayLike = 2.5,
    decay: ArrayLike = 0.97,
    warmup_steps: ArrayLike = 25,
    max_norm: ArrayLike = 1.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips spikes of the global norm, the higher the closer to the mean norm.

    Where :math:`z = (\|u\| - \mu) / \sigma` is above its threshold, u is rescaled to

    .. math:: \mu + \frac{\text{z\_threshold}^2}{z} \sigma,

    and never more than ``max_norm`` is left: with the paper's default of 1 this is a
    clip at 1 *and* ZClip. Give ``jnp.inf`` for ZClip alone. Other norms, such as that
    of each leaf: ``clip_by(norms.leaf_norms, thresholds.z_score())``.

    Deviations: the paper's code adds 1e-6 to the deviation and to the norm; where a NaN
    comes there, it clips no spike ever after.

    Guarantees: those of :func:`clip_by_global_norm`.

    Args:
      z_threshold: standard deviations above the mean from which on it clips.
      decay: of mean and variance, at least 0 and below 1.
      warmup_steps: norms from which it takes its first mean and deviation, at least 2.
      max_norm: largest norm allowed at every step.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` with state :class:`ClipState`,
      which holds three numbers for the history.

    Raises:
      TypeError: an argument is not a number.
      ValueError: an argument is out of range.

    Examples:
      >>> clip = optaxclip.zclip(2.0, warmup_steps=2, max_norm=jnp.inf)
      >>> state = clip.init(jnp.zeros(1))
      >>> for grad in 1.0, 3.0, 100.0:
      ...     updates, state = clip.update(jnp.array([grad]), state)
      ...     print(f"{updates[0]:.3f}")
      1.000
      3.000
      2.041

    References:
      Kumar et al., `ZClip: Adaptive Spike Mitigation for LLM Pre-Training
      <https://arxiv.org/abs/2504.02507>`_, 2025
    """
    rule = thresholds.z_score(z_threshold, decay, warmup_steps, max_norm)
    return clip_by(norms.global_norm, rule)


def k_sigma_clip(
    num_std: ArrayLike = 3.0,
    *,
    decay: ArrayLike | None = None,
    window: int | None = None,
    warmup_steps: ArrayLike = 64,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips the global norm to some deviations above the mean of those before it.

    .. math:: u \leftarrow u \cdot \min\left(1,
      \frac{\mu + \text{num\_std} \cdot \sigma}{\|u\|}\right)

    With a window (128 norms, if nothing is said) the norms enter as they are, as in
    Levanter, and a lasting shift is learnt within a window. With a decay they enter
    after the clip, and a shift is learnt gradually.

    Deviations: Open-Sora Plan, whose form the decay is, keeps clipped steps out of its
    history, and so never learns a shift upwards; Levanter adds a floor of 1e-6.

    Guarantees: those of :func:`clip_by_global_norm`.

    Args:
      num_std: standard deviations allowed above the mean.
      decay: of the weights with age, at least 0 and below 1.
      window: norms remembered, at least 2; static. At most one of the two is given.
      warmup_steps: norms to be seen before anything is clipped.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` with state :class:`ClipState`,
      which holds four numbers, or ``window + 2``, for the history.

    Raises:
      TypeError: ``num_std`` is not a number.
      ValueError: both ``decay`` and ``window``, or an argument out of range.

    Examples:
      >>> clip = optaxclip.k_sigma_clip(2.0, window=16, warmup_steps=2)
      >>> state = clip.init(jnp.zeros(1))
      >>> for grad in 1.0, 3.0, 100.0:
      ...     updates, state = clip.update(jnp.array([grad]), state)
      ...     print(updates)
      [1.]
      [3.]
      [4.]

    References:
      Open-Sora Plan, version 1.5, 2025; Levanter, ``clip_update_norm``
    """
    if decay is None and window is None:
        window = 128
    rule = thresholds.lagged(
        thresholds.mean_plus_std(
            num_std, decay=decay, window=window, warmup_steps=warmup_steps
        )
    )
    return clip_by(
        norms.global_norm, rule if decay is None else thresholds.clipped_history(rule)
    )
