"""`record` keeps what every step of a run was like, and changes nothing of it."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from helpers import oc
from optaxclip import norms
from optaxclip._looking import record as _record
from record_cases import PARAMS, PATHS, gradients, l2, optimizer, rows, run


def test_the_updates_and_the_state_inside_are_those_of_the_optimizer():
    grads = gradients(5, bad=[3])
    state, updates = run(oc.record(optimizer(), size=4), grads)
    expected, others = run(optimizer(), grads)
    chex.assert_trees_all_equal(updates, others)
    chex.assert_trees_all_equal(state.recorded_state, expected)


def test_a_row_has_loss_norms_and_what_the_clip_saw():
    grads = gradients(6)
    state, _ = run(oc.record(optimizer(), size=8), grads, [3.0, 1, 4, 1, 5, 9])
    found = rows(state)
    assert list(found["step"]) == [0, 1, 2, 3, 4, 5]
    assert list(found["width"]) == [1] * 6
    assert list(found["loss"]) == [3, 1, 4, 1, 5, 9]
    np.testing.assert_allclose(found["norm"], [l2(x) for x in grads], rtol=1e-6)
    heads = np.array([l2(x["head"]) for x in grads])
    np.testing.assert_allclose(found["norm/head"], heads, rtol=1e-6)
    np.testing.assert_allclose(found["clip/norm/head"], heads, rtol=1e-6)
    assert list(found["clip/max_norm/head"]) == [2] * 6
    factors = np.minimum(1, 2 / heads)
    np.testing.assert_allclose(found["clip/factor/head"], factors, rtol=1e-6)
    factors = [found[f"clip/factor/{path}"] for path in PATHS]
    np.testing.assert_array_equal(found["clipped"], np.any(np.less(factors, 1), axis=0))
    assert not np.any(found["skipped"]) and not np.any(found["nonfinite"])
    assert not any(key.startswith("peak/") for key in found)


def test_names_of_clips_are_those_of_summary():
    clips = oc.clip_by_leaf_norm(1.0), oc.clip_by_global_norm(1.0), oc.clip(0.1)
    state, _ = run(oc.record(optax.chain(*clips)), gradients(1))
    found = {key: x for key, x in rows(state).items() if key.startswith("clip_")}
    expected = {
        key: value
        for key, value in oc.summary(state, PARAMS).items()
        if "update_count" not in key and ("clip_2" in key or "fraction" not in key)
    }
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert found[key][-1] == value


def test_columns_are_in_forward_order():
    params = {f"Dense_{i}": jnp.ones(1) for i in range(12)}
    tx = oc.record(optax.sgd(0.1), size=2)
    _, state = tx.update(params, tx.init(params))
    found = _record.rows(state, tuple(sorted(params)))
    names = [key for key in found if key.startswith("norm/")]
    assert names == [f"norm/Dense_{i}" for i in range(12)]
    unnamed = [key for key in _record.rows(state) if key.startswith("norm/")]
    assert unnamed == [f"norm/{i}" for i in range(12)]


def test_stretches_have_peaks_and_counts():
    grads = gradients(21, bad=[5])
    state, _ = run(oc.record(optimizer(), size=4), grads)
    found = rows(state)
    assert list(found["width"]) == [8, 8, 1, 1, 1, 1, 1]
    assert np.sum(found["width"]) == 21 and np.all(np.diff(found["step"]) > 0)
    size = [l2(x) for x in grads]
    largest = [np.nanmax(size[:8]), max(size[8:16]), *size[16:]]
    np.testing.assert_allclose(found["peak/norm"], largest, rtol=1e-6)
    assert list(found["nonfinite"]) == [1, 0, 0, 0, 0, 0, 0]
    step = found["step"][1]
    np.testing.assert_allclose(found["norm"][1], size[step], rtol=1e-6)
    assert found["loss"][1] == step


def test_of_a_run_that_ends_in_nan_the_first_bad_step_and_those_before_are_kept():
    grads = gradients(40, bad=range(6, 40))
    found = rows(run(oc.record(optimizer(), size=8), grads)[0])
    assert list(found["step"]) == [0, 1, 2, 3, 4, 5, 6]
    assert list(found["width"]) == [1] * 6 + [34]
    assert list(found["nonfinite"]) == [0] * 6 + [34]
    assert found["loss"][6] == 6 and np.isnan(found["norm"][6])
    assert np.isnan(found["norm/dense/bias"][6])
    assert np.isfinite(found["norm/dense/kernel"][6])
    assert np.isnan(found["clip/factor/dense/bias"][6])


def test_it_goes_on_after_a_nan():
    found = rows(run(oc.record(optimizer(), size=8), gradients(6, bad=[2, 3]))[0])
    assert list(found["step"]) == [0, 1, 2, 4, 5]
    assert list(found["width"]) == [1, 1, 2, 1, 1]


@pytest.mark.parametrize("loss", [np.nan, np.inf, -np.inf])
def test_a_loss_that_is_not_finite_is_shown_and_counted(loss):
    state, _ = run(oc.record(optimizer(), size=4), gradients(3), [1.0, loss, 2.0])
    found = rows(state)
    np.testing.assert_array_equal(found["loss"], [1, loss, 2])
    assert list(found["nonfinite"]) == [0, 1, 0]


def test_a_loss_that_is_not_given_is_no_loss_that_is_nan():
    tx, (grads,) = oc.record(optimizer(), size=4), gradients(1)
    _, state = tx.update(grads, tx.init(PARAMS), PARAMS)
    assert "loss" not in rows(state)
    assert list(rows(state)["nonfinite"]) == [0]
    _, state = tx.update(grads, state, PARAMS, value=jnp.nan)
    _, state = tx.update(grads, state, PARAMS, value=2)
    np.testing.assert_array_equal(rows(state)["loss"], [np.nan, np.nan, 2])
    assert list(rows(state)["nonfinite"]) == [0, 1, 0]
    assert list(rows(tx.init(PARAMS))["step"]) == []


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_norms_whose_squares_leave_the_range_are_exact_and_the_state_is_finite(scale):
    grads = jax.tree.map(lambda x: np.float32(scale) * x, gradients(6))
    tx = oc.record(optimizer(oc.clip_by_global_norm(jnp.inf)), size=2)
    state, _ = run(tx, grads)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state))
    found = rows(state)
    size = np.array([l2(x) for x in grads])
    np.testing.assert_allclose(found["norm"], size[found["step"]], rtol=1e-6)
    assert np.all(np.isinf(found["clip/max_norm"]))


@pytest.mark.parametrize(
    ("norm", "names"),
    [
        (norms.leaf_norms, ["dense/bias", "dense/kernel", "head"]),
        (norms.group_norms(), ["dense", "root"]),
        (norms.global_norm, []),
        (lambda x: 2 * norms.global_norm(x), ["0"]),
    ],
)
def test_the_norm_says_which_columns_there_are(norm, names):
    grads = gradients(2, bad=[1])
    found = rows(run(oc.record(optax.sgd(0.1), norm, 2), grads)[0])
    assert [x for x in found if x.startswith("norm/")] == [f"norm/{x}" for x in names]
    np.testing.assert_allclose(found["norm"], [l2(grads[0]), np.nan], rtol=1e-6)
    assert list(found["nonfinite"]) == [0, 1]


def test_layers_of_a_stack_have_a_column_each():
    params = {"blocks": {"kernel": jnp.array([[3.0, 4.0], [0.3, 0.4]])}}
    tx = oc.over_layers(oc.record(oc.clip_by_leaf_norm(1.0), size=2), {"blocks": 0})
    _, state = tx.update(params, tx.init(params))
    found = _record.rows(state, ("blocks/kernel",))
    for prefix in "norm", "clip/norm":
        np.testing.assert_allclose(found[f"{prefix}/blocks/0/kernel"], [5.0])
        np.testing.assert_allclose(found[f"{prefix}/blocks/1/kernel"], [0.5])
    np.testing.assert_allclose(found["norm"], [25.25**0.5], rtol=1e-6)


# --------------------------------------------------------------------------------------
# Guards and accumulation
# --------------------------------------------------------------------------------------


def test_a_step_that_a_guard_inside_skips_is_recorded_as_skipped():
    tx = oc.record(oc.skip_if_nonfinite(optimizer()), size=8)
    found = rows(run(tx, gradients(5, bad=[2]))[0])
    assert list(found["skipped"]) == [0, 0, 1, 0, 0] == list(found["nonfinite"])
    assert np.isnan(found["norm"][2]) and np.isfinite(found["norm/head"][2])
    assert np.all(np.isnan(found["clip/factor/head"]) == [0, 0, 1, 0, 0])
    assert found["clipped"][2] == 0


def test_a_spike_that_a_guard_inside_skips_is_recorded_with_its_norm():
    tx = oc.record(oc.skip_if_spike(optimizer(), threshold=100.0), size=8)
    grads = gradients(4)
    grads[2] = jax.tree.map(lambda x: 1e3 * x, grads[2])
    found = rows(run(tx, grads)[0])
    assert list(found["skipped"]) == [0, 0, 1, 0]
    np.testing.assert_allclose(found["norm"][2], l2(grads[2]), rtol=1e-6)
    assert not np.any(found["nonfinite"])


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: x.gradient_transformation()])
def test_around_multi_steps_micro_steps_are_rows_and_the_clip_has_seen_every_other(
    wrap,
):
    tx = oc.record(wrap(optax.MultiSteps(optimizer(), 2)), size=8)
    grads = gradients(4)
    found = rows(run(tx, grads)[0])
    np.testing.assert_allclose(found["norm"], [l2(x) for x in grads], rtol=1e-6)
    assert np.all(np.isnan(found["clip/norm/head"]) == [1, 0, 1, 0])
    assert list(found["clipped"]) == [0, found["clipped"][1], 0, found["clipped"][3]]
    assert np.any(found["clipped"])
    mean = (grads[0]["head"] + grads[1]["head"]) / 2
    np.testing.assert_allclose(found["clip/norm/head"][1], l2(mean), rtol=1e-6)


def test_inside_multi_steps_whole_steps_are_rows():
    tx = optax.MultiSteps(oc.record(optimizer(), size=4), 2).gradient_transformation()
    state, _ = run(tx, gradients(6))
    assert list(rows(state.inner_opt_state)["step"]) == [0, 1, 2]


@pytest.mark.parametrize("guard", [oc.skip_if_nonfinite, oc.skip_if_spike])
def test_a_guard_around_a_record_raises(guard):
    inner = oc.record(optax.sgd(0.1))
    message = r"nothing inside of a guard that records.*`record\(skip_if_nonfinite"
    with pytest.raises(ValueError, match=message):
        guard(inner)
    with pytest.raises(ValueError, match=message):
        guard(oc.over_axes(inner, {}))
    with pytest.raises(ValueError, match=message):
        guard(optax.chain(optax.identity(), inner)).init(PARAMS)


# --------------------------------------------------------------------------------------
# Mistakes
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 3, 100, 2.0, True, None])
def test_a_size_that_is_no_power_of_two_raises(size):
    with pytest.raises(
        ValueError, match=r"power of two, at least 2, got .*256 is usua"
    ):
        oc.record(optax.sgd(0.1), size=size)


def test_what_is_no_transformation_raises():
    with pytest.raises(TypeError, match=r"`inner` to be a transformation.*sgd"):
        oc.record(0.1)


def test_what_is_no_norm_raises():
    with pytest.raises(TypeError, match="norm"):
        oc.record(optax.sgd(0.1), 1.0)
    with pytest.raises(ValueError, match=r"one of\s+units.*`norms.leaf_norms`"):
        oc.record(optax.sgd(0.1), norms.unit_norms).init(PARAMS)


@pytest.mark.parametrize("loss", [jnp.ones(2), jnp.array(1j)])
def test_a_loss_that_is_not_one_real_number_raises(loss):
    tx = oc.record(optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"one real number.*jax.lax.pmean"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, value=loss)


def test_a_loss_by_another_name_raises():
    tx = oc.record(optax.sgd(0.1))
    with pytest.raises(TypeError, match=r"`value=`, got `loss=`, which nobody looks"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, loss=1.0)


def test_a_state_that_belongs_to_another_optimizer_raises():
    tx = oc.record(optax.sgd(0.1))
    other = tx.init(PARAMS["dense"])
    with pytest.raises(ValueError, match=r"with 5 columns, got 4.*tx.init\(params\)"):
        tx.update(PARAMS, other, PARAMS)
    with pytest.raises(TypeError, match="Expected a state of type RecordState"):
        tx.update(PARAMS, PARAMS, PARAMS)
