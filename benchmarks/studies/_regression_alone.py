"""The textbooks' regression, one run, as a user of this library would write it."""

from collections.abc import Mapping

import jax
import numpy as np
import optax
from _regression import LEARNING_RATE, MOMENTUM, Network, shuffled_batches
from _regression_data import TRAIN_ROWS, regression_data

import optaxclip


def train_once(clip: Mapping[str, float], seed: int, epochs: int) -> list[float]:
    """Trains with a clip, by its name and threshold; returns the last MSE of each half.

    The shuffling is NumPy's, the loop over epochs Python's: neither has to be compiled.
    """
    x, y = jax.device_put(regression_data())
    clips = [getattr(optaxclip, name)(threshold) for name, threshold in clip.items()]
    optimizer = optax.chain(*clips, optax.sgd(LEARNING_RATE, MOMENTUM))

    def squared_errors(params, rows):
        return (Network().apply(params, x[rows]) - y[rows]) ** 2

    def loss_fn(params, rows):
        return squared_errors(params, rows).mean(where=rows >= 0)

    def step(run, rows):
        params, opt_state = run
        grads = jax.grad(loss_fn)(params, rows)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    @jax.jit
    def epoch(run, batches):
        run, _ = jax.lax.scan(step, run, batches)
        errors = squared_errors(run[0], np.arange(2 * TRAIN_ROWS))
        return run, errors.reshape(2, TRAIN_ROWS).mean(axis=1)

    params = jax.jit(Network().init)(jax.random.key(seed), x)
    run, generators = (params, optimizer.init(params)), [np.random.default_rng(seed)]
    errors = np.zeros(2)
    for _ in range(epochs):
        run, errors = epoch(run, shuffled_batches(generators)[0])
    return np.asarray(errors).tolist()
