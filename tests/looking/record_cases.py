"""Runs that are recorded, and what comes of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from helpers import oc
from optaxclip._looking import record as _record

PARAMS = {
    "dense": {"bias": jnp.ones(2), "kernel": jnp.ones((2, 2))},
    "head": jnp.ones(1),
}
PATHS = ("dense/bias", "dense/kernel", "head")


def gradients(steps, bad=()):
    """Normal numbers times 1, 2, ...; at the bad steps one of `dense/bias` is NaN."""
    rng = np.random.default_rng(0)

    def one(step):
        tree = jax.tree.map(lambda x: (1 + step) * rng.normal(size=x.shape), PARAMS)
        if step in bad:
            tree["dense"]["bias"][1] = np.nan
        return jax.tree.map(np.float32, tree)

    return [one(step) for step in range(steps)]


def run(tx, grads, losses=None, state=None):
    """The last state and all updates, by `scan`."""
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *grads)
    losses = jnp.arange(float(len(grads))) if losses is None else jnp.asarray(losses)

    @jax.jit
    def scanned(state, stacked, losses):
        def body(state, xs):
            updates, state = tx.update(xs[0], state, PARAMS, value=xs[1])
            return state, updates

        return jax.lax.scan(body, state, (stacked, losses))

    return scanned(tx.init(PARAMS) if state is None else state, stacked, losses)


def optimizer(clip=None):
    clip = oc.clip_by_leaf_norm(2.0) if clip is None else clip
    return optax.chain(clip, optax.sgd(0.1, momentum=0.9))


def l2(tree):
    leaves = [np.ravel(x).astype(float) for x in jax.tree.leaves(tree)]
    return np.linalg.norm(np.concatenate(leaves))


def rows(state):
    return _record.rows(state, PATHS)
