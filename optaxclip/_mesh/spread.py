"""How are whole leaves spread over devices? Their types say so on explicit mesh axes.

Inside a ``shard_map`` over these every leaf is the piece that a device has.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType, PartitionSpec

from optaxclip._mesh.splits import Split, Splits


class Spread(NamedTuple):
    """Over which mesh leaves are spread, and how each of them."""

    mesh: Any
    specs: list[PartitionSpec]

    def splits(self) -> Splits:
        """Returns the same of the pieces that a device has, inside ``shard_map``."""
        every = [
            tuple((e,) if isinstance(e, str) else tuple(e or ()) for e in spec)
            for spec in self.specs
        ]
        return tuple(Split(frozenset[str]().union(*one), one) for one in every)


def by_type(leaves: Sequence[Any]) -> Spread | None:
    """Returns how leaves are spread over a mesh; None unless all axes are explicit."""
    kinds = [jax.typeof(leaf).sharding for leaf in leaves]
    meshes = {kind.mesh for kind in kinds if kind.mesh.size > 1}
    if len(meshes) != 1:
        return None
    (mesh,) = meshes
    if any(kind != AxisType.Explicit for kind in mesh.axis_types):
        return None
    return Spread(mesh, [kind.spec for kind in kinds])
