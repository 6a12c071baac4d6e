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
LOW = 0.1  # of the steps have norms that are lower than what a history suggests


def suggest_max_norm(
    optimizer: optax.GradientTransformation | optax.MultiSteps,
    params: Any,
    history: Mapping[str, Any] | None = None,
    share: ArrayLike = 0.03,
) -> float:
    r"""Computes a threshold for :func:`clip_by_global_norm`, before the first step.

    .. math:: \text{max\_norm} = \text{share} \cdot \max(\|\theta\|, 1) / r

    with the reach :math:`r` of the optimizer: how far it moves the parameters in a step
    of a long, fully clipped stretch, for each unit of the gradient's norm. That is
    learning rate / (1 - momentum) for SGD. So no step is longer than a share of the
    weights, however large the gradients are. The optimizer itself is asked: schedules
    (up to a million steps), weight decay, accumulated steps, guards are all in it.

    This is a safe start, not a tuned threshold. Where weights have to grow far it is
    too small, so train with it, **ask again with the params that the run came to**, and
    train anew from the start. On twelve small tasks, at four learning rates, that ended
    at 1.04 times the loss of the best of 13 thresholds in the median, 2.8 at worst, and
    lost 13 of 768 runs, where that threshold loses 7. The first answer: 1.06 in the
    median, but 1900 where weights end at 25 times their start. What is left to win a
    sweep around it finds. (`benchmarks/studies/suggested.py`)

    The steps of Adam, and of all who divide gradients by their size, are as long as the
    learning rate says. No threshold follows from those, so they need the history of a
    run: the 10th percentile of its norms is suggested, which ended at 1.01 times that
    loss in the median and 1.5 at worst, on five tasks, and they were in view. With
    other optimizers a history is not looked at: norms that are seen without a clip are
    no guide there. Their 90th percentile lost 239 of the 768 runs.

    Guarantees:
      * The optimizer is asked with a state and params of its own: nothing that you hold
        changes. No model, data or run is needed.
      * Parameters that the optimizer does not move do not count.

    Args:
      optimizer: any transformation, the clip in it or not. A clip that is in it must
        let norms up to 0.002 pass.
      params: where the run begins, or where an earlier one ended.
      history: columns of a run, in which ``norm`` is the global norm of the gradients
        before the clip, for each step or, with ``width``, for as many.
      share: of the norm of the parameters, which the longest step may move them by.

    Returns:
      The threshold, a Python number in units of the gradients.

    Raises:
      TypeError, ValueError: an argument that can't be meant; params that are not finite
        or traced; an optimizer that moves nothing, or that searches along a line; one
        whose steps don't depend on the size of the gradients, without a history.

    Examples:
      >>> params = {"w": jnp.array([6.0, 8.0])}  # norm 10
      >>> sgd = optax.sgd(0.1, momentum=0.9)
      >>> print(f"{optaxclip.suggest_max_norm(sgd, params):.2f}")
      0.30
      >>> history = {"norm": np.array([2.0, 3.0, 40.0])}
      >>> print(optaxclip.suggest_max_norm(optax.adam(1e-3), params, history))
      2.0
    """
    if isinstance(optimizer, optax.MultiSteps):
        optimizer = optimizer.gradient_transformation()
    tx = checks.transformation(optimizer, "optimizer", "optax.sgd(0.1)")
    checks.number(share, "share", remedy="")
    leaves = _counted(params)
    seen = None if history is None else _low_norm(history)
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
            " No threshold follows from such steps. Record the norms of a run and pass"
            " them, `history={'norm': norms}`; or have their median learnt as it goes:"
            " `clip_by_global_norm(thresholds.streaming_quantile())`."
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


def _low_norm(history: Any) -> float:
    """Returns a percentile of the finite norms, each as often as its row has steps."""
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
    return float(seen[finite][order][np.searchsorted(passed, LOW * passed[-1])])
