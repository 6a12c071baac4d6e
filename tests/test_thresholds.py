"""Thresholds with a memory, each against a hand-written loop in NumPy."""

import collections
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import helpers
from helpers import oc
from optaxclip import norms, thresholds

pytestmark = pytest.mark.usefixtures("strict_shapes")


def updates_of_norm(norm):
    return {"w": jnp.array([0.6, 0.8]) * norm}


def run(clip, sizes, make=updates_of_norm):
    """`(norms, max_norms, norms of the results)` step by step, and the last state."""
    state = clip.init(make(sizes[0]))
    update = jax.jit(clip.update)
    seen = []
    for size in sizes:
        updates, state = update(make(size), state)
        after = [
            helpers.vector_norm([x]) for x in helpers.truth(jax.tree.leaves(updates))
        ]
        seen.append((np.asarray(state.norms), helpers.shown(state.max_norms), after))
    measured, allowed, results = (np.array(x) for x in zip(*seen, strict=True))
    return measured, allowed, results, state


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


# --------------------------------------------------------------------------------------
# Mean and standard deviation
# --------------------------------------------------------------------------------------

ASKED = [1.0, 3.0, 3.0, 0.5, 100.0, 2.0, 1.0, 0.0, 0.0, 4.0]
DECAYS = (0.0, 0.5, 0.9, 0.97, 0.99, 0.999, 0.9999)


def asked(rule, sizes, dtype=jnp.float32):
    """What a rule allows, step by step, and its last state."""
    steps = jnp.asarray(sizes, dtype)

    def step(state, norms):
        limits, state = rule.update(norms, state)
        return state, limits

    state = rule.init(jnp.zeros(steps.shape[1:], dtype))
    state, limits = jax.jit(lambda s, n: jax.lax.scan(step, s, n))(state, steps)
    return helpers.shown(limits), state


def by_explicit_sums(sizes, num_std, weights_of):
    """The mean and the deviation of everything so far, weighted by its age."""
    limits = []
    for n in range(1, len(sizes) + 1):
        past = np.array(sizes[:n], np.float64)
        weights = weights_of(np.arange(n - 1, -1, -1))
        weights = weights / weights.sum(axis=0)
        mean = np.sum(weights * past)
        limits.append(mean + num_std * np.sqrt(np.sum(weights * (past - mean) ** 2)))
    return np.array(limits)


def decaying(decay):
    return lambda age: decay ** age.astype(float)


@pytest.mark.parametrize("decay", DECAYS)
def test_mean_plus_std_with_a_decay_is_that_of_explicit_sums(decay):
    limits, state = asked(thresholds.mean_plus_std(2.0, decay=decay), ASKED)
    expected = by_explicit_sums(ASKED, 2.0, decaying(decay))
    np.testing.assert_allclose(limits, expected, rtol=3e-5)
    assert int(state.seen_count) == len(ASKED)


def test_the_first_weights_are_exact_for_long_memories():
    limits, _ = asked(thresholds.mean_plus_std(2.0, decay=0.9999999), ASKED)
    expected = by_explicit_sums(ASKED, 2.0, decaying(0.9999999))
    np.testing.assert_allclose(limits, expected, rtol=3e-5)


def test_a_long_run_does_not_drift():
    sizes = np.random.default_rng(0).lognormal(size=3000)
    limits, _ = asked(thresholds.mean_plus_std(3.0, decay=0.99), sizes)
    weights = 0.99 ** np.arange(2999, -1, -1.0)
    weights /= weights.sum()
    mean = np.sum(weights * sizes)
    std = np.sqrt(np.sum(weights * (sizes - mean) ** 2))
    np.testing.assert_allclose(limits[-1], mean + 3 * std, rtol=1e-4)


@pytest.mark.parametrize("window", [2, 3, 128])
def test_mean_plus_std_of_a_window_is_that_of_a_deque(window):
    limits, _ = asked(thresholds.mean_plus_std(2.0, window=window), ASKED)
    last, expected = collections.deque(maxlen=window), []
    for size in ASKED:
        last.append(size)
        expected.append(np.mean(last) + 2 * np.std(last))
    np.testing.assert_allclose(limits, expected, rtol=1e-5)


MEMORIES = {"decay": {"decay": 0.9}, "long": {"decay": 0.99}, "window": {"window": 4}}
every_memory = pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES.keys())


@every_memory
def test_mean_plus_std_of_a_scope_among_many_is_that_of_it_alone(memory):
    rule = thresholds.mean_plus_std(2.0, **memory)
    sizes = np.stack([ASKED, ASKED[::-1]], axis=1)
    together, state = asked(rule, sizes)
    assert state.seen_count.shape == (2,)
    np.testing.assert_allclose(together[:, 0], asked(rule, ASKED)[0], rtol=1e-6)
    np.testing.assert_allclose(together[:, 1], asked(rule, ASKED[::-1])[0], rtol=1e-6)


