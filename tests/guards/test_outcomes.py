"""What comes out of a guard is finite: the updates, and the params that they make."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from jax.sharding import AxisType, PartitionSpec as P

import helpers
from helpers import oc
from optaxclip import norms, summary
from optaxclip._guards import outcomes
from optaxclip._mesh import collectives
from outcome_cases import GUARDS, ONES, PARAMS, bits, both_ways, every_guard


@pytest.fixture(params=["everywhere", "on one device"])
def place(request, monkeypatch):
    """Of several devices all elements decide, on one those that are drawn."""
    if request.param == "on one device":
        monkeypatch.setattr(collectives, "is_local", lambda x: True)


def like(params, **leaves):
    """Zeros, but for some leaves."""
    return {**jax.tree.map(np.zeros_like, params), **leaves}


def nan_from_the_third_on(count):
    return jnp.sqrt(1.0 - jnp.asarray(count, jnp.float32))


HALF = {"a": np.full(3, 6e4, np.float16), "b": np.ones(2, np.float32)}

# An optimizer that makes of finite updates what is not, and in which leaf.
CASES: dict[str, Any] = {
    "a schedule that returns NaN": (
        optax.sgd(nan_from_the_third_on, momentum=0.9), PARAMS, ONES, [True, True],
    ),
    "adam in float16, a row without a gradient": (
        optax.adam(1e-3),
        HALF,
        {"a": np.array([0.0, 1.0, 0.0], np.float16), "b": np.ones(2, np.float32)},
        [True, False],
    ),
    "adam without eps, a row without a gradient": (
        optax.adam(1e-3, eps=0.0),
        PARAMS,
        like(PARAMS, a=np.ones(3, np.float32), b=np.array([0, 1.0], np.float32)),
        [False, True],
    ),
    "a step beyond the largest number": (
        optax.sgd(1e4, momentum=0.5),
        HALF,
        like(HALF, a=np.array([0.0, 0.0, -1.0], np.float16)),
        [True, False],
    ),
    "a step rounded to the dtype of its parameter": (
        optax.chain(oc.unscale(1.0), optax.sgd(1.0)),
        HALF,
        like(HALF, a=np.array([0.0, 0.0, -5528.0], np.float16)),
        [True, False],
    ),
    "prodigy": (optax.contrib.prodigy(1.0), PARAMS, like(PARAMS), [True, True]),
    "dadapt": (optax.contrib.dadapt_adamw(1.0), PARAMS, like(PARAMS), [True, True]),
}  # fmt: skip
every_case = pytest.mark.parametrize("case", CASES)


def steps_until_broken(tx, case, compiled):
    """The params and states before and after the first step that was skipped."""
    _, params, updates, _ = CASES[case]
    state = tx.init(params)
    update = jax.jit(tx.update) if compiled else tx.update
    for _ in range(4):
        out, new = update(updates, state, params)
        made = optax.apply_updates(params, out)
        if int(new.skipped_count):
            return (params, state), (made, new), out
        params, state = made, new
    raise AssertionError("nothing was skipped")


@pytest.mark.parametrize(("guard", "case"), helpers.in_turn([*GUARDS], [*CASES]))
def test_a_step_whose_outcome_is_not_finite_leaves_no_trace(guard, case, place):
    del place
    check_no_trace(GUARDS[guard](CASES[case][0]), case, compiled=True)


@every_case
def test_neither_does_it_outside_of_jit(case):
    check_no_trace(oc.skip_if_nonfinite(CASES[case][0]), case, compiled=False)


def check_no_trace(tx, case, compiled):
    (params, state), (made, new), out = steps_until_broken(tx, case, compiled)
    assert bits(made) == bits(params)
    assert bits(new.guarded_state) == bits(state.guarded_state)
    assert bits(new.rule_state) == bits(state.rule_state)
    assert all(np.signbit(x).all() for x in jax.tree.leaves(out))
    assert helpers.types(new) == helpers.types(state)
    assert int(new.skipped_count) == int(new.consecutive_count) == 1
    assert int(new.last_skipped_step) == int(state.step_count)
    broke = CASES[case][3]
    assert np.all(np.asarray(new.culprits) == (broke if new.culprits.ndim else True))


def test_the_leaf_that_broke_is_named():
    name = "adam without eps, a row without a gradient"
    tx = oc.skip_if_nonfinite(CASES[name][0])
    _, (params, state), _ = steps_until_broken(tx, name, compiled=True)
    assert "guard/culprit/b" in summary(state, params)


def test_a_group_is_to_blame_for_any_of_its_leaves():
    inner = optax.sgd(nan_from_the_third_on)
    tx = oc.skip_if_spike(inner, norms.group_norms({"a": 0, "b": 0}))
    state = tx.init(PARAMS)
    for _ in range(3):
        _, state = tx.update(ONES, state, PARAMS)
    assert state.culprits.shape == (1,)
    assert bool(state.culprits[0])


def test_a_watched_loss_is_not_to_blame_for_what_comes_out():
    inner = optax.sgd(nan_from_the_third_on)
    tx = oc.skip_if_spike(inner, norm=None, threshold=9.0)
    state = tx.init(PARAMS)
    for _ in range(3):
        _, state = tx.update(ONES, state, PARAMS, value=1.0)
    assert int(state.skipped_count) == 1
    assert not np.any(state.culprits)


@every_guard
def test_the_alarm_counts_broken_steps(guard):
    tx = guard(optax.sgd(nan_from_the_third_on))
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    for _ in range(12):
        _, state = update(ONES, state, PARAMS)
    assert int(state.skipped_count) == int(state.consecutive_count) == 10
    assert bool(state.alarm)


def test_what_is_accepted_is_skipped_all_the_same_if_it_breaks():
    tx = oc.skip_if_spike(optax.sgd(1e38), threshold=2.0, accept_after=1)
    state = tx.init(jnp.ones(1))
    taken = []
    for size in 3.0, 1e4, 1e4, 1.0:
        updates, state = tx.update(jnp.full(1, size), state, jnp.ones(1))
        taken.append(float(updates[0]) != 0)
    assert taken == [False, False, False, True]
    # Only the first of them is a finite one that would have been taken.
    tx = oc.skip_if_spike(optax.sgd(1e38), threshold=2.0, accept_after=2)
    state = tx.init(jnp.ones(1))
    for size in 1e4, 1e4, 1e4, 1e4:
        updates, state = tx.update(jnp.full(1, size), state, jnp.ones(1))
    assert int(state.finite_count) == 2


def test_without_params_the_updates_are_looked_at():
    tx = oc.skip_if_nonfinite(optax.sgd(nan_from_the_third_on))
    state = tx.init(PARAMS)
    updates = ONES
    for _ in range(3):
        updates, state = tx.update(ONES, state)
    assert int(state.skipped_count) == 1
    assert all(np.signbit(x).all() for x in jax.tree.leaves(updates))


@both_ways
def test_a_parameter_that_was_not_finite_before_is_nobodys_fault(compiled):
    tx = oc.skip_if_nonfinite(optax.sgd(1.0))
    params = jnp.array([jnp.inf, jnp.nan, 1.0])
    update = jax.jit(tx.update) if compiled else tx.update
    updates, state = update(jnp.ones(3), tx.init(params), params)
    assert int(state.skipped_count) == 0
    np.testing.assert_array_equal(updates, [-1.0, -1.0, -1.0])


# --------------------------------------------------------------------------------------
# Large leaves
# --------------------------------------------------------------------------------------


SIZE = 3 * outcomes.LOOKED_AT


def without_eps():
    return oc.skip_if_nonfinite(optax.adam(0.1, eps=0.0))


@both_ways
@pytest.mark.parametrize("where", [0, 3, SIZE - 3])
def test_what_is_drawn_of_a_large_leaf_decides_on_all_of_it(where, compiled, place):
    del place
    params = jnp.ones(SIZE)
    tx = without_eps()
    update = jax.jit(tx.update) if compiled else tx.update
    updates, state = update(params.at[where].set(0.0), tx.init(params), params)
    assert int(state.skipped_count) == 1
    assert bits(updates) == bits(jnp.full(SIZE, -0.0))


@both_ways
def test_any_other_element_is_held_by_itself(compiled, monkeypatch):
    monkeypatch.setattr(collectives, "is_local", lambda x: True)
    params = jnp.ones(SIZE)
    tx = without_eps()
    update = jax.jit(tx.update) if compiled else tx.update
    updates, state = update(params.at[1].set(0.0), tx.init(params), params)
    assert int(state.skipped_count) == 0
    assert bits(updates[1]) == bits(jnp.float32(-0.0))
    np.testing.assert_allclose(np.delete(updates, 1), -0.1, rtol=1e-5)


def test_over_devices_all_elements_decide():
    params = jnp.ones(SIZE)
    tx = without_eps()
    updates, state = jax.jit(tx.update)(params.at[1].set(0.0), tx.init(params), params)
    assert int(state.skipped_count) == 1
    assert bits(updates) == bits(jnp.full(SIZE, -0.0))


def matrix_optimizer():
    """One that is not run twice: what it multiplies is large."""

    def update(updates, state, params=None):
        del params
        new = jax.tree.map(lambda x, m: x @ x + 0.5 * m, updates, state)
        return jax.tree.map(lambda x: 1 / x, new), new

    def init(params):
        return jax.tree.map(jnp.zeros_like, params)

    return optax.GradientTransformation(init, update)


def test_a_costly_optimizer_runs_once_and_leaves_no_trace_either():
    params = jnp.ones((80, 80))
    tx = oc.skip_if_nonfinite(matrix_optimizer())
    update = jax.jit(tx.update)
    _, state = update(params, tx.init(params), params)
    assert int(state.skipped_count) == 0
    updates, new = update(jnp.zeros((80, 80)), tx.init(params), params)
    assert int(new.skipped_count) == 1
    assert bits(updates) == bits(jnp.full((80, 80), -0.0))
    assert bits(new.guarded_state) == bits(tx.init(params).guarded_state)
    assert update.lower(params, state, params).as_text().count("dot_general") == 1


# --------------------------------------------------------------------------------------
# JAX and what is built on it
# --------------------------------------------------------------------------------------


@every_guard
def test_a_scan_counts_what_broke_and_traces_once(guard):
    tx = guard(optax.sgd(nan_from_the_third_on, momentum=0.9))
    update: Any = chex.assert_max_traces(tx.update, n=1)

    def body(carry, _):
        params, state = carry
        updates, state = update(ONES, state, params)
        return (optax.apply_updates(params, updates), state), None

    carry = jax.tree.map(jnp.asarray, PARAMS), tx.init(PARAMS)
    (params, state), _ = jax.jit(lambda c: jax.lax.scan(body, c, length=5))(carry)
    chex.assert_tree_all_finite(params)
    assert int(state.skipped_count) == 3
    assert int(state.guarded_state[1].count) == 2


def test_each_member_of_a_batch_breaks_by_itself():
    tx = without_eps()
    grads = jnp.array([[1.0, 1.0], [0.0, 1.0]])
    params = jnp.ones((2, 2))
    state = jax.vmap(tx.init)(params)
    updates, state = jax.jit(jax.vmap(tx.update))(grads, state, params)
    assert list(state.skipped_count) == [0, 1]
    np.testing.assert_allclose(updates, [[-0.1, -0.1], [0, 0]], rtol=1e-5)


@pytest.mark.parametrize("check_vma", [True, False])
def test_what_breaks_on_one_device_is_skipped_on_all(check_vma):
    specs = {"a": P("x"), "b": P()}
    tx = without_eps()
    if not check_vma:
        tx = oc.over_axes(tx, specs)

    def step(params, updates):
        updates, state = tx.update(updates, tx.init(params), params)
        facts = state.skipped_count, state.culprits
        return updates, jax.tree.map(
            lambda x: collectives.vary_over(x, frozenset()), facts
        )

    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    run = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(specs, specs),
        out_specs=(specs, P()),
        check_vma=check_vma,
    )
    params = {"a": jnp.ones(16), "b": jnp.ones(2)}
    grads = {"a": jnp.ones(16).at[3].set(0.0), "b": jnp.ones(2)}
    updates, (skipped, culprits) = jax.jit(run)(params, grads)
    assert int(skipped) == 1
    assert list(culprits) == [True, False]
    assert bits(updates) == bits(jax.tree.map(lambda x: -0.0 * x, params))
    assert int(jax.jit(run)(params, params)[1][0]) == 0


def test_around_multisteps_the_accumulator_keeps_its_bits():
    tx = oc.skip_if_nonfinite(optax.MultiSteps(optax.sgd(1.0), 2))
    params, update = jnp.array([6e4, 1.0], jnp.float16), jax.jit(tx.update)
    huge = jnp.array([-6e4, 1.0], jnp.float16)
    _, state = update(huge, tx.init(params), params)
    assert int(state.skipped_count) == 0
    _, new = update(huge, state, params)
    assert int(new.skipped_count) == 1
    assert bits(new.guarded_state) == bits(state.guarded_state)
    updates, new = update(-huge, new, params)
    np.testing.assert_array_equal(updates, [0.0, 0.0])


def test_inside_of_multisteps_what_breaks_is_skipped():
    inner = oc.skip_if_nonfinite(optax.adam(0.1, eps=0.0))
    tx = optax.MultiSteps(inner, 2).gradient_transformation()
    params, update = jnp.ones(2), jax.jit(tx.update)
    state, updates = tx.init(params), params
    for _ in range(2):
        updates, state = update(jnp.array([0.0, 1.0]), state, params)
    assert bits(updates) == bits(jnp.array([-0.0, -0.0]))
    assert int(summary(state)["guard/skipped_count"]) == 1


def test_of_two_guards_the_inner_one_looks_at_what_comes_out():
    inner = oc.skip_if_nonfinite(optax.adam(0.1, eps=0.0))
    tx = oc.skip_if_spike(inner)
    params = jnp.ones(2)
    updates, state = jax.jit(tx.update)(jnp.array([0, 1.0]), tx.init(params), params)
    assert bits(updates) == bits(jnp.array([-0.0, -0.0]))
    assert int(state.skipped_count) == 0
    assert int(state.guarded_state.skipped_count) == 1
    assert int(state.guarded_state.guarded_state[0].count) == 0
