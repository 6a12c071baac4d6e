"""Guards and optimizers that the tests of this wing share, and steps that go wrong."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec as P

import helpers
import table
from helpers import oc
from optaxclip import norms, thresholds

NONFINITE = (np.nan, np.inf, -np.inf)
PATHS = ("dense/bias", "dense/kernel", "head/kernel")

every_bad = pytest.mark.parametrize("bad", NONFINITE, ids=str)
every_guard = pytest.mark.parametrize(
    "guard", [oc.skip_if_nonfinite, oc.skip_if_spike], ids=["nonfinite", "spike"]
)

OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.1, momentum=0.9),
    "adam": lambda: optax.adam(0.1),
    "adafactor": lambda: optax.adafactor(0.1, min_dim_size_to_factor=2),
    "lion": lambda: optax.lion(0.1),
    "clip": lambda: optax.chain(
        oc.clip_by(norms.leaf_norms, thresholds.lagged(table.ema_times(1.5))),
        optax.adam(0.1),
    ),
    "noise": lambda: optax.chain(
        optax.add_noise(0.1, 0.5, jax.random.key(0)), optax.sgd(0.1)
    ),
    "schedule": lambda: optax.inject_hyperparams(optax.sgd)(
        learning_rate=optax.linear_schedule(1.0, 0.0, 10)
    ),
}


def bits(tree):
    """As in the helpers, of keys of random numbers as well."""

    def data(x):
        is_key = jnp.issubdtype(jnp.asarray(x).dtype, jax.dtypes.prng_key)
        return jax.random.key_data(x) if is_key else x

    return helpers.bits(jax.tree.map(data, tree))


def stepper(tx):
    """`(params, state, updates, **extra) -> (params, state)`, compiled."""
    tx = optax.with_extra_args_support(tx)

    @jax.jit
    def step(params, state, updates, **extra_args):
        updates, state = tx.update(updates, state, params, **extra_args)
        return optax.apply_updates(params, updates), state

    return step


@functools.cache
def guarded(name, guard=oc.skip_if_nonfinite):
    tx = guard(OPTIMIZERS[name]())
    return tx, stepper(tx)


def params_with_negative_zeros(dtype="float32"):
    return helpers.vary(helpers.random_tree(dtype, seed=3), "dense/kernel", -0.0)


def broken(tree, path, bad):
    is_complex = jnp.iscomplexobj(jax.tree.leaves(tree)[0])
    return helpers.vary(tree, path, complex(1, bad) if is_complex else bad)


def taken(before, after):
    return int(after.skipped_count) == int(before.skipped_count)


GUARDS = {
    "nonfinite": lambda: oc.skip_if_nonfinite(optax.adam(0.1)),
    "spike": lambda: oc.skip_if_spike(optax.adam(0.1)),
    "spike_decay": lambda: oc.skip_if_spike(
        optax.adam(0.1),
        norms.leaf_norms,
        thresholds.mean_plus_std(3.0, decay=0.9),
    ),
    "zero": oc.zero_nonfinite,
}

SHAPES = {"dense": {"bias": (8,), "kernel": (8, 4)}, "head": {"kernel": (4, 8)}}
SPECS = {
    "dense": {"bias": P(), "kernel": P("data", "model")},
    "head": {"kernel": P(None, "model")},
}


def grid(kind=AxisType.Auto):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
