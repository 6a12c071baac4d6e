"""What goes before a clip: `unscale` and `zero_nonfinite`."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import helpers
from guard_cases import SHAPES, SPECS, bits, broken, every_bad, grid, stepper
from helpers import oc

# --------------------------------------------------------------------------------------
# unscale
# --------------------------------------------------------------------------------------


def unscaled(updates, scale):
    tx = oc.unscale(scale)
    return tx.update(updates, tx.init(updates))[0]


def test_unscale_divides_exactly_and_widens(dtype):
    updates = helpers.random_tree(dtype, seed=1)
    out = jax.jit(unscaled)(updates, jnp.float32(2.0**15))
    expected = jax.tree.map(lambda x: x / 2**15, helpers.truth(updates))
    wide = {"float64": jnp.float64, "complex64": jnp.complex64}
    for ours, right in zip(
        jax.tree.leaves(out), jax.tree.leaves(expected), strict=True
    ):
        assert ours.dtype == wide.get(str(dtype), jnp.float32)
        np.testing.assert_array_equal(ours, right)


def test_unscale_keeps_what_float16_would_lose():
    smallest = jnp.array([6e-8], jnp.float16)
    assert float(unscaled(smallest, 2.0**15)[0]) == float(smallest[0]) / 2**15 > 0


@pytest.mark.parametrize(
    "scale", [1024, 1024.0, np.float16(1024), jnp.bfloat16(1024)], ids=type
)
def test_the_scale_is_a_number_of_any_kind(scale):
    np.testing.assert_array_equal(unscaled(jnp.array([512.0]), scale), [0.5])
    tx = oc.unscale()
    out, _ = tx.update(jnp.array([512.0]), tx.init(None), loss_scale=scale)
    np.testing.assert_array_equal(out, [0.5])


def test_a_changing_scale_is_traced_once():
    tx = oc.unscale()
    update = jax.jit(chex.assert_max_traces(tx.update, n=1))
    for scale in (2.0, 4.0):
        out, _ = update(jnp.ones(1), tx.init(None), loss_scale=jnp.float32(scale))
        np.testing.assert_array_equal(out, [1 / scale])


def test_unscale_leaves_alone_what_does_not_count():
    updates = {"i": jnp.array([4]), "n": None, "w": jnp.array([4.0])}
    out = unscaled(updates, 2.0)
    assert bits(out) == bits({**updates, "w": jnp.array([2.0])})


@every_bad
def test_what_is_not_finite_stays_so(bad):
    np.testing.assert_array_equal(unscaled(jnp.array([bad]), 2.0), [bad])


def test_a_clip_before_unscale_takes_the_gradients_for_too_large():
    scale, gradient = 1024.0, jnp.array([0.3, 0.4])  # norm 0.5: not to be clipped
    clip, unscale = oc.clip_by_global_norm(1.0), oc.unscale(1024.0)
    right: Any = optax.chain(unscale, clip)
    wrong: Any = optax.chain(clip, unscale)
    out, _ = right.update(scale * gradient, right.init(gradient))
    np.testing.assert_allclose(out, gradient, rtol=1e-6)
    out, _ = wrong.update(scale * gradient, wrong.init(gradient))
    np.testing.assert_allclose(out, gradient / 512, rtol=1e-6)


def test_training_in_float16_with_a_scale_that_halves_on_a_skip():
    tx: Any = optax.chain(
        oc.unscale(),
        oc.skip_if_nonfinite(optax.chain(oc.clip_by_global_norm(1.0), optax.sgd(0.1))),
    )
    target = jnp.array([1.0, -2.0, 0.5])

    def loss(params, dtype):
        return jnp.sum((params - target).astype(dtype) ** 2)

    @jax.jit
    def step(params, state, scale):
        def scaled_loss(params):
            return loss(params, jnp.float16) * scale.astype(jnp.float16)

        gradients = jax.grad(scaled_loss)(params)
        updates, state = tx.update(gradients, state, params, loss_scale=scale)
        bad = state[1].consecutive_count > 0
        scale = jnp.where(bad, scale / 2, scale)
        return optax.apply_updates(params, updates), state, scale, bad

    params, scale = jnp.zeros(3), jnp.float32(2.0**15)
    state: Any = tx.init(params)
    scales = []
    for _ in range(60):
        before = params
        params, state, scale, bad = step(params, state, scale)
        assert not bad or bits(params) == bits(before)
        scales.append(float(scale))
    skipped = int(state[1].skipped_count)
    assert scales[-1] == 2.0 ** (15 - skipped) < 2.0**15
    assert float(loss(params, jnp.float32)) < 1e-3
    # Apart from rounding, the same as in float32 without a scale.
    bare = optax.chain(oc.clip_by_global_norm(1.0), optax.sgd(0.1))
    expected, bare_state, bare_step = jnp.zeros(3), bare.init(params), stepper(bare)
    for _ in range(60 - skipped):
        gradient = jax.grad(loss)(expected, jnp.float32)
        expected, bare_state = bare_step(expected, bare_state, gradient)
    np.testing.assert_allclose(params, expected, atol=2e-3)


# --------------------------------------------------------------------------------------
# zero_nonfinite
# --------------------------------------------------------------------------------------


def test_zero_nonfinite_replaces_and_counts(dtype):
    tx = oc.zero_nonfinite()
    updates = helpers.random_tree(dtype, seed=1)
    state = tx.init(updates)
    update = jax.jit(tx.update)
    bad = broken(broken(updates, "dense/bias", np.nan), "head/kernel", -np.inf)
    zeroed = helpers.vary(helpers.vary(updates, "dense/bias", 0), "head/kernel", 0)
    out, state = update(bad, state)
    assert bits(out) == bits(zeroed)
    assert [float(x) for x in state] == [1, 1, 2]
    out, state = update(updates, state)
    assert bits(out) == bits(updates)
    assert [float(x) for x in state] == [2, 1, 0]


def test_zero_nonfinite_keeps_finite_bits_and_what_does_not_count():
    tx = oc.zero_nonfinite()
    updates = {"b": jnp.array(True), "n": None, "w": jnp.array([-0.0, 1e-40, 3e38])}
    out, state = tx.update(updates, tx.init(updates))
    assert bits(out) == bits(updates)
    assert float(state.zeroed_elements) == 0
    _, state = tx.update({}, tx.init({}))
    assert int(state.step_count) == 1


@pytest.mark.parametrize("check_vma", [True, False])
def test_elements_are_counted_once_on_a_mesh(check_vma):
    tx = oc.zero_nonfinite()
    if not check_vma:
        tx = oc.over_axes(tx, SPECS)
    updates = helpers.random_tree(shapes=SHAPES)
    bad = helpers.vary(updates, "dense/bias", np.nan)  # whole on all eight devices
    bad["dense"]["kernel"] = bad["dense"]["kernel"].at[:, 0].set(jnp.inf)
    bad["head"]["kernel"] = bad["head"]["kernel"].at[2, 3].set(-jnp.inf)

    def step(updates):
        out, state = tx.update(updates, tx.init(updates))
        return out, state

    mapped = jax.shard_map(
        step,
        mesh=grid(),
        in_specs=(SPECS,),
        out_specs=(SPECS, P()),
        check_vma=check_vma,
    )
    out, state = jax.jit(mapped)(bad)
    chex.assert_tree_all_finite(out)
    assert float(state.zeroed_elements) == 1 + 8 + 1
    expected, expected_state = tx.update(bad, tx.init(bad))
    assert bits(out) == bits(expected)
    assert bits(state) == bits(expected_state)