@every_memory
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_the_deviation_of_equal_norms_is_exactly_zero(memory, transform):
    rule = thresholds.mean_plus_std(1e6, **memory)
    sizes = jnp.concatenate([jnp.geomspace(1e-37, 3e38, 499), jnp.zeros(1)])
    state, update = rule.init(sizes), transform(rule.update)
    for _ in range(7):
        limits, state = update(sizes, state)
        np.testing.assert_array_equal(limits, sizes)

    def body(state, sizes):
        limits, state = rule.update(sizes, state)
        return state, limits

    scan = transform(functools.partial(jax.lax.scan, body))
    _, scanned = scan(rule.init(sizes), jnp.tile(sizes, (7, 1)))
    np.testing.assert_array_equal(scanned, jnp.tile(sizes, (7, 1)))


@every_memory
@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=str)
def test_a_non_finite_norm_does_not_enter_mean_and_std(memory, bad):
    def make(pair):
        return {"a": jnp.array([pair[0]]), "b": jnp.array([pair[1]])}

    rule = thresholds.lagged(thresholds.mean_plus_std(1.0, **memory))
    clip = oc.clip_by(norms.leaf_norms, rule)
    second = [1.0, bad, 2.0, bad, bad, 4.0, 3.0, 1.0]
    steps = list(zip(ASKED[:8], second, strict=True))
    _, allowed, _, _ = run(clip, steps, make)
    finite = np.isfinite(second)
    alone = [np.inf, *asked(rule_of(memory), np.array(second)[finite])[0][:-1]]
    np.testing.assert_allclose(allowed[finite, 1], alone, rtol=1e-5)
    others = [np.inf, *asked(rule_of(memory), ASKED[:7])[0]]
    np.testing.assert_allclose(allowed[:, 0], others, rtol=1e-5)


def rule_of(memory):
    return thresholds.mean_plus_std(1.0, **memory)


@every_memory
@pytest.mark.parametrize("warmup_steps", [0, 1, 4])
def test_during_warm_up_all_is_allowed(memory, warmup_steps):
    rule = thresholds.mean_plus_std(2.0, warmup_steps=warmup_steps, **memory)
    limits, _ = asked(rule, ASKED)
    free = max(warmup_steps - 1, 0)  # the norm of this step is one of those seen
    assert np.isinf(limits).tolist() == [True] * free + [False] * (len(ASKED) - free)
    plain, _ = asked(thresholds.mean_plus_std(2.0, **memory), ASKED)
    np.testing.assert_array_equal(limits[free:], plain[free:])
    lagged, _ = asked(thresholds.lagged(rule), ASKED)
    np.testing.assert_array_equal(lagged, [np.inf, *limits[:-1]])


@every_memory
@pytest.mark.parametrize("size", [0.0, 0.1, 1.0, 7e10])
def test_constant_norms_are_allowed(memory, size):
    limits, _ = asked(thresholds.mean_plus_std(3.0, **memory), [size] * 300)
    np.testing.assert_allclose(limits, size, rtol=2e-6)


@every_memory
@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e19, 1e30, 1e38], ids=str)
def test_mean_and_std_have_the_whole_range(memory, size):
    """Squares would not: one large norm would allow all for ever."""
    rule = thresholds.mean_plus_std(1.0, **memory)
    limits, _ = asked(rule, np.array([1.0, 2.0, 1.5, 0.5, 1.0]) * size)
    expected, _ = asked(rule, [1.0, 2.0, 1.5, 0.5, 1.0])
    np.testing.assert_allclose(limits / np.float32(size), expected, rtol=1e-5)


def test_one_huge_norm_is_forgotten():
    limits, _ = asked(rule_of({"window": 4}), [1e30, 1.0, 2.0, 1.0, 2.0])
    np.testing.assert_allclose(limits[-1], 2.0, rtol=1e-6)
    limits, _ = asked(rule_of({"decay": 0.5}), [1e30, *[1.0] * 300])
    np.testing.assert_allclose(limits[-1], 1.0, rtol=1e-6)


@every_memory
def test_the_state_of_mean_plus_std_keeps_its_types(memory, x64):
    rule = thresholds.mean_plus_std(3.0, **memory)
    single, _ = asked(rule, ASKED)  # a carry whose types changed would not scan
    double, state = asked(rule, ASKED, jnp.float64)
    np.testing.assert_allclose(single, double, rtol=1e-5)
    dtypes = {x.dtype for x in jax.tree.leaves(state)}
    assert dtypes == {jnp.dtype("float64"), jnp.dtype("int32")}


