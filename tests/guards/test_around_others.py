"""Guards around lookahead, blended states, and what they keep of running statistics."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax import nnx

import guard_cases
import helpers
from helpers import oc
from optaxclip import norms
from outcome_cases import ONES, PARAMS, bits, both_ways, every_guard

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
    "guard",
    [oc.skip_if_nonfinite, oc.skip_if_spike, oc.zero_nonfinite, oc.reset_momentum],
    ids=lambda guard: guard.__name__,
)
@pytest.mark.usefixtures("strict_shapes")
def test_no_rank_is_promoted(guard):
    inner = optax.chain(oc.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9))
    tx = guard(inner) if guard is not oc.zero_nonfinite else guard()
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones(3), "c": jnp.ones(())}
    step, state = guard_cases.stepper(tx), tx.init(params)
    for _ in range(2):
        params, state = step(params, state, params, value=jnp.float32(1.0))
    chex.assert_tree_all_finite(params)


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
