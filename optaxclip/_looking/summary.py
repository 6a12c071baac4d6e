"""What the clips of an optimizer did, under names that a logger can use."""

import collections
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import DictKey, keystr

from optaxclip._clips.by_value import ClipByValueState
from optaxclip._cotangents.stats import CotangentStats
from optaxclip._engine.state import ClipState
from optaxclip._guards.skips import GuardState
from optaxclip._looking.by_name import Column, Fields, Part, Summary
from optaxclip._trees import infinity, paths as _paths

MEMORIES = ("rule_state", "guarded_state")  # fields that are not shown


def summary(opt_state: Any, params: Any = None) -> Summary:
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
    :func:`clip_by_value` shows for each leaf ``clip/largest``, the largest modulus of
    an element before the clip, and ``clip/clipped_fraction``, the share of its elements
    that were clipped at the last step. Clips that keep a memory of every element
    (:func:`acclip`, :func:`spam_clip`) say nothing.

    For each guard (:func:`skip_if_nonfinite`, :func:`skip_if_spike`), called ``guard``
    likewise, there are

      * ``guard/skipped_count`` and ``guard/skipped_fraction``: steps skipped so far;
      * ``guard/consecutive_count``: steps in a row, up to now, that it objected to;
      * ``guard/alarm``: whether these are as many as it was told;
      * ``guard/last_skipped_step``: counted from 0; -1 if none;
      * ``guard/culprit``: number of the first norm that was to blame then, -1 if that
        was the loss. On the host its path as well, ``guard/culprit/head/bias``, with
        the step.

    Log it at every step. Return it from the jitted step as it is: inside of ``jit`` it
    is a pytree of the vectors that the states hold, and adds nothing to the step. On
    the host it is a mapping to NumPy scalars, which are fetched in one piece.

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
      params: the parameters, to name scopes by; shapes will do. A scope has the name
        that its clip saw in ``init``. Without params, and where groups of your own are
        no module, scopes are numbered.

    Returns:
      A mapping from names to scalars, which may be returned from ``jit``, ``vmap`` and
      ``scan`` (there each scalar becomes an array). Inside of these it can be asked for
      the name of a scope, but lists them by number. Of a state with a batch axis, made
      by ``vmap``, take ``jax.vmap(summary)``.

    Raises:
      ValueError: there is neither a clip with statistics in ``opt_state`` nor what one
        saw, or that has a batch axis.

    Examples:
      >>> tx = optax.chain(optaxclip.clip_by_leaf_norm(1.0), optax.sgd(0.1))
      >>> params = {"w": jnp.array([3.0, 4.0])}
      >>> _, opt_state = tx.update(params, tx.init(params))
      >>> for name, value in optaxclip.summary(opt_state, params).items():
      ...     print(f"{name:24} {value:.1f}")
      clip/norm/w              5.0
      clip/max_norm/w          1.0
      clip/factor/w            0.2
      clip/clipped_fraction/w  1.0
      clip/update_count        1.0
    """
    found = list(found_in(opt_state))
    if not found:
        raise ValueError(
            "Expected the state of an optimizer with a clip of this library in it that"
            f" keeps statistics, got {type(opt_state).__name__} without one. Pass what"
            " `tx.init` or `tx.update` returned, or the gradient of"
            " `cotangent_stats()`."
        )
    parts = [
        Part(before, after, READERS[type(state)][1], _fields(state))
        for before, after, state in titled(found)
    ]
    paths = () if params is None else tuple(_paths.paths(params))
    return Summary(parts, paths).fetched()


def titled(found: Sequence[tuple[str, str, Any]]) -> list[tuple[str, str, Any]]:
    """Returns of each of these what goes before and after a name, and its state."""
    same = collections.Counter((kind, labels) for kind, labels, _ in found)
    seen: collections.Counter[Any] = collections.Counter()
    rows = []
    for kind, labels, state in found:
        number = f"_{seen[kind, labels]}" if same[kind, labels] > 1 else ""
        seen[kind, labels] += 1
        if kind == "cotangent":
            rows.append((kind, labels, state))
        else:
            rows.append((kind + number + labels, "", state))
    return rows


def found_in(node: Any, above: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yields of everything with statistics its kind, its labels and its state."""
    for keypath, state in jax.tree_util.tree_leaves_with_path(
        node, is_leaf=lambda x: type(x) in READERS
    ):
        if type(state) not in READERS:
            continue
        kind, _ = READERS[type(state)]
        keys = [key.key for key in keypath if isinstance(key, DictKey)]
        labels = above + "".join(f"/{key}" for key in keys)
        if kind == "cotangent":
            labels = f"/{keystr(keypath, simple=True, separator='/')}".rstrip("/")
        yield kind, labels, state
        if kind == "guard":
            yield from found_in(state.guarded_state, labels)


