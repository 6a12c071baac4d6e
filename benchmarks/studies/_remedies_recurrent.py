"""Plain recurrent networks and LSTMs that learn where a pen goes next."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _sequence_tasks import log_density_of_two_gaussians

import optaxclip

UNITS, BATCH_SIZE, MOVES, FRESH_PENS = 32, 8, 100, 64
LAYERS, WIDTH = 50, 100  # of the deep network whose factors are shown
MOMENTUM = 0.9


class Numbers(NamedTuple):
    """What differs within one compiled program. A limit of inf never clips."""

    rate: float = 0.01
    max_norm: float = math.inf  # of all gradients together
    max_value: float = math.inf  # of each element of the gradients
    gates: float = math.inf  # of what comes back to a gate, per sequence
    outputs: float = math.inf  # of what comes back from the loss, per sequence
    truncation: float = math.inf  # steps after which the way back through time ends


def plain_cell(weights, carry, x, clip):
    """One step of a plain network, `h = tanh(..)`."""
    h, c = carry
    h = jnp.tanh(clip(jnp.concatenate([x, h], -1) @ weights["w"] + weights["b"]))
    return h, c


def lstm_cell(weights, carry, x, clip):
    """One step of an LSTM, whose gate to forget begins open."""
    h, c = carry
    gates = clip(jnp.concatenate([x, h], -1) @ weights["w"] + weights["b"])
    i, f, g, o = jnp.split(gates, 4, axis=-1)
    c = jax.nn.sigmoid(f + 1) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


Cell = Callable[[Any, Any, Any, Callable[[Any], Any]], Any]
GATES: dict[Cell, int] = {plain_cell: 1, lstm_cell: 4}


def init_cell(cell: Cell, key: jax.Array, gain: Any = 1.0) -> dict[str, jax.Array]:
    """Draws inputs by Glorot's range, and orthogonal recurrent weights x gain."""
    keys, size = jax.random.split(key), GATES[cell] * UNITS
    inputs = jax.nn.initializers.glorot_uniform()(keys[0], (2, size))
    states = gain * jax.nn.initializers.orthogonal()(keys[1], (UNITS, size))
    return {"w": jnp.concatenate([inputs, states]), "b": jnp.zeros(size)}


def init(cell: Cell, key: jax.Array) -> dict[str, dict[str, jax.Array]]:
    keys = jax.random.split(key)
    head = jax.nn.initializers.lecun_normal()(keys[1], (UNITS, 10))
    return {"cell": init_cell(cell, keys[0]), "head": {"w": head, "b": jnp.zeros(10)}}


def draw_pens(generator: np.random.Generator, *shape: int) -> np.ndarray:
    """Draws moves `[*shape, MOVES + 1, 2]` of pens on circles that jump sideways."""
    w1, w2 = generator.uniform(0.15, 0.45, (2, *shape, 1))
    a, b = generator.uniform(0, 2 * np.pi, (2, *shape, 1))
    t = np.arange(MOVES + 2)
    x = np.sin(w1 * t + a) + 0.5 * np.sign(np.sin(w2 * t + b))
    pens = np.stack([x, np.cos(w1 * t + a)], axis=-1)
    return np.asarray(generator.normal(np.diff(pens, axis=-2), 0.01), np.float32)


def nats(cell: Cell, numbers: Numbers, params, moves):
    """Returns the loss of pens `[batch, MOVES + 1, 2]`: the sum over the moves."""
    by_batch = 1 / moves.shape[0]  # the mean divides what comes back

    def gates_clip(x):
        return optaxclip.clip_cotangent(x, numbers.gates * by_batch)

    def step(carry, now):
        count, x = now
        ends = count % jnp.minimum(numbers.truncation, 1e6) == 0
        held = jax.lax.stop_gradient(carry)
        carry = jax.tree.map(lambda a, b: jnp.where(ends, a, b), held, carry)
        carry = cell(params["cell"], carry, x, gates_clip)
        return carry, carry[0]

    start = (jnp.zeros((moves.shape[0], UNITS)),) * 2
    now = jnp.arange(MOVES), moves[:, :-1].swapaxes(0, 1)
    h = jax.lax.scan(step, start, now)[1].swapaxes(0, 1)
    outputs = h @ params["head"]["w"] + params["head"]["b"]
    outputs = optaxclip.clip_cotangent(outputs, numbers.outputs * by_batch)
    return -log_density_of_two_gaussians(outputs, moves[:, 1:]).sum(axis=1).mean()


