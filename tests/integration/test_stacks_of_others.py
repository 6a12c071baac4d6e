"""Real training stacks: the cases that broke a first design, and every tree library."""

import functools
from typing import Any

import chex
import equinox
import flax.linen
import flax.training.train_state
import haiku
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import helpers
import in_numpy
import table
from helpers import oc
from optaxclip import norms, thresholds
from table import TABLE

# --------------------------------------------------------------------------------------
# 1. An nnx optimizer with path patterns and layer groups
# --------------------------------------------------------------------------------------


class Network(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.second = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x):
        return self.second(jax.nn.relu(self.first(x)))


def nnx_loss(model):
    return 100.0 * jnp.sum(model(jnp.ones((2, 3))) ** 2)


def nnx_step(clip):
    """One step of SGD with rate 1: (gradients, updates, optimizer, model)."""
    model = Network(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.chain(clip, optax.sgd(1.0)), wrt=nnx.Param)
    before = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    gradients = nnx.grad(nnx_loss)(model)

    @nnx.jit
    def update(model, optimizer):
        optimizer.update(model, nnx.grad(nnx_loss)(model))

    update(model, optimizer)
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    moved = jax.tree.map(lambda a, b: a - b, before, after)
    return nnx.to_pure_dict(gradients), moved, optimizer, model


def test_an_nnx_optimizer_takes_path_patterns():
    clip = oc.clip_by_value({"first/kernel": 0.5, "first": 0.25, "**": 0.125})
    gradients, moved, _, _ = nnx_step(clip)
    limits = {
        "first": {"bias": 0.25, "kernel": 0.5},
        "second": {"bias": 0.125, "kernel": 0.125},
    }
    expected = jax.tree.map(lambda g, c: jnp.clip(g, -c, c), gradients, limits)
    chex.assert_trees_all_close(moved, expected, atol=1e-6)


def test_an_nnx_optimizer_groups_by_layer():
    gradients, moved, _, _ = nnx_step(oc.clip_by_group_norm(1.0))
    size = {k: in_numpy.vector_norm(jax.tree.leaves(gradients[k])) for k in gradients}
    assert all(norm > 1 for norm in size.values())
    expected = {
        k: jax.tree.map(lambda g, n=size[k]: g / n, gradients[k]) for k in gradients
    }
    chex.assert_trees_all_close(moved, expected, atol=1e-6)


def test_an_nnx_optimizer_keeps_a_state_per_layer():
    gradients, _, optimizer, _ = nnx_step(oc.clip_by_group_norm(1.0))
    state = nnx.to_pure_dict(nnx.state(optimizer))["opt_state"]
    measured = [x for x in jax.tree.leaves(state) if jnp.shape(x) == (2,)]
    sizes = [in_numpy.vector_norm(jax.tree.leaves(gradients[k])) for k in gradients]
    assert any(np.allclose(x, sizes, rtol=1e-5) for x in measured)


def test_an_nnx_optimizer_takes_a_per_leaf_rule_over_several_steps():
    clip = oc.clip_by(norms.leaf_norms, thresholds.lagged(optax.ema(0.9)))
    model = Network(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.chain(clip, optax.sgd(1e-4)), wrt=nnx.Param)

    @nnx.jit
    def update(model, optimizer):
        optimizer.update(model, nnx.grad(nnx_loss)(model))

    for _ in range(3):
        update(model, optimizer)
    chex.assert_tree_all_finite(nnx.to_pure_dict(nnx.state(model, nnx.Param)))


# --------------------------------------------------------------------------------------
# 2. No state, and an empty one
# --------------------------------------------------------------------------------------


# A threshold with a memory needs its state.
NEEDS_STATE = {
    "value_schedule",
    "global_norm_schedule",
    "bare_rule",
    "relative_to_params",
    "lagged_global",
    "lagged_leaf",
    "clipped_history",
    "mean_plus_std",
    "window_percentile",
    "streaming_quantile",
    "mapping_of_rules",
    "autoclip",
    "zclip",
    "adagc",
    "k_sigma_clip",
    "aggc",
    "stable_spam_clip",
    "relative_step",
    "spectral_norm",
    *table.REMEMBERING,
}


