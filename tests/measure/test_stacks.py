"""`over_layers`: layers stacked in one array are clipped as if each had its own."""

import functools

import chex
import equinox
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import helpers
from helpers import oc
from optaxclip import norms
from stack_cases import LAYERS, MAKERS, STACKS, trees


def apart(tree, axis=0):
    """The tree with a leaf for each layer, `blocks/3/attention/kernel`."""

    def layer(i):
        return jax.tree.map(lambda x: jnp.take(x, i, axis), tree["blocks"])

    return tree | {"blocks": {str(i): layer(i) for i in range(LAYERS)}}


KINDS = (  # the others repeat what these do
    *("leaf_norm", "group_norm", "global_norm", "user_norm", "agc_axis", "adagc"),
    *("window", "mapping", "clippy", "value", "stable_adamw", "in_a_chain", "guard"),
)
every_maker = pytest.mark.parametrize("name", helpers.all_but(MAKERS, KINDS))


@functools.cache
def runs(name):
    """Three steps of a clip told of the layers, and of one that sees them apart."""
    told, oracle = oc.over_layers(MAKERS[name](), STACKS), MAKERS[name]()
    _, params = trees()
    state, expected_state = told.init(params), oracle.init(apart(params))
    update, expect = jax.jit(told.update), jax.jit(oracle.update)
    rows = []
    for seed in range(3):
        updates, _ = trees(seed)
        got, state = update(updates, state, params)
        expected, expected_state = expect(apart(updates), expected_state, apart(params))
        rows.append((apart(got), expected))
    return rows, state, expected_state


@every_maker
def test_layers_are_clipped_as_if_each_had_arrays_of_its_own(name):
    for got, expected in runs(name)[0]:
        chex.assert_trees_all_close(got, expected, rtol=5e-6)


@every_maker
def test_each_layer_has_the_statistics_and_the_name_of_its_own_arrays(name):
    _, params = trees()
    _, state, expected_state = runs(name)
    if name == "stable_adamw":
        state, expected_state = state.clip_state, expected_state.clip_state
    got = dict(oc.summary(state, params))
    expected = dict(oc.summary(expected_state, apart(params)))
    assert got.keys() == expected.keys()
    expected.pop("guard/culprit", None)  # a number: apart, leaves have another order
    for key, value in expected.items():
        np.testing.assert_allclose(got[key], value, rtol=5e-6, err_msg=key)


@every_maker
def test_the_state_is_a_scan_carry_and_takes_vmap(name):
    told = oc.over_layers(MAKERS[name](), STACKS)
    updates, params = trees()
    fresh = told.init(params)
    shapes = jax.eval_shape(told.update, updates, fresh, params)
    assert helpers.types(shapes) == helpers.types((updates, fresh))
    pair = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), updates)
    batched = jax.eval_shape(jax.vmap(lambda u: told.update(u, fresh, params)[0]), pair)
    assert helpers.types(batched) == helpers.types(pair)


def test_the_layer_with_a_nan_is_the_culprit():
    updates, params = trees()
    updates["blocks"]["scale"] = updates["blocks"]["scale"].at[2, 1].set(jnp.nan)
    guard = oc.over_layers(oc.skip_if_nonfinite(optax.sgd(0.1)), STACKS)
    got, state = guard.update(updates, guard.init(params), params)
    assert all(np.all(x == 0) for x in jax.tree.leaves(got))
    assert "guard/culprit/blocks/2/scale" in oc.summary(state, params)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_the_layer_of_which_the_outcome_is_not_finite_is_the_culprit(compiled):
    updates, params = trees()
    updates["blocks"]["scale"] = updates["blocks"]["scale"].at[2].set(0.0)
    inner = optax.adam(0.1, eps=0.0)  # 0 / 0
    guard = oc.over_layers(oc.skip_if_nonfinite(inner), STACKS)
    update = jax.jit(guard.update) if compiled else guard.update
    got, state = update(updates, guard.init(params), params)
    assert all(np.all(x == 0) for x in jax.tree.leaves(got))
    report = oc.summary(state, params)
    assert [x for x in report if "culprit/" in x] == ["guard/culprit/blocks/2/scale"]
    assert int(state.culprits.sum()) == 1


def test_a_nan_in_one_layer_spoils_that_layer_alone():
    updates, params = trees()
    updates["blocks"]["scale"] = updates["blocks"]["scale"].at[2, 1].set(jnp.nan)
    clip = oc.over_layers(oc.clip_by_group_norm(1.0), STACKS)
    got, _ = clip.update(updates, clip.init(params), params)
    bad = jnp.isnan(got["blocks"]["scale"])
    assert bad[2].all() and not bad[jnp.array([0, 1, 3])].any()
    chex.assert_tree_all_finite(got["blocks"]["attention"])


