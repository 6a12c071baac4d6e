"""Clips of matrices by their singular values, against NumPy's decomposition."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import helpers
from helpers import oc
from optaxclip._clips import spectra as _spectra

# --------------------------------------------------------------------------------------
# The equations in NumPy, float64
# --------------------------------------------------------------------------------------


def as_matrices(x):
    x = np.asarray(x, np.complex128 if np.iscomplexobj(x) else np.float64)
    return x.reshape(-1, *x.shape[-2:]) if x.ndim > 1 else x.reshape(1, -1, 1)


def np_clip_singular_values(x, max_value):
    out = []
    for matrix in as_matrices(x):
        if not np.isfinite(matrix).all():
            out.append(np.full_like(matrix, np.nan))
            continue
        u, s, vh = np.linalg.svd(matrix, full_matrices=False)
        out.append(u @ np.diag(np.minimum(s, max_value)) @ vh)
    return np.reshape(out, np.shape(x))


def np_clip_by_spectral_norm(x, max_norm):
    out = []
    for matrix in as_matrices(x):
        if not np.isfinite(matrix).all():
            out.append(np.full_like(matrix, np.nan))
            continue
        largest = np.linalg.svd(matrix, compute_uv=False)[0]
        out.append(matrix * min(1.0, max_norm / largest if largest else 1.0))
    return np.reshape(out, np.shape(x))


RULES: dict[str, tuple[Any, Any]] = {
    "values": (oc.clip_singular_values, np_clip_singular_values),
    "norm": (
        functools.partial(oc.clip_by_spectral_norm, num_steps=100),
        np_clip_by_spectral_norm,
    ),
}
every_rule = pytest.mark.parametrize("name", RULES)
SHAPES = {"wide": (3, 5), "tall": (6, 2), "stack": (2, 4, 3), "row": (4,), "one": ()}


@functools.cache
def compiled(name):
    def step(updates, threshold):
        clip = RULES[name][0](threshold)
        return clip.update(updates, clip.init(updates))

    return jax.jit(step)


def with_gap(x):
    """The same matrix with a largest singular value well above the second."""
    if x.ndim < 2:
        return x
    u, s, vh = np.linalg.svd(x, full_matrices=False)
    s[..., 0] *= 1.5
    return ((u * s[..., None, :]) @ vh).astype(x.dtype)


def some_updates(scale=1.0, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return {
        name: with_gap(scale * rng.normal(size=shape).astype(dtype)).astype(dtype)
        for name, shape in SHAPES.items()
    }


def assert_is(name, clipped, updates, threshold, rtol=2e-6):
    for leaf, x in updates.items():
        expected = RULES[name][1](x, threshold)
        atol = rtol * threshold
        np.testing.assert_allclose(
            helpers.truth(clipped[leaf]), expected, rtol=0, atol=atol, err_msg=leaf
        )


@every_rule
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1.0, 1e20, 1e37])
@pytest.mark.parametrize("ratio", [0.1, 0.9])
def test_every_magnitude_is_the_equation(name, scale, ratio):
    updates = some_updates(scale)
    threshold = np.float32(ratio * scale)
    clipped, state = compiled(name)(updates, threshold)
    assert_is(name, clipped, updates, threshold)
    largest = {
        leaf: np.linalg.svd(as_matrices(x), compute_uv=False).max()
        for leaf, x in updates.items()
    }
    expected = [largest[leaf] for leaf in sorted(SHAPES)]
    np.testing.assert_allclose(state.norms, expected, rtol=1e-5)
    np.testing.assert_array_equal(state.max_norms, np.full(5, threshold))


@every_rule
def test_another_constant_is_another_rule(name):
    updates = some_updates()
    clipped, _ = compiled(name)(updates, np.float32(0.5))
    assert_is(name, clipped, updates, 0.5)
    with pytest.raises(AssertionError):
        assert_is(name, clipped, updates, 0.5001)


@every_rule
def test_the_largest_updates_to_the_smallest_threshold(name):
    updates = some_updates(1e37)
    clipped, _ = compiled(name)(updates, np.float32(1e-30))
    assert_is(name, clipped, updates, 1e-30, rtol=1e-5)


@every_rule
def test_matrices_within_the_bound_come_back_bit_for_bit(name):
    updates = some_updates()
    updates["stack"][1] *= 0.01
    updates["wide"] = np.diag([2.0, 1.0, 1e-45, 0.5, -0.0]).astype(np.float32)[:3]
    clipped, state = compiled(name)(updates, np.float32(2.0))
    assert helpers.bits(clipped["stack"][1]) == helpers.bits(updates["stack"][1])
    assert helpers.bits(clipped["wide"]) == helpers.bits(updates["wide"])
    assert state.factors[4] == 1 and np.min(state.factors) < 1


@every_rule
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_spreads_in_its_own_matrix(name, bad):
    updates = some_updates()
    updates["stack"][1, 0, 0] = updates["tall"][2, 1] = updates["row"][1] = bad
    clipped, state = compiled(name)(updates, np.float32(0.5))
    assert_is(name, clipped, updates, 0.5)
    assert np.isnan(clipped["stack"]).sum() == 12
    assert np.isnan(np.asarray(state.factors)[1:4]).all()


@every_rule
def test_complex_matrices(name):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(4, 3)) + 1j * rng.normal(size=(4, 3))).astype(np.complex64)
    clipped, _ = compiled(name)({"w": x}, np.float32(0.7))
    assert_is(name, clipped, {"w": x}, 0.7, rtol=1e-5)


# --------------------------------------------------------------------------------------
# Derivatives
# --------------------------------------------------------------------------------------


def rotation(size, seed):
    x = np.random.default_rng(seed).normal(size=(size, size))
    return np.linalg.qr(x)[0]


def with_spectrum(values, rows, columns, seed=0):
    left, right = rotation(rows, seed), rotation(columns, seed + 1)
    count = len(values)
    return left[:, :count] @ np.diag(values) @ right[:count]


MATRICES = {
    "zeros": np.zeros((3, 3)),
    "equal": np.eye(3) * 2,
    "equal_small": np.eye(3) / 2,
    "at_the_bound": with_spectrum([2.0, 1.0, 1.0], 3, 3),
    "tall": with_spectrum([1.5, 0.5, 0.2], 5, 3),
    "deficient": with_spectrum([3.0, 0.5, 0.0], 5, 3),
    "wide": with_spectrum([3.0, 3.0, 0.2], 3, 5),
}


@functools.cache
def derivative(name):
    clip = RULES[name][0](1.0)

    def loss(x):
        clipped, _ = clip.update({"w": x}, clip.init({"w": x}))
        return jnp.sum(clipped["w"] * jnp.cos(jnp.arange(x.size)).reshape(x.shape))

    return jax.jit(jax.grad(loss))


@every_rule
@pytest.mark.parametrize("kind", MATRICES)
def test_the_derivative_is_finite(name, kind):
    gradient = derivative(name)(jnp.asarray(MATRICES[kind], jnp.float32))
    chex.assert_tree_all_finite(gradient)


@every_rule
@pytest.mark.parametrize("kind", ["deficient", "tall", "wide"])
def test_the_derivative_is_that_of_finite_differences(name, kind):
    if (name, kind) == ("norm", "wide"):
        kind = "tall"  # where the largest value is there twice, its size has no slope
    x = MATRICES[kind]
    weights = np.cos(np.arange(x.size)).reshape(x.shape)
    slopes = np.zeros(x.size)
    for i in range(x.size):
        ends = []
        for sign in (1, -1):
            moved = x.ravel().copy()
            moved[i] += sign * 1e-5
            ends.append(np.sum(weights * RULES[name][1](moved.reshape(x.shape), 1.0)))
        slopes[i] = (ends[0] - ends[1]) / 2e-5
    found = derivative(name)(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(found, slopes.reshape(x.shape), atol=2e-4)


def test_the_derivative_of_complex_matrices():
    rng = np.random.default_rng(0)
    x, t = rng.normal(size=(2, 4, 3)) + 1j * rng.normal(size=(2, 4, 3))
    x *= 2

    def clipped(x):
        return oc.clip_singular_values(1.0).update({"w": x}, None)[0]["w"]

    arguments = [(jnp.asarray(y, jnp.complex64),) for y in (x, t)]
    _, found = jax.jit(lambda *x: jax.jvp(clipped, *x))(*arguments)
    ends = [np_clip_singular_values(x + h * t, 1.0) for h in (1e-5, -1e-5)]
    np.testing.assert_allclose(found, (ends[0] - ends[1]) / 2e-5, atol=2e-4)


def test_the_derivative_by_the_threshold():
    x = jnp.asarray(with_spectrum([3.0, 2.0, 0.5], 4, 3), jnp.float32)

    def total(limit):
        return jnp.sum(oc.clip_singular_values(limit).update({"w": x}, None)[0]["w"])

    left, right = rotation(4, 0)[:, :2], rotation(3, 1)[:2]
    np.testing.assert_allclose(
        jax.jit(jax.grad(total))(1.0), np.sum(left @ right), rtol=1e-4
    )


# --------------------------------------------------------------------------------------
# Thresholds of every kind
# --------------------------------------------------------------------------------------


@every_rule
def test_a_schedule_and_a_threshold_for_each_pattern(name):
    make, reference = RULES[name]
    updates = some_updates()
    limits = {"stack": lambda count: 0.5 / (1 + count), "**": 1.0}
    clip = make(limits)

    def steps(updates):
        def body(state, _):
            clipped, state = clip.update(updates, state)
            return state, clipped

        return jax.lax.scan(body, clip.init(updates), None, length=2)[1]

    clipped = jax.jit(steps)(updates)
    for i, limit in enumerate((0.5, 0.25)):
        expected = reference(updates["stack"], limit)
        np.testing.assert_allclose(clipped["stack"][i], expected, atol=2e-6)
    expected = reference(updates["tall"], 1.0)
    np.testing.assert_allclose(clipped["tall"][1], expected, atol=2e-6)


def test_half_the_largest_value_as_a_rule():
    x = with_spectrum([4.0, 3.0, 1.0], 3, 3).astype(np.float32)
    clip = oc.clip_singular_values(optax.scale(0.5))
    clipped, state = jax.jit(clip.update)({"w": x}, clip.init({"w": x}))
    values = np.linalg.svd(clipped["w"], compute_uv=False)
    np.testing.assert_allclose(values, [2.0, 2.0, 1.0], rtol=1e-5)
    np.testing.assert_allclose(state.max_norms, [2.0], rtol=1e-5)


# --------------------------------------------------------------------------------------
# Power iteration
# --------------------------------------------------------------------------------------


def drifting(steps=200, size=(20, 12)):
    """A matrix whose largest direction is overtaken by another, slowly."""
    u, v = rotation(size[0], 0)[:, :3], rotation(size[1], 1)[:3]
    t = np.linspace(0, 1, steps)[:, None]
    values = np.concatenate([2 - t, 1 + 2 * t, 0.3 + 0 * t], axis=1)
    noise = np.random.default_rng(2).normal(size=(steps, *size)) * 0.02
    return (np.einsum("ik,tk,kj->tij", u, values, v) + noise).astype(np.float32)


def norms_over(x, num_steps):
    clip = oc.clip_by_spectral_norm(1.0, num_steps)

    def body(state, some):
        clipped, state = clip.update({"w": some}, state)
        return state, (clipped["w"], state.norms[0])

    fresh = clip.init({"w": jnp.zeros(x.shape[1:])})
    return jax.jit(lambda x: jax.lax.scan(body, fresh, x)[1])(x)


def test_a_warm_start_follows_a_matrix_that_changes():
    x = drifting()
    _, found = norms_over(x, 4)
    right = np.linalg.svd(x, compute_uv=False)[:, 0]
    ratio = np.asarray(found) / right
    assert (ratio <= 1 + 1e-6).all()  # always from below
    assert ratio[5:].min() > 0.92  # also where one overtakes the other
    assert np.median(ratio) > 0.9999
    assert ratio[-20:].min() > 0.9999


def test_a_direction_that_was_absent_is_found():
    """Blocks: nothing but the start vector leads from one to the other."""
    first, second = np.zeros((2, 6, 6), np.float32)
    first[:3, :3], second[3:, 3:] = np.eye(3) * 2, np.eye(3)
    x = np.stack([first] * 100 + [first + 5 * second] * 20)
    _, found = norms_over(x, 2)
    np.testing.assert_allclose(found[99], 2.0, rtol=1e-3)
    np.testing.assert_allclose(found[-1], 5.0, rtol=1e-3)


def test_a_cold_start_is_as_near_as_documented():
    x = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    right = np.linalg.svd(x, compute_uv=False)[0]
    ratios = [float(norms_over(x[None], n)[1][0]) / right for n in (4, 16)]
    assert 0.85 < ratios[0] < ratios[1] <= 1
    assert ratios[1] > 0.97


def test_steps_that_say_nothing_leave_the_vector():
    clip = oc.clip_by_spectral_norm(1.0)
    good = {"w": jnp.asarray(with_spectrum([3.0, 1.0], 4, 3), jnp.float32)}
    update = jax.jit(clip.update)
    _, state = update(good, clip.init(good))
    for value in (0.0, jnp.nan, jnp.inf):
        bad = {"w": good["w"].at[1, 1].set(value) if value else 0 * good["w"]}
        _, after = update(bad, state)
        assert helpers.bits(after.rule_state.vectors) == helpers.bits(
            state.rule_state.vectors
        )
    assert np.linalg.norm(state.rule_state.vectors) == pytest.approx(1, rel=1e-6)


# --------------------------------------------------------------------------------------
# Meshes
# --------------------------------------------------------------------------------------


def in_shard_map(name, spec, **options):
    clip = RULES[name][0](0.5)
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    mapped = jax.shard_map(
        lambda x: clip.update(x, clip.init(x))[0],
        mesh=mesh,
        in_specs=(spec,),
        out_specs=spec,
        **options,
    )
    return jax.jit(mapped)


@every_rule
def test_a_split_matrix_raises_inside_shard_map(name):
    mapped = in_shard_map(name, {"w": P("data")})
    message = r"whole matrices, got 'w' split over the mesh axes \['data'\].*all_gather"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(mapped, {"w": jnp.ones((8, 4))})


@every_rule
def test_whole_matrices_are_clipped_inside_shard_map(name):
    x = {"w": some_updates()["tall"]}
    found = in_shard_map(name, {"w": P()})(x)
    assert_is(name, found, x, 0.5)


STACKS = {
    "one axis": ((8, 3, 4), P("a"), (("a", 8),)),
    "some of it": ((8, 3, 4), P("a", None, None), (("a", 2), ("b", 4))),
    "two axes": ((8, 3, 4), P(("b", "a"), None, None), (("a", 2), ("b", 4))),
    "two dimensions": ((4, 2, 3, 4), P("b", "a"), (("a", 2), ("b", 4))),
    "the second": ((2, 8, 3, 4), P(None, "a", None, None), (("a", 4), ("b", 2))),
}


def three_steps(clip, steps, state):
    out = []
    for updates in steps:
        clipped, state = clip.update(updates, state, updates)
        out.append(clipped)
    return out, state


def steps_of_stacks(shape, dtype=np.float32):
    rng = np.random.default_rng(3)
    shapes = {"b": (4,), "experts": shape, "w": (4, 3)}
    for scale in 1.0, 0.3, 3.0:
        yield {
            name: scale * with_gap(rng.normal(size=size).astype(np.float32))
            for name, size in shapes.items()
        }


def split_between_matrices(name, stack, check_vma, steps, is_inside=True):
    """Three steps on split stacks, and the last state, which all devices have."""
    _, spec, axes = STACKS[stack]
    specs = {"b": P(), "experts": spec, "w": P()}
    mesh = jax.make_mesh(
        [size for _, size in axes],
        [axis for axis, _ in axes],
        axis_types=(AxisType.Auto,) * len(axes),
    )
    clip = oc.over_axes(RULES[name][0](0.5), specs)

    def run(steps, state):
        return three_steps(clip, steps, clip.init(steps[0]) if is_inside else state)

    mapped = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=([specs] * 3, P()),
        out_specs=([specs] * 3, P()),
        check_vma=check_vma,
    )
    return jax.jit(mapped)(steps, clip.init(steps[0]))


@every_rule
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("stack", STACKS)
def test_a_stack_may_be_split_between_its_matrices(name, stack, check_vma):
    steps = list(steps_of_stacks(STACKS[stack][0]))
    found, state = split_between_matrices(name, stack, check_vma, steps)
    clip = RULES[name][0](0.5)
    expected = jax.jit(functools.partial(three_steps, clip))(steps, clip.init(steps[0]))
    chex.assert_trees_all_close((found, state), expected, rtol=2e-5, atol=2e-6)
    for clipped, updates in zip(found, steps, strict=True):
        assert_is(name, clipped, updates, 0.5, rtol=1e-5)


@every_rule
def test_a_state_from_outside_of_shard_map_is_one_from_inside(name):
    steps = list(steps_of_stacks(STACKS["two axes"][0]))
    inside = split_between_matrices(name, "two axes", True, steps)
    outside = split_between_matrices(name, "two axes", True, steps, is_inside=False)
    chex.assert_trees_all_equal(inside, outside)


@every_rule
def test_what_is_not_finite_stays_in_its_matrix_on_its_device(name):
    steps = list(steps_of_stacks(STACKS["some of it"][0]))
    steps[2]["experts"][5, 0, 0] = np.nan
    found, state = split_between_matrices(name, "some of it", True, steps)
    is_nan = np.isnan(found[2]["experts"]).all(axis=(1, 2))
    np.testing.assert_array_equal(is_nan, np.arange(8) == 5)
    assert_is(name, found[2], steps[2], 0.5, rtol=1e-5)
    np.testing.assert_array_equal(np.isnan(state.factors), [False, True, False])


@every_rule
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("spec", [P(None, "a"), P(None, None, "a"), P("b", "a", None)])
def test_a_split_matrix_of_a_stack_raises(name, spec, check_vma):
    clip = oc.over_axes(RULES[name][0](0.5), {"w": spec})
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    mapped = jax.shard_map(
        lambda x: clip.update(x, clip.init(x))[0],
        mesh=mesh,
        in_specs=({"w": spec},),
        out_specs={"w": spec},
        check_vma=check_vma,
    )
    with pytest.raises(ValueError, match=r"whole matrices, got 'w' split over the"):
        jax.eval_shape(jax.jit(mapped), {"w": jnp.ones((4, 4, 4))})


@every_rule
def test_a_stack_split_by_its_type_alone_asks_for_specs(name):
    mapped = in_shard_map(name, {"w": P("data")})
    with pytest.raises(ValueError, match=r"between its matrices.*over_axes\(clip, s"):
        jax.eval_shape(mapped, {"w": jnp.ones((8, 4, 3))})


@every_rule
def test_under_jit_a_sharded_matrix_is_clipped_as_a_whole(name):
    mesh = jax.make_mesh((4, 2), ("data", "model"), (AxisType.Auto,) * 2)
    x = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    x = {"w": with_gap(x)}
    sharded = jax.device_put(x, NamedSharding(mesh, P("data", "model")))
    assert_is(name, compiled(name)(sharded, np.float32(0.5))[0], x, 0.5)


# --------------------------------------------------------------------------------------
# Errors
# --------------------------------------------------------------------------------------


@every_rule
def test_a_negative_threshold_raises(name):
    what = "max_value" if name == "values" else "max_norm"
    with pytest.raises(ValueError, match=f"Expected {what} >= 0, got -1"):
        RULES[name][0](-1.0)


@pytest.mark.parametrize("size", [0.0, 1e-30, 3e-20, 0.7, 1.0, 3e38])
def test_matrices_are_decomposed_in_units_of_a_power_of_two(size):
    # So that what is decomposed has the digits of the matrix, and squares in range.
    matrix = size * jnp.array([[1.0, 0.3], [-0.1, 0.7]])
    x, unit = _spectra.scaled(matrix)
    assert np.frexp(np.asarray(unit))[0] == 0.5
    np.testing.assert_array_equal(np.float64(x) * np.float64(unit), np.float64(matrix))
    assert 2.0**-35 <= np.max(np.abs(x)) <= 2.0**35 or size == 0


@pytest.mark.parametrize("num_steps", [0, 1.5, True])
def test_a_number_of_steps_that_is_none_raises(num_steps):
    with pytest.raises(ValueError, match="Expected num_steps >= 1, an int, got"):
        oc.clip_by_spectral_norm(1.0, num_steps)


def test_power_iteration_needs_its_state():
    with pytest.raises(ValueError, match=r"Expected a state of type ClipState, got No"):
        oc.clip_by_spectral_norm(1.0).update({"w": jnp.ones((2, 2))}, None)


def test_the_state_of_another_clip_raises():
    updates = {"w": jnp.ones((2, 2))}
    state = oc.clip_by_leaf_norm(1.0).init(updates)
    with pytest.raises(ValueError, match=r"vectors of 2 elements, got \(0,\)"):
        oc.clip_by_spectral_norm(1.0).update(updates, state)