def _fields(state: Any) -> Fields:
    """Returns the arrays of a state, of which `nnx` keeps each in a variable."""
    fields = {
        key: jnp.asarray(*jax.tree.leaves(field))
        for key, field in state._asdict().items()
        if key not in MEMORIES
    }
    for count in "update_count", "step_count", "calls":
        if count in fields and fields[count].ndim:
            raise ValueError(
                "Expected statistics without a batch axis, got shape"
                f" {fields[count].shape} for the {count} of a {type(state).__name__}."
                " Call `jax.vmap(summary)`."
            )
    return fields


def _of_clip(xp: Any, clip: Fields) -> list[Column]:
    count, norms, max_norms = clip["update_count"], clip["norms"], clip["max_norms"]
    factors, ids = clip["factors"], clip["scope_ids"]
    if norms.ndim > count.ndim:
        steps = count[..., None]
    else:
        steps, ids = count, None
    share = clip["clipped_count"] / xp.maximum(steps, 1)
    return [
        Column("norm", _shown(xp, norms), ids),
        Column("max_norm", _shown(xp, max_norms), ids),
        Column("factor", _shown(xp, factors), ids),
        Column("clipped_fraction", share.astype(factors.dtype), ids),
        Column("update_count", count),
    ]


def _of_value_clip(xp: Any, clip: Fields) -> list[Column]:
    ids = clip["scope_ids"]
    return [
        Column("largest", _shown(xp, clip["largest"]), ids),
        Column("clipped_fraction", clip["clipped_fractions"], ids),
        Column("update_count", clip["update_count"]),
    ]


def _of_guard(xp: Any, guard: Fields) -> list[Column]:
    culprits, last = guard["culprits"], guard["last_skipped_step"]
    skipped, steps = guard["skipped_count"], guard["step_count"]
    is_scoped = culprits.ndim > steps.ndim
    culprits = culprits if is_scoped else culprits[..., None]
    if not culprits.shape[-1]:
        culprits = xp.zeros((*steps.shape, 1), bool)
    first = xp.where(xp.any(culprits, axis=-1), xp.argmax(culprits, axis=-1), -1)
    columns = [
        Column("skipped_count", skipped),
        Column("skipped_fraction", skipped / xp.maximum(steps, 1)),
        Column("consecutive_count", guard["consecutive_count"]),
        Column("alarm", guard["alarm"]),
        Column("last_skipped_step", last),
        Column("culprit", first),
    ]
    if is_scoped and xp is np and first.ndim == 0 and first >= 0:
        ids = guard["scope_ids"][first : first + 1]
        columns.append(Column("culprit", last[None], ids, int(first)))
    return columns


def _of_cotangents(xp: Any, stats: Fields) -> list[Column]:
    calls, nonfinite = stats["calls"], stats["nonfinite"]
    bins = stats["histogram"].shape[-1]
    last = xp.max(xp.where(stats["histogram"] > 0, xp.arange(bins), 0), axis=-1)
    with np.errstate(over="ignore"):
        bound = xp.ldexp(xp.ones_like(stats["norms"]), last - bins // 2 + 1)
    share = stats["clipped"] / xp.maximum(stats["elements"], 1)
    return [
        Column("norm", stats["norms"] / xp.maximum(calls - nonfinite, 1)),
        Column("largest_norm", xp.where(last > 0, bound, 0)),
        Column("clipped_fraction", share),
        Column("nonfinite_fraction", nonfinite / xp.maximum(calls, 1)),
        Column("calls", calls),
    ]


def _shown(xp: Any, values: Any) -> Any:
    return xp.where(infinity.is_infinite(values), xp.inf, values)


# What is called what, and how it is read.
READERS = {
    ClipState: ("clip", _of_clip),
    ClipByValueState: ("clip", _of_value_clip),
    GuardState: ("guard", _of_guard),
    CotangentStats: ("cotangent", _of_cotangents),
}
