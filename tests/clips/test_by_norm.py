"""The named clips of norms: hand-computed cases."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import helpers
from clip_cases import clipped
from helpers import oc
from optaxclip import factors, norms

pytestmark = pytest.mark.usefixtures("strict_shapes")

TRIANGLE = {"b": jnp.array([4.0]), "w": jnp.array([0.0, 3.0])}  # norm 5


# --------------------------------------------------------------------------------------
# By norm
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("max_norm", "expected"),
    [
        (1.0, [0.8, 0.0, 0.6]),
        (2.5, [2.0, 0.0, 1.5]),
        (5.0, [4.0, 0.0, 3.0]),
        (10.0, [4.0, 0.0, 3.0]),
        (jnp.float32(0.0), [0.0, 0.0, 0.0]),
        (float("inf"), [4.0, 0.0, 3.0]),
        (jnp.float16(2.5), [2.0, 0.0, 1.5]),
        (np.float64(2.5), [2.0, 0.0, 1.5]),
        (jnp.bfloat16(2.5), [2.0, 0.0, 1.5]),
        (np.array(2.5), [2.0, 0.0, 1.5]),
        (1, [0.8, 0.0, 0.6]),
        pytest.param(lambda count: 1.0, [0.8, 0.0, 0.6], id="schedule"),
    ],
    ids=str,
)
def test_clip_by_global_norm_of_a_triangle(max_norm, expected):
    out = clipped(oc.clip_by_global_norm(max_norm), TRIANGLE)
    np.testing.assert_allclose(
        np.concatenate([out["b"], out["w"]]), expected, rtol=1e-6
    )


def test_clip_by_global_norm_records_what_it_did():
    clip = oc.clip_by_global_norm(2.5)
    _, state = clip.update(TRIANGLE, clip.init(TRIANGLE))
    small = jax.tree.map(lambda x: x / 5, TRIANGLE)
    _, state = clip.update(small, state)
    _, state = clip.update(TRIANGLE, state)
    assert float(state.norms) == 5.0
    assert float(state.max_norms) == 2.5
    assert float(state.factors) == 0.5
    assert int(state.update_count) == 3
    assert int(state.clipped_count) == 2
    assert state.rule_state == optax.EmptyState()


def test_clip_by_leaf_norm_bounds_every_leaf_alone():
    updates = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([[0.3, 0.4]])}
    clip = oc.clip_by_leaf_norm(1.0)
    out, state = clip.update(updates, clip.init(updates))
    np.testing.assert_allclose(out["a"], [0.6, 0.8], rtol=1e-6)
    np.testing.assert_array_equal(out["b"], updates["b"])
    np.testing.assert_allclose(state.norms, [5.0, 0.5], rtol=1e-6)
    np.testing.assert_array_equal(state.max_norms, [1.0, 1.0])
    np.testing.assert_allclose(state.factors, [0.2, 1.0], rtol=1e-6)
    np.testing.assert_array_equal(state.clipped_count, [1, 0])


@pytest.mark.parametrize(
    ("factor", "expected"),
    [
        (oc.factors.soften, [1, 1]),
        (oc.factors.normalize, [1, 0]),
        (lambda norm, max_norm: jnp.ones_like(norm), [0, 0]),
    ],
    ids=["soften", "normalize", "user"],
)
def test_what_a_factor_shrinks_is_clipped_on_either_side_of_the_threshold(
    factor, expected
):
    updates = {"above": jnp.array([3.0, 4.0]), "below": jnp.array([0.3, 0.4])}
    clip = oc.clip_by(oc.norms.leaf_norms, 1.0, factor)
    _, state = clip.update(updates, clip.init(updates))
    np.testing.assert_array_equal(state.clipped_count, expected)


LAYERS = {
    "dense": {"bias": jnp.array([3.0]), "kernel": jnp.array([[4.0]])},
    "head": {"bias": jnp.array([0.3]), "kernel": jnp.array([[0.4]])},
}


def test_clip_by_group_norm_bounds_every_layer():
    clip = oc.clip_by_group_norm(1.0)
    out, state = clip.update(LAYERS, clip.init(LAYERS))
    chex.assert_trees_all_close(
        out["dense"], jax.tree.map(lambda x: x / 5, LAYERS)["dense"]
    )
    assert helpers.bits(out["head"]) == helpers.bits(LAYERS["head"])
    np.testing.assert_allclose(state.norms, [5.0, 0.5], rtol=1e-6)


@pytest.mark.parametrize(
    "labels",
    [
        {"bias": "biases", "kernel": "kernels"},
        lambda updates: jax.tree.map(jnp.ndim, updates),
    ],
    ids=["patterns", "callable"],
)
def test_clip_by_group_norm_takes_labels(labels):
    updates = {
        "a": {"bias": jnp.array([3.0]), "kernel": jnp.array([[6.0]])},
        "b": {"bias": jnp.array([4.0]), "kernel": jnp.array([[8.0]])},
    }
    clip = oc.clip_by_group_norm(1.0, labels)
    out, state = clip.update(updates, clip.init(updates))
    chex.assert_trees_all_close(
        out,
        {
            "a": {"bias": jnp.array([0.6]), "kernel": jnp.array([[0.6]])},
            "b": {"bias": jnp.array([0.8]), "kernel": jnp.array([[0.8]])},
        },
    )
    # One entry per group, in the order of the first leaf of each.
    np.testing.assert_allclose(state.norms, [5.0, 10.0], rtol=1e-6)


def test_clip_by_group_norm_takes_a_limit_per_layer():
    clip = oc.clip_by_group_norm({"dense": 2.5, "head": 0.25})
    out, state = clip.update(LAYERS, clip.init(LAYERS))
    chex.assert_trees_all_close(out, jax.tree.map(lambda x: x / 2, LAYERS))
    np.testing.assert_array_equal(state.max_norms, [2.5, 0.25])


def test_clip_by_block_rms_of_a_matrix():
    updates = jnp.array([[3.0, 4.0], [0.0, 0.0]])  # rms 2.5
    clip = oc.clip_by_block_rms(1.25)
    out, state = clip.update(updates, clip.init(updates))
    np.testing.assert_allclose(out, updates / 2, rtol=1e-6)
    np.testing.assert_allclose(state.norms, [2.5], rtol=1e-6)


def test_adaptive_grad_clip_compares_columns_with_those_of_the_parameters():
    params = jnp.array([[3.0, 0.0], [4.0, 0.0]])  # columns of norm 5 and 0
    updates = jnp.array([[6.0, 6.0], [8.0, 8.0]])  # columns of norm 10
    clip = oc.adaptive_grad_clip(0.1, eps=2.0)
    out, state = clip.update(updates, clip.init(params), params)
    expected = np.array([[0.3, 0.12], [0.4, 0.16]])  # norms 0.1 * 5 and 0.1 * eps
    np.testing.assert_allclose(out, expected, rtol=1e-6)
    # The state keeps the unit that was clipped hardest.
    np.testing.assert_allclose(state.norms, [10.0], rtol=1e-6)
    np.testing.assert_allclose(state.max_norms, [0.2], rtol=1e-6)
    np.testing.assert_allclose(state.factors, [0.02], rtol=1e-6)


def test_adaptive_grad_clip_takes_axes_and_exclusions_by_pattern():
    params = {
        "conv": jnp.ones((2, 2)),
        "dense": jnp.ones((2, 2)),
        "head": {"kernel": jnp.ones((2, 2))},
    }
    updates = jax.tree.map(lambda x: jnp.array([[3.0, 0.0], [4.0, 0.0]]), params)
    clip = oc.adaptive_grad_clip(2**-0.5, axis={"conv": 1, "**": 0}, exclude=("head",))
    out = clip.update(updates, clip.init(params), params)[0]
    # Every unit of the parameters has norm sqrt(2), so every unit may have norm 1.
    np.testing.assert_allclose(out["conv"], [[1.0, 0.0], [1.0, 0.0]], rtol=1e-6)
    np.testing.assert_allclose(out["dense"], [[0.6, 0.0], [0.8, 0.0]], rtol=1e-6)
    np.testing.assert_array_equal(out["head"]["kernel"], updates["head"]["kernel"])


def test_adaptive_grad_clip_excludes_the_first_leaf_of_a_shape():
    """Units of leaves of one shape are in one array, in the order of the first."""
    params = {"a": jnp.ones((4, 2)), "b": jnp.ones((4, 3)), "c": jnp.ones((4, 2))}
    clip = oc.adaptive_grad_clip(0.5, exclude=("a",))
    out = clip.update(params, clip.init(params), params)[0]
    helpers.assert_close(out, params | {k: params[k] / 2 for k in "bc"})


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("params_dtype", ["float16", "bfloat16", "float32"])
def test_adaptive_grad_clip_keeps_the_dtype_of_the_updates(dtype, params_dtype):
    updates = jnp.array([6.0, 8.0], dtype)
    params = jnp.array([3.0, 4.0], params_dtype)
    clip = oc.adaptive_grad_clip(0.5)
    out, _ = clip.update(updates, clip.init(params), params)
    assert out.dtype == updates.dtype
    helpers.assert_close(out, np.array([1.5, 2.0]))


def test_normalize_by_update_norm_sets_the_norm():
    clip = oc.normalize_by_update_norm(scale_factor=2.0, eps=0.0)
    out = clipped(clip, TRIANGLE)
    np.testing.assert_allclose(out["w"], [0.0, 1.2], rtol=1e-6)
    np.testing.assert_allclose(out["b"], [1.6], rtol=1e-6)


def test_normalize_by_update_norm_may_turn_the_update_around():
    out = clipped(oc.normalize_by_update_norm(-1.0, eps=0.0), TRIANGLE)
    np.testing.assert_allclose(out["b"], [-0.8], rtol=1e-6)


def test_normalize_by_update_norm_adds_eps_to_the_norm():
    out = clipped(oc.normalize_by_update_norm(1.0, eps=5.0), TRIANGLE)
    np.testing.assert_allclose(out["b"], [0.4], rtol=1e-6)


# --------------------------------------------------------------------------------------
# The engine's factors
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factor", "max_norm", "expected"),
    [
        (factors.rescale, 1.0, 0.2),
        (factors.rescale, 10.0, 1.0),
        (factors.normalize, 1.0, 0.2),
        (factors.normalize, 10.0, 2.0),
        (factors.drop, 1.0, 0.0),
        (factors.drop, 10.0, 1.0),
        (factors.soften, 5.0, 0.5),
        (factors.soften, 20.0, 0.8),
    ],
)
def test_a_factor_says_what_to_do_about_the_norm(factor, max_norm, expected):
    clip = oc.clip_by(norms.global_norm, max_norm, factor=factor)
    out, state = clip.update(TRIANGLE, clip.init(TRIANGLE))
    np.testing.assert_allclose(out["b"], [4.0 * expected], rtol=1e-6)
    np.testing.assert_allclose(state.factors, expected, rtol=1e-6)
    np.testing.assert_allclose(
        factor(jnp.float32(5), jnp.float32(max_norm)), expected, rtol=1e-6
    )


def test_a_factor_works_on_vectors():
    out = factors.rescale(jnp.array([0.0, 1.0, 4.0]), jnp.array([1.0, 1.0, 1.0]))
    np.testing.assert_array_equal(out, [1.0, 1.0, 0.25])


def test_a_users_own_factor_is_a_plain_function():
    def half_if_large(norms, max_norms):
        return jnp.where(norms > max_norms, 0.5, 1.0)

    clip = oc.clip_by(norms.global_norm, 1.0, factor=half_if_large)
    np.testing.assert_array_equal(clipped(clip, TRIANGLE)["b"], [2.0])


# --------------------------------------------------------------------------------------
# The two halves
# --------------------------------------------------------------------------------------


def test_clip_with_norm_is_the_second_half_of_the_global_clip():
    norm = oc.global_norm(TRIANGLE)
    out = oc.clip_with_norm(TRIANGLE, norm, 1.0)
    chex.assert_trees_all_close(out, clipped(oc.clip_by_global_norm(1.0), TRIANGLE))


def test_clip_with_norm_trusts_the_norm_it_is_given():
    out = oc.clip_with_norm(TRIANGLE, 10.0, 1.0)
    np.testing.assert_allclose(out["b"], [0.4], rtol=1e-6)
    untouched = oc.clip_with_norm(TRIANGLE, 0.5, 1.0)
    assert helpers.bits(untouched) == helpers.bits(TRIANGLE)


def test_clip_with_norm_takes_a_tree_of_norms():
    out = oc.clip_with_norm(TRIANGLE, norms.leaf_norms(TRIANGLE), 1.0)
    np.testing.assert_allclose(out["b"], [1.0], rtol=1e-6)
    np.testing.assert_allclose(out["w"], [0.0, 1.0], rtol=1e-6)


def test_clip_with_norm_takes_a_prefix_of_norms():
    out = oc.clip_with_norm(LAYERS, {"dense": 5.0, "head": 0.5}, 1.0)
    np.testing.assert_allclose(out["dense"]["bias"], [0.6], rtol=1e-6)
    np.testing.assert_array_equal(out["head"]["bias"], LAYERS["head"]["bias"])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_clip_with_norm_keeps_the_dtype(dtype):
    updates = jnp.full((1000,), 300.0, dtype)
    out = oc.clip_with_norm(updates, oc.global_norm(updates), 1.0)
    assert out.dtype == updates.dtype
    helpers.assert_close(out, np.full(1000, 1000**-0.5))
