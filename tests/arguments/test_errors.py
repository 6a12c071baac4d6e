"""Every error says what was expected, what came, where, and what to do."""

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import table
from error_cases import TREE, says, update
from helpers import oc
from optaxclip import norms, thresholds

pytestmark = pytest.mark.usefixtures("strict_shapes")


# --------------------------------------------------------------------------------------
# Leaves that no clip understands
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "leaf", ["text", object(), jnp.sin], ids=["str", "object", "f"]
)
@pytest.mark.parametrize("name", ["global_norm", "leaf_norm", "value", "agc"])
def test_a_leaf_that_is_no_array_raises_with_its_path(name, leaf):
    clip = table.clips[name]()
    bad = {"dense": {"bias": jnp.ones(2), "name": leaf}}
    state = clip.init(TREE)
    with pytest.raises(TypeError) as error:
        clip.update(bad, state, bad)
    says(error, "dense/name", type(leaf).__name__)


@pytest.mark.parametrize("name", ["global_norm", "leaf_norm", "value", "agc"])
def test_shapes_in_update_point_to_eval_shape(name):
    clip = table.clips[name]()
    shapes = jax.eval_shape(lambda x: x, TREE)
    with pytest.raises((TypeError, ValueError)) as error:
        clip.update(shapes, clip.init(TREE), TREE)
    says(error, "jax.eval_shape", "dense/bias")


# --------------------------------------------------------------------------------------
# Thresholds
# --------------------------------------------------------------------------------------


TAKES_A_THRESHOLD = {
    "clip": (oc.clip, "max_delta"),
    "clip_by_value": (oc.clip_by_value, "limit"),
    "clip_by_global_norm": (oc.clip_by_global_norm, "max_norm"),
    "clip_by_leaf_norm": (oc.clip_by_leaf_norm, "max_norm"),
    "clip_by_group_norm": (oc.clip_by_group_norm, "max_norm"),
    "clip_by_block_rms": (oc.clip_by_block_rms, "threshold"),
    "adaptive_grad_clip": (oc.adaptive_grad_clip, "clipping"),
    "clip_by": (lambda t: oc.clip_by(norms.leaf_norms, t), "threshold"),
    "relative_to_params": (
        lambda t: thresholds.relative_to_params(t, norms.leaf_norms),
        "ratio",
    ),
}
every_threshold = pytest.mark.parametrize("name", TAKES_A_THRESHOLD)


@every_threshold
@pytest.mark.parametrize("bad", [-1.0, -3, float("nan"), -float("inf"), np.float32(-2)])
def test_a_negative_or_nan_threshold_raises_when_building(name, bad):
    build, argument = TAKES_A_THRESHOLD[name]
    with pytest.raises(ValueError) as error:
        build(bad)
    says(error, argument, str(bad))


@every_threshold
@pytest.mark.parametrize("bad", [True, "1.0", None, 1j], ids=repr)
def test_a_threshold_of_another_type_raises_when_building(name, bad):
    build, argument = TAKES_A_THRESHOLD[name]
    with pytest.raises(TypeError) as error:
        build(bad)
    says(error, argument, repr(bad))


@every_threshold
@pytest.mark.parametrize("shape", [(1,), (2, 3)], ids=str)
def test_a_threshold_that_is_no_scalar_raises(name, shape):
    build, argument = TAKES_A_THRESHOLD[name]
    with pytest.raises(ValueError) as error:
        build(jnp.ones(shape))
    says(error, argument, str(shape))


@pytest.mark.parametrize("bad", [-1.0, float("nan")])
def test_a_bad_number_in_a_mapping_names_its_pattern(bad):
    with pytest.raises(ValueError) as error:
        oc.clip_by_leaf_norm({"dense": bad, "**": 1.0})
    says(error, "dense", str(bad))


def test_a_threshold_of_another_type_in_a_mapping_names_its_pattern():
    with pytest.raises(TypeError) as error:
        oc.clip_by_value({"dense": "1.0", "**": 1.0})
    says(error, "dense", "'1.0'")


@pytest.mark.parametrize(
    "limit",
    [(1.0, 2.0), (-2.0, -1.0), (1.0, -1.0), (np.float32(1), np.float32(2))],
    ids=["positive", "negative", "reversed", "NumPy"],
)
def test_a_range_without_zero_raises(limit):
    with pytest.raises(ValueError) as error:
        oc.clip_by_value(limit)
    says(error, "low <= 0 <= high", str(limit[0]), str(limit[1]))


@pytest.mark.parametrize("limit", [(np.nan, 1.0), (-1.0, np.nan)], ids=str)
def test_a_range_with_a_nan_raises(limit):
    with pytest.raises(ValueError) as error:
        oc.clip_by_value(limit)
    says(error, "limit", "nan")


