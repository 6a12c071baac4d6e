"""Wrappers that carry what a clip took away, and that reset momentum: whole SPAM."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import helpers
from helpers import oc

pytestmark = pytest.mark.usefixtures("strict_shapes")

SPAM: dict[str, Any] = {
    "learning_rate": 0.1,
    "b1": 0.9,
    "b2": 0.99,
    "eps": 1e-6,
    "threshold": 30.0,
    "guard": 10,
    "every": 60,
    "warmup": 25,
}


# --------------------------------------------------------------------------------------
# Written from the equations
# --------------------------------------------------------------------------------------


def spam_loop(gradients, learning_rate, b1, b2, eps, threshold, guard, every, warmup):
    """`(updates, scales)` of SPAM in float64; elements without a past pass."""
    m = v = np.zeros_like(gradients[0], np.float64)
    updates, scales, last_reset = [], [], None
    for t, g in enumerate(np.asarray(gradients, np.float64), start=1):
        if t % every == 0:
            m, v, last_reset = np.zeros_like(m), np.zeros_like(v), t
        if t >= guard and t % every >= guard:
            spike = (g**2 > threshold * v) & (v > 0)
            g = np.where(spike, np.sign(g) * np.sqrt(threshold * v), g)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        k = np.inf if last_reset is None else t - last_reset
        scale = 1.0
        if k < warmup:
            scale = 1 - 0.99 * (1 + np.cos(np.pi * k / (warmup + 1))) / 2
        adam = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)
        updates.append(-learning_rate * scale * adam)
        scales.append(scale)
    return np.array(updates), np.array(scales)


def u_clip_loop(gradients, limit):
    """`(updates, carries)` of U-Clip around a clip by value, in float64."""
    carry, updates, carries = np.zeros_like(gradients[0], np.float64), [], []
    for g in np.asarray(gradients, np.float64):
        with np.errstate(all="ignore"):
            update = np.clip(g + carry, -limit, limit)
            rest = g + carry - update
        carry = np.where(np.isfinite(rest), rest, carry)
        updates.append(update)
        carries.append(carry)
    return np.array(updates), np.array(carries)


def history(seed=0, steps=300, size=5):
    """Gradients with spikes, and an element that is zero after some resets."""
    rng = np.random.default_rng(seed)
    gradients = rng.normal(size=(steps, size)) * np.exp(np.arange(size) - 2)
    gradients[rng.random(gradients.shape) < 0.02] *= 1e3
    gradients[:100, 0] = gradients[115:160, 0] = 0
    return gradients.astype(np.float32)


def scanned(tx, gradients, **options) -> Any:
    """`(updates, states)` of all steps, from one compiled scan."""

    def body(state, gradient):
        updates, state = tx.update(gradient, state, **options)
        return state, (updates, state)

    start = tx.init(gradients[0])
    _, seen = jax.jit(lambda xs: jax.lax.scan(body, start, xs))(gradients)
    return jax.tree.map(np.asarray, seen)


# --------------------------------------------------------------------------------------
# SPAM, and the reset of momentum
# --------------------------------------------------------------------------------------


def spam():
    clip = oc.spam_clip(
        SPAM["threshold"], SPAM["b2"], SPAM["guard"], reset_every=SPAM["every"]
    )
    adam = optax.adam(*(SPAM[x] for x in ("learning_rate", "b1", "b2", "eps")))
    return optax.chain(clip, oc.reset_momentum(adam, SPAM["every"], SPAM["warmup"]))


@pytest.fixture(scope="module")
def spam_updates():
    gradients = history()
    return gradients, scanned(spam(), gradients)[0]


def test_the_parts_make_up_spam(spam_updates):
    gradients, updates = spam_updates
    expected, scales = spam_loop(gradients, **SPAM)
    np.testing.assert_allclose(updates, expected, rtol=2e-5, atol=1e-7)
    assert np.all(scales[:59] == 1)
    np.testing.assert_allclose(scales[59::60], 0.01)


@pytest.mark.parametrize(
    "name", ["learning_rate", "b1", "b2", "threshold", "guard", "every", "warmup"]
)
def test_the_loop_of_spam_tells_every_constant(spam_updates, name):
    gradients, updates = spam_updates
    value = SPAM[name]
    changed = value + 1 if isinstance(value, int) else value * 1.001
    expected, _ = spam_loop(gradients, **(SPAM | {name: changed}))
    assert not np.allclose(updates, expected, rtol=2e-5, atol=1e-7)


def test_until_the_first_reset_the_inner_transformation_is_unchanged():
    gradients = history(1, steps=20)
    inner = optax.adam(0.1)
    plain, states = scanned(inner, gradients)
    wrapped, wrapped_states = scanned(oc.reset_momentum(inner, 21, 10), gradients)
    assert helpers.bits(wrapped) == helpers.bits(plain)
    assert helpers.bits(wrapped_states.wrapped_state) == helpers.bits(states)


def test_without_a_warm_up_nothing_is_scaled():
    gradients = np.ones((8, 2), np.float32)
    updates, states = scanned(oc.reset_momentum(optax.trace(1.0), 3, 0), gradients)
    np.testing.assert_array_equal(updates[:, 0], [1, 2, 1, 2, 3, 1, 2, 3])
    np.testing.assert_array_equal(states.update_count, np.arange(1, 9))


def test_the_scale_rises_like_a_cosine():
    gradients = np.ones((8, 2), np.float32)
    updates, _ = scanned(oc.reset_momentum(optax.identity(), 4, 3), gradients)
    rising = [1 - 0.99 * (1 + np.cos(np.pi * k / 4)) / 2 for k in range(3)]
    np.testing.assert_allclose(updates[:, 0], [1, 1, 1, *rising, 1, 0.01], rtol=1e-6)


def test_counts_and_schedules_go_on():
    inner = optax.chain(
        optax.scale_by_adam(), optax.scale_by_schedule(lambda count: count)
    )
    _, states = scanned(oc.reset_momentum(inner, 2), history(2, steps=5))
    adam, schedule = states.wrapped_state
    assert adam.count[-1] == schedule.count[-1] == 5
    np.testing.assert_array_equal(adam.mu[1], 0.1 * history(2, steps=5)[1])


def test_arrays_go_back_to_where_they_started():
    inner = optax.scale_by_rss(initial_accumulator_value=0.5)
    gradients = np.ones((4, 2), np.float32)
    _, states = scanned(oc.reset_momentum(inner, 4), gradients)
    sums = states.wrapped_state.sum_of_squares[:, 0]
    np.testing.assert_array_equal(sums, [1.5, 2.5, 3.5, 1.5])


def test_a_reset_cures_moments_that_are_nan():
    gradients = np.ones((4, 2), np.float32)
    gradients[1] = np.nan
    updates, _ = scanned(oc.reset_momentum(optax.trace(0.5), 4, 0), gradients)
    assert list(np.isfinite(updates[:, 0])) == [True, False, False, True]


def test_an_nnx_optimizer_resets_its_momentum():
    model = nnx.Linear(3, 2, use_bias=False, rngs=nnx.Rngs(0))
    tx = oc.reset_momentum(optax.trace(1.0), 3, 0)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def update(model, optimizer):
        ones = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
        optimizer.update(model, ones)

    kernels = []
    for _ in range(6):
        kernels.append(np.array(model.kernel[...])[0, 0])
        update(model, optimizer)
    np.testing.assert_allclose(np.diff(kernels), [1, 2, 1, 2, 3], rtol=1e-6)


def test_the_rhythm_of_resets_can_be_injected():
    tx = optax.inject_hyperparams(oc.reset_momentum)(optax.trace(1.0), 3, 0)
    updates, states = scanned(tx, np.ones((6, 2), np.float32))
    np.testing.assert_array_equal(updates[:, 0], [1, 2, 1, 2, 3, 1])
    assert set(states.hyperparams) == {"every", "warmup_steps"}


def test_statistics_of_a_clip_inside_go_on():
    inner = optax.chain(oc.clip_by_global_norm(1.0), optax.adam(0.1))
    _, states = scanned(oc.reset_momentum(inner, 2), history(3, steps=5))
    last = jax.tree.map(lambda x: x[-1], states)
    assert oc.summary(last)["clip/update_count"] == 5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_scaled_updates_keep_their_dtype(dtype):
    gradients = jnp.asarray(history(4, steps=6), dtype)
    updates, _ = scanned(oc.reset_momentum(optax.identity(), 4, 2), gradients)
    assert updates.dtype == gradients.dtype
    untouched = np.asarray(gradients)[[0, 1, 2, 5]]
    np.testing.assert_array_equal(updates[[0, 1, 2, 5]], untouched)
    scale = 1 - 0.99 * (1 + np.cos(np.pi / 3)) / 2
    expected = helpers.truth(gradients)[4] * scale
    relative = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(helpers.truth(updates)[4], expected, rtol=relative)


def test_reset_momentum_hands_on_params_and_extra_arguments():
    seen = {}

    def update(updates, state, params=None, **extra_args):
        seen.update(extra_args, params=params)
        return updates, state

    nothing = optax.identity().init
    inner = optax.GradientTransformationExtraArgs(nothing, update)
    for tx in oc.reset_momentum(inner), oc.u_clip(inner):
        seen.clear()
        ones = jnp.ones(2)
        tx.update(ones, tx.init(ones), ones, value=3.0)
        assert seen["value"] == 3.0
        assert seen["params"] is ones


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((optax.adam(0.1), 0), "every to be a whole number >= 1, got 0"),
        ((optax.adam(0.1), 2.0), "every to be a whole number >= 1, got 2.0"),
        ((optax.adam(0.1), 5, -1), "warmup_steps to be a whole number >= 0, got -1"),
        ((0.1,), r"`inner` to be a transformation, such as `optax.adam\(1e-3\)`"),
    ],
)
def test_bad_arguments_of_reset_momentum_raise(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        oc.reset_momentum(*arguments)


# --------------------------------------------------------------------------------------
# U-Clip
# --------------------------------------------------------------------------------------


def heavy(seed=0, steps=5000, size=4, bad=False):
    gradients = np.random.default_rng(seed).standard_t(2, size=(steps, size))
    if bad:
        gradients[7::100, 1] = np.nan
        gradients[9::100, 2] = -np.inf
    return gradients.astype(np.float32)


@pytest.mark.parametrize("bad", [False, True])
def test_u_clip_is_the_hand_written_loop(bad):
    gradients = heavy(bad=bad)
    updates, states = scanned(oc.u_clip(oc.clip_by_value(1.5)), gradients)
    expected, carries = u_clip_loop(gradients, 1.5)
    np.testing.assert_allclose(updates, expected, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(states.carry, carries, rtol=1e-5, atol=1e-4)
    assert np.isfinite(states.carry).all()
    wrong, _ = u_clip_loop(gradients, 1.501)
    assert not np.allclose(updates, wrong, rtol=1e-5, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize(
    "clip",
    [oc.clip_by_value(1.0), oc.clip_by_global_norm(1.0), optax.clip_by_block_rms(0.5)],
    ids=["value", "norm", "optax"],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_was_cut_off_is_in_the_carry(clip, dtype):
    gradients = jnp.asarray(heavy(1, steps=500), dtype)
    updates, states = scanned(oc.u_clip(clip), gradients)
    assert updates.dtype == gradients.dtype
    assert states.carry.dtype == np.float32
    missing = np.sum(helpers.truth(updates) - helpers.truth(gradients), axis=0)
    np.testing.assert_allclose(missing, -states.carry[-1], rtol=1e-4, atol=1e-4)
    assert np.abs(missing).max() > 1e-3


def test_a_scope_that_is_nan_keeps_its_carry():
    gradients = heavy(2, steps=3)
    gradients[1, 2] = np.nan
    updates, states = scanned(oc.u_clip(oc.clip_by_global_norm(0.1)), gradients)
    assert np.isnan(updates[1]).all() and np.isfinite(updates[2]).all()
    assert helpers.bits(states.carry[1]) == helpers.bits(states.carry[0])
    assert np.abs(states.carry[0]).max() > 0


def test_updates_without_a_carry_that_need_no_clip_keep_their_bits():
    gradients = jnp.asarray([[-0.0, 1e-40, 0.5]], jnp.float32)
    updates, states = scanned(oc.u_clip(oc.clip_by_value(1.0)), gradients)
    assert helpers.bits(updates) == helpers.bits(gradients)
    np.testing.assert_array_equal(states.carry, 0)


def test_summary_finds_the_clip_inside():
    tx = oc.u_clip(oc.clip_by_global_norm(1.0))
    updates, params = helpers.updates_and_params()
    _, state = tx.update(updates, tx.init(params), params)
    found = oc.summary(state)
    assert found["clip/update_count"] == 1
    np.testing.assert_allclose(found["clip/norm"], oc.global_norm(updates), rtol=1e-6)


def test_u_clip_raises_for_what_is_no_clip_and_for_states_of_others():
    with pytest.raises(TypeError, match=r"`clip` to be a transformation, .* got 1.0"):
        oc.u_clip(1.0)
    tx = oc.u_clip(oc.clip_by_value(1.0))
    with pytest.raises(ValueError, match="Expected a state of type UClipState, got"):
        tx.update(jnp.ones(2), None)
    with pytest.raises(ValueError, match=r"shape \(2,\) at '', got \(3,\)"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(3)))
