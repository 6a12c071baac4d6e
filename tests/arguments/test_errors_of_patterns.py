"""What is said of patterns, norms, labels and factors that do not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from error_cases import TREE, says, update
from helpers import oc
from optaxclip import factors, norms, thresholds

pytestmark = pytest.mark.usefixtures("strict_shapes")


# --------------------------------------------------------------------------------------
# Patterns
# --------------------------------------------------------------------------------------


TAKES_PATTERNS = {
    "clip_by_value": lambda p: oc.clip_by_value({p: 1.0, "**": 2.0}),
    "clip_by_leaf_norm": lambda p: oc.clip_by_leaf_norm({p: 1.0, "**": 2.0}),
    "labels": lambda p: oc.clip_by_group_norm(1.0, {p: "a", "**": "b"}),
    "exclude": lambda p: oc.adaptive_grad_clip(0.1, exclude=(p,)),
    "axis": lambda p: oc.adaptive_grad_clip(0.1, axis={p: 0, "**": 0}),
}


@pytest.mark.parametrize("name", TAKES_PATTERNS)
def test_a_pattern_that_matches_nothing_lists_the_paths(name):
    clip = TAKES_PATTERNS[name]("decoder")
    with pytest.raises(ValueError) as error:
        clip.update(TREE, clip.init(TREE), TREE)
    says(error, "decoder", "dense/bias", "dense/kernel")


@pytest.mark.parametrize("name", TAKES_PATTERNS)
def test_a_pattern_that_matches_nothing_is_fine_on_an_empty_tree(name):
    clip = TAKES_PATTERNS[name]("decoder")
    clip.update({}, clip.init({}), {})


NO_DEFAULT = {
    "clip_by_value": lambda: oc.clip_by_value({"kernel": 1.0}),
    "clip_by_leaf_norm": lambda: oc.clip_by_leaf_norm({"kernel": 1.0}),
    "labels": lambda: oc.clip_by_group_norm(1.0, {"kernel": "a"}),
}


@pytest.mark.parametrize("name", NO_DEFAULT)
def test_a_leaf_that_no_pattern_covers_asks_for_a_default(name):
    clip = NO_DEFAULT[name]()
    with pytest.raises(ValueError) as error:
        update(clip, TREE)
    says(error, "dense/bias", "kernel", "**")


AMBIGUOUS = {
    "clip_by_value": lambda: oc.clip_by_value({"dense": 1.0, "kernel": 2.0}),
    "clip_by_leaf_norm": lambda: oc.clip_by_leaf_norm({"dense": 1.0, "kernel": 2.0}),
    "labels": lambda: oc.clip_by_group_norm(1.0, {"dense": "a", "kernel": "b"}),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_two_equally_specific_patterns_name_the_leaf(name):
    clip = AMBIGUOUS[name]()
    with pytest.raises(ValueError) as error:
        update(clip, TREE)
    says(error, "dense/kernel", "'dense'", "'kernel'")


@pytest.mark.parametrize(
    "make",
    [oc.clip_by_global_norm, oc.clip_by_group_norm],
    ids=["global", "group"],
)
def test_a_scope_under_two_thresholds_raises(make):
    clip = make({"bias": 1.0, "kernel": 2.0})
    with pytest.raises(ValueError) as error:
        update(clip, TREE)
    says(error, "'bias'", "'kernel'")


def test_a_mapping_must_not_be_empty():
    with pytest.raises(ValueError, match="pattern"):
        update(oc.clip_by_leaf_norm({}), TREE)


def test_a_pattern_must_be_a_string():
    with pytest.raises(TypeError, match="3"):
        update(oc.clip_by_leaf_norm({3: 1.0, "**": 1.0}), TREE)


def test_a_single_exclusion_is_not_read_letter_by_letter():
    clip = oc.adaptive_grad_clip(0.1, exclude="kernel")
    params = jax.tree.map(lambda x: 0.1 * x, TREE)
    clipped, _ = clip.update(TREE, clip.init(TREE), params)
    np.testing.assert_array_equal(clipped["dense"]["kernel"], TREE["dense"]["kernel"])
    assert (clipped["dense"]["bias"] < TREE["dense"]["bias"]).all()


# --------------------------------------------------------------------------------------
# Norms, labels, factors
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ord", [0.5, 0, -1, float("nan")])
@pytest.mark.parametrize(
    "norm", [norms.global_norm, norms.leaf_norms, norms.unit_norms]
)
def test_an_ord_below_one_raises(norm, ord):
    with pytest.raises(ValueError, match="ord") as error:
        norm(TREE, ord=ord)
    says(error, str(ord))


@pytest.mark.parametrize("ord", ["fro", None, True], ids=repr)
def test_an_ord_of_another_type_raises(ord):
    with pytest.raises((TypeError, ValueError), match="ord"):
        norms.global_norm(TREE, ord=ord)


def test_a_unit_of_unknown_rank_asks_for_its_axes():
    with pytest.raises(ValueError) as error:
        norms.unit_norms({"deep": jnp.ones((2,) * 6)})
    says(error, "deep", "axis", "(2, 2, 2, 2, 2, 2)")


@pytest.mark.parametrize("axis", [2, (0, 5), -3], ids=str)
def test_an_axis_out_of_range_raises_with_the_path(axis):
    with pytest.raises(ValueError) as error:
        norms.unit_norms({"w": jnp.ones((2, 2))}, axis=axis)
    says(error, "w", "axis", "(2, 2)")


def test_labels_of_another_structure_raise():
    clip = oc.clip_by_group_norm(1.0, lambda updates: {"dense": {"bias": "a"}})
    with pytest.raises(ValueError, match="label"):
        update(clip, TREE)


@pytest.mark.parametrize("labels", [3, "dense"], ids=repr)
def test_labels_of_another_type_raise_when_building(labels):
    with pytest.raises(TypeError, match="labels"):
        oc.clip_by_group_norm(1.0, labels)


@pytest.mark.parametrize("norm", [2.0, "global", None], ids=repr)
def test_a_norm_must_be_a_function(norm):
    with pytest.raises(TypeError, match="norm"):
        oc.clip_by(norm, 1.0)


@pytest.mark.parametrize("factor", ["rescale", 0.5], ids=repr)
def test_a_factor_must_be_a_function(factor):
    with pytest.raises(TypeError, match="factor"):
        oc.clip_by(norms.global_norm, 1.0, factor=factor)


def test_a_norm_that_is_no_prefix_of_the_updates_raises():
    clip = oc.clip_by(lambda updates: {"other": jnp.float32(1)}, 1.0)
    with pytest.raises(ValueError, match="norm"):
        update(clip, TREE)


@pytest.mark.parametrize("wrapper", [thresholds.lagged, thresholds.clipped_history])
def test_a_history_is_made_of_a_rule(wrapper):
    with pytest.raises(TypeError, match="GradientTransformation"):
        wrapper(1.0)


def test_factors_are_public():
    names = {"rescale", "normalize", "drop", "soften"}
    assert names <= set(dir(factors))
