"""A guard has the state of before overwritten in place, whatever it guards.

Compiled, it moves selections about in the program of what it guards, which may consist
of anything.
"""

import functools
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from helpers import oc

SHAPE = (48, 32)  # of nothing else in these programs
PARAMS = {
    "w": np.linspace(-1.0, 2.0, 6, dtype=np.float32).reshape(2, 3),
    "b": np.array([0.5, -0.0], np.float32),
}
OTHER = jax.tree.map(np.ones_like, PARAMS)
FIRST = jax.tree.map(lambda x: x + np.float32(0.25), PARAMS)
BAD = {**FIRST, "b": np.array([np.nan, 1.0], np.float32)}
STEPS = (FIRST, BAD, PARAMS, OTHER)


def remember(update, **more):
    """A transformation that keeps what it made last, and more."""

    def init_fn(params):
        return {"last": jax.tree.map(jnp.zeros_like, params), **more}

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        return update(updates, state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def mapped(function):
    """Each leaf is made from the update and from the last one, and kept."""

    def update(updates, state):
        new = jax.tree.map(function, updates, state["last"])
        return jax.tree.map(lambda x: 2.0 * x, new), {**state, "last": new}

    return remember(update)


def mix(update, last):
    return update + 0.5 * last


@jax.custom_jvp
def mix_jvp(update, last):
    return mix(update, last)


mix_jvp.defjvp(lambda primals, tangents: (mix(*primals), mix(*tangents)))
mix_vjp = jax.custom_vjp(mix)
mix_vjp.defvjp(lambda x, y: (mix(x, y), None), lambda _, ct: (ct, 0.5 * ct))


def scanned(update, last):
    return jax.lax.scan(lambda x, _: (mix(update, x), None), last, length=3)[0]


def looped(update, last):
    return jax.lax.while_loop(lambda x: x.sum() < 5.0, lambda x: mix(x, x) + 1.0, last)


def branching(update, last):
    return jax.lax.cond(update[0].sum() > 0, mix, jnp.subtract, update, last)


def with_old_random_numbers(update, last):
    with jax.threefry_partitionable(False):  # known of each equation
        return mix(update, last) + jax.random.normal(jax.random.key(1), (3, 5))[0, 0]


def swapped(updates, state):
    new = {"last": updates, "other": state["last"]}
    return jax.tree.map(mix, updates, state["other"]), new


def twice(updates, state):
    new = jax.tree.map(mix, updates, state["last"])
    return new, {"last": new, "other": new}


def in_a_row(updates, state):
    new = jax.tree.map(mix, updates, state["last"])
    other = jax.tree.map(mix, new, state["other"])
    return other, {"last": new, "other": other}


def forgotten(updates, state):
    zeros = jax.tree.map(jnp.zeros_like, updates)
    return jax.tree.map(mix, updates, state["last"]), {**state, "last": zeros, "i": 7}


def random(updates, state):
    key, last = jax.random.split(state["key"])
    noise = jax.random.normal(key)
    return jax.tree.map(lambda x: x + noise, updates), {**state, "key": last}


INNER = {
    "jit": mapped(jax.jit(mix)),
    "remat": mapped(jax.checkpoint(mix)),
    "custom_jvp": mapped(mix_jvp),
    "custom_vjp": mapped(mix_vjp),
    "scan": mapped(scanned),
    "while": mapped(looped),
    "cond": mapped(branching),
    "context": mapped(with_old_random_numbers),
    "whole step under jit": remember(jax.jit(in_a_row), other=OTHER),
    "an argument and an old entry as entries": remember(swapped, other=OTHER),
    "one value for two entries": remember(twice, other=OTHER),
    "an entry from another": remember(in_a_row, other=OTHER),
    "constants as entries": remember(forgotten, i=3),
    "key": remember(random, key=jax.random.key(0)),
    "nothing in the state": remember(
        lambda updates, state: (updates, state), none=None, masked=optax.MaskedNode()
    ),
    "masked": optax.masked(optax.adam(0.1), {"w": True, "b": False}),
    "guarded": oc.skip_if_spike(optax.adam(0.1), threshold=0.5),
    "multisteps": optax.MultiSteps(optax.adam(0.1), 2),
    "no momentum": optax.sgd(0.1),
    "momentum": optax.sgd(1.0, momentum=0.9, nesterov=True),
}


@pytest.mark.parametrize("name", INNER)
def test_a_program_of_any_kind_goes_as_if_skipped_by_hand(name):
    inner: Any = INNER[name]
    tx = oc.skip_if_nonfinite(INNER[name])
    alone, guarded = jax.jit(inner.update), jax.jit(tx.update)
    expected_state, state = inner.init(PARAMS), tx.init(PARAMS)
    for updates in STEPS:
        got, state = guarded(updates, state, PARAMS)
        if updates is BAD:
            expected = jax.tree.map(lambda x: np.full_like(x, -0.0), BAD)
        else:
            expected, expected_state = alone(updates, expected_state, PARAMS)
        both = (got, state.guarded_state), (expected, expected_state)
        assert jax.tree.structure(both[0]) == jax.tree.structure(both[1])
        chex.assert_trees_all_close(*map(data, both), rtol=1e-5, atol=1e-6)
    assert int(state.skipped_count) == 1


def data(tree):
    """The tree with keys of random numbers as numbers."""

    def numbers(x):
        x = jnp.asarray(x)
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(x) if is_key else x

    return jax.tree.map(numbers, tree)


def test_an_effect_happens_once_in_each_step():
    seen = []

    def observed(update, last):
        jax.debug.callback(seen.append, update[..., 0].sum(), ordered=True)
        return mix(update, last)

    tx = oc.skip_if_nonfinite(mapped(observed))
    step = jax.jit(tx.update)
    state = tx.init(PARAMS["b"])
    for size in (1.0, np.inf, 3.0):
        _, state = step(jnp.full(2, size), state)
    jax.effects_barrier()
    assert [float(x) for x in seen] == [1.0, np.inf, 3.0]


def test_functions_and_numbers_reach_a_line_search():
    def loss(params):
        return jnp.sum(params**2)

    inner = optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(15))
    tx = oc.skip_if_nonfinite(inner)
    params = jnp.array([1.0, -2.0])
    value, grad = jax.value_and_grad(loss)(params)
    more = {"grad": grad, "value_fn": loss}

    @jax.jit
    def first(value):
        return tx.update(grad, tx.init(params), params, value=value, **more)[0]

    expected: Any = inner.update(grad, inner.init(params), params, value=value, **more)[
        0
    ]
    np.testing.assert_allclose(first(value), expected, rtol=1e-6)
    np.testing.assert_array_equal(first(jnp.float32(np.nan)), [0.0, 0.0])


