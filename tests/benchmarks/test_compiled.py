"""The figures of a compiled step are those of what it does."""

import importlib
import pathlib

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec as P

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def of():
    """The module, imported as a script of its folder does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("_compiled")


def test_what_is_moved_is_in_units_of_the_gradients(of):
    x = jnp.zeros(1000)
    compiled = jax.jit(lambda x, y: jnp.sin(x) + y).lower(x, x).compile()
    cost = of.cost(compiled, x.nbytes)
    assert (cost["kernels"], cost["traffic"], cost["temporary"]) == (1, 3.0, 0.0)
    assert (cost["bytes_moved"], cost["conditionals"]) == (12_000, 0)
    assert not any(cost[kind] for kind in of.COLLECTIVES)


@pytest.fixture(scope="module")
def with_rescue():
    """A step with two sums over devices, one of them in a branch."""
    mesh = jax.make_mesh((8,), ("i",), axis_types=(AxisType.Auto,))

    def total(x):
        return jax.lax.psum(jnp.sum(x), "i")

    def step(x):
        norm = total(x)
        return jax.lax.cond(norm > 3e38, lambda: total(jnp.sin(x)), lambda: norm)

    step = jax.shard_map(step, mesh=mesh, in_specs=P("i"), out_specs=P())
    return jax.jit(step).lower(jnp.zeros(80)).compile()


def test_collectives_in_branches_are_counted_apart(of, with_rescue):
    cost = of.cost(with_rescue, 40)
    assert (cost["all_reduce"], cost["in_branches"]) == (1, 1)
    assert (cost["collective_bytes"], cost["conditionals"]) == (4, 1)
    assert cost["others_in_branches"] == 0


def test_bytes_of_a_kind_leave_out_those_in_branches(of, with_rescue):
    assert of.bytes_of("all_reduce", with_rescue) == 4
