"""Centered clipping: the mean of workers, in which a bad one has a bounded share."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as P

import helpers
from helpers import oc

# --------------------------------------------------------------------------------------
# The equation in NumPy, float64
# --------------------------------------------------------------------------------------


def np_centered_clip(workers, center, max_norm, num_iters=1):
    """Vectors: workers (count, size), center (size,)."""
    workers, v = np.array(workers, np.float64), np.array(center, np.float64)
    for _ in range(num_iters):
        total = np.zeros_like(v)
        for x in workers:
            difference = x - v
            if not np.isfinite(difference).all():
                continue
            largest = np.max(np.abs(difference))
            if largest == 0:
                continue
            size = largest * np.sqrt(np.sum((difference / largest) ** 2))
            total += difference * min(1.0, max_norm / size)
        v = v + total / len(workers)
    return v


def as_tree(x):
    """Vectors of 6 as a tree of two leaves, with any axes in front."""
    return {"a": x[..., :4].reshape(*x.shape[:-1], 2, 2), "b": x[..., 4:]}


def as_vectors(tree):
    lead = tree["b"].shape[:-1]
    return np.concatenate([np.asarray(tree["a"]).reshape(*lead, 4), tree["b"]], -1)


def random_history(steps=200, workers=5):
    """Gradients of workers at every step: honest, far away, NaN, Inf, or zero."""
    rng = np.random.default_rng(0)
    x = 1 + rng.normal(size=(steps, workers, 6))
    kind = rng.integers(10, size=(steps, workers))
    x[kind == 0] *= 1e6
    x[kind == 1, 0] = np.nan
    x[kind == 2, 5] = np.inf
    x[kind == 3] = 0
    x[50:51, :, 2] = np.nan  # a step at which no worker is any good
    return x.astype(np.float32)


@functools.cache
def over_history(num_iters):
    """All steps in one compiled scan, the aggregate carried: aggregates, statistics."""

    def body(center, x):
        center, seen = oc.centered_clip(as_tree(x), center, 2.0, num_iters=num_iters)
        return center, (center, seen)

    fresh = as_tree(jnp.zeros(6))
    run = jax.jit(lambda x: jax.lax.scan(body, fresh, x)[1])
    return run(random_history())


def by_reference(max_norm, num_iters):
    center, centers = np.zeros(6), []
    for x in random_history():
        center = np_centered_clip(x, center, max_norm, num_iters)
        centers.append(center)
    return np.stack(centers)


@pytest.mark.parametrize("num_iters", [1, 3])
def test_a_history_with_bad_workers_is_the_equation(num_iters):
    aggregates, seen = over_history(num_iters)
    expected = by_reference(2.0, num_iters)
    np.testing.assert_allclose(as_vectors(aggregates), expected, rtol=1e-5, atol=1e-6)
    bad = ~np.isfinite(random_history()).all(axis=-1)
    np.testing.assert_array_equal(seen.nonfinite_count, bad.sum(axis=1))
    np.testing.assert_array_equal(np.asarray(seen.factors) == 0, bad)
    clipped = (np.asarray(seen.factors) < 1) & ~bad
    np.testing.assert_array_equal(seen.clipped_count, clipped.sum(axis=1))
    chex.assert_tree_all_finite(aggregates)


@pytest.mark.parametrize("other", [(2.01, 1), (2.0, 2)])
def test_another_constant_is_another_rule(other):
    aggregates, _ = over_history(1)
    assert not helpers.is_close(as_vectors(aggregates), by_reference(*other), rtol=1e-5)


def test_by_hand():
    workers = {"w": jnp.array([[3.0, 4.0], [0.0, 0.0], [-300.0, 400.0]])}
    center, seen = oc.centered_clip(workers, {"w": jnp.zeros(2)}, 5.0)
    np.testing.assert_allclose(center["w"], [0.0, 8 / 3], atol=1e-6)
    np.testing.assert_allclose(seen.norms, [5.0, 0.0, 500.0], rtol=1e-6)
    np.testing.assert_allclose(seen.factors, [1.0, 1.0, 0.01], rtol=1e-6)
    assert (int(seen.clipped_count), int(seen.nonfinite_count)) == (1, 0)


def test_workers_that_agree_with_the_center_keep_it_bit_for_bit():
    center = helpers.random_tree()
    workers = jax.tree.map(lambda x: jnp.stack([x] * 3), center)
    again, seen = oc.centered_clip(workers, center, 0.0)
    assert helpers.bits(again) == helpers.bits(center)
    np.testing.assert_array_equal(seen.norms, np.zeros(3))


def test_with_an_infinite_threshold_it_is_the_mean():
    x = random_history(1, 4)[0]
    x = np.where(np.isfinite(x), x, 0)
    mean, _ = oc.centered_clip(as_tree(x), as_tree(jnp.ones(6)), jnp.inf)
    np.testing.assert_allclose(as_vectors(mean), x.mean(axis=0), rtol=1e-5, atol=1e-6)


def test_a_bad_worker_moves_the_aggregate_by_no_more_than_its_share():
    honest = np.random.default_rng(0).normal(size=(9, 6)).astype(np.float32)
    found = []
    for lie in (0.0, 1e3, -3e38):
        workers = np.concatenate([honest, np.full((1, 6), lie, np.float32)])
        center, _ = oc.centered_clip(as_tree(workers), as_tree(jnp.zeros(6)), 2.0)
        found.append(as_vectors(center))
    shifts = [np.linalg.norm(x - found[0]) for x in found[1:]]
    np.testing.assert_allclose(shifts, 0.2, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-36, 1e-20, 1e20, 1e37])
def test_every_magnitude(scale):
    x = scale * np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    x = x.astype(np.float32)
    found, _ = compiled()(as_tree(x), as_tree(jnp.zeros(6)), np.float32(2 * scale))
    expected = np_centered_clip(x, np.zeros(6), 2 * scale)
    smallest = float(jnp.finfo(jnp.float32).tiny)  # below, the hardware has zeros
    atol = max(1e-6 * scale, smallest)
    np.testing.assert_allclose(as_vectors(found), expected, rtol=1e-5, atol=atol)


@functools.cache
def compiled():
    return jax.jit(oc.centered_clip)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0])
def test_the_derivative_is_finite(scale):
    x = as_tree(scale * random_history(1, 4)[0].clip(-1, 1))
    x = jax.tree.map(jnp.nan_to_num, x)

    def loss(x):
        center, _ = oc.centered_clip(x, as_tree(jnp.zeros(6)), 1.0, num_iters=2)
        return sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(center))

    chex.assert_tree_all_finite(jax.jit(jax.grad(loss))(x))


def test_the_aggregate_has_the_types_of_the_center(dtype):
    center = {"w": jnp.zeros(3, dtype), "n": jnp.arange(2), "none": None}
    workers = {
        "w": jnp.asarray(helpers.random_leaf(np.random.default_rng(0), (4, 3), dtype)),
        "n": jnp.zeros((4, 2), jnp.int32),
        "none": None,
    }
    found, seen = oc.centered_clip(workers, center, 1.0)
    assert helpers.types(found) == helpers.types(center)
    np.testing.assert_array_equal(found["n"], center["n"])
    wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
    assert seen.norms.dtype == seen.factors.dtype == wide
    if dtype != jnp.complex64:
        expected = np_centered_clip(workers["w"], center["w"], 1.0)
        eps = float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(helpers.truth(found["w"]), expected, eps, 4 * eps)


def test_a_wide_center_of_low_precision_workers_is_not_rounded():
    workers = {"w": jnp.array([[1.0], [1.0078125], [1.0]], jnp.bfloat16)}
    found, _ = oc.centered_clip(workers, {"w": jnp.zeros(1)}, 10.0)
    np.testing.assert_allclose(found["w"], [3.0078125 / 3], rtol=1e-6)


@pytest.mark.parametrize(
    ("specs", "own"),
    [
        ({"a": P("data"), "b": P("data")}, {"a": P(), "b": P()}),
        (
            {"a": P("data", "model"), "b": P("data")},
            {"a": P("model"), "b": P()},
        ),
    ],
    ids=["workers", "workers_and_params"],
)
def test_workers_on_other_devices_count_as_well(specs, own):
    mesh = jax.make_mesh((4, 2), ("data", "model"), (AxisType.Auto,) * 2)
    x = as_tree(random_history(1, 8)[0])
    center = as_tree(jnp.ones(6))

    def aggregate(x, v):
        v, seen = oc.centered_clip(x, v, 2.0, num_iters=2)
        return v, seen.norms, seen.nonfinite_count

    mapped = jax.shard_map(
        aggregate,
        mesh=mesh,
        in_specs=(specs, own),
        out_specs=(own, P("data"), P()),
    )
    found = jax.jit(mapped)(x, center)
    expected, seen = oc.centered_clip(x, center, 2.0, num_iters=2)
    chex.assert_trees_all_close(
        found, (expected, seen.norms, seen.nonfinite_count), rtol=1e-5
    )


def test_inside_shard_map_without_types_it_raises():
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    mapped = jax.shard_map(
        lambda x, v: oc.centered_clip(x, v, 1.0)[0],
        mesh=mesh,
        in_specs=(P("data"), P()),
        out_specs=P(),
        check_vma=False,
    )
    with pytest.raises(ValueError, match=r"axes the workers are split.*check_vma=True"):
        jax.eval_shape(mapped, jnp.ones((8, 2)), jnp.ones(2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_norm": -1.0}, "Expected max_norm >= 0, got -1"),
        ({"num_iters": 0}, "Expected num_iters >= 1, an int, got 0"),
        ({"num_iters": 1.5}, r"Expected num_iters >= 1, an int, got 1\.5"),
        ({"center": {"v": jnp.ones(2)}}, r"structure as the updates: .* at 'v'"),
        (
            {"center": {"w": jnp.ones(3)}},
            r"\(workers, 3\) at 'w', 4 wor.* \(4, 2\)",
        ),
        (
            {"updates": {"w": jnp.ones((4, 2)), "b": jnp.ones((5,))}},
            r"\(workers, 2\) at 'w', 5 workers, got \(4, 2\)",
        ),
    ],
)
def test_what_does_not_fit_raises(change, message):
    known: dict[str, Any] = {
        "updates": {"w": jnp.ones((4, 2))},
        "center": {"w": jnp.ones(2)},
        "max_norm": 1.0,
    }
    if "b" in change.get("updates", {}):
        known["center"]["b"] = jnp.ones(())
    with pytest.raises(ValueError, match=message):
        oc.centered_clip(**(known | change))
