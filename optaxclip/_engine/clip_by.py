"""The one engine behind every clip that multiplies: norm x threshold x factor.

norms             = norm(updates)                        # how big, over what
max_norms, state  = threshold.update(norms, state, ...)  # how big is allowed
updates           = updates * factor(norms, max_norms)   # what to do about it
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxclip import factors, norms
from optaxclip._arguments import checks, mistakes
from optaxclip._engine import limits as _limits, multiply, state as _state
from optaxclip._engine.at_once import at_once
from optaxclip._engine.limits import Threshold
from optaxclip._engine.multiply import Factor
from optaxclip._engine.state import ClipState
from optaxclip._measure import scopes as _scopes, units as _units
from optaxclip._mesh import summed
from optaxclip._trees import leaves as _leaves


@at_once("threshold")
def clip_by(
    norm: _scopes.Norm, threshold: Threshold, factor: Factor = factors.rescale
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies every scope of the updates by a factor of its norm and threshold.

    .. math:: u_s \leftarrow u_s \cdot \text{factor}(\|u_s\|, \text{threshold}_s)

    All clips of this library that multiply are a few lines on this function, and yours
    can be too: choose how to measure, how much to allow, and what to do about the rest.

    Guarantees:
      * Structure, shapes and dtypes of the updates are kept; they are rounded once.
      * Where the factor is 1 the updates come back bit for bit. Zeros stay zeros.
      * Finite updates are measured exactly, whatever their dtype and magnitude.
      * A NaN or an infinity in a scope makes all of that scope NaN, and enters no rule.
        Nor does a norm of zero, which says nothing of the others.
      * Where the threshold is ``jnp.inf``, the number itself, the updates are measured
        and handed through, whatever they hold.
      * On finite updates the state is finite.
      * The derivative is finite wherever the result is.

    Args:
      norm: function from updates to a tree prefix of norms, such as those in
        :mod:`optaxclip.norms`. It has to be positively homogeneous.
      threshold: largest norm allowed, in the units of the updates at this point of the
        chain: a number, possibly traced and of any float dtype (``jnp.inf`` allows all,
        a negative traced number counts as 0); a schedule ``count -> number``, where the
        count starts at 0; a rule, that is an ``optax.GradientTransformation`` whose
        updates are the norms of all scopes as one vector (a scalar if global); or a
        mapping from path patterns to any of these. In a rule's state an array whose
        last axis goes over the scopes keeps the entries of a scope whose norm is zero
        or not finite.
      factor: function from positive norms and thresholds to factors.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` with state :class:`ClipState`. If
      the threshold needs no state, ``update`` also takes None, ``optax.EmptyState()``
      or whatever else is no clip's for the state, and returns it unchanged: then there
      are no statistics.

    Raises:
      TypeError: when building, for a threshold of the wrong type, or an optimizer for
        one, and for functions that have to be called first; when tracing, for a leaf
        that is not an array.
      ValueError: when building, for a negative or NaN threshold; when tracing, for
        patterns that match nothing, don't cover a leaf or disagree within a scope, for
        params that don't match the updates, and for a state that belongs to another
        clip.

    Examples:
      >>> clip = optaxclip.clip_by(
      ...     optaxclip.norms.leaf_norms,
      ...     {"head": 10.0, "**": 1.0},
      ...     optaxclip.factors.soften,
      ... )
      >>> grads = {"body": jnp.array([3.0]), "head": jnp.array([30.0])}
      >>> updates, state = clip.update(grads, clip.init(grads))
      >>> print(updates["body"], updates["head"], state.factors)
      [0.75] [7.5] [0.25 0.25]
    """
    checks.threshold(threshold, "threshold")
    if not callable(norm) or not callable(factor):
        raise TypeError(
            "Expected functions `clip_by(norm, threshold, factor)`, got"
            f" norm={norm!r}, factor={factor!r}."
        )
    checks.not_off(threshold)
    mistakes.norm(norm)
    mistakes.factor(factor)
    formula = norms.formula(norm)

    def init_fn(params: optax.Params) -> ClipState:
        leaves = _leaves.flatten(params, abstract=True)
        zeros, names = _scopes.zeros(formula, leaves), _scopes.names(formula, leaves)
        return _state.fresh(threshold, zeros, leaves, names)

    def update_fn(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        leaves = _leaves.flatten(updates)
        summed.check_summed(leaves, params)
        measured = _scopes.measure(formula, leaves)
        rule = Rule(threshold, factor)
        return clipped(rule, leaves, measured, state, params, extra_args)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class Rule(NamedTuple):
    """What to do about a norm."""

    threshold: Threshold
    factor: Factor


class Decision(NamedTuple):
    """What is allowed, the factors in their two parts, and the new state."""

    max_norms: _units.Packed
    scales: _units.Packed
    rests: _units.Packed
    untouched: frozenset[int]  # places of leaves that are handed through
    state: Any


def clipped(
    rule: Rule,
    leaves: _leaves.Leaves,
    measured: _scopes.Measured,
    state: Any,
    params: Any,
    extra_args: dict[str, Any],
) -> tuple[optax.Updates, Any]:
    """Returns the updates times their factors, and the new state."""
    found = decided(rule, leaves, measured, state, params, extra_args)
    parts = found.scales, found.rests
    clipped = multiply.multiplied(leaves, measured.scopes, *parts, found.untouched)
    return clipped, found.state


def decided(
    rule: Rule,
    leaves: _leaves.Leaves,
    measured: _scopes.Measured,
    state: Any,
    params: Any,
    extra_args: dict[str, Any],
) -> Decision:
    """Returns what to do about norms that somebody measured."""
    old = checks.own_state(state, ClipState, params)
    threshold = rule.threshold
    if old is None:
        count = jnp.zeros((), jnp.int32)
        past = _limits.stateless(threshold, measured, leaves, state)
    else:
        old = _state.typed(old)
        count, past = old.update_count, old.rule_state
    max_norms, rule_state = _limits.update(
        threshold, measured, count, past, leaves, params, extra_args
    )
    max_norms = jax.tree.map(lambda x: jnp.maximum(x, 0), max_norms)
    untouched = _limits.without(threshold, measured.scopes, leaves)
    parts = multiply.scope_factors(rule.factor, measured, max_norms)
    scales, rests = (_units.ones_at(untouched, x, measured.scopes) for x in parts)
    if old is None:
        return Decision(max_norms, scales, rests, untouched, state)
    totals = jax.tree.map(multiply.total, scales, rests)
    new = _state.after(old, measured, max_norms, totals, rule_state, leaves)
    return Decision(max_norms, scales, rests, untouched, new)
