"""Runs of a rule over a history of norms."""

import jax
import jax.numpy as jnp
import numpy as np

import helpers
import in_numpy


def updates_of_norm(norm):
    return {"w": jnp.array([0.6, 0.8]) * norm}


def run(clip, sizes, make=updates_of_norm):
    """`(norms, max_norms, norms of the results)` step by step, and the last state."""
    state = clip.init(make(sizes[0]))
    update = jax.jit(clip.update)
    seen = []
    for size in sizes:
        updates, state = update(make(size), state)
        after = [
            in_numpy.vector_norm([x]) for x in helpers.truth(jax.tree.leaves(updates))
        ]
        seen.append((np.asarray(state.norms), helpers.shown(state.max_norms), after))
    measured, allowed, results = (np.array(x) for x in zip(*seen, strict=True))
    return measured, allowed, results, state
