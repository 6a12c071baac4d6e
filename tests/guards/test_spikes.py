"""Which steps are spikes, against loops written by hand."""

import functools

import flax.core
import flax.serialization
import flax.training.train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import helpers
from guard_cases import NONFINITE, bits, every_bad, stepper, taken
from helpers import oc
from optaxclip import norms, summary, thresholds


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
