"""Is it the same on all devices? What is still to be summed over them must not pass."""

from typing import Any

import jax

from optaxclip._mesh import collectives
from optaxclip._mesh.splits import Axes, Splits, types_are_kept
from optaxclip._trees.leaves import Leaves


def check_summed(leaves: Leaves, params: Any) -> None:
    """Raises where updates still have to be summed over devices.

    An update that varies over a mesh axis is a piece of the whole, or one device's
    share of a sum. It can only be a piece where its parameter is one, too.
    """
    for place, i in enumerate(leaves.counted):
        if axes := collectives.unreduced_axes(leaves.leaves[i]):
            raise ValueError(_unsummed(leaves.paths()[place], axes))
    manual = collectives.manual_axes()
    if not manual or jax.tree.structure(params) != leaves.treedef:
        return
    every = jax.tree.leaves(params)
    for place, i in enumerate(leaves.counted):
        own = collectives.varying_axes(leaves.leaves[i])
        if axes := own - collectives.varying_axes(every[i]):
            raise ValueError(_unsummed(leaves.paths()[place], axes))


def check_same_everywhere(norms: Any, splits: Splits) -> None:
    """Raises unless what a norm of the user's own gives is the same on all devices."""
    axes = frozenset[str]().union(*(split.axes for split in splits))
    if axes and not types_are_kept():
        raise ValueError(
            "Expected a norm of `optaxclip.norms` where leaves are split over the mesh"
            f" axes {sorted(axes)} and no types say whether a norm of your own is the"
            " same on all devices. Use `shard_map(..., check_vma=True)`."
        )
    found = map(collectives.varying_axes, jax.tree.leaves(norms))
    if differ := axes & frozenset[str]().union(*found):
        raise ValueError(
            "Expected a norm that is the same on all devices, got one that differs over"
            f" the mesh axes {sorted(differ)}. Sum over devices in it, by"
            " `jax.lax.psum`, or build it from `optaxclip.norms`."
        )


def _unsummed(path: str, axes: Axes) -> str:
    return (
        f"Expected updates summed over devices, got {path!r} still to be summed over"
        f" the mesh axes {sorted(axes)}. Call `jax.lax.psum` or `jax.lax.pmean` before"
        " clipping."
    )
