"""Losses, batches and the loop over examples that these tests share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec as P

import helpers
from helpers import oc

BATCH = 10


def linear_loss(params, x):
    """Its gradient is the example itself."""
    products = jax.tree.map(lambda p, g: jnp.sum(p * g.astype(p.dtype)), params, x)
    return sum(jax.tree.leaves(products))


def network_loss(params, x, y):
    hidden = jnp.tanh(x @ params["dense"]["kernel"] + params["dense"]["bias"])
    return jnp.mean((hidden @ params["head"]["kernel"] - y) ** 2)


def network_case(batch=BATCH):
    params = helpers.random_tree(seed=3)
    rng = np.random.default_rng(4)
    x = rng.normal(size=(batch, 4)).astype(np.float32)
    return params, x, (10 * rng.normal(size=(batch, 2))).astype(np.float32)


def examples(batch=BATCH, dtype="float32", seed=5, scale=2.0):
    shapes = jax.tree.map(
        lambda shape: (batch, *shape), helpers.SHAPES, is_leaf=helpers.is_shape
    )
    return helpers.random_tree(dtype, seed=seed, scale=scale, shapes=shapes)


def zeros(dtype="float32"):
    return jax.tree.map(
        lambda shape: jnp.zeros(shape, dtype), helpers.SHAPES, is_leaf=helpers.is_shape
    )


def row(tree, i):
    return jax.tree.map(lambda x: x[i], tree)


def grid(kind=AxisType.Auto):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)


@functools.cache
def expected_case():
    params, x, y = network_case(32)
    grad_fn = oc.per_example_clipped_grad(network_loss, 0.7)
    return (params, x, y), *jax.jit(grad_fn)(params, x, y)


ROWS = oc.PerExample(P("data"), P("data"), P("data"), P("data"), P(), P(), P())


def seen_of(norms_, max_norm):
    """What a clip says of gradients with these norms."""
    x = jnp.asarray(norms_, jnp.float32)
    return oc.per_example_clipped_grad(lambda p, x: p * x, max_norm)(0.0, x)[1]
