"""Records at the edges: before a step, under strict settings, of odd params."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import helpers
from helpers import oc
from optaxclip import norms
from recorded import PARAMS, PATHS, clipped_sgd, run, sizes, steps


def test_a_fresh_state_can_be_made_while_jax_looks_for_nan():
    with jax.debug_nans(True):
        state = oc.record(clipped_sgd()).init(PARAMS)
    assert sum(x.size for x in jax.tree.leaves(state)) > 0


def test_strict_promotion_is_kept():
    with jax.numpy_dtype_promotion("strict"):
        tx = oc.record(optax.sgd(0.1), size=2)
        state: Any = tx.init(PARAMS)
        for loss in (jnp.float16(1.0), None, jnp.float32(2.0)):
            _, state = jax.jit(tx.update)(PARAMS, state, PARAMS, value=loss)
    np.testing.assert_array_equal(oc.history(state)["loss"], [1.0, np.nan, 2.0])


def test_a_loss_that_was_nan_at_every_step_is_a_column():
    losses = np.full(3, np.nan, np.float32)
    seen = oc.history(run(oc.record(optax.sgd(0.1)), (1.0, 1.0, 1.0), value=losses))
    assert list(seen["nonfinite"]) == [3]
    np.testing.assert_array_equal(seen["loss"], [np.nan])


def test_before_the_first_step_a_history_has_no_rows():
    seen = oc.history(oc.record(clipped_sgd()).init(PARAMS), PARAMS)
    assert {"step", "norm", "width", *(f"norm/{x}" for x in PATHS)} <= set(seen)
    assert all(len(column) == 0 for column in seen.values())


def test_norms_that_a_clip_saw_later_in_the_chain_are_not_those_of_the_gradient():
    inner = optax.chain(optax.scale(100.0), oc.clip_by_group_norm(1.0))
    seen = oc.history(run(oc.record(inner), (1.0,)), PARAMS)
    found = {name for name in seen if name.startswith("norm/")}
    assert found == {f"norm/{path}" for path in PATHS}
    assert {"clip/norm/dense", "clip/norm/head"} <= set(seen)


def test_of_params_without_names_there_is_the_norm_and_no_column_without_a_name():
    params = jnp.array([3.0, 4.0])
    tx = oc.record(oc.clip_by_leaf_norm(1.0), size=2)
    _, state = jax.jit(tx.update)(params, tx.init(params), params)
    seen = oc.history(state, params)
    assert [name for name in seen if name.startswith("norm")] == ["norm"]
    assert list(seen["norm"]) == [5.0]


EXCLUDING: dict[str, Any] = {
    "leaves": (
        norms.excluding(norms.leaf_norms, "bias"),
        {"norm/dense/kernel", "norm/head/kernel"},
    ),
    "groups": (norms.excluding(norms.group_norms(), ("bias", "head")), {"norm/dense"}),
    "two": (
        norms.excluding(norms.excluding(norms.leaf_norms, "bias"), "dense/kernel"),
        {"norm/head/kernel"},
    ),
}


@pytest.mark.parametrize("name", helpers.all_but(EXCLUDING, ("leaves",)))
def test_a_leaf_that_the_norm_leaves_out_has_no_column_and_is_not_called_dead(name):
    norm, names = EXCLUDING[name]
    scales = np.random.default_rng(0).uniform(0.5, 1.5, 40)
    losses = np.exp(-np.arange(40) / 20).astype(np.float32)
    state = run(oc.record(optax.sgd(0.1), norm, size=32), scales, value=losses)
    seen = oc.history(state, PARAMS)
    assert {x for x in seen if x.startswith("norm/")} == names
    np.testing.assert_allclose(seen["norm"][-1], sizes(steps(scales))[-1], rtol=1e-6)
    assert list(oc.diagnose(seen)) == ["healthy"]


def test_a_state_of_other_params_raises():
    tx = oc.record(optax.adam(0.1))
    state = tx.init({"w": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"5 columns, got 3.*tx\.init\(params\)"):
        tx.update(PARAMS, state, PARAMS)
