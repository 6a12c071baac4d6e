"""Gradients of examples, compiled, in microbatches, and over devices."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import helpers
from example_cases import (
    ROWS,
    examples,
    expected_case,
    grid,
    linear_loss,
    network_case,
    network_loss,
    row,
    zeros,
)
from helpers import oc
from optaxclip import norms

# --------------------------------------------------------------------------------------
# Compiled
# --------------------------------------------------------------------------------------


def test_microbatches_bound_the_memory():
    def loss_fn(params, x):
        return jnp.sum(jnp.tanh(x @ params) ** 2)

    params, x = jnp.ones((64, 256)), jnp.ones((64, 64))

    def temporary(size):
        grad_fn = oc.per_example_clipped_grad(loss_fn, 1.0, microbatch_size=size)
        memory: Any = jax.jit(grad_fn).lower(params, x).compile().memory_analysis()
        return memory.temp_size_in_bytes

    assert temporary(4) < temporary(None) / 8


def test_thresholds_may_be_traced_and_swept():
    x = examples()

    def total(max_norm):
        return oc.per_example_clipped_grad(linear_loss, max_norm)(zeros(), x)[0]

    swept = jax.jit(jax.vmap(total))(jnp.array([0.5, 2.0]))
    helpers.assert_close(row(swept, 1), total(2.0), rtol=1e-5)


def test_it_is_traced_once_and_goes_through_scan():
    chex.clear_trace_counter()
    grad_fn = oc.per_example_clipped_grad(linear_loss, 1.0)
    optimizer = optax.sgd(0.1, momentum=0.9)
    x = examples()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def train(params):
        def step(carry, _):
            params, state = carry
            grads, seen = grad_fn(params, x)
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(params, updates), state), seen.clipped_count

        return jax.lax.scan(step, (params, optimizer.init(params)), None, length=3)

    _, counts = train(zeros())
    train(zeros())
    assert counts.shape == (3,)


# --------------------------------------------------------------------------------------
# Meshes
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("microbatch_size", [None, 8, 3])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_a_batch_over_devices_under_jit(kind, microbatch_size):
    if kind == AxisType.Explicit and microbatch_size == 3:
        microbatch_size = 16  # explicit axes take no parts that devices can't share
    (params, x, y), expected, seen = expected_case()
    mesh = grid(kind)
    rows = NamedSharding(mesh, P("data"))
    grad_fn = oc.per_example_clipped_grad(
        network_loss, 0.7, microbatch_size=microbatch_size
    )
    with jax.set_mesh(mesh):
        params = jax.device_put(params, NamedSharding(mesh, P()))
        x, y = jax.device_put((x, y), rows)
        grads, found = jax.jit(grad_fn)(params, x, y)
    chex.assert_trees_all_close(grads, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.norms, seen.norms, rtol=1e-5)
    assert found.clipped_count == seen.clipped_count


@pytest.mark.parametrize("microbatch_size", [None, 3])
def test_a_batch_over_devices_inside_shard_map(microbatch_size):
    (params, x, y), expected, seen = expected_case()
    mapped = jax.shard_map(
        oc.per_example_clipped_grad(network_loss, 0.7, microbatch_size=microbatch_size),
        mesh=grid(),
        in_specs=(P(), P("data"), P("data")),
        out_specs=(P(), ROWS),
    )
    grads, found = jax.jit(mapped)(params, x, y)
    chex.assert_trees_all_close(grads, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.norms, seen.norms, rtol=1e-5)
    assert found.clipped_count == seen.clipped_count
    assert found.example_count == 32


def test_autodiff_alone_would_add_up_devices_before_the_clip():
    """What the function takes care of: the naive clip inside `shard_map` is another."""
    (params, x, y), expected, _ = expected_case()
    clip = oc.clip_by_global_norm(0.7)

    def naive(params, x, y):
        each = jax.vmap(jax.grad(network_loss), in_axes=(None, 0, 0))(params, x, y)
        clipped = jax.vmap(lambda g: clip.update(g, None)[0])(each)
        return jax.tree.map(lambda g: jnp.sum(g, axis=0) / 8, clipped)

    mapped = jax.shard_map(
        naive, mesh=grid(), in_specs=(P(), P("data"), P("data")), out_specs=P()
    )
    assert not helpers.is_close(jax.jit(mapped)(params, x, y), expected, 0.1)


def test_parameters_that_are_split_are_measured_whole():
    """Tensor parallel: each device has half of the hidden units."""

    def loss_fn(params, x, y):
        hidden = jnp.tanh(x @ params["in"] + params["bias"])
        output = jax.lax.psum(hidden @ params["out"], "model")
        return jnp.mean((output - y) ** 2)

    def whole_loss(params, x, y):
        hidden = jnp.tanh(x @ params["in"] + params["bias"])
        return jnp.mean((hidden @ params["out"] - y) ** 2)

    shapes = {"bias": (6,), "in": (4, 6), "out": (6, 2)}
    specs = {"bias": P("model"), "in": P(None, "model"), "out": P("model")}
    params = helpers.random_tree(seed=1, shapes=shapes)
    _, x, y = network_case(16)
    for norm in norms.global_norm, norms.leaf_norms:
        grad_fn = functools.partial(
            oc.per_example_clipped_grad, max_norm=0.7, norm=norm
        )
        expected, seen = grad_fn(whole_loss)(params, x, y)
        mapped = jax.shard_map(
            grad_fn(loss_fn),
            mesh=grid(),
            in_specs=(specs, P("data"), P("data")),
            out_specs=(specs, ROWS),
        )
        grads, found = jax.jit(mapped)(params, x, y)
        chex.assert_trees_all_close(grads, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.norms, seen.norms, rtol=1e-5)
