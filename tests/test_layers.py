"""Clips at the boundaries of layers, in both of Flax's APIs, and what they saw."""

import functools
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import optaxclip as oc

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


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(1), (BATCH, STEPS, INPUTS))


@pytest.fixture(scope="module")
def params(x):
    return Linen().init(jax.random.key(0), x)


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


def test_the_classes_come_back_after_an_error(x):
    def loss(model, x):
        model(x)
        raise RuntimeError("on purpose")

    model = Nnx(nnx.Rngs(0))
    with pytest.raises(RuntimeError, match="on purpose"):
        oc.clip_layer_cotangents(loss, {"head": 1.0})(model, x)
    assert type(model) is Nnx
    assert type(model.rnn.cell) is nnx.OptimizedLSTMCell


def test_ranges_of_the_parameters_equal_a_clip_written_by_hand(params, x):
    grads: Any = jax.grad(linen_loss)(params, x)
    clip = oc.clip_by_value({"cell": 0.05, "head": (-0.5, 2.0)})
    updates: Any = clip.update(grads, clip.init(params))[0]
    for layer, (low, high) in {"cell": (-0.05, 0.05), "head": (-0.5, 2.0)}.items():
        old, new = grads["params"][layer], updates["params"][layer]
        expected = jax.tree.map(lambda g, a=low, b=high: np.clip(g, a, b), old)
        chex.assert_trees_all_equal(new, expected)
        with pytest.raises(AssertionError):
            chex.assert_trees_all_equal(new, old)


def test_statistics_come_out_of_a_scan(params, x):
    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def grad(params, stats, x):
        limits = {
            "cell/*": functools.partial(
                oc.clip_cotangent, limit=GATES, stats=stats["gates"]
            ),
            "head": functools.partial(
                oc.clip_cotangent, limit=OUTPUT, stats=stats["head"]
            ),
        }
        return oc.clip_layer_cotangents(linen_loss, limits)(params, x)

    stats = {"gates": oc.cotangent_stats(), "head": oc.cotangent_stats()}
    grads, stats = grad(params, stats, x)
    assert_close(stacked(grads), graves(stacked(params), x, GATES, OUTPUT))
    assert stats["gates"].calls == 8 * STEPS
    assert stats["gates"].elements == 8 * STEPS * BATCH * HIDDEN
    assert 0 < stats["gates"].clipped < stats["gates"].elements
    assert stats["gates"].histogram.sum() == 8 * STEPS
    dy = 3 * np.cos(np.asarray(Linen().apply(params, x), np.float64) + 1)
    named: Any = oc.summary(stats)
    np.testing.assert_allclose(
        named["cotangent/norm/head"], np.linalg.norm(dy), rtol=1e-5
    )
    share = np.mean(np.abs(dy) > OUTPUT)
    np.testing.assert_allclose(
        named["cotangent/clipped_fraction/head"], share, rtol=1e-6
    )
    assert named["cotangent/calls/head"] == 1


@pytest.mark.parametrize(
    ("limits", "error", "message"),
    [
        (
            {"nose": 1.0},
            ValueError,
            r"'nose' names none\. The layers called are \['/', 'cell'",
        ),
        ({"*e*d": 1.0, "h*ad": 1.0}, ValueError, "equally specific"),
        ({}, ValueError, "empty mapping"),
        ({"head": -1.0}, ValueError, r"limits\['head'\] >= 0, got -1.0"),
        ({"head": "1"}, TypeError, r"limits\['head'\] to be a number or a pair"),
        (
            {"head": oc.clip_by_global_norm(1.0)},
            TypeError,
            r"For a norm write `partial\(optaxclip\.clip_cotangent_norm",
        ),
        ({"head": lambda y: 1.0}, ValueError, "the layer 'head' to return the output"),
        (
            {"head": lambda y: y[:1]},
            ValueError,
            "the layer 'head' to return the output",
        ),
        ({3: 1.0}, TypeError, "Expected path patterns"),
        (1.0, TypeError, "Expected limits to map path patterns of layers"),
    ],
)
def test_bad_limits_raise(params, x, limits, error, message):
    with pytest.raises(error, match=message):
        oc.clip_layer_cotangents(linen_loss, limits)(params, x)


