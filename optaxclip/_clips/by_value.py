"""Elementwise clipping: no norm, so not on the engine."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optaxclip._arguments import checks, mistakes
from optaxclip._clips import elements
from optaxclip._engine.at_once import at_once
from optaxclip._measure import formulas, names as _names, reduce, scopes as _scopes
from optaxclip._mesh import summed
from optaxclip._trees import leaves as _leaves, paths as _paths

Range = ArrayLike | tuple[ArrayLike, ArrayLike]
Limit = Range | Callable[[Any], Range] | Mapping[str, Range | Callable[[Any], Range]]

PAIR = "A range is one argument, a pair: `(-0.5, 0.5)`."


class ClipByValueState(NamedTuple):
    """State of :func:`clip_by_value`.

    The arrays have one entry per leaf; floats are float32, or float64 where a leaf is.

    Attributes:
      update_count: updates seen, shape ``()``, int32.
      largest: moduli of the largest elements before the clip.
      clipped_fractions: shares of the elements that were outside of the range: of one
        with a bound that is NaN all; NaN for a leaf with a NaN.
      scope_ids: which the leaves are, as in :class:`ClipState`.
    """

    update_count: jax.Array
    largest: jax.Array
    clipped_fractions: jax.Array
    scope_ids: jax.Array


@mistakes.at_most(1, PAIR)
@at_once("limit")
def clip_by_value(limit: Limit) -> optax.GradientTransformationExtraArgs:
    r"""Clips every element of the updates into a range.

    .. math:: u_i \leftarrow \min(\max(u_i, \text{low}), \text{high})

    Directions are not kept. Keras calls it ``clipvalue``, PyTorch ``clip_grad_value_``.

    Guarantees:
      * Structure, shapes and dtypes of the updates are kept.
      * Elements within the range come back bit for bit; zeros stay zeros.
      * An infinity becomes the bound; a NaN stays NaN. Where the limit is ``jnp.inf``,
        the number itself, the leaf is measured and handed through.
      * Complex elements are clipped by their modulus and keep their direction; a
        complex infinity has none, and becomes NaN.

    Args:
      limit: largest modulus allowed, for the range [-limit, limit]; or a pair (low,
        high) with low <= 0 <= high; or a schedule ``count -> limit``; or a mapping from
        path patterns to any of these, such as ``{"lstm": 10.0, "head": (-100.0,
        100.0)}``. Numbers may be traced, and of any float dtype; a traced bound on the
        wrong side of 0 counts as 0.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` with state
      :class:`ClipByValueState`. Without a schedule, ``update`` also takes None,
      ``optax.EmptyState()`` or whatever else is no clip's for the state, and returns it
      unchanged: then nothing is measured.

    Raises:
      TypeError: a limit that is not a number, a pair, a schedule or a mapping; a range
        as two arguments.
      ValueError: a negative or NaN limit, a range without 0, a range for a complex
        leaf, patterns that match nothing or don't cover a leaf.

    Examples:
      >>> clip = optaxclip.clip_by_value({"head": (-1.0, 2.0), "**": 0.5})
      >>> grads = {"body": jnp.array([3.0, -0.1]), "head": jnp.array([3.0, -3.0])}
      >>> updates, _ = clip.update(grads, clip.init(grads))
      >>> print(updates["body"], updates["head"])
      [ 0.5 -0.1] [ 2. -1.]

    References:
      Graves, `Generating Sequences With Recurrent Neural Networks
      <https://arxiv.org/abs/1308.0850>`_, 2013
    """
    _check(limit, "limit")
    checks.not_off(limit)

    def init_fn(params: optax.Params) -> ClipByValueState:
        leaves = _leaves.flatten(params, abstract=True)
        _entries(limit, leaves)
        return ClipByValueState(
            jnp.zeros((), jnp.int32),
            _scopes.zeros(formulas.leaf_norms, leaves).norms,
            _scopes.zeros(formulas.leaf_norms, leaves).norms,
            _names.encoded(_scopes.names(formulas.leaf_norms, leaves)),
        )

    def update_fn(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        del extra_args
        leaves = _leaves.flatten(updates)
        summed.check_summed(leaves, params)
        entries = _entries(limit, leaves)
        old = checks.own_state(state, ClipByValueState, params)
        if old is None:
            if any(map(callable, entries)):
                raise ValueError(
                    "Expected the state of this clip, whose limit is a schedule, got"
                    f" {checks.came(state)}. Call `state = clip.init(params)` once and"
                    " pass the state along."
                )
        now = None if old is None else old.update_count
        bounds = {
            key: _bounds(_at(now, entry), leaves.dtype)
            for key, entry in {id(entry): entry for entry in entries}.items()
        }
        every = [bounds[id(entry)] for entry in entries]
        counted = [leaves.leaves[i] for i in leaves.counted]
        if old is not None:
            largest, fractions, counted = elements.seen(leaves, every)
            count = jnp.asarray(optax.safe_increment(old.update_count))
            state = ClipByValueState(count, largest, fractions, old.scope_ids)
        rows = zip(counted, every, leaves.paths(), strict=True)
        clipped = [clamped(x, some, leaves.dtype, path) for x, some, path in rows]
        endless = frozenset(i for i, x in enumerate(entries) if checks.is_endless(x))
        return leaves.replaced(clipped, endless), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@mistakes.at_most(1, PAIR)
def clip(max_delta: Limit) -> optax.GradientTransformationExtraArgs:
    """Clips every element into [-max_delta, max_delta]: :func:`clip_by_value`.

    Under the name and with the argument of ``optax.clip``, for which it is a drop-in.

    Examples:
      >>> updates, _ = optaxclip.clip(1.0).update(jnp.array([0.5, -2.0]), None)
      >>> print(updates)
      [ 0.5 -1. ]
    """
    _check(max_delta, "max_delta")
    return clip_by_value(max_delta)


def _entries(limit: Limit, leaves: _leaves.Leaves) -> list[Any]:
    """Returns the limit of every counted leaf."""
    if not isinstance(limit, Mapping):
        return [limit] * len(leaves.counted)
    return [
        limit[pattern] for pattern in _paths.cover(limit, leaves.paths(), "`limit`")
    ]


def _at(count: Any, limit: Any) -> Any:
    if not callable(limit):
        return limit
    now = limit(count)
    if not hasattr(now, "shape"):
        check_range(now, "what the schedule returns")
    return now


def _bounds(limit: Any, dtype: Any) -> tuple[jax.Array, ...]:
    """Returns low and high, or the one limit of a range that is symmetric."""
    ends = [jnp.asarray(end, dtype) for end in jax.tree.leaves(limit)]
    if any(end.shape for end in ends) or len(ends) > 2:
        raise ValueError(
            "Expected a schedule that returns a number or a pair (low, high), got"
            f" shapes {[end.shape for end in ends]}."
        )
    if len(ends) == 2:
        return jnp.minimum(ends[0], 0), jnp.maximum(ends[1], 0)
    return (jnp.maximum(ends[0], 0),)


def clamped(
    leaf: Any, bounds: tuple[jax.Array, ...], dtype: Any, path: str
) -> jax.Array:
    wide = _leaves.widen(leaf, dtype)
    low, high = -bounds[0] if len(bounds) == 1 else bounds[0], bounds[-1]
    if jnp.iscomplexobj(wide):
        if len(bounds) == 2:
            raise ValueError(
                f"Expected one limit for the modulus of the complex leaf {path!r}, got"
                f" a range {bounds}. Give this leaf a number: a mapping has one per"
                " pattern."
            )
        clipped, outside = _by_modulus(wide, high)
    else:
        clipped = jax.lax.clamp(low, wide, high)
        outside = ~((low <= wide) & (wide <= high))  # also where a bound is NaN
        narrow = _leaves.narrow(wide, leaf).dtype
        if narrow != wide.dtype:  # a bound beyond its largest number would be infinite
            largest = jnp.finfo(narrow).max.astype(dtype)
            clipped = jax.lax.clamp(-largest, clipped, largest)
    clipped = _leaves.narrow(clipped, leaf)
    return jax.lax.select(outside, clipped, jnp.asarray(leaf, clipped.dtype))


def _by_modulus(z: jax.Array, limit: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Measures in units of the larger part, whose squares cannot overflow."""
    unit = jnp.maximum(jnp.abs(z.real), jnp.abs(z.imag))
    unit = jax.lax.stop_gradient(jnp.where(jnp.isfinite(unit) & (unit > 0), unit, 1))
    z = z / unit
    modulus = reduce.root(reduce.square(z), 2)
    outside = ~(modulus <= limit / unit)
    return z * (limit / jnp.where(outside, modulus, 1)), outside


