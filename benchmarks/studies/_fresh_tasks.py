"""Which small tasks was no rule chosen on? Six, by SGD with momentum.

They are for the last look: written after the formula, of kinds that the others lack.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from _sequence_tasks import characters, lstm_states
from _task_parts import (
    Task,
    apply_dense,
    apply_layers,
    cross_entropy,
    dense,
    fit,
    init_layers,
    momentum,
    split,
    standardized,
)


def waves() -> Task:
    """A narrow network of six hidden layers on a function that waves."""
    generator = np.random.default_rng(10)
    x = generator.uniform(-1, 1, (1500, 4))
    y = 3 * np.sin(4 * x[:, 0]) * x[:, 1] + x[:, 2] ** 2
    y = y + 0.1 * generator.standard_normal(1500)
    init = partial(init_layers, sizes=(4, *[24] * 6, 1))
    return Task(split(x, y), init, fit, momentum, rate=0.003)


def far() -> Task:
    """A linear model whose weights are far from the start, noise with heavy tails."""
    generator = np.random.default_rng(11)
    x = generator.standard_normal((1500, 15))
    noise = generator.standard_t(1.5, 1500) * (np.arange(1500) < 1400)
    y = x @ (8 * generator.standard_normal(15)) + noise

    def loss(params, x, y):
        return jnp.mean((apply_dense(params, x)[:, 0] - y) ** 2)

    init = partial(dense, inputs=15, outputs=1, gain=1.0)
    return Task(split(x, y), init, loss, momentum, rate=0.005)


def transformer() -> Task:
    """The transformer of one layer that predicts Python, by SGD."""
    return characters()._replace(moments=momentum, rate=0.1)


def memory(length: int = 12, units: int = 16) -> Task:
    """An LSTM names the first symbol of a sequence at its end."""
    generator = np.random.default_rng(12)
    symbols = generator.integers(6, size=(2500, length))

    def init(key):
        keys = jax.random.split(key)
        cell = dense(keys[0], 6 + units, 4 * units, gain=1.0)
        return {"cell": cell, "head": dense(keys[1], units, 6, gain=1.0)}

    def loss(params, x, y):
        states = lstm_states(params["cell"], jax.nn.one_hot(x, 6))
        return cross_entropy(apply_dense(params["head"], states[:, -1]), y)

    return Task(split(symbols, symbols[:, 0]), init, loss, momentum, rate=0.1)


def units() -> Task:
    """Two classes by a network, of features in units from a hundredth to a hundred."""
    generator = np.random.default_rng(13)
    x = generator.standard_normal((1500, 12))
    score = x[:, 0] * x[:, 1] + x[:, 2:6].sum(axis=1)
    y = 1 * (score + 0.5 * generator.standard_normal(1500) > 0)
    x = x * np.logspace(-2, 2, 12)[generator.permutation(12)]
    init = partial(init_layers, sizes=(12, 32, 2))

    def loss(params, x, y):
        return cross_entropy(apply_layers(params, x), y)

    return Task(split(x, y), init, loss, momentum, rate=0.001)


def pictures() -> Task:
    """A convolution of noisy bars and crosses, a fifth of the labels wrong."""
    generator = np.random.default_rng(14)
    y = generator.integers(4, size=1500)
    x = 0.7 * generator.standard_normal((1500, 8, 8))
    rows, columns = generator.integers(8, size=(2, 1500))
    every = np.arange(1500)
    x[every[y % 2 == 0], rows[y % 2 == 0]] += 1
    x[every[y >= 2], :, columns[y >= 2]] += 1
    wrong = (generator.uniform(size=1500) < 0.2) & (every < 1400)
    y = np.where(wrong, generator.integers(4, size=1500), y)

    def init(key):
        keys = jax.random.split(key)
        return {
            "filters": jax.random.normal(keys[0], (8, 1, 3, 3)) * (2 / 9) ** 0.5,
            "head": dense(keys[1], 8 * 36, 4, gain=1.0),
        }

    def loss(params, x, y):
        filters = params["filters"]
        h = jax.lax.conv(x[:, None], filters, window_strides=(1, 1), padding="VALID")
        h = jax.nn.relu(h).reshape(len(x), -1)
        return cross_entropy(apply_dense(params["head"], h), y)

    return Task(split(standardized(x), y), init, loss, momentum, rate=0.01)


ALL = waves, far, transformer, memory, units, pictures
TASKS = {task.__name__: cache(task) for task in ALL}
