"""What the papers say of their rules, for any norm and many scopes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import helpers
from helpers import oc
from optaxclip import norms, thresholds
from rule_references import (
    RULES,
    allowed,
    clip_of,
    columns_of_leaves,
    is_real,
    lively,
    seen,
    stepped,
)

pytestmark = pytest.mark.usefixtures("strict_shapes")


# --------------------------------------------------------------------------------------
# What the papers say of them
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("percentile", [0.0, 10.0, 100.0])
def test_the_first_step_of_autoclip_is_not_clipped(percentile):
    grads = {"w": jnp.array([0.3, -1.7]), "b": jnp.array([1e-30])}
    clip = oc.autoclip(percentile, 16)
    clipped, _ = clip.update(grads, clip.init(grads))
    assert helpers.bits(clipped) == helpers.bits(grads)


def test_autoclip_at_100_never_clips():
    sizes = lively(steps=200)
    real = is_real(sizes)
    assert np.all(allowed(oc.autoclip(100.0, 16), sizes)[real] >= sizes[real])


def test_zclip_is_continuous_at_its_threshold_and_tends_to_the_mean():
    warm = np.tile([1.0, 3.0], 10)  # mean 2, deviation 1
    at = [2 + z for z in (2.4999, 2.5001, 2.6, 5.0, 50.0, 1e6)]
    clip = oc.zclip(2.5, 0.97, 20, jnp.inf)
    last = [allowed(clip, [*warm, norm])[-1] for norm in at]
    assert np.isinf(last[0])
    np.testing.assert_allclose(last[1], at[1], rtol=1e-4)
    assert np.all(np.diff(last[1:]) < 0)
    np.testing.assert_allclose(last[-1], 2.0, rtol=1e-5)


def test_only_upward_deviations_are_clipped_by_zclip():
    warm = np.tile([1.0, 3.0], 10)
    limits = allowed(oc.zclip(2.5, 0.97, 20, jnp.inf), [*warm, 1e-3, 1e-6])
    assert np.all(np.isinf(limits))


def test_the_cap_of_zclip_does_not_enter_its_mean():
    # The paper's code averages what the z-score leaves, before `max_grad_norm`.
    warm = np.tile([1.0, 3.0], 10)
    spikes = [*warm, 8.0, 12.0]
    free, capped = (allowed(oc.zclip(2.5, 0.5, 20, cap), spikes) for cap in (np.inf, 3))
    np.testing.assert_array_equal(capped, np.minimum(free, 3))
    rule = thresholds.z_score(2.5, 0.5, 20, max_norm=2.0)
    state: Any = rule.init(jnp.zeros(()))
    for size in spikes:
        _, state = rule.update(jnp.float32(size), state)
    assert state.means > 2.5


def test_the_thresholds_of_adagc_rise_by_a_thousandth_at_most():
    limits = allowed(oc.adagc(), np.r_[np.full(100, 0.5), np.full(400, 1e6)])[100:]
    growth = limits[1:] / limits[:-1]
    assert np.all(growth <= 1 + 0.02 * 0.05 * (1 + 1e-3)) and growth.min() > 1.0009


def test_the_warm_up_of_adagc_is_a_global_clip():
    grads = helpers.random_tree(seed=3, scale=5.0)
    clip, plain = oc.adagc(), oc.clip_by_global_norm(1.0)
    ours, _ = clip.update(grads, clip.init(grads))
    right, _ = plain.update(grads, None)
    helpers.assert_close(ours, right)


@pytest.mark.parametrize("rule", [oc.aggc, oc.autoclip, oc.zclip, oc.adagc])
def test_a_leaf_that_starts_with_zeros_is_not_frozen(rule):
    sizes = np.r_[np.zeros(200), np.full(50, 0.5)]
    _, after = stepped(rule(), sizes)
    np.testing.assert_allclose(after.ravel(), sizes, rtol=1e-6)


def test_aggc_raises_what_is_below_its_band():
    _, after = stepped(oc.aggc(1.5, 0.5), np.array([1.0, 0.1, 1.0, 10.0]))
    np.testing.assert_allclose(after.ravel()[:3], [1.0, 0.5, 1.0], rtol=1e-6)
    assert 1.0 < after.ravel()[3] < 1.5


def test_a_slow_rise_of_the_norm_is_followed_by_aggc_from_its_second_step():
    sizes = 1.02 ** np.arange(300.0)
    _, after = stepped(oc.aggc(), sizes)
    np.testing.assert_allclose(after.ravel()[:20], sizes[:20], rtol=1e-5)


def test_the_updates_of_stable_spam_have_a_norm_near_one():
    clip = oc.stable_spam_clip()
    grads = helpers.random_tree(seed=1, scale=100.0)
    updates, _ = clip.update(grads, clip.init(grads))
    for leaf in jax.tree.leaves(norms.leaf_norms(updates)):
        np.testing.assert_allclose(leaf, 1.0, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("rule", RULES)
def test_a_rule_does_not_depend_on_the_unit_of_the_norm(rule, scale):
    if rule == "zclip_capped":
        return
    sizes = lively(steps=300)
    sizes = np.where(np.abs(sizes) > 30, 30, sizes)  # room for the scale
    one, many = (
        stepped(clip_of(rule), np.float64(sizes) * s)[0].ravel() for s in (1, scale)
    )
    np.testing.assert_allclose(many / scale, one, rtol=1e-4)


# --------------------------------------------------------------------------------------
# Any norm, and many scopes
# --------------------------------------------------------------------------------------


EACH = {
    "z_score": thresholds.z_score,
    "relative_to_mean": lambda: thresholds.relative_to_mean(warmup_steps=0),
    "within_band": lambda: thresholds.within_band(0.5, 1.5),
    "mean_over_rms": thresholds.mean_over_rms,
}


@pytest.mark.parametrize("rule", EACH)
def test_a_scope_among_many_is_that_scope_alone(rule):
    sizes = columns_of_leaves(400)
    many, _ = stepped(oc.clip_by(norms.leaf_norms, EACH[rule]()), sizes)
    single = oc.clip_by(norms.global_norm, EACH[rule]())
    for i, column in enumerate(sizes.T):
        one, _ = stepped(single, column)
        real = is_real(column)
        np.testing.assert_allclose(many[real, i], one[real], rtol=1e-6)


@pytest.mark.parametrize("rule", EACH)
def test_the_state_keeps_its_types_under_x64(rule, x64):
    clip = oc.clip_by(norms.leaf_norms, EACH[rule]())
    grads = {"a": jnp.ones(2), "b": jnp.ones(2, jnp.float32)}
    state = clip.init(grads)
    _, after = jax.jit(clip.update)(grads, state)
    assert helpers.types(after) == helpers.types(state)
    assert after.norms.dtype == jnp.float64


# --------------------------------------------------------------------------------------
# Errors
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build",
    [
        lambda: thresholds.window_percentile(0, 2),
        lambda: thresholds.window_percentile(100, 2),
        lambda: thresholds.streaming_quantile(0, 0),
        lambda: thresholds.streaming_quantile(1),
        lambda: thresholds.within_band(1, 1, decay=0),
        lambda: thresholds.z_score(0, 0, 2, max_norm=0),
        lambda: thresholds.mean_plus_std(0, decay=0, warmup_steps=0),
        lambda: oc.adagc(0, 0, 0, 0),
        lambda: oc.spam_clip(0, 0, warmup_steps=0, reset_every=1),
        lambda: oc.reset_momentum(optax.sgd(1.0), every=1, warmup_steps=0),
        lambda: oc.stable_adamw(0.0, b1=0, b2=0, eps=0),
        lambda: oc.acclip(0, 0, 0),
        lambda: oc.qk_clip(jnp.ones((1, 2, 1)), jnp.ones((1, 2, 1)), jnp.ones(2), 0, 0),
        lambda: oc.qk_clip(jnp.ones((1, 2, 1)), jnp.ones((1, 2, 1)), jnp.ones(2), 1, 1),
        lambda: oc.adapt_max_norm(0, seen(), quantile=0, learning_rate=0),
        lambda: oc.adapt_max_norm(1, seen(), quantile=1),
    ],
)
def test_a_number_at_the_end_of_its_range_is_taken(build):
    build()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: oc.autoclip(101), "0 <= q <= 100, got 101"),
        (lambda: oc.autoclip(10, 1.5), "window >= 2, an int, got 1.5. It is the shape"),
        (lambda: oc.zclip(-1.0), "z_threshold >= 0, got -1.0"),
        (lambda: oc.zclip(decay=1.0), "0 <= decay < 1, got 1.0"),
        (lambda: oc.zclip(warmup_steps=1), "a whole number >= 2, got 1"),
        (lambda: oc.zclip(max_norm=-1), "max_norm >= 0, got -1"),
        (lambda: oc.adagc(-0.5), "relative >= 0, got -0.5"),
        (lambda: oc.adagc(decay=-0.1), "0 <= decay < 1, got -0.1"),
        (lambda: oc.adagc(warmup_steps=-1), "a whole number >= 0, got -1"),
        (lambda: oc.k_sigma_clip(decay=0.9, window=4), "one of `decay` and `window`"),
        (lambda: oc.k_sigma_clip(window=1), "window >= 2, an int, got 1"),
        (lambda: oc.aggc(0.9), "high >= 1, got 0.9"),
        (lambda: oc.aggc(low=1.1), "low <= 1, got 1.1"),
        (lambda: oc.stable_spam_clip(1.0), "0 <= mean_decay < 1, got 1.0"),
        (lambda: oc.stable_spam_clip(rms_decay=2), "0 <= rms_decay < 1, got 2"),
        (lambda: oc.stable_spam_clip(max_decay=1.0), "0 <= max_decay < 1"),
        (lambda: thresholds.relative_to_mean(max_norm=-2), "max_norm >= 0, got -2"),
    ],
)
def test_an_argument_out_of_range_raises(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_an_argument_that_is_no_number_raises():
    with pytest.raises(TypeError, match="z_threshold to be a number, got 'high'"):
        oc.zclip("high")
    with pytest.raises(TypeError, match="relative to be a number, got None"):
        oc.adagc(None)


def test_stable_spam_clip_asks_for_its_state():
    with pytest.raises(ValueError, match="AdaClipState, got None"):
        oc.stable_spam_clip().update(jnp.ones(1), (None, None))
