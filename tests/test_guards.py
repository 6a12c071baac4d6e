"""What must not happen leaves no trace: guards against loops written by hand."""

import functools
from typing import Any

import chex
import flax.core
import flax.serialization
import flax.training.train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import helpers
from helpers import oc
from optaxclip import norms, summary, thresholds

NONFINITE = (np.nan, np.inf, -np.inf)
PATHS = ("dense/bias", "dense/kernel", "head/kernel")

every_bad = pytest.mark.parametrize("bad", NONFINITE, ids=str)
every_guard = pytest.mark.parametrize(
    "guard", [oc.skip_if_nonfinite, oc.skip_if_spike], ids=["nonfinite", "spike"]
)

OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.1, momentum=0.9),
    "adam": lambda: optax.adam(0.1),
    "adafactor": lambda: optax.adafactor(0.1, min_dim_size_to_factor=2),
    "lion": lambda: optax.lion(0.1),
    "clip": lambda: optax.chain(
        oc.clip_by(norms.leaf_norms, thresholds.lagged(helpers.ema_times(1.5))),
        optax.adam(0.1),
    ),
    "noise": lambda: optax.chain(
        optax.add_noise(0.1, 0.5, jax.random.key(0)), optax.sgd(0.1)
    ),
    "schedule": lambda: optax.inject_hyperparams(optax.sgd)(
        learning_rate=optax.linear_schedule(1.0, 0.0, 10)
    ),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def bits(tree):
    """As in the helpers, of keys of random numbers as well."""

    def data(x):
        is_key = jnp.issubdtype(jnp.asarray(x).dtype, jax.dtypes.prng_key)
        return jax.random.key_data(x) if is_key else x

    return helpers.bits(jax.tree.map(data, tree))


def stepper(tx):
    """`(params, state, updates, **extra) -> (params, state)`, compiled."""
    tx = optax.with_extra_args_support(tx)

    @jax.jit
    def step(params, state, updates, **extra_args):
        updates, state = tx.update(updates, state, params, **extra_args)
        return optax.apply_updates(params, updates), state

    return step


@functools.cache
def guarded(name, guard=oc.skip_if_nonfinite):
    tx = guard(OPTIMIZERS[name]())
    return tx, stepper(tx)


def params_with_negative_zeros(dtype="float32"):
    return helpers.vary(helpers.random_tree(dtype, seed=3), "dense/kernel", -0.0)


def broken(tree, path, bad):
    is_complex = jnp.iscomplexobj(jax.tree.leaves(tree)[0])
    return helpers.vary(tree, path, complex(1, bad) if is_complex else bad)


def taken(before, after):
    return int(after.skipped_count) == int(before.skipped_count)


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
# Who was to blame
# --------------------------------------------------------------------------------------


def one_bad_step(tx, paths, steps_before=0, **extra_args):
    """The state after some good steps and one with NaN at the paths."""
    params = helpers.random_tree(seed=3)
    good = helpers.random_tree(seed=1)
    bad = good
    for path in paths:
        bad = helpers.vary(bad, path, np.nan)
    state, step = tx.init(params), stepper(tx)
    for updates in [good] * steps_before + [bad]:
        params, state = step(params, state, updates, **extra_args)
    return state, params


@pytest.mark.parametrize("path", PATHS)
def test_the_culprit_is_named_with_its_step(path):
    report = summary(*one_bad_step(guarded("sgd")[0], [path], steps_before=3))
    assert int(report["guard/culprit"]) == PATHS.index(path)
    assert int(report[f"guard/culprit/{path}"]) == 3
    assert int(report["guard/last_skipped_step"]) == 3
    assert int(report["guard/skipped_count"]) == 1
    assert float(report["guard/skipped_fraction"]) == 0.25


def test_of_several_culprits_the_first_is_named_and_the_state_has_all():
    state, params = one_bad_step(guarded("sgd")[0], PATHS[1:])
    report = summary(state, params)
    assert int(report["guard/culprit"]) == 1
    assert "guard/culprit/dense/kernel" in report
    assert "guard/culprit/head/kernel" not in report
    assert list(state.culprits) == [False, True, True]


def test_without_params_the_culprit_is_a_number():
    state, _ = one_bad_step(guarded("sgd")[0], PATHS[1:2])
    report = summary(state)
    assert int(report["guard/culprit/1"]) == 0


def test_inside_of_jit_the_culprit_is_a_number_and_has_its_name_outside():
    state, params = one_bad_step(guarded("sgd")[0], PATHS[1:2])
    listed = []

    @jax.jit
    def read(state, params):
        report = summary(state, params)
        listed.extend(report)
        return report

    report = read(state, params)
    assert int(report["guard/culprit"]) == 1
    assert not any(key.startswith("guard/culprit/") for key in listed)
    assert f"guard/culprit/{PATHS[1]}" in report
    assert {key: value.shape for key, value in report.items()} == dict.fromkeys(
        report, ()
    )


def test_before_the_first_skip_there_is_no_culprit():
    tx, step = guarded("sgd")
    params = helpers.random_tree()
    _, state = step(params, tx.init(params), params)
    report = summary(state, params)
    assert int(report["guard/culprit"]) == -1
    assert int(report["guard/last_skipped_step"]) == -1
    assert not any(key.startswith("guard/culprit/") for key in report)


def test_the_culprit_stays_until_the_next_skip():
    tx, step = guarded("sgd")
    state, params = one_bad_step(tx, PATHS[2:])
    params, state = step(params, state, helpers.random_tree())
    report = summary(state, params)
    assert int(report["guard/culprit/head/kernel"]) == 0
    assert int(report["guard/consecutive_count"]) == 0


@every_bad
def test_a_bad_loss_is_a_reason_without_a_culprit(bad):
    tx, step = guarded("adam")
    params = params_with_negative_zeros()
    new_params, state = step(params, tx.init(params), params, value=jnp.float32(bad))
    assert bits(new_params) == bits(params)
    report = summary(state, params)
    assert int(report["guard/skipped_count"]) == 1
    assert int(report["guard/culprit"]) == -1


