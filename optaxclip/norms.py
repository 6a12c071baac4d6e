"""How big, over what: functions from updates to norms.

The *scope* of a norm, what it reduces over, shows in what it returns: a bare scalar for
all updates together, a tree of scalars for each leaf or group, arrays with kept
dimensions for each unit. Any such function of your own works in
:func:`optaxclip.clip_by` as well, as long as ``norm(c * updates) == abs(c) *
norm(updates)``.

All norms here are computed in float32 (float64 where a leaf is), neither overflow nor
underflow, have a finite derivative at zero, and mean the same inside ``shard_map``.
Leaves that are not floating or complex are ignored, and so is None. A NaN or an
infinity in a scope makes its norm NaN or infinite.
"""

import functools
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from optaxclip._arguments import mistakes
from optaxclip._measure import (
    forms,
    formulas,
    own_norms,
    scopes as _scopes,
    unit_norms as _unit_norms,
    units as _units,
)
from optaxclip._mesh import splits as _splits
from optaxclip._trees import leaves as _leaves

Axes = _unit_norms.Axes
Labels = formulas.Labels


def global_norm(updates: Any, *, ord: float = 2) -> jax.Array:
    r"""Returns the norm of all leaves taken as one vector.

    .. math:: \|u\|_p = \left(\sum_i |u_i|^p\right)^{1/p}

    Args:
      updates: tree of arrays.
      ord: p, at least 1; ``jnp.inf`` for the largest modulus.

    Returns:
      Scalar, shape ``()``; 0 for an empty tree.

    Examples:
      >>> updates = {"w": jnp.array([0.0, 3.0]), "b": jnp.array([4.0])}
      >>> print(optaxclip.global_norm(updates))
      5.0
      >>> print(optaxclip.global_norm(jnp.full(1000, 10.0, jnp.float16)))  # Optax: inf
      316.22775
    """
    return _exact(_bound(global_norm, ord=ord), updates)


def leaf_norms(updates: Any, *, ord: float = 2) -> Any:
    """Returns the norm of every leaf, a tree of scalars.

    Examples:
      >>> grads = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([-2.0])}
      >>> jax.tree.map(float, optaxclip.norms.leaf_norms(grads))
      {'b': 2.0, 'w': 5.0}
    """
    return _exact(_bound(leaf_norms, ord=ord), updates)


def leaf_rms(updates: Any) -> Any:
    """Returns the root mean square of every leaf, ``norm / sqrt(size)``.

    Examples:
      >>> optaxclip.norms.leaf_rms({"w": jnp.array([1.0, -7.0])})["w"].item()
      5.0
    """
    return _exact(leaf_rms, updates)


def unit_norms(updates: Any, *, ord: float = 2, axis: Axes = None) -> Any:
    """Returns the norm of every unit (an output neuron, say), with the dimensions kept.

    Args:
      updates: tree of arrays.
      ord: p of the norm, at least 1.
      axis: the axes within a unit, or a mapping from path patterns to axes. None, and
        any leaf no pattern matches, goes by rank as in Optax: all axes of scalars,
        vectors and arrays with one dimension larger than 1; axis 0 of rank 2 and 3
        (kernels with the input first); all but the last of rank 4 and 5 (convolutions).

    Raises:
      ValueError: a leaf has rank 6 or more and no axis, or an axis out of range; a leaf
        is split over devices inside ``shard_map``, where its type doesn't say along
        which axis: :func:`optaxclip.over_axes` does.

    Examples:
      >>> kernel = jnp.array([[3.0, 0.0], [4.0, 1.0]])  # two inputs, two outputs
      >>> print(optaxclip.norms.unit_norms({"kernel": kernel})["kernel"])
      [[5. 1.]]

    References:
      Brock et al., `High-Performance Large-Scale Image Recognition Without
      Normalization <https://arxiv.org/abs/2102.06171>`_, 2021
    """
    return _exact(_bound(unit_norms, ord=ord, axis=axis), updates)


def group_norms(labels: Labels = None, *, ord: float = 2) -> _scopes.Norm:
    """Returns a norm that gives each leaf the norm of its group.

    Args:
      labels: None, where a group is a layer: the leaves under one module path, which of
        flat names such as ``layers.3.weight`` is all before the last dot; a mapping
        from path patterns to labels; or a function from the updates to a tree of
        labels. Leaves with equal labels are one group.
      ord: p of the norm, at least 1.

    Raises:
      TypeError: ``labels`` is neither of these.
      ValueError: from the norm, where a leaf has no label or a pattern matches nothing.

    Examples:
      >>> grads = {"dense": {"kernel": jnp.array([3.0]), "bias": jnp.array([4.0])}}
      >>> jax.tree.map(float, optaxclip.norms.group_norms()(grads))
      {'dense': {'bias': 5.0, 'kernel': 5.0}}
    """
    formulas.checked(ord)
    if labels is not None and not isinstance(labels, Mapping) and not callable(labels):
        raise TypeError(
            "Expected `labels` to be None, a mapping from path patterns to labels, or a"
            f" function from updates to a tree of labels, got {labels!r}."
        )
    return functools.partial(_exact_group_norms, labels=labels, ord=ord)


