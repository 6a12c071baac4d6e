"""Rules with a memory of every element, against loops in NumPy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec as P

import helpers
import table
from helpers import oc

pytestmark = pytest.mark.usefixtures("strict_shapes")


# --------------------------------------------------------------------------------------
# Written from the equations
# --------------------------------------------------------------------------------------


def spam_loop(gradients, threshold, decay, warmup_steps, reset_every):
    """`(clipped, v)` of every step, in float64; steps are counted from 1."""
    v, clipped, seen = np.zeros_like(gradients[0], np.float64), [], []
    for t, g in enumerate(np.asarray(gradients, np.float64), start=1):
        since = t if reset_every is None else t % reset_every
        if since == 0:
            v = np.zeros_like(v)
        with np.errstate(all="ignore"):
            limit = np.sqrt(threshold * v)
            over = (since >= warmup_steps) & (v > 0) & (g**2 > threshold * v)
            new = np.where(over, np.sign(g) * limit, g)
            v = np.where(np.isfinite(g), decay * v + (1 - decay) * new**2, v)
        clipped.append(new)
        seen.append(v)
    return np.array(clipped), np.array(seen)


def acclip_loop(gradients, b1, b2, eps):
    """The outputs of every step, in float64."""
    m = tau = np.zeros_like(gradients[0], np.float64)
    outputs = []
    for g in np.asarray(gradients, np.float64):
        good = np.isfinite(g)
        m = np.where(good, b1 * m + (1 - b1) * g, m)
        tau = np.where(good, b2 * tau + (1 - b2) * np.abs(g), tau)
        out = np.minimum(tau / (np.abs(m) + eps), 1) * m
        outputs.append(np.where(good, out, np.nan))
    return np.array(outputs)


def history(seed=0, steps=5000, size=6, bad=False):
    """Gradients of changing size, with spikes, zeros, and constants at the end."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.normal(size=(steps, 1))) * np.exp(np.arange(size) - size / 2)
    gradients = rng.normal(size=(steps, size)) * sizes
    gradients[rng.random(gradients.shape) < 0.01] *= 1e5
    gradients[rng.random(gradients.shape) < 0.1] = 0
    gradients[: steps // 2, 0] = 0
    gradients[-steps // 10 :] = gradients[-1]
    if bad:
        wrong = rng.choice([np.nan, np.inf, -np.inf], gradients.shape)
        gradients = np.where(rng.random(gradients.shape) < 0.02, wrong, gradients)
    return gradients.astype(np.float32)


def scanned(tx, gradients) -> Any:
    """The outputs of all steps and the last state, from one compiled scan."""

    def body(state, gradient):
        updates, state = tx.update(gradient, state)
        return state, (updates, state)

    start = tx.init(gradients[0])
    _, seen = jax.jit(lambda xs: jax.lax.scan(body, start, xs))(gradients)
    return jax.tree.map(np.asarray, seen)


# --------------------------------------------------------------------------------------
# SPAM's clip
# --------------------------------------------------------------------------------------

SPAM = {"threshold": 20.0, "decay": 0.99, "warmup_steps": 5, "reset_every": 100}
PAPER = {"threshold": 5e3, "decay": 0.999, "warmup_steps": 20, "reset_every": None}


@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize(
    "options",
    [SPAM, SPAM | {"reset_every": None}, PAPER],
    ids=["resets", "no resets", "long memory"],
)
def test_spam_clip_is_the_hand_written_loop(options, bad):
    gradients = history(0, bad=bad)
    clipped, state = scanned(oc.spam_clip(**options), gradients)
    expected, v = spam_loop(gradients, **options)
    np.testing.assert_allclose(clipped, expected, rtol=1e-5)
    np.testing.assert_allclose(state.rms, np.sqrt(v), rtol=1e-5)
    assert 1e-3 < np.mean(np.abs(clipped) < np.abs(gradients)) < 0.2
    assert np.isfinite(state.rms).all()


@pytest.fixture(scope="module")
def some_clipped():
    gradients = history(1, steps=400)
    return gradients, scanned(oc.spam_clip(**SPAM), gradients)[0]


@pytest.mark.parametrize(
    "change",
    [{"threshold": 20.01}, {"decay": 0.9901}, {"warmup_steps": 6}, {"reset_every": 99}],
    ids=str,
)
def test_the_loop_of_spam_tells_every_constant(some_clipped, change):
    gradients, clipped = some_clipped
    expected, _ = spam_loop(gradients, **(SPAM | change))
    assert not np.allclose(clipped, expected, rtol=1e-5, atol=0)


def test_an_element_that_saw_no_gradient_since_the_reset_is_not_dead():
    gradients = np.zeros((40, 2), np.float32)
    gradients[:, 0] = 1.0
    gradients[30:] = 1e3
    options = SPAM | {"warmup_steps": 20, "reset_every": None}
    clipped, state = scanned(oc.spam_clip(**options), gradients)
    assert clipped[30, 1] == 1e3  # it passes, and is known from then on
    assert clipped[30, 0] < 1e2
    assert (state.rms[30:, 1] > 0).all()


def test_the_clip_waits_after_the_start_and_after_every_reset():
    gradients = np.where(np.arange(1, 36) % 2, 1.0, 1e6)[:, None].astype(np.float32)
    clip = oc.spam_clip(1.0, 0.5, warmup_steps=4, reset_every=16)
    clipped, _ = scanned(clip, gradients)
    passed = np.flatnonzero(clipped[1::2, 0] == 1e6) * 2 + 2  # of the spikes
    assert list(passed) == [2, 16, 18, 32, 34]


@pytest.mark.parametrize("bad", [np.inf, -np.inf])
def test_an_infinity_becomes_the_bound_where_the_clip_is_active(bad):
    gradients = np.ones((3, 2), np.float32)
    gradients[1, 0] = gradients[2, 1] = bad
    clip = oc.spam_clip(4.0, 0.75, warmup_steps=2, reset_every=None)
    clipped, state = scanned(clip, gradients)
    # v is 1/4 after a step, and 7/16 after two
    np.testing.assert_allclose(clipped[1], [np.sign(bad) * 1.0, 1.0])
    np.testing.assert_allclose(clipped[2, 1], np.sign(bad) * np.sqrt(1.75), rtol=1e-6)
    np.testing.assert_allclose(state.rms[1:, 0] ** 2, [1 / 4, 7 / 16], rtol=1e-6)
    early = oc.spam_clip(4.0, 0.75, warmup_steps=3, reset_every=None)
    assert scanned(early, gradients)[0][1, 0] == bad


@pytest.mark.parametrize("scale", [1e-33, 1e-18, 1e18, 1e32])
def test_spam_clip_is_right_for_gradients_of_any_size(scale):
    gradients = history(2, steps=200)
    clipped, _ = scanned(oc.spam_clip(**SPAM), gradients * np.float32(scale))
    expected, _ = spam_loop(gradients.astype(np.float64) * scale, **SPAM)
    np.testing.assert_allclose(clipped, expected, rtol=1e-5, atol=1e-37)


def test_complex_elements_are_clipped_by_their_modulus():
    direction = np.complex64(0.6 - 0.8j)
    gradients = history(3, steps=200)
    clipped, state = scanned(oc.spam_clip(**SPAM), gradients * direction)
    expected, v = spam_loop(gradients, **SPAM)
    np.testing.assert_allclose(clipped, expected * direction, rtol=1e-5)
    np.testing.assert_allclose(state.rms, np.sqrt(v), rtol=1e-5)
    assert state.rms.dtype == np.float32


def test_untouched_elements_of_low_precision_keep_their_bits():
    gradients = jnp.asarray(history(4, steps=200), jnp.bfloat16)
    clipped, _ = scanned(oc.spam_clip(**SPAM), gradients)
    expected, _ = spam_loop(helpers.truth(gradients), **SPAM)
    same = expected == helpers.truth(gradients)
    assert 0.9 < same.mean() < 1
    np.testing.assert_array_equal(clipped[same], np.asarray(gradients)[same])
    np.testing.assert_allclose(helpers.truth(clipped), expected, rtol=2**-8)


def test_the_derivative_through_steps_is_finite():
    clip = oc.spam_clip(4.0, 0.5, warmup_steps=2, reset_every=3)

    def step(state, gradient):
        clipped, state = clip.update(gradient, state)
        return state, clipped

    def total(gradients):
        state = clip.init(gradients[0])
        _, clipped = jax.lax.scan(
            lambda s, g: clip.update(g, s)[::-1], state, gradients
        )
        return jnp.sum(clipped**2)

    gradients = jnp.asarray([[1.0, 0], [1, 0], [9, 9], [0, 0], [1, 1], [9, 9]])
    assert np.isfinite(jax.jit(jax.grad(total))(gradients)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": -1.0}, "Expected threshold >= 0, got -1.0"),
        ({"threshold": "x"}, "Expected threshold to be a number, got 'x'"),
        ({"decay": 1.0}, "Expected 0 <= decay < 1, got 1.0"),
        ({"warmup_steps": -1}, "warmup_steps to be a whole number >= 0, got -1"),
        ({"warmup_steps": 2.5}, "warmup_steps to be a whole number >= 0, got 2.5"),
        ({"reset_every": 0}, r"reset_every .* >= 1, got 0. To never reset, use None"),
        ({"reset_every": 20}, "Expected warmup_steps < reset_every, got 20 and 20"),
    ],
)
def test_bad_arguments_of_spam_clip_raise(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        oc.spam_clip(**options)


# --------------------------------------------------------------------------------------
# ACClip
# --------------------------------------------------------------------------------------

ACCLIP = {"b1": 0.9, "b2": 0.99, "eps": 1e-2}


@pytest.mark.parametrize("bad", [False, True])
def test_acclip_is_the_hand_written_loop(bad):
    gradients = history(5, bad=bad)
    clipped, state = scanned(oc.acclip(**ACCLIP), gradients)
    expected = acclip_loop(gradients, **ACCLIP)
    largest = np.maximum.accumulate(np.nan_to_num(np.abs(expected)))
    close = np.abs(clipped - expected) <= 1e-5 * np.abs(expected) + 1e-7 * largest
    assert np.all(close | np.isnan(expected))
    np.testing.assert_array_equal(np.isnan(clipped), ~np.isfinite(gradients))
    assert 0.1 < np.mean(state.max_values < np.abs(state.momentum)) < 0.9
    assert np.isfinite(state.momentum).all() and np.isfinite(state.max_values).all()


@pytest.mark.parametrize("name", ACCLIP)
def test_the_loop_of_acclip_tells_every_constant(name):
    gradients = history(6, steps=300)
    clipped, _ = scanned(oc.acclip(**ACCLIP), gradients)
    expected = acclip_loop(gradients, **(ACCLIP | {name: ACCLIP[name] * 1.001}))
    assert not np.allclose(clipped, expected, rtol=1e-5, atol=0)


def test_no_element_is_larger_than_its_threshold():
    clipped, state = scanned(oc.acclip(), history(7, steps=500))
    assert np.all(np.abs(clipped) <= state.max_values * (1 + 1e-6))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_without_eps_acclip_knows_no_size(scale):
    gradients = history(8, steps=50)
    plain, _ = scanned(oc.acclip(eps=0.0), gradients)
    scaled, _ = scanned(oc.acclip(eps=0.0), gradients * np.float32(scale))
    np.testing.assert_allclose(scaled / np.float32(scale), plain, rtol=1e-4, atol=1e-5)


def test_a_sum_of_the_largest_numbers_does_not_overflow():
    gradients = np.array([[3e38], [-3e38], [3e38]], np.float32)
    clipped, _ = scanned(oc.acclip(b1=0.0, b2=0.0), gradients)
    np.testing.assert_allclose(clipped, gradients, rtol=1e-6)


def test_complex_elements_of_acclip_keep_the_direction_of_their_momentum():
    direction = np.complex64(0.6 - 0.8j)
    gradients = history(9, steps=100)
    clipped, _ = scanned(oc.acclip(**ACCLIP), gradients * direction)
    expected = acclip_loop(gradients, **ACCLIP) * direction
    largest = np.abs(expected).max()
    np.testing.assert_allclose(clipped, expected, rtol=1e-4, atol=1e-7 * largest)


@pytest.mark.parametrize("name", ["b1", "b2"])
def test_bad_arguments_of_acclip_raise(name):
    with pytest.raises(ValueError, match=f"Expected 0 <= {name} < 1, got 1.5"):
        oc.acclip(**{name: 1.5})
    with pytest.raises(ValueError, match="Expected eps >= 0, got -1"):
        oc.acclip(eps=-1)


# --------------------------------------------------------------------------------------
# All that remember elements
# --------------------------------------------------------------------------------------


def test_inside_shard_map_memories_are_split_like_the_params():
    mesh, spec = jax.make_mesh((8,), ("data",), (AxisType.Auto,)), P("data")
    gradients = history(10, steps=12, size=16)

    def steps(gradients, params):
        tx = optax.chain(
            oc.spam_clip(4.0, 0.5, warmup_steps=1, reset_every=5),
            oc.u_clip(oc.clip_by_global_norm(1.0)),
            oc.acclip(),
            oc.reset_momentum(oc.stable_adamw(0.1), every=4, warmup_steps=2),
        )

        def step(state, gradient):
            updates, state = tx.update(gradient, state, params)
            return state, updates

        return jax.lax.scan(step, tx.init(params), gradients)[1]

    params = gradients[0]
    mapped = jax.shard_map(
        steps, mesh=mesh, in_specs=(P(None, "data"), spec), out_specs=P(None, "data")
    )
    split, whole = jax.jit(mapped)(gradients, params), jax.jit(steps)(gradients, params)
    np.testing.assert_allclose(split, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["acclip", "spam", "stable_adamw"])
def test_a_leaf_among_others_is_that_leaf_alone(name, x64):
    tx = table.clips[name]()
    gradients = {
        "half": jnp.asarray(history(11, steps=30), jnp.bfloat16),
        "double": jnp.asarray(history(12, steps=30), jnp.float64),
    }

    def step(state, gradient):
        updates, state = tx.update(gradient, state, gradient)
        return state, updates

    def run(gradients):
        start = tx.init(jax.tree.map(lambda x: x[0], gradients))
        return jax.lax.scan(step, start, gradients)[1]

    both, alone = jax.jit(lambda x: (run(x), run({"double": x["double"]})))(gradients)
    assert helpers.types(both) == helpers.types(gradients)
    np.testing.assert_allclose(both["double"], alone["double"], rtol=1e-12)
