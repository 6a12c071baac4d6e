"""Clipping inside the backward pass."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import optaxclip as oc


@pytest.mark.parametrize("x", [-3.0, -1.0, -0.2, 0.0, 0.7, 5.0])
def test_half_the_square_gets_the_slope_of_huber(x):
    slope = jax.grad(lambda x: 0.5 * oc.clip_cotangent(x, 1.0) ** 2)(x)
    assert slope == np.float32(np.clip(x, -1, 1))


def test_the_value_is_untouched():
    x = {"a": jnp.array([1e-40, jnp.nan, 3.0]), "n": jnp.arange(3), "b": None}
    for tapped in (oc.clip_cotangent(x, 0.1), oc.clip_cotangent_norm(x, 0.1)):
        assert jax.tree.structure(tapped) == jax.tree.structure(x)
        for new, old in zip(jax.tree.leaves(tapped), jax.tree.leaves(x), strict=True):
            assert np.asarray(new).tobytes() == np.asarray(old).tobytes()


def test_two_taps_have_limits_of_their_own():
    def loss(x):
        return 7 * oc.clip_cotangent(3 * oc.clip_cotangent(x, (-1.0, 4.0)), 0.5)

    assert jax.grad(loss)(1.0) == 1.5
    assert jax.grad(lambda x: -loss(x))(1.0) == -1.0


def test_a_limit_may_depend_on_traced_values():
    def loss(x):
        return 10 * oc.clip_cotangent(x, (-0.1, x + 0.1))

    assert jax.jit(jax.grad(loss))(0.1) == np.float32(0.2)


def test_a_traced_negative_limit_counts_as_zero():
    for tap in (oc.clip_cotangent, oc.clip_cotangent_norm):
        slope = jax.jit(jax.grad(lambda x, c, tap=tap: jnp.sum(tap(x, c))))
        assert not slope(jnp.ones(3), -1.0).any()


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_the_dtype_is_kept(dtype):
    x = jnp.array([3.0, 4.0], dtype)
    for tap in (oc.clip_cotangent, oc.clip_cotangent_norm):
        slope = jax.grad(lambda x, tap=tap: jnp.sum(tap(x, 1.0) * x))(x)
        assert slope.dtype == dtype


def test_leaves_without_a_derivative_are_left_alone():
    x = {"w": jnp.ones(4), "n": jnp.arange(3)}
    for tap in (oc.clip_cotangent, oc.clip_cotangent_norm):
        slope = jax.grad(
            lambda x, tap=tap: 100 * jnp.sum(tap(x, 0.5)["w"]), allow_int=True
        )
        slopes = slope(x)
        assert slopes["n"].dtype == jax.dtypes.float0
        limit = 0.5 if tap is oc.clip_cotangent else 0.25
        np.testing.assert_allclose(slopes["w"], np.full(4, limit), rtol=1e-6)


def test_a_complex_cotangent_keeps_its_phase():
    weights = jnp.array([3 - 4j, 0.03j])
    for tap in (oc.clip_cotangent, oc.clip_cotangent_norm):
        slope = jax.grad(lambda z, tap=tap: jnp.sum((weights * tap(z, 1.0)).real))
        clipped = slope(jnp.ones(2, jnp.complex64))
        np.testing.assert_allclose(clipped[0], 0.6 - 0.8j, rtol=1e-4)


@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e30])
def test_a_norm_neither_overflows_nor_underflows(magnitude):
    weights = jnp.array([3.0, 4.0]) * magnitude
    slope = jax.grad(
        lambda x: jnp.sum(weights * oc.clip_cotangent_norm(x, 0.5 * magnitude))
    )(jnp.ones(2))
    np.testing.assert_allclose(slope, np.array([0.3, 0.4]) * magnitude, rtol=1e-6)


def test_a_nan_makes_all_of_its_norm_nan():
    weights = jnp.array([[1.0, jnp.inf], [1.0, 2.0]])
    slope = jax.grad(
        lambda x: jnp.sum(weights * oc.clip_cotangent_norm(x, 1.0, axis=-1))
    )(jnp.ones((2, 2)))
    assert np.isnan(slope[0]).all()
    np.testing.assert_allclose(np.linalg.norm(slope[1]), 1.0, rtol=1e-6)


def test_under_vmap_every_example_is_clipped_alone():
    weights = jnp.array([[30.0, 40.0], [0.3, 0.4]])

    def loss(x, w):
        return jnp.sum(w * oc.clip_cotangent_norm(x, 1.0))

    slopes = jax.vmap(jax.grad(loss))(jnp.ones((2, 2)), weights)
    np.testing.assert_allclose(slopes, [[0.6, 0.8], [0.3, 0.4]], rtol=1e-6)
    by_axis = jax.grad(
        lambda x: jnp.sum(weights * oc.clip_cotangent_norm(x, 1.0, axis=-1))
    )(jnp.ones((2, 2)))
    np.testing.assert_allclose(by_axis, slopes, rtol=1e-7)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint], ids=["plain", "remat"])
def test_a_scan_of_200_steps_clips_at_each_of_them(wrap):
    # h <- w tanh(h) + x, the loss is the sum over time; the truth is a loop in float64.
    xs, w, limit = np.sin(np.arange(200)) * 0.5, 1.7, 2.0

    def loss(w):
        @wrap
        def step(h, x):
            h = oc.clip_cotangent(w * jnp.tanh(h) + x, limit)
            return h, h

        return jnp.sum(jax.lax.scan(step, 0.1, xs.astype(np.float32))[1])

    states = [np.float64(0.1)]
    for x in xs:
        states.append(w * np.tanh(states[-1]) + x)
    cotangent, slope, clipped = 0.0, 0.0, 0
    for h in reversed(states[:-1]):
        full = cotangent + 1.0  # from the steps after this one, and from the loss
        tapped = np.clip(full, -limit, limit)
        clipped += full != tapped
        slope += tapped * np.tanh(h)
        cotangent = tapped * w * (1 - np.tanh(h) ** 2)
    assert clipped > 10
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(w), slope, rtol=1e-4)


def test_the_second_derivative_is_finite():
    def slope(x):
        return jax.grad(lambda x: jnp.sum(oc.clip_cotangent_norm(x, 1.0) ** 2))(x)

    for x in (jnp.zeros(3), jnp.array([3.0, 0.0, 4.0])):
        second = jax.jacrev(slope)(x)
        assert np.isfinite(second).all()


def test_forward_mode_raises_the_error_of_jax():
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: oc.clip_cotangent(x, 1.0), (1.0,), (1.0,))


def test_inside_shard_map_the_norm_is_that_of_all_devices():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    weights = np.arange(1.0, 17.0, dtype=np.float32)

    def slope(w):
        def loss(x):
            return jnp.sum(w * oc.clip_cotangent_norm(x, 1.0))

        return jax.grad(loss)(jnp.ones_like(w))

    sharded = jax.shard_map(slope, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    right = weights / np.linalg.norm(weights)
    np.testing.assert_allclose(jax.jit(sharded)(weights), right, rtol=1e-6)


@pytest.mark.parametrize(
    ("limit", "error", "message"),
    [
        (-1.0, ValueError, "Expected limit >= 0, got -1.0"),
        (float("nan"), ValueError, "Expected limit >= 0, got nan"),
        ((1.0, 2.0), ValueError, "Expected low <= 0 <= high in limit"),
        ((1.0,), ValueError, r"Expected limit to be a pair \(low, high\)"),
        ("1", TypeError, "limit"),
        ({"a": 1.0}, TypeError, "limit"),
    ],
)
def test_a_bad_limit_raises(limit, error, message):
    with pytest.raises(error, match=message):
        oc.clip_cotangent(jnp.ones(2), limit)


def test_a_bad_norm_raises():
    with pytest.raises(ValueError, match=r"Expected max_norm >= 0, got -1\.0"):
        oc.clip_cotangent_norm(jnp.ones(2), -1.0)


def test_a_bad_axis_raises_on_the_way_forward():
    bad: Any = [0]
    with pytest.raises(TypeError, match="Expected `axis` to be static"):
        oc.clip_cotangent_norm(jnp.ones(2), 1.0, axis=bad)
    with pytest.raises(ValueError, match="Expected axes within shape"):
        oc.clip_cotangent_norm(jnp.ones(2), 1.0, axis=3)


def test_a_kept_axis_of_a_split_array_raises():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def slope(x):
        return jax.grad(lambda x: jnp.sum(oc.clip_cotangent_norm(x, 1.0, axis=-1)))(x)

    sharded = jax.shard_map(slope, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    with pytest.raises(ValueError, match=r"split over the mesh axes \['data'\]"):
        sharded(jnp.ones((8, 2)))
