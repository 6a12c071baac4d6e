"""What the tests of mistakes share."""

import jax
import jax.numpy as jnp

TREE = {"dense": {"bias": jnp.ones(2), "kernel": jnp.ones((3, 2))}}

CHAIN = r"put in a chain: `optax\.chain\(clip, optax\.adam\(1e-3\)\)`"


def step(tx, updates=TREE, params=TREE):
    """Builds and traces a step, as a first try would."""
    return jax.eval_shape(lambda u, p: tx.update(u, tx.init(p), p), updates, params)
