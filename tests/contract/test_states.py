"""What a state holds: finite numbers of fixed types, whatever is done with it.

Wrappers blend states by arithmetic, `(1 - b) * x + b * y`, as `optax.contrib.sam` does:
an infinity times zero would be NaN. `jax.debug_infs` takes any infinity for a fault.
"""

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import helpers
from helpers import oc
from optaxclip import factors, norms, thresholds
from table import clips, every_clip

MAGNITUDES = [1e-30, 1.0, 3e37]


@every_clip()
@pytest.mark.parametrize("size", MAGNITUDES)
def test_on_finite_updates_every_field_is_finite(name, size):
    step = stepper(name)
    _, params = helpers.updates_and_params()
    state = clips[name]().init(params)
    chex.assert_tree_all_finite(state)
    for factor in (1.0, 0.1, 1.0):
        updates = helpers.random_tree(seed=1, scale=size * factor)
        updates = jax.tree.map(lambda x: jnp.clip(x, -3e38, 3e38), updates)
        _, state = step(updates, state, params)
        chex.assert_tree_all_finite(state)


@functools.cache
def stepper(name):
    return jax.jit(clips[name]().update)


@every_clip()
@pytest.mark.parametrize("compiled", [helpers.thorough(False), True])
def test_neither_an_infinity_nor_a_nan_is_made_on_the_way(name, compiled):
    clip = clips[name]()
    updates, params = helpers.updates_and_params()
    with jax.debug_infs(True), jax.debug_nans(True):
        state = clip.init(params)
        update = jax.jit(clip.update) if compiled else clip.update
        for _ in range(2):
            _, state = update(updates, state, params)


def blended(old, new, share):
    return jax.tree.map(lambda x, y: (1 - share) * x + share * y, old, new)


@every_clip()
def test_a_blend_of_two_states_goes_on_as_the_one_that_was_chosen(name):
    """With the types that arithmetic gives to counts, which are floats from then on."""
    step = stepper(name)
    params = helpers.random_tree(seed=9)
    fresh = clips[name]().init(params)
    first, second, third = helpers.three_steps()
    _, state = step(first, fresh, params)
    for share, chosen in (1.0, state), (0.0, fresh):
        expected, expected_state = step(second, chosen, params)
        got, got_state = step(second, blended(fresh, state, share), params)
        helpers.assert_close(got, expected)
        chex.assert_trees_all_close(
            jax.tree.map(jnp.float32, got_state),
            jax.tree.map(jnp.float32, expected_state),
            rtol=2e-6,
        )
        got, _ = step(third, got_state, params)
        helpers.assert_close(got, step(third, expected_state, params)[0])


@pytest.mark.parametrize("name", ["leaf_norm", "adagc", "window_percentile"])
def test_a_step_makes_whole_numbers_of_what_a_blend_made_floats(name):
    updates, params = helpers.updates_and_params()
    state = clips[name]().init(params)
    _, after = stepper(name)(updates, blended(state, state, 1.0), params)
    assert helpers.types(after) == helpers.types(state)


INNER = {
    "clip_by_global_norm": lambda: oc.clip_by_global_norm(1.0),
    "autoclip": lambda: oc.autoclip(window=5),
    "k_sigma_clip": lambda: oc.k_sigma_clip(warmup_steps=3),
    "lagged": lambda: oc.clip_by_global_norm(thresholds.lagged(optax.scale(2.0))),
    "adagc": lambda: oc.adagc(warmup_steps=2),
}


@pytest.mark.parametrize("name", INNER)
def test_a_clip_within_sam_trains(name):
    inner = optax.chain(INNER[name](), optax.sgd(0.1))
    tx = optax.contrib.sam(inner, optax.sgd(0.05), sync_period=2, opaque_mode=False)
    weights = jnp.ones(4)
    state = tx.init({"a": weights})
    for _ in range(8):
        grads, params = {"a": 10 * (weights - 2)}, {"a": weights}
        updates, state = tx.update(grads, state, params)
        (step,) = jax.tree.leaves(updates)
        weights = weights + step
    chex.assert_tree_all_finite(state)
    assert jnp.sum((weights - 2) ** 2) < 0.8 * 4


