"""Which small tasks are on sequences? Five, from sums to handwriting and text."""

import argparse
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _task_parts import (
    Task,
    apply_dense,
    apply_layers,
    cross_entropy,
    dense,
    init_layers,
    momentum,
    shuffled,
    split,
)
from sklearn import datasets


def last_state(params, x):
    """Runs a plain recurrent network from zero over rows `[batch, steps, features]`."""

    def step(h, now):
        z = apply_dense(params["cell"], jnp.concatenate([now, h], axis=-1))
        return jnp.tanh(z), None

    start = jnp.zeros((len(x), params["cell"]["bias"].size))
    return jax.lax.scan(step, start, x.swapaxes(0, 1))[0]


def lstm_states(cell, x):
    """Runs an LSTM from zero over rows; returns its states `[batch, steps, units]`."""

    def step(carry, now):
        h, c = carry
        z = apply_dense(cell, jnp.concatenate([now, h], axis=-1))
        i, f, g, o = jnp.split(z, 4, axis=-1)
        c = jax.nn.sigmoid(f + 1) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    start = jnp.zeros((len(x), cell["bias"].size // 4))
    return jax.lax.scan(step, (start, start), x.swapaxes(0, 1))[1].swapaxes(0, 1)


def log_density_of_two_gaussians(outputs, y):
    """Returns that of a mixture over points `[.., 2]`: logits, means, log widths."""
    logits, means, widths = jnp.split(outputs, (2, 6), axis=-1)
    pairs = (*y.shape[:-1], 2, 2)
    means, widths = means.reshape(pairs), widths.reshape(pairs)
    z = (y[..., None, :] - means) * jnp.exp(-widths)
    each = (-0.5 * z**2 - widths).sum(axis=-1) - math.log(2 * math.pi)
    return jax.nn.logsumexp(jax.nn.log_softmax(logits) + each, axis=-1)


def adding(length: int = 10, units: int = 16) -> Task:
    """A plain recurrent network adds the two numbers that are marked."""
    generator = np.random.default_rng(0)
    numbers = generator.uniform(size=(3000, length))
    marks = np.zeros_like(numbers)
    first = generator.integers(length // 2, size=3000)
    second = generator.integers(length // 2, length, size=3000)
    marks[np.arange(3000), first] = marks[np.arange(3000), second] = 1
    x, y = np.stack([numbers, marks], axis=-1), (numbers * marks).sum(axis=1)

    def init(key):
        keys = jax.random.split(key)
        cell = dense(keys[0], 2 + units, units, gain=1.5)
        return {"cell": cell, "head": dense(keys[1], units, 1, gain=1.0)}

    def loss(params, x, y):
        sums = apply_dense(params["head"], last_state(params, x))[:, 0]
        return jnp.mean((sums - y) ** 2)

    return Task(split(x, y), init, loss, optax.scale_by_adam, rate=0.005)


def handwriting(length: int = 20, units: int = 12) -> Task:
    """An LSTM predicts the next offset of a pen by two Gaussians, as Graves' does."""
    generator = np.random.default_rng(0)
    w1, w2 = generator.uniform(0.15, 0.45, (2, 600, 1))
    a, b = generator.uniform(0, 2 * np.pi, (2, 600, 1))
    t = np.arange(length + 2)
    x = np.sin(w1 * t + a) + 0.5 * np.sign(np.sin(w2 * t + b))
    noise = 0.01 * generator.standard_normal((600, length + 1, 2))
    pen = np.stack([x, np.cos(w1 * t + a)], axis=-1)
    offsets = noise + pen[:, 1:] - pen[:, :-1]

    def init(key):
        keys = jax.random.split(key)
        cell = dense(keys[0], 2 + units, 4 * units, gain=1.0)
        return {"cell": cell, "head": dense(keys[1], units, 10, gain=1.0)}

    def loss(params, x, y):
        outputs = apply_dense(params["head"], lstm_states(params["cell"], x))
        return -log_density_of_two_gaussians(outputs, y).sum(axis=1).mean()

    parts = split(offsets[:, :-1], offsets[:, 1:])

    def score(loss):
        return np.exp(np.minimum(loss / length, 500))

    return Task(parts, init, loss, momentum, 1e-4, score, 200, 8)


def characters(length: int = 16, width: int = 16) -> Task:
    """A transformer of one layer predicts Python, character by character."""
    text = np.frombuffer(inspect.getsource(argparse).encode(), np.uint8) % 128
    starts = np.random.default_rng(0).integers(len(text) - length - 1, size=2000)
    windows = text[starts[:, None] + np.arange(length + 1)]

    def init(key):
        keys = jax.random.split(key, 5)
        return {
            "embedding": 0.5 * jax.random.normal(keys[0], (128 + length, width)),
            "queries": dense(keys[1], width, 3 * width, gain=1.0),
            "mlp": init_layers(keys[2], (width, 2 * width, width)),
            "head": dense(keys[3], width, 128, gain=1.0),
        }

    def loss(params, x, y):
        h = params["embedding"][x] + params["embedding"][128:]
        q, k, v = jnp.split(apply_dense(params["queries"], h), 3, axis=-1)
        weights = q @ k.swapaxes(1, 2) / math.sqrt(width)
        mask = jnp.tril(jnp.ones((length, length), bool))
        h = h + jax.nn.softmax(jnp.where(mask, weights, -1e9)) @ v
        h = h + apply_layers(params["mlp"], jax.nn.standardize(h))
        return cross_entropy(apply_dense(params["head"], h), y)

    parts = split(windows[:, :-1], windows[:, 1:])
    return Task(parts, init, loss, optax.scale_by_adam, 3e-3, steps=120, batch_size=8)


def rows(units: int = 20) -> Task:
    """A plain recurrent network reads the scanned digits row by row."""
    x, y = shuffled(datasets.load_digits(return_X_y=True), seed=3)

    def init(key):
        keys = jax.random.split(key)
        cell = dense(keys[0], 8 + units, units, gain=1.5)
        return {"cell": cell, "head": dense(keys[1], units, 10, gain=1.0)}

    def loss(params, x, y):
        return cross_entropy(apply_dense(params["head"], last_state(params, x)), y)

    x = x.reshape(-1, 8, 8) / 8 - 1
    return Task(split(x, y), init, loss, momentum, rate=0.02)


def rows_adam() -> Task:
    """The same by Adam."""
    return rows()._replace(moments=optax.scale_by_adam, rate=3e-3)
