"""Clips of layers that are nested, traced, watched, wrong; what they leave behind."""

import functools
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import helpers
from helpers import oc
from networks import (
    BATCH,
    GATES,
    HIDDEN,
    INPUTS,
    NNX_LIMITS,
    OUTPUT,
    STEPS,
    Linen,
    Nnx,
    assert_close,
    graves,
    linen_loss,
    nnx_copy,
    nnx_loss,
    nnx_slopes,
    stacked,
)


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


@pytest.mark.parametrize(
    ("wrap", "free_first"), helpers.in_turn([jax.jit, jax.checkpoint], [True, False])
)
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
