"""What a clip of examples says to wrong arguments."""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from jax.sharding import PartitionSpec as P

import table
from example_cases import (
    ROWS,
    expected_case,
    grid,
    linear_loss,
    network_case,
    network_loss,
    seen_of,
)
from helpers import oc
from optaxclip import norms


def test_wrong_arguments_raise_when_building():
    with pytest.raises(TypeError, match="loss_fn to be a function, got 3"):
        oc.per_example_clipped_grad(3, 1.0)
    with pytest.raises(TypeError, match="norm to be a function, got 'leaf'"):
        oc.per_example_clipped_grad(linear_loss, 1.0, norm="leaf")
    with pytest.raises(ValueError, match=r"max_norm >= 0, got -1.0"):
        oc.per_example_clipped_grad(linear_loss, -1.0)
    with pytest.raises(TypeError, match="max_norm to be a number, got <function"):
        oc.per_example_clipped_grad(linear_loss, optax.constant_schedule(1.0))
    with pytest.raises(ValueError, match=r"max_norm\['head'\] >= 0"):
        oc.per_example_clipped_grad(linear_loss, {"head": -1.0})
    with pytest.raises(TypeError, match="factor to be a function, got 'auto_s'"):
        oc.per_example_clipped_grad(linear_loss, 1.0, factor="auto_s")
    for size in 0, 2.5, True:
        with pytest.raises(ValueError, match="microbatch_size >= 1, an int, got"):
            oc.per_example_clipped_grad(linear_loss, 1.0, microbatch_size=size)


@pytest.mark.parametrize(
    "batch",
    [(), (jnp.ones(3), jnp.ones(2)), (jnp.ones(3), 1.0), (jnp.ones((0, 2)),)],
    ids=["none", "two sizes", "no axis", "no example"],
)
def test_a_batch_without_one_batch_axis_raises(batch):
    grad_fn = oc.per_example_clipped_grad(lambda params, *x: params, 1.0)
    with pytest.raises(ValueError, match=r"leading batch axis.*Bind to `loss_fn`"):
        grad_fn(0.0, *batch)


@pytest.mark.parametrize("where", [np.ones(3), np.ones(4, bool)], ids=["float", "4"])
def test_a_mask_that_does_not_fit_raises(where):
    grad_fn = oc.per_example_clipped_grad(lambda params, x: params * x, 1.0)
    with pytest.raises(ValueError, match="`where` to be 3 booleans, False for padding"):
        grad_fn(0.0, jnp.ones(3), where=where)


def test_a_norm_that_bounds_nothing_raises():
    for norm in (
        norms.unit_norms,
        norms.leaf_rms,
        table.ord_norm(norms.leaf_norms, 1),
        norms.excluding(norms.global_norm, "head"),
        table.twice_the_leaf_norm,
    ):
        with pytest.raises(ValueError, match="would not bound what an example contrib"):
            oc.per_example_clipped_grad(linear_loss, 1.0, norm=norm)


def inside(specs, **options):
    params, x, y = network_case(16)
    mapped = jax.shard_map(
        oc.per_example_clipped_grad(network_loss, 0.7),
        mesh=grid(),
        in_specs=(specs, P("data"), P("data")),
        out_specs=(specs, ROWS),
        **options,
    )
    return jax.eval_shape(mapped, params, x, y)


def test_params_split_over_the_axis_of_the_batch_raise():
    specs = {"dense": {"bias": P(), "kernel": P("data")}, "head": {"kernel": P()}}
    message = r"'dense/kernel' split over the mesh axes \['data'\].*`jax.lax.all_gather"
    with pytest.raises(ValueError, match=message):
        inside(specs)


def test_without_types_it_raises():
    with pytest.raises(ValueError, match=r"Use `shard_map\(..., check_vma=True\)`"):
        inside(P(), check_vma=False)


def test_params_gathered_before_are_whole():
    """The remedy in the message."""
    specs = {"dense": {"bias": P(), "kernel": P("data")}, "head": {"kernel": P()}}
    (params, x, y), expected, _ = expected_case()
    grad_fn = oc.per_example_clipped_grad(network_loss, 0.7)

    def step(params, x, y):
        piece = params["dense"]["kernel"]
        whole = jax.lax.all_gather(piece, "data", tiled=True, to="invarying")
        params = {**params, "dense": {**params["dense"], "kernel": whole}}
        return grad_fn(params, x, y)[0]

    if "to" not in inspect.signature(jax.lax.all_gather).parameters:
        return  # of JAX 0.10
    mapped = jax.shard_map(
        step, mesh=grid(), in_specs=(specs, P("data"), P("data")), out_specs=P()
    )
    grads = jax.jit(mapped)(params, x, y)
    chex.assert_trees_all_close(grads, expected, rtol=1e-5, atol=1e-6)


def shared_loss(params, x, y):
    return jax.lax.pmean(network_loss(params, x, y), "data")


@pytest.mark.parametrize(
    ("loss_fn", "rows"),
    [(shared_loss, P("data")), (network_loss, P("data", "model"))],
    ids=["mean of devices", "parts of an example"],
)
def test_a_loss_that_is_not_one_examples_own_raises(loss_fn, rows):
    """Gradients of several devices would be one before the clip."""

    def part(params, x, y):
        own = loss_fn(params, jnp.tile(x, 2)[:4], y)
        return own if loss_fn is shared_loss else jax.lax.psum(own, "model")

    mapped = jax.shard_map(
        lambda *args: oc.per_example_clipped_grad(part, 0.7)(*args)[0],
        mesh=grid(),
        in_specs=(P(), rows, P("data")),
        out_specs=P(),
    )
    params, x, y = network_case(16)
    with pytest.raises(ValueError, match="loss of one example, got one that is the sa"):
        jax.eval_shape(mapped, params, x, y)


@pytest.mark.parametrize("check_vma", [True, False])
def test_the_drop_ins_do_not_guess_inside_shard_map(check_vma):
    mapped = jax.shard_map(
        lambda g: oc.per_example_global_norm_clip(g, 1.0)[0],
        mesh=grid(),
        in_specs=P("data"),
        out_specs=P(),
        check_vma=check_vma,
    )
    with pytest.raises(ValueError, match="Use `per_example_clipped_grad`"):
        jax.eval_shape(mapped, jnp.ones((8, 3)))


def test_wrong_arguments_of_the_adaptive_threshold_raise():
    seen = seen_of([1.0, 2.0], 1.0)
    with pytest.raises(ValueError, match=r"0 <= quantile <= 1, got 1\.5"):
        oc.adapt_max_norm(1.0, seen, quantile=1.5)
    with pytest.raises(ValueError, match="learning_rate >= 0, got -1"):
        oc.adapt_max_norm(1.0, seen, learning_rate=-1)
    with pytest.raises(TypeError, match="beside the gradients, got tuple"):
        oc.adapt_max_norm(1.0, (1.0, seen))
    with pytest.raises(ValueError, match=r"key for noise=1.0, got none. Pass `key=`"):
        oc.adapt_max_norm(1.0, seen, noise=1.0)
