"""`over_layers`: layers stacked in one array are clipped as if each had its own.

The oracle is the same clip on the tree with the layers taken apart.
"""

import functools
from typing import Any

import chex
import equinox
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import helpers
from helpers import oc
from optaxclip import factors, norms, thresholds

LAYERS = 4
SHAPES = {
    "blocks": {
        "attention": {"bias": (LAYERS, 2), "kernel": (LAYERS, 4, 2)},
        "scale": (LAYERS, 4),
    },
    "embed": {"kernel": (5, 4)},
}
STACKS = {"blocks": 0}


def trees(seed=0, spike=100.0):
    """Updates with a spike in one layer, and params."""
    updates = helpers.random_tree(seed=seed, shapes=SHAPES)
    blocks = jax.tree.map(lambda x: x.at[1].multiply(spike), updates["blocks"])
    return updates | {"blocks": blocks}, helpers.random_tree(seed=9, shapes=SHAPES)


def apart(tree, axis=0):
    """The tree with a leaf for each layer, `blocks/3/attention/kernel`."""

    def layer(i):
        return jax.tree.map(lambda x: jnp.take(x, i, axis), tree["blocks"])

    return tree | {"blocks": {str(i): layer(i) for i in range(LAYERS)}}


def twice_the_leaf_norms(updates):
    return jax.tree.map(lambda norm: 2 * norm, norms.leaf_norms(updates))


def of_order(norm, ord):
    return functools.partial(norm, ord=ord)


MAKERS = {
    "leaf_norm": lambda: oc.clip_by_leaf_norm(1.0),
    "leaf_norm_of_order_3": lambda: oc.clip_by(of_order(norms.leaf_norms, 3), 1.0),
    "largest": lambda: oc.clip_by(of_order(norms.leaf_norms, float("inf")), 0.5),
    "group_norm": lambda: oc.clip_by_group_norm(1.0),
    "block_rms": lambda: oc.clip_by_block_rms(0.5),
    "global_norm": lambda: oc.clip_by_global_norm(1.0),
    "excluding": lambda: oc.clip_by(norms.excluding(norms.leaf_norms, "bias"), 1.0),
    "drop": lambda: oc.clip_by(norms.group_norms(), 20.0, factors.drop),
    "user_norm": lambda: oc.clip_by(
        twice_the_leaf_norms, thresholds.lagged(optax.scale(0.5))
    ),
    "agc": lambda: oc.adaptive_grad_clip(0.01),
    "agc_excluding": lambda: oc.adaptive_grad_clip(0.01, exclude=("embed",)),
    "agc_axis": lambda: oc.adaptive_grad_clip(0.01, axis={"kernel": 1}),
    "adagc": lambda: oc.adagc(warmup_steps=1),
    "aggc": lambda: oc.aggc(1.0, 0.5),
    "z_score": lambda: oc.clip_by(
        norms.group_norms(), thresholds.z_score(0.5, warmup_steps=2)
    ),
    "window": lambda: oc.clip_by(
        norms.leaf_norms,
        thresholds.lagged(thresholds.mean_plus_std(0.5, window=2)),
    ),
    "mapping": lambda: oc.clip_by_leaf_norm(
        {"kernel": thresholds.lagged(optax.scale(0.5)), "**": 1.0}
    ),
    "trust_ratio": lambda: oc.clip_by_trust_ratio(),
    "clippy": lambda: oc.clippy(),
    "value": lambda: oc.clip_by_value(0.5),
    "stable_spam": lambda: oc.stable_spam_clip(),
    "stable_adamw": lambda: oc.stable_adamw(0.1),
    "in_a_chain": lambda: optax.chain(oc.clip_by_group_norm(1.0), optax.sgd(0.1)),
    "guard": lambda: oc.skip_if_spike(optax.sgd(0.1), norms.leaf_norms, 50.0),
}
every_maker = pytest.mark.parametrize("name", MAKERS)


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


# --------------------------------------------------------------------------------------
# Which arrays, along which axis
# --------------------------------------------------------------------------------------


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


# --------------------------------------------------------------------------------------
# On a mesh
# --------------------------------------------------------------------------------------

# The layers over the pipeline, and the layers' own dimensions over fsdp.
SPECS = {
    "blocks": {
        "attention": {"bias": P("pipe"), "kernel": P("pipe", "fsdp")},
        "scale": P("pipe", "fsdp"),
    },
    "embed": {"kernel": P(None, "fsdp")},
}
MESHED = [
    "leaf_norm",
    "leaf_norm_of_order_3",
    "largest",
    "group_norm",
    "global_norm",
    "agc",
    "adagc",
    "window",
    "value",
]


def put(mesh, tree):
    return jax.tree.map(
        lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, SPECS
    )


def grid(kind):
    return jax.make_mesh((2, 2), ("pipe", "fsdp"), axis_types=(kind,) * 2)


