"""Which arrays are layers in a stack? What the user says, by path patterns.

A model that goes through its layers by ``jax.lax.scan`` keeps each weight of all of
them in one array, ``[layers, ...]``. Nothing in the array tells.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip._arguments import contexts
from optaxclip._mesh import collectives, splits as _splits
from optaxclip._trees import paths as _paths
from optaxclip._trees.leaves import Leaves

# Set while a function that `over_layers` returned runs, like the specs of `over_axes`.
_axes: Any = jax.make_user_context(None)


class Stack(NamedTuple):
    """The layers in one leaf.

    Attributes:
      axis: which of the leaf's goes over the layers.
      ndim: how many it has.
      size: how many layers the device has.
      layers: how many there are, on all devices together.
      depth: how many parts of the path name the module that they are layers of.
      root: the path of that module.
      split: the mesh axes that spread them over devices, the first by the most layers.
    """

    axis: int
    ndim: int
    size: int
    layers: int
    depth: int
    root: str
    split: Sequence[str]

    def first(self) -> jax.Array:
        """Returns which layer is the device's first."""
        return collectives.index(self.split) * self.size

    def own(self, every: jax.Array) -> jax.Array:
        """Returns the device's own of numbers for all layers."""
        if not self.split:
            return every
        return jax.lax.dynamic_slice_in_dim(every, self.first(), self.size)

    def every(self, own: jax.Array, fill: float = 0.0) -> jax.Array:
        """Returns the numbers of all layers, the last axis, from the device's own."""
        if not self.split:
            return own
        empty = jnp.full_like(own, fill, shape=(*own.shape[:-1], self.layers))
        first = self.first()
        empty = collectives.vary_like(empty, own, first)
        return jax.lax.dynamic_update_slice_in_dim(empty, own, first, axis=-1)

    def kept(self, every: jax.Array) -> jax.Array:
        """Returns the device's own as an array with the dimensions of the leaf."""
        shape = [-1 if i == self.axis else 1 for i in range(self.ndim)]
        return self.own(every).reshape(shape)


Stacks = Sequence[Stack | None]  # of the counted leaves


def over_layers(fun: Any, stacks: Mapping[str, int | None]) -> Any:
    """Tells a clip which arrays are stacks of layers, so that it sees each by itself.

    A model whose layers are a ``scan`` (``nn.scan``, ``nnx.scan``, MaxText, Levanter,
    Equinox with ``filter_vmap``) keeps a weight of all layers in one array. A norm of
    leaves or groups then goes over all layers: a spike in one shrinks the others too.

    .. code-block:: python

      clip = optaxclip.over_layers(optaxclip.clip_by_group_norm(1.0), {"blocks": 0})

    Wrap one clip, or the whole optimizer with all guards and clips in it. Every norm of
    leaves, groups and units sees the layers then as if each had arrays of its own: so
    do rules with a history, :func:`adaptive_grad_clip` with its axes, the culprit of a
    guard, and :func:`summary`, ``clip/norm/blocks/3/attention/kernel``. The global norm
    is what it was. A threshold for a pattern is for all layers.

    Guarantees:
      * The result is that of the tree with the layers taken apart.
      * The number of kernels does not grow with the number of layers, and under
        ``jit`` no leaf is gathered, along whatever axes it is spread over devices.

    Args:
      fun: clip, any other transformation that has clips in it, or a function of
        updates such as :func:`optaxclip.norms.leaf_norms`, which then returns an
        array with the dimensions kept for each stack.
      stacks: the axis that goes over the layers by path pattern, ``{"blocks": 0}``.
        The pattern names the module that there are many of; None exempts a subtree of
        it. The most specific pattern wins.

    Returns:
      The same transformation or function.

    Raises:
      TypeError: ``fun`` or an axis is of the wrong type.
      ValueError: when tracing, a pattern that matches nothing, a leaf without that
        axis, leaves of one stack with different numbers of layers; inside
        ``shard_map``, a leaf that is split and has no spec (:func:`over_axes`).

    Examples:
      >>> clip = optaxclip.over_layers(optaxclip.clip_by_leaf_norm(1.0), {"blocks": 0})
      >>> grads = {"blocks": {"kernel": jnp.array([[3.0, 4.0], [0.3, 0.4]])}}
      >>> updates, state = clip.update(grads, clip.init(grads))
      >>> print(updates["blocks"]["kernel"])
      [[0.6 0.8]
       [0.3 0.4]]
      >>> print(list(optaxclip.summary(state, grads))[:2])
      ['clip/norm/blocks/0/kernel', 'clip/norm/blocks/1/kernel']
    """
    axes = _checked(stacks)

    def check(tree: Any) -> None:
        patterns = [pattern for pattern, _ in axes]
        _paths.matching(patterns, _paths.paths(tree), "`stacks`")

    return contexts.told(
        fun, _axes, axes, check, "over_layers(clip_by_leaf_norm(1.0), stacks)"
    )