@pytest.mark.parametrize("pattern", ["blocks", "blocks/**", "/blocks", "b*"])
def test_a_pattern_names_the_module_that_there_are_many_of(pattern):
    updates, params = trees()
    clip = oc.over_layers(oc.clip_by_leaf_norm(1.0), {pattern: 0})
    _, state = clip.update(updates, clip.init(params))
    assert "clip/norm/blocks/3/attention/kernel" in oc.summary(state, params)


def test_the_axis_may_be_the_last():
    updates, params = trees()
    moved = jax.tree.map(lambda x: jnp.moveaxis(x, 0, -1), updates["blocks"])
    moved = updates | {"blocks": moved}
    clip = oc.over_layers(oc.adaptive_grad_clip(0.01), {"blocks": -1})
    weights = jax.tree.map(lambda x: jnp.moveaxis(x, 0, -1), params["blocks"])
    weights = params | {"blocks": weights}
    got, _ = clip.update(moved, clip.init(weights), weights)
    alone = oc.adaptive_grad_clip(0.01)
    expected, _ = alone.update(apart(updates), alone.init(apart(params)), apart(params))
    chex.assert_trees_all_close(apart(got, -1), expected, rtol=5e-6)


def test_none_exempts_a_subtree():
    updates, params = trees()
    stacks = {"blocks": 0, "blocks/scale": None}
    clip = oc.over_layers(oc.clip_by_leaf_norm(1.0), stacks)
    _, state = clip.update(updates, clip.init(params))
    names = set(oc.summary(state, params))
    assert {"clip/norm/blocks/scale", "clip/norm/blocks/0/attention/bias"} <= names


def test_every_leaf_of_a_model_may_be_a_stack():
    grads = {"kernel": jnp.array([[3.0, 4.0], [0.3, 0.4]])}
    clip = oc.over_layers(oc.clip_by_leaf_norm(1.0), {"**": 0})
    got, state = clip.update(grads, clip.init(grads))
    np.testing.assert_allclose(got["kernel"], [[0.6, 0.8], [0.3, 0.4]], rtol=1e-6)
    assert "clip/norm/0/kernel" in oc.summary(state, grads)


def test_a_function_of_updates_returns_an_array_for_each_stack():
    updates, _ = trees()
    got = oc.over_layers(norms.leaf_norms, STACKS)(updates)
    assert got["blocks"]["attention"]["kernel"].shape == (LAYERS, 1, 1)
    expected = norms.leaf_norms(apart(updates))["blocks"]["3"]["scale"]
    np.testing.assert_allclose(got["blocks"]["scale"][3, 0], expected, rtol=1e-6)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(4)(nn.tanh(x)), None


class Stacked(nn.Module):
    @nn.compact
    def __call__(self, x):
        scan = nn.scan(
            Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        x, _ = scan(name="blocks")(x, None)
        return nn.Dense(1)(x)


def test_the_layers_of_a_linen_scan_have_names():
    params = Stacked().init(jax.random.key(0), jnp.ones((2, 4)))
    clip = oc.over_layers(oc.adagc(), STACKS)
    _, state = clip.update(params, clip.init(params), params)
    assert "clip/norm/params/blocks/2/Dense_0/kernel" in oc.summary(state, params)


def test_the_layers_of_an_equinox_vmap_have_names():
    keys = jax.random.split(jax.random.key(0), 3)
    make = equinox.filter_vmap(lambda key: equinox.nn.Linear(2, 2, key=key))
    params = {"blocks": equinox.filter(make(keys), equinox.is_inexact_array)}
    clip = oc.over_layers(oc.clip_by_group_norm(1.0), STACKS)
    _, state = clip.update(params, clip.init(params), params)
    assert "clip/norm/blocks/2" in oc.summary(state, params)


def test_the_number_of_kernels_does_not_grow_with_the_layers():
    def kernels(layers):
        tree = {"blocks": {"kernel": jnp.ones((layers, 4, 4))}}
        clip = oc.over_layers(oc.clip_by_leaf_norm(1.0), STACKS)
        lowered = jax.jit(clip.update).lower(tree, clip.init(tree))
        return lowered.as_text().count("stablehlo.reduce")

    assert kernels(64) == kernels(2)
