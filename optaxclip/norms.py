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
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optaxclip import _leaves, _mesh, _paths, _reduce, _scopes

Axis = int | tuple[int, ...]
Axes = Axis | Mapping[str, Axis] | None
Labels = Mapping[str, Hashable] | Callable[[Any], Any] | None


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
    return _exact(_with_ord(global_norm, ord), updates)


def leaf_norms(updates: Any, *, ord: float = 2) -> Any:
    """Returns the norm of every leaf, a tree of scalars.

    Examples:
      >>> grads = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([-2.0])}
      >>> jax.tree.map(float, optaxclip.norms.leaf_norms(grads))
      {'b': 2.0, 'w': 5.0}
    """
    return _exact(_with_ord(leaf_norms, ord), updates)


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
        which axis.

    Examples:
      >>> kernel = jnp.array([[3.0, 0.0], [4.0, 1.0]])  # two inputs, two outputs
      >>> print(optaxclip.norms.unit_norms({"kernel": kernel})["kernel"])
      [[5. 1.]]

    References:
      Brock et al., `High-Performance Large-Scale Image Recognition Without
      Normalization <https://arxiv.org/abs/2102.06171>`_, 2021
    """
    return _exact(functools.partial(unit_norms, ord=ord, axis=axis), updates)


def group_norms(labels: Labels = None, *, ord: float = 2) -> _scopes.Norm:
    """Returns a norm that gives each leaf the norm of its group.

    Args:
      labels: None, where a group is a layer: the leaves under one module path; a
        mapping from path patterns to labels; or a function from the updates to a tree
        of labels. Leaves with equal labels are one group.
      ord: p of the norm, at least 1.

    Raises:
      TypeError: ``labels`` is neither of these.
      ValueError: from the norm, where a leaf has no label or a pattern matches nothing.

    Examples:
      >>> grads = {"dense": {"kernel": jnp.array([3.0]), "bias": jnp.array([4.0])}}
      >>> jax.tree.map(float, optaxclip.norms.group_norms()(grads))
      {'dense': {'bias': 5.0, 'kernel': 5.0}}
    """
    _checked(ord)
    if labels is not None and not isinstance(labels, Mapping) and not callable(labels):
        raise TypeError(
            "Expected `labels` to be None, a mapping from path patterns to labels, or a"
            f" function from updates to a tree of labels, got {labels!r}."
        )
    return functools.partial(_exact_group_norms, labels=labels, ord=ord)


@functools.lru_cache(typed=True)
def formula(norm: _scopes.Norm) -> _scopes.Formula:
    """Returns the plain formula of ``norm``, for those who rescue it themselves."""
    if isinstance(norm, functools.partial) and norm.func in _FORMULAS:
        return functools.partial(_FORMULAS[norm.func], *norm.args, **norm.keywords)
    known = isinstance(norm, types.FunctionType) and norm in _FORMULAS
    return _FORMULAS[norm] if known else functools.partial(_scopes.formula_of, norm)


@functools.lru_cache(typed=True)
def _with_ord(norm: Callable[..., Any], ord: float) -> _scopes.Norm:
    """Returns the same function for the same ``ord``: it is compiled once."""
    return functools.partial(norm, ord=ord)


def _exact(norm: _scopes.Norm, updates: Any) -> Any:
    leaves = _leaves.flatten(updates)
    measured = _scopes.measure(formula(norm), leaves)
    norms = measured.sizes()
    if _scopes.EVERYTHING in measured.scopes:
        return norms
    by_leaf = _scopes.of_leaf(norms, measured.scopes, len(leaves.counted))
    if isinstance(norms, _scopes.Units):
        pairs = zip(by_leaf, leaves.measured(), strict=True)
        by_leaf = [x if x.ndim else x.reshape((1,) * leaf.ndim) for x, leaf in pairs]
    return leaves.tree(by_leaf)


def _global_norm(updates: Any, *, ord: float = 2) -> _scopes.Plain:
    leaves = jax.tree.leaves(updates)
    norms = _scope_norms(leaves, [0] * len(leaves), 1, _checked(ord))

    def scaled(scale: float) -> jax.Array:
        return norms(scale)[0]

    return _scopes.Plain(scaled(1.0), (_scopes.EVERYTHING,), scaled)


def _leaf_norms(updates: Any, *, ord: float = 2) -> _scopes.Plain:
    leaves = jax.tree.leaves(updates)
    norms = _scope_norms(leaves, range(len(leaves)), len(leaves), _checked(ord))
    return _scopes.Plain(norms(1.0), tuple((i,) for i in range(len(leaves))), norms)


def _leaf_rms(updates: Any) -> _scopes.Plain:
    leaves = jax.tree.leaves(updates)
    copies = [jax.lax.psum(1, tuple(sorted(_mesh.varying_axes(x)))) for x in leaves]
    sizes = [x.size * n for x, n in zip(leaves, copies, strict=True)]
    norms, scopes, scaled = _leaf_norms(updates)
    roots = jnp.sqrt(jnp.asarray(sizes, norms.dtype))
    return _scopes.Plain(norms / roots, scopes, lambda scale: scaled(scale) / roots)


def _exact_group_norms(updates: Any, *, labels: Labels, ord: float) -> Any:
    norm = functools.partial(_exact_group_norms, labels=labels, ord=ord)
    return _exact(norm, updates)


def _group_norms(updates: Any, *, labels: Labels, ord: float) -> _scopes.Plain:
    groups: dict[Hashable, list[int]] = {}
    for position, label in enumerate(_labels(updates, labels)):
        groups.setdefault(label, []).append(position)
    members = list(groups.values())
    numbers = {i: number for number, some in enumerate(members) for i in some}
    leaves = jax.tree.leaves(updates)
    scopes = [numbers[i] for i in range(len(leaves))]
    norms = _scope_norms(leaves, scopes, len(members), ord)
    return _scopes.Plain(norms(1.0), tuple(map(tuple, members)), norms)


def _scope_norms(
    leaves: Sequence[jax.Array], scopes: Sequence[int], count: int, ord: float
) -> Callable[[float], jax.Array]:
    """Returns a function from a scale to the norms of the scopes 0, 1, ..."""
    pieces = _reduce.pieces(leaves, scopes)
    return lambda scale: _reduce.norms(pieces, scale, count, ord)


def _labels(updates: Any, labels: Labels) -> Sequence[Hashable]:
    paths = _paths.paths(updates)
    if labels is None:
        return [_paths.layer(path) for path in paths]
    if isinstance(labels, Mapping):
        return [labels[winner] for winner in _paths.cover(labels, paths, "`labels`")]
    tree = labels(updates)
    try:
        return jax.tree.structure(updates).flatten_up_to(tree)
    except ValueError as error:
        raise ValueError(
            "Expected `labels` to return a tree of labels of the structure of the"
            f" updates, {jax.tree.structure(updates)}, got {jax.tree.structure(tree)}."
        ) from error


def _unit_norms(updates: Any, *, ord: float = 2, axis: Axes = None) -> _scopes.Plain:
    leaves = jax.tree.leaves(updates)
    paths = _paths.paths(updates)
    axes: list[Axis | None] = [None if isinstance(axis, Mapping) else axis] * len(
        leaves
    )
    if isinstance(axis, Mapping):
        winners = _paths.resolve(axis, paths, "`axis`")
        axes = [None if winner is None else axis[winner] for winner in winners]
    reduced = [_unit_axes(*one) for one in zip(leaves, axes, paths, strict=True)]

    is_whole = tuple(
        len({a % x.ndim for a in some}) == x.ndim
        for x, some in zip(leaves, reduced, strict=True)
    )
    whole = [x for x, alone in zip(leaves, is_whole, strict=True) if alone]
    of_whole = _scope_norms(whole, range(len(whole)), len(whole), _checked(ord))
    others = [
        (x, some)
        for x, some, alone in zip(leaves, reduced, is_whole, strict=True)
        if not alone
    ]

    def norms(scale: float) -> _scopes.Units:
        parts = [_reduce.kept_norm(x, scale, some, ord) for x, some in others]
        return _scopes.Units(of_whole(scale), parts, is_whole)

    return _scopes.Plain(norms(1.0), tuple((i,) for i in range(len(leaves))), norms)


def _unit_axes(leaf: jax.Array, axis: Axis | None, path: str) -> tuple[int, ...]:
    if _mesh.varying_axes(leaf):
        raise ValueError(
            f"Expected whole leaves for a norm of units, got {path!r} split over the"
            f" mesh axes {sorted(_mesh.varying_axes(leaf))}: its type doesn't say"
            " along which of its dimensions. Clip outside of `shard_map`, or use a norm"
            " of leaves or groups."
        )
    axes = (axis,) if isinstance(axis, int) else axis
    if axes is None:
        if sum(size > 1 for size in leaf.shape) <= 1:
            return tuple(range(leaf.ndim))
        if leaf.ndim > 5:
            raise ValueError(
                f"Expected a rank of at most 5, got shape {leaf.shape} at {path!r}."
                " Name the axes of a unit with `axis`."
            )
        return (0,) if leaf.ndim < 4 else tuple(range(leaf.ndim - 1))
    if not isinstance(axes, tuple) or not all(isinstance(a, int) for a in axes):
        raise TypeError(
            f"Expected `axis` to be static, an int or a tuple, got {axis!r}."
        )
    if not all(-leaf.ndim <= a < leaf.ndim for a in axes):
        raise ValueError(
            f"Expected axes within shape {leaf.shape} at {path!r}, got axis={axis}."
            " Give each rank its own axes: `axis={pattern: axes}`."
        )
    return axes


def _checked(ord: float) -> float:
    if isinstance(ord, bool) or not isinstance(ord, int | float) or not ord >= 1:
        raise ValueError(
            f"Expected ord >= 1, got ord={ord!r}. Use 1, 2, jnp.inf or any p."
        )
    return ord


_FORMULAS: dict[Any, Callable[..., _scopes.Plain]] = {
    global_norm: _global_norm,
    leaf_norms: _leaf_norms,
    leaf_rms: _leaf_rms,
    unit_norms: _unit_norms,
    _exact_group_norms: _group_norms,
}
