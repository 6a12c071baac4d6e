"""Percentiles of a window and estimated quantiles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import helpers
from helpers import oc
from optaxclip import thresholds

pytestmark = pytest.mark.usefixtures("strict_shapes")


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
