"""Path patterns, seen through `clip_by_value({pattern: limit})`.

Every leaf is 1000, so the clipped value tells which pattern won.
"""

import collections

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from helpers import oc
from optaxclip._trees import paths as _paths

pytestmark = pytest.mark.usefixtures("strict_shapes")


def tree_of(paths):
    tree = {}
    for path in paths:
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = jnp.array(1000.0)
    return tree


def winners(limits, tree):
    clip = oc.clip_by_value(limits)
    clipped, _ = clip.update(tree, clip.init(tree))
    leaves = jax.tree_util.tree_leaves_with_path(clipped)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): float(leaf)
        for path, leaf in leaves
    }


MODEL = (
    "encoder/block_0/attention/kernel",
    "encoder/block_0/mlp/kernel",
    "encoder/block_1/mlp/kernel",
    "encoder/norm/scale",
    "head/bias",
    "head/kernel",
)


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        ("head/kernel", {"head/kernel"}),
        ("head", {"head/bias", "head/kernel"}),
        ("kernel", {p for p in MODEL if p.endswith("kernel")}),
        ("mlp", {p for p in MODEL if "mlp" in p}),
        ("mlp/kernel", {p for p in MODEL if "mlp" in p}),
        ("block_0", {p for p in MODEL if "block_0" in p}),
        ("block_*", {p for p in MODEL if "block" in p}),
        ("block_*/mlp", {p for p in MODEL if "mlp" in p}),
        ("encoder/*/mlp", {p for p in MODEL if "mlp" in p}),
        ("encoder/*/kernel", set()),
        ("encoder/**/kernel", {p for p in MODEL[:3]}),
        ("encoder/*/*/kernel", {p for p in MODEL[:3]}),
        ("*/bias", {"head/bias"}),
        ("h*", {"head/bias", "head/kernel"}),
        ("head*", {"head/bias", "head/kernel"}),
        ("*head", {"head/bias", "head/kernel"}),
        ("he*ad", {"head/bias", "head/kernel"}),
        ("/head", {"head/bias", "head/kernel"}),
        ("/kernel", set()),
        ("/encoder/block_1", {"encoder/block_1/mlp/kernel"}),
        ("/*/kernel", {"head/kernel"}),
        ("/**/kernel", {p for p in MODEL if p.endswith("kernel")}),
        ("**", set(MODEL)),
        ("*", set(MODEL)),
        ("ead", set()),
        ("head/ker", set()),
        ("block", set()),
        ("Head", set()),
        ("head.kernel", set()),
        ("block_[01]", set()),
        ("block_?", set()),
    ],
)
def test_a_pattern_names_leaves_and_subtrees(pattern, matched):
    if not matched:
        with pytest.raises(ValueError, match="match"):
            winners({pattern: 1.0, "**": 2.0}, tree_of(MODEL))
        return
    # An infinite default is the least specific, so every match is seen.
    limits = {"**": 2.0} | {pattern: 1.0}
    seen = winners(limits, tree_of(MODEL))
    assert {path for path, value in seen.items() if value == 1.0} == matched


@pytest.mark.parametrize(
    ("limits", "winner"),
    [
        ({"kernel": 1.0, "head/kernel": 2.0, "**": 3.0}, 2.0),
        ({"**": 3.0, "head/kernel": 2.0, "kernel": 1.0}, 2.0),
        ({"head": 1.0, "/head/kernel": 2.0, "**": 3.0}, 2.0),
        ({"head": 1.0, "**": 3.0}, 1.0),
        ({"*": 4.0, "head": 1.0}, 1.0),
        ({"*": 4.0, "h*": 1.0, "**": 3.0}, 1.0),
        ({"h*": 1.0, "head": 4.0, "*": 3.0}, 4.0),
        ({"h*/kernel": 1.0, "*/kernel": 4.0, "kernel": 3.0, "**": 5.0}, 1.0),
        ({"**/kernel": 1.0, "head/*": 2.0, "head/kernel": 5.0, "**": 3.0}, 5.0),
    ],
)
def test_the_most_specific_pattern_wins_in_any_order(limits, winner):
    assert winners(limits, tree_of(MODEL))["head/kernel"] == winner


def test_two_equally_specific_patterns_on_one_leaf_raise():
    with pytest.raises(ValueError, match=r"head/kernel") as error:
        winners({"head": 1.0, "kernel": 2.0, "**": 3.0}, tree_of(MODEL))
    assert "'head'" in str(error.value)
    assert "'kernel'" in str(error.value)


