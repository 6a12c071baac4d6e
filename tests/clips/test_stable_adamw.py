"""StableAdamW against a loop in NumPy, and the facts its paper states."""

from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import helpers
from helpers import oc

pytestmark = pytest.mark.usefixtures("strict_shapes")

OPTIONS = {
    "learning_rate": 0.1,
    "b1": 0.9,
    "b2": 0.99,
    "eps": 0.3,
    "weight_decay": 0.1,
}


# --------------------------------------------------------------------------------------
# Written from the equations
# --------------------------------------------------------------------------------------


def hand_loop(gradients, params, learning_rate, b1, b2, eps, weight_decay):
    """`(updates, root mean squares)` of one tensor, step by step, in float64."""
    gradients = np.asarray(gradients, np.float64)
    m, v = np.zeros_like(gradients[0]), np.zeros_like(gradients[0])
    updates, sizes = [], []
    for t, g in enumerate(gradients, start=1):
        b1_hat = (b1**t - b1) / (b1**t - 1)
        b2_hat = (b2**t - b2) / (b2**t - 1)
        with np.errstate(all="ignore"):
            good = np.isfinite(g)
            m = np.where(good, b1_hat * m + (1 - b1_hat) * g, m)
            v = np.where(good, b2_hat * v + (1 - b2_hat) * g**2, v)
            size = np.sqrt(np.mean(g**2 / np.maximum(v, eps**2)))
        size = size if np.isfinite(size) else np.nan
        rate = learning_rate / np.maximum(1, size)
        updates.append(-rate * (m / (np.sqrt(v) + eps) + weight_decay * params))
        sizes.append(size)
    return np.array(updates), np.array(sizes)