@every_memory
def test_a_fresh_mean_plus_std_can_be_donated(memory):
    clip = oc.clip_by_global_norm(thresholds.mean_plus_std(3.0, **memory))
    updates = updates_of_norm(2.0)
    update = jax.jit(clip.update, donate_argnums=1)
    _, state = update(updates, clip.init(updates))
    assert int(state.update_count) == 1


@every_memory
@pytest.mark.parametrize("sizes", [[0.0, 0.0], [2.0, 2.0], [1.0, 3.0]], ids=str)
def test_the_jacobian_of_mean_plus_std_is_finite(memory, sizes):
    def limits(sizes):
        rule = rule_of(memory)
        first, state = rule.update(sizes[0], rule.init(sizes[0]))
        return first, rule.update(sizes[1], state)[0]

    for jacobian in jax.jacobian(jax.jit(limits))(jnp.array(sizes)):
        assert np.isfinite(jacobian).all()


def test_a_spike_enters_a_clipped_history_as_it_was_allowed():
    mean = thresholds.mean_plus_std(1.0, window=2)
    rule = thresholds.clipped_history(thresholds.lagged(mean))
    _, allowed, _, _ = run(oc.clip_by_global_norm(rule), [1.0, 3.0, 100.0, 100.0])
    history, expected = [], []
    for size in [1.0, 3.0, 100.0, 100.0]:
        last = history[-2:]
        expected.append(np.mean(last) + np.std(last) if last else np.inf)
        history.append(min(size, expected[-1]))
    np.testing.assert_allclose(allowed, expected, rtol=1e-5)


def test_no_deviation_allowed_is_the_mean():
    limits, _ = asked(thresholds.mean_plus_std(0.0, window=4), [1.0, 3.0])
    np.testing.assert_allclose(limits, [1.0, 2.0])


def test_infinitely_many_deviations_switch_a_clip_off():
    limits, _ = asked(thresholds.mean_plus_std(jnp.inf, window=4), [1.0, 1.0, 3.0])
    assert np.isinf(limits).all()


def test_the_number_of_deviations_may_be_traced():
    def limit(num_std):
        rule = thresholds.mean_plus_std(num_std, window=4)
        _, state = rule.update(jnp.float32(1.0), rule.init(jnp.zeros(())))
        return rule.update(jnp.float32(3.0), state)[0]

    found = jax.jit(jax.vmap(limit))(jnp.array([0.0, 1.0, 2.0]))
    np.testing.assert_allclose(found, [2.0, 3.0, 4.0], rtol=1e-6)


@pytest.mark.parametrize(
    "memory", [{}, {"decay": 0.9, "window": 3}], ids=["neither", "both"]
)
def test_one_of_decay_and_window_is_needed(memory):
    with pytest.raises(ValueError, match=r"one of `decay` and `window`.*got decay="):
        thresholds.mean_plus_std(3.0, **memory)


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2, np.nan], ids=repr)
def test_a_decay_out_of_range_raises(decay):
    with pytest.raises(ValueError, match=rf"Expected 0 <= decay < 1, got {decay}\.$"):
        thresholds.mean_plus_std(3.0, decay=decay)


def test_a_decay_that_is_no_number_raises():
    with pytest.raises(TypeError, match=r"decay to be a number, got '0.9' of type str"):
        oc.thresholds.mean_plus_std(3.0, decay="0.9")


@pytest.mark.parametrize("window", [1, 0, -3, 2.0, "3"], ids=repr)
def test_a_window_out_of_range_raises(window):
    with pytest.raises(ValueError, match=r"Expected window >= 2, an int, got"):
        thresholds.mean_plus_std(3.0, window=window)


def test_warm_up_steps_out_of_range_raise():
    with pytest.raises(
        ValueError, match=r"warmup_steps to be a whole number >= 0, got -1\.$"
    ):
        thresholds.mean_plus_std(3.0, window=3, warmup_steps=-1)
    with pytest.raises(TypeError, match="whole number >= 0, got None"):
        oc.thresholds.mean_plus_std(3.0, window=3, warmup_steps=None)


@pytest.mark.parametrize("bad", ["3", None, True], ids=repr)
def test_a_number_of_deviations_that_is_none_raises(bad):
    with pytest.raises(TypeError, match="Expected num_std to be a number"):
        thresholds.mean_plus_std(bad, window=3)


@pytest.mark.parametrize("bad", [-1.0, np.nan], ids=repr)
def test_a_number_of_deviations_out_of_range_raises(bad):
    with pytest.raises(ValueError, match="Expected num_std >= 0"):
        thresholds.mean_plus_std(bad, window=3)


