"""Meshes, specs and layouts that the tests of meshes share."""

import jax
from jax.sharding import AxisType, PartitionSpec as P

import helpers

SHAPES = {"dense": {"bias": (8,), "kernel": (8, 4)}, "head": {"kernel": (4, 8)}}

LAYOUTS = {
    "mixed": {
        "dense": {"bias": P(), "kernel": P("data", "model")},
        "head": {"kernel": P(None, "model")},
    },
    "replicated": {"dense": {"bias": P(), "kernel": P()}, "head": {"kernel": P()}},
    "one_axis": {
        "dense": {"bias": P("data"), "kernel": P("data", None)},
        "head": {"kernel": P(None, "data")},
    },
    "two_axes": {
        "dense": {"bias": P(("data", "model")), "kernel": P("data", "model")},
        "head": {"kernel": P("data", "model")},
    },
    "one_dimension_over_two_axes": {
        "dense": {"bias": P("model"), "kernel": P(("model", "data"))},
        "head": {"kernel": P(None, ("data", "model"))},
    },
}
SCALES = (1.0, 1e25, 1e-25)


def grid(kind=AxisType.Auto):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)


def case(scale=1.0):
    updates = helpers.random_tree(seed=1, scale=2 * scale, shapes=SHAPES)
    return updates, helpers.random_tree(seed=2, scale=scale, shapes=SHAPES)
