"""A threshold for the gradients of examples that moves to a quantile of their norms."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optaxclip._arguments import checks
from optaxclip._per_example.grad import PerExample


def adapt_max_norm(
    max_norm: ArrayLike,
    seen: PerExample,
    *,
    quantile: ArrayLike = 0.5,
    learning_rate: ArrayLike = 0.2,
    noise: ArrayLike = 0.0,
    key: jax.Array | None = None,
    batch_size: ArrayLike | None = None,
) -> jax.Array:
    r"""Moves a threshold towards a quantile of the norms of examples.

    .. math:: C \leftarrow C \exp\left(-\eta(\tilde b - \gamma)\right), \quad
      \tilde b = \frac1n \left(\sum_i \left(\mathbf 1[\|g_i\| \le C] - \frac12\right)
      + \mathcal N(0, \sigma_b^2)\right) + \frac12

    with :math:`\tilde b` clamped to [0, 1]. An example that is not finite counts as
    larger than any threshold.

    Args:
      max_norm: threshold C of this step, with a global norm.
      seen: what :func:`per_example_clipped_grad` returned beside the gradients.
      quantile: share :math:`\gamma` of the examples that shall not be clipped.
      learning_rate: :math:`\eta`.
      noise: standard deviation :math:`\sigma_b` of the noise on the count, which is a
        query about the data as well; the paper uses a twentieth of the batch. For a
        total noise multiplier z, below ``2 * noise``, noise the gradients with a
        multiplier of ``(z**-2 - (2 * noise) ** -2) ** -0.5``.
      key: random key for that noise.
      batch_size: n; None counts the examples, which private training must not do.

    Returns:
      The threshold of the next step, a scalar.

    Raises:
      ValueError: a quantile outside [0, 1], negative numbers, or noise without a key.

    Examples:
      >>> def loss_fn(params, x):
      ...     return params * x
      >>> @jax.jit
      ... def step(params, max_norm, x):
      ...     grad_fn = optaxclip.per_example_clipped_grad(loss_fn, max_norm)
      ...     grads, seen = grad_fn(params, x)
      ...     return params - 0.1 * grads, optaxclip.adapt_max_norm(max_norm, seen)
      >>> params, max_norm = jnp.array(0.0), 0.1
      >>> for _ in range(200):
      ...     params, max_norm = step(params, max_norm, jnp.arange(1.0, 10.0))
      >>> print(f"{max_norm:.1f}")  # the median
      5.0

    References:
      Andrew et al., `Differentially Private Learning with Adaptive Clipping
      <https://arxiv.org/abs/1905.03871>`_, 2019
    """
    if not isinstance(seen, PerExample):
        raise TypeError(
            "Expected the statistics that `per_example_clipped_grad` returns beside the"
            f" gradients, got {type(seen).__name__}."
        )
    numbers = {"max_norm": max_norm, "quantile": quantile, "noise": noise}
    for what, value in (numbers | {"learning_rate": learning_rate}).items():
        checks.number(value, what)
    if isinstance(quantile, checks.STATIC) and quantile > 1:
        raise ValueError(f"Expected 0 <= quantile <= 1, got {quantile}.")
    is_silent = isinstance(noise, checks.STATIC) and noise == 0
    if key is None and not is_silent:
        raise ValueError(
            f"Expected a random key for noise={noise}, got none. Pass `key=`, a new one"
            " at every step."
        )
    dtype = seen.norms.dtype
    outside = (seen.clipped_count + seen.nonfinite_count).astype(dtype)
    count = seen.example_count.astype(dtype)
    signs = count / 2 - outside
    if key is not None:
        signs += jnp.asarray(noise, dtype) * jax.random.normal(key, (), dtype)
    size = jnp.maximum(count, 1) if batch_size is None else jnp.asarray(batch_size)
    inside = jnp.clip(signs / size.astype(dtype) + 0.5, 0, 1)
    step = jnp.asarray(learning_rate, dtype) * (inside - jnp.asarray(quantile, dtype))
    return jnp.asarray(max_norm, dtype) * jnp.exp(-step)
