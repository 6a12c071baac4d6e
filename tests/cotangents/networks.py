"""Small recurrent models of linen and nnx, and Graves' gradients by hand."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

STEPS, BATCH, INPUTS, HIDDEN = 9, 3, 4, 5
GATES, OUTPUT = 0.02, 0.5  # limits low enough to clip in this small network


class Linen(nn.Module):
    """An LSTM of eight dense layers, and a head."""

    wrap: Any = staticmethod(lambda cell: cell)  # the class of the cell

    @nn.compact
    def __call__(self, x):
        cell = self.wrap(nn.LSTMCell)(HIDDEN, name="cell")
        return nn.Dense(2, name="head")(nn.RNN(cell, name="rnn")(x))


class Nnx(nnx.Module):
    """An LSTM of two linear layers, and a head."""

    def __init__(self, rngs):
        cell = nnx.OptimizedLSTMCell(INPUTS, HIDDEN, rngs=rngs)
        self.rnn = nnx.RNN(cell)
        self.head = nnx.Linear(HIDDEN, 2, rngs=rngs)

    def __call__(self, x):
        start = jnp.zeros((len(x), HIDDEN))
        states: Any = self.rnn(x, initial_carry=(start, start))
        return self.head(states)


def loss_of(output):
    return 3 * jnp.sum(jnp.sin(output + 1))


def linen_loss(params, x, model=None):
    return loss_of((model or Linen()).apply(params, x))


def nnx_loss(model, x):
    return loss_of(model(x))


def stacked(params):
    """Returns kernels from inputs and states, bias, head kernel and bias in float64."""
    cell, head = params["params"]["cell"], params["params"]["head"]
    of = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), cell)
    return (
        np.concatenate([of[f"i{g}"]["kernel"] for g in "ifgo"], axis=1),
        np.concatenate([of[f"h{g}"]["kernel"] for g in "ifgo"], axis=1),
        np.concatenate([of[f"h{g}"]["bias"] for g in "ifgo"]),
        np.asarray(head["kernel"], np.float64),
        np.asarray(head["bias"], np.float64),
    )


def graves(weights, x, gates, output):
    """Returns the gradients by Graves' rule, written out in NumPy.

    The derivative by the network's outputs is clipped to ``output``, that by the
    pre-activations of the gates to ``gates``, before each is used for anything else.
    """
    of_x, of_h, bias, head, head_bias = weights
    x = np.asarray(x, np.float64)
    h = c = np.zeros((BATCH, HIDDEN))
    tape = []
    for t in range(STEPS):
        i, f, g, o = np.split(x[:, t] @ of_x + h @ of_h + bias, 4, axis=1)
        i, f, o = (1 / (1 + np.exp(-z)) for z in (i, f, o))
        g, c_old, h_old = np.tanh(g), c, h
        c = f * c + i * g
        h = o * np.tanh(c)
        tape.append((i, f, g, o, c_old, c, h_old, h))
    slopes = [np.zeros_like(weight) for weight in weights]
    dh, dc = np.zeros_like(h), np.zeros_like(c)
    for t, (i, f, g, o, c_old, c, h_old, h) in reversed(list(enumerate(tape))):
        dy = 3 * np.cos(h @ head + head_bias + 1)
        dy = np.clip(dy, -output, output)
        slopes[3] += h.T @ dy
        slopes[4] += dy.sum(0)
        dh = dh + dy @ head.T
        dc = dc + dh * o * (1 - np.tanh(c) ** 2)
        d_o = dh * np.tanh(c) * o * (1 - o)
        d_i, d_f, d_g = (
            dc * g * i * (1 - i),
            dc * c_old * f * (1 - f),
            dc * i * (1 - g**2),
        )
        dz = np.clip(np.concatenate([d_i, d_f, d_g, d_o], axis=1), -gates, gates)
        slopes[0] += x[:, t].T @ dz
        slopes[1] += h_old.T @ dz
        slopes[2] += dz.sum(0)
        dh, dc = dz @ of_h.T, dc * f
    return slopes


def assert_close(got, expected, rtol=2e-5):
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max())


def nnx_copy(params):
    """Returns the nnx model with the weights of the linen one."""
    model = Nnx(nnx.Rngs(0))
    of_x, of_h, bias, head, head_bias = map(jnp.float32, stacked(params))
    cell: Any = model.rnn.cell
    cell.dense_i.kernel[...], cell.dense_h.kernel[...] = of_x, of_h
    cell.dense_h.bias[...] = bias
    layer: Any = model.head
    layer.kernel[...], layer.bias[...] = head, head_bias
    return model


def nnx_slopes(grads):
    cell = grads["rnn"]["cell"]
    leaves = (
        cell["dense_i"]["kernel"],
        cell["dense_h"]["kernel"],
        cell["dense_h"]["bias"],
        grads["head"]["kernel"],
        grads["head"]["bias"],
    )
    return [np.asarray(leaf[...]) for leaf in leaves]


NNX_LIMITS = {"cell/dense_*": GATES, "head": OUTPUT}
