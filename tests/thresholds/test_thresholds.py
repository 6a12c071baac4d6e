"""Thresholds with a memory, by schedule, by pattern, each against a loop."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import helpers
from helpers import oc
from histories import run, updates_of_norm
from optaxclip import norms, thresholds

pytestmark = pytest.mark.usefixtures("strict_shapes")


# --------------------------------------------------------------------------------------
# Relative to the parameters
# --------------------------------------------------------------------------------------


def test_relative_to_params_is_a_ratio_of_the_parameters_norm():
    params = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([0.0])}
    updates = {"a": jnp.array([6.0, 8.0]), "b": jnp.array([1.0])}
    rule = thresholds.relative_to_params(0.5, norms.leaf_norms, eps=0.1)
    clip = oc.clip_by(norms.leaf_norms, rule)
    clipped, state = clip.update(updates, clip.init(params), params)
    np.testing.assert_allclose(state.max_norms, [2.5, 0.05], rtol=1e-6)
    np.testing.assert_allclose(clipped["a"], [1.5, 2.0], rtol=1e-6)
    np.testing.assert_allclose(clipped["b"], [0.05], rtol=1e-6)


def test_relative_to_params_works_for_a_global_norm():
    params = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    updates = {"a": jnp.array([30.0]), "b": jnp.array([40.0])}
    rule = thresholds.relative_to_params(0.1, norms.global_norm)
    clip = oc.clip_by(norms.global_norm, rule)
    clipped, state = clip.update(updates, clip.init(params), params)
    assert state.norms.shape == ()
    np.testing.assert_allclose(clipped["a"], [0.3], rtol=1e-6)


def test_adaptive_grad_clip_is_a_rule_on_unit_norms():
    updates, params = helpers.updates_and_params()
    rule = thresholds.relative_to_params(0.25, norms.unit_norms)
    spelled_out = oc.clip_by(norms.unit_norms, rule)
    short = oc.adaptive_grad_clip(0.25)
    out, state = spelled_out.update(updates, spelled_out.init(params), params)
    expected, expected_state = short.update(updates, short.init(params), params)
    helpers.assert_close(out, expected)
    np.testing.assert_allclose(state.norms, expected_state.norms, rtol=1e-6)


def test_parameters_of_low_precision_are_measured_in_float32():
    params = jnp.full((1000,), 300.0, jnp.float16)  # norm 9487, squares overflow
    updates = jnp.full((1000,), 30.0, jnp.float16)
    rule = thresholds.relative_to_params(0.01, norms.leaf_norms)
    clip = oc.clip_by(norms.leaf_norms, rule)
    clipped, _ = clip.update(updates, clip.init(params), params)
    helpers.assert_close(clipped, np.full(1000, 3.0))


# --------------------------------------------------------------------------------------
# Histories
# --------------------------------------------------------------------------------------


SIZES = [1.0, 3.0, 0.5, 100.0, 2.0, 1.0]
DECAY, TIMES = 0.75, 1.5


def average(debias=True):
    return optax.chain(optax.ema(DECAY, debias=debias), optax.scale(TIMES))


def hand_loop(sizes, feed, debias=True):
    """The allowed norm at each step, by the average of the steps before it."""
    ema, count, allowed = 0.0, 0, np.inf
    history = []
    for size in sizes:
        history.append(allowed)
        count += 1
        ema = DECAY * ema + (1 - DECAY) * feed(size, allowed)
        allowed = TIMES * (ema / (1 - DECAY**count) if debias else ema)
    return np.array(history)


def raw(size, allowed):
    return size


def after_the_clip(size, allowed):
    return min(size, allowed)


def lagged_and_clipped(rule):
    return thresholds.clipped_history(thresholds.lagged(rule))


every_history = pytest.mark.parametrize(
    ("wrapper", "feed"),
    [(thresholds.lagged, raw), (lagged_and_clipped, after_the_clip)],
    ids=["lagged", "clipped_history"],
)


@every_history
@pytest.mark.parametrize("debias", [True, False])
def test_a_history_is_the_hand_written_loop(wrapper, feed, debias):
    clip = oc.clip_by(norms.global_norm, wrapper(average(debias)))
    measured, allowed, results, _ = run(clip, SIZES)
    expected = hand_loop(SIZES, feed, debias)
    np.testing.assert_allclose(measured, SIZES, rtol=1e-6)
    np.testing.assert_allclose(allowed, expected, rtol=1e-5)
    np.testing.assert_allclose(results[:, 0], np.minimum(SIZES, expected), rtol=1e-5)


def test_a_spike_raises_its_own_threshold_without_lagged():
    clip = oc.clip_by(norms.global_norm, average())
    _, allowed, _, _ = run(clip, SIZES)
    np.testing.assert_allclose(
        allowed[:-1], hand_loop(SIZES, raw)[1:], rtol=1e-5
    )  # one step earlier than lagged


def test_clipped_history_alone_asks_before_the_clip_and_learns_after_it():
    rule = thresholds.clipped_history(average(debias=False))
    _, allowed, _, _ = run(oc.clip_by(norms.global_norm, rule), SIZES)
    ema, expected = 0.0, []
    for size in SIZES:
        expected.append(TIMES * (DECAY * ema + (1 - DECAY) * size))
        ema = DECAY * ema + (1 - DECAY) * min(size, expected[-1])
    np.testing.assert_allclose(allowed, expected, rtol=1e-5)


@pytest.mark.parametrize("wrapper", [thresholds.lagged, lagged_and_clipped])
def test_a_scope_among_many_is_that_scope_alone(wrapper):
    others = [5.0, 0.1, 7.0, 7.0, 700.0, 0.01]

    def make(pair):
        return {"a": jnp.array([pair[0]]), "b": jnp.array([pair[1]])}

    clip = oc.clip_by(norms.leaf_norms, wrapper(average()))
    _, together, _, state = run(clip, list(zip(SIZES, others, strict=True)), make)
    assert state.norms.shape == (2,)
    alone = oc.clip_by(norms.global_norm, wrapper(average()))
    np.testing.assert_allclose(together[:, 0], run(alone, SIZES)[1], rtol=1e-5)
    np.testing.assert_allclose(together[:, 1], run(alone, others)[1], rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=str)
@every_history
def test_a_non_finite_norm_never_enters_a_history(wrapper, feed, bad):
    clip = oc.clip_by(norms.global_norm, wrapper(average(debias=False)))
    _, allowed, results, state = run(clip, [1.0, 3.0, bad, 2.0, 5.0])
    # The step after the bad one sees the history as if it had not been.
    expected = hand_loop([1.0, 3.0, 2.0, 5.0], feed, debias=False)
    np.testing.assert_allclose(allowed[[0, 1, 3, 4]], expected, rtol=1e-5)
    assert np.isnan(results[2]).all()
    finite = [np.isfinite(x).all() for x in jax.tree.leaves(state.rule_state)]
    assert all(finite)


@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=str)
def test_a_bad_scope_does_not_stop_the_history_of_the_others(bad):
    def make(pair):
        return {"a": jnp.array([pair[0]]), "b": jnp.array([pair[1]])}

    clip = oc.clip_by(norms.leaf_norms, thresholds.lagged(average(debias=False)))
    steps = [(1.0, 1.0), (3.0, bad), (2.0, 2.0), (4.0, 4.0)]
    _, allowed, results, _ = run(clip, steps, make)
    first = hand_loop([1.0, 3.0, 2.0, 4.0], raw, debias=False)
    second = hand_loop([1.0, 2.0, 4.0], raw, debias=False)
    np.testing.assert_allclose(allowed[:, 0], first, rtol=1e-5)
    np.testing.assert_allclose(allowed[[0, 2, 3], 1], second, rtol=1e-5)
    assert np.isnan(results[1, 1])
    np.testing.assert_allclose(
        results[:, 0], np.minimum([1, 3, 2, 4], first), rtol=1e-5
    )


def test_a_non_finite_first_step_leaves_a_fresh_history():
    clip = oc.clip_by(norms.global_norm, thresholds.lagged(average(False)))
    _, allowed, _, _ = run(clip, [np.nan, 1.0, 3.0])
    expected = hand_loop([1.0, 3.0], raw, debias=False)
    np.testing.assert_allclose(allowed[1:], expected, rtol=1e-5)


def no_state(params):
    return optax.EmptyState()


class Seen(NamedTuple):
    largest: jax.Array


def largest_so_far():
    """A rule as a user writes one; its state forgets its dtype on the way."""

    def init(params):
        return Seen(jnp.zeros_like(params, jnp.bfloat16))

    def update(updates, state, params=None):
        del params
        largest = jnp.maximum(state.largest, updates)
        return largest, Seen(largest.astype(jnp.float32))

    return optax.GradientTransformation(init, update)


def test_a_rules_state_is_cast_back_to_the_dtypes_of_its_init():
    clip = oc.clip_by(norms.leaf_norms, thresholds.lagged(largest_so_far()))
    updates = updates_of_norm(2.0)
    fresh = clip.init(updates)
    _, state = clip.update(updates, fresh)
    assert helpers.types(state) == helpers.types(fresh)


def test_a_rule_gets_the_norms_of_all_scopes_as_one_vector():
    shapes = []

    def update(updates, state, params=None):
        del params
        shapes.append(jnp.shape(updates))
        return jnp.ones_like(updates), state

    rule = optax.GradientTransformation(no_state, update)
    updates = {"a": jnp.ones(2), "b": {"c": jnp.ones(3), "n": jnp.array([1])}}
    clip = oc.clip_by(norms.leaf_norms, rule)
    clip.update(updates, clip.init(updates))
    clip = oc.clip_by(norms.global_norm, rule)
    clip.update(updates, clip.init(updates))
    assert shapes == [(2,), ()]


def test_a_rule_receives_the_params_and_the_extra_arguments():
    received = {}

    def update(updates, state, params=None, **extra_args):
        received.update(extra_args, params=params)
        return jnp.ones_like(updates), state

    rule = optax.GradientTransformationExtraArgs(no_state, update)
    clip = oc.clip_by(norms.global_norm, rule)
    updates = updates_of_norm(2.0)
    clip.update(updates, clip.init(updates), updates, value=7.0)
    assert received["value"] == 7.0
    helpers.assert_close(received["params"], updates)


# --------------------------------------------------------------------------------------
# Schedules and mappings
# --------------------------------------------------------------------------------------


def test_a_schedule_counts_the_updates_seen_before():
    clip = oc.clip_by_global_norm(lambda count: 1.0 + count)
    _, allowed, results, _ = run(clip, [10.0] * 3)
    np.testing.assert_array_equal(allowed, [1.0, 2.0, 3.0])
    np.testing.assert_allclose(results[:, 0], [1.0, 2.0, 3.0], rtol=1e-6)


def test_optaxs_schedules_are_thresholds():
    clip = oc.clip_by_global_norm(optax.linear_schedule(4.0, 1.0, 3))
    _, allowed, _, _ = run(clip, [10.0] * 5)
    np.testing.assert_allclose(allowed, [4.0, 3.0, 2.0, 1.0, 1.0], rtol=1e-6)


def test_a_resumed_run_obeys_its_code_and_not_its_checkpoint():
    updates = updates_of_norm(10.0)
    old = oc.clip_by_global_norm(1.0)
    _, state = old.update(updates, old.init(updates))
    new = oc.clip_by_global_norm(5.0)
    clipped, state = new.update(updates, state)
    np.testing.assert_allclose(clipped["w"], [3.0, 4.0], rtol=1e-6)
    assert float(state.max_norms) == 5.0
    assert int(state.update_count) == 2


def test_a_mapping_may_hold_numbers_schedules_and_rules():
    limits = {
        "number": 2.0,
        "schedule": lambda count: 1.0 + count,
        "rule": thresholds.lagged(average()),
    }
    clip = oc.clip_by(norms.leaf_norms, limits)

    def make(size):
        return {k: jnp.array([size]) for k in limits}

    _, allowed, _, state = run(clip, SIZES, make)
    number, rule, schedule = 0, 1, 2  # the order of the leaves
    np.testing.assert_array_equal(allowed[:, number], [2.0] * len(SIZES))
    np.testing.assert_array_equal(allowed[:, schedule], 1.0 + np.arange(len(SIZES)))
    np.testing.assert_allclose(allowed[:, rule], hand_loop(SIZES, raw), rtol=1e-5)
    assert isinstance(state.rule_state, tuple)
    assert len(state.rule_state) == len(limits)


def test_a_mapping_of_rules_hands_each_rule_its_own_scopes():
    shapes = {}

    def watcher(name):
        def update(updates, state, params=None):
            del params
            shapes[name] = jnp.shape(updates)
            return jnp.ones_like(updates), state

        return optax.GradientTransformation(no_state, update)

    updates = {"a": {"b": jnp.ones(1), "c": jnp.ones(1)}, "d": jnp.ones(1)}
    clip = oc.clip_by(norms.leaf_norms, {"a": watcher("a"), "d": watcher("d")})
    clip.update(updates, clip.init(updates))
    assert shapes == {"a": (2,), "d": (1,)}


def test_a_mapping_that_treats_all_leaves_alike_suits_a_global_norm():
    clip = oc.clip_by_global_norm({"**": 1.0})
    clipped, _ = clip.update(updates_of_norm(5.0), None)
    np.testing.assert_allclose(clipped["w"], [0.6, 0.8], rtol=1e-6)
