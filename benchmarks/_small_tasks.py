"""Small tasks on which a clip matters, or should do no harm.

Each is learnt in a second or two by SGD with momentum, or by Adam, from a few hundred
small batches. The rows that are held out are clean.
"""

import argparse
import inspect
import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.scipy.special import xlogy
from sklearn import datasets

HELD_OUT = 100  # rows that no run is trained on


class Data(NamedTuple):
    """Rows to train on, and rows that are held out."""

    x: np.ndarray
    y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray


class Task(NamedTuple):
    """What is learnt, by which optimizer."""

    data: Data
    init: Callable[[jax.Array], Any]  # key -> params
    loss: Callable[..., jax.Array]  # params, x, y -> loss of a batch
    moments: Callable[[], optax.GradientTransformation]
    rate: float  # the lowest learning rate
    score: Callable[[Any], Any] = lambda loss: loss  # what is compared; above zero
    steps: int = 300
    batch_size: int = 16


def momentum() -> optax.GradientTransformation:
    return optax.trace(0.9)


def dense(key, inputs: int, outputs: int, gain: float = 2.0) -> dict[str, jax.Array]:
    kernel = math.sqrt(gain / inputs) * jax.random.normal(key, (inputs, outputs))
    return {"kernel": kernel, "bias": jnp.zeros(outputs)}


def apply_dense(layer, x):
    return x @ layer["kernel"] + layer["bias"]


def init_layers(key, sizes: tuple[int, ...]) -> list[dict[str, jax.Array]]:
    keys = jax.random.split(key, len(sizes) - 1)
    return [dense(*some) for some in zip(keys, sizes[:-1], sizes[1:], strict=True)]


def apply_layers(params, x):
    for layer in params[:-1]:
        x = jax.nn.relu(apply_dense(layer, x))
    return apply_dense(params[-1], x)


def last_state(params, x):
    """Runs a plain recurrent network from zero over rows `[batch, steps, features]`."""

    def step(h, now):
        z = apply_dense(params["cell"], jnp.concatenate([now, h], axis=-1))
        return jnp.tanh(z), None

    start = jnp.zeros((len(x), params["cell"]["bias"].size))
    return jax.lax.scan(step, start, x.swapaxes(0, 1))[0]


def cross_entropy(scores, labels):
    return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()


def classify(params, x, y):
    return cross_entropy(apply_layers(params, x), y)


def fit(params, x, y):
    return jnp.mean((apply_layers(params, x)[:, 0] - y) ** 2)


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
        def step(carry, now):
            h, c = carry
            z = apply_dense(params["cell"], jnp.concatenate([now, h], axis=-1))
            i, f, g, o = jnp.split(z, 4, axis=-1)
            c = jax.nn.sigmoid(f + 1) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        start = jnp.zeros((len(x), units))
        states = jax.lax.scan(step, (start, start), x.swapaxes(0, 1))[1]
        outputs = apply_dense(params["head"], states.swapaxes(0, 1))
        logits, means, widths = jnp.split(outputs, (2, 6), axis=-1)
        pairs = (*y.shape[:-1], 2, 2)
        means, widths = means.reshape(pairs), widths.reshape(pairs)
        z = (y[..., None, :] - means) * jnp.exp(-widths)
        each = (-0.5 * z**2 - widths).sum(axis=-1) - math.log(2 * math.pi)
        weighted = jax.nn.log_softmax(logits) + each
        return -jax.nn.logsumexp(weighted, axis=-1).sum(axis=1).mean()

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


def split(x: np.ndarray, y: np.ndarray) -> Data:
    """Holds out the last rows, in 32 bits."""
    dtypes = np.float32, np.int32
    x, y = (z.astype(dtypes[np.issubdtype(z.dtype, np.integer)]) for z in (x, y))
    return Data(x[:-HELD_OUT], y[:-HELD_OUT], x[-HELD_OUT:], y[-HELD_OUT:])


def shuffled(rows: Any, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    x, y = rows
    order = np.random.default_rng(seed).permutation(len(x))
    return x[order], y[order]


def standardized(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(axis=0)) / x.std(axis=0)


ALL = (
    regression,
    digits,
    logistic,
    factorisation,
    adding,
    handwriting,
    characters,
    scans,
    zeros,
    wine,
    cancer,
    diabetes,
    counts,
    tensor,
    rows,
    rows_adam,
    autoencoder,
    friedman,
)
TASKS = {task.__name__: cache(task) for task in ALL}
