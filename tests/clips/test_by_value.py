"""Clips of elements: hand-computed cases."""

import operator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as P

import helpers
from clip_cases import clipped
from helpers import oc
from optaxclip import norms

pytestmark = pytest.mark.usefixtures("strict_shapes")


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (1.0, [-1.0, -0.5, 0.0, 0.5, 1.0]),
        (0.25, [-0.25, -0.25, 0.0, 0.25, 0.25]),
        ((-2.0, 0.25), [-2.0, -0.5, 0.0, 0.25, 0.25]),
        ((-0.25, 3.0), [-0.25, -0.25, 0.0, 0.5, 3.0]),
        ((0.0, 1.0), [0.0, 0.0, 0.0, 0.5, 1.0]),
        ((-1.0, 0.0), [-1.0, -0.5, 0.0, 0.0, 0.0]),
        ((-float("inf"), 1.0), [-9.0, -0.5, 0.0, 0.5, 1.0]),
        (jnp.float32(0.0), [0.0] * 5),
        (float("inf"), [-9.0, -0.5, 0.0, 0.5, 9.0]),
        (np.float64(1.0), [-1.0, -0.5, 0.0, 0.5, 1.0]),
        (1, [-1.0, -0.5, 0.0, 0.5, 1.0]),
    ],
    ids=str,
)
def test_clip_by_value_clamps_each_element(limit, expected):
    updates = jnp.array([-9.0, -0.5, 0.0, 0.5, 9.0])
    np.testing.assert_array_equal(clipped(oc.clip_by_value(limit), updates), expected)


def test_clip_by_value_takes_a_range_as_a_list():
    bounds: Any = [-1.0, 2.0]
    updates = jnp.array([[-9.0, 9.0]])  # as wide as the list
    for limit in (bounds, {"**": bounds}):
        np.testing.assert_array_equal(
            clipped(oc.clip_by_value(limit), updates), [[-1.0, 2.0]]
        )


def test_clip_by_value_wants_numbers_from_its_schedule():
    clip = oc.clip_by_value(lambda count: jnp.array([1.0, 2.0]))
    with pytest.raises(
        ValueError, match=r"a pair \(low, high\), got shapes \[\(2,\)\]"
    ):
        clip.update(jnp.ones(2), clip.init(jnp.ones(2)))


def test_stacked_layers_are_clipped_like_each_alone():
    params = {"layers": helpers.random_tree(seed=2, shapes={"kernel": (3, 5, 4)})}
    grads = {"layers": helpers.random_tree(seed=1, shapes={"kernel": (3, 5, 4)})}
    stacked = oc.adaptive_grad_clip(0.1, axis={"layers": 1})
    together, _ = stacked.update(grads, stacked.init(params), params)
    clip = oc.adaptive_grad_clip(0.1)
    for layer in map(operator.itemgetter, range(3)):
        grad, param, both = (jax.tree.map(layer, x) for x in (grads, params, together))
        alone, _ = clip.update(grad, clip.init(param), param)
        helpers.assert_close(both, alone)


def test_a_clip_of_units_records_its_leaves_in_tree_order():
    # Matrices of several units among leaves that are one unit, in an uneven order.
    grads = {
        "a": jnp.array([[3.0, 0.0], [4.0, 1.0]]),
        "b": jnp.array([0.6, 0.8]),
        "c": jnp.array([[0.0, 6.0], [0.0, 8.0]]),
        "d": jnp.array([2.0]),
        "e": jnp.array(-30.0),
    }
    clip: Any = oc.clip_by(norms.unit_norms, {"c": 20.0, "e": 3.0, "**": 0.5})
    updates, state = clip.update(grads, clip.init(grads))
    np.testing.assert_allclose(state.norms, [5.0, 1.0, 0.0, 2.0, 30.0])
    np.testing.assert_allclose(state.max_norms, [0.5, 0.5, 20.0, 0.5, 3.0])
    np.testing.assert_allclose(state.factors, [0.1, 0.5, 1.0, 0.25, 0.1])
    np.testing.assert_allclose(updates["a"], [[0.3, 0.0], [0.4, 0.5]], rtol=1e-6)
    np.testing.assert_array_equal(updates["c"], grads["c"])
    assert (updates["d"], updates["e"]) == (0.5, -3.0)