@pytest.mark.parametrize("limit", [(), (1.0,), (-1.0, 0.0, 1.0)], ids=str)
def test_a_range_of_other_than_two_raises(limit):
    with pytest.raises((TypeError, ValueError), match=r"\(low, high\)"):
        oc.clip_by_value(limit)


def test_an_asymmetric_range_on_a_complex_leaf_raises_with_its_path():
    clip = oc.clip_by_value((-1.0, 2.0))
    with pytest.raises((TypeError, ValueError)) as error:
        update(clip, {"a": jnp.ones(2), "spectrum": jnp.ones(2, jnp.complex64)})
    says(error, "spectrum", "complex")


def test_a_schedule_that_gives_a_vector_raises():
    clip = oc.clip_by_global_norm(lambda count: jnp.ones(2) * count)
    with pytest.raises(ValueError, match=r"\(2,\)"):
        update(clip, TREE)


# --------------------------------------------------------------------------------------
# States
# --------------------------------------------------------------------------------------


NEEDS_STATE = {
    "schedule": lambda: oc.clip_by_global_norm(lambda count: 1.0),
    "value schedule": lambda: oc.clip_by_value(lambda count: 1.0),
    "schedule in a mapping": lambda: oc.clip_by_leaf_norm({"**": lambda count: 1.0}),
    "rule": lambda: oc.clip_by(norms.leaf_norms, thresholds.lagged(optax.ema(0.9))),
}


@pytest.mark.parametrize("name", NEEDS_STATE)
@pytest.mark.parametrize("state", [None, optax.EmptyState()], ids=str)
def test_a_threshold_with_a_memory_asks_for_its_state(name, state):
    clip = NEEDS_STATE[name]()
    with pytest.raises(ValueError, match=r"`?init"):
        clip.update(TREE, state)


@pytest.mark.parametrize(
    ("saved", "resumed"),
    [
        ("leaf_norm", "global_norm"),
        ("global_norm", "leaf_norm"),
        ("value", "global_norm"),
        ("global_norm", "value"),
        ("lagged_leaf", "leaf_norm"),
        ("leaf_norm", "lagged_leaf"),
    ],
)
def test_the_state_of_another_clip_is_detected(saved, resumed):
    state = table.clips[saved]().init(TREE)
    clip = table.clips[resumed]()
    with pytest.raises((TypeError, ValueError), match="state"):
        clip.update(TREE, state, TREE)


@pytest.mark.parametrize("clip", ["leaf_norm", "lagged_leaf"])
def test_the_state_of_other_params_is_detected(clip):
    clip = table.clips[clip]()
    state = clip.init({"dense": TREE["dense"], "head": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"other params.*`.*clip\.init\(params\)`"):
        clip.update(TREE, state)


@pytest.mark.parametrize(
    ("saved", "resumed"), [("value", "global_norm"), ("leaf_norm", "lagged_leaf")]
)
def test_the_checkpoint_of_another_clip_is_detected(saved, resumed):
    written = flax.serialization.to_bytes(table.clips[saved]().init(TREE))
    fresh = table.clips[resumed]().init(TREE)
    with pytest.raises(ValueError):
        flax.serialization.from_bytes(fresh, written)


# --------------------------------------------------------------------------------------
# Params
# --------------------------------------------------------------------------------------


USES_PARAMS = {
    "agc": lambda: oc.adaptive_grad_clip(0.1),
    "relative_to_params": lambda: oc.clip_by(
        norms.leaf_norms, thresholds.relative_to_params(0.1, norms.leaf_norms)
    ),
}
every_params_clip = pytest.mark.parametrize("name", USES_PARAMS)


@every_params_clip
def test_missing_params_say_what_to_call(name):
    clip = USES_PARAMS[name]()
    with pytest.raises(ValueError) as error:
        clip.update(TREE, clip.init(TREE))
    says(error, "update(updates, state, params)")


@every_params_clip
def test_params_of_another_structure_raise_with_the_path(name):
    clip = USES_PARAMS[name]()
    params = {"dense": {"bias": jnp.ones(2)}}
    with pytest.raises(ValueError) as error:
        clip.update(TREE, clip.init(TREE), params)
    says(error, "dense/kernel")


@every_params_clip
def test_params_of_another_shape_raise_with_the_path(name):
    clip = USES_PARAMS[name]()
    params = {"dense": {"bias": jnp.ones(2), "kernel": jnp.ones((2, 3))}}
    with pytest.raises(ValueError) as error:
        clip.update(TREE, clip.init(TREE), params)
    says(error, "dense/kernel", "(3, 2)", "(2, 3)")
