"""Clipping inside the backward pass."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from helpers import oc


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


def test_a_traced_limit_that_is_nan_is_not_silent():
    for tap in (oc.clip_cotangent, oc.clip_cotangent_norm):
        slope = jax.jit(jax.grad(lambda x, c, tap=tap: jnp.sum(tap(x, c))))
        assert np.isnan(slope(jnp.ones(3), jnp.nan)).all()


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


def test_it_clips_inside_other_custom_derivatives():
    def inner(x):
        return 7 * oc.clip_cotangent(x, 2.0)

    @jax.custom_vjp
    def outer(x):
        return inner(x)

    def forward(x):
        y, pull = jax.vjp(inner, x)
        return y, pull

    outer.defvjp(forward, lambda pull, g: (10 * pull(g)[0],))
    assert jax.jit(jax.grad(lambda x: 3 * outer(x)))(1.0) == 20.0


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
        ("1", TypeError, r"limit to be a number or a pair \(low, high\), got '1' of"),
        (None, TypeError, "to be a number or a pair .*got None of type NoneType"),
        ({"a": 1.0}, TypeError, "to be a number or a pair"),
        (jnp.ones(3), ValueError, r"to be a number or a pair .*array of shape \(3,\)"),
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


def seen(loss, *args):
    """Returns the statistics that the gradient of ``loss(stats, ...)`` carries."""
    return jax.jit(jax.grad(loss))(oc.cotangent_stats(), *args)


def test_statistics_of_one_call():
    weights = jnp.array([3.0, -4.0, 0.0, 0.1])
    stats = seen(
        lambda s: jnp.sum(weights * oc.clip_cotangent(jnp.ones(4), 1.0, stats=s))
    )
    assert all(leaf.dtype == jnp.float32 for leaf in stats)
    assert (stats.calls, stats.nonfinite, stats.elements, stats.clipped) == (1, 0, 4, 2)
    np.testing.assert_allclose(stats.norms, np.linalg.norm(weights), rtol=1e-6)
    assert np.flatnonzero(stats.histogram).tolist() == [128 + 2]  # 4 <= 5.001 < 8


def test_statistics_of_a_norm_count_the_elements_that_it_changed():
    weights = jnp.array([[3.0, 4.0, 0.0], [0.3, 0.4, 0.0]])

    def loss(stats):
        tapped = oc.clip_cotangent_norm(jnp.ones((2, 3)), 1.0, axis=-1, stats=stats)
        return jnp.sum(weights * tapped)

    stats = seen(loss)
    assert (stats.elements, stats.clipped) == (6, 2)
    np.testing.assert_allclose(stats.norms, np.linalg.norm(weights), rtol=1e-6)


@pytest.mark.parametrize(
    ("size", "place"),
    [
        (0.0, 0),
        (2.0**-126, 2),
        (0.99, 127),
        (1.0, 128),
        (1.99, 128),
        (2.0, 129),
        (3e38, 255),
    ],
)
def test_the_histogram_is_over_powers_of_two(size, place):
    stats = seen(lambda s: size * oc.clip_cotangent(1.0, 1.0, stats=s))
    assert np.flatnonzero(stats.histogram).tolist() == [place]
    largest = float(oc.summary(stats)["cotangent/largest_norm"])
    assert largest > size or size == 0 == largest
    assert largest <= 2 * jnp.float32(size)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_call_that_is_not_finite_is_counted_apart(bad):
    weights = jnp.array([1.0, bad, 4.0])

    def loss(stats):
        def one(weight, x):
            return weight * oc.clip_cotangent(x, 2.0, stats=stats)

        return jnp.sum(jax.vmap(one)(weights, jnp.ones(3)))

    stats = seen(loss)
    assert (stats.calls, stats.nonfinite, stats.histogram.sum()) == (3, 1, 2)
    assert stats.norms == 5
    assert stats.clipped == (2 if bad == np.inf else 1)
    named = oc.summary({"a": stats})
    assert named["cotangent/norm/a"] == 2.5
    assert named["cotangent/nonfinite_fraction/a"] == np.float32(1 / 3)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint], ids=["plain", "remat"])
def test_statistics_add_up_over_the_steps_of_a_scan(wrap):
    def loss(stats):
        @wrap
        def step(h, _):
            return 3 * oc.clip_cotangent(h, 10.0, stats=stats), None

        return jax.lax.scan(step, 1.0, length=50)[0]

    stats = seen(loss)  # 3, 9, then 27 is clipped to 10 and comes back as 30, ...
    assert (stats.calls, stats.clipped) == (50, 48)
    assert stats.norms == 3 + 9 + 27 + 47 * 30


def test_statistics_of_all_devices_inside_shard_map():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    weights = np.arange(1.0, 17.0, dtype=np.float32)

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P("data"), P()), out_specs=(P("data"), P())
    )
    def grad(w, stats):
        def loss(x, stats):
            return jnp.sum(w * oc.clip_cotangent(x, 4.5, stats=stats))

        return jax.grad(loss, argnums=(0, 1))(jnp.ones_like(w), stats)

    slope, stats = grad(weights, oc.cotangent_stats())
    np.testing.assert_array_equal(slope, np.minimum(weights, 4.5))
    assert (stats.calls, stats.elements, stats.clipped) == (8, 16, 12)
    norm = oc.summary(stats)["cotangent/norm"]  # of all devices together
    np.testing.assert_allclose(norm, np.linalg.norm(weights), rtol=1e-6)


def test_statistics_with_a_batch_axis_are_refused():
    stats = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), oc.cotangent_stats())
    with pytest.raises(ValueError, match=r"Call `jax\.vmap\(summary\)`"):
        oc.summary(stats)
    assert jax.vmap(oc.summary)(stats)["cotangent/norm"].shape == (2,)


def test_statistics_need_their_own_type():
    bad: Any = jnp.zeros(3)
    with pytest.raises(TypeError, match=r"Expected stats made by `optaxclip\.cotang"):
        oc.clip_cotangent(1.0, 1.0, stats=bad)


def test_the_derivative_by_a_preactivation_is_clipped():
    sigmoid = oc.clip_preactivation(jax.nn.sigmoid, (-0.5, 0.1))
    z = jnp.linspace(-5, 5, 11)
    np.testing.assert_array_equal(sigmoid(z), jax.nn.sigmoid(z))
    slope = jax.grad(lambda z: jnp.sum(sigmoid(z)))(z)
    expected = jax.grad(lambda z: jnp.sum(jax.nn.sigmoid(z)))(z)
    np.testing.assert_array_equal(slope, jnp.minimum(expected, 0.1))


def test_equal_preactivations_are_one_function():
    bounds: Any = [-1.0, 1.0]
    same = [oc.clip_preactivation(jnp.tanh, limit) for limit in (bounds, tuple(bounds))]
    assert same[0] is same[1]
    assert oc.clip_preactivation(jnp.tanh, 1.0) is not same[0]
    assert same[0].__name__ == "tanh"


@chex.assert_max_traces(n=1)
def _traced_once(x, activation):
    return activation(x)


def test_equal_models_are_traced_once():
    run = jax.jit(_traced_once, static_argnums=1)
    for _ in range(3):
        run(1.0, oc.clip_preactivation(jnp.tanh, 10.0))


def test_a_preactivation_may_have_a_traced_limit():
    def slope(limit):
        return jax.grad(oc.clip_preactivation(jnp.tanh, limit))(0.0)

    np.testing.assert_array_equal(
        jax.jit(jax.vmap(slope))(jnp.array([0.2, 3.0])),
        np.array([0.2, 1.0], np.float32),
    )


def test_a_bad_preactivation_raises():
    bad: Any = 1.0
    with pytest.raises(TypeError, match="Expected activation to be a function, got 1"):
        oc.clip_preactivation(bad, 1.0)
    with pytest.raises(ValueError, match="Expected limit >= 0"):
        oc.clip_preactivation(jnp.tanh, -1.0)
