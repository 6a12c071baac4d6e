"""The one engine behind every clip that multiplies: norm x threshold x factor.

norms             = norm(updates)                        # how big, over what
max_norms, state  = threshold.update(norms, state, ...)  # how big is allowed
updates           = updates * factor(norms, max_norms)   # what to do about it
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optaxclip import _checks, _leaves, _limits, _mesh, _scopes, _splits, factors, norms

Factor = Callable[[jax.Array, jax.Array], jax.Array]
Threshold = (
    ArrayLike
    | optax.Schedule
    | optax.GradientTransformation
    | Mapping[str, ArrayLike | optax.Schedule | optax.GradientTransformation]
)


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
        last axis goes over the scopes keeps the entries of a scope whose norm is not
        finite.
      factor: function from positive norms and thresholds to factors.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` with state :class:`ClipState`. If
      the threshold needs no state, ``update`` also takes None or ``optax.EmptyState()``
      for the state, and returns it unchanged.

    Raises:
      TypeError: when building, for a threshold of the wrong type; when tracing, for a
        leaf that is not an array.
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
    _checks.threshold(threshold, "threshold")
    if not callable(norm) or not callable(factor):
        raise TypeError(
            "Expected functions `clip_by(norm, threshold, factor)`, got"
            f" norm={norm!r}, factor={factor!r}."
        )
    formula = norms.formula(norm)

    def init_fn(params: optax.Params) -> ClipState:
        leaves = _leaves.flatten(params, abstract=True)
        return fresh(threshold, _scopes.zeros(formula, leaves), leaves)

    def update_fn(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        leaves = _leaves.flatten(updates)
        _splits.check_summed(leaves, params)
        measured = _scopes.measure(formula, leaves)
        rule = Rule(threshold, factor)
        return clipped(rule, leaves, measured, state, params, extra_args)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class Rule(NamedTuple):
    """What to do about a norm."""

    threshold: Threshold
    factor: Factor


def fresh(
    threshold: Threshold, zeros: _scopes.Measured, leaves: _leaves.Leaves
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


class Decision(NamedTuple):
    """What is allowed, the factors in their two parts, and the new state."""

    max_norms: _scopes.Packed
    scales: _scopes.Packed
    rests: _scopes.Packed
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
    updates = multiplied(leaves, measured.scopes, found.scales, found.rests)
    return updates, found.state


def decided(
    rule: Rule,
    leaves: _leaves.Leaves,
    measured: _scopes.Measured,
    state: Any,
    params: Any,
    extra_args: dict[str, Any],
) -> Decision:
    """Returns what to do about norms that somebody measured."""
    old: Any = None if isinstance(state, optax.EmptyState) else state
    _checks.state(old, ClipState)
    threshold = rule.threshold
    if old is None:
        count = jnp.zeros((), jnp.int32)
        past = _limits.stateless(threshold, measured, leaves)
    else:
        count, past = old.update_count, old.rule_state
    max_norms, rule_state = _limits.update(
        threshold, measured, count, past, leaves, params, extra_args
    )
    max_norms = jax.tree.map(lambda x: jnp.maximum(x, 0), max_norms)
    scales, rests = scope_factors(rule.factor, measured, max_norms)
    if old is None:
        return Decision(max_norms, scales, rests, state)
    totals = jax.tree.map(jnp.multiply, scales, rests)
    new = _next(old, measured, max_norms, totals, rule_state)
    return Decision(max_norms, scales, rests, new)


def scope_factors(
    factor: Factor, measured: _scopes.Measured, max_norms: _scopes.Packed
) -> tuple[_scopes.Packed, _scopes.Packed]:
    """Returns the factors in two parts each, a power of two and the rest.

    Where a factor is too small for its dtype, it is computed for a threshold scaled up,
    and the updates are scaled down: a factor so small is proportional to the threshold.
    """
    norms, powers = measured.norms, measured.powers
    rest = functools.partial(_rest, factor)
    ones = jax.tree.map(jnp.ones_like, norms)
    plain = jax.tree.map(rest, norms, powers, ones, max_norms)
    ups = jax.tree.map(_up, plain, norms, powers, max_norms)
    rests = jax.tree.map(rest, norms, powers, ups, max_norms)
    return jax.tree.map(jnp.reciprocal, ups), rests


@jax.jit
def _up(
    plain: jax.Array, norm: jax.Array, power: jax.Array, max_norm: jax.Array
) -> jax.Array:
    """Returns a power of two for the threshold, of which the updates get the inverse.

    So large only that what the updates lose to underflow would be lost in the product.
    Where the power is above 1, norms are so small that no factor underflows.
    """
    info = jnp.finfo(norm.dtype)
    half, full = 2.0 ** (info.maxexp // 2), 2.0 ** (info.maxexp - 2)
    loss = 2.0 ** (info.nmant + 2)
    one = jnp.ones_like(norm)
    reach = max_norm * (power * (half * loss))
    up = jnp.where(reach < norm, half, one)
    up = jnp.where(reach < norm * (half / full), full, up)
    is_tiny = (plain * (half * loss) < 1) & (power <= 1)
    return jax.lax.stop_gradient(jnp.where(is_tiny, up, one))


@functools.partial(jax.jit, static_argnums=0)
def _rest(
    factor: Factor,
    norm: jax.Array,
    power: jax.Array,
    up: jax.Array,
    max_norm: jax.Array,
) -> jax.Array:
    info = jnp.finfo(norm.dtype)
    one = jnp.ones_like(norm)
    # Both go down where the power would take a large threshold out of the range.
    large = 2.0 ** (3 * info.maxexp // 4)
    down = jnp.where(max_norm * power > large, 2.0 ** -(info.maxexp // 2), one)
    scaled = jnp.minimum((max_norm * down) * (power * up), info.max)
    rest = factor(jnp.where(norm == 0, 1, norm * down), scaled)
    rest = jnp.where((norm == 0) | jnp.isinf(max_norm), 1, rest)
    # NaN where the norm is not finite. A division comes last because the compiler
    # repeats anything cheaper in the kernel of every leaf.
    return rest / (1 + 0 * norm * scaled)


def multiplied(
    leaves: _leaves.Leaves,
    scopes: Sequence[_scopes.Scope],
    scales: _scopes.Packed,
    rests: _scopes.Packed,
) -> Any:
    """Returns the updates times their factors, untouched where the factor is 1."""
    untouched = jax.tree.map(lambda scale, rest: scale * rest == 1, scales, rests)
    columns = [
        _scopes.of_leaf(packed, scopes, len(leaves.counted))
        for packed in (scales, rests, untouched)
    ]
    every = zip(leaves.counted, *columns, strict=True)
    return leaves.replaced(
        [_times(leaves.leaves[i], leaves.dtype, *row) for i, *row in every]
    )


def _times(
    leaf: Any, dtype: Any, scale: jax.Array, rest: jax.Array, untouched: jax.Array
) -> jax.Array:
    product = _leaves.narrow(_leaves.widen(leaf, dtype) * scale * rest, leaf)
    leaf = jnp.asarray(leaf, product.dtype)
    # Where it can be had, `select`: it is quicker to trace and compile than `where`.
    choose = jnp.where if untouched.ndim else jax.lax.select
    return choose(untouched, leaf, product)


def _next(
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
