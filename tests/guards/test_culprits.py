"""A guard says who was to blame, wherever it stands."""

import flax.core
import flax.serialization
import flax.training.train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import helpers
from guard_cases import (
    PATHS,
    bits,
    every_bad,
    guarded,
    params_with_negative_zeros,
    stepper,
)
from helpers import oc
from optaxclip import norms, summary


def one_bad_step(tx, paths, steps_before=0, **extra_args):
    """The state after some good steps and one with NaN at the paths."""
    params = helpers.random_tree(seed=3)
    good = helpers.random_tree(seed=1)
    bad = good
    for path in paths:
        bad = helpers.vary(bad, path, np.nan)
    state, step = tx.init(params), stepper(tx)
    for updates in [good] * steps_before + [bad]:
        params, state = step(params, state, updates, **extra_args)
    return state, params


@pytest.mark.parametrize("path", PATHS)
def test_the_culprit_is_named_with_its_step(path):
    report = summary(*one_bad_step(guarded("sgd")[0], [path], steps_before=3))
    assert int(report["guard/culprit"]) == PATHS.index(path)
    assert int(report[f"guard/culprit/{path}"]) == 3
    assert int(report["guard/last_skipped_step"]) == 3
    assert int(report["guard/skipped_count"]) == 1
    assert float(report["guard/skipped_fraction"]) == 0.25


def test_of_several_culprits_the_first_is_named_and_the_state_has_all():
    state, params = one_bad_step(guarded("sgd")[0], PATHS[1:])
    report = summary(state, params)
    assert int(report["guard/culprit"]) == 1
    assert "guard/culprit/dense/kernel" in report
    assert "guard/culprit/head/kernel" not in report
    assert list(state.culprits) == [False, True, True]


def test_without_params_the_culprit_is_a_number():
    state, _ = one_bad_step(guarded("sgd")[0], PATHS[1:2])
    report = summary(state)
    assert int(report["guard/culprit/1"]) == 0


def test_inside_of_jit_the_culprit_is_a_number_and_has_its_name_outside():
    state, params = one_bad_step(guarded("sgd")[0], PATHS[1:2])
    listed = []

    @jax.jit
    def read(state, params):
        report = summary(state, params)
        listed.extend(report)
        return report

    report = read(state, params)
    assert int(report["guard/culprit"]) == 1
    assert not any(key.startswith("guard/culprit/") for key in listed)
    assert f"guard/culprit/{PATHS[1]}" in report
    assert {key: value.shape for key, value in report.items()} == dict.fromkeys(
        report, ()
    )


def test_before_the_first_skip_there_is_no_culprit():
    tx, step = guarded("sgd")
    params = helpers.random_tree()
    _, state = step(params, tx.init(params), params)
    report = summary(state, params)
    assert int(report["guard/culprit"]) == -1
    assert int(report["guard/last_skipped_step"]) == -1
    assert not any(key.startswith("guard/culprit/") for key in report)


def test_the_culprit_stays_until_the_next_skip():
    tx, step = guarded("sgd")
    state, params = one_bad_step(tx, PATHS[2:])
    params, state = step(params, state, helpers.random_tree())
    report = summary(state, params)
    assert int(report["guard/culprit/head/kernel"]) == 0
    assert int(report["guard/consecutive_count"]) == 0


@every_bad
def test_a_bad_loss_is_a_reason_without_a_culprit(bad):
    tx, step = guarded("adam")
    params = params_with_negative_zeros()
    new_params, state = step(params, tx.init(params), params, value=jnp.float32(bad))
    assert bits(new_params) == bits(params)
    report = summary(state, params)
    assert int(report["guard/skipped_count"]) == 1
    assert int(report["guard/culprit"]) == -1


def test_a_loss_of_many_numbers_is_bad_if_one_is():
    tx, step = guarded("sgd")
    params = helpers.random_tree()
    losses = jnp.array([1.0, jnp.nan])
    assert int(step(params, tx.init(params), params, value=losses)[1].skipped_count)


@every_bad
def test_a_watched_loss_is_no_culprit_either(bad):
    tx = oc.skip_if_spike(optax.sgd(0.1), norm=None, threshold=2.0)
    params = helpers.random_tree()
    step = stepper(tx)
    for loss in (bad, 3.0):
        _, state = step(params, tx.init(params), params, value=jnp.float32(loss))
        report = summary(state, params)
        assert int(report["guard/skipped_count"]) == 1
        assert int(report["guard/culprit"]) == -1


