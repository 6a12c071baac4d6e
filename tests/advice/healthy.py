"""Simulated histories of healthy runs, as noisy as real ones."""

import numpy as np


def healthy_history(seed):
    """Norms with a trend, log-normal or heavy-tailed, and a loss that falls.

    As in real logs the first row may be huge, the norms may rise fivefold, single ones
    stand out a hundredfold, neighbours depend on each other, and there may be a warm-up
    or few rows.
    """
    rng = np.random.default_rng(seed)
    rows = int(10 ** rng.uniform(1.1, 3.4))
    every = int(rng.choice([1, 1, 10, 50, 100, 500]))
    time = np.linspace(0, 1, rows)
    return {
        "step": np.arange(rows) * every + rng.integers(0, 2) * every,
        "loss": _loss(rng, time),
        "grad_norm": _norms(rng, time),
    }


def _noise(rng, rows, scale):
    """Log-normal or heavy-tailed, and each value a bit like the one before."""
    tails = rng.choice([np.inf, 4.0, 2.5])
    normal, heavy = rng.standard_normal(rows), rng.standard_t(min(tails, 4), rows)
    noise = normal if tails == np.inf else heavy
    memory = rng.choice([0.0, 0.0, 0.5, 0.8])
    for i in range(1, rows):
        noise[i] = memory * noise[i - 1] + np.sqrt(1 - memory**2) * noise[i]
    return scale * noise


def _loss(rng, time):
    start = 10 ** rng.uniform(-1, 1.5)
    share = rng.uniform(0.05, 0.7)  # of the loss, what is left at the end
    speed = 10 ** rng.uniform(0.5, 2)
    fall = (1 + speed * time) ** -rng.uniform(0.5, 1.5)
    level = start * (share + (1 - share) * fall)
    return level * np.exp(_noise(rng, len(time), 10 ** rng.uniform(-2.5, -0.9)))


def _norms(rng, time):
    level = 10 ** rng.uniform(-2, 4)
    trend = rng.uniform(-3, np.log(5)) * time ** rng.uniform(0.3, 1.5)
    warm_up = -rng.uniform(0, 3) * np.exp(-time / rng.uniform(0.01, 0.1))
    norms = level * np.exp(trend + rng.integers(0, 2) * warm_up)
    norms *= np.exp(_noise(rng, len(time), 10 ** rng.uniform(-1.3, -0.1)))
    spikes = rng.random(len(time)) < rng.choice([0.0, 0.002, 0.02])
    norms[spikes] *= 10 ** rng.uniform(0.5, 2, spikes.sum())
    norms[0] *= 10 ** rng.uniform(0, 1.5)
    return np.exp(np.clip(np.log(norms), -60, 60))
