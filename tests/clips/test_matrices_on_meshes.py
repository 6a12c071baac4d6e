"""Clips of matrices that are spread over devices, and what they refuse."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import helpers
from helpers import oc
from matrix_cases import RULES, assert_is, compiled, every_rule, some_updates, with_gap
from optaxclip._clips import spectra as _spectra

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


# With types and without in turn; the one of several axes in both ways.
QUICK = ("two axes", True)
SPLIT = {QUICK, ("two axes", False)}
SPLIT |= set(zip(STACKS, itertools.cycle([True, False]), strict=False))


@functools.cache
def on_one_device(name, stack):
    steps, clip = list(steps_of_stacks(STACKS[stack][0])), RULES[name][0](0.5)
    run = jax.jit(functools.partial(three_steps, clip))
    return steps, *run(steps, clip.init(steps[0]))


@every_rule
@pytest.mark.parametrize(
    ("stack", "check_vma"),
    [pair if pair == QUICK else helpers.thorough(*pair) for pair in sorted(SPLIT)],
)
def test_a_stack_may_be_split_between_its_matrices(name, stack, check_vma):
    steps, *expected = on_one_device(name, stack)
    found, state = split_between_matrices(name, stack, check_vma, steps)
    chex.assert_trees_all_close([found, state], expected, rtol=2e-5, atol=2e-6)
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