def history(seed=0, steps=5000, size=6, bad=False):
    """Gradients of changing size, with spikes, zeros, and constants at the end."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.normal(size=(steps, 1))) * np.exp(np.arange(size) - size / 2)
    gradients = rng.normal(size=(steps, size)) * sizes
    gradients[rng.random(steps) < 0.02] *= 1e4
    gradients[rng.random(gradients.shape) < 0.1] = 0
    gradients[:, 0] = 0
    gradients[-steps // 10 :] = gradients[-1]
    if bad:
        wrong = rng.choice([np.nan, np.inf, -np.inf], gradients.shape)
        gradients = np.where(rng.random(gradients.shape) < 0.02, wrong, gradients)
    return gradients.astype(np.float32)


def updates_of(gradients, params, **options) -> Any:
    """The updates, the rms and the factors of every step, from one compiled scan."""
    tx = oc.stable_adamw(**(OPTIONS | options))

    def body(state, gradient):
        updates, state = tx.update(gradient, state, params)
        return state, (updates, state.clip_state.norms, state.clip_state.factors)

    last, seen = jax.jit(lambda xs: jax.lax.scan(body, tx.init(params), xs))(gradients)
    return *(jax.tree.map(np.asarray, x) for x in seen), last


PARAMS = np.array([1.0, -2.0, 0.5, 0.0, 3.0, 1e-3], np.float32)


@pytest.mark.parametrize("bad", [False, True])
def test_every_tensor_is_the_hand_written_loop(bad):
    gradients = {"a": history(0, bad=bad), "b": history(1)}
    params = {"a": PARAMS, "b": PARAMS[::-1]}
    updates, sizes, factors, _ = updates_of(gradients, params)
    for i, name in enumerate("ab"):
        expected, rms = hand_loop(gradients[name], params[name], **OPTIONS)
        np.testing.assert_allclose(updates[name], expected, rtol=1e-5, atol=1e-7)
        known = np.where(np.isinf(sizes[:, i]), np.nan, sizes[:, i])
        np.testing.assert_allclose(known, rms, rtol=1e-5)
        np.testing.assert_allclose(factors[:, i], 1 / np.maximum(1, rms), rtol=1e-5)
    assert np.isnan(updates["a"]).any() == bad
    assert 0 < np.mean(factors[:, 1] < 0.9) < 0.5


@pytest.fixture(scope="module")
def some_updates():
    gradients = history(2, steps=300)
    return gradients, updates_of(gradients, PARAMS)[0]


@pytest.mark.parametrize("name", OPTIONS)
def test_the_loop_tells_every_constant(some_updates, name):
    gradients, updates = some_updates
    options = OPTIONS | {name: OPTIONS[name] * 1.001}
    expected, _ = hand_loop(gradients, PARAMS, **options)
    assert not np.allclose(updates, expected, rtol=1e-5, atol=1e-7)


def test_a_training_run_is_the_hand_written_one():
    target = np.linspace(-1, 1, 6)
    tx = oc.stable_adamw(lambda count: 0.1 / (1 + count / 50), weight_decay=0.1)

    def body(carry, _):
        params, state = carry
        updates, state = tx.update(3 * (params - target), state, params)
        return (params + updates, state), params

    start = jnp.zeros(6)
    _, path = jax.lax.scan(body, (start, tx.init(start)), None, length=100)
    params, m, v = np.zeros(6), np.zeros(6), np.zeros(6)
    for t in range(1, 101):
        np.testing.assert_allclose(path[t - 1], params, rtol=1e-5, atol=1e-6)
        g = 3 * (params - target)
        first, second = ((b**t - b) / (b**t - 1) for b in (0.9, 0.99))
        m, v = first * m + (1 - first) * g, second * v + (1 - second) * g**2
        size = np.sqrt(np.mean(g**2 / np.maximum(v, 1e-12)))
        rate = 0.1 / (1 + (t - 1) / 50) / max(1, size)
        params = params - rate * 0.1 * params - rate * m / (np.sqrt(v) + 1e-6)


# --------------------------------------------------------------------------------------
# Facts
# --------------------------------------------------------------------------------------


def test_the_first_step_is_not_clipped():
    gradients = np.array([[1e-30, -3e38, 0.7, 1e10, 3e-4, 5.0]], np.float32)
    updates, sizes, factors, state = updates_of(
        gradients, PARAMS, eps=0.0, weight_decay=0.0
    )
    assert sizes.item() == factors.item() == 1
    assert int(state.clip_state.clipped_count.sum()) == 0
    np.testing.assert_allclose(updates[0], -0.1 * np.sign(gradients[0]), rtol=1e-6)


def test_the_first_step_is_not_clipped_whatever_the_memory():
    def first(b2):
        tx = oc.stable_adamw(0.1, b2=b2)
        return tx.update(PARAMS[:3], tx.init(PARAMS[:3]), PARAMS[:3])[1]

    state = jax.jit(jax.vmap(first))(1 - jnp.geomspace(1e-6, 1, 500))
    np.testing.assert_array_equal(state.clip_state.factors, 1)
    np.testing.assert_array_equal(state.rms, np.tile(np.abs(PARAMS[:3]), (500, 1)))


def test_the_shrinkage_is_bounded():
    gradients = history(3, steps=400)
    _, sizes, _, _ = updates_of(gradients, PARAMS)
    t = np.arange(1, 401)
    b2_hat = (0.99**t - 0.99) / np.where(t == 1, 1, 0.99**t - 1)
    assert np.all(sizes[:, 0] <= 1 / np.sqrt(1 - b2_hat) * (1 + 1e-6))
    spike = np.concatenate([np.full(1000, 1e-3), [1e10]]).astype(np.float32)
    _, sizes, _, _ = updates_of(spike[:, None], PARAMS[:1])
    np.testing.assert_allclose(sizes[-1], 10, rtol=1e-4)


def test_the_weight_decay_shrinks_as_well():
    gradients = np.concatenate([np.full(99, 1e-2), [1e3]]).astype(np.float32)[:, None]
    params = np.full(1, 1e6, np.float32)  # all of the update is decay
    updates, sizes, _, _ = updates_of(gradients, params)
    assert sizes[-1] > 5
    np.testing.assert_allclose(updates[-1], -0.1 / sizes[-1] * 1e5, rtol=1e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_gradient_leaves_its_moments_and_makes_its_leaf_nan(bad):
    gradients = {"a": history(4, steps=50), "b": history(5, steps=50)}
    gradients["a"][20, 3] = bad
    params = {"a": PARAMS, "b": PARAMS}
    updates, _, _, state = updates_of(gradients, params)
    assert list(np.flatnonzero(np.isnan(updates["a"]).all(axis=1))) == [20]
    assert np.isnan(updates["a"]).sum() == 6
    assert np.isfinite(updates["b"]).all()
    moments = jax.tree.leaves((state.momentum, state.rms))
    assert np.isfinite(np.concatenate(moments)).all()


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e18, 1e30])
def test_without_eps_and_decay_the_size_of_the_gradients_does_not_matter(scale):
    gradients = history(6, steps=50).clip(-1e3, 1e3)
    plain = updates_of(gradients, PARAMS, eps=0.0, weight_decay=0.0)
    other = updates_of(gradients * np.float32(scale), PARAMS, eps=0.0, weight_decay=0.0)
    np.testing.assert_allclose(other[0], plain[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(other[1], plain[1], rtol=1e-5)


def test_long_memories_keep_their_digits():
    gradients = np.stack([np.ones(6), np.full(6, 2.0), np.full(6, 3.0)])
    options = {"b1": 0.999999, "b2": 0.9999999}
    updates = updates_of(gradients.astype(np.float32), PARAMS, **options)[0]
    expected, _ = hand_loop(gradients, PARAMS, **(OPTIONS | options))
    np.testing.assert_allclose(updates, expected, rtol=1e-6)


def test_complex_gradients_count_by_their_modulus():
    gradients = history(7, steps=30)
    params = PARAMS.astype(np.complex64)
    updates, sizes, _, _ = updates_of(gradients * np.complex64(0.6 + 0.8j), params)
    expected, rms = hand_loop(gradients, 0 * PARAMS, **OPTIONS)
    np.testing.assert_allclose(sizes[:, 0], rms, rtol=1e-5)
    decay = -0.01 * PARAMS / np.maximum(1, rms)[:, None]
    np.testing.assert_allclose(
        updates, expected * (0.6 + 0.8j) + decay, rtol=1e-4, atol=1e-6
    )


# --------------------------------------------------------------------------------------
# In use
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mask",
    [
        {"dense": {"bias": False, "kernel": True}, "head": False},
        lambda params: jax.tree.map(lambda x: x.shape == (4, 3), params),
    ],
    ids=["tree", "function"],
)
def test_a_mask_says_which_leaves_decay(mask):
    updates, params = helpers.updates_and_params()
    found = [
        tx.update(updates, tx.init(params), params)[0]
        for tx in (
            oc.stable_adamw(0.5, mask=mask),
            oc.stable_adamw(0.5),
            oc.stable_adamw(0.5, weight_decay=0.0),
        )
    ]
    masked, decayed, plain = found
    expected = plain | {
        "dense": {**plain["dense"], "kernel": decayed["dense"]["kernel"]}
    }
    assert helpers.bits(masked) == helpers.bits(expected)
    assert helpers.bits(plain) != helpers.bits(expected)


def test_a_mask_counts_leaves_that_are_no_floats():
    mask = {"a_count": True, "b": False, "c": True, "d": False}
    params = {"a_count": jnp.arange(3)} | {name: jnp.ones(2) for name in "bcd"}
    tx = oc.stable_adamw(0.5, weight_decay=0.25, mask=mask)
    updates = jax.tree.map(jnp.zeros_like, params)
    clipped, _ = tx.update(updates, tx.init(params), params)
    np.testing.assert_array_equal(clipped["c"], -0.5 * 0.25 * np.ones(2))
    assert not clipped["b"].any() and not clipped["d"].any()


def test_summary_shows_the_rms_and_the_factor():
    params = {"a": PARAMS, "b": PARAMS}
    *_, state = updates_of({"a": history(8), "b": history(9)}, params)
    found = oc.summary((optax.EmptyState(), state), params)
    assert found["clip/update_count"] == 5000
    assert found["clip/max_norm/a"] == 1
    np.testing.assert_array_equal(found["clip/norm/b"], state.clip_state.norms[1])
    assert 0 < found["clip/clipped_fraction/b"] < 0.6


def test_moments_are_found_as_params():
    tx, params = oc.stable_adamw(0.1), helpers.random_tree()
    specs = jax.tree.map(lambda x: f"like {x.shape}", params)
    found: Any = optax.tree.map_params(
        tx,
        lambda _, spec: spec,
        tx.init(params),
        specs,
        transform_non_params=lambda _: "own",
    )
    assert found.momentum == found.rms == specs
    assert set(jax.tree.leaves(found.clip_state)) == {"own"}


def test_the_state_survives_flax_serialization():
    params = {"a": PARAMS, "b": PARAMS}
    *_, state = updates_of({"a": history(8), "b": history(9)}, params)
    fresh = oc.stable_adamw(0.1).init(params)
    restored = flax.serialization.from_bytes(fresh, flax.serialization.to_bytes(state))
    assert helpers.bits(restored) == helpers.bits(state)


# --------------------------------------------------------------------------------------
# Errors
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": "x"}, "learning_rate to be a number or a schedule, got 'x'"),
        ({"b1": 1.0}, r"Expected 0 <= b1 < 1, got 1.0"),
        ({"b2": -0.1}, r"Expected 0 <= b2 < 1, got -0.1"),
        ({"eps": -1.0}, r"Expected eps >= 0, got -1.0"),
        ({"weight_decay": None}, "Expected weight_decay to be a number, got None"),
    ],
)
def test_a_bad_argument_raises(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        oc.stable_adamw(**({"learning_rate": 0.1} | options))


def test_it_asks_for_the_params():
    tx = oc.stable_adamw(0.1)
    with pytest.raises(ValueError, match=r"`update\(updates, state, params\)`"):
        tx.update(PARAMS, tx.init(PARAMS))


def test_a_mask_that_does_not_fit_raises():
    updates, params = helpers.updates_and_params()
    for mask, message in [
        ({"dense": True}, "`mask` to be a tree prefix of the params"),
        ({"dense": 1.0, "head": True}, r"`mask` to hold booleans, got 1.0"),
    ]:
        tx = oc.stable_adamw(0.1, mask=mask)
        with pytest.raises((TypeError, ValueError), match=message):
            tx.update(updates, tx.init(params), params)


def test_the_state_of_other_params_raises():
    tx = oc.stable_adamw(0.1)
    with pytest.raises(ValueError, match=r"shape \(6,\) at 'a', got \(3,\).*init"):
        tx.update({"a": PARAMS}, tx.init({"a": PARAMS[:3]}), {"a": PARAMS})
    with pytest.raises(ValueError, match=r"array for each of 1 leaves, got 2.*init"):
        tx.update({"a": PARAMS}, tx.init({"a": PARAMS, "b": PARAMS}), {"a": PARAMS})
    with pytest.raises(TypeError, match="Expected a state of type StableAdamWState"):
        tx.update({"a": PARAMS}, optax.EmptyState(), {"a": PARAMS})
