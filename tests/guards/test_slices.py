"""A slice of what a program makes is made of slices, whatever the program is."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optaxclip._guards import slices

X = np.linspace(-2.0, 3.0, 64 * 48, dtype=np.float32).reshape(64, 48)
BY = slices.strides(X.shape, 100)


@jax.custom_jvp
def doubled(x):
    return 2.0 * x


doubled.defjvp(lambda primals, tangents: (doubled(*primals), doubled(*tangents)))

BY_ELEMENT: dict[str, Any] = {
    "an argument": lambda x: x,
    "products and sums": lambda x: 0.5 * x + x * x,
    "a selection": lambda x: jnp.where(x > 0, jnp.sqrt(jnp.abs(x)), -1.0),
    "of another type": lambda x: x.astype(jnp.bfloat16).astype(jnp.float32) ** 3,
    "jit": lambda x: jax.jit(lambda y: jnp.tanh(y) - 1.0)(x),
    "twice the same call": lambda x: jax.nn.relu(jax.nn.relu(x) - 1.0),
    "custom_jvp": doubled,
    "a constant": lambda x: jnp.full_like(x, 3.0),
}
SCALED: dict[str, Any] = {
    "a selection by one": lambda x: jnp.where(x[0, 0] > 0, x, -x),
    "a sum over all": lambda x: x / jnp.sum(x * x),
    "a row and a column": lambda x: x * jnp.sum(x, 0) + jnp.sum(x, 1, keepdims=True),
}
OTHERS: dict[str, Any] = {
    "a product of matrices": lambda x: (x @ x.T @ x) + x,
    "cumulative": lambda x: 2.0 * jnp.cumsum(x, axis=0),
    "turned": lambda x: jnp.exp(x[::-1]),
    "a part of it": lambda x: jnp.pad(x[1:-1], ((1, 1), (0, 0))),
    "scan": lambda x: jax.lax.scan(lambda y, _: (0.5 * y, None), x, length=2)[0],
}


def sliced(function, whole=lambda x: x):
    """What the program gives at last, and the equations that this takes."""

    def sample(x):
        return slices.asked_for(function(x), BY)

    def run(x):
        closed = jax.make_jaxpr(lambda: sample(x))()
        return slices.run(closed, 1, closed.consts, [whole] * len(closed.consts))[0]

    return jax.jit(run)(X), jax.make_jaxpr(run)(X)


@pytest.mark.parametrize("name", [*BY_ELEMENT, *SCALED, *OTHERS])
def test_it_is_the_slice_of_the_whole(name):
    function = (BY_ELEMENT | SCALED | OTHERS)[name]
    got, _ = sliced(function)
    np.testing.assert_allclose(got, function(X)[:: BY[0], :: BY[1]], rtol=1e-5)


@pytest.mark.parametrize("name", BY_ELEMENT)
def test_of_what_is_made_by_element_the_rest_is_not_made(name):
    asked = []
    _, made = sliced(BY_ELEMENT[name], lambda x: asked.append(x) or x)
    kinds: list[Any] = [v.aval for eqn in made.eqns for v in eqn.outvars]
    sizes = [math.prod(x.shape) for x in kinds]
    assert not asked
    assert max(sizes, default=0) <= 100


@pytest.mark.parametrize("name", SCALED)
def test_all_of_it_is_asked_for_what_all_of_it_decides(name):
    asked = []
    _, made = sliced(SCALED[name], lambda x: asked.append(x) or x)
    last: Any = made.eqns[-1].outvars[0].aval
    assert len(asked) == 1
    assert last.shape == X[:: BY[0], :: BY[1]].shape


@pytest.mark.parametrize(
    "shape", [(), (7,), (3072,), (64, 64), (50257, 768), (3, 3, 64, 128), (1, 5000)]
)
def test_some_are_spread_evenly_over_all_axes(shape):
    by = slices.strides(shape, 1024)
    counts = [math.ceil(size / step) for size, step in zip(shape, by, strict=True)]
    assert math.prod(counts) <= 1024
    assert math.prod(counts) >= min(math.prod(shape), 512)


def test_a_slice_over_more_than_a_tpu_has_room_for_is_the_same(monkeypatch):
    expected = slices.sliced(X, BY)
    monkeypatch.setattr(slices, "_ROOM", 0)
    np.testing.assert_array_equal(slices.sliced(X, BY), expected)