@pytest.mark.parametrize(("count", "more"), [(20, r"\]\.$"), (23, r"\] and 3 more\.$")])
def test_a_pattern_that_matches_nothing_is_told_what_there_is(count, more):
    tree = tree_of([f"layer_{i:02}" for i in range(count)])
    with pytest.raises(
        ValueError, match=rf"leaves are \['layer_00', .*'layer_19'{more}"
    ):
        winners({"head": 1.0, "**": 2.0}, tree)


def test_equally_specific_patterns_on_different_leaves_are_fine():
    seen = winners({"head": 1.0, "mlp": 2.0, "**": 3.0}, tree_of(MODEL))
    assert seen["head/kernel"] == 1.0
    assert seen["encoder/block_0/mlp/kernel"] == 2.0


Pair = collections.namedtuple("Pair", ["left", "right"])


@pytest.mark.parametrize(
    ("tree", "limits", "expected"),
    [
        ([jnp.array(9.0), jnp.array(9.0)], {"0": 1.0, "1": 2.0}, [1.0, 2.0]),
        ({"a": (jnp.array(9.0),)}, {"a/0": 1.0}, {"a": (1.0,)}),
        (
            Pair(jnp.array(9.0), jnp.array(9.0)),
            {"left": 1.0, "**": 2.0},
            Pair(1.0, 2.0),
        ),
        (
            {"x/y": {"w": jnp.array(9.0)}, "z": jnp.array(9.0)},
            {"y/w": 1.0, "z": 2.0},
            None,
        ),
        (jnp.array(9.0), {"**": 1.0}, 1.0),
    ],
    ids=["list", "tuple in a dict", "namedtuple", "a key with a slash", "bare array"],
)
def test_paths_are_those_of_any_tree(tree, limits, expected):
    if expected is None:
        expected = {"x/y": {"w": 1.0}, "z": 2.0}
    clip = oc.clip_by_value(limits)
    clipped, _ = clip.update(tree, clip.init(tree))
    chex.assert_trees_all_equal(clipped, jax.tree.map(jnp.asarray, expected))


def test_a_pattern_does_not_see_the_value_key_of_a_box():
    boxed = {"kernel": {"value": jnp.array(9.0)}, "bias": {"value": jnp.array(9.0)}}
    bare = {"kernel": jnp.array(9.0), "bias": jnp.array(9.0)}
    clip = oc.clip_by_leaf_norm({"kernel": 1.0, "bias": 2.0})
    boxed_out, _ = clip.update(boxed, clip.init(bare))
    bare_out, _ = clip.update(bare, clip.init(boxed))
    assert jax.tree.map(float, bare_out) == {"kernel": 1.0, "bias": 2.0}
    assert float(boxed_out["kernel"]["value"]) == 1.0


def test_boxed_leaves_of_one_module_are_one_layer():
    boxes = {name: nn.Partitioned(jnp.ones(2), ("x",)) for name in ("bias", "kernel")}
    tree = {"dense": boxes, "head": nn.Partitioned(jnp.ones(3), ("x",))}
    clip = oc.clip_by_group_norm(1.0)
    _, state = clip.update(tree, clip.init(tree))
    assert [round(float(x) ** 2) for x in state.norms] == [4, 3]
    names = {"dense": {"bias": jnp.ones(2), "kernel": jnp.ones(2)}, "head": jnp.ones(3)}
    assert _paths.paths(tree) == _paths.paths(names)


def test_a_leaf_that_is_called_value_keeps_its_name():
    attention = {"query": jnp.array(9.0), "value": jnp.array(9.0)}
    tree = {"attention": attention, "alone": {"value": jnp.array(9.0)}}
    limits = {"attention/value": 1.0, "query": 2.0, "alone/value": 3.0}
    clip = oc.clip_by_value(limits)
    clipped, _ = clip.update(tree, clip.init(tree))
    assert jax.tree.map(float, clipped) == {
        "attention": {"query": 2.0, "value": 1.0},
        "alone": {"value": 3.0},
    }


def test_a_layer_is_the_leaves_under_one_module_path():
    paths = ("a/b/kernel", "a/b/bias", "a/kernel", "top")
    tree = jax.tree.map(lambda _: jnp.array(1.0), tree_of(paths))
    clip = oc.clip_by_group_norm(10.0)
    _, state = clip.update(tree, clip.init(tree))
    # a/b (two leaves), a (one leaf), and the root (one leaf), by their first leaf.
    assert [round(float(x) ** 2) for x in state.norms] == [2, 1, 1]


# --------------------------------------------------------------------------------------
# Flat names, in which dots separate modules
# --------------------------------------------------------------------------------------

