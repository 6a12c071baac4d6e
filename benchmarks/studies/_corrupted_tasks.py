"""The tasks on which rules are compared, and what corrupts their batches."""

import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _task_parts import Data
from sklearn.datasets import load_digits, make_regression

GOOD, SHUFFLED, SCALED, NAN = range(4)  # what a batch is like
PLACES = {0.35: SHUFFLED, 0.45: SCALED, 0.55: NAN, 0.65: SCALED, 0.75: SHUFFLED}
BURST = (0.85, 3)  # the share of the steps after which so many batches are NaN


def make_faults(steps: int) -> np.ndarray:
    """Says what the batch of each step is like: the same for all runs."""
    faults = np.full(steps, GOOD)
    for share, fault in PLACES.items():
        faults[int(share * steps)] = fault
    share, length = BURST
    faults[int(share * steps) : int(share * steps) + length] = NAN
    return faults


def spoil(fault, x, y, scale: tuple[float, float]):
    """Corrupts a batch in one of the ways."""
    y = jnp.where(fault == SHUFFLED, jnp.roll(y, 1, axis=0), y)
    x = jnp.where(fault == SCALED, scale[0] * x, x)
    y = jnp.where(fault == SCALED, (scale[1] * y).astype(y.dtype), y)
    return jnp.where(fault == NAN, jnp.nan, x), y


class Task(NamedTuple):
    """What is learnt, from what, and how fast."""

    data: Data
    batch_size: int
    learning_rates: dict[str, float]  # that suit a clipped gradient, by optimizer
    init: Callable[[jax.Array], Any]  # key -> params
    loss: Callable[..., jax.Array]  # params, x, y -> loss of the batch
    score: Callable[..., jax.Array]  # params, x, y -> the loss to report, above zero
    scale: tuple[float, float]  # by which a scaled batch multiplies x and y
    norm: float  # of a usual gradient, around which thresholds are tried
    unit: str  # of the score


class Network(nn.Module):
    """One hidden layer of relu units."""

    units: int
    outputs: int

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.he_uniform()
        hidden = nn.relu(nn.Dense(self.units, kernel_init=init)(x))
        return nn.Dense(self.outputs, kernel_init=init)(hidden)


@cache
def digits() -> Task:
    """Ten digits of 8 x 8 pixels; cross-entropy."""
    x, y = load_digits(return_X_y=True)
    x, y = np.asarray(x / 16, np.float32), np.asarray(y, np.int32)
    network = Network(32, 10)

    def loss(params, x, y):
        scores = jnp.asarray(network.apply(params, x))
        return optax.softmax_cross_entropy_with_integer_labels(scores, y).mean()

    return Task(
        data=Data(x[:-300], y[:-300], x[-300:], y[-300:]),
        batch_size=32,
        learning_rates={"momentum": 0.1, "Adam": 0.01},
        init=lambda key: network.init(key, jnp.zeros((1, 64))),
        loss=loss,
        score=loss,
        scale=(1000.0, 1.0),
        norm=1.0,
        unit="cross-entropy, nats",
    )


@cache
def regression() -> Task:
    """The textbooks' targets between -400 and 400, as they are; squared error."""
    x, y = make_regression(1000, 20, noise=0.1, random_state=1)[:2]
    x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
    network = Network(25, 1)

    def loss(params, x, y):
        predicted = jnp.asarray(network.apply(params, x))
        return jnp.mean((predicted[:, 0] - y) ** 2)

    return Task(
        data=Data(x[:500], y[:500], x[500:], y[500:]),
        batch_size=32,
        learning_rates={"momentum": 0.01, "Adam": 0.1},
        init=lambda key: network.init(key, jnp.zeros((1, 20))),
        loss=loss,
        score=loss,
        scale=(1.0, 1000.0),
        norm=100.0,
        unit="mean squared error",
    )


@cache
def handwriting(steps: int = 40, hidden: int = 24) -> Task:
    """Graves' task: the next offset of a pen, by an LSTM and two Gaussians.

    The loss is summed over time; the score is the perplexity per time step.
    """
    generator = np.random.default_rng(0)
    w1, w2 = generator.uniform(0.15, 0.45, (2, 520, 1))
    a, b = generator.uniform(0, 2 * np.pi, (2, 520, 1))
    t = np.arange(steps + 2)
    x = np.sin(w1 * t + a) + 0.5 * np.sign(np.sin(w2 * t + b))
    pen = np.stack([x, np.cos(w1 * t + a)], axis=-1)
    offsets = pen[:, 1:] - pen[:, :-1]
    offsets += 0.01 * generator.standard_normal(offsets.shape)
    offsets = offsets.astype(np.float32)
    x, y = offsets[:, :-1], offsets[:, 1:]

    def init(key):  # four leaves: Flax's LSTM has fourteen, which take long to compile
        draw, keys = nn.initializers.glorot_uniform(), jax.random.split(key)
        gates = jnp.zeros(4 * hidden).at[hidden : 2 * hidden].set(1.0)  # remembers
        cell = {"kernel": draw(keys[0], (2 + hidden, 4 * hidden)), "bias": gates}
        head = {"kernel": draw(keys[1], (hidden, 10)), "bias": jnp.zeros(10)}
        return {"cell": cell, "head": head}

    def read(params, x):
        def step(carry, offset):
            h, c = carry
            z = jnp.concatenate([offset, h], axis=-1) @ params["cell"]["kernel"]
            i, f, g, o = jnp.split(z + params["cell"]["bias"], 4, axis=-1)
            c = nn.sigmoid(f) * c + nn.sigmoid(i) * jnp.tanh(g)
            h = nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        start = jnp.zeros((len(x), hidden))
        states = jax.lax.scan(step, (start, start), x.swapaxes(0, 1))[1]
        return states.swapaxes(0, 1) @ params["head"]["kernel"] + params["head"]["bias"]

    def loss(params, x, y):
        logits, means, widths = jnp.split(read(params, x), (2, 6), axis=-1)
        pairs = (*y.shape[:-1], 2, 2)
        means, widths = means.reshape(pairs), widths.reshape(pairs)
        z = (y[..., None, :] - means) * jnp.exp(-widths)
        each = -0.5 * z**2 - widths - 0.5 * math.log(2 * math.pi)
        likelihoods = nn.logsumexp(nn.log_softmax(logits) + each.sum(-1), axis=-1)
        return -likelihoods.sum(axis=1).mean()

    return Task(
        data=Data(x[:-8], y[:-8], x[-8:], y[-8:]),
        batch_size=8,
        learning_rates={"momentum": 1e-3, "Adam": 0.01},
        init=init,
        loss=loss,
        score=lambda *arguments: jnp.exp(loss(*arguments) / steps),
        scale=(1000.0, 1000.0),
        norm=300.0,
        unit="perplexity per time step",
    )


TASKS = {"digits": digits, "handwriting": handwriting, "regression": regression}
