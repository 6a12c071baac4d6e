"""A record around all sorts of optimizers, and what is read from it afterwards."""

from typing import Any

import equinox
import flax.linen
import flax.training.train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import helpers
from helpers import oc
from optaxclip import norms
from recorded import (
    PARAMS,
    PATHS,
    SIZE,
    clip_then_sgd,
    clipped_sgd,
    run,
    scanned,
    sizes,
    steps,
)

LABELS = {"dense": {"bias": "a", "kernel": "a"}, "head": {"kernel": "b"}}


def history(inner, scales, params=PARAMS, size=8, **losses):
    return oc.history(run(oc.record(inner, size=size), scales, **losses), params)


# --------------------------------------------------------------------------------------
# The optimizer goes as without
# --------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Any] = {
    "adam": lambda: optax.adam(0.1),
    "clip": clipped_sgd,
    "schedule": lambda: optax.sgd(optax.linear_schedule(1.0, 0.0, 10)),
    "partition": lambda: optax.partition(
        {"a": clip_then_sgd(1.0), "b": optax.adam(0.1)}, LABELS
    ),
    "masked": lambda: optax.masked(
        oc.clip_by_leaf_norm(1.0), {"dense": True, "head": False}
    ),
    "inject": lambda: optax.inject_hyperparams(optax.sgd)(
        learning_rate=optax.linear_schedule(1.0, 0.0, 10)
    ),
    "multi_steps": lambda: optax.MultiSteps(clipped_sgd(), 2),
    "nonfinite": lambda: oc.skip_if_nonfinite(clipped_sgd()),
    "spike": lambda: oc.skip_if_spike(optax.adam(0.1), threshold=20.0),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(0.1), 3),
}
QUICK = ("schedule",)


@pytest.mark.parametrize("name", helpers.all_but(OPTIMIZERS, QUICK))
def test_updates_are_those_of_the_optimizer_bit_for_bit(name):
    inner: Any = OPTIMIZERS[name]()
    tx, grads = oc.record(inner, size=SIZE), steps((1.0, 9.0, np.nan, 1.0))
    if isinstance(inner, optax.MultiSteps):
        inner = inner.gradient_transformation()
    inner = optax.with_extra_args_support(inner)
    params, state, expected = PARAMS, tx.init(PARAMS), inner.init(PARAMS)
    update, right = jax.jit(tx.update), jax.jit(inner.update)
    for i in range(4):
        one = jax.tree.map(lambda x, i=i: x[i], grads)
        ours, state = update(one, state, params)
        updates, expected = right(one, expected, params)
        assert helpers.bits(ours) == helpers.bits(updates)
        params = optax.apply_updates(params, updates)
    assert helpers.bits(state.recorded_state) == helpers.bits(expected)
    assert sum(oc.history(state)["width"]) == 4


# --------------------------------------------------------------------------------------
# Accumulation
# --------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_around_accumulation_micro_steps_are_rows_and_the_clip_sees_every_other():
    scales = (1.0, 2.0, 3.0, 4.0)
    seen = history(optax.MultiSteps(clip_then_sgd(1.0), 2), scales)
    grads = steps(scales)
    means = jax.tree.map(lambda x: (x[0::2] + x[1::2]) / 2, grads)
    np.testing.assert_allclose(seen["norm"], sizes(grads), rtol=1e-6)
    assert list(seen["clipped"]) == [0, 1, 0, 1]
    assert list(np.isnan(seen["clip/norm"])) == [True, False, True, False]
    np.testing.assert_allclose(seen["clip/norm"][1::2], sizes(means), rtol=1e-6)
    assert not seen["nonfinite"].any()


@pytest.mark.thorough
def test_inside_of_accumulation_whole_steps_are_rows():
    scales = (1.0, 2.0, 3.0, 4.0, 5.0)
    tx: Any = optax.MultiSteps(oc.record(clip_then_sgd(), size=8), 2)
    state = run(tx.gradient_transformation(), scales)
    means = jax.tree.map(lambda x: (x[0:4:2] + x[1:4:2]) / 2, steps(scales))
    seen = oc.history(state, PARAMS)
    assert list(seen["step"]) == [0, 1]
    np.testing.assert_allclose(seen["norm"], sizes(means), rtol=1e-6)


