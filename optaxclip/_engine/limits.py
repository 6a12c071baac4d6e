"""How big is allowed: the threshold of every scope, from what the user gave as one."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from optaxclip._arguments import checks
from optaxclip._measure.scopes import Measured
from optaxclip._measure.units import EVERYTHING, Packed, Scope, Units, joined
from optaxclip._trees import infinity, paths as _paths
from optaxclip._trees.leaves import Leaves

Threshold = (
    ArrayLike
    | optax.Schedule
    | optax.GradientTransformation
    | Mapping[str, ArrayLike | optax.Schedule | optax.GradientTransformation]
)


def init(threshold: Any, measured: Measured, leaves: Leaves) -> Any:
    """Returns the state of the threshold: its rule's or, of a mapping, each entry's."""
    states = tuple(
        _init_entry(entry, _some(measured.norms, places, measured.scopes))
        for entry, places in _entries(threshold, measured.scopes, leaves)
    )
    return states if isinstance(threshold, Mapping) else states[0]


def stateless(threshold: Any, measured: Measured, leaves: Leaves, given: Any) -> Any:
    """Returns the state of a threshold that needs none, and raises if it needs one."""
    state = init(threshold, measured, leaves)
    entries = [entry for entry, _ in _entries(threshold, measured.scopes, leaves)]
    if jax.tree.leaves(state) or any(map(_is_schedule, entries)):
        raise ValueError(
            "Expected the state of this clip, whose threshold changes from step to"
            f" step, got {checks.came(given)}. Call `state = clip.init(params)` once"
            " and pass the state along."
        )
    return state


def without(threshold: Any, scopes: Sequence[Scope], leaves: Leaves) -> frozenset[int]:
    """Returns the places of the leaves that have no threshold: a Python infinity."""
    found: set[int] = set()
    for entry, places in _entries(threshold, scopes, leaves):
        if checks.is_endless(entry):
            members = [scopes[i] for i in places]
            every = EVERYTHING in members
            found.update(*members, range(len(leaves.counted)) if every else ())
    return frozenset(found)


def update(
    threshold: Any,
    measured: Measured,
    count: jax.Array,
    state: Any,
    leaves: Leaves,
    params: Any,
    extra_args: dict[str, Any],
) -> tuple[Packed, Any]:
    """Returns the threshold of every scope, and the new state as `init` returned it."""
    fresh = jax.eval_shape(lambda some: init(threshold, some, leaves), measured)
    expected, got = _layout(fresh), _layout(state)
    if expected != got:
        raise ValueError(
            f"Expected the state of this clip's threshold, of shapes {expected}, got"
            f" {got}: it belongs to another clip or to other params. Call"
            " `state = clip.init(params)`."
        )
    # In a blend of states counts have become floats.
    state = jax.tree.map(lambda x, like: jnp.asarray(x, like.dtype), state, fresh)
    parts: list[tuple[list[int], Packed]] = []
    states = []
    olds = state if isinstance(threshold, Mapping) else (state,)
    entries = _entries(threshold, measured.scopes, leaves)
    for (entry, places), old in zip(entries, olds, strict=True):
        if isinstance(entry, optax.GradientTransformation) and places:
            sizes = _some(measured.sizes(), places, measured.scopes)
            scopes = [measured.scopes[i] for i in places]
            part = _restricted(params, leaves, scopes)
            limits, new = _apply_rule(entry, sizes, old, part, extra_args)
        else:
            new = old
            limit = _scalar(entry, count, leaves.dtype)
            norms = _some(measured.norms, places, measured.scopes)
            limits = jax.tree.map(
                lambda x, y=limit: jnp.broadcast_to(y, x.shape), norms
            )
        parts.append((places, limits))
        states.append(new)
    allowed = _merged(parts, measured.norms, measured.scopes)
    return allowed, tuple(states) if isinstance(threshold, Mapping) else states[0]


def _layout(state: Any) -> tuple[Any, list[tuple[int, ...]]]:
    return jax.tree.structure(state), [
        jnp.shape(leaf) for leaf in jax.tree.leaves(state)
    ]


def _entries(
    threshold: Any, scopes: Sequence[Scope], leaves: Leaves
) -> list[tuple[Any, list[int]]]:
    """Returns each entry of the threshold with the places of the scopes it is for."""
    if not isinstance(threshold, Mapping):
        return [(threshold, list(range(len(scopes))))]
    paths = leaves.paths()
    winners = _paths.cover(threshold, paths, "the threshold")
    places: dict[str, list[int]] = {pattern: [] for pattern in sorted(threshold)}
    for place, scope in enumerate(scopes):
        members = range(len(paths)) if scope == EVERYTHING else scope
        patterns = sorted({winners[i] for i in members})
        if len(patterns) > 1:
            raise ValueError(
                f"Expected one threshold per norm, got the patterns {patterns} for"
                f" {[paths[i] for i in members]}, which share one. Use a norm of leaves"
                " or smaller groups, or `optax.partition` for a norm of each subtree."
            )
        places[min(patterns, default=min(places))].append(place)
    return [(threshold[pattern], some) for pattern, some in places.items()]


def _some(packed: Packed, places: list[int], scopes: Sequence[Scope]) -> Packed:
    """Returns the entries of some scopes, packed likewise."""
    if len(places) == len(scopes):
        return packed
    if isinstance(packed, Units):
        return packed.of_some(places)
    return jnp.ravel(packed)[np.array(places, int)]


def _merged(
    parts: list[tuple[list[int], Packed]], norms: Packed, scopes: Sequence[Scope]
) -> Packed:
    """Inverts `_some`, packed like the norms of all scopes."""
    for places, packed in parts:
        if len(places) == len(scopes):
            return packed
    if isinstance(norms, Units):
        pairs = [zip(some, packed.of_leaves(), strict=True) for some, packed in parts]
        leaves = dict(itertools.chain(*pairs))
        return joined([leaves[i] for i in range(len(leaves))], norms.places)
    order = [place for places, _ in parts for place in places]
    return jnp.concatenate([packed for _, packed in parts])[np.argsort(order)]


def _init_entry(entry: Any, norms: Packed) -> Any:
    if not isinstance(entry, optax.GradientTransformation):
        return optax.EmptyState()
    # A vector, for not every rule knows what to do with units.
    state = entry.init(jnp.zeros(0) if isinstance(norms, Units) else norms)
    if isinstance(norms, Units) and jax.tree.leaves(state):
        raise ValueError(
            "Expected a rule without a state for a norm of units, got one that keeps a"
            f" history, {type(state).__name__}. Use a norm of leaves or groups."
        )
    return jax.tree.map(infinity.replaced, state)


def _apply_rule(
    rule: optax.GradientTransformation,
    norms: Any,
    state: Any,
    params: Any,
    extra_args: dict[str, Any],
) -> tuple[Any, Any]:
    rule = optax.with_extra_args_support(rule)
    limits, new = rule.update(norms, state, params, **extra_args)
    expected, got = jax.tree.map(jnp.shape, norms), jax.tree.map(jnp.shape, limits)
    if expected != got:
        raise ValueError(
            f"Expected the rule to return one threshold per norm, of shape {expected},"
            f" got {got}."
        )
    limits = jax.tree.map(lambda limit, norm: limit.astype(norm.dtype), limits, norms)
    if not isinstance(norms, Units):
        # A norm of zero says nothing of others: learnt from, it would allow none.
        tells = jnp.isfinite(norms) & ~infinity.is_infinite(norms) & (norms != 0)
        new = jax.tree.map(lambda a, b: _kept(a, b, tells), new, state)
    return limits, new


def _kept(new: Any, old: Any, tells: jax.Array) -> jax.Array:
    """Keeps what a rule knew of the scopes whose norm tells nothing, and its dtypes."""
    new = infinity.replaced(jnp.asarray(new, jnp.result_type(old)))
    if tells.ndim > new.ndim or new.shape[new.ndim - tells.ndim :] != tells.shape:
        return jnp.where(jnp.any(tells), new, old)  # shared by all scopes
    tells = jnp.reshape(tells, (1,) * (new.ndim - tells.ndim) + tells.shape)
    return jnp.where(tells, new, old)


def _restricted(params: Any, leaves: Leaves, scopes: list[Scope]) -> Any:
    """Returns the params of some scopes, with None in the places of all others."""
    if not leaves.counted:
        return ()  # an empty tree may be None, too, and is not missing
    if params is None:
        return None
    every = params_like(params, leaves)
    members = {i for scope in scopes for i in scope}
    if EVERYTHING in scopes:
        members = set(range(len(every)))
    return leaves.tree([leaf if i in members else None for i, leaf in enumerate(every)])


def params_like(params: Any, leaves: Leaves) -> list[Any]:
    """Returns the params that belong to the counted leaves of the updates."""
    paths = dict(zip(leaves.paths(), leaves.counted, strict=True))
    if jax.tree.structure(params) == leaves.treedef:
        every = jax.tree.leaves(params)
        for path, i in paths.items():
            if jnp.shape(every[i]) != jnp.shape(leaves.leaves[i]):
                raise ValueError(
                    "Expected params and updates of one shape, got"
                    f" {jnp.shape(every[i])} and {jnp.shape(leaves.leaves[i])} at"
                    f" {path!r}. Pass the params that the updates belong to."
                )
        return [every[i] for i in leaves.counted]
    different = sorted(set(paths) ^ set(_paths.paths(params)))
    where = f"at {different[0]!r}" if different else f"in type, {type(params).__name__}"
    raise ValueError(
        f"Expected params of the same structure as the updates: they differ {where}."
        " Pass the params that the updates belong to."
    )


def _scalar(entry: Any, count: jax.Array, dtype: Any) -> jax.Array:
    largest = infinity.stand_in(dtype)
    if isinstance(entry, optax.GradientTransformation):
        return jnp.full((), largest, dtype)  # a rule for none of these scopes
    if isinstance(entry, checks.STATIC):
        return jnp.asarray(min(float(entry), largest), dtype)
    limit = entry(count) if callable(entry) else entry
    checks.number(limit, "what the schedule returns", minimum=-jnp.inf)
    return jnp.asarray(limit).astype(dtype)


def _is_schedule(entry: Any) -> bool:
    return callable(entry) and not isinstance(entry, optax.GradientTransformation)
