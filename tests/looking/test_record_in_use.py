"""A record is one in `jit`, `vmap`, on meshes, in Optax, Flax and from checkpoints."""

from typing import Any

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jax.tree_util import tree_leaves_with_path

import helpers
from helpers import oc
from optaxclip import RecordState
from optaxclip._looking import record as _record
from record_cases import PARAMS, PATHS, gradients, optimizer, rows, run


def test_the_state_has_the_same_types_after_a_step_and_no_array_twice():
    tx = oc.record(oc.skip_if_nonfinite(optimizer()), size=2)
    state = tx.init(PARAMS)
    _, after = jax.jit(tx.update, donate_argnums=1)(PARAMS, tx.init(PARAMS), PARAMS)
    assert jax.tree.structure(state) == jax.tree.structure(after)
    assert helpers.types(state) == helpers.types(after)


@pytest.mark.parametrize("compiled", [helpers.thorough(False), True])
def test_on_finite_steps_neither_an_infinity_nor_a_nan_is_made_on_the_way(compiled):
    tx = oc.record(oc.skip_if_nonfinite(optimizer()), size=2)
    with jax.debug_infs(True), jax.debug_nans(True):
        state = tx.init(PARAMS)
        update = jax.jit(tx.update) if compiled else tx.update
        for _ in range(6):
            _, state = update(PARAMS, state, PARAMS)
    chex.assert_tree_all_finite(state)


def test_strict_promotion_of_dtypes_is_obeyed():
    with jax.numpy_dtype_promotion("strict"):
        tx = oc.record(oc.clip_by_leaf_norm(1.0), size=2)
        _, state = jax.jit(tx.update)(PARAMS, tx.init(PARAMS), PARAMS, value=1)
    assert list(rows(state)["loss"]) == [1]


def test_of_a_batch_each_run_has_its_record_of_which_one_is_taken():
    tx = oc.record(optimizer(), size=4)
    runs = [gradients(11, bad=bad) for bad in ([], [3, 4], [10])]
    batch = jax.tree.map(
        lambda *x: jnp.stack(x),
        *(jax.tree.map(lambda *x: jnp.stack(x), *grads) for grads in runs),
    )
    losses = jnp.arange(11.0)

    def one(grads):
        def body(state, xs):
            return tx.update(xs[0], state, PARAMS, value=xs[1])[1], None

        return jax.lax.scan(body, tx.init(PARAMS), (grads, losses))[0]

    states = jax.jit(jax.vmap(one))(batch)
    with pytest.raises(ValueError, match=r"without a batch axis, got \(3,\).*x\[0\]"):
        rows(states)
    for i, grads in enumerate(runs):
        own, alone = rows(jax.tree.map(lambda x, i=i: x[i], states)), run(tx, grads)[0]
        for key, values in rows(alone).items():
            np.testing.assert_allclose(own[key], values, rtol=1e-6, err_msg=key)


def test_a_run_that_is_resumed_has_the_record_of_one_that_was_not(tmp_path):
    tx, grads = oc.record(oc.skip_if_nonfinite(optimizer()), size=4), gradients(23, [7])
    losses = np.arange(23.0)
    whole, _ = run(tx, grads, losses)
    half, _ = run(tx, grads[:10], losses[:10])
    by_flax = flax.serialization.from_bytes(
        tx.init(PARAMS), flax.serialization.to_bytes(half)
    )
    checkpointer = orbax.checkpoint.StandardCheckpointer()
    checkpointer.save(tmp_path / "state", half)
    checkpointer.wait_until_finished()
    by_orbax = checkpointer.restore(tmp_path / "state", half)
    for resumed in by_flax, by_orbax:
        again, _ = run(tx, grads[10:], losses[10:], jax.tree.map(jnp.asarray, resumed))
        chex.assert_trees_all_equal(again, whole)


def test_in_optax_and_flax():
    labels: helpers.Tree = {"dense": "a", "head": "b"}
    parts: dict[Any, Any] = {"a": oc.record(optimizer(), size=2), "b": optax.sgd(0.1)}
    injected = optax.inject_hyperparams(
        lambda learning_rate: oc.record(optax.sgd(learning_rate), size=2)
    )
    outer = {
        "partition": optax.partition(parts, labels),
        "masked": optax.masked(parts["a"], {"dense": True, "head": False}),
        "inject": injected(learning_rate=0.1),
    }
    for tx in outer.values():
        state = tx.init(PARAMS)
        mapped = optax.tree.map_params(tx, lambda x: x + 1, state)
        assert jax.tree.structure(mapped) == jax.tree.structure(state)
        _, state = tx.update(PARAMS, state, PARAMS)
        (own,) = found_in(state)
        found = _record.rows(own, PATHS)
        assert found["norm/dense/kernel"] == 2 and found["norm/dense/bias"] > 1.4


