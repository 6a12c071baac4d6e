"""What to do about a norm: the number that the updates are multiplied by.

A factor is a function of two arrays, the norms and the largest norms allowed; it
depends on their ratio alone, and where it is 1 the updates come back bit for bit. Norms
of 0, and what is infinite or NaN, are the engine's business.
"""

import jax
import jax.numpy as jnp


def rescale(norms: jax.Array, max_norms: jax.Array) -> jax.Array:
    """Clips: ``min(1, max_norm / norm)``.

    Examples:
      >>> norms, max_norms = jnp.array([2.0, 0.5]), jnp.array([1.0, 1.0])
      >>> print(optaxclip.factors.rescale(norms, max_norms))
      [0.5 1. ]
    """
    fits = norms <= max_norms
    return jnp.where(fits, 1, max_norms / jnp.where(fits, 1, norms))


def normalize(norms: jax.Array, max_norms: jax.Array) -> jax.Array:
    """Gives every scope the norm allowed, smaller ones too: ``max_norm / norm``.

    Examples:
      >>> norms, max_norms = jnp.array([2.0, 0.5]), jnp.array([1.0, 1.0])
      >>> print(optaxclip.factors.normalize(norms, max_norms))
      [0.5 2. ]
    """
    return max_norms / norms


def drop(norms: jax.Array, max_norms: jax.Array) -> jax.Array:
    """Zeroes what is too large: 1 if ``norm <= max_norm``, else 0.

    Examples:
      >>> norms, max_norms = jnp.array([2.0, 0.5]), jnp.array([1.0, 1.0])
      >>> print(optaxclip.factors.drop(norms, max_norms))
      [0. 1.]
    """
    return jnp.where(norms > max_norms, 0, jnp.ones_like(norms))


def soften(norms: jax.Array, max_norms: jax.Array) -> jax.Array:
    """Clips without a kink: ``max_norm / (max_norm + norm)``, so norms stay below it.

    Examples:
      >>> norms, max_norms = jnp.array([3.0, 1.0]), jnp.array([1.0, 1.0])
      >>> print(optaxclip.factors.soften(norms, max_norms))
      [0.25 0.5 ]
    """
    return max_norms / (max_norms + norms)


def auto_s(norms: jax.Array, max_norms: jax.Array) -> jax.Array:
    """Normalizes, small norms less: ``max_norm / (norm + 0.01 * max_norm)``.

    AUTO-S of private training, which drops the threshold from the things to tune: with
    ``max_norm=1`` it is the paper's ``1 / (norm + 0.01)``, and another ``max_norm``
    only scales all updates. Norms stay below ``max_norm``.

    Examples:
      >>> norms, max_norms = jnp.array([0.99, 0.01]), jnp.array([1.0, 1.0])
      >>> print(optaxclip.factors.auto_s(norms, max_norms))
      [ 1. 50.]

    References:
      Bu et al., `Automatic Clipping: Differentially Private Deep Learning Made Easier
      and Stronger <https://arxiv.org/abs/2206.07136>`_, 2022
    """
    return max_norms / (norms + 0.01 * max_norms)
