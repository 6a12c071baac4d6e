"""What every clip owes in Optax's wrappers, in checkpoints, among other leaves."""

import functools
from typing import Any

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest

import helpers
import table
from helpers import oc, three_steps
from table import clips, every_clip, first_step

pytestmark = pytest.mark.usefixtures("strict_shapes")

NO_NORM = {name: "keeps its count alone" for name in table.ELEMENTWISE} | {
    name: "keeps a memory of every element" for name in table.REMEMBERING
}
NO_NORM["stable_spam_clip"] = "is a chain of two"


# --------------------------------------------------------------------------------------
# Leaves that are no arrays of floats
# --------------------------------------------------------------------------------------


OTHERS = {
    "count": jnp.arange(3),
    "flag": jnp.array(True),
    "nothing": None,
    "masked": optax.MaskedNode(),
    "key": jax.random.key(0),
    "empty": jnp.zeros((0, 3)),
    "float0": np.zeros((2,), jax.dtypes.float0),
}


@every_clip()
def test_other_leaves_pass_through_and_are_not_counted(name):
    clip = clips[name]()
    updates, params = helpers.updates_and_params()
    passed = []

    def step(updates, params):
        more, more_params = updates | {"others": OTHERS}, params | {"others": OTHERS}
        clipped, state = clip.update(more, clip.init(more_params), more_params)
        passed.append(clipped.pop("others"))
        return clipped, state

    clipped, state = step(updates, params)
    assert jax.tree.structure(passed) == jax.tree.structure([OTHERS])
    pairs = zip(jax.tree.leaves(passed), jax.tree.leaves(OTHERS), strict=True)
    assert all(after is before for after, before in pairs)
    alone, state_alone = first_step(name)(updates, params)
    helpers.assert_close(clipped, alone)
    if name not in NO_NORM:
        assert helpers.types(state) == helpers.types(state_alone)


@every_clip()
@pytest.mark.parametrize("empty", [{}, None, {"a": None}], ids=str)
def test_an_empty_tree_is_fine(name, empty):
    clip = clips[name]()
    clipped, _ = clip.update(empty, clip.init(empty), empty)
    assert clipped == empty


@every_clip()
def test_numpy_arrays_and_python_numbers_are_leaves(name):
    clip = clips[name]()
    updates, params = helpers.updates_and_params()
    as_numpy = jax.tree.map(np.asarray, updates)
    as_numpy["dense"]["bias"] = 3.0
    updates["dense"]["bias"] = jnp.float32(3.0)
    params["dense"]["bias"] = jnp.float32(1.0)

    def both():
        # Closed over, the leaves reach the clip as they are.
        one, _ = clip.update(as_numpy, clip.init(params), params)
        two, _ = clip.update(updates, clip.init(params), params)
        return one, two

    one, two = jax.jit(both)()
    chex.assert_trees_all_equal_shapes_and_dtypes(one, updates)
    helpers.assert_close(one, two)


# --------------------------------------------------------------------------------------
# Optax's wrappers
# --------------------------------------------------------------------------------------


KERNELS = {"dense": {"bias": False, "kernel": True}, "head": {"kernel": True}}


@functools.cache
def clipped_kernels(name):
    """By hand, by `masked` and by `partition`."""
    labels = jax.tree.map(lambda inside: "clip" if inside else "keep", KERNELS)
    clip = clips[name]()
    masked = optax.masked(clip, KERNELS)
    parts = optax.partition({"clip": clip, "keep": optax.identity()}, labels)

    def by_hand(updates, params):
        inside = {layer: {"kernel": updates[layer]["kernel"]} for layer in updates}
        outside = {layer: {"kernel": params[layer]["kernel"]} for layer in params}
        clipped, _ = clip.update(inside, clip.init(outside), outside)
        return {layer: updates[layer] | clipped[layer] for layer in updates}

    updates, params = helpers.updates_and_params()
    by_masked, _ = masked.update(updates, masked.init(params), params)
    by_parts, _ = parts.update(updates, parts.init(params), params)
    return by_hand(updates, params), by_masked, by_parts


@every_clip()
def test_masked_clips_what_the_mask_names(name):
    by_hand, by_masked, _ = clipped_kernels(name)
    helpers.assert_close(by_masked, by_hand)


@every_clip()
def test_partition_clips_its_own_part(name):
    by_hand, _, by_parts = clipped_kernels(name)
    helpers.assert_close(by_parts, by_hand)