@pytest.mark.thorough
def test_a_step_that_optax_refuses_has_not_reached_the_clip():
    inner = optax.apply_if_finite(clip_then_sgd(1.0), 3)
    seen = history(inner, (1.0, np.nan, 2.0))
    assert list(seen["nonfinite"]) == [0, 1, 0]
    assert list(seen["clipped"]) == [1, 0, 1]
    assert list(np.isnan(seen["clip/factor"])) == [False, True, False]


# --------------------------------------------------------------------------------------
# Guards
# --------------------------------------------------------------------------------------


def test_a_step_that_a_guard_inside_skips_is_seen_with_the_leaf_to_blame():
    grads = steps((1.0, 1.0, 1.0))
    grads["head"]["kernel"] = grads["head"]["kernel"].at[1, 0, 0].set(np.inf)
    tx = oc.record(oc.skip_if_nonfinite(clip_then_sgd(1.0)), size=8)
    (_, state), _ = jax.jit(lambda g: scanned(tx, PARAMS, g))(grads)
    seen = oc.history(state, PARAMS)
    assert list(seen["skipped"]) == [0, 1, 0]
    assert list(seen["nonfinite"]) == [0, 1, 0]
    assert list(seen["clipped"]) == [1, 0, 1]
    assert not np.isfinite(seen["norm"][1])
    broken = [x for x in PATHS if not np.isfinite(seen[f"norm/{x}"][1])]
    assert broken == ["head/kernel"]
    assert np.isnan(seen["clip/norm"][1])  # the clip has not seen it


@pytest.mark.thorough
def test_a_spike_that_a_guard_inside_skips_is_no_fault_and_of_two_one_is_enough():
    inner = oc.skip_if_nonfinite(clip_then_sgd(100.0))
    guard = oc.skip_if_spike(inner, threshold=20.0)
    scales = (1.0, 50.0, np.nan, 1.0)
    seen = history(guard, scales)
    assert list(seen["skipped"]) == [0, 1, 1, 0]
    assert list(seen["nonfinite"]) == [0, 0, 1, 0]
    np.testing.assert_allclose(seen["norm"][1], sizes(steps(scales))[1], rtol=1e-6)


@pytest.mark.thorough
def test_one_that_comes_from_within_is_skipped_though_its_norm_is_finite():
    tx = optax.chain(optax.scale(1.0), optax.scale_by_schedule(lambda n: 1 / (n - 1)))
    seen = history(oc.skip_if_nonfinite(tx), (1.0, 1.0, 1.0))
    assert list(seen["skipped"]) == [0, 1, 1]
    assert not seen["nonfinite"].any()


AROUND: dict[str, Any] = {
    "at once": lambda tx: tx,
    "chain": lambda tx: optax.chain(oc.clip_by_global_norm(1.0), tx),
    "masked": lambda tx: optax.masked(tx, {"dense": True, "head": False}),
    "stacks": lambda tx: oc.over_layers(tx, {"dense": None}),
    "guard": oc.skip_if_nonfinite,
    "multi_steps": lambda tx: optax.MultiSteps(tx, 2),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 2),
}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("guard", [oc.skip_if_nonfinite, oc.skip_if_spike])
def test_a_guard_around_a_record_raises_before_the_first_step(guard, around):
    with pytest.raises(ValueError, match=r"record.*outside.*`record\(skip_if_nonf"):
        guard(AROUND[around](oc.record(optax.sgd(0.1)))).init(PARAMS)


@pytest.mark.thorough
def test_keep_if_skipped_and_summary_see_the_guard_and_the_clip_inside():
    tx = oc.record(oc.skip_if_nonfinite(clip_then_sgd(1.0)), size=8)
    state = run(tx, (1.0, 1.0, np.nan))
    told = oc.summary(state, PARAMS)
    assert told["guard/skipped_count"] == 1
    assert told["guard/culprit/dense/bias"] == 2
    assert told["clip/update_count"] == 2
    kept = oc.keep_if_skipped(state, {"mean": jnp.zeros(2)}, {"mean": jnp.ones(2)})
    assert not kept["mean"].any()


# --------------------------------------------------------------------------------------
# The loss
# --------------------------------------------------------------------------------------