# --------------------------------------------------------------------------------------
# Percentiles and quantiles
# --------------------------------------------------------------------------------------


def norms_with_spikes(steps=300, seed=0):
    rng = np.random.default_rng(seed)
    sizes = rng.lognormal(size=steps)
    sizes[rng.random(steps) < 0.05] *= 1000
    sizes[rng.random(steps) < 0.05] = 0
    return sizes.astype(np.float32)


def limits_of(rule, sizes):
    """The thresholds of a rule for a history of norms, by `scan`."""

    def step(state, size):
        limit, state = rule.update(size, state)
        return state, limit

    sizes = jnp.asarray(sizes)
    return np.asarray(jax.lax.scan(step, rule.init(jnp.zeros_like(sizes[0])), sizes)[1])


@pytest.mark.parametrize("window", [2, 7, 1000])
@pytest.mark.parametrize("q", [0.0, 10.0, 50.0, 99.0, 100.0])
def test_a_percentile_is_that_of_the_window(q, window):
    sizes = norms_with_spikes()
    ours = limits_of(thresholds.window_percentile(q, window), sizes)
    windows = [sizes[max(0, i + 1 - window) : i + 1] for i in range(len(sizes))]
    for limit, some in zip(ours, windows, strict=True):
        # Between two norms the place is known to float32, and gaps are wide here.
        right, gap = np.percentile(np.float64(some), q), float(np.ptp(some))
        np.testing.assert_allclose(limit, right, rtol=1e-6, atol=1e-4 * gap)


def test_a_percentile_of_each_scope_is_its_own():
    columns = np.stack([norms_with_spikes(seed=0), norms_with_spikes(seed=1)], axis=1)
    rule = thresholds.window_percentile(30.0, 5)
    both = limits_of(rule, columns)
    for i in 0, 1:
        np.testing.assert_array_equal(both[:, i], limits_of(rule, columns[:, i]))


def test_the_first_step_of_a_percentile_is_not_clipped():
    clip = oc.clip_by_global_norm(thresholds.window_percentile(10.0, 100))
    grads = jnp.array([30.0, 40.0])
    clipped, _ = clip.update(grads, clip.init(grads))
    np.testing.assert_array_equal(clipped, grads)


@pytest.mark.parametrize("quantile", [0.0, 0.25, 0.9])
def test_a_streaming_quantile_is_that_of_the_paper(quantile):
    sizes = norms_with_spikes()
    ours = limits_of(thresholds.streaming_quantile(quantile, 0.1, 2.0), sizes)
    limit, expected = 2.0, []
    for size in sizes:
        expected.append(limit)
        limit *= np.exp(-0.1 * (float(size <= limit) - quantile))
    np.testing.assert_allclose(ours, expected, rtol=1e-4)


def test_a_norm_as_large_as_the_estimate_is_inside():
    limits = limits_of(thresholds.streaming_quantile(0.25, 0.5, 2.0), [2.0, 0.0])
    np.testing.assert_allclose(limits, [2.0, 2.0 * np.exp(-0.5 * 0.75)], rtol=1e-6)


def test_a_streaming_quantile_clips_the_rest():
    sizes = np.random.default_rng(1).lognormal(size=3000).astype(np.float32)
    limits = limits_of(thresholds.streaming_quantile(0.8, 0.05, 1e-3), sizes)
    assert abs(np.mean(sizes[500:] <= limits[500:]) - 0.8) < 0.02


def test_norms_that_are_not_finite_enter_no_window_and_no_estimate():
    for rule in thresholds.window_percentile(50.0, 4), thresholds.streaming_quantile():
        clip = oc.clip_by_global_norm(rule)
        state = clip.init(jnp.zeros(1))
        _, state = clip.update(jnp.array([2.0]), state)
        for bad in jnp.nan, jnp.inf:
            _, after = clip.update(jnp.array([bad]), state)
            assert helpers.bits(after.rule_state) == helpers.bits(state.rule_state)


def test_wrong_percentiles_and_quantiles_raise():
    with pytest.raises(ValueError, match="0 <= q <= 100, got 101"):
        thresholds.window_percentile(101, 4)
    with pytest.raises(ValueError, match="q >= 0, got -1"):
        thresholds.window_percentile(-1, 4)
    with pytest.raises(ValueError, match="window >= 2, an int, got 1"):
        thresholds.window_percentile(50, 1)
    with pytest.raises(ValueError, match="0 <= quantile <= 1, got 2"):
        thresholds.streaming_quantile(2)
    with pytest.raises(ValueError, match="initial > 0, got 0"):
        thresholds.streaming_quantile(initial=0)
    with pytest.raises(TypeError, match="learning_rate to be a number, got 'fast'"):
        oc.thresholds.streaming_quantile(learning_rate="fast")
