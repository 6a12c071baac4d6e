"""Inputs at the ends of every range, which a random draw would miss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import helpers
import in_numpy
from helpers import oc
from optaxclip import factors, norms

pytestmark = pytest.mark.usefixtures("strict_shapes")


# --------------------------------------------------------------------------------------
# Single cases that a random draw would miss
# --------------------------------------------------------------------------------------


def test_an_overflowing_true_norm_is_reported_as_infinite_and_clipped_exactly():
    updates = jnp.full((4,), 3e38)
    clip = oc.clip_by_global_norm(1.0)
    clipped, state = clip.update(updates, clip.init(updates))
    np.testing.assert_allclose(clipped, [0.5] * 4, rtol=1e-6)
    assert np.isfinite(state.norms)
    assert oc.summary(state)["clip/norm"] == np.inf


def test_a_factor_below_the_smallest_number_is_applied_exactly():
    updates = jnp.array([3e38, 0.0])
    clipped, _ = oc.clip_by_global_norm(3e-10).update(updates, None)
    np.testing.assert_allclose(clipped, [3e-10, 0.0], rtol=1e-6)


@functools.cache
def norm_of_order(norm, ord):
    """The same function each time, so that it is compiled once."""
    return lambda updates: norm(updates, ord=ord)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("ord", [1, 1.5, 3, 100, float("inf")])
@pytest.mark.parametrize(
    "norm", [norms.global_norm, norms.leaf_norms, norms.unit_norms]
)
def test_every_norm_is_rescued(norm, ord, scale):
    updates = {"w": jnp.array([3.0, -4.0]) * scale}
    clip = oc.clip_by(norm_of_order(norm, ord), scale)
    clipped, _ = clip.update(updates, clip.init(updates))
    size = in_numpy.vector_norm([np.array([3.0, 4.0])], ord=ord)
    np.testing.assert_allclose(
        clipped["w"], np.array([3.0, -4.0]) * (scale / size), rtol=1e-6
    )


# Every factor at updates of norm 5 and a threshold of 1, times any scale.
FACTORS = {
    "rescale": (factors.rescale, 0.2),
    "normalize": (factors.normalize, 0.2),
    "drop": (factors.drop, 0.0),
    "soften": (factors.soften, 1 / 6),
}


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e18, 1e30, 6e37])
@pytest.mark.parametrize("name", FACTORS)
def test_every_factor_depends_on_the_ratio_alone(name, scale):
    factor, expected = FACTORS[name]
    updates = jnp.array([3.0, -4.0]) * scale
    clip = oc.clip_by(norms.global_norm, scale, factor=factor)
    clipped, state = clip.update(updates, clip.init(updates))
    right = np.array([3.0, -4.0]) * expected * scale
    np.testing.assert_allclose(clipped, right, rtol=1e-6)
    np.testing.assert_allclose(state.factors, expected, rtol=1e-6)


def test_a_threshold_near_the_largest_number_is_exact():
    updates = jnp.full((4,), 3e38)  # norm 6e38
    clipped, _ = oc.clip_by_global_norm(3e38).update(updates, None)
    np.testing.assert_allclose(clipped, [1.5e38] * 4, rtol=1e-6)


def test_normalize_by_update_norm_is_exact_over_the_whole_range():
    clip = oc.normalize_by_update_norm()
    large, _ = clip.update(jnp.full((4,), 3e38), None)
    np.testing.assert_allclose(large, [0.5] * 4, rtol=1e-6)
    of_half, _ = clip.update(jnp.full((4,), 300, jnp.float16), None)
    np.testing.assert_allclose(of_half, [0.5] * 4, rtol=1e-3)
    small, _ = clip.update(jnp.array([3e-30, 4e-30]), None)  # eps is 1e-6
    np.testing.assert_allclose(small, [3e-24, 4e-24], rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_the_derivative_is_right_over_the_whole_range(scale):
    def first(updates):
        return oc.clip_by_global_norm(scale).update(updates, None)[0][0]

    # Of 3 t / norm at (3, 4): t / norm - 9 t / norm^3, and -12 t / norm^3.
    gradient = jax.grad(first)(jnp.array([3.0, 4.0]) * scale)
    np.testing.assert_allclose(gradient, [0.128, -0.096], rtol=1e-5)


def test_derivatives_can_be_vmapped_and_taken_forwards():
    def total(updates):
        return jnp.sum(oc.clip_by_global_norm(1.0).update(updates, None)[0])

    batch = jnp.array([[3.0, 4.0], [0.0, 0.0], [0.1, 0.2]])
    expected = [[0.032, -0.024], [1.0, 1.0], [1.0, 1.0]]
    backwards = jax.jit(jax.vmap(jax.grad(total)))(batch)
    np.testing.assert_allclose(backwards, expected, rtol=1e-5)
    forwards = jax.jit(jax.vmap(jax.jacfwd(total)))(batch)
    np.testing.assert_allclose(forwards, expected, rtol=1e-5)


def users_norm(updates):
    """A norm as anyone would write it, with squares that overflow."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(updates)))


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1.0, 1e20, 3e37])
def test_a_users_own_norm_is_rescued_too(scale):
    updates = {"a": jnp.array([3.0]) * scale, "b": jnp.array([-4.0]) * scale}
    clip = oc.clip_by(users_norm, scale)
    clipped, state = clip.update(updates, clip.init(updates))
    np.testing.assert_allclose(clipped["a"], [0.6 * scale], rtol=1e-6)
    np.testing.assert_allclose(clipped["b"], [-0.8 * scale], rtol=1e-6)
    np.testing.assert_allclose(state.norms, 5 * scale, rtol=1e-6)


