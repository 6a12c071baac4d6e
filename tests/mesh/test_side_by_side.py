"""Numbers that differ from device to device, combined in one round where it pays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import helpers
from layouts import grid
from optaxclip._mesh import collectives, side_by_side

BOTH = frozenset({"data", "model"})
# Of each array: how it is split, and which of its dimensions is reduced.
SOME = {
    "rows": (P("data", "model"), 0),
    "columns": (P("data", "model"), 1),
    "all": (P("data", "model"), (0, 1)),
    "one_axis": (P("data"), 0),
    "whole": (P(None, "model"), 0),
}


def axes_of(spec, chosen):
    pairs = zip(spec, chosen, strict=True)
    return frozenset(axis for axis, is_chosen in pairs if is_chosen and axis)


def combined(names, combine, collective):
    """Returns the function of whole arrays."""
    specs, dimensions = zip(*(SOME[name] for name in names), strict=True)
    split = [(*spec, None)[:2] for spec in specs]
    along = [(d,) if isinstance(d, int) else d for d in dimensions]

    def inside(arrays):
        pairs = zip(arrays, along, strict=True)
        parts = [combine(x, axis=d, keepdims=True) for x, d in pairs]
        pairs = list(zip(split, along, strict=True))
        axes = [axes_of(own, [d in some for d in range(2)]) for own, some in pairs]
        kept = [axes_of(own, [d not in some for d in range(2)]) for own, some in pairs]
        return side_by_side.each_over(parts, axes, kept, collective)

    out = [
        P(*(None if d in some else own[d] for d in range(2)))
        for own, some in zip(split, along, strict=True)
    ]
    return jax.shard_map(inside, mesh=grid(), in_specs=(list(specs),), out_specs=out)


def arrays_of(count):
    draw = np.random.default_rng(0)
    return [draw.uniform(size=(8, 4)).astype(np.float32) for _ in range(count)]


def rounds(function, *args):
    steps = helpers.steps(jax.make_jaxpr(function)(*args).jaxpr)
    return sum(x.primitive.name.startswith(("psum", "pmax", "pmin")) for x in steps)


@pytest.mark.parametrize("small", [2**20, 0])
@pytest.mark.parametrize("name", ["sum", "max"])
def test_each_is_combined_over_its_own_axes(name, small, monkeypatch):
    monkeypatch.setattr(side_by_side, "SMALL", small)
    combine = getattr(jnp, name)
    collective = jax.lax.psum if name == "sum" else collectives.pmax
    function, arrays = combined(SOME, combine, collective), arrays_of(len(SOME))
    found = jax.jit(function)(arrays)
    for x, array, (_, dimensions) in zip(found, arrays, SOME.values(), strict=True):
        right = getattr(np, name)(array, axis=dimensions, keepdims=True)
        np.testing.assert_allclose(x, right, rtol=1e-6)


@pytest.mark.parametrize(
    ("names", "small", "count"),
    [
        (("rows", "columns", "all", "one_axis", "whole"), 2**20, 1),
        (("rows", "columns", "all", "one_axis", "whole"), 0, 4),
        (("rows", "one_axis"), 2**20, 2),  # one still differs over the other axis
        (("one_axis", "one_axis"), 0, 1),
        (("whole",), 2**20, 0),
    ],
    ids=str,
)
def test_rounds(names, small, count, monkeypatch):
    monkeypatch.setattr(side_by_side, "SMALL", small)
    function = combined(names, jnp.sum, jax.lax.psum)
    assert rounds(function, arrays_of(len(names))) == count


def test_a_nan_stays_with_its_device():
    arrays = arrays_of(2)
    arrays[0][3, 2] = np.nan
    function = combined(("rows", "columns"), jnp.sum, jax.lax.psum)
    sums, others = jax.jit(function)(arrays)
    assert np.isnan(sums).tolist() == [[False, False, True, False]]
    assert np.isfinite(others).all()


def test_dtypes_stay():
    def inside(x):
        parts = [jnp.sum(x, keepdims=True), jnp.sum(x, keepdims=True) * (1 + 1j)]
        axes, kept = [frozenset({"data"})] * 2, [frozenset()] * 2
        return side_by_side.each_over(parts, axes, kept, jax.lax.psum)

    found = jax.shard_map(inside, mesh=grid(), in_specs=P("data"), out_specs=P())(
        jnp.ones(8)
    )
    assert [x.dtype for x in found] == ["float32", "complex64"]


@pytest.mark.parametrize(("few", "count"), [(64, 1), (0, 3)])
def test_the_device_with_the_smallest_is_found(few, count, monkeypatch):
    """A NaN is the smallest; of equal ones it is the first."""
    monkeypatch.setattr(side_by_side, "FEW", few)
    draw = np.random.default_rng(0)
    columns = draw.integers(0, 5, size=(8, 3, 40)).astype(np.float32)
    columns[5, 2, ::7] = np.nan
    function = jax.shard_map(
        lambda x: jnp.stack(side_by_side.at_smallest(list(x[0]), BOTH)),
        mesh=grid(),
        in_specs=P(("data", "model")),
        out_specs=P(),
    )
    found = jax.jit(function)(columns)
    right = columns[np.argmin(columns[:, 2], axis=0), :, np.arange(40)].T
    np.testing.assert_array_equal(found, right)
    assert rounds(function, columns) == count


@pytest.mark.parametrize(("few", "count"), [(64, 1), (0, 2)])
def test_the_largest_and_the_sum_of_all_devices(few, count, monkeypatch):
    """Of as many numbers as take XLA for CPU to lose a NaN."""
    monkeypatch.setattr(side_by_side, "FEW", few)
    columns = np.random.default_rng(0).integers(0, 9, size=(8, 2, 5000))
    rows = columns.astype(np.float32)
    rows[3, 0, ::7], rows[5, 0, ::11] = np.inf, np.nan
    function = jax.shard_map(
        lambda x: side_by_side.largest_and_sum(x[0], ("data", "model")),
        mesh=grid(),
        in_specs=P(("data", "model")),
        out_specs=P(),
    )
    largest, total = jax.jit(function)(rows)
    np.testing.assert_array_equal(largest, np.max(rows[:, 0], axis=0))
    np.testing.assert_array_equal(total, np.sum(rows[:, 1], axis=0))
    assert rounds(function, rows) == count


def test_the_derivative_is_that_of_the_device_that_was_chosen():
    chosen = functools.partial(side_by_side.at_smallest, axes=BOTH)
    function = jax.shard_map(
        lambda x: chosen([3 * x, x])[0],
        mesh=grid(),
        in_specs=P(("data", "model")),
        out_specs=P(),
    )
    values = jnp.array([5.0, 2, 7, 3, 9, 8, 6, 4])
    found = jax.grad(lambda x: function(x)[0])(values)
    np.testing.assert_array_equal(found, 3.0 * (values == 2))
