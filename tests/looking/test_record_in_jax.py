"""A record under JAX's transformations, on meshes, and through checkpoints."""

from typing import Any

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import helpers
from helpers import oc, thorough
from recorded import (
    PARAMS,
    SIZE,
    assert_same,
    clipped_sgd,
    run,
    scanned,
    sizes,
    steps,
)

SCALES = (1.0, 3.0, 0.1, 2.0, np.nan, np.nan, np.inf, 1.0, 1.0, 4.0, 1.0)
LOSSES = np.arange(11, dtype=np.float32)


def recorded(inner=None, **options):
    inner = clipped_sgd() if inner is None else inner
    return oc.record(inner, **{"size": SIZE} | options)


# --------------------------------------------------------------------------------------
# Transformations
# --------------------------------------------------------------------------------------


def test_it_is_a_carry_of_scan_and_a_loop_records_the_same():
    tx, grads = recorded(), steps(SCALES)
    expected = run(tx, SCALES, value=LOSSES)
    update = jax.jit(chex.assert_max_traces(tx.update, n=1))
    params, state = PARAMS, tx.init(PARAMS)
    types = helpers.types(state)
    for i in range(len(SCALES)):
        one = jax.tree.map(lambda x, i=i: x[i], grads)
        updates, state = update(one, state, params, value=LOSSES[i])
        params = optax.apply_updates(params, updates)
        assert helpers.types(state) == types
    assert helpers.types(expected) == types
    ours = oc.history(state, PARAMS)
    assert_same(ours, oc.history(expected, PARAMS), rtol=1e-6)
    assert sum(ours["width"]) == len(SCALES)
    assert sum(ours["nonfinite"]) == 3
    assert list(ours["width"][ours["nonfinite"] > 0]) == [3]


@pytest.mark.thorough
def test_without_jit_it_records_the_same():
    tx, scales = recorded(optax.sgd(0.1), size=2), (2.0, np.nan, 1.0)
    grads, expected = steps(scales), run(tx, scales)
    state: Any = tx.init(PARAMS)
    for i in range(len(scales)):
        one = jax.tree.map(lambda x, i=i: x[i], grads)
        _, state = tx.update(one, state, PARAMS)
    assert_same(oc.history(state), oc.history(expected), rtol=1e-6)


def test_shapes_are_known_without_values():
    tx = recorded()
    shapes = jax.eval_shape(tx.init, PARAMS)
    assert helpers.types(shapes) == helpers.types(tx.init(PARAMS))
    _, after = jax.eval_shape(tx.update, PARAMS, shapes, PARAMS)
    assert helpers.types(after) == helpers.types(shapes)


@pytest.mark.thorough
def test_of_a_batch_of_runs_each_has_its_own_record():
    tx = recorded()
    bad = (1.0, np.nan, np.nan, 1.0, 1.0, 9.0)
    good = (2.0, 1.0, 1.0, 3.0, 1.0, 1.0)
    both = jax.tree.map(lambda *x: jnp.stack(x), steps(bad), steps(good))
    train = jax.jit(jax.vmap(lambda grads: scanned(tx, PARAMS, grads)[0][1]))
    states = train(both)
    for i, scales in enumerate((bad, good)):
        one = oc.history(jax.tree.map(lambda x, i=i: x[i], states), PARAMS)
        assert_same(one, oc.history(run(tx, scales), PARAMS), rtol=1e-6)
    with pytest.raises(ValueError, match=r"without a batch axis.*lambda x: x\[0\]"):
        oc.history(states, PARAMS)


@pytest.mark.thorough
def test_the_derivative_through_a_run_is_that_of_the_optimizer():
    def end(make, hyper, scales):
        sgd = optax.sgd(hyper[0], momentum=hyper[1])
        inner = make(optax.chain(oc.clip_by_leaf_norm(5.0), sgd))
        tx = optax.with_extra_args_support(inner)
        grads = jax.tree.map(lambda x: hyper[2] * x, steps(scales))
        losses = hyper[2] * jnp.arange(float(len(scales)))
        (params, _), _ = scanned(tx, PARAMS, grads, value=losses)
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(params))

    hyper = jnp.array([0.1, 0.9, 1.5])
    for scales in ((1.0, 0.0, 2.0, 1.0, 3.0, 1.0), (0.0, 0.0)):
        ours, expected = (
            jax.jit(jax.grad(lambda h, m=make, s=scales: end(m, h, s)))(hyper)
            for make in (recorded, lambda tx: tx)
        )
        np.testing.assert_allclose(ours, expected, rtol=1e-6)
    assert np.all(np.isfinite(ours))