def test_a_function_that_calls_no_layer_raises(x):
    with pytest.raises(ValueError, match="Expected `fun` to call Flax modules"):
        oc.clip_layer_cotangents(jnp.sum, {"head": 1.0})(x)
    bad: Any = 3
    with pytest.raises(TypeError, match="Expected fun to be a function, got 3"):
        oc.clip_layer_cotangents(bad, {"head": 1.0})


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint], ids=["jit", "remat"])
@pytest.mark.parametrize("free_first", [True, False])
def test_no_cache_of_traces_remembers_a_clip_or_its_absence(
    params, x, wrap, free_first
):
    inner = wrap(lambda params, x: linen_loss(params, x))  # one function for all
    limits = [(np.inf, np.inf), (GATES, OUTPUT), (GATES, 2 * OUTPUT)]
    for gates, output in limits if free_first else limits[::-1]:
        fun = inner
        if gates == GATES:
            fun = oc.clip_layer_cotangents(inner, {"cell/*": gates, "head": output})
        expected = graves(stacked(params), x, gates, output)
        for grad in (jax.grad(fun), jax.jit(jax.grad(fun))):
            assert_close(stacked(grad(params, x)), expected)


def test_statistics_pass_through_a_function_that_is_compiled_once(params, x):
    inner = jax.jit(linen_loss)

    @functools.partial(jax.grad, argnums=1)
    def grad(params, stats):
        head = functools.partial(oc.clip_cotangent, limit=OUTPUT, stats=stats)
        return oc.clip_layer_cotangents(inner, {"head": head})(params, x)

    for _ in range(2):
        assert grad(params, oc.cotangent_stats()).calls == 1


def test_what_an_nnx_model_leaves_behind_is_free(params, x):
    def loss(model, x):
        return nnx_loss(model, x), nnx.clone(model)

    model = nnx_copy(params)
    grad = nnx.grad(oc.clip_layer_cotangents(loss, NNX_LIMITS), has_aux=True)
    _, clone = grad(model, x)
    expected = graves(stacked(params), x, np.inf, np.inf)
    for free in (model, clone):
        assert_close(nnx_slopes(nnx.grad(nnx_loss)(free, x)), expected)


def test_the_model_as_a_whole_has_a_pattern(params, x):
    linen = jax.grad(oc.clip_layer_cotangents(linen_loss, {"/": 0.0}))(params, x)
    fun = oc.clip_layer_cotangents(nnx_loss, {"/": 0.0})
    for grads in (linen, nnx.grad(fun)(nnx_copy(params), x)):
        assert not any(leaf.any() for leaf in jax.tree.leaves(grads))


def test_an_nnx_model_may_be_the_function_itself(x):
    model = nnx.Linear(INPUTS, 1, rngs=nnx.Rngs(0))
    clipped = oc.clip_layer_cotangents(model, {"/": 0.5})
    slope = jax.grad(lambda x: 3 * jnp.sum(clipped(x)))(x)
    expected = jax.grad(lambda x: 0.5 * jnp.sum(model(x)))(x)
    np.testing.assert_allclose(slope, expected, rtol=1e-6)


class Named(nn.Module):
    """A layer that returns more than arrays."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="dense")(x), "nhwc", None, jnp.tanh


def test_what_is_not_an_array_passes_a_layer(x):
    model = Named()
    dense: Any = nn.Dense(2).init(jax.random.key(0), x)["params"]

    def loss(dense):
        output: Any = model.apply({"params": {"dense": dense}}, x)
        return 3 * jnp.sum(output[0])

    grads = jax.grad(oc.clip_layer_cotangents(loss, {"**": 0.5}))(dense)
    np.testing.assert_allclose(grads["bias"], np.full(2, 0.5 * BATCH * STEPS), 1e-6)
