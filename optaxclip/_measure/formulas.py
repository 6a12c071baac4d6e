"""The plain formulas of the norms, which over- and underflow: `forms` makes them exact.

Each takes the tree of counted leaves, in the dtype of the arithmetic, and how every
leaf is split over devices.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip._measure import (
    forms,
    layouts,
    names as _names,
    reduce,
    scopes as _scopes,
    stacks as _stacks,
    units as _units,
)
from optaxclip._mesh import splits as _splits
from optaxclip._trees import leaves as _leaves, paths as _paths

Labels = Mapping[str, Hashable] | Callable[[Any], Any] | None


def global_norm(updates: Any, splits: _splits.Splits, *, ord: float = 2) -> forms.Plain:
    del updates
    checked(ord)

    def scaled(updates: Any, layout: layouts.Layout) -> forms.Scaled:
        leaves = jax.tree.leaves(updates)
        alone = [None] * len(leaves)  # layers or not, it is the same sum
        every = [(0,)] * len(leaves)
        pieces = layouts.pieces(leaves, every, splits, alone, layout)
        return lambda scale: reduce.norms(pieces, scale, 1, ord, layout)[0]

    return forms.Plain(scaled, (_units.EVERYTHING,))


def leaf_norms(updates: Any, splits: _splits.Splits, *, ord: float = 2) -> forms.Plain:
    groups = range(len(jax.tree.leaves(updates)))
    return _norms_of(groups, updates, splits, checked(ord))


def leaf_rms(updates: Any, splits: _splits.Splits) -> forms.Plain:
    _leaves.check_dense(updates, "a root mean square")
    plain, counts = leaf_norms(updates, splits), sizes(updates, splits)

    def scaled(updates: Any, layout: layouts.Layout) -> forms.Scaled:
        norms = plain.scaled(updates, layout)
        roots = np.sqrt(np.array(counts, float))
        return lambda scale: (found := norms(scale)) / roots.astype(found.dtype)

    return plain._replace(scaled=scaled)


def sizes(updates: Any, splits: _splits.Splits) -> list[int]:
    """Returns how many elements each leaf has, or each layer in it."""
    found = []
    leaves, stacks = jax.tree.leaves(updates), _stacks.of(updates, splits)
    for leaf, split, stack in zip(leaves, splits, stacks, strict=True):
        size = leaf.size * _splits.copies(split.axes)
        found += [size // stack.layers] * stack.layers if stack else [size]
    return found


def group_norms(
    updates: Any, splits: _splits.Splits, *, labels: Labels, ord: float
) -> forms.Plain:
    groups = _labels(updates, labels)
    for position, label in enumerate(groups):
        if isinstance(label, jax.Array) or not isinstance(label, Hashable):
            raise TypeError(
                f"Expected labels such as strings, got {label!r} of type"
                f" {type(label).__name__} at {_paths.paths(updates)[position]!r}."
            )
    layers = groups if labels is None else ()
    names = {layer: str(layer) or _names.ROOT for layer in layers}
    return _norms_of(groups, updates, splits, ord, names)


def _norms_of(
    groups: Sequence[Hashable],
    updates: Any,
    splits: _splits.Splits,
    ord: float,
    names: Mapping[Any, str] = MappingProxyType({}),
) -> forms.Plain:
    """Returns the norms of groups of leaves, of every layer in a stack by itself.

    Args:
      groups: that of each leaf.
      updates: tree of the leaves.
      splits: how each is split.
      ord: p of the norm.
      names: of the groups, where these are not those of their leaves.
    """
    stacks = _stacks.of(updates, splits)
    members: dict[tuple[Any, Any, int], list[int]] = {}
    rows = []
    for i, (group, stack) in enumerate(zip(groups, stacks, strict=True)):
        layers = range(stack.layers if stack else 1)
        own = [(group, stack and (stack.root, stack.depth), n) for n in layers]
        for key in own:
            members.setdefault(key, []).append(i)
        rows.append(own)
    numbers = {key: number for number, key in enumerate(members)}
    places = [tuple(numbers[key] for key in own) for own in rows]
    count = len(members)

    def scaled(updates: Any, layout: layouts.Layout) -> forms.Scaled:
        leaves = jax.tree.leaves(updates)
        pieces = layouts.pieces(leaves, places, splits, stacks, layout)
        return lambda scale: reduce.norms(pieces, scale, count, ord, layout)

    def every_name() -> _names.Names:
        found = _names.of_scopes(list(members.values()), _paths.paths(updates))
        return [
            _names.of_layer(names.get(group, base and base.path), stack, layer)
            for base, (group, stack, layer) in zip(found, members, strict=True)
        ]

    scopes = tuple(map(tuple, members.values()))
    return forms.Plain(scaled, scopes, names=every_name)


def excluding(
    updates: Any,
    splits: _splits.Splits,
    formula: _scopes.Formula,
    exclude: tuple[str, ...],
) -> forms.Plain:
    matching = _paths.matching(exclude, _paths.paths(updates), "`exclude`")
    treedef = jax.tree.structure(updates)

    def counted(updates: Any) -> Any:
        pairs = zip(jax.tree.leaves(updates), matching, strict=True)
        return treedef.unflatten(
            [jnp.zeros_like(leaf) if is_out else leaf for leaf, is_out in pairs]
        )

    def scaled(updates: Any, layout: layouts.Layout) -> forms.Scaled:
        return plain.scaled(counted(updates), layout)

    plain = formula(counted(updates), splits)
    return plain._replace(scaled=scaled)


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


def checked(ord: float) -> float:
    """Returns ``ord`` if there is a norm of that order, and raises otherwise."""
    if isinstance(ord, bool) or not isinstance(ord, int | float) or not ord >= 1:
        raise ValueError(
            f"Expected ord >= 1, got ord={ord!r}. Use 1, 2, jnp.inf or any p."
        )
    return ord
