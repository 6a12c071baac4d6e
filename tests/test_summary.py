"""`summary` finds every clip in any optimizer state and names what it reports."""

from typing import Any

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

TREE = {
    "Dense_0": {"bias": jnp.array([0.0]), "kernel": jnp.array([[3.0]])},
    "Dense_1": {"bias": jnp.array([6.0]), "kernel": jnp.array([[8.0]])},
}
GLOBAL_KEYS = {
    "clip/norm",
    "clip/max_norm",
    "clip/factor",
    "clip/clipped_fraction",
    "clip/update_count",
}


def state_of(tx, steps=1):
    state = tx.init(TREE)
    for _ in range(steps):
        _, state = tx.update(TREE, state, TREE)
    return state


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


# --------------------------------------------------------------------------------------
# A name is right, or a number
# --------------------------------------------------------------------------------------

STACKED = {"blocks": {"attn": jnp.ones((3, 4)), "ln": jnp.ones((3, 2))}, "embed": 1.0}


def norms_of(report):
    return {key: float(x) for key, x in report.items() if "/norm" in key}


def test_a_batch_axis_raises_also_where_the_counts_agree():
    clip = oc.clip_by_global_norm(1.0)
    make: Any = optax.GradientTransformation
    each = make(jax.vmap(clip.init), lambda u, s, p=None: jax.vmap(clip.update)(u, s))
    tx = optax.partition({"b": each, "o": clip}, {"blocks": "b", "embed": "o"})
    with pytest.raises(ValueError, match=r"axis, .*\(3,\).* `jax.vmap\(summary\)`"):
        summary(tx.init(STACKED), STACKED)


def test_under_vmap_a_batch_has_the_names_of_its_params():
    clip = oc.clip_by_leaf_norm(1.0)
    seeds = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), TREE)
    _, states = jax.vmap(lambda p: clip.update(p, clip.init(p)))(seeds)
    report = jax.vmap(lambda s: summary(s, TREE))(states)
    np.testing.assert_array_equal(report["clip/norm/Dense_1/kernel"], [8.0, 16.0])
    np.testing.assert_array_equal(report["clip/update_count"], [1, 1])


def test_over_a_scan_every_statistic_has_an_axis_of_steps():
    clip = oc.clip_by_leaf_norm(5.0)

    def step(state, scale):
        _, state = clip.update(jax.tree.map(lambda x: scale * x, TREE), state)
        return state, summary(state, TREE)

    _, report = jax.lax.scan(step, clip.init(TREE), jnp.array([1.0, 0.1, 1.0]))
    found = report["clip/norm/Dense_1/bias"]
    np.testing.assert_allclose(found, [6.0, 0.6, 6.0], rtol=1e-6)
    fraction = report["clip/clipped_fraction/Dense_1/bias"]
    np.testing.assert_allclose(fraction, [1.0, 0.5, 2 / 3], rtol=1e-6)


def test_inside_of_jit_a_scope_is_found_by_its_name():
    clip = oc.clip_by_leaf_norm(5.0)
    state = state_of(clip)

    @jax.jit
    def looked_up(state):
        report = summary(state, TREE)
        assert "clip/norm/2" in list(report)  # listed by number
        return report["clip/norm/Dense_1/kernel"], report["clip/update_count"]

    assert tuple(map(float, looked_up(state))) == (8.0, 1.0)


def test_inside_of_jit_what_the_clip_did_not_see_is_nan_and_what_is_not_raises():
    head = {"Dense_0": TREE["Dense_0"]}
    clip = oc.clip_by_leaf_norm(5.0)
    ask = jax.jit(lambda s, key: summary(s, TREE)[key], static_argnums=1)
    assert np.isnan(ask(clip.init(head), "clip/norm/Dense_1/kernel"))
    with pytest.raises(KeyError, match="Dense_2"):
        ask(clip.init(head), "clip/norm/Dense_2/kernel")


def test_inside_of_jit_it_adds_no_output_for_each_leaf():
    params = {str(i): jnp.ones(2) for i in range(50)}
    clip = oc.clip_by_leaf_norm(1.0)
    shapes = jax.eval_shape(summary, clip.init(params), params)
    assert len(jax.tree.leaves(shapes)) == 6


