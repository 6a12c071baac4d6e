"""Clips of matrices by their singular values, against NumPy's decomposition."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import helpers
from helpers import oc
from matrix_cases import (
    RULES,
    SHAPES,
    as_matrices,
    assert_is,
    compiled,
    every_rule,
    np_clip_singular_values,
    some_updates,
)

# --------------------------------------------------------------------------------------
# The equations in NumPy, float64
# --------------------------------------------------------------------------------------


@every_rule
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1.0, 1e20, 1e37])
@pytest.mark.parametrize("ratio", [0.1, 0.9])
def test_every_magnitude_is_the_equation(name, scale, ratio):
    updates = some_updates(scale)
    threshold = np.float32(ratio * scale)
    clipped, state = compiled(name)(updates, threshold)
    assert_is(name, clipped, updates, threshold)
    largest = {
        leaf: np.linalg.svd(as_matrices(x), compute_uv=False).max()
        for leaf, x in updates.items()
    }
    expected = [largest[leaf] for leaf in sorted(SHAPES)]
    np.testing.assert_allclose(state.norms, expected, rtol=1e-5)
    np.testing.assert_array_equal(state.max_norms, np.full(5, threshold))


@every_rule
def test_another_constant_is_another_rule(name):
    updates = some_updates()
    clipped, _ = compiled(name)(updates, np.float32(0.5))
    assert_is(name, clipped, updates, 0.5)
    with pytest.raises(AssertionError):
        assert_is(name, clipped, updates, 0.5001)


@every_rule
def test_the_largest_updates_to_the_smallest_threshold(name):
    updates = some_updates(1e37)
    clipped, _ = compiled(name)(updates, np.float32(1e-30))
    assert_is(name, clipped, updates, 1e-30, rtol=1e-5)


@every_rule
def test_matrices_within_the_bound_come_back_bit_for_bit(name):
    updates = some_updates()
    updates["stack"][1] *= 0.01
    updates["wide"] = np.diag([2.0, 1.0, 1e-45, 0.5, -0.0]).astype(np.float32)[:3]
    clipped, state = compiled(name)(updates, np.float32(2.0))
    assert helpers.bits(clipped["stack"][1]) == helpers.bits(updates["stack"][1])
    assert helpers.bits(clipped["wide"]) == helpers.bits(updates["wide"])
    assert state.factors[4] == 1 and np.min(state.factors) < 1


@every_rule
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_spreads_in_its_own_matrix(name, bad):
    updates = some_updates()
    updates["stack"][1, 0, 0] = updates["tall"][2, 1] = updates["row"][1] = bad
    clipped, state = compiled(name)(updates, np.float32(0.5))
    assert_is(name, clipped, updates, 0.5)
    assert np.isnan(clipped["stack"]).sum() == 12
    assert np.isnan(np.asarray(state.factors)[1:4]).all()


@every_rule
def test_complex_matrices(name):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(4, 3)) + 1j * rng.normal(size=(4, 3))).astype(np.complex64)
    clipped, _ = compiled(name)({"w": x}, np.float32(0.7))
    assert_is(name, clipped, {"w": x}, 0.7, rtol=1e-5)


# --------------------------------------------------------------------------------------
# Derivatives
# --------------------------------------------------------------------------------------


def rotation(size, seed):
    x = np.random.default_rng(seed).normal(size=(size, size))
    return np.linalg.qr(x)[0]


def with_spectrum(values, rows, columns, seed=0):
    left, right = rotation(rows, seed), rotation(columns, seed + 1)
    count = len(values)
    return left[:, :count] @ np.diag(values) @ right[:count]


MATRICES = {
    "zeros": np.zeros((3, 3)),
    "equal": np.eye(3) * 2,
    "equal_small": np.eye(3) / 2,
    "at_the_bound": with_spectrum([2.0, 1.0, 1.0], 3, 3),
    "tall": with_spectrum([1.5, 0.5, 0.2], 5, 3),
    "deficient": with_spectrum([3.0, 0.5, 0.0], 5, 3),
    "wide": with_spectrum([3.0, 3.0, 0.2], 3, 5),
}


@functools.cache
def derivative(name):
    clip = RULES[name][0](1.0)

    def loss(x):
        clipped, _ = clip.update({"w": x}, clip.init({"w": x}))
        return jnp.sum(clipped["w"] * jnp.cos(jnp.arange(x.size)).reshape(x.shape))

    return jax.jit(jax.grad(loss))


@every_rule
@pytest.mark.parametrize("kind", MATRICES)
def test_the_derivative_is_finite(name, kind):
    gradient = derivative(name)(jnp.asarray(MATRICES[kind], jnp.float32))
    chex.assert_tree_all_finite(gradient)


@every_rule
@pytest.mark.parametrize("kind", ["deficient", "tall", "wide"])
def test_the_derivative_is_that_of_finite_differences(name, kind):
    if (name, kind) == ("norm", "wide"):
        kind = "tall"  # where the largest value is there twice, its size has no slope
    x = MATRICES[kind]
    weights = np.cos(np.arange(x.size)).reshape(x.shape)
    slopes = np.zeros(x.size)
    for i in range(x.size):
        ends = []
        for sign in (1, -1):
            moved = x.ravel().copy()
            moved[i] += sign * 1e-5
            ends.append(np.sum(weights * RULES[name][1](moved.reshape(x.shape), 1.0)))
        slopes[i] = (ends[0] - ends[1]) / 2e-5
    found = derivative(name)(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(found, slopes.reshape(x.shape), atol=2e-4)


def test_the_derivative_of_complex_matrices():
    rng = np.random.default_rng(0)
    x, t = rng.normal(size=(2, 4, 3)) + 1j * rng.normal(size=(2, 4, 3))
    x *= 2

    def clipped(x):
        return oc.clip_singular_values(1.0).update({"w": x}, None)[0]["w"]

    arguments = [(jnp.asarray(y, jnp.complex64),) for y in (x, t)]
    _, found = jax.jit(lambda *x: jax.jvp(clipped, *x))(*arguments)
    ends = [np_clip_singular_values(x + h * t, 1.0) for h in (1e-5, -1e-5)]
    np.testing.assert_allclose(found, (ends[0] - ends[1]) / 2e-5, atol=2e-4)


def test_the_derivative_by_the_threshold():
    x = jnp.asarray(with_spectrum([3.0, 2.0, 0.5], 4, 3), jnp.float32)

    def total(limit):
        return jnp.sum(oc.clip_singular_values(limit).update({"w": x}, None)[0]["w"])

    left, right = rotation(4, 0)[:, :2], rotation(3, 1)[:2]
    np.testing.assert_allclose(
        jax.jit(jax.grad(total))(1.0), np.sum(left @ right), rtol=1e-4
    )


# --------------------------------------------------------------------------------------
# Thresholds of every kind
# --------------------------------------------------------------------------------------


@every_rule
def test_a_schedule_and_a_threshold_for_each_pattern(name):
    make, reference = RULES[name]
    updates = some_updates()
    limits = {"stack": lambda count: 0.5 / (1 + count), "**": 1.0}
    clip = make(limits)

    def steps(updates):
        def body(state, _):
            clipped, state = clip.update(updates, state)
            return state, clipped

        return jax.lax.scan(body, clip.init(updates), None, length=2)[1]

    clipped = jax.jit(steps)(updates)
    for i, limit in enumerate((0.5, 0.25)):
        expected = reference(updates["stack"], limit)
        np.testing.assert_allclose(clipped["stack"][i], expected, atol=2e-6)
    expected = reference(updates["tall"], 1.0)
    np.testing.assert_allclose(clipped["tall"][1], expected, atol=2e-6)


def test_half_the_largest_value_as_a_rule():
    x = with_spectrum([4.0, 3.0, 1.0], 3, 3).astype(np.float32)
    clip = oc.clip_singular_values(optax.scale(0.5))
    clipped, state = jax.jit(clip.update)({"w": x}, clip.init({"w": x}))
    values = np.linalg.svd(clipped["w"], compute_uv=False)
    np.testing.assert_allclose(values, [2.0, 2.0, 1.0], rtol=1e-5)
    np.testing.assert_allclose(state.max_norms, [2.0], rtol=1e-5)


# --------------------------------------------------------------------------------------
# Power iteration
# --------------------------------------------------------------------------------------


def drifting(steps=200, size=(20, 12)):
    """A matrix whose largest direction is overtaken by another, slowly."""
    u, v = rotation(size[0], 0)[:, :3], rotation(size[1], 1)[:3]
    t = np.linspace(0, 1, steps)[:, None]
    values = np.concatenate([2 - t, 1 + 2 * t, 0.3 + 0 * t], axis=1)
    noise = np.random.default_rng(2).normal(size=(steps, *size)) * 0.02
    return (np.einsum("ik,tk,kj->tij", u, values, v) + noise).astype(np.float32)


def norms_over(x, num_steps):
    clip = oc.clip_by_spectral_norm(1.0, num_steps)

    def body(state, some):
        clipped, state = clip.update({"w": some}, state)
        return state, (clipped["w"], state.norms[0])

    fresh = clip.init({"w": jnp.zeros(x.shape[1:])})
    return jax.jit(lambda x: jax.lax.scan(body, fresh, x)[1])(x)


def test_a_warm_start_follows_a_matrix_that_changes():
    x = drifting()
    _, found = norms_over(x, 4)
    right = np.linalg.svd(x, compute_uv=False)[:, 0]
    ratio = np.asarray(found) / right
    assert (ratio <= 1 + 1e-6).all()  # always from below
    assert ratio[5:].min() > 0.92  # also where one overtakes the other
    assert np.median(ratio) > 0.9999
    assert ratio[-20:].min() > 0.9999


def test_a_direction_that_was_absent_is_found():
    """Blocks: nothing but the start vector leads from one to the other."""
    first, second = np.zeros((2, 6, 6), np.float32)
    first[:3, :3], second[3:, 3:] = np.eye(3) * 2, np.eye(3)
    x = np.stack([first] * 100 + [first + 5 * second] * 20)
    _, found = norms_over(x, 2)
    np.testing.assert_allclose(found[99], 2.0, rtol=1e-3)
    np.testing.assert_allclose(found[-1], 5.0, rtol=1e-3)


def test_a_cold_start_is_as_near_as_documented():
    x = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    right = np.linalg.svd(x, compute_uv=False)[0]
    ratios = [float(norms_over(x[None], n)[1][0]) / right for n in (4, 16)]
    assert 0.85 < ratios[0] < ratios[1] <= 1
    assert ratios[1] > 0.97


def test_steps_that_say_nothing_leave_the_vector():
    clip = oc.clip_by_spectral_norm(1.0)
    good = {"w": jnp.asarray(with_spectrum([3.0, 1.0], 4, 3), jnp.float32)}
    update = jax.jit(clip.update)
    _, state = update(good, clip.init(good))
    for value in (0.0, jnp.nan, jnp.inf):
        bad = {"w": good["w"].at[1, 1].set(value) if value else 0 * good["w"]}
        _, after = update(bad, state)
        assert helpers.bits(after.rule_state.vectors) == helpers.bits(
            state.rule_state.vectors
        )
    assert np.linalg.norm(state.rule_state.vectors) == pytest.approx(1, rel=1e-6)