def test_a_loss_that_is_nan_is_a_fault_and_one_that_is_missing_is_none():
    losses = np.array([1.0, np.nan, np.inf, 2.0, -np.inf, 0.0], np.float32)
    seen = history(optax.sgd(0.1), [1.0] * 6, value=losses)
    assert list(seen["nonfinite"]) == [0, 2, 0, 1, 0]
    np.testing.assert_array_equal(seen["loss"], [1.0, np.nan, 2.0, -np.inf, 0.0])
    without = history(optax.sgd(0.1), [1.0] * 6)
    assert "loss" not in without
    assert not without["nonfinite"].any()


@pytest.mark.thorough
def test_a_loss_that_is_passed_now_and_then_is_missing_in_between():
    tx, state = oc.record(optax.sgd(0.1), size=2), None
    update = jax.jit(tx.update)
    state = tx.init(PARAMS)
    for i in range(3):
        extra = {"value": jnp.float16(3.0)} if i == 1 else {"value": None}
        _, state = update(PARAMS, state, PARAMS, **extra)
    seen = oc.history(state)
    np.testing.assert_array_equal(seen["loss"], [np.nan, 3.0, np.nan])
    assert not seen["nonfinite"].any()


@pytest.mark.parametrize("name", ["loss", "train_loss", "loss_value"])
def test_a_loss_by_another_name_raises(name):
    tx = oc.record(optax.sgd(0.1))
    with pytest.raises(TypeError, match=rf"`value=`, got `{name}=`"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, **{name: 1.0})


@pytest.mark.thorough
def test_extra_arguments_reach_the_optimizer_inside():
    tx = oc.record(optax.contrib.reduce_on_plateau(patience=1), size=2)
    state: Any = tx.init(PARAMS)
    for _ in range(3):
        _, state = jax.jit(tx.update)(PARAMS, state, PARAMS, value=1.0)
    assert list(oc.history(state)["loss"]) == [1.0, 1.0, 1.0]
    assert float(state.recorded_state.scale) < 1


# --------------------------------------------------------------------------------------
# Flax and Equinox
# --------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_in_an_nnx_optimizer_rows_have_loss_and_names():
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    tx = oc.record(clip_then_sgd(0.1), size=2)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: jnp.sum(m(jnp.ones(3)) ** 2))(model)
        optimizer.update(model, grads, value=loss)
        return loss, grads

    found = [step(model, optimizer) for _ in range(3)]
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    for seen in (
        oc.history(optimizer, params),
        oc.history(optimizer.opt_state, nnx.state(model, nnx.Param)),
    ):
        np.testing.assert_allclose(seen["loss"], [loss for loss, _ in found])
        grads = [nnx.to_pure_dict(x) for _, x in found]
        right = [np.linalg.norm(x["kernel"]) for x in grads]
        np.testing.assert_allclose(seen["norm/kernel"], right, rtol=1e-6)
        assert list(seen["clipped"]) == [1, 1, 1]


@pytest.mark.thorough
def test_in_a_flax_train_state_it_is_found():
    model = flax.linen.Dense(1)
    params = model.init(jax.random.key(0), jnp.ones((1, 3)))
    tx = oc.record(clip_then_sgd(), size=2)
    state = flax.training.train_state.TrainState.create(
        apply_fn=model.apply, params=params, tx=tx
    )
    step = jax.jit(lambda state: state.apply_gradients(grads=state.params))
    after = step(step(state))
    seen = oc.history(after, params)
    right = [helpers.truth(x.params)["params"]["kernel"] for x in (state, step(state))]
    np.testing.assert_allclose(
        seen["norm/params/kernel"], [np.linalg.norm(x) for x in right], rtol=1e-6
    )


@pytest.mark.thorough
def test_filtered_params_of_equinox_are_named_by_what_is_left():
    model = equinox.nn.MLP(2, 1, 3, 1, key=jax.random.key(0))
    params = equinox.filter(model, equinox.is_inexact_array)
    assert any(x is None for x in jax.tree.leaves(params, is_leaf=lambda x: x is None))
    tx = oc.record(optax.sgd(0.1), size=2)
    _, state = jax.jit(tx.update)(params, tx.init(params), params)
    seen = oc.history(state, params)
    named = {name for name in seen if name.startswith("norm/")}
    assert named == {f"norm/layers/{i}/{x}" for i in (0, 1) for x in ("weight", "bias")}
    weight: Any = model.layers[1].weight
    np.testing.assert_allclose(
        seen["norm/layers/1/weight"], np.linalg.norm(weight), rtol=1e-6
    )