OPTAX_OR_A_SCHEDULE = {
    name: "Optax's ema divides an integer" for name in ("lagged_global", "lagged_leaf")
} | {
    "clipped_history": "Optax's ema divides an integer",
    "mapping_of_rules": "Optax's ema divides an integer",
    "global_norm_schedule": "its schedule divides by a count",
    "value_schedule": "its schedule divides by a count",
}


@every_clip(exempt=OPTAX_OR_A_SCHEDULE)
def test_strict_promotion_of_dtypes_is_obeyed(name):
    updates, params = helpers.updates_and_params()
    with jax.numpy_dtype_promotion("strict"):
        clip = clips[name]()
        state = clip.init(params)
        for _ in range(2):
            _, state = jax.jit(clip.update)(updates, state, params)


# --------------------------------------------------------------------------------------
# A Python infinity for the threshold
# --------------------------------------------------------------------------------------

WATCHED = {"a": jnp.array([1.0, jnp.inf, jnp.nan]), "b": jnp.ones(2)}
OFF = {
    "global_norm": lambda: oc.clip_by_global_norm(jnp.inf),
    "leaf_norm": lambda: oc.clip_by_leaf_norm(np.float32(np.inf)),
    "group_norm": lambda: oc.clip_by_group_norm(float("inf")),
    "block_rms": lambda: oc.clip_by_block_rms(jnp.inf),
    "mapping": lambda: oc.clip_by_leaf_norm({"a": jnp.inf, "**": 100.0}),
    "soften": lambda: oc.clip_by(norms.leaf_norms, jnp.inf, factors.soften),
    "units": lambda: oc.clip_by(norms.unit_norms, {"a": jnp.inf, "b": 100.0}),
    "singular_values": lambda: oc.clip_singular_values(jnp.inf),
    "spectral_norm": lambda: oc.clip_by_spectral_norm(jnp.inf),
    "value": lambda: oc.clip_by_value(jnp.inf),
    "value_mapping": lambda: oc.clip_by_value({"a": jnp.inf, "b": 100.0}),
}


@pytest.mark.parametrize("name", OFF)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_an_infinite_threshold_hands_through_whatever_there_is(name, compiled):
    clip = OFF[name]()
    update = jax.jit(clip.update) if compiled else clip.update
    updates, state = update(WATCHED, clip.init(WATCHED))
    assert helpers.bits(updates) == helpers.bits(WATCHED)
    report = oc.summary(state, WATCHED)
    for key, value in report.items():
        assert value == 1 or "factor" not in key, key


def test_it_only_measures():
    clip = oc.clip_by_leaf_norm(jnp.inf)
    tree = {"a": jnp.array([3.0, 4.0])}
    updates, state = clip.update(tree, clip.init(tree))
    assert updates["a"] is tree["a"]
    assert oc.summary(state, tree)["clip/norm/a"] == 5.0
    assert oc.summary(state, tree)["clip/max_norm/a"] == np.inf


def test_a_clip_of_leaves_that_is_off_copies_no_gradient():
    tree = {str(i): jnp.ones((128, 128)) for i in range(8)}
    clip = oc.clip_by_leaf_norm(jnp.inf)
    step = jax.jit(clip.update, donate_argnums=(0, 1))
    memory = step.lower(tree, clip.init(tree)).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < sum(x.nbytes for x in tree.values()) / 2


# --------------------------------------------------------------------------------------
# Functions of the user's own
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_a_norm_of_ones_own_is_read_at_every_trace(compiled):
    tree, scale = {"a": jnp.array([3.0, 4.0])}, {"now": 1.0}
    clip = oc.clip_by(lambda u: oc.global_norm(u) * scale["now"], 1.0)

    def measured():
        # A function of its own, so that each call of `jit` is a trace.
        step = jax.jit(lambda u, s: clip.update(u, s)) if compiled else clip.update
        return float(step(tree, clip.init(tree))[1].norms)

    assert measured() == 5.0
    scale["now"] = 10.0
    assert measured() == 50.0


