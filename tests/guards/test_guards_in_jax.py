"""Guards under JAX's transformations and in what is built on it."""

from typing import Any

import chex
import flax.core
import flax.serialization
import flax.training.train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest

import helpers
from guard_cases import GUARDS, PATHS, bits, every_guard, stepper
from helpers import oc
from optaxclip import summary

every_kind = pytest.mark.parametrize("kind", GUARDS)


@every_kind
def test_a_scan_traces_once_and_carries_the_state(kind):
    tx, params = GUARDS[kind](), helpers.random_tree()
    update: Any = chex.assert_max_traces(tx.update, n=1)
    steps = jnp.array([1.0, jnp.nan, 2.0, jnp.inf])

    def body(state, scale):
        _, state = update(jax.tree.map(lambda x: x * scale, params), state, params)
        return state, None

    state, _ = jax.jit(lambda s: jax.lax.scan(body, s, steps))(tx.init(params))
    assert helpers.types(state) == helpers.types(tx.init(params))
    assert int(state.step_count) == 4


@every_kind
def test_a_loop_traces_once(kind):
    tx, params = GUARDS[kind](), helpers.random_tree()
    update = jax.jit(chex.assert_max_traces(tx.update, n=1))
    state = tx.init(params)
    for scale in (1.0, np.nan, 2.0):
        updates = helpers.vary(params, "dense/bias", scale)
        _, state = update(updates, state, params)


@every_kind
def test_a_fresh_state_can_be_donated(kind):
    tx, params = GUARDS[kind](), helpers.random_tree()
    update = jax.jit(tx.update, donate_argnums=1)
    state = tx.init(params)
    for _ in range(2):
        _, state = update(params, state, params)
    assert int(state.step_count) == 2


@every_kind
def test_shapes_are_known_without_values(kind):
    tx, params = GUARDS[kind](), helpers.random_tree()
    shapes = jax.eval_shape(tx.init, params)
    assert helpers.types(shapes) == helpers.types(tx.init(params))
    _, after = jax.eval_shape(tx.update, params, shapes, params)
    assert helpers.types(after) == helpers.types(shapes)


@every_guard
def test_under_vmap_each_seed_decides_for_itself(guard):
    tx = guard(optax.adam(0.1))
    params = jnp.array([[1.0, -0.0]] * 3)
    updates = jnp.array([[1.0, 1.0], [1.0, jnp.nan], [1.0, 2.0]])

    def first(updates, params):
        return tx.update(updates, tx.init(params), params)

    out, state = jax.jit(jax.vmap(first))(updates, params)
    new_params: Any = optax.apply_updates(params, out)
    assert list(state.skipped_count) == [0, 1, 0]
    assert bits(new_params[1]) == bits(params[1])
    alone, _ = jax.jit(first)(updates[2], params[2])
    np.testing.assert_allclose(out[2], alone, rtol=1e-6)
    report = jax.vmap(summary)(state)
    assert list(report["guard/skipped_count"]) == [0, 1, 0]


@pytest.mark.parametrize("kind", ["nonfinite", "spike", "spike_decay"])
def test_map_params_finds_the_moments_and_nothing_else(kind):
    tx, params = GUARDS[kind](), helpers.random_tree()
    marked: Any = optax.tree.map_params(
        tx,
        lambda x: "param",
        tx.init(params),
        transform_non_params=lambda x: "other",
    )
    assert jax.tree.leaves(marked).count("param") == 2 * len(PATHS)
    assert marked.guarded_state[0].mu == jax.tree.map(lambda x: "param", params)
    assert marked.culprits == "other"


def states_of(kind):
    tx, params = GUARDS[kind](), helpers.random_tree()
    step = jax.jit(tx.update)
    bad = helpers.vary(params, "dense/bias", np.nan)
    _, state = step(params, tx.init(params), params)
    _, state = step(bad, state, params)
    return tx.init(params), state


@every_kind
def test_a_state_survives_flax_serialization(kind):
    fresh, state = states_of(kind)
    data = flax.serialization.to_bytes(state)
    restored = flax.serialization.from_bytes(fresh, data)
    assert bits(restored) == bits(state)


@every_kind
def test_a_state_survives_orbax(kind, tmp_path):
    fresh, state = states_of(kind)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        abstract = jax.eval_shape(lambda: fresh)
        restored = checkpointer.restore(tmp_path / "state", abstract)
    assert bits(restored) == bits(state)


def test_an_injected_hyperparameter_inside_can_be_changed():
    tx = oc.skip_if_nonfinite(optax.inject_hyperparams(optax.sgd)(learning_rate=1.0))
    step, params = stepper(tx), jnp.ones(1)
    state: Any = tx.init(params)
    state.guarded_state.hyperparams["learning_rate"] = jnp.float32(0.5)
    params, state = step(params, state, jnp.array([jnp.nan]))
    assert float(state.guarded_state.hyperparams["learning_rate"]) == 0.5
    params, state = step(params, state, jnp.ones(1))
    np.testing.assert_allclose(params, [0.5])


def test_an_injected_threshold_is_obeyed():
    make: Any = optax.inject_hyperparams(
        lambda threshold: oc.skip_if_spike(optax.sgd(1.0), threshold=threshold)
    )
    tx = make(threshold=2.0)
    params = jnp.zeros(1)
    state = tx.init(params)
    updates, state = tx.update(jnp.array([3.0]), state, params)
    assert updates[0] == 0
    state.hyperparams["threshold"] = jnp.float32(4.0)
    updates, _ = tx.update(jnp.array([3.0]), state, params)
    assert updates[0] == -3


def test_extra_arguments_reach_what_is_inside():
    received = {}

    def update(updates, state, params=None, **extra_args):
        del params
        received.update(extra_args)
        return updates, state

    def init(params):
        del params
        return optax.EmptyState()

    inner = optax.GradientTransformationExtraArgs(init, update)
    tx = oc.skip_if_nonfinite(inner)
    tx.update(jnp.ones(1), tx.init(jnp.ones(1)), value=1.0, other="x")
    assert received == {"value": 1.0, "other": "x"}