def found_in(state):
    leaves = tree_leaves_with_path(state, is_leaf=lambda x: isinstance(x, RecordState))
    return [x for _, x in leaves if isinstance(x, RecordState)]


def test_in_an_nnx_optimizer():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    tx = oc.record(optimizer(), size=2)
    trained = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    trained.update(model, grads)
    found = _record.rows(trained.opt_state, ("bias", "kernel"))
    np.testing.assert_allclose(found["norm/kernel"], 6**0.5, rtol=1e-6)
    np.testing.assert_allclose(found["clip/factor/kernel"], 2 / 6**0.5, rtol=1e-6)


def test_float64_leaves_have_a_float64_record(x64):
    params = {"w": jnp.array([1e-200, 1e200])}
    tx = oc.record(oc.clip_by_global_norm(1.0), size=2)
    _, state = tx.update(params, tx.init(params), params, value=jnp.float64(1e300))
    assert state.memory.dtype == jnp.float64
    found = _record.rows(state, ("w",))
    np.testing.assert_allclose([found["norm"], found["loss"]], [[1e200], [1e300]])


# --------------------------------------------------------------------------------------
# Meshes
# --------------------------------------------------------------------------------------

SHAPES = {"dense": {"bias": (8,), "kernel": (8, 4)}, "head": {"kernel": (4, 8)}}
SPECS = {
    "dense": {"bias": P(), "kernel": P("data", "model")},
    "head": {"kernel": P(None, "model")},
}


def stacked_steps():
    """Six steps; the NaN of the fourth is on one device only."""
    trees = [helpers.random_tree(seed=seed, shapes=SHAPES) for seed in range(6)]
    trees[3] = helpers.vary(trees[3], "dense/kernel", np.nan)
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


def recorded(tx, params, steps):
    def body(state, updates):
        loss = jnp.float32(2)
        return tx.update(updates, state, params, value=loss)[1], None

    state = jax.lax.scan(body, tx.init(params), steps)[0]
    return state._replace(recorded_state=state.recorded_state[0])


@pytest.mark.parametrize("setting", ["auto", "explicit", "shard_map", "without_types"])
def test_on_a_mesh_the_record_is_that_of_one_device(setting):
    tx = oc.record(optimizer(), size=2)
    params, steps = helpers.random_tree(seed=9, shapes=SHAPES), stacked_steps()
    expected = jax.jit(lambda *x: recorded(tx, *x))(params, steps)
    kind = AxisType.Explicit if setting == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
    in_time = jax.tree.map(lambda spec: P(None, *spec), SPECS)
    if setting == "without_types":
        tx = oc.over_axes(tx, SPECS)

    def step(*args):
        return recorded(tx, *args)

    if setting in ("shard_map", "without_types"):
        step = jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(SPECS, in_time),
            out_specs=P(),
            check_vma=setting == "shard_map",
        )

    def put(tree, specs):
        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
        return jax.device_put(tree, shardings)

    with jax.set_mesh(mesh):
        state = jax.jit(step)(put(params, SPECS), put(steps, in_time))
    paths = tuple(helpers.paths_of(params))
    found, right = (_record.rows(x, paths) for x in (state, expected))
    assert list(found) == list(right)
    for key, values in right.items():
        np.testing.assert_allclose(found[key], values, rtol=1e-5, err_msg=key)
    copies = {np.asarray(s.data).tobytes() for s in state.memory.addressable_shards}
    assert len(copies) == 1


def test_in_pmap_each_device_has_the_record_of_all():
    tx = oc.over_axes(oc.record(optimizer(), size=2), P())
    params = helpers.random_tree(seed=9, shapes=SHAPES)

    def step(params, loss):
        loss = jax.lax.pmean(loss, "i")
        return tx.update(params, tx.init(params), params, value=loss)[1]

    many = jax.tree.map(lambda x: jnp.stack([x] * 8), params)
    states = jax.pmap(step, axis_name="i")(many, jnp.arange(8.0))
    with pytest.raises(ValueError, match="without a batch axis"):
        _record.rows(states)
    found = _record.rows(jax.tree.map(lambda x: x[3], states))
    assert list(found["loss"]) == [3.5] and not np.any(found["nonfinite"])


def test_a_loss_that_differs_between_devices_raises():
    tx = oc.record(optax.sgd(0.1), size=2)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def step(params, losses):
        loss = jnp.mean(losses)
        return tx.update(params, tx.init(params), params, value=loss)[1]

    mapped = jax.shard_map(step, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    with pytest.raises(ValueError, match=r"same on all devices.*\['data'\].*pmean"):
        jax.jit(mapped)(jnp.ones(2), jnp.ones(8))