@partial(jax.jit, static_argnums=0)
@partial(jax.vmap, in_axes=(None, 0, None, None, None))  # settings
@partial(jax.vmap, in_axes=(None, None, 0, 0, None))  # seeds
def train(cell: Cell, numbers: Numbers, seed, pens, fresh):
    """Makes one step per batch of pens; returns losses and norms, and the last loss."""
    optimizer = optax.chain(
        optaxclip.clip_by_global_norm(numbers.max_norm),
        optaxclip.clip_by_value(numbers.max_value),
        optax.sgd(numbers.rate, MOMENTUM),
    )

    def step(carry, moves):
        params, opt_state = carry
        grad_fn = jax.value_and_grad(partial(nats, cell, numbers))
        loss, grads = grad_fn(params, moves)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        norm = optaxclip.global_norm(grads)
        return (optax.apply_updates(params, updates), opt_state), (loss / MOVES, norm)

    params = init(cell, jax.random.key(seed))
    start = params, optimizer.init(params)
    (params, _), (losses, norms) = jax.lax.scan(step, start, pens)
    return losses, norms, nats(cell, numbers, params, fresh) / MOVES


def train_all(cell: Cell, settings: list[Numbers], seeds: int, steps: int):
    """Trains all settings of a cell together: `[settings, seeds, ..]`."""
    pens = [
        draw_pens(np.random.default_rng(i), steps, BATCH_SIZE) for i in range(seeds)
    ]
    fresh = draw_pens(np.random.default_rng(seeds), FRESH_PENS)
    numbers = jax.tree.map(lambda *values: np.array(values, np.float32), *settings)
    found = train(cell, numbers, np.arange(seeds), np.stack(pens), fresh)
    return jax.device_get(found)


@partial(jax.jit, static_argnums=0)
@partial(jax.vmap, in_axes=(None, 0, None))  # gains
@partial(jax.vmap, in_axes=(None, None, 0))  # seeds
def back_through_time(cell: Cell, gain, seed):
    """Returns norms of the derivative of the last state by all before, `[MOVES]`."""
    keys = jax.random.split(jax.random.key(seed), 3)
    weights = init_cell(cell, keys[0], gain)
    x = 0.5 * jax.random.normal(keys[1], (MOVES, 2))
    direction = jax.random.normal(keys[2], (UNITS,))

    def last(taps):
        def step(carry, now):
            x, tap = now
            h, c = carry
            return cell(weights, (h + tap, c), x, lambda z: z), None

        start = (jnp.zeros(UNITS),) * 2
        return jax.lax.scan(step, start, (x, taps))[0][0] @ direction

    return jnp.linalg.norm(jax.grad(last)(jnp.zeros((MOVES, UNITS))), axis=-1)


@jax.jit
@partial(jax.vmap, in_axes=(0, None))  # gains
@partial(jax.vmap, in_axes=(None, 0))  # seeds
def back_through_layers(gain, seed):
    """Returns norms of the derivative of the last layer by all before, `[LAYERS]`."""
    keys = jax.random.split(jax.random.key(seed), 3)
    shape = LAYERS, WIDTH, WIDTH
    kernels = gain * math.sqrt(2 / WIDTH) * jax.random.normal(keys[0], shape)
    x, direction = jax.random.normal(keys[1], (2, WIDTH))

    def last(taps):
        def layer(x, now):
            kernel, tap = now
            return jax.nn.relu(kernel @ x) + tap, None

        return jax.lax.scan(layer, x, (kernels, taps))[0] @ direction

    return jnp.linalg.norm(jax.grad(last)(jnp.zeros((LAYERS, WIDTH))), axis=-1)