def test_a_fresh_state_can_be_donated_and_no_array_is_there_twice():
    tx = recorded(oc.skip_if_nonfinite(clipped_sgd()))
    state = tx.init(PARAMS)
    places = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state) if x.size]
    assert len(set(places)) == len(places)
    update = jax.jit(tx.update, donate_argnums=1)
    for _ in range(6):
        _, state = update(PARAMS, state, PARAMS)
    assert list(oc.history(state)["step"]) == list(range(6))


@pytest.mark.parametrize(
    "dtype", [thorough("float32"), thorough("bfloat16"), "float16"]
)
def test_whatever_the_dtype_the_norms_are_right_and_the_types_stay(dtype):
    tx, params = recorded(), helpers.random_tree(dtype, seed=9)
    grads = jax.tree.map(lambda x: x.astype(dtype), steps([300.0, 1.0, 1e-3]))
    (_, state), _ = jax.jit(lambda p, g: scanned(tx, p, g))(params, grads)
    assert helpers.types(state) == helpers.types(tx.init(params))
    history = oc.history(state, params)
    np.testing.assert_allclose(history["norm"], sizes(grads), rtol=1e-6)
    np.testing.assert_allclose(history["clip/norm"], sizes(grads), rtol=1e-6)


@pytest.mark.thorough
def test_in_float64_norms_and_losses_have_all_digits(x64):
    tx, params = recorded(), helpers.random_tree("float64", seed=9)
    unit, losses = np.array([1e200, 1 / 3, 1e-200]), np.array([1e300, 1 / 3, 1e-300])
    ones = jax.tree.map(lambda x: x.astype("float64"), steps([1.0, 1.0, 1.0]))
    grads = jax.tree.map(lambda x: jax.vmap(jnp.multiply)(x, unit), ones)
    (_, state), _ = jax.jit(lambda p, g, x: scanned(tx, p, g, value=x))(
        params, grads, losses
    )
    assert helpers.types(state) == helpers.types(tx.init(params))
    history = oc.history(state, params)
    np.testing.assert_allclose(history["norm"] / unit, sizes(ones), rtol=1e-12)
    np.testing.assert_array_equal(history["loss"], losses)
    assert not history["nonfinite"].any()


def test_a_state_is_finite_where_the_run_is():
    huge = float(np.finfo(np.float32).max) / 8
    tx = recorded(oc.clip_by_leaf_norm({"dense": jnp.inf, "**": 1.0}))
    with jax.debug_infs(True):
        state: Any = tx.init(PARAMS)
        update = jax.jit(tx.update)
        for scale in (0.0, 1.0, huge, 1e-38, 1.0, 1.0, 0.0):
            grads = jax.tree.map(lambda x, s=scale: jnp.full_like(x, s), PARAMS)
            _, state = update(grads, state, PARAMS)
            chex.assert_tree_all_finite(state)
    history = oc.history(state, PARAMS)
    assert not history["nonfinite"].any()
    assert sum(history["width"]) == 7
    assert "loss" not in history


# --------------------------------------------------------------------------------------
# Meshes
# --------------------------------------------------------------------------------------

SHAPES = {"dense": {"bias": (8,), "kernel": (8, 4)}, "head": {"kernel": (4, 8)}}
SPECS = {
    "dense": {"bias": P(), "kernel": P("data", "model")},
    "head": {"kernel": P(None, "data")},
}
WIDE = helpers.random_tree(seed=9, shapes=SHAPES)
ON_MESHES = (1.0, 2.0, np.nan, np.nan, 30.0, 1.0, 1.0)


def is_spec(x):
    return isinstance(x, P)


def grid(kind=AxisType.Auto):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)


def put(mesh, tree, specs):
    return jax.device_put(
        tree, jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=is_spec)
    )


def of_each_device(state):
    """The histories that the devices hold, each its own."""
    leaves, treedef = jax.tree.flatten(state)
    shards = [sorted(x.addressable_shards, key=lambda s: s.device.id) for x in leaves]
    return [
        oc.history(treedef.unflatten([np.asarray(s.data) for s in one]), WIDE)
        for one in zip(*shards, strict=True)
    ]


def meshed_tx():
    """Nothing in its state is split over devices."""
    return recorded(optax.chain(oc.clip_by_leaf_norm(5.0), optax.scale(-0.01)))


