"""Mean and standard deviation of the norms so far, against explicit sums."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import helpers
from helpers import oc
from histories import run, updates_of_norm
from optaxclip import norms, thresholds

pytestmark = pytest.mark.usefixtures("strict_shapes")
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