@every_clip()
def test_multi_steps_clips_the_mean(name):
    params, (first, second, _) = helpers.random_tree(seed=9), three_steps()
    wrapped = optax.MultiSteps(clips[name](), every_k_schedule=2)
    update = jax.jit(wrapped.update)
    (nothing, clipped), _ = helpers.run(wrapped, update, [first, second], params)
    mean = jax.tree.map(lambda x, y: (x + y) / 2, first, second)
    chex.assert_trees_all_equal(nothing, jax.tree.map(jnp.zeros_like, mean))
    expected, _ = first_step(name)(mean, params)
    chex.assert_trees_all_close(clipped, expected, rtol=1e-5)


# What Optax's `inject_hyperparams` can turn into state: the named clips by keyword.
named: dict[str, tuple[Any, dict[str, Any]]] = {
    "clip_by_value": (oc.clip_by_value, {"limit": 0.5}),
    "clip_by_value_range": (oc.clip_by_value, {"limit": (-0.25, 0.5)}),
    "clip_by_value_mapping": (
        oc.clip_by_value,
        {"limit": {"dense": 0.25, "**": 1.0}},
    ),
    "clip": (oc.clip, {"max_delta": 0.5}),
    "clip_by_global_norm": (oc.clip_by_global_norm, {"max_norm": 1.0}),
    "clip_by_leaf_norm": (oc.clip_by_leaf_norm, {"max_norm": 1.0}),
    "clip_by_leaf_norm_mapping": (
        oc.clip_by_leaf_norm,
        {"max_norm": {"dense": 0.5, "**": 2.0}},
    ),
    "clip_by_group_norm": (oc.clip_by_group_norm, {"max_norm": 1.0}),
    "clip_by_group_norm_labels": (
        oc.clip_by_group_norm,
        {"max_norm": 1.0, "labels": {"kernel": "weights", "**": "rest"}},
    ),
    "clip_by_block_rms": (oc.clip_by_block_rms, {"threshold": 0.5}),
    "adaptive_grad_clip": (oc.adaptive_grad_clip, {"clipping": 0.25}),
    "adaptive_grad_clip_excluding": (
        oc.adaptive_grad_clip,
        {"clipping": 0.25, "exclude": ("head",)},
    ),
    "clip_by_relative_step": (oc.clip_by_relative_step, {"relative": 0.25}),
    "clip_by_trust_ratio": (oc.clip_by_trust_ratio, {"trust_coefficient": 0.25}),
    "clippy": (oc.clippy, {}),
    "clip_singular_values": (oc.clip_singular_values, {"max_value": 1.0}),
    "clip_by_spectral_norm": (oc.clip_by_spectral_norm, {"max_norm": 1.0}),
    "normalize_by_update_norm": (
        oc.normalize_by_update_norm,
        {"scale_factor": 1.0},
    ),
    "zclip": (oc.zclip, {"z_threshold": 2.5, "warmup_steps": 10, "max_norm": 1.0}),
    "adagc": (oc.adagc, {"relative": 1.05, "warmup_steps": 10, "max_norm": 1.0}),
    "k_sigma_clip": (oc.k_sigma_clip, {"num_std": 3.0, "decay": 0.9}),
    "aggc": (oc.aggc, {"high": 1.5, "low": 0.5, "decay": 0.9}),
    "stable_spam_clip": (oc.stable_spam_clip, {"mean_decay": 0.7, "max_decay": 0.9}),
    "acclip": (oc.acclip, {"b1": 0.5, "b2": 0.75, "eps": 0.5}),
    "spam_clip": (
        oc.spam_clip,
        {"threshold": 4.0, "decay": 0.5, "warmup_steps": 1, "reset_every": 3},
    ),
    "stable_adamw": (
        oc.stable_adamw,
        {"learning_rate": 0.5, "b1": 0.5, "b2": 0.75, "eps": 0.5, "weight_decay": 0.25},
    ),
}