# --------------------------------------------------------------------------------------
# Verdicts
# --------------------------------------------------------------------------------------


def trained(rate, count, size=32):
    """A line through points, by gradient descent: it explodes at a rate above 1."""
    x = jax.random.normal(jax.random.key(0), (64,))
    tx = oc.record(clip_then_sgd(jnp.inf, rate), size=size)

    def step(carry, _):
        params, state = carry
        loss, grads = jax.value_and_grad(
            lambda p: jnp.mean((p["w"] * x + p["b"] - 3 * x - 1) ** 2)
        )(params)
        updates, state = tx.update(grads, state, params, value=loss)
        return (optax.apply_updates(params, updates), state), None

    params = {"b": jnp.zeros(()), "w": jnp.zeros(())}
    carry = params, tx.init(params)
    carry, _ = jax.jit(lambda c: jax.lax.scan(step, c, length=count))(carry)
    return oc.history(carry[1], params)


def test_of_a_run_that_explodes_the_steps_before_are_there_thousands_of_steps_later():
    seen = trained(rate=3.0, count=5000)
    first = seen["step"][np.flatnonzero(seen["nonfinite"])[0]]
    before = (seen["step"] < first) & (seen["step"] >= first - 20)
    assert list(seen["step"][before]) == list(range(first - 20, first))
    assert np.all(np.isfinite(seen["norm"][before]))
    assert np.all(np.diff(seen["norm"][before]) > 0)
    assert sum(seen["nonfinite"]) == sum(seen["width"]) - first == 5000 - first
    told = oc.diagnose(seen)
    assert next(iter(told)) == "exploded"
    assert f"step {first}" in told["exploded"]


def test_a_run_that_trains_is_healthy():
    told = oc.diagnose(trained(rate=0.05, count=400))
    assert set(told) <= {"healthy", "never_clipped"}
    assert "400 steps" in told["healthy"]


@pytest.mark.thorough
def test_loss_scaling_at_work_is_told_from_a_fault():
    scales = np.ones(100)
    scales[[20, 60]] = np.inf
    losses = np.exp(-np.arange(100) / 50).astype(np.float32)
    inner = oc.skip_if_nonfinite(optax.chain(oc.unscale(1.0), clip_then_sgd()))
    told = oc.diagnose(history(inner, scales, size=32, value=losses))
    assert (
        {"overflow_skips", "healthy"}
        <= set(told)
        <= {
            "overflow_skips",
            "healthy",
            "never_clipped",
        }
    )


# --------------------------------------------------------------------------------------
# Errors
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 3, 100, -4, 8.0, True, None])
def test_a_size_that_is_no_power_of_two_raises(size):
    with pytest.raises(ValueError, match=r"power of two, at least 2, got .*256"):
        oc.record(optax.sgd(0.1), size=size)


def test_a_norm_that_is_no_function_raises():
    norm: Any = 1.0
    with pytest.raises(TypeError, match=r"norm.*got 1\.0"):
        oc.record(optax.sgd(0.1), norm)


def test_what_is_no_optimizer_raises():
    inner: Any = 0.1
    with pytest.raises(TypeError, match=r"inner.*0\.1"):
        oc.record(inner)


def test_a_norm_of_units_raises():
    with pytest.raises(ValueError, match=r"got one of units.*leaf_norms"):
        oc.record(optax.sgd(0.1), norms.unit_norms).init(PARAMS)


OTHERS: dict[str, Any] = {
    "of the optimizer inside": (optax.adam(0.1), "RecordState"),
    "of another norm": (
        oc.record(optax.adam(0.1), norms.global_norm),
        r"5 columns, got 2.*tx\.init\(params\)",
    ),
}


@pytest.mark.parametrize("whose", OTHERS)
def test_a_state_of_something_else_raises(whose):
    other, message = OTHERS[whose]
    tx = oc.record(optax.adam(0.1))
    with pytest.raises((TypeError, ValueError), match=message):
        tx.update(PARAMS, other.init(PARAMS), PARAMS)
