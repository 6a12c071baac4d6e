"""Clips at the boundaries of Flax layers: the gradients of Graves."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from helpers import oc
from networks import (
    GATES,
    INPUTS,
    NNX_LIMITS,
    OUTPUT,
    Linen,
    assert_close,
    graves,
    linen_loss,
    nnx_copy,
    nnx_loss,
    nnx_slopes,
    stacked,
)


@pytest.mark.parametrize(
    ("gates", "output"),
    [(np.inf, np.inf), (GATES, np.inf), (np.inf, OUTPUT), (GATES, OUTPUT)],
)
def test_linen_layers_give_the_gradients_of_graves(params, x, gates, output):
    # Fails if a clip sits behind the activation, or if the limits are exchanged.
    fun = oc.clip_layer_cotangents(linen_loss, {"cell/*": gates, "head": output})
    grads = jax.jit(jax.grad(fun))(params, x)
    assert_close(stacked(grads), graves(stacked(params), x, gates, output))


def test_the_reference_tells_places_and_limits_apart(params, x):
    weights = stacked(params)
    right = graves(weights, x, GATES, OUTPUT)
    for other in (
        graves(weights, x, OUTPUT, GATES),
        graves(weights, x, GATES, np.inf),
        graves(weights, x, np.inf, OUTPUT),
        stacked(jax.grad(_clipped_after_the_activation)(params, x)),
    ):
        with pytest.raises(AssertionError):
            assert_close(other, right, rtol=1e-2)


def _clipped_after_the_activation(params, x):
    def late(activation):
        return lambda z: oc.clip_cotangent(activation(z), GATES)

    def cell(*args, **kwargs):
        gate, activation = late(nn.sigmoid), late(nn.tanh)
        return nn.LSTMCell(*args, gate_fn=gate, activation_fn=activation, **kwargs)

    fun = oc.clip_layer_cotangents(linen_loss, {"head": OUTPUT})
    return fun(params, x, Linen(lambda _: cell))


@pytest.mark.parametrize("compiled", [False, True])
def test_nnx_layers_give_the_gradients_of_graves(params, x, compiled):
    model = nnx_copy(params)
    grad = nnx.grad(oc.clip_layer_cotangents(nnx_loss, NNX_LIMITS))
    grads = (nnx.jit(grad) if compiled else grad)(model, x)
    assert_close(nnx_slopes(grads), graves(stacked(params), x, GATES, OUTPUT))
    assert type(model.head) is nnx.Linear  # the classes are back


def test_a_split_nnx_model_under_plain_grad(params, x):
    graphdef, weights, rest = nnx.split(nnx_copy(params), nnx.Param, ...)
    fun = oc.clip_layer_cotangents(nnx_loss, NNX_LIMITS)

    @jax.jit
    @jax.grad
    def grad(weights, rest):
        return fun(nnx.merge(graphdef, weights, rest), x)

    expected = graves(stacked(params), x, GATES, OUTPUT)
    assert_close(nnx_slopes(grad(weights, rest)), expected)


class Rematerialised(nnx.Module):
    """Layers that are scanned over, stored as one, and rematerialised.

    In float64: their gradients are sums whose terms nearly cancel.
    """

    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def layers(rngs):
            return nnx.Linear(INPUTS, INPUTS, param_dtype=jnp.float64, rngs=rngs)

        self.layers = layers(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def forward(x, layer):
            return jnp.tanh(layer(x))

        return forward(x, self.layers)


def test_nnx_layers_within_scan_and_remat(x, x64):
    x = x.astype(jnp.float64)
    model = Rematerialised(nnx.Rngs(0))
    fun = oc.clip_layer_cotangents(lambda model, x: jnp.sum(model(x)), {"layers": 0.1})
    grads = nnx.jit(nnx.grad(fun))(model, x)

    def by_hand(kernels, x):
        for kernel in kernels:
            x = jnp.tanh(oc.clip_cotangent(x @ kernel, 0.1))
        return jnp.sum(x)

    expected = jax.grad(by_hand)(model.layers.kernel[...], x)
    found = grads["layers"]["kernel"][...]
    assert found.dtype == expected.dtype == jnp.float64
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    free = jax.grad(lambda k, x: jnp.sum(functools.reduce(_layer, k, x)))
    assert np.abs(free(model.layers.kernel[...], x) - expected).max() > 0.1


def _layer(x, kernel):
    return jnp.tanh(x @ kernel)


@pytest.mark.parametrize(
    "wrap",
    [
        nn.remat,
        nn.jit,
        functools.partial(nn.map_variables, mapped_collections="params"),
    ],
    ids=["remat", "jit", "map_variables"],
)
def test_linen_layers_within_lifted_transformations(params, x, wrap):
    model = Linen(lambda cell: wrap(cell) if cell is nn.LSTMCell else cell)
    limits = {"cell/*": GATES, "head": OUTPUT}
    fun = oc.clip_layer_cotangents(functools.partial(linen_loss, model=model), limits)
    grads = jax.jit(jax.grad(fun))(params, x)
    assert_close(stacked(grads), graves(stacked(params), x, GATES, OUTPUT))


def test_a_layer_may_have_a_norm_or_any_function(params, x):
    limits = {"head": functools.partial(oc.clip_cotangent_norm, max_norm=0.1, axis=-1)}
    grads = jax.grad(oc.clip_layer_cotangents(linen_loss, limits))(params, x)
    output = Linen().apply(params, x)
    dy = 3 * np.cos(np.asarray(output, np.float64) + 1)
    dy *= np.minimum(1, 0.1 / np.linalg.norm(dy, axis=-1, keepdims=True))
    np.testing.assert_allclose(
        grads["params"]["head"]["bias"], dy.sum((0, 1)), rtol=1e-4, atol=1e-5
    )


def test_a_cell_is_clipped_with_its_carries(params, x):
    grads = jax.grad(oc.clip_layer_cotangents(linen_loss, {"cell": 0.0}))(params, x)
    assert not any(leaf.any() for leaf in jax.tree.leaves(grads["params"]["cell"]))
    assert grads["params"]["head"]["kernel"].any()


def test_clips_of_layers_can_be_nested(params, x):
    model = nnx_copy(params)
    inner = oc.clip_layer_cotangents(nnx_loss, {"head": OUTPUT})
    outer = oc.clip_layer_cotangents(inner, {"cell/dense_*": GATES})
    grads = nnx.grad(outer)(model, x)
    assert_close(nnx_slopes(grads), graves(stacked(params), x, GATES, OUTPUT))


def test_limits_may_be_traced_and_mapped_over(params, x):
    def grad(gates):
        fun = oc.clip_layer_cotangents(linen_loss, {"cell/*": gates, "head": OUTPUT})
        return jax.grad(fun)(params, x)

    grads = jax.jit(jax.vmap(grad))(jnp.array([GATES, jnp.inf]))
    for i, gates in enumerate((GATES, np.inf)):
        one = stacked(jax.tree.map(lambda leaf, i=i: leaf[i], grads))
        assert_close(one, graves(stacked(params), x, gates, OUTPUT))
