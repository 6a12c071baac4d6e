"""What comes out of a guard is finite: the updates, and the params that they make."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec as P

import helpers
from helpers import oc
from optaxclip import norms, summary, thresholds
from optaxclip._guards import outcomes
from optaxclip._mesh import collectives

bits = helpers.bits
PARAMS = {"a": np.array([1.0, -0.0, 2.0], np.float32), "b": np.ones(2, np.float32)}
ONES = jax.tree.map(np.ones_like, PARAMS)

GUARDS = {
    "nonfinite": oc.skip_if_nonfinite,
    "spike": oc.skip_if_spike,
    "spike of leaves": lambda inner: oc.skip_if_spike(inner, norms.leaf_norms),
}
every_guard = pytest.mark.parametrize("guard", GUARDS.values(), ids=GUARDS)
both_ways = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])


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


@every_guard
@every_case
def test_a_step_whose_outcome_is_not_finite_leaves_no_trace(guard, case, place):
    del place
    check_no_trace(guard(CASES[case][0]), case, compiled=True)


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


# --------------------------------------------------------------------------------------
# Derivatives
# --------------------------------------------------------------------------------------


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


@both_ways
@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize("guard", [oc.skip_if_nonfinite, oc.skip_if_spike])
def test_the_derivative_through_skipped_steps_is_that_of_nothing(guard, name, compiled):
    tx = guard(INNER[name]())
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


@pytest.mark.parametrize("name", INNER)
def test_where_nothing_is_skipped_the_derivative_is_that_of_the_inner(name):
    inner: Any = INNER[name]()
    tx = oc.skip_if_nonfinite(inner)
    steps = [False] * 3  # of which those of Adam depend on the rate
    got = jax.jit(jax.grad(lambda rate: trained(tx, rate, steps, True)))(0.5)
    expected = jax.grad(lambda rate: trained(inner, rate, steps, True))(0.5)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    _, forward = jax.jvp(lambda rate: trained(tx, rate, steps, True), (0.5,), (1.0,))
    np.testing.assert_allclose(forward, expected, rtol=1e-5)


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


# --------------------------------------------------------------------------------------
# Lookahead
# --------------------------------------------------------------------------------------


@every_guard
@both_ways
def test_around_lookahead_it_goes_as_without_and_skips_fast_and_slow(guard, compiled):
    inner: Any = optax.lookahead(optax.sgd(0.1, momentum=0.9), 2, 0.5)
    tx = guard(inner)
    update = jax.jit(tx.update) if compiled else tx.update
    params = expected = optax.LookaheadParams.init_synced(PARAMS)
    state, expected_state = tx.init(params), inner.init(expected)
    bad = {**ONES, "b": np.array([np.nan, 1.0], np.float32)}
    for grads in ONES, bad, ONES, ONES:
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        if grads is not bad:
            updates, expected_state = inner.update(grads, expected_state, expected)
            expected = optax.apply_updates(expected, updates)
    chex.assert_trees_all_close(params, expected, rtol=1e-6)
    chex.assert_trees_all_close(state.guarded_state, expected_state, rtol=1e-6)
    assert int(state.skipped_count) == 1


def test_around_lookahead_the_leaf_that_broke_is_named():
    tx = oc.skip_if_nonfinite(optax.lookahead(optax.adam(0.1, eps=0.0), 2, 0.5))
    params = optax.LookaheadParams.init_synced(PARAMS)
    grads = {**ONES, "b": np.array([0.0, 1.0], np.float32)}
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    assert list(state.culprits) == [False, True]
    assert bits(optax.apply_updates(params, updates)) == bits(params)


def test_a_clip_in_front_of_lookahead_sees_the_gradients_leaves():
    params = optax.LookaheadParams.init_synced(PARAMS)
    clip = oc.clip_by_leaf_norm(1.0)
    chain: Any = optax.chain(clip, optax.lookahead(optax.sgd(0.1), 2, 0.5))
    state = chain.init(params)
    for _ in range(2):
        _, state = jax.jit(chain.update)(ONES, state, params)
    np.testing.assert_allclose(state[0].norms, [3**0.5, 2**0.5], rtol=1e-6)
    assert list(state[0].clipped_count) == [2, 2]


# --------------------------------------------------------------------------------------
# States
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tx",
    [
        oc.skip_if_nonfinite(optax.sgd(0.1)),
        oc.skip_if_spike(optax.sgd(0.1), norms.leaf_norms, 9.0),
    ],
    ids=["nonfinite", "spike"],
)
def test_a_state_that_was_blended_by_arithmetic_goes_on(tx):
    bad = jax.tree.map(lambda x: x * np.float32(np.nan), ONES)
    states = [tx.init(PARAMS)]
    for grads in ONES, bad:
        states.append(tx.update(grads, states[-1], PARAMS)[1])
    for state in states:
        blended = jax.tree.map(lambda a, b: (1 - 1.0) * a + 1.0 * b, states[0], state)
        for grads in ONES, bad:
            expected = tx.update(grads, state, PARAMS)[1]
            got = tx.update(grads, blended, PARAMS)[1]
            assert helpers.types(got) == helpers.types(expected)
            assert bits(got) == bits(expected)


@pytest.mark.parametrize(
    "guard",
    [oc.skip_if_nonfinite, lambda tx: oc.skip_if_spike(tx, norms.leaf_norms, 9.0)],
    ids=["nonfinite", "spike"],
)
def test_strict_promotion_is_kept(guard):
    with jax.numpy_dtype_promotion("strict"):
        tx = guard(optax.chain(oc.unscale(1.0), optax.sgd(0.1, momentum=0.9)))
        update = jax.jit(tx.update)
        grads = {"a": jnp.ones(2), "b": jnp.ones(3)}
        params = {"a": jnp.ones(2), "b": jnp.ones(3, jnp.float16)}
        _, state = update(grads, tx.init(grads), params, value=jnp.float32(1.0))
        updates, state = tx.update(grads, state, params)
        assert int(state.step_count) == 2
        jax.jit(oc.keep_if_skipped)(state, grads, updates)


@pytest.mark.parametrize(
    "tx", [oc.zero_nonfinite(), oc.unscale(8.0)], ids=["zero", "unscale"]
)
def test_what_goes_before_a_clip_keeps_it_too(tx):
    with jax.numpy_dtype_promotion("strict"):
        grads = {"a": jnp.ones(2), "b": jnp.ones(3, jnp.bfloat16)}
        updates, state = jax.jit(tx.update)(grads, tx.init(grads))
        updates, state = tx.update(grads, state)
    chex.assert_tree_all_finite(updates)


# --------------------------------------------------------------------------------------
# keep_if_skipped
# --------------------------------------------------------------------------------------

OLD, NEW = {"mean": jnp.zeros(2), "count": 1}, {"mean": jnp.full(2, 5.0), "count": 2}


def after(tx, scales, params=ONES):
    state = tx.init(params)
    for scale in scales:
        updates = jax.tree.map(lambda x, y=scale: x * np.float32(y), params)
        _, state = tx.update(updates, state, params)
    return state


CONTAINERS: dict[str, Any] = {
    "alone": lambda guard: guard,
    "chain": lambda guard: optax.chain(guard, optax.scale(1.0)),
    "partition": lambda guard: optax.partition({0: guard}, {"a": 0, "b": 0}),
    "inner of two": lambda guard: oc.skip_if_spike(guard, threshold=1e9),
}


@both_ways
@pytest.mark.parametrize("container", CONTAINERS)
def test_the_old_ones_are_kept_where_the_last_step_was_skipped(container, compiled):
    tx = CONTAINERS[container](oc.skip_if_nonfinite(optax.sgd(0.1)))
    keep = jax.jit(oc.keep_if_skipped) if compiled else oc.keep_if_skipped
    for scales, right in [
        ([], NEW),
        ([1.0], NEW),
        ([np.nan], OLD),
        ([np.nan, 1.0], NEW),
        ([1.0, np.nan, np.nan], OLD),
    ]:
        kept = keep(after(tx, scales), OLD, NEW)
        chex.assert_trees_all_equal(kept, right)
        assert jax.tree.structure(kept) == jax.tree.structure(right)


def test_of_two_guards_one_that_skipped_is_enough():
    inner = oc.skip_if_nonfinite(optax.sgd(0.1))
    tx = oc.skip_if_spike(inner, threshold=10.0)
    for scale, right in [(1.0, NEW), (99.0, OLD), (np.nan, OLD)]:
        kept = oc.keep_if_skipped(after(tx, [1.0, scale]), OLD, NEW)
        chex.assert_trees_all_equal(kept, right)


def test_under_vmap_each_member_keeps_its_own():
    tx = oc.skip_if_nonfinite(optax.sgd(0.1))
    grads = jnp.array([[1.0], [jnp.nan]])
    state = jax.vmap(lambda g: tx.update(g, tx.init(g))[1])(grads)
    kept = jax.vmap(oc.keep_if_skipped)(state, jnp.zeros(2), jnp.ones(2))
    assert list(kept) == [1.0, 0.0]
    with pytest.raises(ValueError, match=r"batch axis.*jax\.vmap\(keep_if_skipped\)"):
        oc.keep_if_skipped(state, jnp.zeros(2), jnp.ones(2))


def test_without_a_guard_there_is_nothing_to_go_by():
    state = optax.adam(0.1).init(ONES)
    with pytest.raises(ValueError, match=r"with a guard in it, got tuple without one"):
        oc.keep_if_skipped(state, OLD, NEW)


@pytest.mark.parametrize("new", [{"mean": jnp.zeros(2)}, {**NEW, "mean": jnp.ones(3)}])
def test_trees_that_are_not_alike_raise(new):
    state = oc.skip_if_nonfinite(optax.sgd(0.1)).init(ONES)
    with pytest.raises(ValueError, match="one tree before and after the step"):
        oc.keep_if_skipped(state, OLD, new)


def test_batch_statistics_of_nnx_survive_a_bad_batch():
    class Network(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(2, 3, rngs=rngs)
            self.norm = nnx.BatchNorm(3, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.dense(x)).sum()

    model = Network(nnx.Rngs(0))
    tx = oc.skip_if_nonfinite(optax.sgd(0.1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        old = nnx.clone(nnx.state(model, nnx.BatchStat))
        loss, grads = nnx.value_and_grad(lambda m: m(x))(model)
        optimizer.update(model, grads, value=loss)
        new = nnx.state(model, nnx.BatchStat)
        nnx.update(model, oc.keep_if_skipped(optimizer, old, new))

    x = jnp.array([[1.0, 2.0], [3.0, 5.0]])
    step(model, optimizer, x)
    before = jax.tree.map(np.array, nnx.state(model, nnx.BatchStat))
    step(model, optimizer, x.at[0, 0].set(jnp.nan))
    chex.assert_trees_all_equal(nnx.state(model, nnx.BatchStat), before)
    step(model, optimizer, x)
    after_good = nnx.state(model, nnx.BatchStat)
    assert bits(after_good) != bits(before)
    chex.assert_tree_all_finite(after_good)
