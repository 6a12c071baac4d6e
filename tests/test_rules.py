"""The rules by name, each against a loop in float64 written from the paper's equations.

A norm that is zero or not finite enters no history: the loops skip it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import helpers
from helpers import oc
from optaxclip import norms, thresholds

pytestmark = pytest.mark.usefixtures("strict_shapes")

# --------------------------------------------------------------------------------------
# The references: the thresholds for a history of norms
# --------------------------------------------------------------------------------------


def counts(norm) -> bool:
    return np.isfinite(norm) and norm > 0


def np_autoclip(history, percentile=10.0, window=10_000):
    """The percentile of the last norms, this one included; interpolated linearly."""
    past, allowed = [], []
    for norm in history:
        if not counts(norm):
            allowed.append(np.nan)
            continue
        past.append(norm)
        ranked = np.sort(past[-window:])
        place = percentile / 100 * (len(ranked) - 1)
        low = int(np.floor(place))
        high = min(low + 1, len(ranked) - 1)
        allowed.append(ranked[low] + (place - low) * (ranked[high] - ranked[low]))
    return allowed


def np_zclip(history, z_threshold=2.5, decay=0.97, warmup_steps=25, max_norm=1.0):
    """Algorithm 1 of the paper: statistics of the warm-up, then its EMA updates."""
    past, allowed = [], []
    mean = variance = np.nan
    for norm in history:
        limit = np.inf
        if not counts(norm):
            allowed.append(np.nan)
            continue
        if len(past) < warmup_steps:
            past.append(norm)
            if len(past) == warmup_steps:
                mean, variance = np.mean(past), np.var(past)
        else:
            z = (norm - mean) / np.sqrt(variance) if variance > 0 else np.inf
            if norm > mean and z > z_threshold:
                limit = mean + z_threshold * np.sqrt(variance) * (z_threshold / z)
            seen = min(norm, limit)
            mean = decay * mean + (1 - decay) * seen
            variance = decay * variance + (1 - decay) * (seen - mean) ** 2
        allowed.append(min(limit, max_norm))
    return allowed


def np_adagc(columns, relative=1.05, decay=0.98, warmup_steps=100, max_norm=1.0):
    """Every column is a leaf; in the warm-up all are clipped by their common norm."""
    columns = np.asarray(columns, np.float64)
    leaves = columns.shape[1]
    average, seen, allowed = [None] * leaves, [0] * leaves, []
    for row in columns:
        finite = np.where(np.isfinite(row), row, 0)
        total = np.sqrt(np.sum(finite**2))
        limits = []
        for i, norm in enumerate(row):
            if not counts(norm):
                limits.append(np.nan)
                continue
            if seen[i] < warmup_steps:
                clipped = norm * min(1, max_norm / total)
                limit = clipped if total > max_norm else np.inf
                average[i] = clipped if average[i] is None else min(average[i], clipped)
            elif average[i] is None:
                limit, average[i] = np.inf, norm
            else:
                limit = relative * average[i]
                clipped = min(norm, limit)
                average[i] = decay * average[i] + (1 - decay) * clipped
            seen[i] += 1
            limits.append(limit)
        allowed.append(limits)
    return allowed


def np_k_sigma_window(history, num_std=3.0, window=128, warmup_steps=64):
    """Levanter's: the norms before this one as they were, a population deviation."""
    past, allowed = [], []
    for norm in history:
        last = past[-window:]
        enough = len(past) >= max(warmup_steps, 1)
        allowed.append(np.mean(last) + num_std * np.std(last) if enough else np.inf)
        if counts(norm):
            past.append(norm)
    return allowed


def np_k_sigma_decay(history, num_std=3.0, decay=0.99, warmup_steps=64):
    """Weights decay with age; a clipped norm enters as what was left of it."""
    past, allowed = [], []
    for norm in history:
        limit = np.inf
        if len(past) >= max(warmup_steps, 1):
            some = np.array(past[-4000:])
            weights = decay ** np.arange(len(some) - 1, -1, -1.0)
            mean = np.average(some, weights=weights)
            spread = np.average((some - mean) ** 2, weights=weights)
            limit = mean + num_std * np.sqrt(spread)
        allowed.append(limit)
        if counts(norm):
            past.append(min(norm, limit))
    return allowed


def np_aggc(history, high=1.5, low=0.0, decay=0.98):
    """What is allowed lies in a band around the mean of what was allowed before."""
    total, count, allowed = 0.0, 0, []
    for norm in history:
        if not counts(norm):
            allowed.append(np.nan)
            continue
        after = norm
        if count:
            mean = total / (1 - decay**count)  # Adam's correction of a start at zero
            after = min(max(norm, low * mean), high * mean)
        allowed.append(after)
        total, count = decay * total + (1 - decay) * after, count + 1
    return allowed


