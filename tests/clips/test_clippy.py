"""Clippy, by hand and against its equation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import helpers
from helpers import oc
from weight_cases import step


def test_clippy_by_hand():
    updates = {"w": jnp.array([2.0, -0.1])}
    params = {"w": jnp.array([-4.0, 0.0])}
    clipped, state = step(oc.clippy(0.1, 0.02), updates, params)
    np.testing.assert_allclose(clipped["w"], [0.4, -0.02], rtol=1e-6)  # the 2nd binds
    np.testing.assert_allclose(state.norms, [5.0], rtol=1e-6)
    np.testing.assert_allclose(state.factors, [0.2], rtol=1e-6)
    assert list(state.max_norms) == [1.0]


def test_no_weight_changes_by_more_than_its_share():
    updates, params = helpers.updates_and_params(scale=30.0)
    clipped, state = step(oc.clippy(0.2, 0.03), updates, params)
    shares = jax.tree.map(
        lambda u, w: np.abs(u) / (0.2 * np.abs(w) + 0.03),
        helpers.truth(clipped),
        helpers.truth(params),
    )
    largest = [np.max(x) for x in jax.tree.leaves(shares)]
    np.testing.assert_allclose(largest, 1.0, rtol=1e-6)  # each leaf uses it up
    assert (np.asarray(state.factors) < 1).all()


def test_without_an_absolute_share_a_weight_at_zero_may_not_move():
    updates = {"a": jnp.array([1.0, 1.0]), "b": jnp.array([0.0, 1.0])}
    params = {"a": jnp.array([0.0, 9.0]), "b": jnp.array([0.0, 9.0])}
    clipped, state = step(oc.clippy(0.5, 0.0), updates, params)
    np.testing.assert_array_equal(clipped["a"], [0.0, 0.0])
    assert helpers.bits(clipped["b"]) == helpers.bits(updates["b"])
    np.testing.assert_array_equal(state.factors, [0.0, 1.0])


def test_the_largest_update_of_the_smallest_weight_moves_it_by_its_share():
    updates, params = {"w": jnp.array([3e38])}, {"w": jnp.array([1e-36])}
    clipped, state = step(oc.clippy(0.5, 0.0), updates, params)
    np.testing.assert_allclose(clipped["w"], [5e-37], rtol=1e-5)
    assert np.isinf(oc.summary(state)["clip/norm/0"])


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30, 3e38])
def test_complex_updates_are_measured_by_their_modulus(scale):
    updates = {"w": jnp.array([0.6 + 0.8j, 0.1j], jnp.complex64) * scale}
    params = {"w": jnp.array([3.0 - 4.0j, 1.0], jnp.complex64) * 1e-3}
    clipped, _ = step(oc.clippy(0.1, 0.0), updates, params)
    factor = min(1, 5e-4 / scale, 1e-4 / (0.1 * scale))
    expected = np.asarray(updates["w"], np.complex128) * factor
    np.testing.assert_allclose(clipped["w"], expected, rtol=1e-5)


def test_an_element_that_may_not_move_and_does_not_has_no_ratio():
    # Beside one whose ratio, 2e35, is measured from an update that is scaled down.
    updates = {"w": jnp.array([0.0, 1e15])}
    params = {"w": jnp.array([0.0, 1e-20])}
    clipped, _ = step(oc.clippy(0.5, 0.0), updates, params)
    np.testing.assert_allclose(clipped["w"], [0.0, 5e-21], rtol=1e-6)


def test_clippy_after_the_learning_rate_bounds_what_is_applied():
    updates, params = helpers.updates_and_params(scale=100.0)
    tx = optax.chain(optax.sgd(0.3), oc.clippy(0.1, 1e-3))
    applied = optax.apply_updates(params, step(tx, updates, params)[0])
    for new, old in zip(jax.tree.leaves(applied), jax.tree.leaves(params), strict=True):
        bound = (0.1 * np.abs(old) + 1e-3) * (1 + 1e-4) + 1e-6
        assert (np.abs(new - old) <= bound).all()


@pytest.mark.parametrize("what", ["relative", "absolute"])
def test_a_negative_share_raises(what):
    with pytest.raises(ValueError, match=f"Expected {what} >= 0, got -1"):
        oc.clippy(**{what: -1})
    with pytest.raises(TypeError, match=f"Expected {what} to be a number"):
        oc.clippy(**{what: "0.5"})