def excluding(norm: _scopes.Norm, exclude: str | Sequence[str]) -> _scopes.Norm:
    """Returns a norm that does not count some leaves; the clip still scales them.

    For a leaf that is there twice (tied weights, of which each copy has the whole
    gradient), so that it counts once, and for frozen leaves that still get a gradient.
    In a norm of leaves, one that does not count has norm 0 and is never clipped.

    Args:
      norm: any norm.
      exclude: path patterns of the leaves that don't count.

    Raises:
      TypeError: ``norm`` is not a function, or a pattern not a string.
      ValueError: from the norm, where a pattern matches nothing.

    Examples:
      >>> norm = optaxclip.norms.excluding(optaxclip.global_norm, "head")
      >>> table = jnp.array([3.0, 4.0])
      >>> grads = {"embedding": table, "head": table}  # tied
      >>> print(norm(grads))
      5.0
      >>> updates, _ = optaxclip.clip_by(norm, 1.0).update(grads, None)
      >>> print(updates["head"])
      [0.6 0.8]
    """
    if not callable(norm):
        raise TypeError(f"Expected `excluding(norm, exclude)`, got norm={norm!r}.")
    mistakes.norm(norm)
    if not isinstance(exclude, str | list | tuple):
        raise TypeError(
            f"Expected `exclude` to be a path pattern or several, got {exclude!r}."
        )
    patterns = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    return functools.partial(_exact_excluding, norm=norm, exclude=patterns)


def formula(norm: _scopes.Norm) -> _scopes.Formula:
    """Returns the plain formula of ``norm``, for those who rescue it themselves."""
    function = norm.func if isinstance(norm, functools.partial) else norm
    if not isinstance(function, types.FunctionType) or function not in _FORMULAS:
        return functools.partial(own_norms.formula_of, norm)
    return _known_formula(norm)


@functools.lru_cache
def _known_formula(norm: Any) -> _scopes.Formula:
    if isinstance(norm, functools.partial):
        return functools.partial(_FORMULAS[norm.func], *norm.args, **norm.keywords)
    return _FORMULAS[norm]


def is_partition(norm: _scopes.Norm) -> bool:
    """Returns whether it is an L2 norm in which every leaf counts, in one scope."""
    options = norm.keywords if isinstance(norm, functools.partial) else {}
    function = norm.func if isinstance(norm, functools.partial) else norm
    known = function in (global_norm, leaf_norms, _exact_group_norms)
    return known and options.get("ord", 2) == 2


def _bound(function: Callable[..., Any], /, **options: Any) -> _scopes.Norm:
    """Returns the same function for the same options: it is compiled once."""
    try:
        return _bound_once(function, **options)
    except TypeError:  # a mapping
        return functools.partial(function, **options)


@functools.lru_cache(typed=True)
def _bound_once(function: Callable[..., Any], /, **options: Any) -> _scopes.Norm:
    return functools.partial(function, **options)


def _exact(norm: _scopes.Norm, updates: Any) -> Any:
    leaves = _leaves.flatten(updates)
    measured = _scopes.measure(formula(norm), leaves)
    norms = measured.sizes()
    if _units.EVERYTHING in measured.scopes:
        return norms
    by_leaf = _units.of_leaf(norms, measured.scopes, leaves)
    if isinstance(norms, _units.Units):
        pairs = zip(by_leaf, leaves.measured(), strict=True)
        by_leaf = [x if x.ndim else x.reshape((1,) * leaf.ndim) for x, leaf in pairs]
    return leaves.tree(by_leaf)


def _exact_group_norms(updates: Any, *, labels: Labels, ord: float) -> Any:
    return _exact(_bound(_exact_group_norms, labels=labels, ord=ord), updates)


def _exact_excluding(
    updates: Any, *, norm: _scopes.Norm, exclude: tuple[str, ...]
) -> Any:
    return _exact(_bound(_exact_excluding, norm=norm, exclude=exclude), updates)


def _excluding(
    updates: Any,
    splits: _splits.Splits,
    *,
    norm: _scopes.Norm,
    exclude: tuple[str, ...],
) -> forms.Plain:
    return formulas.excluding(updates, splits, formula(norm), exclude)


_FORMULAS: dict[Any, Callable[..., forms.Plain]] = {
    global_norm: formulas.global_norm,
    leaf_norms: formulas.leaf_norms,
    leaf_rms: formulas.leaf_rms,
    unit_norms: _unit_norms.unit_norms,
    _exact_group_norms: formulas.group_norms,
    _exact_excluding: _excluding,
}
