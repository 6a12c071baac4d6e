"""How is each leaf split over devices? By its type, or by what the user says.

Only inside ``shard_map`` and ``pmap`` does it matter: there a leaf is one device's
piece. Under ``jit`` with sharded arrays every leaf is whole (see `spread`), and so it
is in a ``pmap`` without an ``axis_name``.
"""

import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import PartitionSpec

from optaxclip._arguments import contexts
from optaxclip._mesh import collectives
from optaxclip._trees import paths as _paths
from optaxclip._trees.leaves import Leaves

Axes = collectives.Axes


class Split(NamedTuple):
    """How one leaf is split.

    Attributes:
      axes: the mesh axes over which the pieces differ.
      dimensions: those that split each dimension, the first by the largest pieces;
        None if nothing says so.
    """

    axes: Axes
    dimensions: tuple[Collection[str], ...] | None

    def along(self, dimensions: Sequence[int]) -> Axes:
        """Returns the mesh axes that split some dimensions, which have to be known."""
        known = self.dimensions or ()
        some = [known[d] for d in dimensions if d < len(known)]
        return frozenset[str]().union(*some)

    def whole_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Returns the shape of the whole leaf, given that of a piece."""
        return tuple(n * copies(self.along([d])) for d, n in enumerate(shape))


Splits = tuple[Split, ...]  # of the counted leaves

WHOLE = Split(frozenset(), ())

Specs = tuple[tuple[str, PartitionSpec], ...]  # by path

# Set while a function that `over_axes` returned runs. It is part of the key of all of
# JAX's caches of traces, so that none of them serves a function with other specs.
_specs: Any = jax.make_user_context(None)


def over_axes(fun: Any, specs: Any) -> Any:
    """Tells a clip how the leaves are split over devices, where their types don't.

    Inside ``shard_map`` a clip reads off the type of each leaf over which mesh axes its
    pieces differ, and needs nothing. Two things types can't say. There are none in
    ``shard_map(..., check_vma=False)`` and in ``pmap`` with an ``axis_name``; where all
    devices hold the same params, as they usually do in ``pmap``, pass
    ``PartitionSpec()``. And they say over which axes a leaf is split, not along which
    of its dimensions, which a norm of units (:func:`optaxclip.adaptive_grad_clip`) has
    to know. There, pass the specs that you have for ``shard_map`` anyway:

    .. code-block:: python

      optimizer = optax.chain(
          optaxclip.over_axes(optaxclip.adaptive_grad_clip(0.01), param_specs),
          optax.sgd(0.1, momentum=0.9),
      )

    Under ``jit`` a clip needs nothing, and is faster if told: in a mesh of automatic
    axes that ``jax.set_mesh`` has set, all norms are then summed over devices at once.

    Guarantees:
      * A clip means the same as on one device: norms are of whole leaves, and a leaf
        that every device holds whole counts once.
      * Outside of ``shard_map`` and ``pmap`` the specs alter no result; arrays that are
        spread in another way are moved to be measured. They alter nothing at all where
        no mesh is set or a leaf can't be shared evenly.

    Args:
      fun: clip, any other transformation that has clips in it, or a function of updates
        such as :func:`optaxclip.global_norm`.
      specs: tree of ``jax.sharding.PartitionSpec``, of the structure of the updates or
        a prefix of it. ``PartitionSpec()`` is a leaf that every device holds whole,
        such as one after ``jax.lax.pmean``.

    Returns:
      The same transformation or function, which reads the splits from ``specs``.

    Raises:
      TypeError: ``fun`` or a spec is of the wrong type.
      ValueError: when tracing, a leaf without a spec; a spec that has more dimensions
        than its leaf or an unknown axis; a leaf whose type says it is split over more
        axes, as a gradient is that has not been summed over devices.

    Examples:
      >>> mesh = jax.sharding.Mesh(jax.devices()[:1], ("data",))
      >>> spec = jax.sharding.PartitionSpec("data")
      >>> clip = optaxclip.over_axes(optaxclip.clip_by_global_norm(1.0), spec)
      >>> step = jax.shard_map(
      ...     lambda grads: clip.update(grads, None)[0],
      ...     mesh=mesh,
      ...     in_specs=spec,
      ...     out_specs=spec,
      ...     check_vma=False,
      ... )
      >>> print(jax.jit(step)(jnp.array([3.0, 4.0])))
      [0.6 0.8]
    """
    return contexts.told(
        fun,
        _specs,
        _by_path(specs),
        lambda tree: None,
        "over_axes(clip_by_global_norm(1.0), specs)",
    )


def splits(leaves: Leaves) -> Splits:
    """Returns how each counted leaf is split.

    Raises:
      ValueError: nothing says so, or the specs don't fit.
    """
    if not leaves.counted or not collectives.manual_axes():
        return (WHOLE,) * len(leaves.counted)
    counted = [leaves.leaves[i] for i in leaves.counted]
    specs = said(counted, leaves.paths())
    if specs is None:
        return by_type(leaves)
    every = zip(counted, specs, leaves.paths(), strict=True)
    return tuple(_by_spec(*one) for one in every)


def said(leaves: Sequence[Any], paths: Sequence[str]) -> list[PartitionSpec] | None:
    """Returns what the user says of each leaf, None if nothing; raises if unfit."""
    if _specs.value is None:
        return None
    found = [_spec_of(path, _specs.value) for path in paths]
    for leaf, spec, path in zip(leaves, found, paths, strict=True):
        _check_fits(leaf, spec, path)
    return found


def dimensions_of(spec: PartitionSpec) -> tuple[tuple[str, ...], ...]:
    """Returns the mesh axes that split each dimension."""
    return tuple((e,) if isinstance(e, str) else tuple(e or ()) for e in spec)


def by_type(leaves: Leaves) -> Splits:
    """Returns how each counted leaf is split according to its type.

    Raises:
      ValueError: types are not kept.
    """
    _check_types_are_kept()
    axes = [collectives.varying_axes(leaves.leaves[i]) for i in leaves.counted]
    return tuple(Split(some, None) if some else WHOLE for some in axes)


def copies(axes: Axes) -> int:
    """Returns the number of devices along some mesh axes."""
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape[axis] for axis in axes)


def types_are_kept() -> bool:
    """Returns whether types say over which manual mesh axes a value varies."""
    manual = collectives.manual_axes()
    return all(a in collectives.varying_axes(jax.lax.axis_index(a)) for a in manual)


def _by_path(specs: Any) -> Specs:
    found, _ = jax.tree.flatten(specs, is_leaf=_is_spec)
    for spec in [None] if specs is None else found:
        if not _is_spec(spec):
            raise TypeError(
                "Expected `specs` to be a tree of jax.sharding.PartitionSpec, got"
                f" {spec!r} of type {type(spec).__name__}. Call `over_axes(clip,"
                " specs)`."
            )
    return tuple(zip(_paths.paths(specs, is_leaf=_is_spec), found, strict=True))


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)


def _spec_of(path: str, specs: Specs) -> PartitionSpec:
    """Returns the spec of a leaf, or else that of the smallest subtree it is in."""
    found = [
        (len(prefix), spec)
        for prefix, spec in specs
        if prefix in ("", path) or path.startswith(prefix + "/")
    ]
    if not found:
        raise ValueError(
            "Every leaf needs a spec in `over_axes`: there is none for"
            f" {path!r}, only for {[prefix for prefix, _ in specs]}."
        )
    return max(found, key=lambda some: some[0])[1]


def _check_fits(leaf: Any, spec: PartitionSpec, path: str) -> None:
    mesh = jax.sharding.get_abstract_mesh()
    known = [e for e in spec if e is not PartitionSpec.UNCONSTRAINED]
    named = frozenset[str]().union(*dimensions_of(PartitionSpec(*known)))
    unknown = named - set(mesh.axis_names)
    if unknown or len(known) < len(spec) or len(spec) > np.ndim(leaf):
        raise ValueError(
            f"Expected a spec for the shape {np.shape(leaf)} of {path!r} on the mesh"
            f" axes {list(mesh.axis_names)}, got {spec}."
        )


def _by_spec(leaf: Any, spec: PartitionSpec, path: str) -> Split:
    manual = jax.sharding.get_abstract_mesh().manual_axes
    dimensions = tuple(
        tuple(axis for axis in axes if axis in manual) for axes in dimensions_of(spec)
    )
    split = Split(frozenset[str]().union(*dimensions), dimensions)
    varying = collectives.varying_axes(leaf)
    if varying - split.axes or (types_are_kept() and varying != split.axes):
        raise ValueError(
            f"Expected {path!r} to be split as its spec says, {spec}, got a leaf that"
            f" differs over the mesh axes {sorted(varying)} by its type. If it is one"
            " device's share of a gradient, call `jax.lax.psum` or `jax.lax.pmean`"
            " before clipping; else correct the spec."
        )
    return split


def _check_types_are_kept() -> None:
    if not types_are_kept():
        manual = sorted(map(str, collectives.manual_axes()))
        raise ValueError(
            "Expected to know over which mesh axes each leaf is split, which"
            f" `shard_map(..., check_vma=False)` and `pmap` over {manual} don't record."
            " Where every device holds the whole of each, as after `pmean` in `pmap`,"
            " say so: `optaxclip.over_axes(clip, PartitionSpec())`. Else use"
            " `shard_map(..., check_vma=True)`, or `over_axes(clip, specs)`."
        )
