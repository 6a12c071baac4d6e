"""`summary` finds every clip in any optimizer state and names what it reports."""

import equinox
import flax.training.train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from helpers import oc
from optaxclip import norms, summary, thresholds
from states import TREE, state_of

GLOBAL_KEYS = {
    "clip/norm",
    "clip/max_norm",
    "clip/factor",
    "clip/clipped_fraction",
    "clip/update_count",
}


def as_floats(report):
    return {key: float(value) for key, value in report.items()}


def test_one_global_clip_has_five_entries():
    clip = oc.clip_by_global_norm(1.0)
    report = as_floats(summary(state_of(clip)))
    assert set(report) == GLOBAL_KEYS
    np.testing.assert_allclose(report["clip/norm"], 109**0.5, rtol=1e-6)
    np.testing.assert_allclose(report["clip/factor"], 109**-0.5, rtol=1e-6)
    assert report["clip/max_norm"] == 1.0
    assert report["clip/clipped_fraction"] == 1.0
    assert report["clip/update_count"] == 1.0


def test_every_value_is_a_scalar():
    clip = oc.clip_by_leaf_norm(1.0)
    report = summary(state_of(clip), TREE)
    assert all(isinstance(value, np.generic) for value in report.values())
    assert {value.shape for value in report.values()} == {()}


def test_the_clipped_fraction_is_over_the_steps():
    clip = oc.clip_by_global_norm(5.0)
    state = clip.init(TREE)
    for scale in (1.0, 0.1, 0.1, 0.1):
        updates = jax.tree.map(lambda x, s=scale: s * x, TREE)
        _, state = clip.update(updates, state)
    assert float(summary(state)["clip/clipped_fraction"]) == 0.25


def test_a_fresh_state_has_a_finite_fraction():
    report = as_floats(summary(oc.clip_by_global_norm(1.0).init(TREE)))
    assert report["clip/clipped_fraction"] == 0.0
    assert report["clip/update_count"] == 0.0


def test_leaves_are_named_by_the_params():
    report = as_floats(summary(state_of(oc.clip_by_leaf_norm(5.0)), TREE))
    assert report["clip/norm/Dense_0/bias"] == 0.0
    assert report["clip/norm/Dense_0/kernel"] == 3.0
    assert report["clip/norm/Dense_1/bias"] == 6.0
    assert report["clip/norm/Dense_1/kernel"] == 8.0
    assert report["clip/max_norm/Dense_1/bias"] == 5.0
    assert report["clip/factor/Dense_1/kernel"] == 0.625
    assert report["clip/clipped_fraction/Dense_0/kernel"] == 0.0
    assert report["clip/clipped_fraction/Dense_1/kernel"] == 1.0
    assert report["clip/update_count"] == 1.0
    assert len(report) == 4 * 4 + 1


def test_scopes_are_numbered_without_params():
    report = as_floats(summary(state_of(oc.clip_by_leaf_norm(5.0))))
    assert [report[f"clip/norm/{i}"] for i in range(4)] == [0.0, 3.0, 6.0, 8.0]
    assert len(report) == 4 * 4 + 1


def test_layers_are_named_by_their_module_path():
    report = as_floats(summary(state_of(oc.clip_by_group_norm(1.0)), TREE))
    assert report["clip/norm/Dense_0"] == 3.0
    assert report["clip/norm/Dense_1"] == 10.0
    assert len(report) == 4 * 2 + 1


def test_leaves_that_are_not_counted_have_no_name():
    params = {"n": jnp.array([1]), "none": None, "w": jnp.array([3.0, 4.0])}
    clip = oc.clip_by_leaf_norm(1.0)
    _, state = clip.update(params, clip.init(params))
    report = as_floats(summary(state, params))
    assert report["clip/norm/w"] == 5.0
    assert len(report) == 4 + 1


def test_clip_by_value_reports_how_much_it_clipped():
    grads = {"a": jnp.array([3.0, -0.5, -4.0, 1.0]), "b": jnp.array([0.5, 0.25])}
    clip = oc.clip_by_value(1.0)
    _, state = clip.update(grads, clip.init(grads))
    assert as_floats(summary(state, grads)) == {
        "clip/largest/a": 4.0,
        "clip/largest/b": 0.5,
        "clip/clipped_fraction/a": 0.5,
        "clip/clipped_fraction/b": 0.0,
        "clip/update_count": 1.0,
    }


def test_the_threshold_of_a_rule_is_reported():
    clip = oc.clip_by(norms.global_norm, thresholds.lagged(optax.ema(0.5)))
    report = as_floats(summary(state_of(clip, steps=2)))
    np.testing.assert_allclose(report["clip/max_norm"], 109**0.5, rtol=1e-5)


def test_several_clips_are_numbered_in_order():
    tx = optax.chain(
        oc.clip_by_leaf_norm(5.0),
        oc.clip_by_global_norm(1.0),
        optax.adam(0.1),
    )
    report = as_floats(summary(state_of(tx), TREE))
    assert report["clip_0/norm/Dense_1/kernel"] == 8.0
    np.testing.assert_allclose(report["clip_1/norm"], 59**0.5, rtol=1e-6)
    assert not any(key.startswith("clip/") for key in report)


def test_it_works_under_jit():
    clip = oc.clip_by_leaf_norm(5.0)
    state = state_of(clip)
    jitted = jax.jit(summary)(state, TREE)
    assert as_floats(jitted) == as_floats(summary(state, TREE))