@pytest.mark.parametrize("name", [n for n in TABLE if n not in NEEDS_STATE])
def test_a_constant_threshold_needs_no_state(name):
    clip = TABLE[name].make()
    updates, params = helpers.updates_and_params()

    def step(updates, params):
        without, nothing = clip.update(updates, None, params)
        empty, state = clip.update(updates, optax.EmptyState(), params)
        assert nothing is None
        assert state == optax.EmptyState()
        return without, empty, clip.update(updates, clip.init(params), params)[0]

    without, empty, expected = jax.jit(step)(updates, params)
    helpers.assert_close(without, expected)
    helpers.assert_close(empty, expected)


# --------------------------------------------------------------------------------------
# 3. inject_hyperparams without static_args (the contract runs every named clip)
# --------------------------------------------------------------------------------------


def test_an_injected_threshold_can_be_changed_between_steps_without_a_new_trace():
    tx = optax.inject_hyperparams(oc.clip_by_global_norm)(max_norm=1.0)
    updates = {"w": jnp.array([3.0, 4.0])}
    update = jax.jit(chex.assert_max_traces(tx.update, n=1))
    clipped, state = update(updates, tx.init(updates), updates)
    np.testing.assert_allclose(clipped["w"], [0.6, 0.8], rtol=1e-6)
    state.hyperparams["max_norm"] = jnp.float32(2.0)
    clipped, state = update(updates, state, updates)
    np.testing.assert_allclose(clipped["w"], [1.2, 1.6], rtol=1e-6)


def test_an_injected_schedule_is_followed():
    tx: Any = optax.inject_hyperparams(oc.clip_by_value)(limit=lambda n: 1.0 + n)
    updates = {"w": jnp.array([-9.0, 0.5])}
    _, state = tx.update(updates, tx.init(updates), updates)
    clipped, _ = tx.update(updates, state, updates)
    np.testing.assert_array_equal(clipped["w"], [-2.0, 0.5])


# --------------------------------------------------------------------------------------
# 4. A mapping as an argument of jit
# --------------------------------------------------------------------------------------


def test_a_mapping_of_limits_is_a_jit_argument():
    updates = {"a": jnp.array([5.0]), "b": {"c": jnp.array([-5.0])}}

    @jax.jit
    @functools.partial(chex.assert_max_traces, n=1)
    def step(limits, updates):
        return oc.clip_by_value(limits).update(updates, None)[0]

    # JAX sorts the keys, so the order written here can't matter.
    step({"b": 3.0, "**": 1.0}, updates)
    clipped = step({"b": 4.0, "**": 2.0}, updates)
    chex.assert_trees_all_equal(
        clipped, {"a": jnp.array([2.0]), "b": {"c": jnp.array([-4.0])}}
    )


def test_a_mapping_of_norms_is_a_jit_argument_that_can_be_vmapped():
    updates = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([6.0, 8.0])}

    def step(limits):
        return oc.clip_by_leaf_norm(limits).update(updates, None)[0]

    limits = {"b": jnp.array([1.0, 20.0]), "a": jnp.array([1.0, 10.0])}
    clipped = jax.jit(jax.vmap(step))(limits)
    np.testing.assert_allclose(clipped["a"], [[0.6, 0.8], [3.0, 4.0]], rtol=1e-6)
    np.testing.assert_allclose(clipped["b"], [[0.6, 0.8], [6.0, 8.0]], rtol=1e-6)


# --------------------------------------------------------------------------------------
# Tree libraries
# --------------------------------------------------------------------------------------


class Dense(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x):
        x = flax.linen.relu(flax.linen.Dense(4)(x))
        return flax.linen.Dense(1)(x)


