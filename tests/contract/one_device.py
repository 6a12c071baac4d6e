"""The contract on one device, where small leaves are joined: most users have one.

`test_one_device.py` runs it in a process of its own:

    OPTAXCLIP_DEVICES=1 pytest tests/contract/one_device.py
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import helpers
import in_numpy
from helpers import oc
from optaxclip import norms
from optaxclip._measure import layouts, units as _units
from optaxclip._trees import leaves as _leaves
from table import every_clip, first_step, references

LIMIT = 8192  # elements; from here on a leaf is reduced by itself

# Of each size several leaves, with others between them. Layers of one size as well.
SHAPES = {
    "attention": {"bias": (3,), "kernel": (4, 3)},
    "before": {"bias": (LIMIT - 1,), "kernel": (LIMIT // 64 - 1, 64)},
    "dense": {"bias": (4,), "kernel": (4, 3)},
    "embedding": {"kernel": (LIMIT // 64, 64), "scale": ()},
    "head": {"kernel": (3, 2)},
    "last": {"bias": (3,), "kernel": (4, 3)},
    "norms": [{"bias": (LIMIT,)}, {"bias": (4,), "scale": ()}, {"bias": (LIMIT + 1,)}],
    "scale": (),
}
# What passes through, with an effect on no place of the others.
OTHERS = {"count": jnp.arange(3), "empty": jnp.zeros((0, 3)), "nothing": None}
INF = float("inf")


def test_this_process_has_one_device():
    assert jax.device_count() == 1


def where(sequence, value):
    return [i for i, other in enumerate(sequence) if other == value]


def test_the_leaves_are_on_both_sides_of_the_limit_and_out_of_order():
    sizes = [x.size for x in jax.tree.leaves(helpers.random_tree(shapes=SHAPES))]
    assert {layouts.ON_CPU.small + d for d in (-1, 0, 1)} <= set(sizes)
    small = [size for size in sizes if size < layouts.ON_CPU.small]
    joined = [i for size in dict.fromkeys(small) for i in where(small, size)]
    assert joined != sorted(joined)


def in_two_dtypes(seed, scale=1.0):
    """Every second leaf is bfloat16, so leaves of one size are in both."""
    leaves, treedef = jax.tree.flatten(
        helpers.random_tree(seed=seed, scale=scale, shapes=SHAPES)
    )
    leaves[1::2] = [leaf.astype(jnp.bfloat16) for leaf in leaves[1::2]]
    return treedef.unflatten(leaves)


@every_clip()
def test_the_first_step_is_the_formula_in_float64_rounded_once(name):
    updates, params = in_two_dtypes(seed=1, scale=2.0), in_two_dtypes(seed=2)
    between = {"dummies": OTHERS}
    clipped, _ = first_step(name)(updates | between, params | between)
    assert jax.tree.structure(clipped.pop("dummies")) == jax.tree.structure(OTHERS)
    expected = references[name](helpers.truth(updates), helpers.truth(params))
    helpers.assert_close(clipped, expected, of=name)


# --------------------------------------------------------------------------------------
# Norms
# --------------------------------------------------------------------------------------


def by_own_path(updates):
    names = helpers.paths_of(updates)
    return jax.tree.unflatten(jax.tree.structure(updates), names)


def by_last_part(updates):
    return jax.tree.map(lambda path: path.rpartition("/")[2], by_own_path(updates))


NORMS = {
    "global": (norms.global_norm, in_numpy.every_leaf_together),
    "leaf": (norms.leaf_norms, in_numpy.each_leaf),
    "layer": (lambda u, ord: norms.group_norms(ord=ord)(u), in_numpy.layer),
    "last part": (
        lambda u, ord: norms.group_norms(by_last_part, ord=ord)(u),
        lambda path: path.rpartition("/")[2],
    ),
}


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize(
    ("ord", "magnitude"), [(1, 1.0), (2, 1e-30), (2, 1e30), (3, 1.0), (INF, 1.0)]
)
def test_the_norms_are_those_of_float64(kind, ord, magnitude):
    norm, label = NORMS[kind]
    updates = helpers.random_tree(scale=magnitude, shapes=SHAPES)
    found = jax.jit(functools.partial(norm, ord=ord))(updates)
    names, leaves = helpers.paths_of(updates), jax.tree.leaves(helpers.truth(updates))
    pairs = list(zip(map(label, names), leaves, strict=True))
    right = [
        in_numpy.vector_norm([x for other, x in pairs if other == own], ord)
        for own, _ in pairs
    ]
    given = jax.tree.leaves(found) if kind != "global" else [found] * len(pairs)
    np.testing.assert_allclose(given, right, rtol=2e-6)


@pytest.mark.parametrize("ord", [1, 2, 3, INF])
@pytest.mark.parametrize("axis", [None, {"kernel": 1, "**": None}], ids=["0", "1"])
def test_the_norms_of_units_are_those_of_float64(axis, ord):
    updates = helpers.random_tree(shapes=SHAPES)
    found = jax.jit(functools.partial(norms.unit_norms, axis=axis, ord=ord))(updates)

    def unit_norm(leaf):
        along = (1 if axis else 0) if leaf.ndim > 1 else None
        rows = np.atleast_1d(leaf)
        return np.linalg.norm(rows, ord=ord, axis=along, keepdims=True)

    right = jax.tree.map(unit_norm, helpers.truth(updates))
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True)
    for ours, true in pairs:
        np.testing.assert_allclose(np.reshape(ours, true.shape), true, rtol=2e-6)


def test_dozens_of_groups_in_any_order_have_their_own_norms():
    draw = np.random.default_rng(0)
    sizes = draw.choice([1, 3, 4, LIMIT - 1, LIMIT], size=60)
    groups = draw.permutation(np.arange(60) % 23)
    leaves = [draw.normal(size=size).astype(np.float32) for size in sizes]
    clip: Any = oc.clip_by_group_norm(1.0, lambda _: [f"{g:02d}" for g in groups])
    clipped, state = jax.jit(clip.update)(leaves, clip.init(leaves))
    members = [[leaves[i] for i in where(groups, own)] for own in range(23)]
    right = list(map(in_numpy.vector_norm, members))
    order = list(dict.fromkeys(groups))  # as the leaves come
    np.testing.assert_allclose(state.norms, np.array(right)[order], rtol=2e-6)
    for leaf, group, ours in zip(leaves, groups, clipped, strict=True):
        true = leaf.astype(np.float64) / max(right[group], 1.0)
        np.testing.assert_allclose(ours, true, rtol=2e-6)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 9, 10, 24, 25])
def test_every_leaf_gets_the_entry_of_its_scope(count):
    # On a CPU they are taken out in blocks of the root of the count.
    places = np.random.default_rng(count).permutation(count)
    scopes = [(int(place),) for place in places]
    leaves = _leaves.flatten([jnp.ones(1)] * count)
    entries = _units.of_leaf(jnp.arange(1.0, count + 1), scopes, leaves)
    np.testing.assert_array_equal(np.array(entries)[places], np.arange(1.0, count + 1))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_statistics_of_a_clip_by_value_take_one_look(dtype):
    clip, updates = oc.clip_by_value(0.01), {"w": jnp.ones((1024, 512), dtype)}
    compiled = jax.jit(clip.update, donate_argnums=0).lower(updates, clip.init(updates))
    text = compiled.compile().as_text() or ""
    (look,) = (line for line in text.splitlines() if " reduce(" in line)
    assert "= (f32[1]{0}, s32[1]{0}) reduce(" in look  # of both numbers
    assert " reduce-window(" not in text


@pytest.mark.parametrize(("rows", "looks"), [(2**16 - 1, 1), (2**16, 2)])
def test_leaves_of_more_elements_than_an_int32_counts_are_looked_at_twice(rows, looks):
    clip: Any = oc.clip_by_value(0.01)
    updates = jax.ShapeDtypeStruct((rows, 2**15), jnp.float32)
    text = jax.jit(clip.update).lower(updates, clip.init(updates)).as_text()
    assert text.count("stablehlo.reduce(") == looks
