"""What are small tasks made of? Rows, layers, losses and an optimizer."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

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


def cross_entropy(scores, labels):
    return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()


def classify(params, x, y):
    return cross_entropy(apply_layers(params, x), y)


def fit(params, x, y):
    return jnp.mean((apply_layers(params, x)[:, 0] - y) ** 2)


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
