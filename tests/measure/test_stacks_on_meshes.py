"""Stacked layers on meshes, and stacks that raise."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import helpers
from helpers import oc
from stack_cases import MAKERS, STACKS, trees

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


SETTINGS = ("auto", "explicit", "shard_map", "shard_map_without_types")


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


# In all settings one norm of each way to sum, and a rule; the others in one each.
WAYS = "leaf_norm", "group_norm", "global_norm", "agc", "adagc"


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        case
        for case in helpers.in_turn(MESHED, SETTINGS)
        if case[0] in MESHED or case.values[0] in WAYS
    ],
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


@pytest.mark.parametrize("name", ["leaf_norm", "agc", "adagc", "value"])
@pytest.mark.parametrize("setting", ["auto", "explicit", "shard_map"])
def test_layers_may_be_split_over_two_mesh_axes(name, setting):
    """The first of them by the larger pieces."""
    specs = {"blocks": P(("pipe", "fsdp")), "embed": P(None, "fsdp")}
    told = oc.over_axes(oc.over_layers(MAKERS[name](), STACKS), specs)

    def run(updates, params):
        return told.update(updates, told.init(params), params)

    mesh = grid(AxisType.Explicit if setting == "explicit" else AxisType.Auto)
    every = trees()
    expected = jax.jit(run)(*every)
    if setting == "shard_map":
        out = specs, P()
        run = jax.shard_map(run, mesh=mesh, in_specs=(specs,) * 2, out_specs=out)
    shardings = {key: NamedSharding(mesh, spec) for key, spec in specs.items()}
    with jax.set_mesh(mesh):
        got = jax.jit(run)(*jax.device_put(every, (shardings,) * 2))
    chex.assert_trees_all_close(got, expected, rtol=1e-5)


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