def test_a_loss_of_many_numbers_is_bad_if_one_is():
    tx, step = guarded("sgd")
    params = helpers.random_tree()
    losses = jnp.array([1.0, jnp.nan])
    assert int(step(params, tx.init(params), params, value=losses)[1].skipped_count)


@every_bad
def test_a_watched_loss_is_no_culprit_either(bad):
    tx = oc.skip_if_spike(optax.sgd(0.1), norm=None, threshold=2.0)
    params = helpers.random_tree()
    step = stepper(tx)
    for loss in (bad, 3.0):
        _, state = step(params, tx.init(params), params, value=jnp.float32(loss))
        report = summary(state, params)
        assert int(report["guard/skipped_count"]) == 1
        assert int(report["guard/culprit"]) == -1


def test_several_guards_are_numbered_from_the_outermost():
    inner = oc.skip_if_nonfinite(optax.sgd(0.1))
    tx = oc.skip_if_spike(inner, norms.leaf_norms, {"head": 0.01, "**": jnp.inf})
    report = summary(*one_bad_step(tx, []))
    assert int(report["guard_0/culprit/head/kernel"]) == 0
    assert int(report["guard_1/skipped_count"]) == 0
    assert int(report["guard_1/culprit"]) == -1


def test_the_clips_inside_of_a_guard_are_reported_as_well():
    tx = oc.skip_if_nonfinite(
        optax.chain(oc.clip_by_leaf_norm(1.0), oc.clip_by_group_norm(1.0))
    )
    report = summary(*one_bad_step(tx, PATHS[:1], steps_before=1))
    assert int(report["clip_0/update_count"]) == 1
    assert np.isfinite(float(report["clip_0/norm/dense/bias"]))
    assert "clip_1/norm/dense" in report
    assert "guard/culprit/dense/bias" in report


def head_only():
    return {"dense": {"bias": False, "kernel": False}, "head": {"kernel": True}}


CONTAINERS = {
    "chain": lambda tx: optax.chain(tx, optax.scale(1.0)),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 1).gradient_transformation(),
    "named_chain": lambda tx: optax.named_chain(("guard", tx)),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_guard_is_found_in(container):
    tx = CONTAINERS[container](oc.skip_if_nonfinite(optax.sgd(0.1)))
    report = summary(*one_bad_step(tx, PATHS[1:]))
    (culprit,) = [key for key in report if "/culprit/" in key]
    assert culprit.startswith("guard")
    assert culprit.endswith("/culprit/dense/kernel")


def test_inside_of_a_mask_it_sees_its_leaves_only_and_names_them():
    tx = optax.masked(oc.skip_if_nonfinite(optax.sgd(0.1)), head_only())
    report = summary(*one_bad_step(tx, PATHS[2:]))
    assert int(report[f"guard/culprit/{PATHS[2]}"]) == 0
    assert int(summary(*one_bad_step(tx, PATHS[:1]))["guard/skipped_count"]) == 0


def test_a_partition_skips_its_part_alone():
    tx = optax.partition(
        {
            "a": oc.skip_if_nonfinite(optax.sgd(0.1)),
            "b": oc.skip_if_nonfinite(optax.sgd(0.1)),
        },
        {"dense": "a", "head": "b"},
    )
    params = helpers.random_tree(seed=3)
    bad = helpers.vary(helpers.random_tree(seed=1), "dense/kernel", np.nan)
    new_params, state = stepper(tx)(params, tx.init(params), bad)
    assert bits(new_params["dense"]) == bits(params["dense"])
    assert bits(new_params["head"]) != bits(params["head"])
    report = summary(state, params)
    assert int(report["guard/a/skipped_count"]) == 1
    assert int(report["guard/b/skipped_count"]) == 0


def test_a_train_state_skips():
    params = params_with_negative_zeros()
    state = flax.training.train_state.TrainState.create(
        apply_fn=None, params=params, tx=oc.skip_if_nonfinite(optax.adam(0.1))
    )
    bad = helpers.vary(helpers.random_tree(), "head/kernel", np.inf)
    state = state.apply_gradients(grads=bad)
    assert bits(state.params) == bits(params)
    report = summary(state, state.params)
    assert "guard/culprit/head/kernel" in report