def test_a_users_own_norm_of_float16_updates_is_rescued_too():
    updates = jnp.full((1000,), 300.0, jnp.float16)
    clip = oc.clip_by(users_norm, 1.0)
    clipped, _ = clip.update(updates, clip.init(updates))
    helpers.assert_close(clipped, np.full(1000, 1 / np.sqrt(1000)))


def test_scopes_of_very_different_size_are_each_rescued():
    updates = {"big": jnp.array([3e30, 4e30]), "small": jnp.array([3e-30, -4e-30])}
    clip = oc.clip_by_leaf_norm({"big": 1.0, "small": 1e-30})
    clipped, state = clip.update(updates, clip.init(updates))
    np.testing.assert_allclose(clipped["big"], [0.6, 0.8], rtol=1e-6)
    np.testing.assert_allclose(clipped["small"], [6e-31, -8e-31], rtol=1e-6)
    np.testing.assert_allclose(state.norms, [5e30, 5e-30], rtol=1e-6)


def test_a_zero_leaf_beside_others_has_norm_zero():
    updates = {"dead": jnp.zeros(3), "live": jnp.array([3.0, 4.0])}
    clip = oc.clip_by_leaf_norm(1.0)
    clipped, state = clip.update(updates, clip.init(updates))
    np.testing.assert_array_equal(clipped["dead"], np.zeros(3))
    np.testing.assert_array_equal(state.norms, [0.0, 5.0])


def test_float64_thresholds_are_not_rounded_to_float32(x64):
    updates = {"w": jnp.array([3.0, 4.0])}
    clipped, _ = oc.clip_by_global_norm(0.1).update(updates, None)
    np.testing.assert_allclose(clipped["w"], [0.06, 0.08], rtol=1e-15)
    clipped, _ = oc.clip_by_value(0.1).update(updates, None)
    np.testing.assert_array_equal(clipped["w"], [0.1, 0.1])


def test_float64_norms_are_recorded_in_float64(x64):
    updates = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([1e-9], jnp.float32)}
    clip = oc.clip_by_leaf_norm(0.1)
    _, state = clip.update(updates, clip.init(updates))
    assert state.norms.dtype == state.max_norms.dtype == jnp.float64
    np.testing.assert_allclose(state.max_norms, [0.1, 0.1], rtol=1e-15)


@pytest.mark.parametrize("size", [1e-300, 1.0, 1e300])
def test_complex128_is_measured_and_clipped_in_its_own_precision(size, x64):
    third = size / 3
    alone = {"z": jnp.array([third * (1 + 2j), third * 2j])}
    clipped, _ = oc.clip_by_global_norm(third).update(alone, None)
    assert clipped["z"].dtype == jnp.complex128
    right = np.array([third * (1 + 2j), third * 2j]) / 3
    np.testing.assert_allclose(clipped["z"], right, rtol=1e-14)
    mixed = alone | {"w": jnp.array([0.5], jnp.float32)}
    leaf_norms = norms.leaf_norms(mixed)
    assert {x.dtype for x in leaf_norms.values()} == {jnp.dtype("float64")}
    np.testing.assert_allclose(leaf_norms["z"], size, rtol=1e-14)


@pytest.mark.parametrize("norm", [norms.global_norm, norms.leaf_norms])
@pytest.mark.parametrize(
    "factor", [factors.rescale, factors.normalize, factors.drop, factors.soften]
)
def test_a_traced_nan_as_the_threshold_is_not_hidden(factor, norm):
    def step(updates, max_norm):
        return oc.clip_by(norm, max_norm, factor).update(updates, None)[0]

    updates = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([1e-3])}
    clipped = jax.jit(step)(updates, jnp.nan)
    assert all(np.isnan(x).all() for x in clipped.values())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
