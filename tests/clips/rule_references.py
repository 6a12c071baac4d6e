"""The published rules as loops in NumPy, float64, and histories to run them on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import helpers
from helpers import oc
from optaxclip import norms


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


def lively(seed=0, steps=5000):
    """A slow drift with noise, spikes, zeros, NaN and infinities."""
    rng = np.random.default_rng(seed)
    drift = np.exp(np.cumsum(rng.normal(scale=0.01, size=steps)))
    sizes = drift * rng.lognormal(sigma=0.5, size=steps)
    sizes[rng.random(steps) < 0.02] *= 1000
    for bad in 0.0, np.nan, np.inf:
        sizes[rng.random(steps) < 0.02] = bad
    return sizes.astype(np.float32)


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


def columns_of_leaves(steps=5000):
    return np.stack([lively(seed, steps) for seed in (2, 3, 4)], axis=1)


def is_real(sizes):
    return np.isfinite(sizes) & (sizes > 0)


def allowed(clip, sizes):
    return stepped(clip, np.asarray(sizes, np.float32))[0].ravel()


def seen():
    grad_fn = oc.per_example_clipped_grad(lambda params, x: params * x, 1.0)
    return grad_fn(1.0, jnp.ones(2))[1]