def test_groups_of_ones_own_are_numbered_unless_they_are_a_subtree():
    params = {"a": {"x": jnp.ones(1), "y": jnp.ones(1)}, "b": {"x": jnp.ones(1)}}
    mixed = oc.clip_by_group_norm(1.0, {"x": "first", "y": "second"})
    assert set(norms_of(summary(mixed.init(params), params))) == {
        "clip/norm/0",
        "clip/norm/a/y",
    }
    whole = oc.clip_by_group_norm(1.0, {"a": "first", "b": "second"})
    assert set(norms_of(summary(whole.init(params), params))) == {
        "clip/norm/a",
        "clip/norm/b/x",
    }


def test_a_layer_of_one_leaf_has_the_name_of_the_layer():
    params = {"head": {"kernel": jnp.ones(1)}, "bias": jnp.ones(1)}
    clip = oc.clip_by_group_norm(1.0)
    assert set(norms_of(summary(clip.init(params), params))) == {
        "clip/norm/head",
        "clip/norm/root",
    }


def test_a_masked_clip_names_the_leaves_that_it_saw():
    mask = jax.tree.map(lambda x: x.ndim > 1, TREE)
    tx = optax.masked(oc.clip_by_leaf_norm(1.0), mask)
    report = norms_of(summary(state_of(tx), TREE))
    expected = {"clip/norm/Dense_0/kernel": 3.0, "clip/norm/Dense_1/kernel": 8.0}
    assert report == expected


def test_params_that_the_clip_has_not_seen_give_no_names():
    clip = oc.clip_by_leaf_norm(1.0)
    others = {"other": TREE["Dense_0"], "another": TREE["Dense_1"]}
    report = norms_of(summary(state_of(clip), others))
    assert list(report) == [f"clip/norm/{i}" for i in range(4)]


def test_two_leaves_with_one_path_both_appear():
    tree = {"a": {"b": jnp.array([3.0])}, "a/b": jnp.array([4.0])}
    clip = oc.clip_by_leaf_norm(5.0)
    _, state = clip.update(tree, clip.init(tree))
    assert norms_of(summary(state, tree)) == {"clip/norm/0": 3.0, "clip/norm/1": 4.0}


def test_the_norm_of_a_bare_array_has_no_slash_at_its_end():
    array = jnp.array([3.0, 4.0])
    clip = oc.clip_by_leaf_norm(5.0)
    _, state = clip.update(array, clip.init(array))
    assert norms_of(summary(state, array)) == {"clip/norm": 5.0}


def test_the_culprit_among_some_of_the_leaves_has_its_name():
    mask = jax.tree.map(lambda x: x.ndim > 1, TREE)
    tx = optax.masked(oc.skip_if_nonfinite(optax.sgd(0.1)), mask)
    bad = TREE | {"Dense_1": {"bias": jnp.ones(1), "kernel": jnp.array([[jnp.nan]])}}
    _, state = tx.update(bad, tx.init(TREE), TREE)
    report = summary(state, TREE)
    assert report["guard/culprit"] == 1
    assert report["guard/culprit/Dense_1/kernel"] == 0


def test_names_survive_a_blend_of_states_and_serialization():
    clip = oc.clip_by_leaf_norm(5.0)
    state = state_of(clip)
    blended = jax.tree.map(lambda x, y: 0.0 * x + 1.0 * y, clip.init(TREE), state)
    assert norms_of(summary(blended, TREE)) == norms_of(summary(state, TREE))


def test_a_donated_state_can_still_be_read_by_its_summary():
    clip = oc.clip_by_leaf_norm(5.0)
    state = state_of(clip)
    report = summary(state, TREE)
    jax.jit(clip.update, donate_argnums=1)(TREE, state)
    assert report["clip/norm/Dense_1/kernel"] == 8.0


def test_it_is_a_mapping():
    report = summary(state_of(oc.clip_by_global_norm(1.0)))
    assert dict(report) == {key: report[key] for key in report}
    assert len(report) == 5
    assert "clip/norm" in report and "clip/nothing" not in report
    assert repr(report) == repr(dict(report))


# --------------------------------------------------------------------------------------
# A clip of elements
# --------------------------------------------------------------------------------------


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