def test_a_non_finite_leaf_spoils_its_own_scope_alone(bad):
    updates = {"a": jnp.array([bad, 1.0]), "b": jnp.array([3.0, 4.0])}
    clip = oc.clip_by_leaf_norm(1.0)
    clipped, state = clip.update(updates, clip.init(updates))
    assert np.isnan(clipped["a"]).all()
    np.testing.assert_allclose(clipped["b"], [0.6, 0.8], rtol=1e-6)
    assert not np.isfinite(state.norms[0])
    np.testing.assert_allclose(state.norms[1], 5.0, rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=str)
@pytest.mark.parametrize("max_norm", [jnp.zeros(()), 1.0, jnp.asarray(jnp.inf)])
def test_no_threshold_hides_a_non_finite_update(max_norm, bad):
    updates = {"a": jnp.array([bad, 1.0]), "b": jnp.array([3.0])}
    clipped, _ = oc.clip_by_global_norm(max_norm).update(updates, None)
    assert np.isnan(clipped["a"]).all()
    assert np.isnan(clipped["b"]).all()


def test_a_traced_negative_threshold_counts_as_zero():
    def step(max_norm):
        updates = jnp.array([3.0, 4.0])
        return (
            oc.clip_by_global_norm(max_norm).update(updates, None)[0],
            oc.clip_by_value(max_norm).update(updates, None)[0],
        )

    for clipped in jax.jit(step)(-1.0):
        np.testing.assert_array_equal(clipped, [0.0, 0.0])


def test_a_traced_nan_threshold_makes_its_scope_nan():
    def step(max_norm):
        updates = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
        limits = {"a": max_norm, "b": 1.0}
        return oc.clip_by_leaf_norm(limits).update(updates, None)[0]

    clipped = jax.jit(step)(float("nan"))
    assert np.isnan(clipped["a"]).all()
    np.testing.assert_array_equal(clipped["b"], [1.0])


# --------------------------------------------------------------------------------------
# Every norm with every threshold
# --------------------------------------------------------------------------------------


def at_least_a_tenth(norms, max_norms):
    return jnp.maximum(0.1, max_norms / norms)


def root_of_rescale(norms, max_norms):
    return jnp.sqrt(factors.rescale(norms, max_norms))


@pytest.mark.parametrize("size", [1e3, 1e20, 1e30, 1e37])
def test_a_factor_of_ones_own_is_not_taken_for_a_ratio(size):
    update = jnp.array([0.6, 0.8]) * size
    for factor, right in (at_least_a_tenth, 0.1), (root_of_rescale, size**-0.5):
        clipped, _ = oc.clip_by(norms.global_norm, 1.0, factor).update(update, None)
        np.testing.assert_allclose(clipped, update * right, rtol=1e-5)


EVERY_FACTOR = {
    "rescale": (factors.rescale, in_numpy.np_rescale),
    "normalize": (factors.normalize, in_numpy.np_normalize),
    "soften": (factors.soften, in_numpy.np_soften),
}


@pytest.mark.parametrize("factor", EVERY_FACTOR)
def test_every_norm_meets_every_threshold(factor):
    """Factors down to 1e-75, which no float32 holds, of norms from 1e-37 to 1e38."""
    ours, reference = EVERY_FACTOR[factor]
    sizes = np.array([1e-37, 1e-30, 1e-25, 1e-20, 1e-9, 1, 1e9, 1e20, 1e30, 1e38])
    limits = np.array([1e-37, 1e-30, 1e-25, 1e-18, 1e-9, 1, 1e9, 1e18, 1e30, np.inf])
    limits = limits[: None if factor == "rescale" else -1]
    direction = np.array([0.6, -0.48, 0.64])

    def clipped(size, limit):
        update = size * jnp.asarray(direction, jnp.float32)
        return oc.clip_by(norms.global_norm, limit, ours).update(update, None)[0]

    every = jax.vmap(jax.vmap(clipped, (None, 0)), (0, None))
    found = jax.jit(every)(jnp.float32(sizes), jnp.float32(limits))
    exact = reference(sizes[:, None], limits)
    expected = (exact * sizes[:, None])[..., None] * direction
    in_range = exact < 3e38
    smallest = float(jnp.finfo(jnp.float32).smallest_normal)
    np.testing.assert_allclose(
        helpers.truth(found)[in_range], expected[in_range], rtol=1e-6, atol=smallest
    )