def test_a_factor_and_labels_of_ones_own_are_read_at_every_call():
    tree, now = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}, {"x": 1.0, "label": 0}
    by_half = oc.clip_by(
        norms.global_norm, 1.0, lambda n, m: now["x"] * factors.rescale(n, m)
    )
    grouped = oc.clip_by_group_norm(1.0, lambda u: {"a": 0, "b": now["label"]})
    np.testing.assert_allclose(by_half.update(tree, None)[0]["a"], [0.6])
    np.testing.assert_allclose(grouped.update(tree, None)[0]["a"], [0.6])
    now |= {"x": 0.5, "label": 1}
    np.testing.assert_allclose(by_half.update(tree, None)[0]["a"], [0.3])
    np.testing.assert_allclose(grouped.update(tree, None)[0]["a"], [1.0])


@dataclasses.dataclass
class Scaled:
    """A callable without a hash, like an Equinox module with arrays."""

    scale: Any

    def __call__(self, first, second=None):
        if second is None:
            return jax.tree.map(lambda n: n * self.scale, norms.leaf_norms(first))
        return self.scale * factors.rescale(first, second)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_functions_without_a_hash_will_do(compiled):
    tree = {"a": jnp.array([3.0, 4.0])}
    clip = oc.clip_by(Scaled(jnp.float32(2.0)), 1.0, Scaled(0.5))
    update = jax.jit(clip.update) if compiled else clip.update
    updates, state = update(tree, clip.init(tree))
    np.testing.assert_allclose(updates["a"], [0.15, 0.2], rtol=1e-6)
    np.testing.assert_allclose(state.norms, [10.0])


def test_a_norm_of_ones_own_is_rescued_outside_of_jit():
    clip = oc.clip_by(lambda u: jnp.sqrt(jnp.sum(u["a"] ** 2)), 1.0)
    for size in (1e30, 1e-30):
        tree = {"a": size * jnp.array([3.0, 4.0])}
        _, state = clip.update(tree, clip.init(tree))
        np.testing.assert_allclose(state.norms, 5 * size, rtol=1e-6)


# --------------------------------------------------------------------------------------
# Factors beyond the range
# --------------------------------------------------------------------------------------


def test_a_factor_above_the_largest_number_keeps_zeros():
    tree = {"a": jnp.array([1e-20, 0.0])}
    clip = oc.clip_by(norms.leaf_norms, 1e30, factors.normalize)
    updates, state = clip.update(tree, clip.init(tree))
    np.testing.assert_allclose(updates["a"], [1e30, 0.0], rtol=1e-6)
    assert np.isfinite(state.factors).all()
    assert oc.summary(state, tree)["clip/factor/a"] == np.inf


@pytest.mark.parametrize("norm", [2e-38, 1e-30, 1e-10, 1.0, 1e19])
@pytest.mark.parametrize("max_norm", [1e-37, 1e-10, 1.0, 1e19, 3e38])
def test_every_norm_is_normalized_to_every_other(norm, max_norm):
    updates = jnp.array([0.6, 0.0, -0.8]) * norm
    clip = oc.clip_by(norms.global_norm, max_norm, factors.normalize)
    got, _ = jax.jit(clip.update)(updates, None)
    # The updates as they are: 2e-38 times 0.6 is no longer a normal number.
    truth = np.asarray(updates, np.float64)
    expected = truth / np.linalg.norm(truth) * max_norm
    np.testing.assert_allclose(got, expected, rtol=2e-6, atol=2e-38)


def test_a_trust_ratio_above_the_largest_number_is_applied():
    clip, params = oc.clip_by_trust_ratio(jnp.inf), {"a": jnp.array([1e4, 1e4])}
    updates = {"a": jnp.array([2e-38, 0.0])}
    got, _ = clip.update(updates, clip.init(params), params)
    np.testing.assert_allclose(got["a"], [1e4 * 2**0.5, 0.0], rtol=1e-5)


@pytest.mark.parametrize("max_norm", [2e-38, 5e-38, 1e-30])
def test_the_largest_updates_are_clipped_to_the_smallest_norms(max_norm):
    updates = jnp.full(2, 3e38)
    got, _ = oc.clip_by_global_norm(max_norm).update(updates, None)
    expected = np.full(2, max_norm / 2**0.5)
    np.testing.assert_allclose(got, expected, rtol=2e-6, atol=1.2e-38)
    assert np.all(got > 0) or max_norm < 3e-38
