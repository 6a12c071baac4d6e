"""What the columns of a record are called, and whose numbers are in them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import helpers
from helpers import oc
from optaxclip import norms
from recorded import PARAMS, PATHS, clip_then_sgd, run, sizes, steps

STACKED = {"blocks": {"kernel": (12, 3, 2)}, "head": (2,)}


def columns(seen, *kinds):
    return [name for name in seen if name.split("/")[0] in kinds]


@pytest.mark.thorough
def test_columns_are_named_by_the_params_and_numbered_without():
    state = run(oc.record(clip_then_sgd(), size=8), (1.0,))
    assert columns(oc.history(state, PARAMS), "norm") == [
        "norm",
        *(f"norm/{path}" for path in PATHS),
    ]
    assert columns(oc.history(state), "norm") == ["norm", "norm/0", "norm/1", "norm/2"]
    shapes = jax.eval_shape(lambda: PARAMS)
    assert list(oc.history(state, shapes)) == list(oc.history(state, PARAMS))


def test_layers_of_a_stack_have_a_column_each_in_forward_order():
    params = helpers.random_tree(shapes=STACKED)
    tx = oc.over_layers(oc.record(oc.clip_by_leaf_norm(1.0), size=2), {"blocks": 0})
    _, state = jax.jit(tx.update)(params, tx.init(params), params)
    seen = oc.history(state, params)
    names = [f"blocks/{i}/kernel" for i in range(12)]
    assert columns(seen, "norm") == ["norm", *(f"norm/{x}" for x in names), "norm/head"]
    right = [np.linalg.norm(x) for x in params["blocks"]["kernel"]]
    for i, name in enumerate(names):
        for column in (f"norm/{name}", f"clip/norm/{name}"):
            np.testing.assert_allclose(seen[column], right[i], rtol=1e-6)


def twice_the_leaf_norms(updates):
    return jax.tree.map(lambda norm: 2 * norm, norms.leaf_norms(updates))


def largest_element(updates):
    return jnp.max(jnp.stack([jnp.max(jnp.abs(x)) for x in jax.tree.leaves(updates)]))


NORMS: dict[str, Any] = {
    "groups": (norms.group_norms(), ["norm/dense", "norm/head"]),
    "global": (norms.global_norm, []),
    "own": (twice_the_leaf_norms, [f"norm/{path}" for path in PATHS]),
}


@pytest.mark.parametrize("name", helpers.all_but(NORMS, ("groups",)))
def test_the_norm_says_which_columns_there_are_and_the_global_one_is_of_all(name):
    norm, names = NORMS[name]
    state = run(oc.record(optax.sgd(0.1), norm, size=2), (1.0, 2.0, 3.0))
    seen = oc.history(state, PARAMS)
    assert columns(seen, "norm") == ["norm", *names]
    np.testing.assert_allclose(seen["norm"], sizes(steps((1.0, 2.0, 3.0))), rtol=1e-6)


@pytest.mark.thorough
def test_a_norm_of_ones_own_gives_the_numbers_of_the_scopes():
    plain, twice = (
        oc.history(run(oc.record(optax.sgd(0.1), norm, size=2), (1.0, 2.0)), PARAMS)
        for norm in (norms.leaf_norms, twice_the_leaf_norms)
    )
    for path in PATHS:
        np.testing.assert_allclose(
            twice[f"norm/{path}"], 2 * plain[f"norm/{path}"], rtol=1e-6
        )


@pytest.mark.thorough
def test_a_single_number_of_ones_own_is_a_column_beside_the_norm():
    seen = oc.history(run(oc.record(optax.sgd(0.1), largest_element), (1.0,)), PARAMS)
    right = max(np.abs(x).max() for x in jax.tree.leaves(steps((1.0,))))
    (column,) = [x for name, x in seen.items() if name.startswith("norm/")]
    np.testing.assert_allclose(column, right, rtol=1e-6)


def test_several_clips_have_the_names_of_summary():
    inner = optax.chain(
        oc.clip_by_value(0.5), oc.clip_by_leaf_norm(1.0), oc.clip_by_global_norm(1.0)
    )
    state = run(oc.record(inner, size=8), (1.0, 0.01))
    seen, told = oc.history(state, PARAMS), oc.summary(state, PARAMS)
    kept = ("norm", "max_norm", "factor", "largest", "clipped_fraction")
    names = columns(seen, "clip_0", "clip_1", "clip_2")
    assert {x.split("/")[1] for x in names} <= set(kept)
    assert len(names) == 3 * 2 + 3 * 3 + 3
    for name in names:
        np.testing.assert_allclose(seen[name][-1], told[name], err_msg=name)
    assert list(seen["clipped"]) == [1, 0]
