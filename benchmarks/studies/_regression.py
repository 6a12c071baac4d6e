"""The textbooks' regression on unscaled targets: network and training."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _regression_data import FEATURES, TRAIN_ROWS, Data
from flax.traverse_util import flatten_dict
from jax.flatten_util import ravel_pytree

import optaxclip

BATCH_SIZE = 32
BATCHES = math.ceil(TRAIN_ROWS / BATCH_SIZE)  # steps per epoch; the last is smaller
LEARNING_RATE = 0.01
MOMENTUM = 0.9
CONVERGED = 100.0  # MSE below which a run counts as converged


class Setting(NamedTuple):
    """One way to keep the training stable. A threshold of inf never clips."""

    learning_rate: float = LEARNING_RATE
    max_norm: float = math.inf  # of all gradients together
    max_leaf_norm: float = math.inf  # of each kernel and each bias
    max_value: float = math.inf  # of each element
    relative_step: float = math.inf  # of the first step, to the norm of the parameters
    target_mean: float = 0.0  # the network learns (y - mean) / std
    target_std: float = 1.0


class History(NamedTuple):
    """What was recorded, in the units of the targets: arrays `[settings, seeds, n]`."""

    train_mse: np.ndarray  # after each epoch
    test_mse: np.ndarray  # after each epoch
    batch_loss: np.ndarray  # at each step, before its update
    norm: np.ndarray  # of the whole gradient at each step, before the clip
    leaf_norms: dict[str, np.ndarray]  # of each leaf, as it reaches the clip per leaf
    step_norm: np.ndarray  # of learning rate x gradient, before the clip by its norm
    max_step: np.ndarray  # what that clip allowed
    largest: np.ndarray  # absolute value of an element at each step, before the clip


class Network(nn.Module):
    """One hidden layer of 25 relu units and a linear output."""

    @nn.compact
    def __call__(self, x):
        hidden = nn.Dense(25, kernel_init=nn.initializers.he_uniform())(x)
        output = nn.Dense(1, kernel_init=nn.initializers.glorot_uniform())
        return output(nn.relu(hidden))[:, 0]


def make_optimizer(setting: Setting) -> optax.GradientTransformationExtraArgs:
    """Puts the clips before SGD, so that its momentum sees clipped gradients only.

    Your own optimizer needs one clip:

        optax.chain(optaxclip.clip_by_global_norm(1.0), optax.sgd(0.01, momentum=0.9))

    Here are four, of which a threshold of inf switches three or all off: the settings
    then differ in numbers alone, and one compiled program trains them all. The last one
    bounds the step, so SGD is written as its parts, and the clip goes between them.
    """
    return optax.chain(
        optaxclip.clip_by_global_norm(setting.max_norm),
        optaxclip.clip_by_leaf_norm(setting.max_leaf_norm),
        optaxclip.clip_by_value(setting.max_value),
        optax.scale(-setting.learning_rate),
        optaxclip.clip_by_relative_step(setting.relative_step),
        optax.trace(MOMENTUM),
    )


def seen_by_the_clips(opt_state, params):
    """Gives the norms of gradient, leaves and step before their clips, and max_step."""
    stats = optaxclip.summary(opt_state, params)
    paths = flatten_dict(params, sep="/")
    return (
        stats["clip_0/norm"],
        {path: stats[f"clip_1/norm/{path}"] for path in paths},
        stats["clip_3/norm"],
        stats["clip_3/max_norm"],
    )


def squared_errors(setting: Setting, params, x, y) -> jax.Array:
    """Compares predictions and targets, in the units that the network learns."""
    target = (y - setting.target_mean) / setting.target_std
    predicted = jnp.asarray(Network().apply({"params": params}, x))
    return (predicted - target) ** 2


@jax.jit  # one program for all runs: flax is slow to initialise outside of jit
@jax.vmap
def init_run(setting: Setting, seed):
    """Draws the parameters of a run and starts its optimizer."""
    variables = Network().init(jax.random.key(seed), jnp.zeros((1, FEATURES)))
    params = variables["params"]
    return params, make_optimizer(setting).init(params)


@partial(jax.jit, donate_argnums=1)
@partial(jax.vmap, in_axes=(0, 0, 0, None))  # over the runs; they share the data
def train_epoch(setting: Setting, run, batches, data: Data):
    """Makes one step per batch of row numbers, then measures both halves."""
    optimizer = make_optimizer(setting)

    def loss_of_batch(params, rows):
        errors = squared_errors(setting, params, data.x[rows], data.y[rows])
        return jnp.mean(errors, where=rows >= 0)

    def step(run, rows):
        params, opt_state = run
        loss, grads = jax.value_and_grad(loss_of_batch)(params, rows)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        measured = (
            loss * setting.target_std**2,
            *seen_by_the_clips(opt_state, params),
            jnp.abs(ravel_pytree(grads)[0]).max(),
        )
        return (optax.apply_updates(params, updates), opt_state), measured

    run, measured = jax.lax.scan(step, run, batches)
    errors = squared_errors(setting, run[0], data.x, data.y) * setting.target_std**2
    train_mse, test_mse = errors.reshape(2, TRAIN_ROWS).mean(axis=1)
    return run, (train_mse[None], test_mse[None], *measured)


def shuffled_batches(generators) -> np.ndarray:
    """Draws the row numbers of an epoch, `[seeds, batches, 32]`; -1 fills the last.

    NumPy shuffles: the sort is no faster in JAX, and takes a second to compile.
    """
    rows = np.full((len(generators), BATCHES * BATCH_SIZE), -1, np.int32)
    for row, generator in zip(rows, generators, strict=True):
        row[:TRAIN_ROWS] = generator.permutation(TRAIN_ROWS)
    return rows.reshape(-1, BATCHES, BATCH_SIZE)


def train(
    settings: Sequence[Setting],
    seeds: int,
    epochs: int,
    data: Data,
    on_epoch: Callable[[], object] = lambda: None,
) -> History:
    """Trains every setting from every seed, all of them side by side.

    A seed gives the same initial parameters and batches whatever the setting.
    """
    runs_settings = jax.tree.map(
        lambda *values: np.repeat(np.array(values, np.float32), seeds), *settings
    )
    runs = init_run(runs_settings, np.tile(np.arange(seeds), len(settings)))
    generators = [np.random.default_rng(seed) for seed in range(seeds)]
    epoch_histories = []
    for _ in range(epochs):
        batches = np.tile(shuffled_batches(generators), (len(settings), 1, 1))
        runs, history = train_epoch(runs_settings, runs, batches, data)
        epoch_histories.append(jax.device_get(history))  # waits for the epoch to end
        on_epoch()
    measured = jax.tree.map(
        lambda *parts: np.hstack(parts).reshape(len(settings), seeds, -1),
        *epoch_histories,
    )
    return History(*measured)
