"""What the clips of an optimizer did, under names that a logger can use."""

import collections
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.tree_util import DictKey, keystr

from optaxclip import _leaves, _paths
from optaxclip._cotangent_stats import CotangentStats
from optaxclip._skips import GuardState
from optaxclip._state import ClipState
from optaxclip._values import ClipByValueState

Names = tuple[list[str], list[str]]  # of leaves and of layers


def summary(opt_state: Any, params: Any = None) -> dict[str, jax.Array]:
    """Returns the statistics of every clip in an optimizer's state, flat and named.

    Finds clips wherever they are: in ``optax.chain``, ``masked``, ``partition``,
    ``MultiSteps``, ``inject_hyperparams``, a Flax ``TrainState``, an ``nnx.Optimizer``.

    A single clip is called ``clip``, several ``clip_0``, ``clip_1``, ... in their
    order; labels of ``optax.partition`` follow the name. For each clip there are

      * ``clip/norm``: norm before the clip;
      * ``clip/max_norm``: threshold, infinite where there was none;
      * ``clip/factor``: what the updates were multiplied by;
      * ``clip/clipped_fraction``: share of steps so far whose factor was below 1;
      * ``clip/update_count``: steps so far.

    The first four are of the last step, one for each scope:
    ``clip/norm/encoder/kernel`` for leaves, ``clip/norm/encoder`` for layers.
    :func:`clip_by_value` only counts its steps, and clips that keep a memory of every
    element (:func:`acclip`, :func:`spam_clip`) say nothing.

    For each guard (:func:`skip_if_nonfinite`, :func:`skip_if_spike`), called ``guard``
    likewise, there are

      * ``guard/skipped_count`` and ``guard/skipped_fraction``: steps skipped so far;
      * ``guard/consecutive_count``: steps in a row, up to now, that it objected to;
      * ``guard/alarm``: whether these are as many as it was told;
      * ``guard/last_skipped_step``: counted from 0; -1 if none;
      * ``guard/culprit``: number of the first norm that was to blame then, -1 if that
        was the loss. Outside of ``jit`` its path as well, ``guard/culprit/head/bias``,
        with the step.

    Of what clips in the backward pass saw (:class:`CotangentStats`), followed by their
    place in the tree, ``cotangent/norm/head``:

      * ``cotangent/norm``: mean L2 norm of a call, before the clip;
      * ``cotangent/largest_norm``: power of two above the largest one;
      * ``cotangent/clipped_fraction``: share of the elements that were changed;
      * ``cotangent/nonfinite_fraction``: share of calls whose norm is NaN or infinite,
        which the other norms leave out;
      * ``cotangent/calls``: their number.

    Args:
      opt_state: state of an optimizer, or anything that holds one; or the "gradient"
        of :func:`cotangent_stats`.
      params: the parameters, to name scopes by. Without them, and for clips that saw
        only some of them or have groups of their own, scopes are numbered.

    Returns:
      Scalars by name; works under ``jit`` as well. Of a state with a batch axis, made
      by ``vmap``, take ``jax.vmap(summary)``.

    Raises:
      ValueError: there is neither a clip with statistics in ``opt_state`` nor what one
        saw, or that has a batch axis.

    Examples:
      >>> tx = optax.chain(optaxclip.clip_by_global_norm(1.0), optax.sgd(0.1))
      >>> params = {"w": jnp.array([3.0, 4.0])}
      >>> _, opt_state = tx.update(params, tx.init(params))
      >>> for name, value in optaxclip.summary(opt_state).items():
      ...     print(f"{name:22} {value:.1f}")
      clip/norm              5.0
      clip/max_norm          1.0
      clip/factor            0.2
      clip/clipped_fraction  1.0
      clip/update_count      1.0
    """
    found = list(_clips(opt_state, params))
    result = _cotangents(opt_state)
    if not found and not result:
        raise ValueError(
            "Expected the state of an optimizer with a clip of this library in it that"
            f" keeps statistics, got {type(opt_state).__name__} without one. Pass what"
            " `tx.init` or `tx.update` returned, or the gradient of"
            " `cotangent_stats()`."
        )
    same = collections.Counter((_kind(state), labels) for labels, state, _ in found)
    seen: collections.Counter[Any] = collections.Counter()
    for labels, state, names in found:
        kind = _kind(state)
        number = f"_{seen[kind, labels]}" if same[kind, labels] > 1 else ""
        seen[kind, labels] += 1
        for key, value in _statistics(state, names).items():
            result[f"{kind}{number}{labels}/{key}"] = value
    return result


