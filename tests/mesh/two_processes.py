"""One of several processes that clip on one mesh, each with four devices of its own.

`test_processes.py` starts them:  python two_processes.py ADDRESS NUMBER FILE

Every clip runs on one device of the process, then on the mesh that all share. The file
gets, as JSON, how far the two are apart, and a hash of every piece that is held here.
"""

import functools
import hashlib
import itertools
import json
import os
import sys
import traceback
from pathlib import Path

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

import helpers
import table
from helpers import oc

PROCESSES = 2
DEVICES = 4  # of each process
CLIPS = (  # those whose ways through the code differ
    "value",
    "global_norm",
    "global_norm_ord_3",
    "leaf_norm",
    "layer_norm",
    "group_norm_mapping",
    "block_rms",
    "agc",
    "relative_to_params",
    "lagged_leaf",
)
SETTINGS = ("jit", "shard_map", "shard_map_without_types")
# Each in one setting, in turn, and two in all: `test_meshes.py` has the product.
CASES = list(
    dict.fromkeys(
        [
            *zip(CLIPS, itertools.cycle(SETTINGS), strict=False),
            *itertools.product(("global_norm", "agc"), SETTINGS),
        ]
    )
)
SIZES = (1.0, 1e25, 1e-25)  # of updates and thresholds; params are of size 1
HISTORIES = ("lagged_leaf",)  # thresholds relative to past norms have no size
UNITS = ("agc",)  # types don't tell how they are split

SHAPES = {"dense": {"bias": (8,), "kernel": (8, 4)}, "head": {"kernel": (4, 8)}}
SPECS = {
    "dense": {"bias": P(), "kernel": P("data", "model")},
    "head": {"kernel": P(None, "model")},
}


def two_steps(name, specs=None):
    """The clip's second step, on updates three times as large as in its first."""

    def step(updates, params, t):
        clip = table.clips[name](t)
        if specs is not None:
            clip = oc.over_axes(clip, specs)
        _, state = clip.update(updates, clip.init(params), params)
        return clip.update(jax.tree.map(lambda x: 3 * x, updates), state, params)

    return step


def make_mesh():
    """(data 4, model 2); the first half of `data` is in the first process."""
    devices = np.array(jax.devices()).reshape(-1, 2)
    return Mesh(devices, ("data", "model"))


def on_mesh(name, setting, mesh):
    if setting == "jit":
        return jax.jit(two_steps(name))
    types = setting == "shard_map"
    step = jax.shard_map(
        two_steps(name, SPECS if name in UNITS or not types else None),
        mesh=mesh,
        in_specs=(SPECS, SPECS, P()),
        out_specs=(SPECS, P()),
        check_vma=types,
    )
    return jax.jit(step)


def spread(tree, mesh):
    """Puts on every device its piece of a tree that all processes hold whole."""

    def put(x, spec):
        sharding = NamedSharding(mesh, spec)
        return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])

    return jax.tree.map(put, tree, SPECS)


def deviation(got, want):
    """Of any element from the whole array, relative to the largest in it."""
    want = np.asarray(want, np.float64)
    size = np.max(np.abs(want), initial=0.0, where=np.isfinite(want)) or 1.0
    largest = [0.0]
    for shard in got.addressable_shards:
        piece, right = np.asarray(shard.data, np.float64), want[shard.index]
        apart = np.zeros_like(right)  # also where both are the same infinity
        np.subtract(piece, right, where=piece != right, out=apart)
        largest.append(np.max(np.abs(apart), initial=0.0) / size)
    return float(np.max(largest))


def hashes(leaf):
    """By the place of each piece in the array, one per device."""
    found = {}
    for shard in leaf.addressable_shards:
        data = hashlib.sha256(np.asarray(shard.data).tobytes()).hexdigest()
        found.setdefault(str(shard.index), []).append(data)
    return found


@functools.cache
def on_one_device(name):
    return jax.jit(two_steps(name))


def compare(name, setting, mesh):
    """By size and leaf: how far from one device, and the hashes of what was found."""
    alone, together = on_one_device(name), on_mesh(name, setting, mesh)
    deviations, found = {}, {}
    for size in SIZES:
        trees = [
            helpers.random_tree(seed=1, scale=size, shapes=SHAPES),
            helpers.random_tree(seed=2, shapes=SHAPES),
        ]
        updates, params = jax.device_get(trees)
        t = np.float32(1 if name in HISTORIES else size)
        expected = jax.tree.leaves(alone(updates, params, t))
        got = together(spread(updates, mesh), spread(params, mesh), t)
        leaves = zip(helpers.paths_of(got), jax.tree.leaves(got), expected, strict=True)
        for path, leaf, want in leaves:
            case = f"{name}, {setting}, {size:g}, {path}"
            deviations[case], found[case] = deviation(leaf, want), hashes(leaf)
    return deviations, found


def recorded(updates, params):
    """The record of six steps, of which the fifth is NaN."""
    clip = oc.clip_by_global_norm(1.0)
    tx = oc.record(optax.chain(clip, optax.sgd(0.1)), size=2)
    state = tx.init(params)
    for step, size in enumerate((1.0, 2.0, 3.0, 4.0, np.nan, 5.0)):
        grads = jax.tree.map(lambda x, size=size: size * x, updates)
        _, state = tx.update(grads, state, params, value=np.float32(step))
    return state


def compare_histories(mesh):
    """How far each column is from that of one device, as both are read here."""
    updates, params = jax.device_get(
        [helpers.random_tree(seed=seed, shapes=SHAPES) for seed in (1, 2)]
    )
    want = oc.history(jax.jit(recorded)(updates, params), params)
    state = jax.jit(recorded)(spread(updates, mesh), spread(params, mesh))
    got = oc.history(state, params)
    assert list(got) == list(want)
    apart = {k: np.abs(got[k] - x) / np.maximum(np.abs(x), 1) for k, x in want.items()}
    missing = {k: np.isnan(got[k]) != np.isnan(x) for k, x in want.items()}
    return {k: float(np.nanmax([0, *x, *missing[k]])) for k, x in apart.items()}


def main(address, number, file):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        address, PROCESSES, int(number), initialization_timeout=60
    )
    mesh = make_mesh()
    owners = [[device.process_index for device in row] for row in mesh.devices]
    deviations, found = {}, {}
    for name, setting in CASES:
        some_deviations, some = compare(name, setting, mesh)
        deviations |= some_deviations
        found |= some
    report = {"owners": owners, "deviations": deviations, "hashes": found}
    report["history"] = compare_histories(mesh)
    Path(file).write_text(json.dumps(report))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # at once: a usual end waits for the other processes
