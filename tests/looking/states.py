"""Updates and the states that they leave."""

import jax.numpy as jnp

TREE = {
    "Dense_0": {"bias": jnp.array([0.0]), "kernel": jnp.array([[3.0]])},
    "Dense_1": {"bias": jnp.array([6.0]), "kernel": jnp.array([[8.0]])},
}


def state_of(tx, steps=1):
    state = tx.init(TREE)
    for _ in range(steps):
        _, state = tx.update(TREE, state, TREE)
    return state