def np_stable_spam(grads, mean_decay=0.7, rms_decay=0.9, max_decay=0.999):
    """Of one leaf: AdaClip on its elements, then AdaGN on its norm."""
    top = mean = square = 0.0
    t, out = 0, []
    for g in np.asarray(grads, np.float64):
        largest = np.max(np.abs(g))
        if not counts(largest):
            out.append(g * np.where(np.isfinite(largest), 1, np.nan))
            continue
        t += 1
        top = max_decay * top + (1 - max_decay) * largest
        bound = top / (1 - max_decay**t)
        g = np.where(np.abs(g) > bound, g / largest * bound, g)
        norm = np.sqrt(np.sum(g**2))
        mean = mean_decay * mean + (1 - mean_decay) * norm
        square = rms_decay * square + (1 - rms_decay) * norm**2
        unbiased = square / (1 - rms_decay**t)
        out.append(g / norm * (mean / (1 - mean_decay**t)) / np.sqrt(unbiased))
    return np.array(out)


# --------------------------------------------------------------------------------------
# The histories
# --------------------------------------------------------------------------------------


def lively(seed=0, steps=5000):
    """A slow drift with noise, spikes, zeros, NaN and infinities."""
    rng = np.random.default_rng(seed)
    drift = np.exp(np.cumsum(rng.normal(scale=0.01, size=steps)))
    sizes = drift * rng.lognormal(sigma=0.5, size=steps)
    sizes[rng.random(steps) < 0.02] *= 1000
    for bad in 0.0, np.nan, np.inf:
        sizes[rng.random(steps) < 0.02] = bad
    return sizes.astype(np.float32)


def late_start(steps=300):
    """Zeros first, as of LoRA's first matrix, then constant norms and a shift."""
    rest = np.where(np.arange(steps - 40) < 180, 0.25, 4.0)
    return np.concatenate([np.zeros(40), rest]).astype(np.float32)


HISTORIES = {"lively": lively(), "another": lively(1), "late_start": late_start()}
every_history = pytest.mark.parametrize("history", HISTORIES)


@functools.cache
def over_history(clip):
    """The whole run of a clip, compiled once for all histories of a length."""

    def step(state, updates):
        updates, state = clip.update(updates, state)
        after = norms.leaf_norms(updates)
        return state, (state.max_norms, jnp.stack(jax.tree.leaves(after)))

    @jax.jit
    def run(grads):
        first = jax.tree.map(lambda x: x[0], grads)
        return jax.lax.scan(step, clip.init(first), grads)[1]

    return run


def stepped(clip, sizes):
    """`(max_norms, norms of the results)` of a clip whose leaves have these norms."""
    columns = np.reshape(sizes, (len(sizes), -1)).T
    direction = np.array([[0.6, 0.8]])
    grads = {
        str(i): jnp.asarray(column[:, None] * direction, jnp.float32)
        for i, column in enumerate(columns)
    }
    max_norms, results = over_history(clip)(grads)
    return [np.asarray(x, np.float64) for x in (helpers.shown(max_norms), results)]


RULES = {
    "autoclip": (lambda: oc.autoclip(30.0, 50), np_autoclip, (30.0, 50)),
    "zclip": (
        lambda: oc.zclip(2.5, 0.97, 25, jnp.inf),
        np_zclip,
        (2.5, 0.97, 25, np.inf),
    ),
    "zclip_capped": (lambda: oc.zclip(), np_zclip, ()),
    "k_sigma_window": (lambda: oc.k_sigma_clip(window=128), np_k_sigma_window, ()),
    "k_sigma_decay": (lambda: oc.k_sigma_clip(decay=0.99), np_k_sigma_decay, ()),
    "aggc": (lambda: oc.aggc(1.5, 0.5), np_aggc, (1.5, 0.5)),
}


@functools.cache
def clip_of(rule):
    return RULES[rule][0]()


@every_history
@pytest.mark.parametrize("rule", RULES)
def test_a_rule_is_its_reference_over_the_whole_history(rule, history):
    _, reference, arguments = RULES[rule]
    sizes = HISTORIES[history]
    ours, after = stepped(clip_of(rule), sizes)
    real = np.isfinite(sizes) & (sizes > 0)
    right = np.array(reference(sizes.astype(np.float64), *arguments))
    np.testing.assert_allclose(ours.ravel()[real], right[real], rtol=1e-5)
    held = np.where(
        np.isinf(right), sizes, right if rule == "aggc" else np.minimum(sizes, right)
    )
    np.testing.assert_allclose(after.ravel()[real], held[real], rtol=1e-5)
    assert np.all(after.ravel()[sizes == 0] == 0)
    assert np.all(np.isnan(after.ravel()[~np.isfinite(sizes)]))


def columns_of_leaves(steps=5000):
    return np.stack([lively(seed, steps) for seed in (2, 3, 4)], axis=1)


def is_real(sizes):
    return np.isfinite(sizes) & (sizes > 0)