def test_an_nnx_optimizer_skips():
    class Network(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Linear(2, 3, rngs=rngs)
            self.b = nnx.Linear(3, 1, rngs=rngs)

    model = Network(nnx.Rngs(0))
    tx = oc.skip_if_nonfinite(optax.adam(0.1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    before = bits(nnx.state(model, nnx.Param))

    @nnx.jit
    def step(model, optimizer, scale):
        def gradient(x):
            return jnp.ones_like(x) * (scale if x.shape == (3, 1) else 1.0)

        params = nnx.state(model, nnx.Param)
        optimizer.update(model, jax.tree.map(gradient, params))

    step(model, optimizer, jnp.nan)
    params = nnx.state(model, nnx.Param)
    assert bits(params) == before
    assert int(summary(optimizer, params)["guard/culprit/b/kernel"]) == 0
    step(model, optimizer, jnp.float32(1.0))
    assert bits(nnx.state(model, nnx.Param)) != before


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
# Spikes
# --------------------------------------------------------------------------------------


@functools.cache
def scan_of(tx):
    def step(state, now):
        size, loss = now
        updates, state = tx.update(size[None], state, jnp.zeros(1), value=loss)
        return state, (updates[0] != 0, state.consecutive_count, state.alarm)

    return jax.jit(lambda now: jax.lax.scan(step, tx.init(jnp.zeros(1)), now))


def passed_by(tx, sizes, losses=None):
    """Which steps were taken, and the last state: gradients of given norms, in scan."""
    losses = jnp.zeros(len(sizes)) if losses is None else jnp.asarray(losses)
    sizes = jnp.asarray(sizes, jnp.float32)
    state, (is_taken, rows, alarms) = scan_of(tx)((sizes, losses))
    return np.asarray(is_taken), np.asarray(rows), np.asarray(alarms), state


def hand_loop(sizes, allowed, max_consecutive):
    """The docstring in NumPy; `allowed(history)` is asked before the norm is seen."""
    is_taken, rows, history, row, finite_row = [], [], [], 0, 0
    for size in np.asarray(sizes, np.float64):
        bad = not np.isfinite(size) or not size <= allowed(history)
        row = row + 1 if bad else 0
        finite_row = finite_row + np.isfinite(size) if bad else 0
        accepted = np.isfinite(size) and finite_row > max_consecutive
        is_taken.append(not bad or accepted)
        rows.append(row)
        if is_taken[-1]:
            history.append(size)
    return np.array(is_taken), np.array(rows)


def of_window(num_std, window, warmup_steps):
    def allowed(history):
        if len(history) < max(warmup_steps, 1):
            return np.inf
        last = np.array(history[-window:])
        return last.mean() + num_std * last.std()

    return allowed


def with_decay(num_std, decay, warmup_steps):
    def allowed(history):
        if len(history) < max(warmup_steps, 1):
            return np.inf
        past = np.array(history)
        weights = decay ** np.arange(len(past) - 1, -1, -1.0)
        weights /= weights.sum()
        mean = np.sum(weights * past)
        return mean + num_std * np.sqrt(np.sum(weights * (past - mean) ** 2))

    return allowed


def random_sizes(seed, offset=0.0):
    """Noise around a level that shifts, spikes, runs of spikes, NaN, infinities."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.normal(size=500) * 0.2)
    sizes[150:] *= 4
    sizes[330:] /= 8
    sizes[rng.random(500) < 0.05] *= 50
    for start in rng.integers(20, 480, size=4):
        sizes[start : start + rng.integers(2, 9)] *= 30
    sizes = sizes + offset
    for bad in NONFINITE:
        sizes[rng.random(500) < 0.03] = bad
    start = rng.integers(200, 300)
    sizes[start : start + 6] = [np.nan, np.inf, 900.0, np.nan, 800.0, 700.0]
    return sizes.astype(np.float32)


RULES = {
    "window": (
        lambda: thresholds.mean_plus_std(4.0, window=16, warmup_steps=8),
        of_window(4.0, 16, 8),
    ),
    "decay": (
        lambda: thresholds.mean_plus_std(3.0, decay=0.95, warmup_steps=5),
        with_decay(3.0, 0.95, 5),
    ),
    "ema": (
        lambda: optax.chain(optax.ema(0.9), optax.scale(3.0)),
        lambda history: 3 * with_decay(0.0, 0.9, 1)(history),
    ),
    "number": (lambda: 2.5, lambda history: 2.5),
}


@pytest.mark.parametrize("max_consecutive", [1, 5])
@pytest.mark.parametrize("rule", RULES)
def test_random_sequences_go_as_in_a_loop_by_hand(rule, max_consecutive):
    make, allowed = RULES[rule]
    tx = oc.skip_if_spike(
        optax.sgd(1.0),
        threshold=make(),
        max_consecutive=max_consecutive,
        accept_after=max_consecutive,
    )
    sizes = random_sizes(max_consecutive)
    is_taken, rows, alarms, state = passed_by(tx, sizes)
    expected, expected_rows = hand_loop(sizes, allowed, max_consecutive)
    np.testing.assert_array_equal(is_taken, expected)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_array_equal(alarms, expected_rows >= max_consecutive)
    assert int(state.step_count) == len(sizes)
    assert int(state.skipped_count) == np.sum(~expected)
    assert int(state.last_skipped_step) == np.flatnonzero(~expected)[-1]
    assert 10 < np.sum(~expected) < 400  # the sequence is neither tame nor hopeless


@pytest.mark.parametrize("offset", [0.0, -20.0])
def test_random_losses_go_as_in_a_loop_by_hand(offset):
    make, allowed = RULES["window"]
    tx = oc.skip_if_spike(optax.sgd(1.0), norm=None, threshold=make())
    losses = random_sizes(7, offset)
    is_taken, rows, _, _ = passed_by(tx, np.ones(500), losses)
    expected, expected_rows = hand_loop(losses, allowed, 10)
    np.testing.assert_array_equal(is_taken, expected)
    np.testing.assert_array_equal(rows, expected_rows)


def test_two_guards_watch_norm_and_loss_as_in_olmo():
    rule = thresholds.mean_plus_std(6.0, window=128, warmup_steps=64)
    by_norm = oc.skip_if_spike(optax.sgd(1.0))
    tx = oc.skip_if_spike(by_norm, norm=None, threshold=rule)
    rng = np.random.default_rng(0)
    sizes, losses = np.exp(rng.normal(size=(2, 200)) * 0.1)
    sizes[[10, 100, 150]] = 1e3, 1e3, np.nan
    losses[[20, 120, 160]] = 1e3, 1e3, np.inf
    is_taken, _, _, _ = passed_by(tx, sizes, losses)
    assert is_taken[10] and is_taken[20]  # in the first 64 steps spikes pass
    sizes[10] = losses[20] = 1.0
    is_taken, _, _, state = passed_by(tx, sizes, losses)
    assert list(np.flatnonzero(~is_taken)) == [100, 120, 150, 160]
    outer, inner = summary(state), summary(state.guarded_state)
    assert int(outer["guard_0/skipped_count"]) == 2
    assert int(inner["guard/skipped_count"]) == 2


def test_to_an_inner_guard_a_step_that_the_outer_one_skips_has_not_happened():
    by_norm = oc.skip_if_spike(optax.sgd(1.0), threshold=5.0)
    tx = oc.skip_if_spike(by_norm, norm=None, threshold=5.0)
    sizes, losses = np.ones((2, 6))
    sizes[[2, 3, 4]] = losses[[3, 4, 5]] = 9.0, np.nan, 9.0
    is_taken, _, _, state = passed_by(tx, sizes, losses)
    assert list(np.flatnonzero(~is_taken)) == [2, 3, 4, 5]
    outer, inner = state, state.guarded_state
    assert (int(outer.step_count), int(outer.skipped_count)) == (6, 3)
    assert (int(inner.step_count), int(inner.skipped_count)) == (3, 1)
    assert (int(outer.consecutive_count), int(inner.consecutive_count)) == (3, 1)


def test_a_rule_that_is_lagged_already_goes_by_the_step_before_the_last():
    sizes = [1.0, 3.0, 3.0, 7.0, 7.0]
    taken_by = {}
    for name, rule in {
        "as it is": optax.scale(2.0),
        "lagged": thresholds.lagged(optax.scale(2.0)),
    }.items():
        tx = oc.skip_if_spike(optax.sgd(1.0), threshold=rule)
        taken_by[name], *_ = passed_by(tx, np.array(sizes), np.ones(5))
    assert list(taken_by["as it is"]) == [True, False, False, False, False]
    assert list(taken_by["lagged"]) == [True, True, False, False, False]


def test_the_default_judges_from_the_64th_step_on():
    sizes = np.where(np.arange(66) % 2, 1.0, 2.0)  # 1.5 +- 0.5
    tx = oc.skip_if_spike(optax.sgd(1.0))
    sizes[63:65] = 1.6, 4.6
    assert passed_by(tx, sizes)[0][64] == 0
    sizes[64] = 4.4
    assert passed_by(tx, sizes)[0][64] == 1
    sizes[63] = 1e6
    assert passed_by(tx, sizes)[0][63] == 1


def test_a_number_is_the_largest_norm_taken():
    tx = oc.skip_if_spike(optax.sgd(1.0), threshold=2.0)
    is_taken, _, _, _ = passed_by(tx, [3.0, 2.0, 2.001, 1.0, 0.0, np.inf])
    assert list(is_taken) == [False, True, False, True, False, False]  # 0 has no sign
    is_skipped = passed_by(tx, [0.0])[3].skipped_count
    assert int(is_skipped) == 0


def test_a_schedule_counts_the_skipped_steps_too():
    tx = oc.skip_if_spike(optax.sgd(1.0), threshold=lambda count: 3.0 - count)
    is_taken, _, _, _ = passed_by(tx, [2.5, 2.5, 1.5, 0.5])
    assert list(is_taken) == [True, False, False, False]
    is_taken, _, _, _ = passed_by(tx, [2.5, 2.5, 0.5])
    assert list(is_taken) == [True, False, True]


@pytest.mark.parametrize("kind", [dict, flax.core.FrozenDict])
def test_a_mapping_has_a_threshold_for_each_leaf(kind):
    tx = oc.skip_if_spike(
        optax.sgd(1.0),
        norms.leaf_norms,
        kind({"a": 2.0, "b": optax.scale(3.0), "c": lambda count: 9.0 - count}),
    )
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1), "c": jnp.zeros(1)}
    step, state = stepper(tx), tx.init(params)
    culprits = []
    for a, b, c in [
        (1, 5, 1),
        (1, 14, 1),
        (1, 16, 1),
        (1, 50, 1),
        (3, 1, 1),
        (1, 1, 5),
    ]:
        updates = {"a": jnp.full(1, a), "b": jnp.full(1, b), "c": jnp.full(1, c)}
        updates = jax.tree.map(jnp.float32, updates)
        _, new = step(params, state, updates)
        culprits.append(None if taken(state, new) else list(np.asarray(new.culprits)))
        state = new
    assert culprits[:2] == [None, None]  # the first step of a rule always passes
    assert culprits[2] is None  # 16 < 3 * 14
    assert culprits[3] == [False, True, False]  # 50 > 3 * 16
    assert culprits[4:] == [[True, False, False], [False, False, True]]


def test_a_spike_in_one_group_is_enough():
    tx = oc.skip_if_spike(optax.sgd(1.0), norms.group_norms(), optax.scale(2.0))
    params, step = helpers.random_tree(seed=2), None
    step, state = stepper(tx), tx.init(params)
    updates = helpers.random_tree(seed=1)
    params, state = step(params, state, updates)
    spike = {**updates, "head": jax.tree.map(lambda x: 3 * x, updates["head"])}
    new_params, state = step(params, state, spike)
    assert bits(new_params) == bits(params)
    assert int(summary(state, params)["guard/culprit/head"]) == 1


def test_a_norm_of_ones_own_is_watched():
    tx = oc.skip_if_spike(optax.sgd(1.0), lambda u: 2 * oc.global_norm(u), 3.0)
    assert list(passed_by(tx, [1.4, 1.6])[0]) == [True, False]


def test_a_spike_does_not_raise_its_own_threshold():
    tx = oc.skip_if_spike(optax.sgd(1.0), threshold=optax.scale(2.0))
    is_taken, _, _, _ = passed_by(tx, [1.0, 10.0, 2.0, 4.0, 8.1, 8.0])
    assert list(is_taken) == [True, False, True, True, False, True]


@pytest.mark.parametrize("max_consecutive", [1, 4])
def test_what_has_come_to_stay_is_accepted_and_learnt(max_consecutive):
    tx = oc.skip_if_spike(
        optax.sgd(1.0),
        threshold=optax.scale(2.0),
        max_consecutive=max_consecutive,
        accept_after=max_consecutive,
    )
    sizes = [1.0] + [100.0] * (max_consecutive + 3)
    is_taken, rows, alarms, state = passed_by(tx, sizes)
    skipped = [False] * max_consecutive
    assert list(is_taken) == [True, *skipped, True, True, True]
    # The accepted one is still objected to; from the next one on it is learnt.
    assert list(rows) == [0, *range(1, max_consecutive + 2), 0, 0]
    assert list(alarms) == [row >= max_consecutive for row in rows]
    assert int(state.skipped_count) == max_consecutive


@every_bad
def test_what_is_not_finite_is_never_accepted(bad):
    tx = oc.skip_if_spike(optax.sgd(1.0), threshold=optax.scale(2.0), accept_after=2)
    sizes = [1.0] + [bad] * 6 + [9.0, bad, 9.0, 9.0, bad, 9.0]
    is_taken, _, _, _ = passed_by(tx, sizes)
    # The third spike has come to stay, and its norm is what the last goes by.
    assert list(np.flatnonzero(is_taken)) == [0, 10, 12]


def test_a_guard_that_watches_the_norm_does_not_look_at_the_loss():
    tx = oc.skip_if_spike(optax.sgd(1.0), threshold=2.0)
    assert list(passed_by(tx, [1.0], [np.nan])[0]) == [True]


def test_finite_norms_beyond_the_range_pass_where_nothing_limits_them():
    tx = oc.skip_if_spike(optax.sgd(1.0), threshold=optax.scale(2.0))
    params = jnp.zeros(4)
    huge = jnp.full(4, 3e38)  # norm 6e38
    step, state = stepper(tx), tx.init(params)
    params, state = step(params, state, huge)
    assert int(state.skipped_count) == 0
    for x in jax.tree.leaves(state.rule_state.rule_state):
        assert np.isfinite(x).all()
    _, state = step(params, state, jnp.ones(4))
    assert int(state.skipped_count) == 0


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


# --------------------------------------------------------------------------------------
# JAX and what is built on it
# --------------------------------------------------------------------------------------


GUARDS = {
    "nonfinite": lambda: oc.skip_if_nonfinite(optax.adam(0.1)),
    "spike": lambda: oc.skip_if_spike(optax.adam(0.1)),
    "spike_decay": lambda: oc.skip_if_spike(
        optax.adam(0.1),
        norms.leaf_norms,
        thresholds.mean_plus_std(3.0, decay=0.9),
    ),
    "zero": oc.zero_nonfinite,
}
every_kind = pytest.mark.parametrize("kind", GUARDS)


@every_kind
def test_a_scan_traces_once_and_carries_the_state(kind):
    tx, params = GUARDS[kind](), helpers.random_tree()
    update: Any = chex.assert_max_traces(tx.update, n=1)
    steps = jnp.array([1.0, jnp.nan, 2.0, jnp.inf])

    def body(state, scale):
        _, state = update(jax.tree.map(lambda x: x * scale, params), state, params)
        return state, None

    state, _ = jax.jit(lambda s: jax.lax.scan(body, s, steps))(tx.init(params))
    assert helpers.types(state) == helpers.types(tx.init(params))
    assert int(state.step_count) == 4


@every_kind
def test_a_loop_traces_once(kind):
    tx, params = GUARDS[kind](), helpers.random_tree()
    update = jax.jit(chex.assert_max_traces(tx.update, n=1))
    state = tx.init(params)
    for scale in (1.0, np.nan, 2.0):
        updates = helpers.vary(params, "dense/bias", scale)
        _, state = update(updates, state, params)


@every_kind
def test_a_fresh_state_can_be_donated(kind):
    tx, params = GUARDS[kind](), helpers.random_tree()
    update = jax.jit(tx.update, donate_argnums=1)
    state = tx.init(params)
    for _ in range(2):
        _, state = update(params, state, params)
    assert int(state.step_count) == 2


@every_kind
def test_shapes_are_known_without_values(kind):
    tx, params = GUARDS[kind](), helpers.random_tree()
    shapes = jax.eval_shape(tx.init, params)
    assert helpers.types(shapes) == helpers.types(tx.init(params))
    _, after = jax.eval_shape(tx.update, params, shapes, params)
    assert helpers.types(after) == helpers.types(shapes)


@every_guard
def test_under_vmap_each_seed_decides_for_itself(guard):
    tx = guard(optax.adam(0.1))
    params = jnp.array([[1.0, -0.0]] * 3)
    updates = jnp.array([[1.0, 1.0], [1.0, jnp.nan], [1.0, 2.0]])

    def first(updates, params):
        return tx.update(updates, tx.init(params), params)

    out, state = jax.jit(jax.vmap(first))(updates, params)
    new_params: Any = optax.apply_updates(params, out)
    assert list(state.skipped_count) == [0, 1, 0]
    assert bits(new_params[1]) == bits(params[1])
    alone, _ = jax.jit(first)(updates[2], params[2])
    np.testing.assert_allclose(out[2], alone, rtol=1e-6)
    report = jax.vmap(summary)(state)
    assert list(report["guard/skipped_count"]) == [0, 1, 0]


@pytest.mark.parametrize("kind", ["nonfinite", "spike", "spike_decay"])
def test_map_params_finds_the_moments_and_nothing_else(kind):
    tx, params = GUARDS[kind](), helpers.random_tree()
    marked: Any = optax.tree.map_params(
        tx,
        lambda x: "param",
        tx.init(params),
        transform_non_params=lambda x: "other",
    )
    assert jax.tree.leaves(marked).count("param") == 2 * len(PATHS)
    assert marked.guarded_state[0].mu == jax.tree.map(lambda x: "param", params)
    assert marked.culprits == "other"


def states_of(kind):
    tx, params = GUARDS[kind](), helpers.random_tree()
    step = jax.jit(tx.update)
    bad = helpers.vary(params, "dense/bias", np.nan)
    _, state = step(params, tx.init(params), params)
    _, state = step(bad, state, params)
    return tx.init(params), state


@every_kind
def test_a_state_survives_flax_serialization(kind):
    fresh, state = states_of(kind)
    data = flax.serialization.to_bytes(state)
    restored = flax.serialization.from_bytes(fresh, data)
    assert bits(restored) == bits(state)


@every_kind
def test_a_state_survives_orbax(kind, tmp_path):
    fresh, state = states_of(kind)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        abstract = jax.eval_shape(lambda: fresh)
        restored = checkpointer.restore(tmp_path / "state", abstract)
    assert bits(restored) == bits(state)


def test_an_injected_hyperparameter_inside_can_be_changed():
    tx = oc.skip_if_nonfinite(optax.inject_hyperparams(optax.sgd)(learning_rate=1.0))
    step, params = stepper(tx), jnp.ones(1)
    state: Any = tx.init(params)
    state.guarded_state.hyperparams["learning_rate"] = jnp.float32(0.5)
    params, state = step(params, state, jnp.array([jnp.nan]))
    assert float(state.guarded_state.hyperparams["learning_rate"]) == 0.5
    params, state = step(params, state, jnp.ones(1))
    np.testing.assert_allclose(params, [0.5])


def test_an_injected_threshold_is_obeyed():
    make: Any = optax.inject_hyperparams(
        lambda threshold: oc.skip_if_spike(optax.sgd(1.0), threshold=threshold)
    )
    tx = make(threshold=2.0)
    params = jnp.zeros(1)
    state = tx.init(params)
    updates, state = tx.update(jnp.array([3.0]), state, params)
    assert updates[0] == 0
    state.hyperparams["threshold"] = jnp.float32(4.0)
    updates, _ = tx.update(jnp.array([3.0]), state, params)
    assert updates[0] == -3


def test_extra_arguments_reach_what_is_inside():
    received = {}

    def update(updates, state, params=None, **extra_args):
        del params
        received.update(extra_args)
        return updates, state

    def init(params):
        del params
        return optax.EmptyState()

    inner = optax.GradientTransformationExtraArgs(init, update)
    tx = oc.skip_if_nonfinite(inner)
    tx.update(jnp.ones(1), tx.init(jnp.ones(1)), value=1.0, other="x")
    assert received == {"value": 1.0, "other": "x"}


# --------------------------------------------------------------------------------------
# Meshes
# --------------------------------------------------------------------------------------

SHAPES = {"dense": {"bias": (8,), "kernel": (8, 4)}, "head": {"kernel": (4, 8)}}
SPECS = {
    "dense": {"bias": P(), "kernel": P("data", "model")},
    "head": {"kernel": P(None, "model")},
}


def is_spec(x):
    return isinstance(x, P)


def grid(kind=AxisType.Auto):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)


def three_steps_one_bad(path="dense/kernel"):
    """The NaN is in the first row and column: on one device only."""
    trees = [helpers.random_tree(seed=seed, shapes=SHAPES) for seed in range(3)]
    trees[1] = helpers.vary(trees[1], path, np.nan)
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


def scanned(tx, params, steps):
    def body(carry, updates):
        params, state = carry
        updates, state = tx.update(updates, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(body, (params, tx.init(params)), steps)[0]


def mesh_guards(kind):
    inner = optax.chain(oc.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9))
    return {"nonfinite": oc.skip_if_nonfinite, "spike": oc.skip_if_spike}[kind](inner)


@functools.cache
def on_one_device(kind, path="dense/kernel"):
    params = helpers.random_tree(seed=9, shapes=SHAPES)
    run = jax.jit(functools.partial(scanned, mesh_guards(kind)))
    return run(params, three_steps_one_bad(path))


def counters(state):
    return [
        int(x) for x in (state.step_count, state.skipped_count, state.consecutive_count)
    ] + [list(np.ravel(state.culprits)), int(state.last_skipped_step)]


@pytest.mark.parametrize(
    ("kind", "setting"),
    [
        ("nonfinite", "auto"),
        ("nonfinite", "explicit"),
        ("nonfinite", "shard_map"),
        ("nonfinite", "without_types"),
        ("spike", "shard_map"),
    ],
)
def test_a_nan_on_one_device_is_a_nan_on_all(kind, setting):
    tx = mesh_guards(kind)
    params = helpers.random_tree(seed=9, shapes=SHAPES)
    steps = three_steps_one_bad()
    mesh = grid(AxisType.Explicit if setting == "explicit" else AxisType.Auto)
    in_time = jax.tree.map(lambda spec: P(None, *spec), SPECS, is_leaf=is_spec)
    run = functools.partial(scanned, tx)
    if setting == "without_types":
        run = functools.partial(scanned, oc.over_axes(tx, SPECS))
    if setting in ("shard_map", "without_types"):
        run = jax.shard_map(
            lambda p, s, run=run: (lambda out: (out[0], guard_facts(out[1])))(
                run(p, s)
            ),
            mesh=mesh,
            in_specs=(SPECS, in_time),
            out_specs=(SPECS, P()),
            check_vma=setting == "shard_map",
        )

    def put(tree, specs):
        shardings = jax.tree.map(
            lambda spec: NamedSharding(mesh, spec), specs, is_leaf=is_spec
        )
        return jax.device_put(tree, shardings)

    with jax.set_mesh(mesh):
        after, state = jax.jit(run)(put(params, SPECS), put(steps, in_time))
    expected, expected_state = on_one_device(kind)
    chex.assert_trees_all_close(after, expected, rtol=1e-5)
    assert counters(state) == counters(expected_state)
    for leaf in jax.tree.leaves(after["dense"]["bias"]):
        copies = {np.asarray(s.data).tobytes() for s in leaf.addressable_shards}
        assert len(copies) == 1


def guard_facts(state):
    """What is the same on all devices: not the moments, split like the params."""
    return state._replace(guarded_state=(), rule_state=())


def in_shard_map(function, *args, specs, check_vma=True):
    mapped = jax.shard_map(
        function, mesh=grid(), in_specs=specs, out_specs=P(), check_vma=check_vma
    )
    return jax.jit(mapped)(*args)


@pytest.mark.parametrize("check_vma", [True, False])
def test_a_bad_loss_on_one_device_is_bad_on_all(check_vma):
    tx = oc.over_axes(oc.skip_if_nonfinite(optax.sgd(0.1)), P())

    def step(params, losses):
        updates, state = tx.update(params, tx.init(params), params, value=losses)
        return updates, state.skipped_count

    losses = jnp.ones(8).at[3].set(jnp.nan)
    run = functools.partial(
        in_shard_map, step, specs=(P(), P(("data", "model"))), check_vma=check_vma
    )
    updates, skipped = run(jnp.ones(2), losses)
    assert int(skipped) == 1
    assert bits(updates) == bits(jnp.array([-0.0, -0.0]))
    assert int(run(jnp.ones(2), jnp.ones(8))[1]) == 0


def test_a_watched_loss_that_differs_between_devices_raises():
    tx = oc.skip_if_spike(optax.sgd(0.1), norm=None, threshold=2.0)

    def step(params, losses, mean):
        loss = jnp.mean(losses)
        loss = jax.lax.pmean(loss, "data") if mean else loss
        return tx.update(params, tx.init(params), params, value=loss)[1].skipped_count

    run = functools.partial(in_shard_map, specs=(P(), P("data")))
    with pytest.raises(ValueError, match=r"same on all devices.*\['data'\].*pmean"):
        run(functools.partial(step, mean=False), jnp.ones(2), jnp.ones(8))
    state = run(functools.partial(step, mean=True), jnp.ones(2), 3 * jnp.ones(8))
    assert int(state) == 1


def test_gradients_that_are_not_summed_over_devices_raise():
    tx = oc.skip_if_nonfinite(optax.sgd(0.1))

    def step(params, pieces):
        return tx.update(pieces, tx.init(params), params)[1].skipped_count

    with pytest.raises(ValueError, match="summed over devices"):
        in_shard_map(step, jnp.ones(1), jnp.ones(4), specs=(P(), P("data")))


# --------------------------------------------------------------------------------------
# unscale
# --------------------------------------------------------------------------------------


def unscaled(updates, scale):
    tx = oc.unscale(scale)
    return tx.update(updates, tx.init(updates))[0]


def test_unscale_divides_exactly_and_widens(dtype):
    updates = helpers.random_tree(dtype, seed=1)
    out = jax.jit(unscaled)(updates, jnp.float32(2.0**15))
    expected = jax.tree.map(lambda x: x / 2**15, helpers.truth(updates))
    wide = {"float64": jnp.float64, "complex64": jnp.complex64}
    for ours, right in zip(
        jax.tree.leaves(out), jax.tree.leaves(expected), strict=True
    ):
        assert ours.dtype == wide.get(str(dtype), jnp.float32)
        np.testing.assert_array_equal(ours, right)


def test_unscale_keeps_what_float16_would_lose():
    smallest = jnp.array([6e-8], jnp.float16)
    assert float(unscaled(smallest, 2.0**15)[0]) == float(smallest[0]) / 2**15 > 0


@pytest.mark.parametrize(
    "scale", [1024, 1024.0, np.float16(1024), jnp.bfloat16(1024)], ids=type
)
def test_the_scale_is_a_number_of_any_kind(scale):
    np.testing.assert_array_equal(unscaled(jnp.array([512.0]), scale), [0.5])
    tx = oc.unscale()
    out, _ = tx.update(jnp.array([512.0]), tx.init(None), loss_scale=scale)
    np.testing.assert_array_equal(out, [0.5])


def test_a_changing_scale_is_traced_once():
    tx = oc.unscale()
    update = jax.jit(chex.assert_max_traces(tx.update, n=1))
    for scale in (2.0, 4.0):
        out, _ = update(jnp.ones(1), tx.init(None), loss_scale=jnp.float32(scale))
        np.testing.assert_array_equal(out, [1 / scale])


def test_unscale_leaves_alone_what_does_not_count():
    updates = {"i": jnp.array([4]), "n": None, "w": jnp.array([4.0])}
    out = unscaled(updates, 2.0)
    assert bits(out) == bits({**updates, "w": jnp.array([2.0])})


@every_bad
def test_what_is_not_finite_stays_so(bad):
    np.testing.assert_array_equal(unscaled(jnp.array([bad]), 2.0), [bad])


def test_a_clip_before_unscale_takes_the_gradients_for_too_large():
    scale, gradient = 1024.0, jnp.array([0.3, 0.4])  # norm 0.5: not to be clipped
    clip, unscale = oc.clip_by_global_norm(1.0), oc.unscale(1024.0)
    right: Any = optax.chain(unscale, clip)
    wrong: Any = optax.chain(clip, unscale)
    out, _ = right.update(scale * gradient, right.init(gradient))
    np.testing.assert_allclose(out, gradient, rtol=1e-6)
    out, _ = wrong.update(scale * gradient, wrong.init(gradient))
    np.testing.assert_allclose(out, gradient / 512, rtol=1e-6)


def test_training_in_float16_with_a_scale_that_halves_on_a_skip():
    tx: Any = optax.chain(
        oc.unscale(),
        oc.skip_if_nonfinite(optax.chain(oc.clip_by_global_norm(1.0), optax.sgd(0.1))),
    )
    target = jnp.array([1.0, -2.0, 0.5])

    def loss(params, dtype):
        return jnp.sum((params - target).astype(dtype) ** 2)

    @jax.jit
    def step(params, state, scale):
        def scaled_loss(params):
            return loss(params, jnp.float16) * scale.astype(jnp.float16)

        gradients = jax.grad(scaled_loss)(params)
        updates, state = tx.update(gradients, state, params, loss_scale=scale)
        bad = state[1].consecutive_count > 0
        scale = jnp.where(bad, scale / 2, scale)
        return optax.apply_updates(params, updates), state, scale, bad

    params, scale = jnp.zeros(3), jnp.float32(2.0**15)
    state: Any = tx.init(params)
    scales = []
    for _ in range(60):
        before = params
        params, state, scale, bad = step(params, state, scale)
        assert not bad or bits(params) == bits(before)
        scales.append(float(scale))
    skipped = int(state[1].skipped_count)
    assert scales[-1] == 2.0 ** (15 - skipped) < 2.0**15
    assert float(loss(params, jnp.float32)) < 1e-3
    # Apart from rounding, the same as in float32 without a scale.
    bare = optax.chain(oc.clip_by_global_norm(1.0), optax.sgd(0.1))
    expected, bare_state, bare_step = jnp.zeros(3), bare.init(params), stepper(bare)
    for _ in range(60 - skipped):
        gradient = jax.grad(loss)(expected, jnp.float32)
        expected, bare_state = bare_step(expected, bare_state, gradient)
    np.testing.assert_allclose(params, expected, atol=2e-3)


# --------------------------------------------------------------------------------------
# zero_nonfinite
# --------------------------------------------------------------------------------------


def test_zero_nonfinite_replaces_and_counts(dtype):
    tx = oc.zero_nonfinite()
    updates = helpers.random_tree(dtype, seed=1)
    state = tx.init(updates)
    update = jax.jit(tx.update)
    bad = broken(broken(updates, "dense/bias", np.nan), "head/kernel", -np.inf)
    zeroed = helpers.vary(helpers.vary(updates, "dense/bias", 0), "head/kernel", 0)
    out, state = update(bad, state)
    assert bits(out) == bits(zeroed)
    assert [float(x) for x in state] == [1, 1, 2]
    out, state = update(updates, state)
    assert bits(out) == bits(updates)
    assert [float(x) for x in state] == [2, 1, 0]


def test_zero_nonfinite_keeps_finite_bits_and_what_does_not_count():
    tx = oc.zero_nonfinite()
    updates = {"b": jnp.array(True), "n": None, "w": jnp.array([-0.0, 1e-40, 3e38])}
    out, state = tx.update(updates, tx.init(updates))
    assert bits(out) == bits(updates)
    assert float(state.zeroed_elements) == 0
    _, state = tx.update({}, tx.init({}))
    assert int(state.step_count) == 1


@pytest.mark.parametrize("check_vma", [True, False])
def test_elements_are_counted_once_on_a_mesh(check_vma):
    tx = oc.zero_nonfinite()
    if not check_vma:
        tx = oc.over_axes(tx, SPECS)
    updates = helpers.random_tree(shapes=SHAPES)
    bad = helpers.vary(updates, "dense/bias", np.nan)  # whole on all eight devices
    bad["dense"]["kernel"] = bad["dense"]["kernel"].at[:, 0].set(jnp.inf)
    bad["head"]["kernel"] = bad["head"]["kernel"].at[2, 3].set(-jnp.inf)

    def step(updates):
        out, state = tx.update(updates, tx.init(updates))
        return out, state

    mapped = jax.shard_map(
        step,
        mesh=grid(),
        in_specs=(SPECS,),
        out_specs=(SPECS, P()),
        check_vma=check_vma,
    )
    out, state = jax.jit(mapped)(bad)
    chex.assert_tree_all_finite(out)
    assert float(state.zeroed_elements) == 1 + 8 + 1
    expected, expected_state = tx.update(bad, tx.init(bad))
    assert bits(out) == bits(expected)
    assert bits(state) == bits(expected_state)


# --------------------------------------------------------------------------------------
# Messages
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", [None, 0.1, optax.adam, "adam"], ids=type)
@every_guard
def test_what_is_no_transformation_raises(guard, inner):
    with pytest.raises(TypeError, match=r"guard to wrap a transformation.*chain\("):
        guard(inner)


@pytest.mark.parametrize("bad", [0, -1, 2.0, None, "3"], ids=repr)
@every_guard
def test_a_row_is_at_least_one_step(guard, bad):
    with pytest.raises(ValueError, match=r"max_consecutive >= 1, an int, got"):
        guard(optax.sgd(0.1), max_consecutive=bad)


def test_a_missing_loss_raises():
    tx = oc.skip_if_spike(optax.sgd(0.1), norm=None)
    with pytest.raises(ValueError, match=r"the loss, which.*value=loss"):
        tx.update(jnp.ones(1), tx.init(jnp.ones(1)))


def test_a_loss_that_is_no_single_number_raises():
    tx = oc.skip_if_spike(optax.sgd(0.1), norm=None)
    with pytest.raises(ValueError, match=r"to be one number.*shape \(3,\)"):
        tx.update(jnp.ones(1), tx.init(jnp.ones(1)), value=jnp.ones(3))


def test_a_norm_of_units_raises():
    tx = oc.skip_if_spike(optax.sgd(0.1), norms.unit_norms, 1.0)
    with pytest.raises(ValueError, match=r"one of units.*norms\.leaf_norms"):
        tx.init({"w": jnp.ones((2, 3))})


@pytest.mark.parametrize("bad", ["2", None, [1.0], object()], ids=type)
def test_a_threshold_of_the_wrong_type_raises(bad):
    with pytest.raises(TypeError, match="Expected threshold to be a number"):
        oc.skip_if_spike(optax.sgd(0.1), threshold=bad)


@pytest.mark.parametrize("bad", [-1.0, np.nan], ids=str)
def test_a_threshold_out_of_range_raises(bad):
    with pytest.raises(ValueError, match="Expected threshold >= 0"):
        oc.skip_if_spike(optax.sgd(0.1), threshold=bad)


def test_a_norm_that_is_no_function_raises():
    with pytest.raises(TypeError, match="Expected norm to be a function"):
        oc.skip_if_spike(optax.sgd(0.1), norm=2.0)


@pytest.mark.parametrize("kind", ["nonfinite", "spike", "zero"])
def test_no_state_raises(kind):
    with pytest.raises(ValueError, match=r"State, got None.*tx\.init\(params\)"):
        GUARDS[kind]().update(jnp.ones(1), None, jnp.ones(1))


@pytest.mark.parametrize("kind", ["nonfinite", "spike", "zero"])
def test_the_state_of_something_else_raises(kind):
    state = optax.sgd(0.1).init(jnp.ones(1))
    with pytest.raises(
        TypeError, match=r"Expected a state of type \w+State, got tuple"
    ):
        GUARDS[kind]().update(jnp.ones(1), state, jnp.ones(1))


def test_the_state_of_another_threshold_raises():
    one = oc.skip_if_spike(optax.sgd(0.1), threshold=2.0)
    other = oc.skip_if_spike(optax.sgd(0.1))
    with pytest.raises(ValueError, match="threshold, of shapes"):
        other.update(jnp.ones(1), one.init(jnp.ones(1)))


@pytest.mark.parametrize("scale", [0, 0.0, -1.0, np.nan, np.float32(0)], ids=repr)
def test_a_scale_that_is_not_positive_raises(scale):
    with pytest.raises(ValueError, match=r"Expected scale >"):
        oc.unscale(scale)
    tx = oc.unscale()
    with pytest.raises(ValueError, match=r"Expected scale >"):
        tx.update(jnp.ones(1), tx.init(None), loss_scale=scale)


@pytest.mark.parametrize("scale", ["2", True, 1j, [2.0]], ids=repr)
def test_a_scale_that_is_no_number_raises(scale):
    with pytest.raises(TypeError, match="Expected scale to be a number"):
        oc.unscale(scale)


def test_a_scale_of_many_numbers_raises():
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        oc.unscale(jnp.ones(2))


def test_no_scale_raises():
    tx = oc.unscale()
    with pytest.raises(ValueError, match=r"scale of the loss.*loss_scale=scale"):
        tx.update(jnp.ones(1), tx.init(None))


def test_a_burst_that_is_not_finite_wears_out_no_patience():
    tx = oc.skip_if_spike(optax.sgd(1.0), threshold=2.0, accept_after=3)
    state = tx.init(jnp.zeros(1))
    taken = []
    for size in [1.0, *[np.nan] * 5, 1e6, 1e6, np.nan, 1e6, 1e6, 1.0, 1e6]:
        updates, state = tx.update(jnp.array([size]), state)
        taken.append(float(updates[0]) != 0)
    assert taken == [True, *[False] * 9, True, True, False]
