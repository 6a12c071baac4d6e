"""The forms that a norm takes on other machines, run here.

On a TPU every norm is measured at three scales in one pass, on a GPU in float64; on a
machine with one device small leaves are reduced together. None of it happens on the
eight virtual CPUs of the other tests.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import helpers
from helpers import oc

SIZES = helpers.all_but([1e-30, 1e-19, 1.0, 1e19, 1e30], [1e-30, 1.0, 1e30])
MAGNITUDES = pytest.mark.parametrize("magnitude", SIZES)
NORMS = pytest.mark.parametrize(
    ("norm", "truth"),
    [
        (oc.norms.global_norm, lambda a, b: [np.hypot(a, b)] * 2),
        (oc.norms.leaf_norms, lambda a, b: [a, b]),
        (oc.norms.group_norms(), lambda a, b: [np.hypot(a, b)] * 2),
        (lambda u: jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(u))), None),
    ],
    ids=["global", "leaf", "group", "user"],
)


def leaves(magnitude):
    draw = np.random.default_rng(0)
    small, large = draw.normal(size=(7, 3)), draw.normal(size=5000)
    return {"a": np.float32(magnitude * small), "b": np.float32(magnitude * large)}


def check(norm, truth, magnitude):
    grads = leaves(magnitude)
    sizes = [np.linalg.norm(g.astype(np.float64)) for g in grads.values()]
    expected = (truth or (lambda a, b: [np.hypot(a, b)] * 2))(*sizes)
    limit = 0.1 * float(min(sizes))
    clip = oc.clip_by(norm, np.float32(limit))
    updates, state = jax.jit(clip.update)(grads, clip.init(grads))
    for (name, grad), size in zip(grads.items(), expected, strict=True):
        right = grad.astype(np.float64) * (np.float32(limit) / size)
        np.testing.assert_allclose(updates[name], right, rtol=1e-6, atol=limit * 1e-12)
    np.testing.assert_allclose(np.max(state.norms), max(expected), rtol=1e-6)


@NORMS
@MAGNITUDES
def test_one_pass_at_three_scales_is_exact(norm, truth, magnitude, accelerator):
    check(norm, truth, magnitude)
    assert accelerator


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@MAGNITUDES
def test_one_pass_is_exact_for_a_single_element(shape, magnitude, accelerator):
    # A compiler that knows the scale squares it first, and it underflows.
    grads = {"w": jnp.full(shape, magnitude)}
    norm = jax.jit(oc.norms.leaf_norms)(grads)["w"]
    np.testing.assert_allclose(norm, np.float32(magnitude), rtol=1e-6)


@NORMS
@pytest.mark.parametrize("magnitude", [0.0, 1e-30, 1.0, 1e30])
def test_one_pass_is_exact_for_constants(norm, truth, magnitude, accelerator):
    clip: Any = oc.clip_by(norm, 1.0)

    @jax.jit
    def norms():
        grads = {"a": jnp.full(4, magnitude), "b": jnp.zeros(())}
        return clip.update(grads, clip.init(grads))[1].norms

    np.testing.assert_allclose(jnp.max(norms()), np.float32(2 * magnitude), rtol=1e-6)


def test_one_pass_keeps_the_nan_and_the_zeros(accelerator):
    grads = {"a": jnp.array([1.0, jnp.nan]), "b": jnp.zeros(2), "c": jnp.array([3.0])}
    clip: Any = oc.clip_by_leaf_norm(1.0)
    updates, _ = clip.update(grads, None)
    assert np.isnan(updates["a"]).all()
    assert not updates["b"].any()
    assert updates["c"] == 1.0


@NORMS
@MAGNITUDES
def test_small_leaves_reduced_together_are_exact(norm, truth, magnitude, one_device):
    check(norm, truth, magnitude)


def hard_units(dtype):
    """Returns leaves of one shape and others, few columns of many rows among them."""
    draw = np.random.default_rng(0)
    shapes = [(6, 4)] * 5 + [(5, 4), (7,), (1024, 3), (2, 3, 150, 2), (3, 600)]
    leaves = [jnp.asarray(draw.normal(size=shape), dtype) for shape in shapes]
    sizes = jnp.asarray([1e-30, 1e-19, 1.0, 1e19, 1e30], dtype)
    return leaves[:5] + [x * size for x, size in zip(leaves[5:], sizes, strict=True)]


def over_units(leaf, ord):
    """Returns the norms of units in NumPy, over all axes but the last."""
    wide = abs(np.asarray(leaf, np.float64))
    axes = tuple(range(max(1, wide.ndim - 1)))
    if ord == np.inf:
        return wide.max(axes)
    return (wide**ord).sum(axes) ** (1 / ord)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("ord", [1, 2, 3, np.inf])
def test_units_of_equal_leaves_and_of_tall_ones_are_exact(
    ord, dtype, accelerator, one_device
):
    leaves = hard_units(dtype)
    found = jax.jit(lambda x: oc.norms.unit_norms(x, ord=ord))(leaves)
    for norm, leaf in zip(found, leaves, strict=True):
        right = over_units(leaf, ord).reshape(norm.shape)
        np.testing.assert_allclose(norm, right, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_unit_clipped_hardest_is_found_in_one_look(dtype, accelerator, one_device):
    leaves = hard_units(dtype)
    clip = oc.clip_by(oc.norms.unit_norms, 1.0)
    _, state = jax.jit(clip.update)(leaves, clip.init(leaves))
    norms = [over_units(leaf, 2) for leaf in leaves]
    # Where no unit is clipped, all are clipped as little: the first of them.
    hardest = [n.max() if n.max() > 1 else n.flat[0] for n in norms]
    np.testing.assert_allclose(state.norms, hardest, rtol=1e-5)
    np.testing.assert_allclose(state.factors, np.minimum(1, 1 / state.norms), rtol=1e-5)


def test_in_one_look_a_nan_is_the_hardest_and_infinities_are_found(
    accelerator, one_device
):
    def endless(norms, max_norms):
        return jnp.where(norms > 2, jnp.inf, norms / max_norms)

    leaf = jnp.array([[3.0, 1.0, jnp.nan], [4.0, 5.0, 6.0]])
    clip = oc.clip_by(oc.norms.unit_norms, 1.0, endless)
    _, state = jax.jit(clip.update)([leaf, leaf], clip.init([leaf, leaf]))
    assert np.isnan(state.norms).all()
    assert np.isnan(state.factors).all()
    finite = jnp.array([[4.0, 5.0, 6.0], [0.0, 0.0, 0.0]])
    _, state = jax.jit(clip.update)([finite], clip.init([finite]))
    assert state.norms == 4.0


@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_in_one_look_is_the_same_under_transformations(
    transform, accelerator, one_device
):
    clip = oc.adaptive_grad_clip(0.1)
    leaves = [jnp.arange(12.0).reshape(4, 3), jnp.ones((4, 3)), jnp.ones((2, 3))]
    state = clip.init(leaves)

    def numbers(x):
        updates, new = clip.update([x, *leaves[1:]], state, leaves)
        return jnp.sum(updates[0]) + jnp.sum(new.norms) + jnp.sum(new.factors)

    x = 0.3 * leaves[0] + 1
    if transform == "vmap":
        found = jax.vmap(numbers)(jnp.stack([x, 2 * x]))
        right = jnp.stack([numbers(x), numbers(2 * x)])
    else:
        found = jax.jit(jax.grad(numbers))(x)
        steps = 1e-2 * jnp.eye(12).reshape(12, 4, 3)
        right = [(numbers(x + s) - numbers(x - s)) / 2e-2 for s in steps]
        right = jnp.stack(right).reshape(4, 3)
    np.testing.assert_allclose(found, right, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("size", [10, 5000])
@pytest.mark.parametrize("ord", [1, 2, 3, np.inf])
def test_a_nan_in_a_leaf_of_any_size_is_seen(ord, size, one_device):
    leaf = jnp.ones(size).at[size // 2].set(jnp.nan)
    norm = functools.partial(oc.global_norm, ord=ord)
    assert jnp.isnan(jax.jit(norm)(leaf))


@pytest.mark.parametrize("limit", [0.5, (-1.0, 0.5)])
def test_elements_are_counted_in_one_look(limit, accelerator, one_device):
    draw = np.random.default_rng(0)
    shapes = [(128, 128)] * 3 + [(7, 3)] * 2 + [(300, 400)]
    leaves = [draw.normal(size=shape).astype(np.float32) for shape in shapes]
    leaves[3][0] = np.nan
    low, high = limit if isinstance(limit, tuple) else (-limit, limit)
    clip = oc.clip_by_value(limit)
    _, state = jax.jit(clip.update)(leaves, clip.init(leaves))
    largest = [np.max(abs(x)) for x in leaves]
    outside = [np.mean((x < low) | (x > high) | np.isnan(x)) for x in leaves]
    outside[3] = np.nan
    np.testing.assert_array_equal(state.largest, largest)
    np.testing.assert_allclose(state.clipped_fractions, outside, rtol=1e-6)


@pytest.mark.parametrize("x64", [False, True])
def test_what_fills_up_rows_is_not_counted(x64, accelerator, one_device):
    """Above a bound that is NaN all elements are, and those are zeros."""
    shapes = (3,), (5, 2), (1000,), (4, 8192), (512, 256)
    updates = [jnp.ones(shape, jnp.float32) for shape in shapes]

    def step(limit):
        clip = oc.clip_by_value(limit)
        return clip.update(updates, clip.init(updates))[1]

    with jax.enable_x64(x64):  # there a sum of counts is wider by default
        state = jax.jit(step)(jnp.float32(np.nan))
    np.testing.assert_array_equal(state.clipped_fractions, np.ones(5))
    np.testing.assert_array_equal(state.largest, np.ones(5))


@pytest.mark.parametrize("ord", [1, 2, 3, np.inf])
def test_leaves_of_several_sizes_are_exact(ord, accelerator, one_device):
    """Those that share a kernel, one that is not finite, and two of rows."""
    draw = np.random.default_rng(0)
    shapes = (1,), (70, 3), (5,), (100,), (512, 256), (4000,), (300, 512)
    leaves = [draw.normal(size=shape).astype(np.float32) for shape in shapes]
    leaves[0][:], leaves[5][7] = 1e30, np.nan
    leaves[3][:] = 0
    found = jax.jit(lambda x: oc.norms.leaf_norms(x, ord=ord))(leaves)
    right = [np.linalg.norm(x.ravel().astype(float), ord) for x in leaves]
    np.testing.assert_allclose(found, right, rtol=1e-5)
    whole = jax.jit(lambda x: oc.norms.global_norm(x, ord=ord))(leaves[1:5])
    flat = np.concatenate([x.ravel().astype(float) for x in leaves[1:5]])
    np.testing.assert_allclose(whole, np.linalg.norm(flat, ord), rtol=1e-5)


def sums_by_platform(norm, updates):
    """Returns how many sums there are on a CPU, a GPU and a TPU.

    On a CPU each is there three times: once, and for norms that are small or large.
    """
    program = jax.make_jaxpr(norm)(updates).jaxpr
    choices = [x for x in helpers.steps(program) if x.params.get("branches_platforms")]
    branches = choices[0].params["branches"]  # then come those for the entries
    return [
        sum(step.primitive.name == "reduce_sum" for step in helpers.steps(branch.jaxpr))
        for branch in branches
    ]


@pytest.mark.parametrize(
    ("norm", "last"), [(oc.global_norm, 1), (oc.norms.unit_norms, 0)]
)
def test_small_leaves_of_one_device_share_a_kernel(norm, last, one_device):
    found = sums_by_platform(norm, [jnp.ones(10)] * 50)  # each of them is one unit
    assert found == [3, 1 + last, 3 * (50 + last)]  # a TPU's compiler joins them


@pytest.mark.parametrize(
    ("norm", "last"), [(oc.global_norm, 1), (oc.norms.leaf_norms, 0)]
)
def test_leaves_of_several_sizes_share_a_kernel_on_a_gpu(norm, last, one_device):
    leaves = [jnp.ones(n) for n in (1, 10, 300, 4000)]
    _, on_gpu, _ = sums_by_platform(norm, leaves)
    assert on_gpu == 1 + last


def test_large_leaves_share_the_last_kernel_on_a_gpu(one_device):
    found = sums_by_platform(oc.global_norm, [jnp.ones((512, 256))] * 50)
    assert found == [3 * 51, 52, 3 * 51]


def test_no_kernel_of_a_gpu_joins_more_leaves_than_it_can_hold(one_device):
    found = sums_by_platform(oc.norms.leaf_norms, [jnp.ones(10)] * 130)
    assert found == [3, 3, 3 * 130]


@pytest.mark.parametrize(
    ("shape", "dtype", "kernels"),
    [
        ((6, 4), "float32", 3),  # of at most 64 leaves
        ((512, 256), "float32", 130),
        ((512, 25), "bfloat16", 3 * 2),
        ((512, 256), "bfloat16", 130 * 2),
        ((32, 4096), "bfloat16", 130),
    ],
)
def test_units_of_small_equal_leaves_share_a_kernel_on_a_gpu(
    shape, dtype, kernels, one_device
):
    found = sums_by_platform(oc.norms.unit_norms, [jnp.ones(shape, dtype)] * 130)
    assert found == [3 * 130, kernels, 3 * 130]


@pytest.mark.parametrize(("count", "kept"), [(3, 0), (50, 3), (130, 3 * 2)])
def test_norms_of_units_are_joined_by_sums_on_a_tpu(count, kept, one_device):
    # Each row that is put into an array is a kernel of its own there, but a sum is one.
    program = jax.make_jaxpr(oc.norms.unit_norms)([jnp.ones((6, 4))] * count).jaxpr
    choices = [x for x in helpers.steps(program) if x.params.get("branches_platforms")]
    *_, on_tpu = choices[0].params["branches"]
    steps = list(helpers.steps(on_tpu.jaxpr))
    names = [step.primitive.name for step in steps]
    assert names.count("pad") == 3 * count  # at three scales
    assert names.count("optimization_barrier") == kept  # of more than a few
    joins = [step for step in steps if step.primitive.name == "concatenate"]
    assert all(len(step.invars) <= 3 for step in joins)


def test_leaves_that_may_be_spread_keep_a_kernel_each():
    found = sums_by_platform(oc.global_norm, [jnp.ones(10)] * 50)
    assert found == [3 * 51, 51, 3 * 51]


@pytest.mark.parametrize("power", [1e-30, 1.0, 1e30])
def test_derivatives_are_right_on_accelerators(power, accelerator):
    x = jnp.array([3.0, -4.0, 0.0]) * power
    gradient = jax.grad(oc.global_norm)(x)
    np.testing.assert_allclose(gradient, [0.6, -0.8, 0], rtol=1e-6)
    hessian = jax.hessian(oc.global_norm)(x / power)
    right = np.array([[0.128, 0.096, 0], [0.096, 0.072, 0], [0, 0, 0.2]])
    np.testing.assert_allclose(hessian, right, rtol=1e-5)


def unit_tree(draw, size):
    shapes = {"a": (3, 2), "b": (5, 2), "c": (4,), "conv": (2, 2, 3, 2), "d": (3, 2)}
    shapes |= {"head": (3, 2), "scale": ()}
    normal = {name: draw.normal(size=shape) for name, shape in shapes.items()}
    return {name: np.asarray(size * x, np.float32) for name, x in normal.items()}


def unit_sizes(leaf):
    axes = tuple(range(leaf.ndim - 1)) if leaf.ndim > 1 else None
    return np.sqrt(np.sum(leaf.astype(np.float64) ** 2, axis=axes, keepdims=True))


def test_units_of_many_leaves_in_one_array_are_clipped_one_by_one(one_device):
    draw = np.random.default_rng(0)
    params, grads = unit_tree(draw, 1.0), unit_tree(draw, 0.1)
    grads["b"][1, 0], grads["d"] = np.nan, np.float32(1e25) * grads["d"]
    clip = oc.adaptive_grad_clip(0.05, exclude=("head",))
    updates, state = jax.jit(clip.update)(grads, clip.init(params), params)
    for i, (name, grad) in enumerate(grads.items()):
        size = unit_sizes(grad)
        limit = 0.05 * unit_sizes(params[name]) if name != "head" else np.inf * size
        factors = np.minimum(1, limit / size)
        np.testing.assert_allclose(updates[name], grad * factors, rtol=1e-6)
        hardest = np.argmin(factors)  # the first NaN, if there is one
        allowed = helpers.shown(state.max_norms)
        found = [state.norms[i], allowed[i], state.factors[i]]
        right = [x.ravel()[hardest] for x in (size, limit, factors)]
        np.testing.assert_allclose(found, right, rtol=1e-6)


@pytest.mark.parametrize("ord", [1, 2, 3, np.inf])
def test_units_of_many_leaves_in_one_array_are_measured_one_by_one(ord, one_device):
    grads = unit_tree(np.random.default_rng(0), 1.0)
    grads["b"] = np.float32(1e20) * grads["b"]
    found = jax.jit(lambda u: oc.norms.unit_norms(u, ord=ord))(grads)
    for name, grad in grads.items():
        rows = grad.reshape(-1, grad.shape[-1] if grad.ndim > 1 else 1)
        right = np.linalg.norm(rows.astype(np.float64), ord=ord, axis=0)
        np.testing.assert_allclose(found[name].ravel(), right, rtol=1e-6)


def test_a_leaf_more_means_few_kernels_more_for_its_units(one_device):
    clip = oc.adaptive_grad_clip(0.01)

    def kernels(leaves):
        grads = [jnp.ones((8, 16))] * leaves
        step = jax.jit(clip.update).lower(grads, clip.init(grads), grads).compile()
        _, entry = (step.as_text() or "").split("ENTRY")
        return entry.count(" fusion(")

    # For the norm of the update, that of the parameters, and the product.
    assert kernels(36) - kernels(25) <= (3 + 1) * 11


@pytest.mark.parametrize(
    "make",
    [
        oc.clip_by_global_norm,
        oc.clip_by_leaf_norm,
        oc.clip_by_group_norm,
        oc.clip_by_block_rms,
        oc.adaptive_grad_clip,
    ],
)
def test_the_second_pass_that_is_rarely_taken_needs_no_copy_of_the_updates(make):
    clip = make(0.1)
    # Of different shapes, for leaves of one shape share an array of the scale.
    grads = {f"layer_{i}": {"w": jnp.ones((64 + i, 96))} for i in range(20)}
    update = jax.jit(clip.update, donate_argnums=(0, 1))
    compiled = update.lower(grads, clip.init(grads), grads).compile()
    memory: Any = compiled.memory_analysis()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(grads))
    assert memory.temp_size_in_bytes < size / 5


def test_the_statistics_of_a_clip_by_value_need_no_copy_of_the_updates():
    clip, updates = oc.clip_by_value(0.01), {"w": jnp.ones((1024, 512))}
    update = jax.jit(clip.update, donate_argnums=(0, 1))
    memory: Any = update.lower(updates, clip.init(updates)).compile().memory_analysis()
    assert memory.temp_size_in_bytes < updates["w"].nbytes / 5