def test_several_guards_are_numbered_from_the_outermost():
    inner = oc.skip_if_nonfinite(optax.sgd(0.1))
    tx = oc.skip_if_spike(inner, norms.leaf_norms, {"head": 0.01, "**": jnp.inf})
    report = summary(*one_bad_step(tx, []))
    assert int(report["guard_0/culprit/head/kernel"]) == 0
    assert int(report["guard_1/skipped_count"]) == 0
    assert int(report["guard_1/culprit"]) == -1


def test_the_clips_inside_of_a_guard_are_reported_as_well():
    tx = oc.skip_if_nonfinite(
        optax.chain(oc.clip_by_leaf_norm(1.0), oc.clip_by_group_norm(1.0))
    )
    report = summary(*one_bad_step(tx, PATHS[:1], steps_before=1))
    assert int(report["clip_0/update_count"]) == 1
    assert np.isfinite(float(report["clip_0/norm/dense/bias"]))
    assert "clip_1/norm/dense" in report
    assert "guard/culprit/dense/bias" in report


def head_only():
    return {"dense": {"bias": False, "kernel": False}, "head": {"kernel": True}}


CONTAINERS = {
    "chain": lambda tx: optax.chain(tx, optax.scale(1.0)),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 1).gradient_transformation(),
    "named_chain": lambda tx: optax.named_chain(("guard", tx)),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_guard_is_found_in(container):
    tx = CONTAINERS[container](oc.skip_if_nonfinite(optax.sgd(0.1)))
    report = summary(*one_bad_step(tx, PATHS[1:]))
    (culprit,) = [key for key in report if "/culprit/" in key]
    assert culprit.startswith("guard")
    assert culprit.endswith("/culprit/dense/kernel")


def test_inside_of_a_mask_it_sees_its_leaves_only_and_names_them():
    tx = optax.masked(oc.skip_if_nonfinite(optax.sgd(0.1)), head_only())
    report = summary(*one_bad_step(tx, PATHS[2:]))
    assert int(report[f"guard/culprit/{PATHS[2]}"]) == 0
    assert int(summary(*one_bad_step(tx, PATHS[:1]))["guard/skipped_count"]) == 0


def test_a_partition_skips_its_part_alone():
    tx = optax.partition(
        {
            "a": oc.skip_if_nonfinite(optax.sgd(0.1)),
            "b": oc.skip_if_nonfinite(optax.sgd(0.1)),
        },
        {"dense": "a", "head": "b"},
    )
    params = helpers.random_tree(seed=3)
    bad = helpers.vary(helpers.random_tree(seed=1), "dense/kernel", np.nan)
    new_params, state = stepper(tx)(params, tx.init(params), bad)
    assert bits(new_params["dense"]) == bits(params["dense"])
    assert bits(new_params["head"]) != bits(params["head"])
    report = summary(state, params)
    assert int(report["guard/a/skipped_count"]) == 1
    assert int(report["guard/b/skipped_count"]) == 0


def test_a_train_state_skips():
    params = params_with_negative_zeros()
    state = flax.training.train_state.TrainState.create(
        apply_fn=None, params=params, tx=oc.skip_if_nonfinite(optax.adam(0.1))
    )
    bad = helpers.vary(helpers.random_tree(), "head/kernel", np.inf)
    state = state.apply_gradients(grads=bad)
    assert bits(state.params) == bits(params)
    report = summary(state, state.params)
    assert "guard/culprit/head/kernel" in report


def test_an_nnx_optimizer_skips():
    class Network(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Linear(2, 3, rngs=rngs)
            self.b = nnx.Linear(3, 1, rngs=rngs)

    model = Network(nnx.Rngs(0))
    tx = oc.skip_if_nonfinite(optax.adam(0.1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    before = bits(nnx.state(model, nnx.Param))

    @nnx.jit
    def step(model, optimizer, scale):
        def gradient(x):
            return jnp.ones_like(x) * (scale if x.shape == (3, 1) else 1.0)

        params = nnx.state(model, nnx.Param)
        optimizer.update(model, jax.tree.map(gradient, params))

    step(model, optimizer, jnp.nan)
    params = nnx.state(model, nnx.Param)
    assert bits(params) == before
    assert int(summary(optimizer, params)["guard/culprit/b/kernel"]) == 0
    step(model, optimizer, jnp.float32(1.0))
    assert bits(nnx.state(model, nnx.Param)) != before
