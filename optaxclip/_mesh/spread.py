"""How are whole leaves spread over devices? By their types, or by what the user says.

On explicit mesh axes types say so, on others `over_axes` may. Then a norm is measured
in a ``shard_map``, where every leaf is the piece that a device has: so all norms take
one sum over devices, and small leaves can be joined.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from optaxclip._mesh import splits as _splits
from optaxclip._mesh.splits import Split, Splits
from optaxclip._trees import paths as _paths


class Spread(NamedTuple):
    """Over which mesh leaves are spread, and how each of them."""

    mesh: Any
    specs: list[PartitionSpec]

    def splits(self) -> Splits:
        """Returns the same of the pieces that a device has, inside ``shard_map``."""
        every = [_splits.dimensions_of(spec) for spec in self.specs]
        return tuple(Split(frozenset[str]().union(*one), one) for one in every)

    def of_units(self, places: Sequence[int], shape: Sequence[int]) -> PartitionSpec:
        """Returns how an array of units of some leaves is spread.

        Args:
          places: of the leaves, one for each row of the array.
          shape: that of a row: the leaf's, reduced dimensions of size 1.
        """
        pairs = zip(self.specs[places[0]] if places else (), shape, strict=False)
        kept = (None if size == 1 else axes for axes, size in pairs)
        return PartitionSpec(None, *kept)

    def placed(self, arrays: Any, specs: Any) -> Any:
        """Returns arrays spread as specs say, which without types the compiler does."""
        if AxisType.Auto in self.mesh.axis_types:
            return arrays
        shardings = jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), specs)
        return jax.sharding.reshard(arrays, shardings)


def of(updates: Any) -> Spread | None:
    """Returns how leaves are spread over a mesh; None if nothing says it of all."""
    leaves = jax.tree.leaves(updates)
    kinds = [jax.typeof(leaf).sharding for leaf in leaves]
    current = jax.sharding.get_abstract_mesh()
    typed = {kind.mesh for kind in kinds if kind.mesh.size > 1}
    mesh, *others = typed or {current}
    if others:
        return None
    if typed and set(mesh.axis_types) == {AxisType.Explicit}:
        return Spread(mesh, [kind.spec for kind in kinds])
    if mesh == current and set(mesh.axis_types) == {AxisType.Auto}:
        return _by_specs(leaves, _paths.paths(updates))
    return None


def _by_specs(leaves: Sequence[Any], paths: Sequence[str]) -> Spread | None:
    specs = _splits.said(leaves, paths)
    spread = Spread(jax.sharding.get_abstract_mesh(), specs or [])
    splits = spread.splits()
    if not any(split.axes for split in splits):
        return None
    for leaf, split in zip(leaves, splits, strict=True):
        parts = [_splits.copies(split.along([d])) for d in range(leaf.ndim)]
        if any(size % count for size, count in zip(leaf.shape, parts, strict=True)):
            return None  # `shard_map` takes none that devices can't share evenly
    return spread