def test_clip_is_clip_by_value_under_optaxs_name():
    updates = jnp.array([-9.0, 0.5])
    chex.assert_trees_all_equal(
        clipped(oc.clip(max_delta=1.0), updates),
        clipped(oc.clip_by_value(limit=1.0), updates),
    )


def test_clip_by_value_follows_a_schedule_from_zero():
    clip = oc.clip_by_value(lambda count: 1.0 + count)
    updates, state = jnp.array([9.0]), clip.init(jnp.array([9.0]))
    seen = []
    for _ in range(3):
        out, state = clip.update(updates, state)
        seen.append(float(out[0]))
    assert seen == [1.0, 2.0, 3.0]
    assert int(state.update_count) == 3


def test_clip_by_value_takes_a_range_per_pattern():
    updates = {
        "LSTMCell_0": {"kernel": jnp.array([-99.0, 99.0])},
        "head": {"kernel": jnp.array([-999.0, 99.0])},
        "rest": jnp.array([-99.0, 0.5]),
    }
    limits = {"LSTMCell_0": 10.0, "head": (-100.0, 50.0), "**": 1.0}
    out = clipped(oc.clip_by_value(limits), updates)
    np.testing.assert_array_equal(out["LSTMCell_0"]["kernel"], [-10.0, 10.0])
    np.testing.assert_array_equal(out["head"]["kernel"], [-100.0, 50.0])
    np.testing.assert_array_equal(out["rest"], [-1.0, 0.5])


def test_clip_by_value_takes_a_schedule_per_pattern():
    clip = oc.clip_by_value({"a": lambda count: 1.0 + count, "b": 5.0})
    updates = {"a": jnp.array([9.0]), "b": jnp.array([9.0])}
    _, state = clip.update(updates, clip.init(updates))
    out, _ = clip.update(updates, state)
    chex.assert_trees_all_equal(out, {"a": jnp.array([2.0]), "b": jnp.array([5.0])})


def test_clip_by_value_turns_an_infinity_into_the_bound_and_keeps_a_nan():
    updates = jnp.array([np.inf, -np.inf, np.nan, 0.5])
    out = clipped(oc.clip_by_value((-2.0, 1.0)), updates)
    np.testing.assert_array_equal(out, [1.0, -2.0, np.nan, 0.5])


def test_clip_by_value_reads_a_traced_range_that_excludes_zero_as_ending_there():
    def step(low, high):
        return clipped(oc.clip_by_value((low, high)), jnp.array([-9.0, 0.0, 9.0]))

    np.testing.assert_array_equal(jax.jit(step)(1.0, 2.0), [0.0, 0.0, 2.0])
    np.testing.assert_array_equal(jax.jit(step)(-2.0, -1.0), [-2.0, 0.0, 0.0])


def test_clip_by_value_clips_complex_numbers_by_modulus():
    updates = jnp.array([30.0 + 40.0j, 0.3j, 0.0j, -3e30 + 4e30j])
    out = clipped(oc.clip_by_value(1.0), updates)
    np.testing.assert_allclose(out, [0.6 + 0.8j, 0.3j, 0.0j, -0.6 + 0.8j], rtol=1e-6)


def test_clip_by_value_rounds_its_limit_to_the_leaf():
    # 70000 is more than float16 holds: nothing to clip, and no infinity.
    updates = jnp.array([-60000.0, 2.0], jnp.float16)
    out = clipped(oc.clip_by_value(70000.0), updates)
    np.testing.assert_array_equal(out, updates)


# --------------------------------------------------------------------------------------
# What its state says
# --------------------------------------------------------------------------------------


def on_pieces(update):
    """The same on one device's pieces, as sure to be local as on a single device."""
    mesh = jax.make_mesh((1,), ("data",), (AxisType.Auto,))
    return jax.shard_map(update, mesh=mesh, in_specs=P(), out_specs=P())


on_any_mesh = pytest.mark.parametrize("spread", [lambda update: update, on_pieces])