def test_params_may_be_shapes():
    state = state_of(oc.clip_by_leaf_norm(5.0))
    shapes = jax.eval_shape(lambda x: x, TREE)
    assert set(summary(state, shapes)) == set(summary(state, TREE))


CONTAINERS = {
    "chain": lambda clip: optax.chain(clip, optax.adam(0.1)),
    "nested chain": lambda clip: optax.chain(optax.chain(optax.trace(0.9), clip)),
    "masked": lambda clip: optax.masked(clip, jax.tree.map(lambda _: True, TREE)),
    "MultiSteps": lambda clip: optax.MultiSteps(clip, 1),
    "apply_if_finite": lambda clip: optax.apply_if_finite(clip, 3),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_clip_is_found_in(container):
    tx = CONTAINERS[container](oc.clip_by_global_norm(1.0))
    report = as_floats(summary(state_of(tx), TREE))
    assert set(report) == GLOBAL_KEYS
    assert report["clip/update_count"] == 1.0


def test_a_clip_is_found_in_injected_hyperparams():
    tx = optax.inject_hyperparams(oc.clip_by_global_norm)(max_norm=1.0)
    report = as_floats(summary(state_of(tx)))
    assert set(report) == GLOBAL_KEYS
    assert report["clip/max_norm"] == 1.0


def test_the_clips_of_a_partition_are_named_by_their_labels():
    tx = optax.partition(
        {
            "a": oc.clip_by_global_norm(1.0),
            "b": oc.clip_by_leaf_norm(2.0),
        },
        {"Dense_0": "a", "Dense_1": "b"},
    )
    report = as_floats(summary(state_of(tx), TREE))
    assert report["clip/a/norm"] == 3.0
    assert report["clip/b/norm/Dense_1/bias"] == 6.0
    assert report["clip/b/norm/Dense_1/kernel"] == 8.0


def test_a_clip_is_found_in_a_train_state():
    state = flax.training.train_state.TrainState.create(
        apply_fn=None, params=TREE, tx=oc.clip_by_group_norm(1.0)
    )
    state = state.apply_gradients(grads=TREE)
    report = as_floats(summary(state.opt_state, state.params))
    assert report["clip/norm/Dense_1"] == 10.0
    assert as_floats(summary(state, state.params)) == report


def test_a_clip_is_found_in_an_nnx_optimizer():
    class Network(nnx.Module):
        def __init__(self, rngs):
            self.Dense_0 = nnx.Linear(1, 1, rngs=rngs)

    model = Network(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, oc.clip_by_leaf_norm(1.0), wrt=nnx.Param)
    gradients = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    optimizer.update(model, gradients)
    params = nnx.state(model, nnx.Param)
    report = as_floats(summary(optimizer.opt_state, params))
    assert report["clip/norm/Dense_0/kernel"] == 1.0
    assert report["clip/norm/Dense_0/bias"] == 1.0
    assert report["clip/update_count"] == 1.0
    assert as_floats(summary(optimizer, params)) == report


def test_an_equinox_module_names_its_leaves():
    model = equinox.nn.Linear(1, 1, key=jax.random.key(0))
    params = equinox.filter(model, equinox.is_inexact_array)
    clip = oc.clip_by_leaf_norm(1.0)
    _, state = clip.update(params, clip.init(params))
    report = summary(state, params)
    assert {"clip/norm/weight", "clip/norm/bias"} <= set(report)


@pytest.mark.parametrize("state", [(), None, optax.EmptyState()], ids=str)
def test_a_state_without_a_clip_raises(state):
    with pytest.raises(ValueError, match=r"without one"):
        summary(state)


@pytest.mark.parametrize("make", [optax.adam, oc.acclip, oc.spam_clip])
def test_an_optimizer_whose_clips_keep_no_statistics_raises(make):
    message = r"with a clip .* keeps statistics, got tuple without one"
    with pytest.raises(ValueError, match=message):
        summary(optax.chain(make(0.1)).init(TREE))


def test_a_range_counts_what_is_on_either_side():
    grads = jnp.array([-3.0, -0.5, 0.0, 1.5, 4.0])
    clip = oc.clip_by_value((-1.0, 2.0))
    _, state = jax.jit(clip.update)(grads, clip.init(grads))
    report = summary(state, grads)
    np.testing.assert_allclose(report["clip/clipped_fraction"], 0.4)
    assert report["clip/largest"] == 4.0


def test_the_smallest_excess_counts_and_the_bound_does_not():
    bound = np.float32(1e-20)
    grads = jnp.array([bound, np.nextafter(bound, np.float32(1)), 0.0, -bound])
    clip = oc.clip_by_value(bound)
    _, state = clip.update(grads, clip.init(grads))
    np.testing.assert_allclose(summary(state, grads)["clip/clipped_fraction"], 0.25)


def test_complex_elements_are_measured_by_their_modulus():
    grads = jnp.array([3 + 4j, 0.1 + 0.1j], jnp.complex64)
    clip = oc.clip_by_value(1.0)
    _, state = clip.update(grads, clip.init(grads))
    report = summary(state, grads)
    np.testing.assert_allclose(report["clip/largest"], 5.0, rtol=1e-6)
    np.testing.assert_allclose(report["clip/clipped_fraction"], 0.5)
