"""Which small tasks are on rows of numbers? Regressions, classes, factorisations."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _task_parts import (
    Task,
    apply_dense,
    apply_layers,
    classify,
    dense,
    fit,
    init_layers,
    momentum,
    shuffled,
    split,
    standardized,
)
from jax.scipy.special import xlogy
from sklearn import datasets


def regression() -> Task:
    """A network on targets that reach from -400 to 400: the textbooks' NaN."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal((600, 20))
    weights = np.where(np.arange(20) < 10, generator.uniform(10, 100, 20), 0.0)
    init = partial(init_layers, sizes=(20, 25, 1))
    return Task(split(x, x @ weights), init, fit, momentum, rate=1e-3)


def digits() -> Task:
    """Classes of noisy patterns, one label in ten wrong."""
    generator = np.random.default_rng(0)
    patterns = generator.standard_normal((10, 64))
    y = generator.integers(10, size=1500)
    x = patterns[y] + 2.0 * generator.standard_normal((1500, 64))
    wrong = (generator.uniform(size=1500) < 0.1) & (np.arange(1500) < 1400)
    y = np.where(wrong, generator.integers(10, size=1500), y)
    init = partial(init_layers, sizes=(64, 32, 10))
    return Task(split(x, y), init, classify, momentum, rate=0.02)


def logistic() -> Task:
    """Two classes, features with tails so heavy that they have no variance."""
    generator = np.random.default_rng(0)
    x = generator.standard_t(1.5, (1500, 20))
    y = 1.0 * (x @ generator.standard_normal(20) > generator.logistic(size=1500))

    def loss(params, x, y):
        scores = apply_dense(params, x)[:, 0]
        return optax.sigmoid_binary_cross_entropy(scores, y).mean()

    init = partial(dense, inputs=20, outputs=1)
    return Task(split(x, y), init, loss, momentum, rate=0.01)


def factorisation() -> Task:
    """A matrix of rank 3 from single entries, of which one in fifty is far off."""
    generator = np.random.default_rng(0)
    left, right = generator.standard_normal((2, 40, 3))
    x = generator.integers(40, size=(4000, 2))
    y = (left @ right.T)[x[:, 0], x[:, 1]]
    off = (generator.uniform(size=4000) < 0.02) & (np.arange(4000) < 3900)
    y = np.where(off, 100.0 * y, y)

    def init(key):
        return 0.5 * jax.random.normal(key, (2, 40, 6))

    def loss(params, x, y):
        products = params[0][x[:, 0]] * params[1][x[:, 1]]
        return jnp.mean((products.sum(axis=1) - y) ** 2)

    return Task(split(x, y), init, loss, momentum, rate=0.05, batch_size=64)


def scans() -> Task:
    """Digits as they were scanned, a network of three hidden layers."""
    x, y = shuffled(datasets.load_digits(return_X_y=True))
    init = partial(init_layers, sizes=(64, 32, 32, 32, 10))
    return Task(split(x / 8 - 1, y), init, classify, momentum, rate=0.02)


def zeros() -> Task:
    """The same digits by a linear model whose weights all start at zero."""

    def init(key):
        del key
        return [{"kernel": jnp.zeros((64, 10)), "bias": jnp.zeros(10)}]

    return Task(scans().data, init, classify, momentum, rate=0.02)


def wine() -> Task:
    """Three classes, each row with noise of its own, one label in five wrong."""
    x, y = shuffled(datasets.load_wine(return_X_y=True))
    generator = np.random.default_rng(1)
    x, y = np.concatenate([standardized(x)] * 8), np.concatenate([y] * 8)
    x = x + 0.7 * generator.standard_normal(x.shape)
    wrong = (generator.uniform(size=len(y)) < 0.2) & (np.arange(len(y)) < len(y) - 100)
    y = np.where(wrong, generator.integers(3, size=len(y)), y)
    init = partial(init_layers, sizes=(13, 24, 3))
    return Task(split(x, y), init, classify, momentum, rate=0.02)


def cancer() -> Task:
    """Logistic regression on features of very different sizes."""
    x, y = shuffled(datasets.load_breast_cancer(return_X_y=True))

    def loss(params, x, y):
        scores = apply_dense(params, x)[:, 0]
        return optax.sigmoid_binary_cross_entropy(scores, y).mean()

    init = partial(dense, inputs=30, outputs=1, gain=0.1)
    return Task(split(np.sqrt(x), 1.0 * y), init, loss, momentum, rate=1e-3)


def diabetes() -> Task:
    """A network on targets from 25 to 346, with few rows."""
    x, y = shuffled(datasets.load_diabetes(return_X_y=True))
    init = partial(init_layers, sizes=(10, 16, 16, 1))
    return Task(split(standardized(x), y), init, fit, momentum, rate=1e-4)


def counts() -> Task:
    """Poisson regression with a log link, whose gradients grow exponentially."""
    generator = np.random.default_rng(2)
    x = generator.standard_normal((1500, 12))
    weights = 0.6 * generator.standard_normal(12)
    y = 1.0 * generator.poisson(np.exp(np.minimum(x @ weights, 5.0)))

    def loss(params, x, y):  # half the deviance
        z = jnp.minimum(apply_dense(params, x)[:, 0], 20.0)
        return jnp.mean(jnp.exp(z) - y * z + xlogy(y, y) - y)

    init = partial(dense, inputs=12, outputs=1, gain=0.5)
    return Task(split(x, y), init, loss, momentum, rate=1e-3)


def tensor() -> Task:
    """A tensor of rank 2 from single entries, whose noise has no variance."""
    generator = np.random.default_rng(5)
    a, b, c = generator.standard_normal((3, 20, 2))
    x = generator.integers(20, size=(4000, 3))
    y = (a[x[:, 0]] * b[x[:, 1]] * c[x[:, 2]]).sum(axis=1)
    noise = 0.3 * generator.standard_t(1.5, 4000) * (np.arange(4000) < 3900)

    def init(key):
        return 0.5 * jax.random.normal(key, (3, 20, 4))

    def loss(params, x, y):
        products = params[0][x[:, 0]] * params[1][x[:, 1]] * params[2][x[:, 2]]
        return jnp.mean((products.sum(axis=1) - y) ** 2)

    return Task(split(x, y + noise), init, loss, momentum, rate=0.05, batch_size=64)


def autoencoder() -> Task:
    """Squeezes the scanned digits through six units."""
    x, _ = shuffled(datasets.load_digits(return_X_y=True), seed=4)
    init = partial(init_layers, sizes=(64, 32, 6, 32, 64))

    def loss(params, x, y):
        return jnp.mean(jnp.sum((apply_layers(params, x) - y) ** 2, axis=-1))

    data = split(x / 16, x / 16)
    return Task(data, init, loss, optax.scale_by_adam, rate=3e-3)


def friedman() -> Task:
    """A network on Friedman's function; one target in thirty is 20 times too large."""
    x, y = datasets.make_friedman1(1500, noise=0.5, random_state=0)
    generator = np.random.default_rng(6)
    off = (generator.uniform(size=1500) < 0.03) & (np.arange(1500) < 1400)
    init = partial(init_layers, sizes=(10, 32, 1))
    data = split(x, np.where(off, 20 * y, y))
    return Task(data, init, fit, optax.scale_by_adam, rate=0.01)
