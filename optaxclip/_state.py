"""What a clip saw, for people to read: its state at first and after a step."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxclip import _leaves, _limits, _mesh, _scopes


class ClipState(NamedTuple):
    """What a clip saw at its last step; only the rule's state is ever read back.

    The arrays have one entry per scope, in tree order: shape ``()`` for a global norm,
    else ``(scopes,)``; where a scope is finer than a leaf, one entry per leaf, of the
    unit that was clipped hardest. Floats are float32, or float64 where a leaf is. Read
    them with :func:`optaxclip.summary`, which knows the names.

    Attributes:
      update_count: updates seen, int32.
      norms: norms before the clip, in the units of the updates; infinite where a norm
        is larger than its dtype can hold.
      max_norms: thresholds; infinite where there was none.
      factors: what the updates were multiplied by; 1 where nothing happened.
      clipped_count: steps at which the factor was below 1, int32.
      rule_state: the state of the threshold's rule, ``optax.EmptyState()`` if it has
        none, a tuple of those in the order of the sorted patterns if the threshold is a
        mapping.
    """

    update_count: jax.Array
    norms: jax.Array
    max_norms: jax.Array
    factors: jax.Array
    clipped_count: jax.Array
    rule_state: Any


def fresh(
    threshold: _limits.Threshold, zeros: _scopes.Measured, leaves: _leaves.Leaves
) -> ClipState:
    """Returns the state before the first step, given norms of zero."""
    zero = zeros.norms
    if isinstance(zero, _scopes.Units):
        zero = jnp.zeros_like(zero.whole, shape=len(zero.is_whole))
    return ClipState(
        update_count=jnp.zeros((), jnp.int32),
        norms=zero,
        max_norms=jnp.full_like(zero, jnp.inf),
        factors=jnp.ones_like(zero),
        clipped_count=jnp.zeros_like(zero, jnp.int32),
        rule_state=_limits.init(threshold, zeros, leaves),
    )


def after(
    state: ClipState,
    measured: _scopes.Measured,
    max_norms: _scopes.Packed,
    factors: _scopes.Packed,
    rule_state: Any,
) -> ClipState:
    """Returns the state after this step."""
    hardest = _hardest(factors)
    recorded = functools.partial(_recorded, hardest=hardest, like=state.norms)
    columns = [recorded(x) for x in (measured.sizes(), max_norms, factors)]
    if measured.axes:
        columns = _mesh.at_smallest(columns[-1], columns, measured.axes)
    new_norms, new_max_norms, new_factors = columns
    return ClipState(
        update_count=jnp.asarray(optax.safe_increment(state.update_count)),
        norms=new_norms,
        max_norms=new_max_norms,
        factors=new_factors,
        clipped_count=jnp.where(
            new_factors < 1,
            optax.safe_increment(state.clipped_count),
            state.clipped_count,
        ),
        rule_state=rule_state,
    )


def _hardest(factors: _scopes.Packed) -> list[jax.Array]:
    """Returns where the unit of each leaf is that was clipped hardest, the first one.

    Masks, for an index into units that are spread over devices would gather them.
    """
    if not isinstance(factors, _scopes.Units):
        return []
    places = [_places(part) for part in factors.parts]
    # Like `argmin`, which takes XLA ten times as long to compile.
    found = [(f == jnp.min(f)) | jnp.isnan(f) for f in factors.parts]
    pairs = zip(places, found, strict=True)
    firsts = [jnp.min(jnp.where(x, i, i.size - 1)) for i, x in pairs]
    return [i == first for i, first in zip(places, firsts, strict=True)]


def _places(x: jax.Array) -> jax.Array:
    """Returns the place of every element of ``x``, in the order of its memory."""
    return jnp.arange(x.size).reshape(x.shape)


def _recorded(packed: Any, hardest: list[jax.Array], like: jax.Array) -> jax.Array:
    """Returns what the state keeps: of the units of a leaf, the one clipped hardest."""
    if isinstance(packed, _scopes.Units):
        pairs = zip(packed.parts, hardest, strict=True)
        packed = packed.by_leaf([jnp.sum(jnp.where(i, x, 0)) for x, i in pairs])
    if packed.shape != jnp.shape(like):
        raise ValueError(
            f"Expected a state with one entry per scope, of shape {packed.shape}, got"
            f" {jnp.shape(like)}: it belongs to another clip or to other params."
            " Call `clip.init(params)`."
        )
    return packed.astype(like.dtype)
