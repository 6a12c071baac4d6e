"""Runs with a record around the optimizer, and how their histories are compared."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import helpers
from helpers import oc

PARAMS = helpers.random_tree(seed=9)
PATHS = ("dense/bias", "dense/kernel", "head/kernel")
SIZE = 4  # so that a run of ten steps has stretches, too


def clipped_sgd(momentum=0.9):
    return optax.chain(oc.clip_by_global_norm(5.0), optax.sgd(0.01, momentum))


def clip_then_sgd(max_norm=5.0, rate=0.01):
    return optax.chain(oc.clip_by_global_norm(max_norm), optax.sgd(rate))


def steps(scales, shapes=helpers.SHAPES):
    """Gradients of one step after another, one tree: each leaf has a first axis."""
    trees = [
        jax.tree.map(
            lambda x, s=scale: x * np.float32(s),
            helpers.random_tree(seed=i, shapes=shapes),
        )
        for i, scale in enumerate(scales)
    ]
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


def scanned(tx, params, grads, **extra_args):
    """Params and state after all steps, and the updates of each."""

    def body(carry, xs):
        params, state = carry
        updates, state = tx.update(xs[0], state, params, **xs[1])
        return (optax.apply_updates(params, updates), state), updates

    return jax.lax.scan(body, (params, tx.init(params)), (grads, extra_args))


def run(tx, scales, params=PARAMS, **extra_args):
    """The state after steps of these sizes, by `scan`."""
    tx, grads = optax.with_extra_args_support(tx), steps(scales)
    (_, state), _ = jax.jit(lambda p, g, x: scanned(tx, p, g, **x))(
        params, grads, extra_args
    )
    return state


def sizes(grads):
    """Global L2 norm of each step, in float64."""
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(grads)]
    return np.sqrt(sum(np.sum(x.reshape(len(x), -1) ** 2, axis=1) for x in leaves))


def assert_same(ours, expected, rtol=0.0):
    """Two histories with the same columns in the same order, whole numbers exactly."""
    assert list(ours) == list(expected)
    for name, column in expected.items():
        exact = rtol == 0 or column.dtype == np.int64
        np.testing.assert_allclose(
            ours[name], column, rtol=0 if exact else rtol, err_msg=name
        )
        assert ours[name].dtype == column.dtype
