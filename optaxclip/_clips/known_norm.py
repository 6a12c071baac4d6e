"""What if the norm is known already? The second half of a clip, as a function."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optaxclip import factors
from optaxclip._arguments import checks
from optaxclip._engine.at_once import at_once
from optaxclip._engine.multiply import multiplied, scope_factors
from optaxclip._measure import own_norms
from optaxclip._trees import leaves as _leaves


def clip_with_norm(
    updates: optax.Updates, norm: Any, max_norm: ArrayLike
) -> optax.Updates:
    r"""Rescales updates whose norm is known already: the second half of a clip.

    .. math:: u \leftarrow u \cdot \min(1, \text{max\_norm} / \text{norm})

    For those who need the norm first, to log it or to combine it with that of other
    devices or stages: ``norm = optaxclip.global_norm(updates)``.

    Args:
      updates: tree of arrays.
      norm: scalar, or a tree prefix of the updates as a function of
        :mod:`optaxclip.norms` returns it. An infinite norm makes its scope NaN.
      max_norm: largest norm allowed, a number.

    Returns:
      The updates, rescaled, with their structure, shapes and dtypes.

    Raises:
      TypeError, ValueError: a max_norm that is not a number, is negative or NaN; norms
        that are not a tree prefix of the updates.

    Examples:
      >>> updates = {"w": jnp.array([3.0, 4.0])}
      >>> norm = optaxclip.global_norm(updates)
      >>> print(optaxclip.clip_with_norm(updates, norm, 1.0)["w"])
      [0.6 0.8]
    """
    return _by_its_state(max_norm).update(updates, norm)[0]


@at_once("max_norm")
def _by_its_state(max_norm: ArrayLike) -> optax.GradientTransformationExtraArgs:
    """Returns a clip whose state is the norm."""
    checks.number(max_norm, "max_norm")
    checks.not_off(max_norm)

    def update_fn(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        leaves = _leaves.flatten(updates)
        measured = own_norms.given(state, leaves)
        limit = jnp.maximum(jnp.asarray(max_norm, leaves.dtype), 0)
        every = jax.tree.map(lambda x: jnp.broadcast_to(limit, x.shape), measured.norms)
        scales, rests = scope_factors(factors.rescale, measured, every)
        return multiplied(leaves, measured.scopes, scales, rests), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)
