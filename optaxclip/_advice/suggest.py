"""Which threshold do I type?"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax
from jax.core import Tracer
from jax.typing import ArrayLike

from optaxclip import norms
from optaxclip._advice import probe
from optaxclip._arguments import checks
from optaxclip._trees import leaves as _leaves
from optaxclip._trees.leaves import Leaves

FLOOR = 1.0  # of the norm of the params


def suggest_max_norm(
    optimizer: optax.GradientTransformation,
    params: Any,
    history: Mapping[str, Any] | None = None,
    share: ArrayLike = 0.03,
) -> float:
    r"""Computes a threshold for :func:`clip_by_global_norm`, before the first step.

    .. math:: \text{max\_norm} = \text{share} \cdot \max(\|\theta\|, 1) / r

    with the reach :math:`r` of the optimizer: how far it moves the parameters in a step
    of a long, fully clipped stretch, for each unit of the gradient's norm. That is
    learning rate / (1 - momentum) for SGD. So a step is a share of the weights at most,
    however large the gradients are. A safe start, not a tuned threshold: sweep around
    it.

    Args:
      optimizer: any.
      params: where the run begins.
      history: of a run, needed where steps don't depend on the gradient's size.
      share: of the norm of the parameters, which the longest step may move them by.

    Returns:
      The threshold, in units of the gradients.

    Raises:
      TypeError, ValueError: an argument that can't be meant; an optimizer that moves
        nothing; one whose steps don't depend on the gradient's size, without history.

    Examples:
      >>> params = {"w": jnp.array([6.0, 8.0])}
      >>> print(f"{optaxclip.suggest_max_norm(optax.sgd(0.1), params):.3f}")
      3.000
    """
    if isinstance(optimizer, optax.MultiSteps):
        optimizer = optimizer.gradient_transformation()
    tx = checks.transformation(optimizer, "optimizer", "optax.sgd(0.1)")
    checks.number(share, "share", remedy="")
    leaves = _counted(params)
    seen = None if history is None else _median(history)
    found = _reach(tx, leaves)
    if not found.lengths.max() > 0:
        raise ValueError(
            "Expected an optimizer that moves the params, got one whose updates are 0"
            f" for gradients of norms {probe.SIZES[1]} and {probe.SIZES[2]}, at each"
            " count that was tried. Is its learning rate 0, or are all leaves frozen?"
        )
    if found.exponent > 0.5:
        return float(share * max(_size(params, found), FLOOR) / found.lengths.max())
    if seen is None:
        raise ValueError(
            "Expected an optimizer whose steps are as long as its gradients are large,"
            " or a history, got one for which twice the gradient makes a step"
            f" {2**found.exponent:.2g} times as long, as with Adam, and no history."
            " No threshold follows from such steps. Record a run without a clip and"
            " pass its norms, `history={'norm': norms}`; or have their median learnt as"
            " it goes: `clip_by_global_norm(thresholds.streaming_quantile())`."
        )
    return seen


def _reach(tx: optax.GradientTransformationExtraArgs, leaves: Leaves) -> probe.Reach:
    try:
        return probe.reach(tx, leaves)
    except Exception as error:
        error.add_note(
            "Raised by the optimizer, where `suggest_max_norm` asked it by"
            " `update(gradients, state, params, value=..., grad=..., value_fn=...)`."
        )
        raise


def _size(params: Any, found: probe.Reach) -> float:
    """Returns the norm of the params that are trained."""
    sizes = np.asarray(jax.tree.leaves(norms.leaf_norms(params)), float)
    size = float(np.linalg.norm(sizes[found.lengths > 0]))
    if not np.isfinite(size):
        raise ValueError(
            f"Expected params that are finite, got some whose norm is {size}. Take"
            " those that the run began with, or the last that were finite."
        )
    return size


def _counted(params: Any) -> Leaves:
    """Sorts the leaves of params, whose values must be known."""
    for leaf in jax.tree.leaves(params):
        if isinstance(leaf, Tracer | jax.ShapeDtypeStruct):
            raise TypeError(
                f"Expected params with values, got {leaf}: they are needed for their"
                " norm. Call `suggest_max_norm` once, outside of `jit`."
            )
    leaves = _leaves.flatten(params)
    if not leaves.counted:
        raise ValueError(
            "Expected params with at least one float array that is not empty, got"
            f" {jax.tree.structure(params)}."
        )
    return leaves


def _median(history: Any) -> float:
    """Returns the median of the finite norms, each as often as its row has steps."""
    if not isinstance(history, Mapping):
        raise TypeError(
            "Expected `history` to be a dict of arrays, got"
            f" {type(history).__name__}. Call `optaxclip.history(...)` on it first."
        )
    if "norm" not in history:
        raise ValueError(
            "Expected `history` to have a column 'norm', the global norm of the"
            f" gradients before the clip, got {', '.join(map(repr, history))}."
        )
    seen = np.asarray(history["norm"], float)
    finite = np.isfinite(seen)
    if seen.ndim != 1 or not finite.any():
        raise ValueError(
            "Expected history['norm'] to be a vector with finite numbers, got an array"
            f" of shape {seen.shape}, {finite.sum()} of them finite."
        )
    widths = np.broadcast_to(np.asarray(history.get("width", 1)), seen.shape)[finite]
    order = seen[finite].argsort()
    passed = widths[order].cumsum()
    return float(seen[finite][order][np.searchsorted(passed, passed[-1] / 2)])