def test_it_can_be_differentiated_and_mapped_over():
    tx = oc.skip_if_nonfinite(mapped(mix))

    def total(scale, steps=STEPS) -> Any:
        state, updates = tx.init(PARAMS), PARAMS
        for updates in steps:
            scaled = jax.tree.map(lambda x: x * scale, updates)
            updates, state = tx.update(scaled, state)
        return optax.tree.sum(updates)

    scales = jnp.array([1.0, 2.0, np.inf])
    totals = jax.jit(jax.vmap(total))(scales)
    np.testing.assert_allclose(totals, [total(x) for x in scales], rtol=1e-6)
    slope = jax.jit(jax.grad(lambda scale: total(scale, (FIRST, OTHER))))(3.0)
    np.testing.assert_allclose(slope, total(1.0, (FIRST, OTHER)), rtol=1e-6)


@pytest.mark.parametrize("kind", ["auto", "explicit", "shard_map"])
def test_on_a_mesh_it_is_what_it_is_on_one_device(kind):
    def on_mesh(update, last):
        new = mix(update, last)
        return new - jax.lax.pmean(new, "x") if kind == "shard_map" else new

    def on_one(update, last):
        new = mix(update, last)
        mean = jnp.tile((new[:2] + new[2:]) / 2, (2, 1))
        return new - mean if kind == "shard_map" else new

    def two_steps(function, steps):
        tx = oc.skip_if_nonfinite(mapped(function))
        state, updates = tx.init(steps[0]), steps[0]
        for updates in steps:
            updates, state = tx.update(updates, state)
        return updates, state.guarded_state, state.skipped_count

    run = functools.partial(two_steps, on_mesh)
    axis_type = AxisType.Explicit if kind == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((2,), ("x",), (axis_type,), devices=jax.devices()[:2])
    if kind == "shard_map":
        specs = P("x"), P("x"), P()
        run = jax.shard_map(run, mesh=mesh, in_specs=P("x"), out_specs=specs)
    first = jnp.arange(8.0).reshape(4, 2)
    for steps in [(first, 2 * first), (first, first.at[3, 1].set(jnp.nan))]:
        with jax.set_mesh(mesh):
            got = jax.jit(run)(jax.device_put(steps, NamedSharding(mesh, P("x"))))
        chex.assert_trees_all_close(got, two_steps(on_one, steps), rtol=1e-6)


# --------------------------------------------------------------------------------------
# What it is for
# --------------------------------------------------------------------------------------

OPTIMIZERS = {
    "momentum": optax.sgd(0.1, momentum=0.9),
    "adam": optax.adam(0.1),
    "lion": optax.lion(0.1),
    "the state itself": optax.trace(0.9),
}


@functools.cache
def copies(name, guard=lambda inner: inner):
    """How many arrays the compiled step copies, of the size of those of the state."""
    tx = guard(optax.chain(oc.clip_by_global_norm(1.0), OPTIMIZERS[name]))

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = {"a": jnp.ones(SHAPE), "b": jnp.ones(SHAPE)}
    jitted = jax.jit(step, donate_argnums=(0, 1))
    text = jitted.lower(params, tx.init(params), params).compile().as_text() or ""
    assert "= f32[48,32]{1,0} parameter(" in text
    return len(re.findall(r"= f32\[48,32\]\S* copy\(", text))


@pytest.mark.parametrize("guard", [oc.skip_if_nonfinite, oc.skip_if_spike])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_state_is_copied_that_is_not_without_a_guard(name, guard):
    assert copies(name, guard) == copies(name)


@pytest.mark.parametrize("name", ["momentum", "adam", "the state itself"])
def test_without_a_guard_nothing_is_copied(name):
    assert copies(name) == 0