@pytest.mark.parametrize(
    "setting",
    [
        thorough("auto"),
        thorough("explicit"),
        "shard_map",
        thorough("shard_map_without_types"),
    ],
)
def test_norms_are_of_whole_leaves_and_all_devices_hold_the_same(setting):
    tx, grads, losses = meshed_tx(), steps(ON_MESHES, SHAPES), LOSSES[:7]
    (_, expected), _ = jax.jit(lambda p, g, x: scanned(tx, p, g, value=x))(
        WIDE, grads, losses
    )
    mesh = grid(AxisType.Explicit if setting == "explicit" else AxisType.Auto)
    in_time = jax.tree.map(lambda s: P(None, *s), SPECS, is_leaf=is_spec)
    tx = oc.over_axes(tx, SPECS) if setting == "shard_map_without_types" else tx

    def train(params, grads, losses):
        return scanned(tx, params, grads, value=losses)[0][1]

    if setting.startswith("shard_map"):
        train = jax.shard_map(
            train,
            mesh=mesh,
            in_specs=(SPECS, in_time, P()),
            out_specs=P(),
            check_vma=setting == "shard_map",
        )
    with jax.set_mesh(mesh):
        placed = put(mesh, WIDE, SPECS), put(mesh, grads, in_time)
        state = jax.jit(train)(*placed, losses)
    every = of_each_device(state)
    assert len(every) == 8
    for history in every:
        assert_same(history, every[0])
    assert_same(every[0], oc.history(expected, WIDE), rtol=1e-6)


@pytest.mark.thorough
def test_with_gradients_summed_over_devices_the_record_is_of_the_sum():
    tx = meshed_tx()
    parts = steps(range(1, 9), SHAPES)

    def step(params, state, part, loss):
        mean = jax.tree.map(lambda x: jax.lax.pmean(x[0], "data"), part)
        loss = jax.lax.pmean(loss[0], "data")
        return tx.update(mean, state, params, value=loss)[1]

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(
        step, mesh=mesh, in_specs=(P(), P(), P("data"), P("data")), out_specs=P()
    )
    state = jax.jit(mapped)(WIDE, tx.init(WIDE), parts, jnp.arange(8.0))
    mean = jax.tree.map(lambda x: x.mean(0, keepdims=True), parts)
    for history in of_each_device(state):
        np.testing.assert_allclose(history["norm"], sizes(mean), rtol=1e-5)
        assert list(history["loss"]) == [3.5]


def test_a_loss_of_one_device_raises():
    tx = meshed_tx()

    def step(params, loss):
        state = tx.init(params)
        return tx.update(params, state, params, value=loss[0])[1]

    mapped = jax.shard_map(
        step,
        mesh=jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)),
        in_specs=(P(), P("data")),
        out_specs=P(),
    )
    with pytest.raises(ValueError, match=r"same on all devices.*pmean"):
        jax.jit(mapped)(WIDE, jnp.arange(8.0))


# --------------------------------------------------------------------------------------
# Checkpoints
# --------------------------------------------------------------------------------------


def by_flax(state, fresh, path):
    del path
    data = flax.serialization.to_bytes(state)
    return flax.serialization.from_bytes(fresh, data)


def by_orbax(state, fresh, path):
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "state", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path / "state", jax.eval_shape(lambda: fresh))


@pytest.mark.parametrize("through", [by_flax, thorough(by_orbax)])
def test_a_run_that_is_resumed_has_the_record_of_one_that_is_not(through, tmp_path):
    tx, grads = recorded(), steps(SCALES)
    update = jax.jit(tx.update)
    ways = [tx.init(PARAMS), tx.init(PARAMS)]
    for i in range(len(SCALES)):
        if i == 6:  # in the middle of a row of steps that are not finite
            ways[1] = through(ways[1], tx.init(PARAMS), tmp_path)
        one = jax.tree.map(lambda x, i=i: x[i], grads)
        ways = [update(one, x, PARAMS, value=LOSSES[i])[1] for x in ways]
    assert helpers.bits(ways[0]) == helpers.bits(ways[1])
    assert_same(*(oc.history(state, PARAMS) for state in ways))


def test_a_history_that_is_saved_is_read_as_it_was(tmp_path):
    history = oc.history(run(recorded(), SCALES, value=LOSSES), PARAMS)
    np.savez(tmp_path / "run.npz", **history)
    again = oc.history(tmp_path / "run.npz")
    assert_same(again, history)