@pytest.mark.parametrize("name", named)
@pytest.mark.parametrize("dtype", ["float32", helpers.thorough("bfloat16")])
def test_inject_hyperparams_needs_no_static_args(name, dtype):
    factory, arguments = named[name]
    updates, params = helpers.updates_and_params(dtype)
    plain: Any = factory(**arguments)
    injected: Any = optax.inject_hyperparams(factory)(**arguments)
    fresh = injected.init(params)

    def both(updates):
        expected, _ = plain.update(updates, plain.init(params), params)
        return expected, *injected.update(updates, fresh, params)

    # Where there are two dtypes, one compiled step is enough.
    step = jax.jit(both) if dtype == "float32" else both
    expected, clipped, state = step(updates)
    chex.assert_trees_all_equal_shapes_and_dtypes(clipped, updates)
    helpers.assert_close(clipped, expected)
    assert helpers.types(state) == helpers.types(fresh)


@every_clip()
def test_what_is_like_the_params_in_a_state_is_found_and_nothing_else(name):
    clip, params = clips[name](), helpers.random_tree()
    shapes = jax.tree.map(jnp.shape, params)
    state = clip.init(params)
    kinds = optax.tree.map_params(
        clip,
        lambda x, shape: "params" if x.shape == shape else "odd",
        state,
        shapes,
        transform_non_params=lambda _: "own",
    )
    found = set(jax.tree.leaves(kinds))
    assert found - {"own"} == ({"params"} if name in table.REMEMBERING else set())
    assert jax.tree.structure(kinds) == jax.tree.structure(state)


# --------------------------------------------------------------------------------------
# Checkpoints
# --------------------------------------------------------------------------------------


def state_after_a_step(name):
    return first_step(name)(*helpers.updates_and_params())[1]


def a_used_state(name):
    """A state unlike the fresh one, made without running the clip."""
    fresh = clips[name]().init(helpers.random_tree())
    leaves = [np.asarray(x) for x in jax.tree.leaves(fresh)]
    used = [jnp.asarray(np.full_like(x, i + 2)) for i, x in enumerate(leaves)]
    return jax.tree.unflatten(jax.tree.structure(fresh), used)


@pytest.fixture(scope="module")
def restored_by_orbax(tmp_path_factory):
    """All states through one Orbax checkpoint: writing one each takes a minute."""
    folder = tmp_path_factory.mktemp("orbax") / "states"
    states = {name: a_used_state(name) for name in clips}
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, states)
        checkpointer.wait_until_finished()
        fresh = {name: clips[name]().init(helpers.random_tree()) for name in clips}
        return checkpointer.restore(folder, fresh)


@every_clip()
def test_orbax_restores_the_state(name, restored_by_orbax):
    state = a_used_state(name)
    chex.assert_trees_all_equal(restored_by_orbax[name], state)
    assert helpers.types(restored_by_orbax[name]) == helpers.types(state)


@every_clip()
def test_flax_serialization_restores_the_state(name):
    state, fresh = a_used_state(name), clips[name]().init(helpers.random_tree())
    restored = flax.serialization.from_bytes(fresh, flax.serialization.to_bytes(state))
    chex.assert_trees_all_equal(restored, state)
    assert helpers.types(restored) == helpers.types(state)


# --------------------------------------------------------------------------------------
# The statistics
# --------------------------------------------------------------------------------------


@every_clip(exempt=NO_NORM)
def test_a_fresh_state_says_that_nothing_was_seen(name):
    state = clips[name]().init(helpers.random_tree())
    assert isinstance(state, oc.ClipState)
    shape = jnp.shape(state.norms)
    np.testing.assert_array_equal(state.norms, np.zeros(shape))
    assert np.isfinite(state.max_norms).all()
    np.testing.assert_allclose(state.max_norms, np.full(shape, 3.4028e38), rtol=1e-5)
    np.testing.assert_array_equal(state.factors, np.ones(shape))
    np.testing.assert_array_equal(state.clipped_count, np.zeros(shape))
    assert int(state.update_count) == 0


@every_clip(exempt=NO_NORM)
def test_the_statistics_have_their_documented_types(name):
    state = state_after_a_step(name)
    shape = jnp.shape(state.norms)
    measured = (state.norms, state.max_norms, state.factors, state.clipped_count)
    dtypes = [x.dtype for x in (*measured, state.update_count)]
    assert [x.shape for x in measured] == [shape] * 4
    assert dtypes == [jnp.float32] * 3 + [jnp.int32] * 2
    assert state.update_count.shape == ()
    assert int(state.update_count) == 1


@every_clip(exempt=NO_NORM)
def test_the_recorded_factor_counts_as_clipped_when_below_one(name):
    state = state_after_a_step(name)
    np.testing.assert_array_equal(state.clipped_count, np.asarray(state.factors) < 1)
