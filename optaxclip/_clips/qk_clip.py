"""A clip of weights instead of updates: those that make the logits of attention."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from optaxclip._arguments import checks
from optaxclip._engine import multiply
from optaxclip._measure import units as _units
from optaxclip._trees import leaves as _leaves


def qk_clip(
    query: Any,
    key: Any,
    max_logits: ArrayLike,
    threshold: ArrayLike = 100.0,
    alpha: ArrayLike = 0.5,
) -> tuple[Any, Any]:
    r"""Rescales the weights of attention heads whose logits have grown too large.

    With :math:`S_h` the largest logit of head h that a step has seen,

    .. math:: W_q^h \leftarrow W_q^h \eta_h^{\alpha}, \quad
      W_k^h \leftarrow W_k^h \eta_h^{1 - \alpha}, \quad
      \eta_h = \min(1, \text{threshold} / S_h),

    after which the same inputs give logits of at most ``threshold``. The clip of
    weights in MuonClip: call it on the new params after every step; the state of the
    optimizer stays as it is. To keep the bound, pass biases as well, in one tree with
    the kernels.

    Where query heads share a key (grouped-query attention), the key is scaled for the
    one with the largest logit, and every query by its own; Megatron scales all queries
    of a group alike, those within the threshold too. For multi-head latent attention
    call it for the parts without positions, and with ``key=None, alpha=1.0`` for the
    rotary part of the query; the rotary key, which heads share, stays.

    Guarantees:
      * Structure, shapes and dtypes are kept; what is scaled is rounded once.
      * Heads within the threshold come back bit for bit.
      * So do heads whose logit is NaN or infinite: by how much they are too large is
        not known, and a factor of 0 would end their training.

    Args:
      query: weights of the queries, an array or a tree of arrays with the heads on axis
        -2, as Flax has them: kernels ``(features, heads, head_dim)``, biases
        ``(heads, head_dim)``.
      key: weights of the keys, of as many heads or a divisor of them, or None.
      max_logits: largest logit of every query head, as the softmax gets it, over the
        whole batch (``jax.lax.pmax`` over devices that split it), shape ``(heads,)``.
        Further axes in front, of stacked layers, are the first axes of the weights too.
      threshold: largest logit allowed.
      alpha: share of the factor that goes to the query, between 0 and 1.

    Returns:
      The new ``(query, key)``.

    Raises:
      TypeError, ValueError: a threshold or alpha out of range, logits without an axis,
        weights whose heads don't fit the logits.

    Examples:
      >>> query = {"kernel": jnp.ones((1, 2, 1)), "bias": jnp.ones((2, 1))}
      >>> key = {"kernel": jnp.ones((1, 2, 1))}
      >>> query, key = optaxclip.qk_clip(query, key, jnp.array([50.0, 400.0]))
      >>> print(query["kernel"].ravel(), query["bias"].ravel(), key["kernel"].ravel())
      [1.  0.5] [1.  0.5] [1.  0.5]

    References:
      Kimi Team, `Kimi K2: Open Agentic Intelligence
      <https://arxiv.org/abs/2507.20534>`_, 2025
    """
    checks.number(threshold, "threshold")
    checks.number(alpha, "alpha")
    if isinstance(alpha, checks.STATIC) and alpha > 1:
        raise ValueError(f"Expected 0 <= alpha <= 1, got {alpha}.")
    if np.ndim(max_logits) == 0:
        raise ValueError(
            "Expected `max_logits` with one logit per head, shape (heads,), got an"
            " array of shape ()."
        )
    logits = jnp.asarray(max_logits)
    return (
        _scaled_heads(query, logits, threshold, alpha, "query"),
        _scaled_heads(key, logits, threshold, 1 - alpha, "key"),
    )


def _scaled_heads(
    tree: Any, logits: jax.Array, threshold: ArrayLike, power: Any, what: str
) -> Any:
    leaves = _leaves.flatten(tree)
    *lead, count = logits.shape
    logits = logits.astype(leaves.dtype)
    limit = jnp.maximum(jnp.asarray(threshold, leaves.dtype), 0)
    is_above = jnp.isfinite(logits) & (logits > limit)
    etas = jnp.where(is_above, limit / jnp.where(is_above, logits, 1), 1)
    scaled = []
    for leaf, path in zip(leaves.measured(), leaves.paths(), strict=True):
        own = leaf.shape[-2] if leaf.ndim > 1 else 0
        fits = own == count or (what == "key" and own and count % own == 0)
        if not fits or leaf.shape[: len(lead)] != tuple(lead):
            number = f"{count}" if what == "query" else f"a divisor of {count}"
            raise ValueError(
                f"Expected {number} heads on axis -2 of the {what} at {path!r}, after"
                f" the axes {tuple(lead)} of layers, got shape {leaf.shape}."
            )
        eta = jnp.min(etas.reshape(*lead, own, count // own), axis=-1)
        middle = (1,) * (leaf.ndim - len(lead) - 2)
        scaled.append((eta**power).reshape(*lead, *middle, own, 1))
    return _multiplied(leaves, scaled)


def _multiplied(leaves: _leaves.Leaves, scales: list[jax.Array]) -> Any:
    scopes = tuple((i,) for i in range(len(scales)))
    packed = _units.joined(scales, scopes)
    ones = jax.tree.map(jnp.ones_like, packed)
    return multiply.multiplied(leaves, scopes, ones, packed)
