"""The derivative through a guard is that of what happened."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import helpers
from helpers import oc


def trained(tx, rate, is_bad, compiled):
    """The params after some steps, of which the bad ones have an infinity in them."""
    update = jax.jit(tx.update) if compiled else tx.update
    params = jnp.array([1.0, 2.0])
    state = tx.init(params)
    for bad in is_bad:
        grads = jnp.where(jnp.array([bad, False]), jnp.inf, rate * params - 0.7)
        updates, state = update(grads, state, params)
        params = params + updates
    return jnp.sum(params**2)


INNER = {
    "sgd": lambda: optax.sgd(0.1),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "adam": lambda: optax.adam(0.1),
    "clip": lambda: optax.chain(oc.clip_by_global_norm(1.0), optax.sgd(0.1)),
}


GUARDS = {"nonfinite": oc.skip_if_nonfinite, "spike": oc.skip_if_spike}


@pytest.mark.parametrize(
    ("name", "guard", "compiled"), helpers.in_turn([*INNER], [*GUARDS], [False, True])
)
def test_the_derivative_through_skipped_steps_is_that_of_nothing(name, guard, compiled):
    tx = GUARDS[guard](INNER[name]())
    slope = jax.grad(lambda rate, is_bad: trained(tx, rate, is_bad, compiled))
    got = slope(0.5, [False, True, True, False, True])
    np.testing.assert_allclose(got, slope(0.5, [False, False]), rtol=1e-4)
    assert np.isfinite(got)


def test_so_it_is_of_a_rate_that_is_learnt():
    def total(rate, is_bad):
        tx = oc.skip_if_nonfinite(optax.sgd(rate, momentum=0.9))
        return trained(tx, 0.5, is_bad, compiled=False)

    slope = jax.jit(jax.grad(total), static_argnums=1)
    got = slope(0.1, (False, True, False))
    np.testing.assert_allclose(got, slope(0.1, (False, False)), rtol=1e-5)


def test_so_it_is_in_a_scan_and_a_batch():
    tx = oc.skip_if_nonfinite(optax.sgd(0.1, momentum=0.9))

    def total(rate, is_bad):
        def step(carry, bad):
            params, state = carry
            grads = jnp.where(jnp.stack([bad, False]), jnp.nan, rate * params - 0.7)
            updates, state = tx.update(grads, state, params)
            return (params + updates, state), None

        params = jnp.array([1.0, 2.0])
        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), is_bad)
        return jnp.sum(params**2)

    is_bad = jnp.array([[False, False, True, True], [False, True, False, True]])
    slopes = jax.jit(jax.vmap(jax.grad(total), (None, 0)))(0.5, is_bad)
    expected = jax.jit(jax.grad(total))(0.5, jnp.zeros(2, bool))
    np.testing.assert_allclose(slopes, [expected, expected], rtol=1e-5)


def test_so_it_is_of_a_step_that_breaks():
    def total(rate, steps):
        tx = oc.skip_if_nonfinite(optax.adam(0.1, eps=0.0))
        params = jnp.array([1.0, 2.0])
        state = tx.init(params)
        for scale in steps:
            updates, state = tx.update(rate * params * scale, state, params)
            params = params + updates
        return jnp.sum(params**2)

    slope = jax.jit(jax.grad(lambda rate: total(rate, [np.array([0.0, 1.0]), 1.0])))
    expected = jax.jit(jax.grad(lambda rate: total(rate, [1.0])))
    np.testing.assert_allclose(slope(0.5), expected(0.5), atol=1e-6)


@pytest.mark.parametrize("name", helpers.all_but(INNER, ["momentum", "clip"]))
def test_where_nothing_is_skipped_the_derivative_is_that_of_the_inner(name):
    inner: Any = INNER[name]()
    tx = oc.skip_if_nonfinite(inner)
    steps = [False] * 3  # of which those of Adam depend on the rate
    got = jax.jit(jax.grad(lambda rate: trained(tx, rate, steps, True)))(0.5)
    expected = jax.grad(lambda rate: trained(inner, rate, steps, True))(0.5)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    _, forward = jax.jvp(lambda rate: trained(tx, rate, steps, True), (0.5,), (1.0,))
    np.testing.assert_allclose(forward, expected, rtol=1e-5)