@on_any_mesh
@pytest.mark.parametrize(
    "dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64, jnp.complex64]
)
@pytest.mark.parametrize(
    "limit", [jnp.float32(0.0), {"a": 2.0, "b": 0.25, "**": 0.5}, lambda t: 0.75 - t]
)
def test_the_statistics_are_those_of_the_elements(limit, dtype, spread, x64):
    shapes = {"a": (3,), "b": (40, 30), "c": (3,), "d": (90, 100), "e": ()}
    updates = helpers.random_tree(seed=3, shapes=shapes, dtype=dtype)
    clip: Any = oc.clip_by_value(limit)
    _, state = jax.jit(spread(clip.update))(updates, clip.init(updates))
    limits: Any = limit if isinstance(limit, dict) else {}
    rest = limits.get("**", 0.75 if callable(limit) else limit)
    size = {name: np.abs(helpers.truth(x)) for name, x in updates.items()}
    over = {k: x > limits.get(k, rest) for k, x in size.items()}
    np.testing.assert_allclose(
        state.largest, [x.max() for x in size.values()], rtol=1e-6
    )
    np.testing.assert_allclose(
        state.clipped_fractions, [x.mean() for x in over.values()], rtol=1e-7
    )


@on_any_mesh
@pytest.mark.parametrize("limit", [(-1.0, 2.0), {"**": (-1.0, 2.0)}], ids=str)
def test_the_statistics_of_a_range_look_at_both_of_its_ends(limit, spread):
    updates = {
        "a": jnp.array([-3.0, -1.0, -0.0, 2.0, 2.5]),
        "b": jnp.array([np.inf, -np.inf, 1.0, 1.0]),
        "c": jnp.array([1.0, np.nan, 5.0, 0.0]),
        "d": jnp.full((100, 100), 1.5),
    }
    clip: Any = oc.clip_by_value(limit)
    _, state = jax.jit(spread(clip.update))(updates, clip.init(updates))
    np.testing.assert_array_equal(
        state.clipped_fractions, np.array([0.4, 0.5, np.nan, 0.0], np.float32)
    )
    largest = np.array([3.0, np.finfo(np.float32).max, np.nan, 1.5])
    np.testing.assert_allclose(state.largest, largest, rtol=2e-6)


NAN, INF = np.nan, np.inf
MOST = float(np.finfo(np.float32).max)
ENDS = [INF, NAN, MOST, (-INF, INF), (-INF, 1.0), (-1.0, INF), (NAN, 1.0), (-INF, NAN)]


@on_any_mesh
@pytest.mark.parametrize("limit", ENDS, ids=str)
def test_the_statistics_know_bounds_that_are_traced_and_not_finite(limit, spread):
    """Within an infinite one is all, also what is infinite; within NaN is nothing."""
    updates = jnp.array([-INF, -MOST, -2.0, -0.0, 0.5, 2.0, MOST, INF])

    def step(limit):
        clip = oc.clip_by_value(limit)
        return spread(lambda u: clip.update(u, clip.init(u)))(updates)

    _, state = jax.jit(step)(jax.tree.map(jnp.float32, limit))
    low, high = limit if isinstance(limit, tuple) else (-limit, limit)
    inside = (low <= np.array(updates)) & (np.array(updates) <= high)
    np.testing.assert_array_equal(state.clipped_fractions, [np.mean(~inside)])


def test_the_statistics_count_more_elements_than_a_float_can():
    updates = jnp.ones(2**24 + 2**14, jnp.bfloat16).at[::2].set(0.25)
    clip: Any = oc.clip_by_value(0.5)
    _, state = jax.jit(on_pieces(clip.update))(updates, clip.init(updates))
    assert state.clipped_fractions == 0.5


@on_any_mesh
def test_the_modulus_of_a_large_complex_number_is_finite_in_the_statistics(spread):
    updates = jnp.array([3e30 + 4e30j, 0.1j])
    clip: Any = oc.clip_by_value(1.0)
    _, state = jax.jit(spread(clip.update))(updates, clip.init(updates))
    np.testing.assert_allclose(state.largest, [5e30], rtol=1e-6)
    assert state.clipped_fractions == 0.5
