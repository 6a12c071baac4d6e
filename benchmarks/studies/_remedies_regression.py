"""The textbooks' regression, and what textbooks change to keep it from exploding."""

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _regression_data import FEATURES, TRAIN_ROWS, regression_data

import optaxclip

MOMENTUM = 0.9


class Numbers(NamedTuple):
    """What differs within one compiled program. A threshold of inf never clips."""

    rate: float = 0.01
    max_norm: float = math.inf  # of all gradients together
    max_leaf_norm: float = math.inf  # of each kernel and each bias
    max_value: float = math.inf  # of each element
    init: float = 1.0  # what the first weights are multiplied by
    target: float = 1.0  # what the targets are divided by
    l1: float = 0.0
    l2: float = 0.0


def sgd(numbers: Numbers, momentum: float = MOMENTUM) -> optax.GradientTransformation:
    clip = optaxclip.clip_by_global_norm(numbers.max_norm)
    return optax.chain(clip, optax.sgd(numbers.rate, momentum))


def sgd_alone(numbers: Numbers) -> optax.GradientTransformation:
    return sgd(numbers, momentum=0.0)


def other_clips(numbers: Numbers) -> optax.GradientTransformation:
    return optax.chain(
        optaxclip.clip_by_leaf_norm(numbers.max_leaf_norm),
        optaxclip.clip_by_value(numbers.max_value),
        optax.sgd(numbers.rate, MOMENTUM),
    )


def clip_after_momentum(numbers: Numbers) -> optax.GradientTransformation:
    clip = optaxclip.clip_by_global_norm(numbers.max_norm)
    return optax.chain(optax.trace(MOMENTUM), clip, optax.scale(-numbers.rate))


def adam(numbers: Numbers) -> optax.GradientTransformation:
    clip = optaxclip.clip_by_global_norm(numbers.max_norm)
    return optax.chain(clip, optax.adam(numbers.rate))


class Way(NamedTuple):
    """What makes another program of it."""

    hidden: tuple[int, ...] = (25,)
    activation: Callable[[Any], Any] = jax.nn.relu
    error: Callable[[Any, Any], Any] = optax.squared_error
    batch_size: int = 32
    optimizer: Callable[[Numbers], optax.GradientTransformation] = sgd


class Setting(NamedTuple):
    """One way to train, without a clip or with one of its own."""

    way: Way = Way()
    numbers: Numbers = Numbers()


class Ends(NamedTuple):
    """How runs ended, `[seeds]`."""

    mse: np.ndarray  # on the test half, in the units of the targets; or not finite
    dead: np.ndarray  # whether no row of the train half moves the first kernel
    loss: np.ndarray  # of each batch, `[seeds, steps]`
    norm: np.ndarray  # of its gradient before the clip


def init(way: Way, key: jax.Array, scale: Any = 1.0) -> list[dict[str, jax.Array]]:
    """Draws the hidden kernels by He's range, the last one by Glorot's."""
    sizes = FEATURES, *way.hidden, 1
    keys, layers = jax.random.split(key, len(sizes) - 1), []
    for key, rows, columns in zip(keys, sizes[:-1], sizes[1:], strict=True):
        bound = math.sqrt(6 / (rows if columns > 1 else rows + columns))
        kernel = jax.random.uniform(key, (rows, columns), minval=-bound, maxval=bound)
        layers.append({"bias": jnp.zeros(columns), "kernel": scale * kernel})
    return layers


def predict(way: Way, params, x):
    for layer in params[:-1]:
        x = way.activation(x @ layer["kernel"] + layer["bias"])
    return (x @ params[-1]["kernel"] + params[-1]["bias"])[:, 0]


def loss_fn(way: Way, numbers: Numbers, params, x, y):
    """Adds the penalties of the kernels to the mean error of a batch."""
    error = way.error(predict(way, params, x), y / numbers.target).mean()
    kernels = [layer["kernel"] for layer in params]
    l1 = sum(jnp.abs(kernel).sum() for kernel in kernels)
    return error + numbers.l1 * l1 + numbers.l2 * sum((w**2).sum() for w in kernels)


@partial(jax.jit, static_argnums=0)
@partial(jax.vmap, in_axes=(None, 0, None, None))  # settings
@partial(jax.vmap, in_axes=(None, None, 0, 0))  # seeds
def train(way: Way, numbers: Numbers, seed, batches) -> tuple[jax.Array, ...]:
    """Makes one step per batch of row numbers; returns what `Ends` is made of."""
    x, y = map(jnp.asarray, regression_data())
    optimizer = way.optimizer(numbers)

    def step(carry, rows):
        params, opt_state = carry
        grad_fn = jax.value_and_grad(partial(loss_fn, way, numbers))
        loss, grads = grad_fn(params, x[rows], y[rows])
        updates, opt_state = optimizer.update(grads, opt_state, params)
        seen = loss, optaxclip.global_norm(grads)
        return (optax.apply_updates(params, updates), opt_state), seen

    params = init(way, jax.random.key(seed), numbers.init)
    start = params, optimizer.init(params)
    (params, _), (losses, norms) = jax.lax.scan(step, start, batches)
    error = numbers.target * predict(way, params, x) - y
    plain = partial(loss_fn, way, numbers._replace(l1=0.0, l2=0.0))
    grads = jax.grad(plain)(params, x[:TRAIN_ROWS], y[:TRAIN_ROWS])
    dead = jnp.all(grads[0]["kernel"] == 0)
    return (error[TRAIN_ROWS:] ** 2).mean(), dead, losses, norms


def draw_batches(seeds: int, epochs: int, size: int) -> np.ndarray:
    """Draws row numbers `[seeds, steps, size]`, epoch by epoch, in full batches."""
    count = TRAIN_ROWS // size
    drawn = []
    for seed in range(seeds):
        generator = np.random.default_rng(seed)
        rows = [
            generator.permutation(TRAIN_ROWS)[: count * size] for _ in range(epochs)
        ]
        drawn.append(np.concatenate(rows).reshape(-1, size))
    return np.stack(drawn)


@cache
def suggested_by(optimizer: Callable[..., Any], numbers: Numbers) -> float:
    """Asks an optimizer for a threshold to begin with, for weights of norm 1."""
    return optaxclip.suggest_max_norm(optimizer(numbers), {"w": np.ones(1)})


def with_clip(setting: Setting) -> Setting:
    """Adds the clip that `suggest_max_norm` suggests, which knows no data."""
    way, numbers = setting
    unit = suggested_by(way.optimizer, Numbers(rate=numbers.rate))
    size = optaxclip.global_norm(init(way, jax.random.key(0), numbers.init))
    return Setting(way, numbers._replace(max_norm=unit * max(1.0, float(size))))


def train_all(settings: Sequence[Setting], seeds: int, epochs: int) -> list[Ends]:
    """Trains settings, those of one program together."""

    def train_way(way: Way) -> dict[int, Ends]:
        mine = [i for i, setting in enumerate(settings) if setting.way == way]
        numbers = jax.tree.map(
            lambda *values: np.array(values, np.float32),
            *(settings[i].numbers for i in mine),
        )
        batches = draw_batches(seeds, epochs, way.batch_size)
        found = jax.device_get(train(way, numbers, np.arange(seeds), batches))
        rows = zip(*found, strict=True)
        return {i: Ends(*row) for i, row in zip(mine, rows, strict=True)}

    ends: dict[int, Ends] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for found in pool.map(train_way, dict.fromkeys(way for way, _ in settings)):
            ends |= found
    return [ends[i] for i in range(len(settings))]