def test_a_linen_train_state_trains_with_layer_groups():
    model = Dense()
    x, y = jnp.ones((8, 3)), 1e3 * jnp.ones((8, 1))
    params = model.init(jax.random.key(0), x)
    tx = optax.chain(oc.clip_by_group_norm(1.0), optax.sgd(0.1))
    state = flax.training.train_state.TrainState.create(
        apply_fn=model.apply, params=params, tx=tx
    )

    @jax.jit
    def step(state):
        def loss(params):
            return jnp.mean((state.apply_fn(params, x) - y) ** 2)

        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    after = step(state)
    moved = jax.tree.map(lambda a, b: a - b, state.params, after.params)["params"]
    sizes = [in_numpy.vector_norm(jax.tree.leaves(moved[k])) for k in moved]
    np.testing.assert_allclose(sizes, [0.1, 0.1], rtol=1e-3)
    assert after.opt_state[0].norms.shape == (2,)


def test_a_boxed_linen_tree_has_the_paths_of_the_bare_one():
    boxed = {
        "first": {"kernel": flax.linen.Partitioned(jnp.array([9.0]), names=("a",))},
        "second": {"kernel": flax.linen.Partitioned(jnp.array([9.0]), names=("a",))},
    }
    clip = oc.clip_by_value({"first/kernel": 1.0, "**": 2.0})
    clipped, _ = clip.update(boxed, clip.init(boxed))
    assert float(clipped["first"]["kernel"].value[0]) == 1.0
    assert float(clipped["second"]["kernel"].value[0]) == 2.0


def test_an_equinox_module_is_clipped_by_layer_and_by_pattern():
    model = equinox.nn.MLP(3, 1, 4, depth=1, key=jax.random.key(0))
    tx: Any = optax.chain(
        oc.clip_by_group_norm(1.0),
        oc.clip_by_value({"layers/0/weight": 0.25, "**": 1.0}),
    )
    params = equinox.filter(model, equinox.is_inexact_array)
    state = tx.init(params)

    @equinox.filter_jit
    def step(model, state):
        gradients = equinox.filter_grad(lambda m: 1e3 * jnp.sum(m(jnp.ones(3))))(model)
        return gradients, *tx.update(gradients, state, params)

    gradients, updates, state = step(model, state)
    layers = zip(updates.layers, gradients.layers, strict=True)
    for index, (layer, raw) in enumerate(layers):
        size = in_numpy.vector_norm(jax.tree.leaves(helpers.truth(raw)))
        weight = np.asarray(raw.weight) / max(1.0, size)
        limit = 0.25 if index == 0 else 1.0
        np.testing.assert_allclose(
            layer.weight, np.clip(weight, -limit, limit), rtol=1e-5, atol=1e-7
        )
    assert state[0].norms.shape == (2,)


def test_a_haiku_tree_is_clipped_by_layer_and_by_pattern():
    network = haiku.without_apply_rng(
        haiku.transform(lambda x: haiku.nets.MLP([4, 1])(x))
    )
    params = network.init(jax.random.key(0), jnp.ones((2, 3)))
    gradients = jax.tree.map(lambda x: jnp.full_like(x, 10.0), params)
    by_layer = oc.clip_by_group_norm(1.0)
    clipped, state = by_layer.update(gradients, by_layer.init(params))
    assert state.norms.shape == (2,)
    sizes = [in_numpy.vector_norm(jax.tree.leaves(clipped[k])) for k in clipped]
    np.testing.assert_allclose(sizes, [1.0, 1.0], rtol=1e-6)

    by_pattern = oc.clip_by_value({"linear_0/w": 1.0, "**": 2.0})
    clipped, _ = by_pattern.update(gradients, by_pattern.init(params))
    largest = {k: float(jnp.max(clipped[k]["w"])) for k in clipped}
    assert sorted(largest.values()) == [1.0, 2.0]
    assert largest["mlp/~/linear_0"] == 1.0