@functools.cache
def two_steps(name, setting):
    told = oc.over_layers(MAKERS[name](), STACKS)
    told = oc.over_axes(told, SPECS) if setting.startswith("shard_map") else told
    mesh = grid(AxisType.Explicit if setting == "explicit" else AxisType.Auto)

    def run(updates, params):
        state = told.init(params)
        first, state = told.update(updates, state, params)
        second, state = told.update(first, state, params)
        return second, state

    updates, params = trees()
    if setting.startswith("shard_map"):
        run = jax.shard_map(
            run,
            mesh=mesh,
            in_specs=(SPECS, SPECS),
            out_specs=(SPECS, P()),
            check_vma=setting == "shard_map",
        )
    with jax.set_mesh(mesh):
        compiled = jax.jit(run).lower(put(mesh, updates), put(mesh, params)).compile()
        return compiled, compiled(put(mesh, updates), put(mesh, params))


@functools.cache
def on_one_device(name) -> Any:
    told = oc.over_layers(MAKERS[name](), STACKS)
    updates, params = trees()
    first, state = jax.jit(told.update)(updates, told.init(params), params)
    return jax.jit(told.update)(first, state, params)


@pytest.mark.parametrize("name", MESHED)
@pytest.mark.parametrize(
    "setting", ["auto", "explicit", "shard_map", "shard_map_without_types"]
)
def test_on_a_mesh_it_is_what_it_is_on_one_device(name, setting):
    _, (got, state) = two_steps(name, setting)
    expected, expected_state = on_one_device(name)
    chex.assert_trees_all_close(got, expected, rtol=1e-5)
    chex.assert_trees_all_close(state, expected_state, rtol=1e-5)


@pytest.mark.parametrize("name", ["leaf_norm", "group_norm", "adagc"])
def test_under_jit_no_leaf_is_gathered(name):
    compiled, _ = two_steps(name, "auto")
    lines = (compiled.as_text() or "").splitlines()
    gathered = [line for line in lines if "all-gather(" in line]
    # Norms of layers may be, one number each; of a leaf there are more.
    assert not any("4,4,2]" in line or "[4,4]" in line for line in gathered)


# --------------------------------------------------------------------------------------
# Errors
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stacks", [{}, "blocks", [0], None, 0], ids=repr)
def test_stacks_are_a_mapping(stacks):
    with pytest.raises(TypeError, match=r"`stacks` to map path patterns to the axis"):
        oc.over_layers(oc.clip_by_leaf_norm(1.0), stacks)


@pytest.mark.parametrize("axis", [0.0, "0", True, (0,)], ids=repr)
def test_an_axis_is_a_whole_number(axis):
    with pytest.raises(TypeError, match=r"stacks\['blocks'\] to be an axis or None"):
        oc.over_layers(oc.clip_by_leaf_norm(1.0), {"blocks": axis})


def test_a_pattern_that_matches_nothing_raises():
    clip = oc.over_layers(oc.clip_by_leaf_norm(1.0), {"layers": 0})
    with pytest.raises(ValueError, match=r"`stacks` has to match a leaf: 'layers'"):
        clip.init(trees()[0])


def test_a_leaf_without_the_axis_raises():
    clip = oc.over_layers(oc.clip_by_leaf_norm(1.0), {"blocks": 1})
    with pytest.raises(ValueError, match=r"axis 1 of its layers, got .*'blocks/step'"):
        clip.init({"blocks": {"step": jnp.ones(4)}})


def test_leaves_with_different_numbers_of_layers_raise():
    clip = oc.over_layers(oc.clip_by_leaf_norm(1.0), STACKS)
    tree = {"blocks": {"a": jnp.ones((4, 2)), "b": jnp.ones((3, 2))}}
    with pytest.raises(ValueError, match=r"as many layers in every leaf .*4 and 3"):
        clip.init(tree)


@pytest.mark.parametrize("fun", [None, 1.0, "clip"], ids=repr)
def test_what_is_neither_a_clip_nor_a_function_raises(fun):
    with pytest.raises(TypeError, match=r"`over_layers\(clip_by_leaf_norm"):
        oc.over_layers(fun, STACKS)


def test_inside_shard_map_a_split_stack_needs_its_spec():
    clip = oc.over_layers(oc.clip_by_leaf_norm(1.0), STACKS)
    step = jax.shard_map(
        lambda u: clip.update(u, None)[0],
        mesh=grid(AxisType.Auto),
        in_specs=(SPECS,),
        out_specs=SPECS,
    )
    with pytest.raises(ValueError, match=r"for a stack of layers: .*`optaxclip.over_a"):
        jax.jit(step)(trees()[0])


def test_layers_split_over_two_mesh_axes_raise():
    spec = {"blocks": P(("pipe", "fsdp"))}
    clip = oc.over_axes(oc.over_layers(oc.clip_by_leaf_norm(1.0), STACKS), spec)
    step = jax.shard_map(
        lambda u: clip.update(u, None)[0],
        mesh=grid(AxisType.Auto),
        in_specs=(spec,),
        out_specs=spec,
    )
    with pytest.raises(ValueError, match=r"one mesh axis at most, got \['fsdp', 'pip"):
        jax.jit(step)({"blocks": jnp.ones((4, 2))})
