"""What comes of a step on pieces of arrays, on eight virtual devices?

A step takes updates, params and the size of the updates, and returns updates and a
state. It runs under `jit`, inside `shard_map` or in `pmap`; arrays are split as specs
say, and put together again.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

Tree = Any
Step = Callable[[Tree, Tree, Any], tuple[Tree, Any]]
Run = Callable[[Tree, Tree, Any], tuple[Tree, Any, bool]]  # are all copies equal?

DEVICES = 8
MESH = {"data": 4, "model": 2}
AUTO, EXPLICIT, PMAP = "jit Auto", "jit Explicit", "pmap"
TYPES, NO_TYPES = "shard_map, types", "shard_map, no types"
SETTINGS = (AUTO, EXPLICIT, TYPES, NO_TYPES, PMAP)


def tree(*leaves: Any) -> Tree:
    """Two layers: bias and kernel, bias and kernel."""
    keys = "bias", "kernel"
    first, second = (dict(zip(keys, leaves[i : i + 2], strict=True)) for i in (0, 2))
    return {"in": first, "out": second}


# Small leaves are joined before they are reduced; pieces of the first kernel are large,
# however it is split.
SHAPES = tree((128,), (256, 128), (64,), (128, 64))

ROWS, COLUMNS, BOTH = P("data"), P(None, "data"), P("data", "model")
LAYOUTS = {
    "replicated": tree(P(), P(), P(), P()),
    "one axis": tree(ROWS, ROWS, ROWS, COLUMNS),
    "two axes": tree(P(("data", "model")), BOTH, P(("model", "data")), BOTH),
    "mixed": tree(P(), BOTH, P("model"), COLUMNS),
}
PMAP_LAYOUTS = {  # pieces along the first dimension, over one axis of all devices
    "replicated": LAYOUTS["replicated"],
    "one axis": tree(ROWS, ROWS, ROWS, ROWS),
    "mixed": tree(P(), ROWS, ROWS, P()),
}


def layouts(setting: str) -> dict[str, Tree]:
    return PMAP_LAYOUTS if setting == PMAP else LAYOUTS


def spread(step: Step, setting: str, specs: Tree) -> Run:
    """Returns the compiled step, a function of whole arrays, on pieces of them."""
    return _in_pmap(step, specs) if setting == PMAP else _on_mesh(step, setting, specs)


def _on_mesh(step: Step, setting: str, specs: Tree) -> Run:
    kind = AxisType.Explicit if setting == EXPLICIT else AxisType.Auto
    mesh = jax.make_mesh(tuple(MESH.values()), tuple(MESH), (kind,) * 2)
    if setting in (TYPES, NO_TYPES):
        step = jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(specs, specs, P()),
            out_specs=(specs, P()),
            check_vma=setting == TYPES,
        )
    compiled = jax.jit(step)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)

    def run(updates, params, size):
        with jax.set_mesh(mesh):
            carried = jax.device_put((updates, params), (shardings, shardings))
            found = compiled(*carried, size)
        return *found, all(map(_copies_equal, jax.tree.leaves(found)))

    return run


def _copies_equal(x: jax.Array) -> bool:
    pieces: dict[str, list[Any]] = {}
    for shard in x.addressable_shards:
        pieces.setdefault(str(shard.index), []).append(shard.data)
    return all(map(_all_alike, pieces.values()))


def _all_alike(copies: Any) -> bool:
    return len({np.asarray(x).tobytes() for x in copies}) == 1


def _in_pmap(step: Step, specs: Tree) -> Run:
    axes = jax.tree.map(lambda spec: 0 if tuple(spec) else None, specs)
    mapped = jax.pmap(step, axis_name="data", in_axes=(axes, axes, 0))

    def cut(x, spec):
        return x.reshape(DEVICES, -1, *x.shape[1:]) if tuple(spec) else x

    def paste(x, spec):
        return x.reshape(-1, *x.shape[2:]) if tuple(spec) else x[0]

    def run(updates, params, size):
        pieces = (jax.tree.map(cut, x, specs) for x in (updates, params))
        found = jax.device_get(mapped(*pieces, jnp.full(DEVICES, size)))
        clipped, state = found
        leaves = zip(jax.tree.leaves(clipped), jax.tree.leaves(specs), strict=True)
        copies = [x for x, spec in leaves if not tuple(spec)] + jax.tree.leaves(state)
        whole = jax.tree.map(paste, clipped, specs)
        first = jax.tree.map(lambda x: x[0], state)
        return whole, first, all(map(_all_alike, copies))

    return run
