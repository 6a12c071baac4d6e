"""The drop-ins for Optax's clips of examples."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from example_cases import examples, network_case, network_loss
from helpers import oc


@pytest.mark.parametrize("max_norm", [0.0, 1.0, 5.0, np.inf])
def test_the_drop_ins_give_optaxs_sums(max_norm):
    x = examples()
    pairs = [
        (oc.per_example_global_norm_clip, optax.per_example_global_norm_clip, ()),
        (oc.per_example_layer_norm_clip, optax.per_example_layer_norm_clip, (True,)),
        (oc.per_example_layer_norm_clip, optax.per_example_layer_norm_clip, (False,)),
    ]
    for ours, theirs, more in pairs:
        total, count = ours(x, max_norm, *more)
        expected, expected_count = theirs(x, max_norm, *more)
        chex.assert_trees_all_close(total, expected, rtol=1e-5, atol=1e-6)
        chex.assert_trees_all_equal(count, expected_count)


def test_empty_leaves_shift_no_counts():
    x = {"a": jnp.zeros((3, 0)), "b": jnp.full((3, 2), 5.0), "c": jnp.zeros((3, 1))}
    _, counts = oc.per_example_layer_norm_clip(x, 1.0)
    assert counts == {"a": 0, "b": 3, "c": 0}


def test_without_noise_it_is_optaxs_private_aggregate():
    params, x, y = network_case()
    each = jax.vmap(jax.grad(network_loss), in_axes=(None, 0, 0))(params, x, y)
    aggregate = optax.contrib.differentially_private_aggregate(
        0.7, 0.0, jax.random.key(0)
    )
    expected, _ = aggregate.update(each, aggregate.init(params))
    ours, _ = oc.per_example_clipped_grad(network_loss, 0.7)(params, x, y)
    chex.assert_trees_all_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_where_optax_lets_a_bad_example_in():
    """Its finite elements enter unclipped, and the NaN with them."""
    grads = [jnp.array([[np.nan, 100.0], [0.3, 0.4]])]
    theirs: Any = optax.per_example_global_norm_clip(grads, 1.0)[0]
    ours, count = oc.per_example_global_norm_clip(grads, 1.0)
    assert jnp.isnan(theirs[0][0]) and theirs[0][1] > 100
    np.testing.assert_allclose(ours[0], [0.3, 0.4], rtol=1e-6)
    assert count == 1
