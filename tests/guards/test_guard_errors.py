"""What a guard says to wrong arguments."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from guard_cases import GUARDS, every_guard
from helpers import oc
from optaxclip import norms


@pytest.mark.parametrize("inner", [None, 0.1, optax.adam, "adam"], ids=type)
@every_guard
def test_what_is_no_transformation_raises(guard, inner):
    with pytest.raises(TypeError, match=r"guard to wrap a transformation.*chain\("):
        guard(inner)


@pytest.mark.parametrize("bad", [0, -1, 2.0, None, "3"], ids=repr)
@every_guard
def test_a_row_is_at_least_one_step(guard, bad):
    with pytest.raises(ValueError, match=r"max_consecutive >= 1, an int, got"):
        guard(optax.sgd(0.1), max_consecutive=bad)


def test_a_missing_loss_raises():
    tx = oc.skip_if_spike(optax.sgd(0.1), norm=None)
    with pytest.raises(ValueError, match=r"the loss, which.*value=loss"):
        tx.update(jnp.ones(1), tx.init(jnp.ones(1)))


def test_a_loss_that_is_no_single_number_raises():
    tx = oc.skip_if_spike(optax.sgd(0.1), norm=None)
    with pytest.raises(ValueError, match=r"to be one number.*shape \(3,\)"):
        tx.update(jnp.ones(1), tx.init(jnp.ones(1)), value=jnp.ones(3))


def test_a_norm_of_units_raises():
    tx = oc.skip_if_spike(optax.sgd(0.1), norms.unit_norms, 1.0)
    with pytest.raises(ValueError, match=r"one of units.*norms\.leaf_norms"):
        tx.init({"w": jnp.ones((2, 3))})


@pytest.mark.parametrize("bad", ["2", None, [1.0], object()], ids=type)
def test_a_threshold_of_the_wrong_type_raises(bad):
    with pytest.raises(TypeError, match="Expected threshold to be a number"):
        oc.skip_if_spike(optax.sgd(0.1), threshold=bad)


@pytest.mark.parametrize("bad", [-1.0, np.nan], ids=str)
def test_a_threshold_out_of_range_raises(bad):
    with pytest.raises(ValueError, match="Expected threshold >= 0"):
        oc.skip_if_spike(optax.sgd(0.1), threshold=bad)


def test_a_norm_that_is_no_function_raises():
    with pytest.raises(TypeError, match="Expected norm to be a function"):
        oc.skip_if_spike(optax.sgd(0.1), norm=2.0)


@pytest.mark.parametrize("kind", ["nonfinite", "spike", "zero"])
def test_no_state_raises(kind):
    with pytest.raises(ValueError, match=r"State, got None.*tx\.init\(params\)"):
        GUARDS[kind]().update(jnp.ones(1), None, jnp.ones(1))


@pytest.mark.parametrize("kind", ["nonfinite", "spike", "zero"])
def test_the_state_of_something_else_raises(kind):
    state = optax.sgd(0.1).init(jnp.ones(1))
    with pytest.raises(
        TypeError, match=r"Expected a state of type \w+State, got tuple"
    ):
        GUARDS[kind]().update(jnp.ones(1), state, jnp.ones(1))


def test_the_state_of_another_threshold_raises():
    one = oc.skip_if_spike(optax.sgd(0.1), threshold=2.0)
    other = oc.skip_if_spike(optax.sgd(0.1))
    with pytest.raises(ValueError, match="threshold, of shapes"):
        other.update(jnp.ones(1), one.init(jnp.ones(1)))


@pytest.mark.parametrize("scale", [0, 0.0, -1.0, np.nan, np.float32(0)], ids=repr)
def test_a_scale_that_is_not_positive_raises(scale):
    with pytest.raises(ValueError, match=r"Expected scale >"):
        oc.unscale(scale)
    tx = oc.unscale()
    with pytest.raises(ValueError, match=r"Expected scale >"):
        tx.update(jnp.ones(1), tx.init(None), loss_scale=scale)


@pytest.mark.parametrize("scale", ["2", True, 1j, [2.0]], ids=repr)
def test_a_scale_that_is_no_number_raises(scale):
    with pytest.raises(TypeError, match="Expected scale to be a number"):
        oc.unscale(scale)


def test_a_scale_of_many_numbers_raises():
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        oc.unscale(jnp.ones(2))


def test_no_scale_raises():
    tx = oc.unscale()
    with pytest.raises(ValueError, match=r"scale of the loss.*loss_scale=scale"):
        tx.update(jnp.ones(1), tx.init(None))


def test_a_burst_that_is_not_finite_wears_out_no_patience():
    tx = oc.skip_if_spike(optax.sgd(1.0), threshold=2.0, accept_after=3)
    state = tx.init(jnp.zeros(1))
    taken = []
    for size in [1.0, *[np.nan] * 5, 1e6, 1e6, np.nan, 1e6, 1e6, 1.0, 1e6]:
        updates, state = tx.update(jnp.array([size]), state)
        taken.append(float(updates[0]) != 0)
    assert taken == [True, *[False] * 9, True, True, False]
