"""A guard decides alike on all devices."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import helpers
from guard_cases import SHAPES, SPECS, bits, grid
from helpers import oc


def is_spec(x):
    return isinstance(x, P)


def three_steps_one_bad(path="dense/kernel"):
    """The NaN is in the first row and column: on one device only."""
    trees = [helpers.random_tree(seed=seed, shapes=SHAPES) for seed in range(3)]
    trees[1] = helpers.vary(trees[1], path, np.nan)
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


def scanned(tx, params, steps):
    def body(carry, updates):
        params, state = carry
        updates, state = tx.update(updates, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(body, (params, tx.init(params)), steps)[0]


def mesh_guards(kind):
    inner = optax.chain(oc.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9))
    return {"nonfinite": oc.skip_if_nonfinite, "spike": oc.skip_if_spike}[kind](inner)


@functools.cache
def on_one_device(kind, path="dense/kernel"):
    params = helpers.random_tree(seed=9, shapes=SHAPES)
    run = jax.jit(functools.partial(scanned, mesh_guards(kind)))
    return run(params, three_steps_one_bad(path))


def counters(state):
    return [
        int(x) for x in (state.step_count, state.skipped_count, state.consecutive_count)
    ] + [list(np.ravel(state.culprits)), int(state.last_skipped_step)]


@pytest.mark.parametrize(
    ("kind", "setting"),
    [
        ("nonfinite", "auto"),
        ("nonfinite", "explicit"),
        ("nonfinite", "shard_map"),
        ("nonfinite", "without_types"),
        ("spike", "shard_map"),
    ],
)
def test_a_nan_on_one_device_is_a_nan_on_all(kind, setting):
    tx = mesh_guards(kind)
    params = helpers.random_tree(seed=9, shapes=SHAPES)
    steps = three_steps_one_bad()
    mesh = grid(AxisType.Explicit if setting == "explicit" else AxisType.Auto)
    in_time = jax.tree.map(lambda spec: P(None, *spec), SPECS, is_leaf=is_spec)
    run = functools.partial(scanned, tx)
    if setting == "without_types":
        run = functools.partial(scanned, oc.over_axes(tx, SPECS))
    if setting in ("shard_map", "without_types"):
        run = jax.shard_map(
            lambda p, s, run=run: (lambda out: (out[0], guard_facts(out[1])))(
                run(p, s)
            ),
            mesh=mesh,
            in_specs=(SPECS, in_time),
            out_specs=(SPECS, P()),
            check_vma=setting == "shard_map",
        )

    def put(tree, specs):
        shardings = jax.tree.map(
            lambda spec: NamedSharding(mesh, spec), specs, is_leaf=is_spec
        )
        return jax.device_put(tree, shardings)

    with jax.set_mesh(mesh):
        after, state = jax.jit(run)(put(params, SPECS), put(steps, in_time))
    expected, expected_state = on_one_device(kind)
    chex.assert_trees_all_close(after, expected, rtol=1e-5)
    assert counters(state) == counters(expected_state)
    for leaf in jax.tree.leaves(after["dense"]["bias"]):
        copies = {np.asarray(s.data).tobytes() for s in leaf.addressable_shards}
        assert len(copies) == 1


def guard_facts(state):
    """What is the same on all devices: not the moments, split like the params."""
    return state._replace(guarded_state=(), rule_state=())


def in_shard_map(function, *args, specs, check_vma=True):
    mapped = jax.shard_map(
        function, mesh=grid(), in_specs=specs, out_specs=P(), check_vma=check_vma
    )
    return jax.jit(mapped)(*args)


@pytest.mark.parametrize("check_vma", [True, False])
def test_a_bad_loss_on_one_device_is_bad_on_all(check_vma):
    tx = oc.over_axes(oc.skip_if_nonfinite(optax.sgd(0.1)), P())

    def step(params, losses):
        updates, state = tx.update(params, tx.init(params), params, value=losses)
        return updates, state.skipped_count

    losses = jnp.ones(8).at[3].set(jnp.nan)
    run = functools.partial(
        in_shard_map, step, specs=(P(), P(("data", "model"))), check_vma=check_vma
    )
    updates, skipped = run(jnp.ones(2), losses)
    assert int(skipped) == 1
    assert bits(updates) == bits(jnp.array([-0.0, -0.0]))
    assert int(run(jnp.ones(2), jnp.ones(8))[1]) == 0


def test_a_watched_loss_that_differs_between_devices_raises():
    tx = oc.skip_if_spike(optax.sgd(0.1), norm=None, threshold=2.0)

    def step(params, losses, mean):
        loss = jnp.mean(losses)
        loss = jax.lax.pmean(loss, "data") if mean else loss
        return tx.update(params, tx.init(params), params, value=loss)[1].skipped_count

    run = functools.partial(in_shard_map, specs=(P(), P("data")))
    with pytest.raises(ValueError, match=r"same on all devices.*\['data'\].*pmean"):
        run(functools.partial(step, mean=False), jnp.ones(2), jnp.ones(8))
    state = run(functools.partial(step, mean=True), jnp.ones(2), 3 * jnp.ones(8))
    assert int(state) == 1


def test_gradients_that_are_not_summed_over_devices_raise():
    tx = oc.skip_if_nonfinite(optax.sgd(0.1))

    def step(params, pieces):
        return tx.update(pieces, tx.init(params), params)[1].skipped_count

    with pytest.raises(ValueError, match="summed over devices"):
        in_shard_map(step, jnp.ones(1), jnp.ones(4), specs=(P(), P("data")))
