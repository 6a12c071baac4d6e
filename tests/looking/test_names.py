"""A name in `summary` is right, or a number."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from helpers import oc
from optaxclip import summary
from states import TREE, state_of

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