def _check(limit: Any, what: str) -> None:
    if isinstance(limit, Mapping):
        checks.mapping(limit, what, _check)
    elif callable(limit):
        mistakes.uncalled(limit, what, "a number, a pair (low, high) or a schedule")
        mistakes.schedule(limit, what)
    else:
        check_range(limit, what)


def check_range(limit: Any, what: str) -> None:
    """Raises unless ``limit`` is a number or a pair of numbers around 0."""
    is_rule = isinstance(limit, optax.GradientTransformation)  # a tuple, too
    if is_rule or not isinstance(limit, tuple | list):
        kinds, remedy = "a number or a pair (low, high)", f"{checks.OFF} {PAIR}"
        checks.number(limit, what, kinds=kinds, remedy=remedy)
        return
    if len(limit) != 2:
        raise ValueError(f"Expected {what} to be a pair (low, high), got {limit}.")
    for bound, name in zip(limit, ("low", "high"), strict=True):
        checks.number(bound, f"{name} of {what}", minimum=-jnp.inf)
    static = [bound for bound in limit if isinstance(bound, checks.STATIC)]
    if len(static) == 2 and not limit[0] <= 0 <= limit[1]:
        raise ValueError(
            f"Expected low <= 0 <= high in {what}, got {limit}:"
            " zeros have to stay zeros."
        )
