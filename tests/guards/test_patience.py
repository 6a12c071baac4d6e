"""After how many steps a guard gives in, and what a loss is called."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from helpers import oc
from optaxclip import thresholds
from outcome_cases import ONES, PARAMS, every_guard

# --------------------------------------------------------------------------------------
# After how many steps
# --------------------------------------------------------------------------------------


def taken_by(tx, sizes):
    def step(state, size):
        updates, state = tx.update(size[None], state, jnp.zeros(1))
        return state, updates[0] != 0

    sizes = jnp.asarray(sizes, jnp.float32)
    state, is_taken = jax.lax.scan(step, tx.init(jnp.zeros(1)), sizes)
    return list(np.flatnonzero(is_taken)), state


def test_by_default_a_rule_accepts_what_has_come_to_stay_after_ten_steps():
    rule = thresholds.mean_plus_std(1.0, window=4)
    tx = oc.skip_if_spike(optax.sgd(1.0), threshold=rule)
    is_taken, _ = taken_by(tx, [1.0, *([9.0] * 12)])
    assert is_taken == [0, 11, 12]


def at_most_two(count):
    del count
    return 2.0


@pytest.mark.parametrize("limit", [2.0, at_most_two, {"**": 2.0}], ids=type)
def test_by_default_a_number_and_a_schedule_are_never_given_up(limit):
    tx = oc.skip_if_spike(optax.sgd(1.0), threshold=limit)
    is_taken, state = taken_by(tx, [9.0] * 30)
    assert is_taken == []
    assert bool(state.alarm)


def forbidden(count):
    return jnp.where((count >= 3) & (count < 20), 0.0, jnp.inf)


def test_what_is_forbidden_is_never_trained_on():
    tx = oc.skip_if_spike(optax.sgd(1.0), threshold=forbidden, accept_after=jnp.inf)
    is_taken, state = taken_by(tx, [1.0] * 22)
    assert is_taken == [0, 1, 2, 20, 21]
    assert int(state.skipped_count) == 17


@pytest.mark.parametrize("number", [3, np.int64(3), np.int8(3)], ids=type)
def test_both_numbers_are_whole_ones_of_any_kind(number):
    tx = oc.skip_if_spike(
        optax.sgd(1.0), threshold=2.0, max_consecutive=number, accept_after=number
    )
    is_taken, state = taken_by(tx, [9.0] * 5)
    assert is_taken == [3, 4]
    assert bool(state.alarm)


@pytest.mark.parametrize("never", [jnp.inf, np.float32(np.inf), 10**12], ids=repr)
def test_both_numbers_may_be_never(never):
    sizes = [9.0] * 30
    rule = thresholds.mean_plus_std(1.0, window=4)
    for tx in (
        oc.skip_if_spike(optax.sgd(1.0), threshold=rule, accept_after=never),
        oc.skip_if_spike(
            optax.sgd(1.0), threshold=2.0, max_consecutive=never, accept_after=10
        ),
    ):
        is_taken, state = taken_by(tx, [1.0, *sizes])
        assert bool(state.alarm) != (max(is_taken) > 0)
    tx = oc.skip_if_nonfinite(optax.sgd(1.0), max_consecutive=never)
    assert not taken_by(tx, [np.nan] * 12)[1].alarm


@pytest.mark.parametrize("bad", [0, -1, 2.0, np.nan, -np.inf, "3", True], ids=repr)
def test_what_is_no_number_of_steps_raises(bad):
    with pytest.raises(ValueError, match=r"accept_after >= 1, an int.*`jnp\.inf`"):
        oc.skip_if_spike(optax.sgd(0.1), accept_after=bad)


# --------------------------------------------------------------------------------------
# What a loss is called
# --------------------------------------------------------------------------------------


@every_guard
@pytest.mark.parametrize("name", ["loss", "losses", "loss_value", "train_loss"])
def test_a_loss_of_another_name_raises(guard, name):
    tx = guard(optax.sgd(0.1))
    with pytest.raises(TypeError, match=rf"as `value=`, got `{name}=`.*value={name}\)"):
        tx.update(ONES, tx.init(PARAMS), PARAMS, **{name: jnp.nan})


def test_what_means_something_else_reaches_the_inside():
    received = {}

    def update(updates, state, params=None, **extra_args):
        del params
        received.update(extra_args)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
    tx = oc.skip_if_nonfinite(inner)
    more = {"loss_scale": 2.0, "loss_fn": len, "grad": 1.0, "gloss": 3}
    tx.update(ONES, tx.init(PARAMS), PARAMS, **more)
    assert received == more
    tx.update(ONES, tx.init(PARAMS), PARAMS, value=1.0, loss=2.0)
    assert received == {**more, "value": 1.0, "loss": 2.0}
