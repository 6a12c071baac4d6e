"""Norms: hand-computed cases, units by rank and pattern, groups, derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import helpers
import in_numpy
from helpers import oc
from optaxclip import norms

pytestmark = pytest.mark.usefixtures("strict_shapes")

TRIANGLE = {"b": jnp.array([-4.0]), "w": jnp.array([0.0, 3.0])}
INF = float("inf")


@pytest.mark.parametrize(
    ("ord", "expected"),
    [
        (1, 7.0),
        (1.5, (3**1.5 + 8.0) ** (2 / 3)),
        (2, 5.0),
        (3, (27.0 + 64.0) ** (1 / 3)),
        (100, 4.0 * (1 + 0.75**100) ** 0.01),
        (INF, 4.0),
    ],
)
def test_global_norm_of_a_triangle(ord, expected):
    norm = norms.global_norm(TRIANGLE, ord=ord)
    assert norm.shape == ()
    assert norm.dtype == jnp.float32
    np.testing.assert_allclose(norm, expected, rtol=1e-6)


def test_global_norm_is_at_the_top_level_too():
    assert oc.global_norm is norms.global_norm
    np.testing.assert_array_equal(oc.global_norm(TRIANGLE), 5.0)


@pytest.mark.parametrize(("ord", "expected"), [(1, 7.0), (2, 5.0), (INF, 4.0)])
def test_leaf_norms_keep_the_tree(ord, expected):
    sizes = norms.leaf_norms({"a": jnp.array([3.0, -4.0]), "b": jnp.ones(1)}, ord=ord)
    np.testing.assert_allclose(sizes["a"], expected, rtol=1e-6)
    np.testing.assert_allclose(sizes["b"], 1.0, rtol=1e-6)


def test_leaf_rms_divides_by_the_root_of_the_size():
    sizes = norms.leaf_rms({"a": jnp.array([[3.0, 4.0], [0.0, 0.0]]), "b": jnp.ones(9)})
    np.testing.assert_allclose(sizes["a"], 2.5, rtol=1e-6)
    np.testing.assert_allclose(sizes["b"], 1.0, rtol=1e-6)


def test_group_norms_give_each_leaf_the_norm_of_its_layer():
    updates = {
        "dense": {"bias": jnp.array([3.0]), "kernel": jnp.array([[4.0]])},
        "head": {"kernel": jnp.array([[2.0]])},
    }
    sizes = norms.group_norms()(updates)
    np.testing.assert_allclose(jax.tree.leaves(sizes), [5.0, 5.0, 2.0], rtol=1e-6)


@pytest.mark.parametrize(
    "labels",
    [
        {"kernel": "weights", "**": "rest"},
        lambda updates: jax.tree.map(jnp.ndim, updates),
    ],
    ids=["patterns", "callable"],
)
@pytest.mark.parametrize(("ord", "expected"), [(2, [3.0, 5.0]), (1, [3.0, 7.0])])
def test_group_norms_take_labels(labels, ord, expected):
    updates = {
        "dense": {"bias": jnp.array([3.0]), "kernel": jnp.array([[4.0]])},
        "head": {"kernel": jnp.array([[3.0]])},
    }
    bias, dense, head = jax.tree.leaves(norms.group_norms(labels, ord=ord)(updates))
    np.testing.assert_allclose([bias, dense, head], [expected[0]] + 2 * [expected[1]])


# --------------------------------------------------------------------------------------
# Units
# --------------------------------------------------------------------------------------

# Optax's conventions for the axes of a unit, by rank.
DEFAULT_AXES = [
    ((), None),
    ((5,), (0,)),
    ((1, 5), (0, 1)),
    ((4, 3), (0,)),
    ((2, 3, 4), (0,)),
    ((2, 2, 3, 4), (0, 1, 2)),
    ((2, 2, 2, 3, 4), (0, 1, 2, 3)),
]


@pytest.mark.parametrize(("shape", "axis"), DEFAULT_AXES, ids=str)
def test_units_have_default_axes_by_rank(shape, axis):
    x = helpers.random_tree(shapes={"x": shape})["x"]
    sizes = norms.unit_norms({"x": x})["x"]
    expected = np.sqrt(np.sum(helpers.truth(x) ** 2, axis=axis, keepdims=True))
    assert sizes.shape == expected.shape
    np.testing.assert_allclose(sizes, expected, rtol=1e-6)


@pytest.mark.parametrize("axis", [0, -1, (0, 2), (1, 2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("ord", [1, 2, 3, INF])
def test_units_take_any_axes(axis, ord):
    x = helpers.random_tree(shapes={"x": (2, 1, 3, 2, 2, 2)})["x"]
    sizes = norms.unit_norms({"x": x}, ord=ord, axis=axis)["x"]
    powers = np.abs(helpers.truth(x))
    if ord == INF:
        expected = np.max(powers, axis=axis, keepdims=True)
    else:
        expected = np.sum(powers**ord, axis=axis, keepdims=True) ** (1 / ord)
    np.testing.assert_allclose(sizes, expected, rtol=1e-6)


def test_units_take_axes_by_pattern():
    updates = {"conv": {"kernel": jnp.ones((2, 3, 5))}, "dense": jnp.ones((4, 6))}
    sizes = norms.unit_norms(updates, axis={"conv": (0, 1), "**": 1})
    assert sizes["conv"]["kernel"].shape == (1, 1, 5)
    assert sizes["dense"].shape == (4, 1)
    np.testing.assert_allclose(sizes["conv"]["kernel"], np.full((1, 1, 5), 6**0.5))
    np.testing.assert_allclose(sizes["dense"], np.full((4, 1), 6**0.5))


# --------------------------------------------------------------------------------------
# Types and edges
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("empty", [{}, [], None, {"a": jnp.zeros((0, 3))}], ids=str)
@pytest.mark.parametrize("ord", [1, 2, 3, INF])
def test_an_empty_tree_has_norm_zero(empty, ord):
    assert norms.global_norm(empty, ord=ord) == 0.0


def test_norms_are_float32_or_wider(dtype):
    updates, _ = helpers.updates_and_params(dtype, scale=1.0)
    expected = jnp.dtype("float64" if dtype == jnp.float64 else "float32")
    assert norms.global_norm(updates).dtype == expected
    assert {x.dtype for x in jax.tree.leaves(norms.leaf_norms(updates))} == {expected}
    exact = in_numpy.vector_norm(jax.tree.leaves(helpers.truth(updates)))
    np.testing.assert_allclose(norms.global_norm(updates), exact, rtol=1e-6)


def test_a_tree_with_one_float64_leaf_has_a_float64_norm(x64):
    norm = norms.global_norm([jnp.float32(3), jnp.float64(4), jnp.float16(12)])
    assert norm.dtype == jnp.float64
    assert norm == 13.0


def test_integers_booleans_and_keys_are_not_counted():
    others = {"n": jnp.array([100]), "f": jnp.array(True), "k": jax.random.key(0)}
    assert norms.global_norm(TRIANGLE | others) == 5.0


def test_complex_numbers_count_by_modulus():
    assert norms.global_norm([jnp.array([3.0 + 4.0j]), jnp.array([12.0])]) == 13.0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("ord", [1, 1.5, 2, INF])
def test_a_non_finite_element_gives_a_non_finite_norm(ord, bad):
    norm = norms.global_norm({"a": jnp.array([bad, 1.0]), "b": jnp.ones(3)}, ord=ord)
    assert not np.isfinite(norm)


@pytest.mark.parametrize("scale", [1e-37, 1e-30, 1e-20, 1e-10, 1e10, 1e20, 3e37])
@pytest.mark.parametrize("ord", [1, 1.5, 2, 3, 100, INF])
def test_global_norm_is_exact_over_the_whole_range(ord, scale):
    updates = [jnp.array([3.0, -4.0, 0.5]) * scale, jnp.array([1.0]) * scale]
    exact = in_numpy.vector_norm(helpers.truth(updates), ord=ord)
    np.testing.assert_allclose(norms.global_norm(updates, ord=ord), exact, rtol=1e-6)


# --------------------------------------------------------------------------------------
# Derivatives
# --------------------------------------------------------------------------------------

NORMS = {
    "global": norms.global_norm,
    "leaf": norms.leaf_norms,
    "unit": norms.unit_norms,
    "layer": lambda updates, ord: norms.group_norms(ord=ord)(updates),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("ord", helpers.all_but([1, 1.5, 2, 3, 100, INF], [2, 3]))
def test_the_derivative_is_finite_at_zero(norm, ord):
    def total(updates):
        sizes = NORMS[norm](updates, ord=ord)
        return sum(jnp.sum(x) for x in jax.tree.leaves(sizes))

    zeros = {"w": jnp.zeros((2, 3)), "partly": jnp.array([0.0, 2.0])}
    gradient = jax.jit(jax.grad(total))(zeros)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))


def test_the_derivative_of_the_rms_is_finite_at_zero():
    gradient = jax.grad(lambda x: norms.leaf_rms({"x": x})["x"])(jnp.zeros(3))
    np.testing.assert_array_equal(gradient, np.zeros(3))


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_the_derivative_is_the_unit_vector(scale):
    gradient = jax.grad(norms.global_norm)(jnp.array([3.0, -4.0]) * scale)
    np.testing.assert_allclose(gradient, [0.6, -0.8], rtol=1e-6)


def test_the_second_derivative_is_right():
    hessian = jax.hessian(norms.global_norm)(jnp.array([3.0, 4.0]))
    np.testing.assert_allclose(hessian, [[0.128, -0.096], [-0.096, 0.072]], rtol=1e-5)


# --------------------------------------------------------------------------------------
# Size
# --------------------------------------------------------------------------------------


def test_the_norm_of_a_thousand_leaves_is_exact():
    leaves = [jnp.full((5,), 1.0 + i % 3, jnp.bfloat16) for i in range(1000)]
    with jax.disable_jit():  # a thousand leaves compile for half a minute
        norm = norms.global_norm(leaves)
    exact = in_numpy.vector_norm(helpers.truth(leaves))
    np.testing.assert_allclose(norm, exact, rtol=1e-6)


def test_hundreds_of_leaves_have_hundreds_of_norms():
    leaves = [jnp.full((4,), float(i)) for i in range(300)]
    sizes = jax.jit(norms.leaf_norms)(leaves)
    np.testing.assert_allclose(sizes, 2.0 * np.arange(300), rtol=1e-6)
