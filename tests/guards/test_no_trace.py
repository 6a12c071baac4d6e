"""A skipped step leaves no trace, alarms after some, and accumulates nothing."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import helpers
from guard_cases import (
    OPTIMIZERS,
    PATHS,
    bits,
    broken,
    every_bad,
    every_guard,
    guarded,
    params_with_negative_zeros,
    stepper,
)
from helpers import oc
from optaxclip import summary

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


# --------------------------------------------------------------------------------------
# A skipped step leaves no trace
# --------------------------------------------------------------------------------------


@every_bad
@every_optimizer
def test_a_skipped_step_changes_no_bit(name, bad):
    check_no_trace(*guarded(name), bad)


@every_bad
def test_a_skipped_spike_changes_no_bit(bad):
    check_no_trace(*guarded("clip", oc.skip_if_spike), bad)


def check_no_trace(tx, step, bad):
    params = params_with_negative_zeros()
    state = tx.init(params)
    for seed in range(2):
        params, state = step(params, state, helpers.random_tree(seed=seed))
    params = helpers.vary(params, "dense/kernel", -0.0)
    updates = broken(helpers.random_tree(seed=5), "head/kernel", bad)
    new_params, new_state = step(params, state, updates)
    assert bits(new_params) == bits(params)
    assert bits(new_state.guarded_state) == bits(state.guarded_state)
    assert bits(new_state.rule_state) == bits(state.rule_state)
    assert int(new_state.step_count) == 3
    assert int(new_state.skipped_count) == 1
    assert int(new_state.last_skipped_step) == 2


@every_optimizer
def test_a_run_with_bad_steps_is_the_run_without_them(name):
    tx, step = guarded(name)
    good = [helpers.random_tree(seed=seed) for seed in range(4)]
    bad = broken(good[0], "dense/bias", np.nan)
    params = params_with_negative_zeros()
    results = []
    for steps in (good, [bad, *good[:2], bad, bad, *good[2:]]):
        after, state = params, tx.init(params)
        for updates in steps:
            after, state = step(after, state, updates)
        results.append(bits((after, state.guarded_state)))
    assert results[0] == results[1]


@pytest.mark.parametrize("path", PATHS)
@every_bad
def test_a_bad_element_of_any_leaf_and_dtype_is_noticed(dtype, bad, path):
    tx, step = guarded("sgd")
    params = params_with_negative_zeros(dtype)
    updates = broken(helpers.random_tree(dtype, seed=1), path, bad)
    new_params, state = step(params, tx.init(params), updates)
    assert bits(new_params) == bits(params)
    assert bits(state.guarded_state) == bits(tx.init(params).guarded_state)
    assert int(state.skipped_count) == 1
    assert f"guard/culprit/{path}" in summary(state, params)


@every_bad
@pytest.mark.parametrize(
    "dtype", ["float8_e5m2", "float8_e4m3fnuz", "float8_e4m3b11fnuz"]
)
def test_also_of_dtypes_without_infinities_or_a_negative_zero(dtype, bad):
    tx = oc.skip_if_nonfinite(optax.sgd(0.5, momentum=0.9))
    params = jnp.array([1.0, -0.0, 2.0], dtype)
    updates = jnp.array([1.0, bad, 0.0], dtype)
    new_params, _ = stepper(tx)(params, tx.init(params), updates)
    assert bits(new_params) == bits(params)


@pytest.mark.parametrize("size", [1e30, 3e38, 1e-30, 1.0], ids=str)
@pytest.mark.parametrize("name", ["sgd", "adam", "clip"])
def test_what_is_finite_passes_with_the_bits_of_the_unguarded_step(name, size):
    tx, step = guarded(name)
    bare = OPTIMIZERS[name]()
    params = params_with_negative_zeros()
    updates = jax.tree.map(lambda x: size * jnp.tanh(x), helpers.random_tree(seed=1))
    new_params, state = step(params, tx.init(params), updates)
    expected, expected_state = stepper(bare)(params, bare.init(params), updates)
    assert int(state.skipped_count) == 0
    assert bits(new_params) == bits(expected)
    assert bits(state.guarded_state) == bits(expected_state)


def test_the_largest_numbers_of_a_dtype_pass(dtype):
    tx, step = guarded("sgd")
    params = helpers.random_tree(dtype)
    largest = jax.tree.map(lambda x: jnp.full_like(x, jnp.finfo(dtype).max), params)
    _, state = step(params, tx.init(params), largest)
    assert int(state.skipped_count) == 0


@every_guard
def test_what_does_not_count_passes_through_and_back(guard):
    params = {
        "w": jnp.array([1.0, -0.0]),
        "int": jnp.array([3]),
        "bool": jnp.array(True),
        "none": None,
        "masked": optax.MaskedNode(),
        "empty": jnp.zeros((0, 2)),
    }
    tx = guard(optax.identity())
    bad = {**params, "w": jnp.array([jnp.nan, 0.0])}
    updates, state = jax.jit(tx.update)(bad, tx.init(params))
    assert helpers.types(updates) == helpers.types(params)
    assert bits(updates["w"]) == bits(jnp.array([-0.0, -0.0]))
    assert int(updates["int"][0]) == 0
    assert bits(optax.apply_updates(params["w"], updates["w"])) == bits(params["w"])
    passed, _ = jax.jit(tx.update)(params, state)
    assert bits(passed) == bits(params)


@every_guard
def test_an_empty_tree_is_no_reason_to_skip(guard):
    tx = guard(optax.adam(0.1))
    _, state = tx.update({}, tx.init({}))
    assert int(state.skipped_count) == 0
    assert int(summary(state, {})["guard/culprit"]) == -1


# --------------------------------------------------------------------------------------
# The alarm
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_consecutive", [1, 3])
def test_the_alarm_is_raised_by_so_many_skips_in_a_row(max_consecutive):
    tx = oc.skip_if_nonfinite(optax.sgd(0.1), max_consecutive=max_consecutive)
    step, params = stepper(tx), jnp.ones(2)
    state = tx.init(params)
    alarms = []
    for scale in [np.nan] * 2 + [1.0] + [np.nan] * 4 + [1.0]:
        params, state = step(params, state, scale * jnp.ones(2))
        alarms.append(bool(state.alarm))
    rows = [1, 2, 0, 1, 2, 3, 4, 0]
    assert alarms == [row >= max_consecutive for row in rows]
    chex.assert_tree_all_finite(params)


def test_a_nan_is_never_let_through():
    tx = oc.skip_if_nonfinite(optax.adam(0.1), max_consecutive=2)
    step, params = stepper(tx), jnp.array([1.0, -0.0])
    state = tx.init(params)
    for _ in range(10):
        new_params, state = step(params, state, jnp.array([jnp.nan, 1.0]))
        assert bits(new_params) == bits(params)
    assert int(state.skipped_count) == int(state.consecutive_count) == 10


def test_the_documented_loop_restores_a_checkpoint():
    tx = oc.skip_if_nonfinite(optax.sgd(0.1), max_consecutive=2)
    step, params = stepper(tx), jnp.ones(1)
    checkpoint = params, tx.init(params)
    params, state = checkpoint
    restored = []
    for i in range(6):
        gradient = jnp.nan if i in (1, 3, 4) else 1.0
        params, state = step(params, state, jnp.array([gradient]))
        if summary(state)["guard/alarm"]:
            params, state = checkpoint
            restored.append(i)
    assert restored == [4]
    np.testing.assert_allclose(params, [0.9], rtol=1e-6)


# --------------------------------------------------------------------------------------
# Accumulation
# --------------------------------------------------------------------------------------


def micro_batches(tx, scales):
    params, step = jnp.array([1.0, -0.0]), cached_stepper(tx)
    state = tx.init(params)
    for scale in scales:
        params, state = step(params, state, scale * jnp.array([1.0, 2.0]))
    return params, state


cached_stepper = functools.cache(stepper)


@functools.cache
def around_multisteps():
    inner = optax.chain(oc.clip_by_global_norm(1.0), optax.adam(0.1))
    return oc.skip_if_nonfinite(optax.MultiSteps(inner, 2))


def test_around_multisteps_a_bad_micro_batch_is_left_out():
    tx = around_multisteps()
    params, state = micro_batches(tx, [1.0, np.nan, np.inf, 3.0, 2.0, np.nan, 4.0])
    expected, expected_state = micro_batches(tx, [1.0, 3.0, 2.0, 4.0])
    assert bits(params) == bits(expected)
    assert bits(state.guarded_state) == bits(expected_state.guarded_state)
    assert int(state.guarded_state.gradient_step) == 2


def test_around_multisteps_the_accumulator_keeps_its_bits():
    tx = around_multisteps()
    _, before = micro_batches(tx, [1.0])
    _, after = micro_batches(tx, [1.0, np.nan])
    assert bits(after.guarded_state) == bits(before.guarded_state)
    assert int(after.guarded_state.mini_step) == 1


def test_inside_of_multisteps_a_bad_micro_batch_stays_in_the_accumulator():
    """Optax multiplies it by 0: why the guard has to be around."""
    tx = optax.MultiSteps(oc.skip_if_nonfinite(optax.adam(0.1), 2), 2)
    tx = tx.gradient_transformation()
    params, state = micro_batches(tx, [1.0, np.nan])
    np.testing.assert_array_equal(params, [1.0, 0.0])
    report = summary(state, params)
    assert int(report["guard/skipped_count"]) == 1
    assert not report["guard/alarm"]
    params, state = micro_batches(tx, [1.0, np.nan, 3.0, 2.0])
    np.testing.assert_array_equal(params, [1.0, 0.0])
    assert summary(state, params)["guard/alarm"]