def _kind(state: Any) -> str:
    return "guard" if isinstance(state, GuardState) else "clip"


def _clips(node: Any, params: Any, above: str = "") -> Iterator[tuple[str, Any, Names]]:
    """Yields the labels, the state and the possible names of scopes of every clip."""
    leaves = [] if params is None else _leaves.flatten(params, abstract=True).paths()
    layers = list(dict.fromkeys(_paths.layer(path) or "root" for path in leaves))
    stops = ClipState | ClipByValueState | GuardState | optax.MaskedState
    for keypath, leaf in jax.tree_util.tree_leaves_with_path(
        node, is_leaf=lambda x: isinstance(x, stops)
    ):
        keys = [key.key for key in keypath if isinstance(key, DictKey)]
        labels = above + "".join(f"/{key}" for key in keys)
        if isinstance(leaf, optax.MaskedState):
            # It saw some of the params only: as many scopes as layers may be leaves.
            for below, state, (names, _) in _clips(leaf.inner_state, params, labels):
                yield below, state, (names, [])
        elif isinstance(leaf, stops):
            yield labels, leaf, (leaves, layers)
            if isinstance(leaf, GuardState):
                yield from _clips(leaf.guarded_state, params, labels)


def _cotangents(node: Any) -> dict[str, jax.Array]:
    result = {}
    for keypath, leaf in jax.tree_util.tree_leaves_with_path(
        node, is_leaf=lambda x: isinstance(x, CotangentStats)
    ):
        if isinstance(leaf, CotangentStats):
            place = keystr(keypath, simple=True, separator="/")
            for key, value in _seen(leaf).items():
                result[f"cotangent/{key}/{place}".rstrip("/")] = value
    return result


def _seen(stats: CotangentStats) -> dict[str, jax.Array]:
    calls, norms, nonfinite, elements, clipped, histogram = stats
    if histogram.ndim != 1:
        raise ValueError(
            f"Expected statistics without a batch axis, got shape {histogram.shape} for"
            " the histogram. Call `jax.vmap(summary)`."
        )
    bins = histogram.shape[-1]
    last = jnp.max(jnp.where(histogram > 0, jnp.arange(bins), 0))
    bound = jnp.ldexp(jnp.ones_like(norms), last - bins // 2 + 1)
    return {
        "norm": norms / jnp.maximum(calls - nonfinite, 1),
        "largest_norm": jnp.where(last > 0, bound, 0),
        "clipped_fraction": clipped / jnp.maximum(elements, 1),
        "nonfinite_fraction": nonfinite / jnp.maximum(calls, 1),
        "calls": calls,
    }


def _statistics(state: Any, names: Names) -> dict[str, jax.Array]:
    if isinstance(state, GuardState):
        return _guarded(state, names)
    count = _array(state.update_count)
    if isinstance(state, ClipByValueState):
        return {"update_count": count}
    columns = {
        "norm": _array(state.norms),
        "max_norm": _array(state.max_norms),
        "factor": _array(state.factors),
        "clipped_fraction": _array(state.clipped_count) / jnp.maximum(count, 1),
    }
    result = {}
    for key, values in columns.items():
        if values.ndim == 0:
            result[key] = values
        else:
            named = zip(_names(values.shape[0], names), values, strict=True)
            result |= {f"{key}/{name}": value for name, value in named}
    return result | {"update_count": count}


def _guarded(state: GuardState, names: Names) -> dict[str, jax.Array]:
    culprits, last = _array(state.culprits), _array(state.last_skipped_step)
    first = jnp.argmax(culprits) if culprits.size else -1
    culprit = jnp.where(jnp.any(culprits), first, -1)
    skipped, count = _array(state.skipped_count), _array(state.step_count)
    result = {
        "skipped_count": skipped,
        "skipped_fraction": skipped / jnp.maximum(count, 1),
        "consecutive_count": _array(state.consecutive_count),
        "alarm": _array(state.alarm),
        "last_skipped_step": last,
        "culprit": culprit,
    }
    is_known = not isinstance(culprit, Tracer)
    if culprits.ndim == 1 and is_known and culprit >= 0:
        path = _names(culprits.shape[0], names)[int(culprit)]
        result[f"culprit/{path}"] = last
    return result


def _names(count: int, names: Names) -> list[str]:
    """Returns a name for each of so many scopes."""
    numbers = [str(i) for i in range(count)]
    return next((some for some in names if len(some) == count), numbers)


def _array(field: Any) -> jax.Array:
    """An `nnx.Optimizer` keeps each array in a variable of its own."""
    (array,) = jax.tree.leaves(field)
    return jnp.asarray(array)
