"""Numbers that newcomers give: a pair as two arguments, thresholds of 0 and below."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from helpers import oc
from mistake_cases import CHAIN, TREE, step
from optaxclip import norms, thresholds

# --------------------------------------------------------------------------------------
# A pair as two arguments, and gradients as the first of them
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build",
    [
        functools.partial(oc.clip_by_value, -0.5, 0.5),
        functools.partial(oc.clip, -0.5, 0.5),
        functools.partial(oc.clip_cotangent, jnp.ones(2), -0.5, 0.5),
        functools.partial(oc.clip_preactivation, jnp.tanh, -0.5, 0.5),
    ],
    ids=["clip_by_value", "clip", "clip_cotangent", "clip_preactivation"],
)
def test_a_range_as_two_arguments_says_that_it_is_a_pair(build):
    with pytest.raises(TypeError, match=r"one argument, a pair: `\(-0\.5, 0\.5\)`"):
        build()


@pytest.mark.parametrize("limit", [-0.5, np.float32(-0.5)])
def test_a_negative_limit_says_how_to_give_a_range(limit):
    with pytest.raises(
        ValueError, match=r"limit >= 0, got -0\.5.*pair.*\(-0\.5, 0\.5\)"
    ):
        oc.clip_by_value(limit)


ONE_ARGUMENT = {
    "clip_by_global_norm": (oc.clip_by_global_norm, 1),
    "clip_by_leaf_norm": (oc.clip_by_leaf_norm, 1),
    "clip_by_group_norm": (oc.clip_by_group_norm, 2),
    "clip_by_block_rms": (oc.clip_by_block_rms, 1),
    "clip_singular_values": (oc.clip_singular_values, 1),
    "clip_by_spectral_norm": (oc.clip_by_spectral_norm, 2),
}


@pytest.mark.parametrize("name", ONE_ARGUMENT)
def test_a_clip_is_no_function_of_updates(name):
    make, count = ONE_ARGUMENT[name]
    message = rf"`{name}\(\w+.*got {count + 1} arguments.*optaxclip\.clip_with_norm"
    with pytest.raises(TypeError, match=message):
        make(TREE, *[1.0] * count)


@pytest.mark.parametrize("name", ["clip_by_value", "clip", *ONE_ARGUMENT])
def test_what_counts_arguments_keeps_its_signature(name):
    first = {"clip_by_value": "limit", "clip": "max_delta"}
    (parameter, *_) = inspect.signature(getattr(oc, name)).parameters
    assert parameter == first.get(name, parameter) and parameter != "args"
    make = optax.inject_hyperparams(getattr(oc, name))
    step(make(**{parameter: 0.5}))


# --------------------------------------------------------------------------------------
# Thresholds of 0, and below
# --------------------------------------------------------------------------------------


OFF = r"threshold of 0, which makes all updates zero.*`jnp\.inf`.*set_to_zero"
ZERO = {
    "clip_by_global_norm": oc.clip_by_global_norm,
    "clip_by_leaf_norm": oc.clip_by_leaf_norm,
    "clip_by_group_norm": oc.clip_by_group_norm,
    "clip_by_block_rms": oc.clip_by_block_rms,
    "clip_by_value": oc.clip_by_value,
    "clip": oc.clip,
    "clip_by": lambda x: oc.clip_by(norms.leaf_norms, x),
    "adaptive_grad_clip": oc.adaptive_grad_clip,
    "clip_singular_values": oc.clip_singular_values,
    "clip_by_spectral_norm": oc.clip_by_spectral_norm,
    "clip_with_norm": lambda x: oc.clip_with_norm(TREE, 5.0, x),
    "per_example": lambda x: oc.per_example_clipped_grad(jnp.vdot, x),
}


@pytest.mark.parametrize("name", ZERO)
@pytest.mark.parametrize("zero", [0, 0.0, np.float32(0)], ids=repr)
def test_a_number_0_warns_once_that_it_is_not_off(name, zero):
    with pytest.warns(UserWarning, match=OFF) as found:
        ZERO[name](zero)
    (warning,) = found
    assert warning.filename == __file__


@pytest.mark.parametrize("make", [oc.clip_by_value, oc.clip_by_global_norm])
def test_a_number_0_gives_zeros_all_the_same(make):
    with pytest.warns(UserWarning, match=OFF):
        clip = make(0.0)
    clipped, _ = clip.update(TREE, None)
    assert all((x == 0).all() for x in jax.tree.leaves(clipped))


@pytest.mark.parametrize(
    "make",
    [
        lambda: oc.clip_by_leaf_norm({"bias": 0.0, "**": 1.0}),
        lambda: oc.clip_by_value({"bias": 0, "**": 1.0}),
        lambda: oc.clip_by_value((0.0, 1.0)),
        lambda: oc.clip_by_global_norm(jnp.zeros(())),
        lambda: oc.clip_by_global_norm(lambda count: 0.0),
        lambda: oc.clip_by_global_norm(optax.linear_schedule(0.0, 1.0, 9)),
        lambda: oc.clip_by_value(optax.linear_schedule(1.0, 0.0, 9)),
    ],
)
def test_a_0_that_is_meant_says_nothing(make):
    step(make())  # warnings are errors


def test_an_injected_0_says_nothing():
    step(optax.inject_hyperparams(oc.clip_by_global_norm)(max_norm=jnp.zeros(())))


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (
            optax.constant_schedule(-1.0),
            r"`constant_schedule`, which gives -1 at step 0",
        ),
        (optax.linear_schedule(1.0, -1.0, 9), r"`polynomial_schedule`.*-1 at step \d+"),
        (optax.linear_schedule(-1.0, 1.0, 9), r"which gives -1 at step 0"),
    ],
    ids=["constant", "falling", "rising"],
)
@pytest.mark.parametrize("make", [oc.clip_by_global_norm, oc.clip_by_value, oc.clip])
def test_a_schedule_of_optax_below_0_raises_when_building(make, schedule, message):
    with pytest.raises(ValueError, match=message):
        make(schedule)


def test_a_schedule_of_ones_own_may_fall_below_0_after_the_end_of_a_run():
    parts = [optax.linear_schedule(0.0, 1.0, 9), lambda count: 1 - 0.001 * count]
    for schedule in (parts[1], optax.join_schedules(parts, [9])):
        step(oc.clip_by_global_norm(schedule))


def test_a_schedule_of_a_traced_number_is_not_asked():
    def clipped(updates, limit):
        clip = oc.clip_by_global_norm(optax.constant_schedule(limit))
        return clip.update(updates, clip.init(updates))[0]

    found = jax.jit(clipped)(jnp.array([3.0, 4.0]), 1.0)
    np.testing.assert_allclose(found, [0.6, 0.8], rtol=1e-6)


def test_a_clip_that_is_built_inside_shard_map_is_asked_there():
    def clipped(updates):
        rule = optax.chain(optax.ema(0.9), optax.scale(0.5))
        for threshold in (rule, optax.linear_schedule(1.0, 0.1, 9)):
            clip = oc.clip_by_global_norm(threshold)
            updates, _ = clip.update(updates, clip.init(updates))
        with pytest.raises(TypeError, match=CHAIN):
            oc.clip_by_global_norm(optax.adam(1e-3))
        with pytest.raises(ValueError, match="which gives -1"):
            oc.clip_by_global_norm(optax.constant_schedule(-1.0))
        return updates

    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    mapped = jax.shard_map(clipped, mesh=mesh, in_specs=spec, out_specs=spec)
    found = jax.jit(mapped)(jnp.array([3.0, 4.0]))
    np.testing.assert_allclose(found, [0.6, 0.8], rtol=1e-6)


def test_a_clip_is_built_under_strict_promotion_as_elsewhere():
    with jax.numpy_dtype_promotion("strict"):
        oc.clip_by_global_norm(optax.cosine_decay_schedule(1.0, 9))
        with pytest.raises(TypeError, match=CHAIN):
            oc.clip_by_global_norm(optax.adafactor(1e-3))


def test_losses_may_be_negative():
    schedule = optax.constant_schedule(-1.0)
    oc.skip_if_spike(optax.sgd(0.1), None, schedule)
    with pytest.raises(ValueError, match="which gives -1"):
        oc.skip_if_spike(optax.sgd(0.1), threshold=schedule)


@pytest.mark.parametrize("make", [oc.clip_by_global_norm, oc.clip_by_value])
@pytest.mark.parametrize(
    "bad", [None, "1.0", thresholds.z_score()], ids=["N", "s", "r"]
)
def test_a_schedule_returns_numbers(make, bad):
    with pytest.raises(TypeError, match="what the schedule returns to be a number"):
        step(make(lambda count: bad))


def test_a_schedule_of_limits_that_returns_a_negative_number_raises():
    with pytest.raises(ValueError, match=r"what the schedule returns >= 0, got -1\.0"):
        step(oc.clip_by_value(lambda count: -1.0))
