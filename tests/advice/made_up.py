"""Histories that are made up: healthy ones, into which the tests put one fault each."""

import numpy as np

NAN, INF = np.nan, np.inf
LEAVES = [f"Dense_{i}/{name}" for i in range(4) for name in ("bias", "kernel")]


def noisy(level, rows, scale, seed):
    return level * np.exp(scale * np.random.default_rng(seed).standard_normal(rows))


def healthy(rows=200, seed=0, every=1):
    """A loss that falls from 5 to about 1.2, norms around 2."""
    fall = 1 + 4 / (1 + 20 * np.linspace(0, 1, rows))
    return {
        "step": every * np.arange(rows),
        "loss": noisy(fall, rows, 0.02, seed),
        "norm": noisy(2.0, rows, 0.2, seed + 1),
    }


def flat(level, rows, scale=0.01, seed=5):
    return noisy(level, rows, scale, seed)


def by_leaf(rows=200, leaves=LEAVES, **columns):
    """The same with a norm for each leaf, the columns as of our own summaries."""
    history = healthy(rows)
    norms = {f"norm/{x}": noisy(1.0, rows, 0.2, i) for i, x in enumerate(leaves)}
    return {"step": history["step"], "loss": history["loss"]} | norms | columns


def clipped(norm, max_norm):
    """What a clip of the global norm shows."""
    limits = np.full(len(norm), float(max_norm))
    factors = np.minimum(1.0, max_norm / norm)
    return {"clip/norm": norm, "clip/max_norm": limits, "clip/factor": factors}