def test_adagc_is_its_reference_over_the_whole_history():
    sizes = columns_of_leaves()
    ours, after = stepped(oc.adagc(), sizes)
    real, right = is_real(sizes), np.array(np_adagc(sizes))
    np.testing.assert_allclose(ours[real], right[real], rtol=1e-5)
    held = np.minimum(sizes, right)
    np.testing.assert_allclose(after[real], held[real], rtol=1e-5)


def test_without_a_warm_up_adagc_starts_from_the_first_norm():
    sizes = columns_of_leaves(200)
    ours, after = stepped(oc.adagc(warmup_steps=0), sizes)
    real, right = is_real(sizes), np.array(np_adagc(sizes, warmup_steps=0))
    np.testing.assert_allclose(ours[real], right[real], rtol=1e-5)
    assert np.all(np.isfinite(after[real]))


@pytest.mark.parametrize("decays", [(0.7, 0.9, 0.999), (0.0, 0.5, 0.9)], ids=str)
def test_stable_spam_clip_is_its_reference_over_the_whole_history(decays):
    rng = np.random.default_rng(5)
    grads = rng.normal(size=(5000, 6)) * np.nan_to_num(lively(6), posinf=1)[:, None]
    grads[rng.random(grads.shape) < 0.01] *= 1000
    grads[rng.random(5000) < 0.02, 2] = np.nan
    grads[rng.random(5000) < 0.02, 3] = np.inf
    grads[1000:1010] = 0
    grads = grads.astype(np.float32)
    clip = oc.stable_spam_clip(*decays)

    def step(state, updates):
        updates, state = clip.update(updates, state)
        return state, updates

    _, ours = jax.jit(lambda g: jax.lax.scan(step, clip.init(g[0]), g))(grads)
    np.testing.assert_allclose(ours, np_stable_spam(grads, *decays), rtol=1e-5)


# --------------------------------------------------------------------------------------
# A reference that could not tell one constant from another would prove nothing
# --------------------------------------------------------------------------------------

CHANGED = [
    (np_autoclip, (30.0, 50), 0, 31.0),
    (np_autoclip, (30.0, 50), 1, 49),
    (np_zclip, (2.5, 0.97, 25, np.inf), 0, 2.501),
    (np_zclip, (2.5, 0.97, 25, np.inf), 1, 0.9701),
    (np_zclip, (2.5, 0.97, 25, np.inf), 2, 26),
    (np_zclip, (2.5, 0.97, 25, 1.0), 3, 1.001),
    (np_k_sigma_window, (3.0, 128, 64), 0, 3.001),
    (np_k_sigma_window, (3.0, 128, 64), 1, 127),
    (np_k_sigma_window, (3.0, 128, 64), 2, 65),
    (np_k_sigma_decay, (3.0, 0.99, 64), 0, 3.001),
    (np_k_sigma_decay, (3.0, 0.99, 64), 1, 0.9901),
    (np_k_sigma_decay, (3.0, 0.99, 64), 2, 65),
    (np_aggc, (1.5, 0.5, 0.98), 0, 1.501),
    (np_aggc, (1.5, 0.5, 0.98), 1, 0.501),
    (np_aggc, (1.5, 0.5, 0.98), 2, 0.9801),
    (np_adagc, (1.05, 0.98, 100, 1.0), 0, 1.0501),
    (np_adagc, (1.05, 0.98, 100, 1.0), 1, 0.9801),
    (np_adagc, (1.05, 0.98, 100, 1.0), 2, 101),
    (np_adagc, (1.05, 0.98, 100, 1.0), 3, 1.001),
    (np_stable_spam, (0.7, 0.9, 0.999), 0, 0.701),
    (np_stable_spam, (0.7, 0.9, 0.999), 1, 0.901),
    (np_stable_spam, (0.7, 0.9, 0.999), 2, 0.9991),
]


@pytest.mark.parametrize(("reference", "arguments", "place", "value"), CHANGED)
def test_a_reference_tells_one_constant_from_another(
    reference, arguments, place, value
):
    sizes = lively(steps=500).astype(np.float64)
    if reference is np_adagc:
        sizes = columns_of_leaves(500)
    if reference is np_stable_spam:
        sizes = np.random.default_rng(0).normal(size=(500, 6))
    changed = list(arguments)
    changed[place] = value
    right, wrong = (np.array(reference(sizes, *a)) for a in (arguments, changed))
    assert not np.allclose(right, wrong, rtol=1e-5, equal_nan=True)


# --------------------------------------------------------------------------------------
# What the papers say of them
# --------------------------------------------------------------------------------------


def allowed(clip, sizes):
    return stepped(clip, np.asarray(sizes, np.float32))[0].ravel()


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


def seen():
    grad_fn = oc.per_example_clipped_grad(lambda params, x: params * x, 1.0)
    return grad_fn(1.0, jnp.ones(2))[1]


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