def of_leaves(leaves: Leaves) -> Stacks:
    """Returns the stack that each counted leaf is."""
    if _axes.value is None:
        return [None] * len(leaves.counted)
    counted = [leaves.leaves[i] for i in leaves.counted]
    return of(leaves.tree(counted), _splits.splits(leaves))


def of(updates: Any, splits: _splits.Splits) -> Stacks:
    """Returns the stack that each leaf is.

    Raises:
      ValueError: a leaf is none though a pattern says so.
    """
    leaves, axes = jax.tree.leaves(updates), _axes.value
    if axes is None:
        return [None] * len(leaves)
    rows = zip(leaves, splits, _paths.paths(updates), strict=True)
    found = [_stack(*row, dict(axes)) for row in rows]
    counts: dict[str, int] = {}
    for stack in found:
        if stack and counts.setdefault(stack.root, stack.layers) != stack.layers:
            raise ValueError(
                "Expected as many layers in every leaf of a stack, got"
                f" {counts[stack.root]} and {stack.layers} under {stack.root!r}. Exempt"
                " what is no stack by a pattern of its own: `{pattern: None}`."
            )
    return found


def _stack(
    leaf: Any, split: _splits.Split, path: str, axes: dict[str, int | None]
) -> Stack | None:
    (pattern,) = _paths.winners(axes, [path], "`stacks`")
    axis = None if pattern is None else axes[pattern]
    if pattern is None or axis is None:
        return None
    shape = np.shape(leaf)
    if not -len(shape) <= axis < len(shape):
        raise ValueError(
            f"Expected a leaf with the axis {axis} of its layers, got shape {shape} at"
            f" {path!r}. Exempt what is no stack by `{{pattern: None}}`."
        )
    axis %= len(shape)
    if split.axes and split.dimensions is None:
        raise ValueError(
            f"Expected to know along which of its dimensions {path!r} is split over the"
            f" mesh axes {sorted(split.axes)}, for a stack of layers: its type doesn't"
            " say. Pass its spec by `optaxclip.over_axes(clip, specs)`."
        )
    known = split.dimensions or ()
    along = tuple(known[axis]) if axis < len(known) else ()
    depth = _paths.depth(pattern, path)
    root = "/".join(path.split("/")[:depth])
    count = split.whole_shape(shape)[axis]
    return Stack(axis, len(shape), shape[axis], count, depth, root, along)


def _checked(stacks: Any) -> tuple[tuple[str, int | None], ...]:
    if not isinstance(stacks, Mapping) or not stacks:
        raise TypeError(
            "Expected `stacks` to map path patterns to the axis that goes over the"
            f' layers, such as {{"blocks": 0}}, got {stacks!r}.'
        )
    for pattern, axis in stacks.items():
        is_int = isinstance(axis, int | np.integer) and not isinstance(axis, bool)
        if axis is not None and not is_int:
            raise TypeError(
                f"Expected stacks[{pattern!r}] to be an axis or None, got {axis!r}."
            )
    return tuple((pattern, stacks[pattern]) for pattern in sorted(stacks))