FLAT = (
    "encoder.0.attention.weight",
    "encoder.0.mlp.weight",
    "encoder.1.mlp.weight",
    "head.bias",
    "head.weight",
)


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        ("head.weight", {"head.weight"}),
        ("head/weight", {"head.weight"}),
        ("head", {"head.bias", "head.weight"}),
        ("weight", {p for p in FLAT if p.endswith("weight")}),
        ("encoder.0", {p for p in FLAT if ".0." in p}),
        ("encoder/0", {p for p in FLAT if ".0." in p}),
        ("0.mlp", {"encoder.0.mlp.weight"}),
        ("encoder.*.mlp", {p for p in FLAT if "mlp" in p}),
        ("encoder/*/mlp", {p for p in FLAT if "mlp" in p}),
        ("encoder.**.weight", {p for p in FLAT if "encoder" in p}),
        ("*.weight", {p for p in FLAT if p.endswith("weight")}),
        ("/head", {"head.bias", "head.weight"}),
        ("/mlp", set()),
        ("encoder.1.mlp.w", set()),
        ("ead.weight", set()),
        (".weight", {p for p in FLAT if p.endswith("weight")}),
        ("**", set(FLAT)),
    ],
)
def test_a_dot_in_a_flat_name_separates_as_a_slash_does(pattern, matched):
    tree = dict.fromkeys(FLAT, jnp.array(1000.0))
    if not matched:
        with pytest.raises(ValueError, match="match"):
            winners({pattern: 1.0, "**": 2.0}, tree)
        return
    seen = winners({"**": 2.0} | {pattern: 1.0}, tree)
    assert {path for path, value in seen.items() if value == 1.0} == matched


@pytest.mark.parametrize(
    "limits",
    [
        {"weight": 1.0, "head.weight": 2.0, "**": 3.0},
        {"head": 1.0, "head/weight": 2.0, "**": 3.0},
        {"head.*": 1.0, "head.weight": 2.0, "**": 3.0},
    ],
)
def test_the_pattern_with_more_of_a_flat_name_wins(limits):
    tree = dict.fromkeys(FLAT, jnp.array(1000.0))
    assert winners(limits, tree)["head.weight"] == 2.0


def test_dots_in_the_name_of_a_module_separate_nothing():
    tree = tree_of(["conv_v1.5/kernel", "head.out/kernel"])
    seen = winners({"conv_v1.5": 1.0, "head.out": 2.0}, tree)
    assert seen == {"conv_v1.5/kernel": 1.0, "head.out/kernel": 2.0}
    with pytest.raises(ValueError, match="'conv_v1' matches none"):
        winners({"conv_v1": 1.0, "**": 2.0}, tree)
    with pytest.raises(ValueError, match="'head/out' matches none"):
        winners({"head/out": 1.0, "**": 2.0}, tree)


@pytest.mark.parametrize("pattern", ["", "/", ".", "/."])
def test_a_pattern_of_separators_alone_raises(pattern):
    with pytest.raises(ValueError, match="Write '\\*\\*' to mean every leaf"):
        winners({pattern: 1.0, "**": 2.0}, dict.fromkeys(FLAT, jnp.array(9.0)))


@pytest.mark.parametrize(
    ("tree", "layers"),
    [
        (
            dict.fromkeys(FLAT, 1.0),
            ["encoder.0.attention", "encoder.0.mlp", "encoder.1.mlp", "head"],
        ),
        ({"a": {"l1.w": 1.0, "l1.b": 1.0, "w": 1.0}}, ["a/l1", "a"]),
        ({"mlp/~/linear_0": {"w": 1.0, "b": 1.0}}, ["mlp/~/linear_0"]),
        (
            {"v1.5": {"w": 1.0, "b": 1.0}, "v1.6": {"w": 1.0}},
            ["v1.5", "v1.6"],
        ),
        ({".w": 1.0, "b": 1.0}, ["root"]),
        ({"a": {".w": 1.0, "b": 1.0}}, ["a"]),
    ],
    ids=["flat", "mixed", "haiku", "module", "root", "nothing before the dot"],
)
def test_layers_of_flat_names(tree, layers):
    tree = jax.tree.map(jnp.asarray, tree)
    clip = oc.clip_by_group_norm(10.0)
    _, state = clip.update(tree, clip.init(tree))
    seen = oc.summary(state, tree)
    assert state.norms.shape == (len(layers),)
    found = {name.removeprefix("clip/norm/") for name in seen if "/norm/" in name}
    assert found == set(layers)


def test_layers_of_flat_names_are_clipped_apart():
    sizes = {"l1.weight": 30.0, "l1.bias": 40.0, "l2.weight": 3.0, "l2.bias": 4.0}
    grads = {name: jnp.array([size]) for name, size in sizes.items()}
    clipped, _ = oc.clip_by_group_norm(5.0).update(grads, None)
    found = {name: round(float(x[0]), 5) for name, x in clipped.items()}
    assert found == {"l1.weight": 3, "l1.bias": 4, "l2.weight": 3, "l2.bias": 4}
